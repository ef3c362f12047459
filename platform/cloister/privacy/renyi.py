"""What adaptive composition costs: Rényi divergences, added up, and the epsilon of a filter over them.

People choose the settings of a run after they have seen the models of earlier runs, and runs go on at the same time.
Certificates of single runs do not compose tightly then; Rényi divergences do, if the rule that stops is a filter.

Guarantees. Let P and Q be the distributions of everything released, for fixed neighbours, and L = log dP/dQ of what has
been released so far. Each step of a run is a release; so is an evaluation. Release i has a curve r_i(a): it bounds the
Rényi divergence of order a in both directions, whatever was released before. It is fixed before the release is made,
and may be chosen from all earlier ones. R(a) is the sum of the curves so far.
  1. For each order, exp((a-1)·(L - R(a))) is a nonnegative supermartingale under P that starts at 1 (Feldman and Zrnic,
     arXiv 2008.11193). So is M, the average of these over all orders with fixed weights. Most of them are near one
     order, which is chosen with a budget, before its first release (`order_for`), and stays: no weight depends on what
     was released, and no order is chosen afterwards, so no union bound is needed.
  2. `epsilon` is the least e >= 0 with max(0, 1 - exp(e - L)) <= delta·M for every real L. A ledger makes a
     release only if this e, with it in R, is at most its budget. Then E_P[max(0, 1 - exp(budget - L))] <= delta·E_P[M]
     <= delta, whenever it stops. With P and Q exchanged the same holds, so all of it is (budget, delta)-DP.
  3. That least e is the supremum of G(L) = L + log(1 - delta·M(L)) where delta·M(L) < 1. M is convex in L, so G is
     concave. Its maximum is where delta·Σ w·a·exp((a-1)·(L - R(a))) = 1. For one order of weight 1 this is the
     conversion of Canonne, Kamath and Steinke (arXiv 2004.00010).

Curves, of a step for units of up to k rows. The pair that dominates is N(0, 1) and the mixture of N(j/σ, 1) with
binomial weights (see `units`); f is its likelihood ratio, and z is N(0, 1).
  - Removing: E[f(z)^a] is a positive sum of unit Gaussians' integrals, since f is a polynomial in exp(z/σ). For each of
    these, the trapezium rule of step 1/2 is exact up to a factor 1 ± 1e-33, so it is for the sum.
  - Adding: E[f(z)^(1-a)]. log f is convex, so a tangent bounds it from below in each cell of a grid.
The rare batch with all k rows counts in full: where σ is small for k, only low orders are of use.

Does not guarantee: anything about neighbours that replace a unit; anything better than infinity for orders that cannot
be computed in about a second.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, logsumexp

from cloister.privacy.plan import PrivacyPlan

ORDERS: tuple[int, ...] = (*range(2, 11), 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 512)
"""Whole orders of Rényi divergences, ascending."""
DEFAULT_ORDER = 6
"""The one that weighs the most where nobody has chosen."""
Curve = tuple[float, ...]
"""An upper bound on the Rényi divergence at each of `ORDERS`; infinity is allowed."""
NOTHING: Curve = (0.0,) * len(ORDERS)
"""Of no release."""

Floats = npt.NDArray[np.float64]

_A = np.array(ORDERS, dtype=np.float64)
_NEAR, _FALL = 7 / 8, 5.0  # the weight of the orders near the chosen one, and how it falls from each to the next
_REMEMBERED = 1024  # mechanisms
_ROUNDING = 1e-13  # of one step: logarithms of sums near 1
_RELATIVE = 1e-12
_UNBOUNDED = 1e6  # divergences from here on count as infinite
_LEAST_NOISE = 1e-3  # with less, all orders do
_REACH = 9.0  # standard deviations; beyond lies 1e-19
_AFFORDABLE = 15_000_000  # exponentials: about a fifth of a second
_LIGHTEST = 1e-18  # masses of the binomial distribution that may be left out where this is an upper bound
_FINEST, _COARSEST = 5e-4, 1 / 40  # grids


def curve_of(plan: PrivacyPlan, steps: int) -> Curve:
    """What a run of this plan costs a unit once `steps` steps are committed, redone ones counted again.

    A unit is either trained on or held out: the curve is the larger of both at each order. Of 0 steps it is 0.

    Raises:
        ValueError: a negative number of steps.
    """
    return of_steps(
        step_of(plan.noise_multiplier, plan.sample_rate, plan.rows_per_unit), steps, plan.evaluation_epsilon
    )


def of_steps(step: Curve, steps: int, evaluation_epsilon: float) -> Curve:
    """As `curve_of`, from what one step costs (`step_of`)."""
    if steps < 0:
        raise ValueError("the number of steps is not negative")
    if steps == 0:
        return NOTHING
    evaluation = _pure(evaluation_epsilon)
    return tuple(max(_up(steps * each), other) for each, other in zip(step, evaluation, strict=True))


def total(curves: Iterable[Curve]) -> Curve:
    """The sum of the curves at each order, rounded upwards. The sum of no curves is 0.

    Raises:
        ValueError: a curve that has other orders, or a value that is negative or no number.
    """
    checked = [_checked(curve) for curve in curves]
    return tuple(_up(math.fsum(values)) for values in zip(NOTHING, *checked, strict=True))


def order_for(epsilon: float, delta: float) -> int:
    """The order by which a budget buys the most releases whose divergences ascend in proportion to the order, as those
    of Gaussian noise do.

    Raises:
        ValueError: delta is not between 0 and 1.
    """
    _check_delta(delta)
    room = epsilon - np.log1p(-1 / _A) + (math.log(delta) + np.log(_A)) / (_A - 1)
    return ORDERS[int(np.argmax(room / _A))]


@functools.cache
def weights(order: int) -> tuple[float, ...]:
    """Of the orders in a filter, most of them near this one. They sum to at most 1."""
    near = _FALL ** -np.abs(np.arange(len(ORDERS)) - ORDERS.index(order))
    return tuple((_NEAR * near / near.sum() + (1 - _NEAR) / len(ORDERS)) * (1 - 1e-15))


def epsilon(total: Curve, delta: float, order: int = DEFAULT_ORDER) -> float:
    """The filter's epsilon of all releases whose curves add up to `total`. Never understated; 0 if all are 0.

    Raises:
        ValueError: no curve, an order that is not one of `ORDERS`, or delta is not between 0 and 1.
    """
    curve = np.array(_checked(total))
    _check_delta(delta)
    if not curve.any():
        return 0.0
    use = curve < _UNBOUNDED
    if not use.any():
        return math.inf
    less, log_m = _A[use] - 1, np.log(weights(order))[use] + math.log(delta) - (_A[use] - 1) * curve[use]  # at L = 0
    slope = log_m + np.log(_A[use])

    def exceeds(at: float) -> tuple[float, float]:  # delta·(M + M'), its logarithm and the derivative of that
        terms = slope + less * at
        most = terms.max()
        parts = np.exp(terms - most)
        return float(most + math.log(parts.sum())), float(parts @ less / parts.sum())

    # Convex and ascending in L: from above, Newton's steps stay above the root. One term alone has its root above.
    high = float((-slope / less).min())
    for _ in range(50):
        value, rise = exceeds(high)
        if value <= 1e-12:
            break
        high -= value / rise
    width = _RELATIVE * max(1.0, abs(high))
    low, high = high - width, high + width
    while exceeds(low)[0] > 0.0:
        low -= width
        width *= 2
    while exceeds(high)[0] < 0.0:
        high += width
        width *= 2
    # G ascends up to `low` and descends from `high` on, and in between this is no less.
    at_most = high + math.log1p(-math.exp(min(0.0, float(logsumexp(log_m + less * low)))))
    return max(0.0, at_most + 10 * _RELATIVE * max(1.0, abs(high)))


def within(total: Curve, epsilon: float, delta: float, order: int = DEFAULT_ORDER) -> bool:
    """Whether a budget of this epsilon and delta pays for all releases whose curves add up to `total`.

    Raises:
        ValueError: as `epsilon`.
    """
    return _filter(total, delta, order) <= epsilon


def epsilon_of_one(curve: Curve, delta: float) -> float:
    """The epsilon of a run whose settings depend on no earlier release, by its best order (Canonne, Kamath and Steinke,
    arXiv 2004.00010). It is not for runs that are composed.

    Raises:
        ValueError: no curve, or delta is not between 0 and 1.
    """
    values = np.array(_checked(curve))
    _check_delta(delta)
    if not values.any():
        return 0.0
    found = values + np.log1p(-1 / _A) - (math.log(delta) + np.log(_A)) / (_A - 1)
    return max(0.0, float(found.min()) * (1 + _RELATIVE))


_filter = epsilon  # where a budget has that name


def _checked(curve: Curve) -> Curve:
    if len(curve) != len(ORDERS) or not all(value >= 0.0 for value in curve):
        raise ValueError("a curve has one number, which is not negative, for each order")
    return curve


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError("delta is between 0 and 1")


def _up(value: float) -> float:
    return math.nextafter(value, math.inf) if value > 0.0 else value


@functools.lru_cache(maxsize=_REMEMBERED)
def _pure(epsilon: float) -> Curve:
    """Of whatever is epsilon-DP: binary randomised response costs the most (Kairouz et al., arXiv 1311.0776)."""
    highest = np.logaddexp(_A * epsilon, (1 - _A) * epsilon) - np.logaddexp(0.0, epsilon)
    return tuple(min(epsilon, value) for value in (highest / (_A - 1) * (1 + _RELATIVE) + _ROUNDING).tolist())


@functools.lru_cache(maxsize=_REMEMBERED)
def step_of(noise_multiplier: float, sample_rate: float, rows_per_unit: int) -> Curve:
    """What one step costs a unit that is trained on. Of a single row, removing costs no less than adding (Mironov et
    al., arXiv 1908.10530, Theorem 5).
    """
    if noise_multiplier < _LEAST_NOISE:
        return (math.inf,) * len(ORDERS)
    values: Floats
    if sample_rate == 1.0:
        values = _A * (rows_per_unit / noise_multiplier) ** 2 / 2
    elif rows_per_unit == 1:
        from opacus.accountants.analysis.rdp import compute_rdp

        values = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS))
    else:
        values = _of_units(noise_multiplier, sample_rate, rows_per_unit)
    return tuple(np.where(np.isnan(values), math.inf, values * (1 + _RELATIVE) + _ROUNDING).tolist())


def _of_units(sigma: float, rate: float, rows: int) -> Floats:
    """Of one step for units of several rows: the larger of removing and adding one."""
    found = np.full(len(ORDERS), math.inf)
    # The grid of the highest order has those of all others in it.
    points = [math.ceil(2 * (order * rows / sigma + 2 * _REACH)) + 1 for order in ORDERS]
    affordable = [many for many in points if many * (rows + 1) <= _AFFORDABLE]
    if not affordable:
        return found
    counts = np.arange(rows + 1.0)
    masses = _choices(rows) + counts * math.log(rate) + (rows - counts) * math.log1p(-rate)
    z = np.arange(affordable[-1]) / 2 - _REACH
    log_f = _likelihood(z, counts, masses, sigma)[0]
    none = -float(masses[0])  # f is not below the mass of no row: adding costs no more than this
    for index, many in enumerate(affordable):
        order = ORDERS[index]
        log_moment = logsumexp(order * log_f[:many] - z[:many] ** 2 / 2) - math.log(2 * math.sqrt(2 * math.pi))
        found[index] = max(0.0, log_moment / (order - 1))
    heavy = masses > math.log(_LIGHTEST)  # without the others f is smaller, and adding costs more
    heavy[0] = True
    adding = np.minimum(_adding(counts[heavy], masses[heavy], sigma, rate * rows, found < none), none)
    # What the logarithms in the sums round, by the size of those that count.
    rounding = 2.0**-48 * (_A * (rows / sigma) ** 2 + none + 64)
    larger: Floats = np.maximum(found, np.where(np.isinf(found), 0.0, adding)) + rounding
    return larger


def _choices(rows: int) -> Floats:
    """Logarithms of how many ways there are to choose 0, 1, 2 and so on of the rows."""
    ways, found = 1, [0.0]
    for j in range(rows):
        ways = ways * (rows - j) // (j + 1)
        found.append(math.log(ways))
    return np.array(found)


def _adding(counts: Floats, masses: Floats, sigma: float, expected: float, wanted: npt.NDArray[np.bool_]) -> Floats:
    """Upper bounds on what adding a unit costs; infinity at orders that are not wanted.

    c(z) = log of the integrand, without its factor 1/√2π, has c'' <= -1. In a cell around z of half width h, it is at
    most c + c'·t - t²/2, and exp(-t²/2) at most 1 - t²/2 + t⁴/8. With u = c'h and 1 + u²/2 <= cosh(u), its integral is
    at most 2h·exp(c)·(sinh(u)/u - h²/6 - h²u²/20 + h⁴·cosh(u)/40).
    """
    half = min(_COARSEST, max(_FINEST, 0.03 * math.sqrt(expected))) / 2
    cells = np.arange(math.floor(-_REACH / half / 2), math.ceil(_REACH / half / 2) + 1) * (2 * half)
    found = np.full(len(ORDERS), math.inf)
    for index in np.flatnonzero(wanted):
        less = ORDERS[index] - 1
        low, high = -less * float(_likelihood(np.zeros(1), counts, masses, sigma)[1][0]), 0.0
        for _ in range(60):  # where the integrand is largest
            middle = (low + high) / 2
            ascends = -middle - less * float(_likelihood(np.array([middle]), counts, masses, sigma)[1][0]) > 0.0
            low, high = (middle, high) if ascends else (low, middle)
        z = np.append(cells + low, low)
        log_f, slopes = _likelihood(z, counts, masses, sigma)
        c, rise = -z * z / 2 - less * log_f, -z - less * slopes
        if abs(rise[-1]) > 0.5:
            continue
        u = np.maximum(np.abs(rise[:-1]) * half, 1e-7)
        log_sinhc = u + np.log(-np.expm1(-2 * u) / (2 * u))
        bend = half**4 / 40 * u / np.tanh(u) - half**2 * (1 / 6 + u * u / 20) * np.exp(-log_sinhc)
        inside = c[:-1] + math.log(2 * half) + log_sinhc + np.log1p(bend)
        outside = c[-1] + math.log(2 * math.sqrt(2 * math.pi)) + 0.125 + log_ndtr(0.5 - _REACH)
        found[index] = max(0.0, (logsumexp(np.append(inside, outside)) - math.log(2 * math.pi) / 2) / less)
    return found


def _likelihood(z: Floats, counts: Floats, masses: Floats, sigma: float) -> tuple[Floats, Floats]:
    """log f at each z, and its derivative, given logarithms of the masses."""
    log_f, slopes = np.empty(len(z)), np.empty(len(z))
    size = max(1, 200_000 // len(counts))  # in pieces: the table of all z and all counts may be large
    for start in range(0, len(z), size):
        part = slice(start, start + size)
        terms = masses + counts * (z[part, None] / sigma - counts / (2 * sigma**2))
        most = terms.max(axis=1)
        np.exp(terms - most[:, None], out=terms)
        sums = terms.sum(axis=1)
        log_f[part], slopes[part] = most + np.log(sums), terms @ counts / (sums * sigma)
    return log_f, slopes
