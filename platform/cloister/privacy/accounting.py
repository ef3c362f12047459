"""What a run of DP-SGD costs: epsilon of the Poisson-subsampled Gaussian mechanism, composed.

Guarantees: `epsilon` is an upper bound, the larger of two independent implementations: Opacus's PRV accountant (Gopi
et al., arXiv 2106.02848) and dp-accounting's privacy loss distributions with pessimistic rounding. Neighbouring
data sets differ by adding or removing one unit: one row, or all of the up to `rows_per_unit` rows of one person, for
which both accountants reckon with a mixture of Gaussians (see `units`). The bound holds for Poisson sampling of rows
only, for noise drawn afresh in every step, and for a clipping norm and a number of rows that are public.

Why not group privacy: k rows at the epsilon of one (Dwork and Roth, "The Algorithmic Foundations of Differential
Privacy", Theorem 2.2) cost k times it at a delta that grows with e^(k·epsilon): valid, and of no use. The mixture is
tight, both accountants can compute it, and they agree within their own errors: so the rule stays, the larger counts.

Not promised: that the noise which was really drawn had this multiplier; the loop and its tests see to that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from cloister.privacy import units

# Discretisation of the PLD; pessimistic, so coarser means larger, never smaller. 1e-4 differs by 1e-3 in epsilon.
_PLD_INTERVAL = 1e-3
_PRV_EPSILON_ERROR = 0.01
# The noise multiplier is found to three decimals, or four digits where it is 10 or more, and rounded up onto that grid.
_MULTIPLIER_DECIMALS = 3
_MULTIPLIER_RANGE = (0.5, 1000.0)  # below 0.5 the PRV accountant takes minutes and gigabytes


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1) -> float:
    """The certified epsilon of `steps` steps: the larger of the two accountants.

    Raises:
        ValueError: a parameter outside its range.
    """
    return max(accounts(noise_multiplier, sample_rate, steps, delta, rows_per_unit).values())


def accounts(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1
) -> dict[str, float]:
    """The epsilon of `steps` steps by each accountant, by its name.

    Raises:
        ValueError: a parameter outside its range.
    """
    mechanism = (noise_multiplier, sample_rate, steps, delta, rows_per_unit)
    _check(*mechanism)
    if steps == 0:
        return {"prv": 0.0, "pld": 0.0}
    if noise_multiplier == 0.0:
        return {"prv": math.inf, "pld": math.inf}
    return {"prv": prv_epsilon(*mechanism), "pld": pld_epsilon(*mechanism)}


def prv_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1) -> float:
    """Upper end of the interval that Opacus's PRV accountant computes."""
    if rows_per_unit > 1:
        return units.prv_epsilon(noise_multiplier, sample_rate, steps, delta, rows_per_unit, _PRV_EPSILON_ERROR)
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        # It sizes its grid with a Renyi bound, which may warn that it is loose; the result does not depend on it.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta, eps_error=_PRV_EPSILON_ERROR))


def pld_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int = 1) -> float:
    """Pessimistic estimate of dp-accounting, for adding and for removing a unit, whichever is larger."""
    from dp_accounting.pld import privacy_loss_distribution

    if rows_per_unit > 1:
        one_step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
            noise_multiplier,
            *units.sensitivities(rows_per_unit, sample_rate),
            value_discretization_interval=_PLD_INTERVAL,
            pessimistic_estimate=True,
        )
    else:
        one_step = privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier,
            sampling_prob=sample_rate,
            value_discretization_interval=_PLD_INTERVAL,
            pessimistic_estimate=True,
        )
    return float(one_step.self_compose(steps).get_epsilon_for_delta(delta))


def noise_multiplier_for(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, rows_per_unit: int = 1
) -> float:
    """The smallest noise multiplier, on a grid of 1e-3 or four digits, whose certified epsilon is at most the target.

    Raises:
        ValueError: a parameter outside its range, or no multiplier up to 1000 for each row of a unit is enough.
    """
    if not 0.0 < target_epsilon < math.inf:
        raise ValueError("the target epsilon is positive and finite")
    floor, ceiling = _MULTIPLIER_RANGE[0], _MULTIPLIER_RANGE[1] * rows_per_unit
    _check(ceiling, sample_rate, steps, delta, rows_per_unit)

    def fits(accountant: Callable[..., float], multiplier: float) -> bool:
        return accountant(multiplier, sample_rate, steps, delta, rows_per_unit) <= target_epsilon

    # 1. Bracket with the cheaper accountant, in small steps downwards from what is surely enough (the central limit
    #    says about a quarter of it would do): too little noise is what takes long to account for, and gigabytes.
    cheap = pld_epsilon if rows_per_unit == 1 else prv_epsilon
    enough = 2 + 8 * sample_rate * math.sqrt(steps * math.log(1 / delta)) / target_epsilon
    high = min(enough * rows_per_unit, ceiling)
    while not fits(cheap, high):
        if high == ceiling:
            raise ValueError("no noise multiplier in range reaches this epsilon")
        high = min(high * 2, ceiling)
    while high > floor and fits(cheap, max(high / 2, floor)):
        high = max(high / 2, floor)
    low = max(high / 2, floor)
    while high / low > 1.1:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(cheap, middle) else (middle, high)
    # 2. PRV's upper end is nearly always the larger one, so it finds the place; the bracket may have to move up first.
    while not fits(prv_epsilon, high):
        low, high = high, high * 1.1
        if high > ceiling:
            raise ValueError("no noise multiplier in range reaches this epsilon")
    grid = 10.0 ** max(-_MULTIPLIER_DECIMALS, math.floor(math.log10(high)) - _MULTIPLIER_DECIMALS)
    bottom, top = math.floor(low / grid), math.ceil(high / grid)
    while top - bottom > 1:
        middle_step = (bottom + top) // 2
        bottom, top = (bottom, middle_step) if fits(prv_epsilon, middle_step * grid) else (middle_step, top)
    # 3. The other accountant must agree.
    step = 1
    while not fits(pld_epsilon, round(top * grid, _MULTIPLIER_DECIMALS)):
        top, step = top + step, step * 2
    return round(top * grid, _MULTIPLIER_DECIMALS)


def warm() -> None:
    """Import both accountants now, so that the first plan does not wait for them."""
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
    if not 0.0 < delta < 1.0:
        raise ValueError("delta lies between 0 and 1")
