"""What a run of DP-SGD costs: epsilon of the Poisson-subsampled Gaussian mechanism, composed.

Guarantees: `epsilon` is an upper bound. Three accountants compute one each, which hold alone:

    prv    Opacus: the privacy loss as a random variable (Gopi et al., arXiv 2106.02848), and the bound of its error
    pld    dp-accounting: privacy loss distributions, rounded upwards (Doroshenko et al., arXiv 2207.04380)
    rdp    Opacus: Rényi divergences of whole orders (Mironov et al., arXiv 1908.10530). Of single rows only

What counts is the larger of the first two, which check each other, or the third where it is less (`certified`).
Neighbouring data sets differ by adding or removing one unit: one row, or all of the up to `rows_per_unit` rows of one
person, for which the first two reckon with a mixture of Gaussians (see `units`). The bound holds for Poisson sampling
of rows only, for noise drawn afresh in every step, and for a clipping norm and a number of rows that are public.

The first two round on grids. Theirs are relative to the epsilon that comes out, and have at most so many points: each
takes about a second, and less than a gigabyte. Both add up probabilities by fast Fourier transforms, whose rounding
neither bounds. It is about 1e-13 here: delta is not less than `MIN_DELTA`.

Why not group privacy: k rows at the epsilon of one (Dwork and Roth, "The Algorithmic Foundations of Differential
Privacy", Theorem 2.2) cost k times it at a delta that grows with e^(k·epsilon): valid, and of no use. The mixture is
tight, both accountants can compute it, and they agree within their own errors: so the rule stays, the larger counts.

Not promised: that the noise which was really drawn had this multiplier; the loop and its tests see to that.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from cloister.errors import InputError
from cloister.privacy import units
from cloister.privacy.spec import MIN_DELTA

# Of epsilon, what the bound of PRV's error may add to it, with the finest grid of so many points.
_PRV_SHARE = 1 / 300
_PRV_POINTS = 1 << 20
_PRV_COARSEST, _PRV_FINEST = 30.0, 1e-3  # epsilons
# PLD's grid, as a share of what a step adds to the loss's spread. What rounding upwards adds is about a thousandth.
_PLD_SHARE = 1 / 100
_PLD_COARSEST, _PLD_FINEST = 1e-2, 1e-5
_PLD_POINTS, _PLD_POINTS_OF_UNITS = 50_000, 200_000  # the latter times Gaussians in the mixture: each takes 3 µs
_ORDERS = [*range(2, 64), *range(64, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, 1025, 64)]
_RDP_ROUNDING = 1e-13  # of one step: logarithms of sums near 1
# The noise multiplier is found to three decimals, or four digits where it is 10 or more, and rounded up onto that grid.
_MULTIPLIER_DECIMALS = 3
_GUESSES, _WASTE = 3, 1e-3
_FARTHEST = 1e6  # times the target: what costs more, or a millionth, is no guide to where it is reached
_REMEMBERED = 1024  # results of each accountant: a plan asks for about ten, and a run for some more
_MULTIPLIER_RANGE = (0.5, 1000.0)  # below 0.5 the PRV accountant takes minutes and gigabytes


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1) -> float:
    """The certified epsilon of `steps` steps.

    Raises:
        ValueError: a parameter outside its range.
    """
    return certified(accounts(noise_multiplier, sample_rate, steps, delta, rows_per_unit))


def accounts(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1
) -> dict[str, float]:
    """The epsilon of `steps` steps by each accountant, by its name.

    Raises:
        ValueError: a parameter outside its range.
    """
    mechanism = (noise_multiplier, sample_rate, steps, delta, rows_per_unit)
    _check(*mechanism)
    accountants = {"prv": prv_epsilon, "pld": pld_epsilon} | ({"rdp": rdp_epsilon} if rows_per_unit == 1 else {})
    if steps == 0:
        return dict.fromkeys(accountants, 0.0)
    if noise_multiplier == 0.0:
        return dict.fromkeys(accountants, math.inf)
    found = {name: accountant(*mechanism) for name, accountant in accountants.items()}
    return {name: math.inf if math.isnan(value) else value for name, value in found.items()}


def certified(accounts: Mapping[str, float]) -> float:
    """The epsilon that counts: the larger of PRV's and PLD's, or RDP's where it is less."""
    return min(max(accounts["prv"], accounts["pld"]), accounts.get("rdp", math.inf))


