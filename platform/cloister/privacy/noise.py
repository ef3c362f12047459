# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""Gaussian noise for DP-SGD from a cryptographic stream.

Guarantees: samples are N(0, std²) up to float64. Each step of each rank of each attempt has a ChaCha20 key of its own,
and a step's noise is drawn once: a step that is not later than the last one is refused, so that a loop that stands
still or goes back fails before it releases the same noise twice. There is no other source of noise to fall back to. The
kernel for CUDA (`noise_cuda`) draws the same values up to rounding, so that either can be checked against the other.

Floating point. What is released must not betray which of the finitely many outputs of Box and Muller's method was added
(Mironov, CCS 2012; Jin et al., "Are We There Yet? Timing and Floating-Point Attacks on Differential Privacy Systems",
arXiv 2112.05307). A pair of values betrays itself by its radius: the uniforms that radii come from are multiples of
some 2⁻ᵇ, and where two of them are further apart than the rounding of the pair, only some pairs can be. With 53 bits
and a rounding of 2⁻³² deviations that is one pair in fourteen million, which large models draw in every few steps. So
  - sums are whole numbers of units, noise is rounded to whole units before it is added, and adding is exact (`grid`);
  - radii have 63 bits;
  - to each value comes a uniform number of units, of up to 2⁻⁸ deviations (`_DITHER`). What is independent of the rows
    is post-processing of the Gaussian, and adds a millionth to its variance. Now one pair in 10¹⁷ betrays itself.
