# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""Fixed image features for a small private head: the wavelet scattering transform of order two.

Guarantees: nothing in here is learnt, so the features cost no privacy; a picture's features depend on that picture
alone; the forward is convolutions, moduli and one normalisation per picture, so it exports to ONNX as it is. The
transform is that of Bruna and Mallat, "Invariant Scattering Convolution Networks" (arXiv 1203.1513), with J = 2
octaves and L = 8 orientations of Morlet wavelets ψ and a Gaussian φ:

    order 0     x * φ                                   1 channel
    order 1     |x * ψ(j, θ)| * φ                      16 channels: j in 0, 1
    order 2     ||x * ψ(0, θ)| * ψ(1, θ')| * φ         64 channels

each kept at every fourth pixel: 81 x 7 x 7 numbers of a picture of 28 x 28. Then group normalisation, as in Tramèr and
Boneh, "Differentially Private Learning Needs Better Features" (arXiv 2011.11660): by mean and deviation of the
picture's own channels, never of the data set.

Not promised: the same numbers as other packages to the last digit. Filters are cut off at three deviations and
borders are reflected, where others go through a Fourier transform.

Shapes: N pictures, H x W pixels, C channels, h x w positions that are kept.
"""

from __future__ import annotations

import math

import torch
from torch import nn

ORIENTATIONS = 8
CHANNELS = 1 + 2 * ORIENTATIONS + ORIENTATIONS**2
STRIDE = 4  # 2**J
MIN_SIDE = 11  # reflecting a border takes more pixels than the widest filter reaches over
_GROUPS = 27  # of three channels: what Tramèr and Boneh found best
_EPSILON = 1e-5  # below the variance of a picture's channels in 0..1; keeps an empty picture finite
# Bruna and Mallat, section 2.1; the deviation of a wavelet of octave j is 0.8 * 2**j, its frequency 3π/4 / 2**j.
_DEVIATION, _FREQUENCY, _SLANT = 0.8, 3.0 * math.pi / 4.0, 4.0 / ORIENTATIONS
_CUT_OFF = 3.0  # deviations


class Scattering(nn.Module):
    """[N, H·W] pictures in 0..1, in C order, to [N, 81·h·w] features. Filters are buffers that no state holds."""

    fine: torch.Tensor
    coarse: torch.Tensor
    average: torch.Tensor
    half_average: torch.Tensor

    def __init__(self, height: int, width: int) -> None:
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"a picture has at least {MIN_SIDE} pixels on each side")
        super().__init__()
        self.height, self.width = height, width
        self.outputs = CHANNELS * math.ceil(height / STRIDE) * math.ceil(width / STRIDE)
        for name, kernels in (
            ("fine", _wavelets(octave=0)),
            ("coarse", _wavelets(octave=1)),
            ("average", _gaussian(2 * _DEVIATION)),
            ("half_average", _gaussian(_DEVIATION)),  # for what is already kept at every second pixel
        ):
            self.register_buffer(name, kernels, persistent=False)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        x = x_ND.reshape(-1, 1, self.height, self.width)
        fine, coarse = _moduli(x, self.fine, 1), _moduli(x, self.coarse, 2)
        second = _moduli(fine, self.coarse, 2)
        features_NChw = torch.cat(
            [
                _convolve(x, self.average, 4),
                _convolve(fine, self.average, 4),
                _convolve(coarse, self.half_average, 2),
                _convolve(second, self.half_average, 2),
            ],
            dim=1,
        )
        return nn.functional.group_norm(features_NChw, _GROUPS, eps=_EPSILON).flatten(1)


def _convolve(x: torch.Tensor, kernels: torch.Tensor, stride: int) -> torch.Tensor:
    """Each channel of [N, C, H, W] with each of K kernels [K, 1, k, k], to [N, C·K, H / stride, W / stride]."""
    reach = kernels.shape[-1] // 2
    single = x.reshape(-1, 1, x.shape[2], x.shape[3])
    padded = nn.functional.pad(single, (reach, reach, reach, reach), mode="reflect")
    y = nn.functional.conv2d(padded, kernels, stride=stride)
    return y.reshape(-1, x.shape[1] * len(kernels), y.shape[2], y.shape[3])


def _moduli(x: torch.Tensor, wavelets: torch.Tensor, stride: int) -> torch.Tensor:
    """The moduli of complex convolutions: real parts are every other kernel, imaginary parts follow them."""
    y = _convolve(x, wavelets, stride)
    parts = y.reshape(-1, y.shape[1] // 2, 2, y.shape[2], y.shape[3])
    return parts.square().sum(dim=2).sqrt()


def _grid(reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return rows, columns


def _wavelets(octave: int) -> torch.Tensor:
    """[2·L, 1, k, k]: Morlet wavelets over a half turn; their sum is zero after the cut, so flat areas give nothing."""
    deviation, frequency = _DEVIATION * 2**octave, _FREQUENCY / 2**octave
    rows, columns = _grid(math.ceil(_CUT_OFF * deviation / _SLANT))
    kernels = []
    for orientation in range(ORIENTATIONS):
        angle = math.pi * orientation / ORIENTATIONS
        along = math.cos(angle) * rows + math.sin(angle) * columns
        across = -math.sin(angle) * rows + math.cos(angle) * columns
        envelope = torch.exp(-(along.square() + (_SLANT * across).square()) / (2.0 * deviation**2))
        wave = torch.polar(envelope, frequency * along)
        wave -= envelope * (wave.sum() / envelope.sum())
        wave *= _SLANT / (2.0 * math.pi * deviation**2)
        kernels += [wave.real, wave.imag]
    return torch.stack(kernels).unsqueeze(1).float()


def _gaussian(deviation: float) -> torch.Tensor:
    rows, columns = _grid(math.ceil(_CUT_OFF * deviation))
    kernel = torch.exp(-(rows.square() + columns.square()) / (2.0 * deviation**2))
    return (kernel / kernel.sum()).float()[None, None]
