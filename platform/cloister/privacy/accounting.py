"""What a run of DP-SGD costs: epsilon of the Poisson-subsampled Gaussian mechanism, composed.

Guarantees: `epsilon` is an upper bound, the larger of two independent implementations: Opacus's PRV accountant (Gopi
et al., arXiv 2106.02848) and dp-accounting's privacy loss distributions with pessimistic rounding. Neighbouring
data sets differ by adding or removing one row. The bound holds for Poisson sampling only, for noise drawn afresh in
every step, and for a clipping norm and a number of rows that are public.

Not promised: that the noise which was really drawn had this multiplier; the loop and its tests see to that.
"""

from __future__ import annotations

import math
import warnings

# Discretisation of the PLD; pessimistic, so coarser means larger, never smaller. 1e-4 differs by 1e-3 in epsilon.
_PLD_INTERVAL = 1e-3
_PRV_EPSILON_ERROR = 0.01
# The noise multiplier is found to this grid and rounded up onto it.
_MULTIPLIER_GRID = 1e-3
_MULTIPLIER_RANGE = (0.5, 1000.0)  # below 0.5 the PRV accountant takes minutes and gigabytes


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """The certified epsilon of `steps` steps: the larger of the two accountants.

    Raises:
        ValueError: a parameter outside its range.
    """
    _check(noise_multiplier, sample_rate, steps, delta)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0.0:
        return math.inf
    by_pld = pld_epsilon(noise_multiplier, sample_rate, steps, delta)
    return max(by_pld, prv_epsilon(noise_multiplier, sample_rate, steps, delta))


def prv_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Upper end of the interval that Opacus's PRV accountant computes."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        # It sizes its grid with a Renyi bound, which may warn that it is loose; the result does not depend on it.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta, eps_error=_PRV_EPSILON_ERROR))


def pld_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Pessimistic estimate of dp-accounting, for adding and for removing a row, whichever is larger."""
    from dp_accounting.pld import privacy_loss_distribution

    one_step = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=_PLD_INTERVAL,
        pessimistic_estimate=True,
    )
    return float(one_step.self_compose(steps).get_epsilon_for_delta(delta))


def noise_multiplier_for(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier, on a grid of 1e-3, whose certified epsilon is at most the target.

    Raises:
        ValueError: a parameter outside its range, or no multiplier up to 1000 is enough.
    """
    if not 0.0 < target_epsilon < math.inf:
        raise ValueError("the target epsilon is positive and finite")
    low, high = _MULTIPLIER_RANGE
    # 1. Bracket with the cheap accountant, by bisection on the logarithm.
    if pld_epsilon(high, sample_rate, steps, delta) > target_epsilon:
        raise ValueError("no noise multiplier up to 1000 reaches this epsilon")
    while high / low > 1.1:
        middle = math.sqrt(low * high)
        fits = pld_epsilon(middle, sample_rate, steps, delta) <= target_epsilon
        low, high = (low, middle) if fits else (middle, high)
    # 2. Both accountants decide. PRV's upper end lies a little higher, so the bracket may have to move up.
    while epsilon(high, sample_rate, steps, delta) > target_epsilon:
        low, high = high, high * 1.1
        if high > _MULTIPLIER_RANGE[1]:
            raise ValueError("no noise multiplier up to 1000 reaches this epsilon")
    bottom, top = math.floor(low / _MULTIPLIER_GRID), math.ceil(high / _MULTIPLIER_GRID)
    while top - bottom > 1:
        middle_step = (bottom + top) // 2
        fits = epsilon(middle_step * _MULTIPLIER_GRID, sample_rate, steps, delta) <= target_epsilon
        bottom, top = (bottom, middle_step) if fits else (middle_step, top)
    return round(top * _MULTIPLIER_GRID, 3)


def warm() -> None:
    """Import both accountants now, so that the first plan does not wait for them."""
    epsilon(1.0, 0.01, 10, 1e-5)


def _check(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> None:
    if not 0.0 <= noise_multiplier < math.inf:
        raise ValueError("the noise multiplier is finite and not negative")
    if not 0.0 < sample_rate < 1.0:
        raise ValueError("the sample rate lies between 0 and 1: without subsampling use another bound")
    if steps < 0:
        raise ValueError("the number of steps is not negative")
    if not 0.0 < delta < 1.0:
        raise ValueError("delta lies between 0 and 1")