@functools.lru_cache(maxsize=_REMEMBERED)
def prv_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1) -> float:
    """Upper end of the interval that Opacus's PRV accountant computes."""
    mechanism = (noise_multiplier, sample_rate, steps, delta, rows_per_unit)
    if rows_per_unit > 1:
        found, near = prv_of_unit(*mechanism, _PRV_COARSEST), _PRV_COARSEST
        while found < near / 1.5 and near > _PRV_FINEST:
            near = max(found, near / 10)
            found = prv_of_unit(*mechanism, near)
        return found
    error = _PRV_SHARE * pld_epsilon(*mechanism)
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    delta_error = delta / 1000  # Opacus's choice
    with warnings.catch_warnings():
        # It sizes its grid with a Renyi bound, which may warn that it is loose; the result does not depend on it.
        warnings.simplefilter("ignore", UserWarning)
        one = PoissonSubsampledGaussianPRV(sample_rate, noise_multiplier)
        reach = compute_safe_domain_size([one], [steps], error, delta_error)
        if reach > units.FARTHEST:
            return math.inf
        error = max(error, 2 * reach * units.points_per_error(steps, delta_error) / _PRV_POINTS)
        return float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))


@functools.lru_cache(maxsize=_REMEMBERED)
def prv_of_unit(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int, near: float
) -> float:
    """Ours of a unit by itself, with an error that fits an epsilon `near` it; infinity where it cannot be told."""
    mechanism = (noise_multiplier, sample_rate, steps, delta, rows_per_unit)
    return units.prv_epsilon(*mechanism, _PRV_SHARE * near, _PRV_POINTS)


@functools.lru_cache(maxsize=_REMEMBERED)
def pld_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1) -> float:
    """Pessimistic estimate of dp-accounting, for adding and for removing a unit, whichever is larger."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    counts, masses = units.sensitivities(rows_per_unit, sample_rate)
    if rows_per_unit > 1:
        one_step = functools.partial(pld.from_mixture_gaussian_mechanism, noise_multiplier, counts, masses)
    else:
        one_step = functools.partial(pld.from_gaussian_mechanism, noise_multiplier, sampling_prob=sample_rate)
    points = _PLD_POINTS if rows_per_unit == 1 else _PLD_POINTS_OF_UNITS / max(len(counts), 20)
    return _composed(one_step, steps, delta, units.spread(noise_multiplier, counts, masses) / points)


@functools.lru_cache(maxsize=_REMEMBERED)
def replacing_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """What holds where neighbours differ by one row that is replaced by another, by dp-accounting alone: up to twice as
    much, and never less. Of units of several rows nobody computes it.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check(noise_multiplier, sample_rate, steps, delta, 1)
    if steps == 0 or noise_multiplier == 0.0:
        return math.inf if steps else 0.0
    one_step = functools.partial(
        pld.from_gaussian_mechanism, noise_multiplier, sampling_prob=sample_rate,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )  # fmt: skip
    spread = 2 * units.spread(noise_multiplier, *units.sensitivities(1, sample_rate))
    replaced = _composed(one_step, steps, delta, spread / _PLD_POINTS)
    return max(replaced, epsilon(noise_multiplier, sample_rate, steps, delta))


def _composed(one_step: Callable[..., Any], steps: int, delta: float, finest: float) -> float:
    """Epsilon of so many steps, on a grid that is fine enough for it."""
    finest = max(finest, _PLD_FINEST)
    interval = max(finest, _PLD_COARSEST)
    while True:
        try:
            one = one_step(value_discretization_interval=interval, pessimistic_estimate=True)
            found = float(one.self_compose(steps).get_epsilon_for_delta(delta))
            fitting = max(finest, _PLD_SHARE * found / math.sqrt(steps))
        except RecursionError:  # it seeks losses of this size where mixtures have none
            found, fitting = math.inf, max(finest, interval / 10)
        if interval <= 1.5 * fitting:
            return found
        interval = fitting


@functools.lru_cache(maxsize=_REMEMBERED)
def rdp_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1) -> float:
    """The best of the orders. For small epsilons, where the others' errors count most, it is the least.

    Raises:
        ValueError: a unit of several rows.
    """
    if rows_per_unit > 1:
        raise ValueError("Rényi divergences are computed for units of one row")
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    rdp = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=_ORDERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the best order is the last one
        return max(0.0, float(get_privacy_spent(orders=_ORDERS, rdp=rdp + steps * _RDP_ROUNDING, delta=delta)[0]))


