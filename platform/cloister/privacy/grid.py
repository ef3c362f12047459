"""The grid on which the sums and the noise of a run lie, and a bound on what rounding adds to the effect of one row.

Sums. A block of rows is summed in float32 and rounded to a multiple of `unit`, a power of two, at most 2⁻³² of the
clipping norm C unless a batch is so large that it has to be more. From there on, everything is a whole number of units
below 2⁵³, which float64 holds exactly: blocks, ranks and noise are added without any error, in any order.

Noise. The noise of each rank is drawn as a Gaussian and rounded to the same grid. Whole numbers of units pass through
rounding unchanged, so rounding the sum of data and noise is the same as adding rounded noise: what leaves a rank is
post-processing of the Gaussian mechanism. (Rounding the sum of noise and an unrounded sum is not, in floating point:
Mironov, CCS 2012.) The sum of several ranks' rounded noise has, at each point of the grid, the density of a Gaussian of
the whole deviation plus one uniform unit a rank, up to a factor of exp(-2π²·(std/unit)²): no number of this world.

What one row moves. Neighbours are two tables of which one has one row more. Let both be in step with the same
randomness, so that their batches differ by that row. Then, in units of C:
  1. The row itself adds a gradient of norm at most 1, up to the rounding of its norm and its weight. Norms over several
     positions come from float32 products or, where those cancel, from float64 (`layers`): `NORMS` bounds what is
     missing.
  2. No other row's weighted gradient changes by a bit: a worker checks on its own device that they do not depend on
     which rows share a microbatch, nor on how many (`clipping`).
  3. Of each parameter's blocks one changes (`blocks`): it had up to r rows and has one more, or is split in two which
     together have. A float32 sum of n products is off by at most γ(n) = n·u/(1 - n·u) times the sum of their absolute
     values, u = 2⁻²⁴, in whatever order (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1). Those
     of one row come to its weight times Σ_t |g_t|·|a_t|, and a norm counts for at least `floor` times that sum: so to
     at most 1/floor. Before and after, the block is off by γ(n)·(2r + 1)/floor at most.
  4. Different parameters have blocks of different rows, but of two sizes only, for single positions and for several:
     that makes √2 of it, at most (Cauchy and Schwarz, row by row).
  5. Rounding three blocks of P values each to whole units: 1.5·√P·unit, at most `_ROUNDED`.
`Block.of` chooses r and the floor such that 3 and 4 come to `SUMS`, whatever the number of rows: it does not grow with
the table. Noise is scaled by 1 + `SLACK`, which is all of this together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch

from cloister.errors import InputError

SLACK = 2.0**-6
NORMS = 2.0**-8
_ROUNDED = 2.0**-12  # to the grid: 1.5·√P·unit, of up to 10¹¹ parameters where the unit is the finest
SUMS = SLACK - NORMS - _ROUNDED
_BOUNDS = 1e-6, 1e6
_FINEST = 2.0**-32
_WHOLE = 2.0**52  # numbers up to here have room for a sign and one more addition
_HALF_ULP = 2.0**-24
MOST_ROWS = 256
"""Of a block of single positions."""
_MOST_SEVERAL = 128
# A norm counts for at least this much, relative to that of as many positions of equal length that are orthogonal.
_FLOOR_OF_ORTHOGONAL = 0.6
# How far a batch may exceed what is expected: P[Poisson(m) > m + 40·√m + 1600] < exp(-300).
_TAIL = 40.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Of a run; the same on all ranks."""

    unit: float
    bound: float
    """C."""
    rows_a_rank: float
    """How many a rank expects in a batch: public."""

    @classmethod
    def of(
        cls, bound: float, expected_rows: float, noise_multiplier: float = 0.0, ranks: int = 1, parameters: int = 1
    ) -> Self:
        """The finest grid for the sums of such batches, of so many rows on all ranks together.

        Raises:
            InputError: the clipping norm is so small or so large that float32 loses squares of it, or batches are so
                large, for so many parameters, that rounding to the grid would count.
        """
        if not 0.0 < bound < math.inf:
            raise ValueError("max_grad_norm is positive and finite")
        if not _BOUNDS[0] <= bound <= _BOUNDS[1]:
            raise InputError("the clipping norm is out of range", "choose max_grad_norm between 1e-6 and 1e6")
        rows = expected_rows + _TAIL * math.sqrt(expected_rows) + _TAIL**2
        finest = max(_FINEST, (rows + _TAIL * noise_multiplier * (1 + SLACK)) / _WHOLE)
        unit = math.ldexp(1.0, math.ceil(math.log2(finest * bound)))
        if 1.5 * math.sqrt(parameters) * unit > _ROUNDED * bound:
            raise InputError("batches are too large for so many parameters", "expect fewer rows in a step")
        return cls(unit, bound, expected_rows / ranks)

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, in place, as whole numbers of units: float32 has them, since the unit is a power of two."""
        return values.mul_(1.0 / self.unit).round_()

    def add(self, total: torch.Tensor, block: torch.Tensor) -> None:
        """Add a block's float32 sum, which is overwritten, to a float64 total, exactly."""
        total.add_(self.round(block), alpha=self.unit)


@dataclass(frozen=True, slots=True)
class Block:
    """How many rows and positions are summed in float32, and what their norms count for at least."""

    rows: int
    positions: int
    floor: float
    """Relative to Σ_t |g_t|·|a_t|."""

    @classmethod
    def of(cls, positions: int, rows: int = 0) -> Self:
        """For rows of so many positions; `rows` where other layers ask for fewer."""
        rows = rows or (MOST_ROWS if positions == 1 else _MOST_SEVERAL)
        most = 0.99 if positions == 1 else _FLOOR_OF_ORTHOGONAL / math.sqrt(positions)
        summed = positions
        while (floor := _floor(positions, rows, summed)) > most and (rows > 1 or summed**2 > positions):
            if rows > 1:
                rows //= 2
            else:
                summed = -(-summed // 2)
        return cls(rows, summed, floor)


def _floor(positions: int, rows: int, summed: int) -> float:
    # The weight is multiplied in first; in the end, the sums of so many positions each are added up.
    n = 1 + rows * summed + -(-positions // summed) - 1
    gamma = n * _HALF_ULP / (1 - n * _HALF_ULP) if n * _HALF_ULP < 1 else math.inf
    return math.sqrt(2) * gamma * (2 * rows + 1) / SUMS
