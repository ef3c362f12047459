# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""Gaussian noise for DP-SGD from a cryptographic stream.

Guarantees: samples are N(0, std²) up to float64. Each step of each rank of each attempt has a ChaCha20 key of its own,
and a step's noise is drawn once: a step that is not later than the last one is refused, so that a loop that stands
still or goes back fails before it releases the same noise twice. There is no other source of noise to fall back to. The
kernel for CUDA (`noise_cuda`) draws the same values up to rounding, so that either can be checked against the other.

Floating point. What is released must not betray which of the finitely many outputs of Box and Muller's method was added
(Mironov, CCS 2012; Jin et al., "Are We There Yet? Timing and Floating-Point Attacks on Differential Privacy Systems",
arXiv 2112.05307). So each noisy sum is rounded to a grid that depends on the deviation alone, some 2⁻³⁰ of it: every
sum lies on the grid, whatever the rows, and to each point of it lead on the order of 2⁷⁰ pairs of 53-bit uniforms.
Rounding is post-processing. (Opacus's secure mode, which can no longer be turned on, adds up four values
instead: four times the work.)

Not promised: the exact discrete Gaussian. The grid makes inversion infeasible; it is not a proof about floats.

The values of a step fall into chunks, and chunk c uses nonce c from block 0 on. A chunk of V values has
H = 8·ceil(V/16) columns; its 2·H words are radius and angle of a Box-Muller pair a column. The cosine is value h, the
sine is value H + h; those from V on are dropped.
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
# The grid of the noisy sum is the power of two at or below the deviation, times this.
_GRID = 2.0**-30
# The bits of a word beyond the 53 that a float64 holds.
_SPARE_BITS = 11
_UNIT = 2.0**-53


class GaussianNoise(Unrepeatable):
    """One rank's noise for one attempt, step by step."""

    def __init__(self, secret: bytes, *, run: str, attempt: int, rank: int) -> None:
        self._secret, self._run, self._attempt, self._rank = secret, run, attempt, rank
        self._last_step = -1
        derive_key(secret, purpose="noise", run=run, attempt=attempt, rank=rank)  # a bad name fails now, not in step 0

    def add_to(self, step: int, sum_P: torch.Tensor, std: float) -> None:
        """Add fresh independent N(0, std²) values in place; each sum is made in float64 and rounded once.

        Raises:
            IntegrityError: this step, or a later one, has drawn already.
            UnavailableError: there is no kernel for this device.
            ValueError: `std` is negative or not finite, or the tensor is no plain vector of float32 or float64.
        """
        if not (math.isfinite(std) and std >= 0.0):
            raise ValueError("a standard deviation is finite and not negative")
        if sum_P.dtype not in (torch.float32, torch.float64) or sum_P.dim() != 1 or not sum_P.is_contiguous():
            raise ValueError("noise is added to a contiguous vector of float32 or float64")
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
        add_gaussians(sum_P, key, std)

    def sample(self, step: int, count: int, std: float) -> torch.Tensor:
        """The step's N(0, std²) values by themselves, in float64 on the CPU. Raises as `add_to` does."""
        values = torch.zeros(count, dtype=torch.float64)
        self.add_to(step, values, std)
        return values

    def __repr__(self) -> str:
        return f"GaussianNoise(run={self._run!r}, attempt={self._attempt}, rank={self._rank}, step={self._last_step})"


def _implementation(device: str) -> Callable[[torch.Tensor, bytes, float], None]:
    if device == "cpu":
        return add_gaussians
    if device == "cuda":
        try:
            from cloister.privacy import noise_cuda  # only here: builds of PyTorch for CPUs come without Triton
        except ImportError as error:
            raise UnavailableError("noise on a GPU takes Triton", "install triton, or train on the CPU") from error
        return noise_cuda.add_gaussians
    raise UnavailableError(f"there is no secure noise for device '{device}'", "train on cpu or cuda")


def put_on_grid(sum_P: torch.Tensor, std: float) -> None:
    """Round a noisy sum, in place, to the grid of its deviation."""
    if std > 0.0:
        grid = math.ldexp(_GRID, math.frexp(std)[1] - 1)  # a power of two: dividing by it loses nothing
        sum_P.div_(grid).round_().mul_(grid)


def add_gaussians(sum_P: torch.Tensor, key: bytes, std: float) -> None:
    """Add the N(0, std²) values of a key, once, and round: whoever calls it with the same key twice repeats them."""
    whole = len(sum_P) // CHUNK_VALUES
    largest = max(min(whole, _CHUNKS_AT_ONCE) * CHUNK_VALUES, _words(len(sum_P) % CHUNK_VALUES))
    room = np.empty(largest, np.uint64), torch.empty(largest, dtype=torch.float64)
    for first in range(0, whole, _CHUNKS_AT_ONCE):
        chunks = min(_CHUNKS_AT_ONCE, whole - first)
        part = sum_P[first * CHUNK_VALUES : (first + chunks) * CHUNK_VALUES]
        part.add_(_gaussians(key, first, chunks, CHUNK_VALUES, *room), alpha=std)
        put_on_grid(part, std)  # while the cache has it
    rest = sum_P[whole * CHUNK_VALUES :]
    if len(rest):
        rest.add_(_gaussians(key, whole, 1, _words(len(rest)), *room)[: len(rest)], alpha=std)
        put_on_grid(rest, std)


def _gaussians(
    key: bytes, first: int, chunks: int, words: int, integers: npt.NDArray[np.uint64], floats: torch.Tensor
) -> torch.Tensor:
    """Standard Gaussians of chunks of so many words each, in order; `integers` and `floats` are room to work in."""
    zeros, integers, floats = bytes(8 * words), integers[: chunks * words], floats[: chunks * words]
    for chunk in range(chunks):
        piece = memoryview(integers[chunk * words : (chunk + 1) * words]).cast("B")  # type: ignore[arg-type]  # numpy's arrays are buffers
        chacha20(key, first + chunk).update_into(zeros, piece)
    # 1. words -> integers of 53 bits -> floats
    np.right_shift(integers, _SPARE_BITS, out=integers)
    floats.copy_(torch.from_numpy(integers.view(np.int64)))
    pairs_N2H = floats.view(chunks, 2, words // 2)
    radius_NH, angle_NH = pairs_N2H.unbind(1)
    # 2. radius: the square root of -2·ln(u), with u in (0, 1] so that its logarithm is finite
    radius_NH = torch.sub(1.0, radius_NH, alpha=_UNIT).log_().mul_(-2.0).sqrt_()
    # 3. angle: 2·pi·u, with u in [0, 1)
    angle_NH.mul_(2.0 * math.pi * _UNIT)
    torch.cos(angle_NH, out=pairs_N2H[:, 0])
    angle_NH.sin_()
    return pairs_N2H.mul_(radius_NH.unsqueeze(1)).view(-1)


def _words(values: int) -> int:
    """How many words `values` values of a chunk take: whole blocks of eight, of radii and then of angles."""
    return 2 * 8 * -(-values // 16)
