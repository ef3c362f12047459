"""What DP-SGD costs a unit that owns up to k rows: Opacus's PRV accountant for a mixture of Gaussians.

Each of a unit's rows is sampled by itself at rate q and clipped to norm C, so its j rows of one batch move the sum by
at most j·C, with j ~ Binomial(k, q). By Choquette-Choo, Ganesh, Steinke and Thakurta (arXiv 2310.15526, Corollary 4.7)
and Ganesh (arXiv 2401.10294) the step is then dominated, in multiples of C, by the pair

    N(0, σ²)   and   Σ_j P[j]·N(j, σ²)

which is tight for k equal rows, and steps compose as any dominating pairs do. Fewer rows, shorter gradients and smaller
j are dominated too (the same corollary), so what the tails of the binomial distribution hold may be moved upwards.

Guarantees: `prv_epsilon` is the upper end of an interval around the epsilon of that pair, for adding and for removing
the unit. The discretisation, its error bound and the composition by FFT are Opacus's (Gopi, Lee and Wutschitz, arXiv
2106.02848); the random variable and its tails are computed here. dp-accounting, the other accountant, shares no code
with it but the table of `sensitivities`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.fft import next_fast_len
from scipy.interpolate import CubicHermiteSpline
from scipy.special import logsumexp, ndtr
from scipy.stats import binom

Floats = npt.NDArray[np.float64]

# What may be moved upwards, a step: far below delta / steps for every delta and number of steps that a spec can name.
_NEGLIGIBLE = 1e-20
_MOVED = 1e-23  # PLD leaves out 2e-22
_REACH = 12.0  # standard deviations; beyond lies 2e-33
_NODES_PER_SIGMA = 200
FARTHEST = 700.0
"""Losses up to which Opacus can tell an epsilon: it takes their exponentials."""
_RATES = np.logspace(-3, 3, 40)  # of Chernoff's bound: the best of them is near enough


def sensitivities(rows_per_unit: int, sample_rate: float) -> tuple[list[float], list[float]]:
    """How many of a unit's rows are in one batch, and how probable that is; its improbable ends moved upwards."""
    counts = binom(rows_per_unit, sample_rate)
    low, high = int(counts.ppf(_NEGLIGIBLE)), min(int(counts.isf(_NEGLIGIBLE)), rows_per_unit)
    numbers = np.arange(low, high + 1)
    # For small rates that is far too high. What is moved to the very end has to be next to nothing even there.
    few = int((counts.sf(numbers) >= _MOVED).sum())
    numbers = numbers[: few + 1]
    high = int(numbers[-1])
    masses = counts.pmf(numbers)
    masses[0] += counts.cdf(low - 1)
    if high < rows_per_unit:
        numbers, masses = np.append(numbers, rows_per_unit), np.append(masses, counts.sf(high))
    kept = masses > 0.0
    return [float(number) for number in numbers[kept]], [float(mass) for mass in masses[kept] / masses.sum()]


def prv_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int, epsilon_error: float,
    most_points: int,
) -> float:  # fmt: skip
    """The larger upper end of adding and of removing one unit. Not negative.

    The error is larger than `epsilon_error` where that would take more than `most_points`.
    """
    from opacus.accountants.analysis.prv import Domain, compose_heterogeneous, discretize

    delta_error = delta / 1000  # Opacus's choice
    ends = [0.0]
    for removed in (True, False):
        loss = _Loss(noise_multiplier, *sensitivities(rows_per_unit, sample_rate), removed=removed)
        reach = max(loss.reach(steps, delta_error / 8), loss.reach(1, delta_error / (8 * steps)), epsilon_error) + 1.0
        if reach > FARTHEST:
            return math.inf
        error = max(epsilon_error, 2 * reach * points_per_error(steps, delta_error) / most_points)
        mesh = error / points_per_error(steps, delta_error)
        # As many points as make a fast Fourier transform, and half a step of reserve for rounding.
        reach = (next_fast_len(math.ceil(reach / mesh) + 1, real=True) - 1) * mesh
        one: Any = discretize(loss, Domain.create_aligned(mesh / 2 - reach, reach - mesh / 2, mesh))
        _, _, upper = compose_heterogeneous([one], [steps]).compute_epsilon(delta, delta_error, error)
        ends.append(float(upper))
    return math.inf if any(math.isnan(end) for end in ends) else max(ends)