(Opacus's secure mode, which can no longer be turned on, adds up four Gaussians instead: four times the work.)

Not promised: the exact discrete Gaussian. These make inversion infeasible; they are no proof about floats.

The values of a step fall into chunks, and chunk c uses nonce c from block 0 on. A chunk of V values has H =
8·ceil(V/16) columns; its 3·H words are radius, angle and dither of a Box-Muller pair a column. The cosine is value h,
with the lower half of the dither; the sine is value H + h, with the upper half; those from V on are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from cloister.errors import IntegrityError, UnavailableError
from cloister.privacy.keystream import Unrepeatable, chacha20, derive_key

CHUNK_VALUES = 2**14
# A megabyte of words: enough for PyTorch to share the work among threads, and little enough for the cache.
_CHUNKS_AT_ONCE = 8
# An angle is a number of 53 bits, which is all that a float64 holds; of a radius it holds 63 where they count, near 0.
_ANGLE_BITS, _RADIUS_BITS = 53, 63
# The width of the uniform numbers, relative to the deviation, and at most so many bits.
_DITHER, _DITHER_BITS = 2.0**-8, 24


class GaussianNoise(Unrepeatable):
    """One rank's noise for one attempt, step by step."""

    def __init__(self, secret: bytes, *, run: str, attempt: int, rank: int) -> None:
        self._secret, self._run, self._attempt, self._rank = secret, run, attempt, rank
        self._last_step = -1
        derive_key(secret, purpose="noise", run=run, attempt=attempt, rank=rank)  # a bad name fails now, not in step 0

    def add_to(self, step: int, sum_P: torch.Tensor, std: float, unit: float) -> None:
        """Add fresh independent N(0, std²) values in place, each rounded to a whole number of units, a power of two.

        Raises:
            IntegrityError: this step, or a later one, has drawn already.
            UnavailableError: there is no kernel for this device.
            ValueError: `std` is negative or not finite, or the tensor is no plain vector of float64.
        """
        if not (math.isfinite(std) and std >= 0.0):
            raise ValueError("a standard deviation is finite and not negative")
        if sum_P.dtype != torch.float64 or sum_P.dim() != 1 or not sum_P.is_contiguous():
            raise ValueError("noise is added to a contiguous vector of float64")
        if step <= self._last_step:
            raise IntegrityError(
                f"step {step} would draw noise again after step {self._last_step}",
                "never restore a stream: start a new attempt, which has its own",
            )
        add_gaussians = _implementation(sum_P.device.type)
        self._last_step = step  # before anything is drawn: a step that fails halfway is not drawn again either
        key = derive_key(
            self._secret, purpose="noise", run=self._run, attempt=self._attempt, rank=self._rank, step=step
        )
        add_gaussians(sum_P, key, std, unit)

    def __repr__(self) -> str:
        return f"GaussianNoise(run={self._run!r}, attempt={self._attempt}, rank={self._rank}, step={self._last_step})"


def _implementation(device: str) -> Callable[[torch.Tensor, bytes, float, float], None]:
    if device == "cpu":
        return add_gaussians
    if device == "cuda":
        try:
            from cloister.privacy import noise_cuda  # only here: builds of PyTorch for CPUs come without Triton
        except ImportError as error:
            raise UnavailableError("noise on a GPU takes Triton", "install triton, or train on the CPU") from error
        return noise_cuda.add_gaussians
    raise UnavailableError(f"there is no secure noise for device '{device}'", "train on cpu or cuda")


def dither_bits(std: float, unit: float) -> int:
    """How many bits the uniform number of units has that is added to each value."""
    return max(0, min(_DITHER_BITS, math.frexp(std / unit * _DITHER)[1] - 1))


def add_gaussians(sum_P: torch.Tensor, key: bytes, std: float, unit: float) -> None:
    """Add the N(0, std²) values of a key, in whole units: whoever calls it with the same key twice repeats them."""
    if std == 0.0:
        return
    whole = len(sum_P) // CHUNK_VALUES
    largest = max(min(whole, _CHUNKS_AT_ONCE) * _words(CHUNK_VALUES), _words(len(sum_P) % CHUNK_VALUES))
    room = np.empty(largest, np.uint64), torch.empty(largest, dtype=torch.float64)
    for first in range(0, whole, _CHUNKS_AT_ONCE):
        chunks = min(_CHUNKS_AT_ONCE, whole - first)
        part = sum_P[first * CHUNK_VALUES : (first + chunks) * CHUNK_VALUES]
        part.add_(_gaussians(key, first, chunks, CHUNK_VALUES, std / unit, dither_bits(std, unit), *room), alpha=unit)
    rest = sum_P[whole * CHUNK_VALUES :]
    if len(rest):
        values = _gaussians(key, whole, 1, len(rest), std / unit, dither_bits(std, unit), *room)
        rest.add_(values[: len(rest)], alpha=unit)


def _gaussians(
    key: bytes, first: int, chunks: int, values: int, units: float, bits: int, integers: npt.NDArray[np.uint64],
    floats: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Gaussians of so many units deviation, whole numbers, with dither: of chunks of so many values, in order.

    `integers` and `floats` are room to work in.
    """
    words = _words(values)
    zeros, integers = bytes(8 * words), integers[: chunks * words]
    for chunk in range(chunks):
        piece = memoryview(integers[chunk * words : (chunk + 1) * words]).cast("B")  # type: ignore[arg-type]  # numpy's arrays are buffers
        chacha20(key, first + chunk).update_into(zeros, piece)
    # 1. words -> integers of 63 and 53 bits, and of `bits` twice -> floats
    integers_N3H = integers.reshape(chunks, 3, words // 3)
    radius, angle, dither = integers_N3H[:, 0], integers_N3H[:, 1], integers_N3H[:, 2]
    radius >>= np.uint64(64 - _RADIUS_BITS)
    angle >>= np.uint64(64 - _ANGLE_BITS)
    floats_N3H = floats[: chunks * words].view(chunks, 3, words // 3)
    floats_N3H[:, :2] = torch.from_numpy(integers_N3H.view(np.int64))[:, :2]
    pairs_N2H, radius_NH, angle_NH = floats_N3H[:, :2], floats_N3H[:, 0], floats_N3H[:, 1]
    # 2. radius: the square root of -2·ln(u), with u in (0, 1] so that its logarithm is finite; in units
    radius_NH = radius_NH.add(1.0).mul_(2.0**-_RADIUS_BITS).log_().mul_(-2.0 * units**2).sqrt_()
    # 3. angle: 2·pi·u, with u in [0, 1)
    angle_NH.mul_(2.0 * math.pi * 2.0**-_ANGLE_BITS)
    torch.cos(angle_NH, out=pairs_N2H[:, 0])
    angle_NH.sin_()
    pairs_N2H.mul_(radius_NH.unsqueeze(1)).round_()
    # 4. dither: from the upper bits of each half, around 0
    if bits:
        upper = dither >> np.uint64(64 - bits)
        dither &= np.uint64(2**32 - 1)
        dither >>= np.uint64(32 - bits)
        for place, each in enumerate((dither, upper)):
            pairs_N2H[:, place] += torch.from_numpy(each.view(np.int64))
        pairs_N2H -= float(2 ** (bits - 1))
    return pairs_N2H.reshape(-1)


def _words(values: int) -> int:
    """How many words `values` values of a chunk take: whole blocks of eight, of radii, of angles and of dither."""
    return 3 * 8 * -(-values // 16)