def noise_multiplier_for(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, rows_per_unit: int = 1
) -> float:
    """A noise multiplier, on a grid of 1e-3 or four digits, whose certified epsilon is at most the target, and no more
    than a thousandth below it unless the grid or the least multiplier, 0.5, want it.

    Raises:
        InputError: no multiplier up to 1000 for each row of a unit is enough.
        ValueError: a parameter outside its range.
    """
    if not 0.0 < target_epsilon < math.inf:
        raise ValueError("the target epsilon is positive and finite")
    floor, ceiling = _MULTIPLIER_RANGE[0], _MULTIPLIER_RANGE[1] * rows_per_unit
    mechanism = sample_rate, steps, delta, rows_per_unit
    _check(ceiling, *mechanism)

    def roughly(multiplier: float) -> float:  # by the accountant that is quicker here
        if rows_per_unit == 1:
            return _comparable(pld_epsilon(multiplier, *mechanism), target_epsilon)
        return _comparable(prv_of_unit(multiplier, *mechanism, near=target_epsilon), target_epsilon)

    # From what is surely enough (the central limit says about a quarter of it would do) downwards, in small steps: too
    # little noise is what takes long to account for, and gigabytes.
    enough = 2 + 8 * sample_rate * math.sqrt(steps * math.log(1 / delta)) / target_epsilon
    near, slope = _where_it_costs(
        target_epsilon, roughly, start=min(enough * rows_per_unit, ceiling), floor=floor, ceiling=ceiling
    )
    grid = 10.0 ** max(-_MULTIPLIER_DECIMALS, math.floor(math.log10(near)) - _MULTIPLIER_DECIMALS)
    least, most = math.ceil(floor / grid), math.floor(ceiling / grid + 1e-6)
    # Those up to `low` cost too much, as far as they were tried; `high` does not, if it is no more than `most`.
    low, high, place = least - 1, most + 1, math.ceil(near / grid)
    for tries in itertools.count(1):
        place = min(max(place, low + 1), high - 1)
        found = epsilon(round(place * grid, _MULTIPLIER_DECIMALS), *mechanism)  # with all that counts
        low, high = (low, place) if found <= target_epsilon else (place, high)
        if high - low == 1 or (1 - _WASTE) * target_epsilon <= found <= target_epsilon:
            break
        along = place * (target_epsilon / _comparable(found, target_epsilon)) ** (1 / slope)
        place = math.ceil(along) if tries <= _GUESSES else (low + high) // 2
    if high > most:
        raise InputError("no amount of noise reaches this epsilon", "raise epsilon or lower epochs")
    return round(high * grid, _MULTIPLIER_DECIMALS)


def _comparable(cost: float, target: float) -> float:
    """The cost, or something on the same side of the target that a logarithm can be taken of."""
    least, most = target / _FARTHEST, target * _FARTHEST
    return max(cost, least) if cost <= most else most  # what is no number is too much


def _where_it_costs(
    target: float, cost: Callable[[float], float], *, start: float, floor: float, ceiling: float
) -> tuple[float, float]:
    """Where `cost` is about the target, or the end of the range that is nearest, and the slope there between their
    logarithms, along which it is sought.
    """
    multiplier, slope = start, -1.0
    before: tuple[float, float] | None = None
    for _ in range(40):
        found = cost(multiplier)
        if abs(found / target - 1) < _PRV_SHARE / 3:
            break
        if before is not None and found != before[1] and multiplier != before[0]:
            slope = min(-0.3, max(-8.0, math.log(found / before[1]) / math.log(multiplier / before[0])))
        before = multiplier, found
        change = min(4.0, max(0.5, (target / found) ** (1 / slope)))
        multiplier = min(ceiling, max(floor, multiplier * change))
        if multiplier == before[0]:
            break
    return multiplier, slope


def warm() -> None:
    """Import the accountants now, so that the first plan does not wait for them."""
    epsilon(1.0, 0.01, 10, 1e-5)


def _check(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int) -> None:
    if not 0.0 <= noise_multiplier < math.inf:
        raise ValueError("the noise multiplier is finite and not negative")
    if not 0.0 < sample_rate < 1.0:
        raise ValueError("the sample rate lies between 0 and 1: without subsampling use another bound")
    if rows_per_unit < 1:
        raise ValueError("a unit has at least one row")
    if steps < 0:
        raise ValueError("the number of steps is not negative")
    if not MIN_DELTA <= delta < 1.0:
        raise ValueError(f"delta lies between {MIN_DELTA:g} and 1")