def spread(noise_multiplier: float, counts: list[float], masses: list[float]) -> float:
    """How far the losses of one step lie apart, but for the rarest."""
    j, p = np.array(counts), np.array(masses)
    j, p = j[p > _NEGLIGIBLE], p[p > _NEGLIGIBLE]
    low, high = (
        logsumexp(np.log(p) + (j * x - j * j / 2) / noise_multiplier**2)
        for x in (-_REACH * noise_multiplier, j.max() + _REACH * noise_multiplier)
    )
    return float(high - low)


def points_per_error(steps: int, delta_error: float) -> float:
    """How many points of the grid there are in the error of epsilon (Gopi et al., section 5)."""
    return math.sqrt(steps * math.log(12 / delta_error) / 2)


class _Loss:
    """The privacy loss of one step as a random variable: what Opacus's `discretize` asks for, and how far it reaches.

    With l(x) = log(mixture(x) / N(0, σ²)(x)), which ascends in x: l(X) under the mixture where a unit is removed, and
    -l(X) under N(0, σ²) where it is added. Both are tabulated over x; the cubic in between is off by about 1e-12.
    """

    def __init__(self, sigma: float, counts: list[float], masses: list[float], *, removed: bool) -> None:
        j, p = np.array(counts), np.array(masses)
        # An atom of less than the negligible mass, moved to the very end, is left to `delta_error`.
        top = float(j[p > _NEGLIGIBLE].max())
        size = 2 * math.ceil((top / sigma + 2 * _REACH) * _NODES_PER_SIGMA / 2) + 1
        x = np.linspace(-_REACH * sigma, top + _REACH * sigma, size)
        loss, slope, cdf, pdf = (np.empty(size) for _ in range(4))
        for start in range(0, size, 4096):  # in pieces: the table of all x and all j may be large
            part = slice(start, start + 4096)
            terms = np.log(p) + (j * x[part, None] - j * j / 2) / sigma**2
            loss[part] = logsumexp(terms, axis=1)
            slope[part] = (np.exp(terms - loss[part, None]) * j).sum(axis=1) / sigma**2
            centre = np.array([0.0]) if not removed else j
            weight = np.array([1.0]) if not removed else p
            z = (x[part, None] - centre) / sigma
            cdf[part] = (weight * ndtr(z)).sum(axis=1)
            pdf[part] = (weight * np.exp(-z * z / 2)).sum(axis=1) / (sigma * math.sqrt(2 * math.pi))
        self._loss = loss if removed else -loss
        self._weights = pdf * (x[1] - x[0])  # the trapezium rule converges exponentially here: both ends are flat
        # Far out, losses may be equal in double precision: an inverse needs them ascending.
        apart = np.concatenate(([True], np.diff(loss) > 1e-14 * np.maximum(1.0, np.abs(loss[1:])))) & (slope > 0.0)
        self._x = CubicHermiteSpline(loss[apart], x[apart], 1.0 / slope[apart])
        self._cdf = CubicHermiteSpline(x, cdf, pdf)
        with np.errstate(divide="ignore"):
            logs = np.log(self._weights)
        self._log_moments = [
            np.array([logsumexp(logs + sign * rate * self._loss) for rate in _RATES]) for sign in (1.0, -1.0)
        ]
        self._ends = float(loss[apart][0]), float(loss[apart][-1])
        self._removed = removed

    def cdf(self, t: Floats) -> Floats:
        """P[loss <= t]."""
        ascending = np.asarray(t if self._removed else -t, dtype=np.float64)
        low, high = self._ends
        below = np.clip(self._cdf(self._x(np.clip(ascending, low, high))), 0.0, 1.0)
        below = np.where(ascending < low, 0.0, np.where(ascending > high, 1.0, below))
        return below if self._removed else 1.0 - below

    def mean(self) -> float:
        return float(self._weights @ self._loss)

    def reach(self, steps: int, probability: float) -> float:
        """The sum of `steps` losses is farther from 0 with at most this probability (Chernoff's bound)."""
        return max(
            float(((steps * moments - math.log(probability / 2)) / _RATES).min()) for moments in self._log_moments
        )
