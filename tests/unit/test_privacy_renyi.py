"""Curves are upper bounds and near what they bound; the filter holds against the best adaptive adversary."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from cloister.privacy import renyi
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.renyi import ORDERS, Curve, order_for, weights

PLAN = PrivacyPlan(
    epsilon=1.0, delta=1e-5, epsilon_certified=0.99955, noise_multiplier=1.41, max_grad_norm=1.0,
    sample_rate=256 / 26_000, steps=1016, rows=26_000,
)  # fmt: skip
A = np.array(ORDERS, dtype=np.float64)


def step(sigma: float, rate: float, rows: int) -> Curve:
    """Of one step, as plans with an evaluation that costs next to nothing have it."""
    plan = replace(PLAN, noise_multiplier=sigma, sample_rate=rate, rows_per_unit=rows, evaluation_epsilon=1e-12)
    return renyi.curve_of(plan, 1)


def mechanisms(many: int, rows: Sequence[int]) -> list[tuple[float, float, int]]:
    """Corners, and random ones."""
    random = np.random.default_rng(1)
    corners = itertools.product((0.5, 300.0), (1e-4, 0.9), (rows[0], rows[-1]))
    drawn = ((math.exp(random.uniform(math.log(0.5), math.log(300.0))),
              math.exp(random.uniform(math.log(1e-4), math.log(0.9))), int(random.choice(rows)))
             for _ in range(many))  # fmt: skip
    return [*corners, *drawn]


def exact_of_one_row(sigma: float, rate: float, order: int) -> float:
    q, total = mpmath.mpf(rate), mpmath.mpf(0)
    for j in range(order + 1):
        term = mpmath.binomial(order, j) * q**j * (1 - q) ** (order - j)
        total += term * mpmath.exp(mpmath.mpf(j * j - j) / (2 * mpmath.mpf(sigma) ** 2))
    return float(mpmath.log(total) / (order - 1))


def by_polynomial(sigma: float, rate: float, rows: int, order: int) -> float:
    """Removing a unit, by multiplying out."""
    q, s2 = mpmath.mpf(rate), 2 * mpmath.mpf(sigma) ** 2
    factor = [mpmath.binomial(rows, j) * q**j * (1 - q) ** (rows - j) / mpmath.exp(j * j / s2) for j in range(rows + 1)]
    power = [mpmath.mpf(1)]
    for _ in range(order):
        longer = [mpmath.mpf(0)] * (len(power) + rows)
        for (i, x), (j, y) in itertools.product(enumerate(power), enumerate(factor)):
            longer[i + j] += x * y
        power = longer
    return float(mpmath.log(mpmath.fsum(x * mpmath.exp(j * j / s2) for j, x in enumerate(power))) / (order - 1))


def by_quadrature(sigma: float, rate: float, rows: int, order: int) -> tuple[float, float] | None:
    """Removing and adding a unit; None where it takes too long. E[f] is 1: taking a·(f - 1) away leaves a positive
    integrand, which loses no digits where the divergence is small."""
    if (order * rows / sigma + 28) * 64 * rows > 2e6:
        return None
    j = np.arange(rows + 1.0)
    with mpmath.workdps(30):
        q = mpmath.mpf(rate)
        exact = [mpmath.log(mpmath.binomial(rows, i)) + i * mpmath.log(q) + (rows - i) * mpmath.log(1 - q) for i in j]
    logs = np.array([float(each) for each in exact])
    ends = [(-14.0, order * rows / sigma + 14.0), (-14.0 - (order - 1) * rate * rows / sigma, 14.0)]
    found = []
    for (low, high), power in zip(ends, (order, 1 - order), strict=True):
        z = np.arange(low, high, 1 / 64)
        terms = z[:, None] * j / sigma - j * j / (2 * sigma**2)
        log_f = logsumexp(logs + terms, axis=1)
        log_moment = logsumexp(power * log_f + norm.logpdf(z)) - math.log(64)
        if abs(log_moment) < 0.1:
            near, log_pdf = np.abs(log_f) < 0.1, norm.logpdf(z)
            less = (np.exp(logs) * np.expm1(terms[near])).sum(axis=1)
            excess = np.exp(power * log_f + log_pdf) - (1 - power) * np.exp(log_pdf) - power * np.exp(log_f + log_pdf)
            excess[near] = (np.expm1(power * np.log1p(less)) - power * less) * norm.pdf(z[near])
            log_moment = np.log1p(excess.sum() / 64)
        found.append(float(log_moment) / (order - 1))
    return found[0], found[1]


def test_a_row_costs_what_opacus_says_and_no_less_than_the_sum_in_many_digits() -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    with mpmath.workdps(60):
        for sigma, rate, _ in mechanisms(20, (1, 1)):
            curve = step(sigma, rate, 1)
            assert curve == pytest.approx(
                compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(ORDERS)), rel=1e-9, abs=1e-12
            )
            for order in (2, 5, 16, 64):
                exact = exact_of_one_row(sigma, rate, order)
                assert exact <= curve[ORDERS.index(order)] <= exact * (1 + 1e-9) + 1e-12, (sigma, rate, order)


def test_one_row_as_a_unit_costs_the_same() -> None:
    """Our own code, which neither theorem nor Opacus is in; adding is what theirs leaves out."""
    for sigma, rate, _ in mechanisms(20, (1, 1)):
        curve = np.array(step(sigma, rate, 1))
        found = renyi._of_units(sigma, rate, 1)
        assert (np.isinf(found) | (np.abs(found - curve) <= 1e-3 * curve + 1e-11)).all(), (sigma, rate)


def test_units_cost_no_less_than_both_directions_and_little_more() -> None:
    compared = 0
    for sigma, rate, rows in mechanisms(60, (2, 3, 8, 32, 100, 1000)):
        curve = step(sigma, rate, rows)
        for order in (2, 6, 32):
            exact = by_quadrature(sigma, rate, rows, order)
            if exact is not None:
                found = curve[ORDERS.index(order)]
                assert max(exact) * (1 - 1e-12) - 2e-14 <= found, (sigma, rate, rows, order, exact, found)
                assert found <= max(exact) * (1 + 1e-3) + 2e-12, (sigma, rate, rows, order, exact, found)
                compared += 1
    assert compared > 100


def test_adding_a_unit_is_bounded_by_itself() -> None:
    """Removing costs more nearly everywhere, and would hide it."""
    compared = 0
    for sigma, rate, rows in mechanisms(30, (2, 8, 32, 100)):
        counts = np.arange(rows + 1.0)
        masses = renyi._choices(rows) + counts * math.log(rate) + (rows - counts) * math.log1p(-rate)
        found = renyi._adding(counts, masses, sigma, rate * rows, np.ones(len(ORDERS), dtype=bool))
        for order in (2, 5, 12):
            exact = by_quadrature(sigma, rate, rows, order)
            if exact is not None:
                bound = found[ORDERS.index(order)]
                assert exact[1] * (1 - 1e-12) - 2e-14 <= bound, (sigma, rate, rows, order)
                assert bound <= exact[1] * (1 + 1e-3) + 2e-12, (sigma, rate, rows, order, exact, bound)
                compared += 1
    assert compared > 50


def test_units_cost_what_multiplying_out_says() -> None:
    with mpmath.workdps(60):
        for sigma, rate, rows, order in ((0.5, 1e-4, 2, 8), (3.0, 0.01, 8, 12), (0.7, 0.3, 3, 5), (300.0, 0.1, 8, 3)):
            exact = by_polynomial(sigma, rate, rows, order)
            assert exact <= step(sigma, rate, rows)[ORDERS.index(order)] <= exact * (1 + 1e-4) + 1e-12


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    for rows, sigma in ((1, 2.0), (8, 20.0)):
        assert step(sigma, 1.0, rows) == pytest.approx(A * rows**2 / (2 * sigma**2), rel=1e-9)
        near = np.array(step(sigma, 1 - 1e-9, rows))
        assert near == pytest.approx(A * rows**2 / (2 * sigma**2), rel=1e-6)


def test_orders_that_nobody_can_afford_are_infinite_at_once() -> None:
    assert set(step(0.5, 1e-4, 10_000)) == {math.inf}
    assert set(step(0.0, 0.1, 1)) == {math.inf}
    curve = step(1.0, 1e-3, 1000)
    assert math.isfinite(curve[0])
    assert curve[-1] == math.inf


def test_a_run_costs_the_larger_of_its_steps_and_its_evaluation() -> None:
    silent = replace(PLAN, noise_multiplier=1e4, evaluation_epsilon=0.2)
    curve = renyi.curve_of(silent, 1)
    with mpmath.workdps(40):
        p = mpmath.exp(0.2) / (1 + mpmath.exp(0.2))
        for order, found in zip(ORDERS, curve, strict=True):
            exact = mpmath.log(p**order * (1 - p) ** (1 - order) + (1 - p) ** order * p ** (1 - order)) / (order - 1)
            assert exact <= found <= exact * (1 + 1e-9)
            assert found <= 0.2
    steps = renyi.curve_of(PLAN, 1016)
    assert all(one < other for one, other in zip(curve, steps, strict=True))
    assert renyi.curve_of(replace(PLAN, evaluation_epsilon=0.9), 1)[3] > renyi.curve_of(PLAN, 1)[3]
    assert renyi.curve_of(PLAN, 0) == (0.0,) * len(ORDERS)
    one = step(1.41, PLAN.sample_rate, 1)
    assert steps == pytest.approx([1016 * each for each in one], rel=1e-12)
    with pytest.raises(ValueError, match="steps"):
        renyi.curve_of(PLAN, -1)


def test_totals_are_sums_rounded_upwards() -> None:
    curve = renyi.curve_of(PLAN, 10)
    whole = renyi.total([curve] * 7)
    for found, one in zip(whole, curve, strict=True):
        assert mpmath.mpf(one) * 7 <= mpmath.mpf(found) <= mpmath.mpf(one) * 7 * (1 + 1e-15)
    assert renyi.total([]) == (0.0,) * len(ORDERS)
    assert renyi.total([curve, (*curve[:-1], math.inf)])[-1] == math.inf
    for wrong in (curve[1:], (math.nan, *curve[1:]), (-1e-9, *curve[1:])):
        with pytest.raises(ValueError, match="curve"):
            renyi.total([wrong])


CURVES = [
    *(renyi.total([renyi.curve_of(PLAN, 1016)] * many) for many in (1, 5, 19, 100)),
    renyi.curve_of(PLAN, 1),
    renyi.curve_of(replace(PLAN, noise_multiplier=37.65, rows_per_unit=32), 1016),
    tuple(0.01 * A),
    tuple(5.0 * A),
    tuple(np.minimum(A, 3.0)),
    (*(0.1 * A[:5]), *[math.inf] * (len(A) - 5)),
]
DELTAS = (1e-10, 1e-5, 0.1)


def plainly(curve: Curve, delta: float, weights: Sequence[float]) -> float:
    """The filter's epsilon as it is defined: by bisection, and on a fine grid of losses."""
    r, w = np.array(curve), np.array(weights)
    # Beyond this loss the right side is more than 1.
    end = min(value - math.log(delta * weight) / (order - 1) for value, weight, order in zip(r, w, A, strict=True))
    losses = np.linspace(0.0, end, 20_001)
    right = delta * np.exp((A - 1) * np.subtract.outer(losses, r) + np.log(w)).sum(axis=1)
    low, high = 0.0, end
    for _ in range(60):
        middle = (low + high) / 2
        holds = (np.maximum(0.0, 1 - np.exp(middle - losses)) <= right).all()
        low, high = (low, middle) if holds else (middle, high)
    return high


@pytest.mark.parametrize(("delta", "order"), zip(DELTAS, (24, 6, 2), strict=True))
@pytest.mark.parametrize("curve", CURVES)
def test_the_filter_is_what_its_definition_says(curve: Curve, delta: float, order: int) -> None:
    found, plain = renyi.epsilon(curve, delta, order), plainly(curve, delta, weights(order))
    assert plain * (1 - 1e-12) <= found <= plain * (1 + 1e-4)
    assert renyi.within(curve, found, delta, order)
    assert not renyi.within(curve, found * (1 - 1e-9), delta, order)


@pytest.mark.parametrize(("delta", "order"), zip(DELTAS, (24, 6, 2), strict=True))
@pytest.mark.parametrize("curve", CURVES)
def test_the_filter_lies_between_the_best_order_and_the_union_bound(curve: Curve, delta: float, order: int) -> None:
    found, values = renyi.epsilon(curve, delta, order), np.array(curve)

    def best(deltas: np.ndarray) -> float:
        return max(0.0, float((values + np.log1p(-1 / A) - np.log(deltas * A) / (A - 1)).min()))

    assert renyi.epsilon_of_one(curve, delta) == pytest.approx(best(np.full(len(A), delta)), rel=1e-9)
    assert found <= best(delta * np.array(weights(order))) * (1 + 1e-9)
    # An average can do better than the best whole order, if hardly any order but a fraction between two is of use.
    assert found >= renyi.epsilon_of_one(curve, delta) * (0.95 if curve[1] == curve[-1] else 1.0)


def test_nothing_costs_nothing_and_what_is_unbounded_is_never_paid_for() -> None:
    assert renyi.epsilon((0.0,) * len(ORDERS), 1e-5) == 0.0
    assert renyi.epsilon_of_one((0.0,) * len(ORDERS), 1e-5) == 0.0
    assert renyi.epsilon((math.inf,) * len(ORDERS), 1e-5) == math.inf
    assert not renyi.within((math.inf,) * len(ORDERS), 1e9, 1e-5)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            renyi.epsilon(CURVES[0], delta)


def test_more_releases_cost_more_and_more_delta_less() -> None:
    costs = [renyi.epsilon(renyi.total([renyi.curve_of(PLAN, steps)]), 1e-5) for steps in (1, 2, 10, 100, 1016)]
    assert costs == sorted(costs)
    assert renyi.epsilon(CURVES[0], 2.5e-5) < renyi.epsilon(CURVES[0], 1e-5) < renyi.epsilon(CURVES[0], 0.5e-5)


# The adversary. A release has finitely many outcomes, each with a probability under P and one under Q.

Pair = tuple[tuple[float, ...], tuple[float, ...]]


def randomised_response(epsilon: float) -> Pair:
    p = 1 / (1 + math.exp(-epsilon))
    return (p, 1 - p), (1 - p, p)


def coarse_gaussian(shift: float) -> Pair:
    ends = np.array([-math.inf, -1.0, 0.5, math.inf])
    return tuple(np.diff(norm.cdf(ends - shift))), tuple(np.diff(norm.cdf(ends)))


def rare_disaster(probability: float, loss: float) -> Pair:
    """With this probability, something comes out that is exp(loss) times less probable under Q."""
    other = probability * math.exp(-loss)
    return (probability, 1 - probability), (other, 1 - other)


def curve_of_pair(pair: Pair) -> Curve:
    p, q = (np.log(np.array(side)) for side in pair)
    return tuple(
        max(0.0, *(float(logsumexp(a * x + (1 - a) * y)) / (a - 1) for x, y in ((p, q), (q, p)))) + 1e-15
        for a in ORDERS
    )


def worst(
    pairs: Sequence[Pair], worth: Callable[[float, Curve], float], allowed: Callable[[tuple[int, ...], Curve], bool]
) -> float:
    """The most that a strategy can expect of `worth` under P when it stops, over all strategies, which choose the next
    release, or to stop, by all outcomes so far. `worth` is of the loss and the total; `allowed` is asked before each
    release about how many there are of each kind with it, and their total.

    The order of outcomes matters to neither, so how many there are of each is all there is to a state.
    """
    curves = [curve_of_pair(pair) for pair in pairs]
    losses = [[math.log(x / y) for x, y in zip(*pair, strict=True)] for pair in pairs]

    @functools.cache
    def sum_of(kinds: tuple[int, ...]) -> Curve:
        return renyi.total(curve for curve, many in zip(curves, kinds, strict=True) for _ in range(many))

    @functools.cache
    def may(kinds: tuple[int, ...]) -> bool:
        return allowed(kinds, sum_of(kinds))

    @functools.cache
    def value(state: tuple[tuple[int, ...], ...]) -> float:
        loss = sum(n * each for kind, of in zip(state, losses, strict=True) for n, each in zip(kind, of, strict=True))
        kinds = tuple(sum(kind) for kind in state)
        best = worth(loss, sum_of(kinds))
        for index, (probabilities, _) in enumerate(pairs):
            if may(tuple(many + (i == index) for i, many in enumerate(kinds))):
                expected = 0.0
                for outcome, probability in enumerate(probabilities):
                    kind = tuple(n + (o == outcome) for o, n in enumerate(state[index]))
                    expected += probability * value((*state[:index], kind, *state[index + 1 :]))
                best = max(best, expected)
        return best

    return value(tuple((0,) * len(pair[0]) for pair in pairs))


def within(total: Curve, epsilon: float, delta: float) -> bool:
    """As a budget of this epsilon and delta asks."""
    return renyi.within(total, epsilon, delta, order_for(epsilon, delta))


def game(epsilon: float, delta: float) -> list[list[Pair]]:
    """Releases to choose from, and the same with P and Q exchanged. The largest disaster that the filter would let pass
    by itself is nearly as bad as delta allows."""
    low, high = 0.0, 0.9
    for _ in range(40):
        middle = (low + high) / 2
        passes = within(curve_of_pair(rare_disaster(middle, epsilon + 0.15)), epsilon, delta)
        low, high = (middle, high) if passes else (low, middle)
    pairs = [
        randomised_response(epsilon / 5),
        coarse_gaussian(epsilon / 4),
        *(rare_disaster(low * share, epsilon + 0.15) for share in (1 / 2, 1, 1.3, 1.6) if low * share < 0.95),
    ]
    return [pairs, [(q, p) for p, q in pairs]]


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-2), (0.5, 0.03), (2.0, 1e-2), (1.0, 1e-4)])
def test_no_adversary_gets_past_the_filter_and_one_gets_past_filters_that_are_wrong(
    epsilon: float, delta: float
) -> None:
    """The hockey-stick divergence of the whole tree of outcomes, exactly, for the best strategy."""
    assert all(math.fsum(weights(order)) <= 1.0 for order in ORDERS)

    def gets(allowed: Callable[[tuple[int, ...], Curve], bool]) -> float:
        return max(worst(pairs, lambda loss, _: max(0.0, 1 - math.exp(epsilon - loss)), allowed) for pairs in all_pairs)

    all_pairs = game(epsilon, delta)
    longest = 0

    def right(kinds: tuple[int, ...], total: Curve) -> bool:
        nonlocal longest
        holds = within(total, epsilon, delta)
        longest = max(longest, sum(kinds) if holds else 0)
        return holds

    assert 0.2 * delta < gets(right) <= delta
    assert longest > 2
    if delta > 1e-3:  # where the filter has no reserve to speak of
        # Weights that sum to 2.
        assert gets(lambda _, total: renyi.within(total, epsilon, 2 * delta, order_for(epsilon, delta))) > delta
    # A ledger that sees half of the releases; whoever composes without a bound at all has lost sooner.
    assert gets(lambda _, total: within(tuple(each / 2 for each in total), epsilon, delta)) > delta


def test_no_adversary_gets_past_the_filter_with_many_small_releases() -> None:
    epsilon, delta = 1.0, 1e-2
    pairs = [randomised_response(epsilon / 6), coarse_gaussian(epsilon / 5), rare_disaster(delta / 8, epsilon + 0.5),
             rare_disaster(delta / 3, epsilon / 2)]  # fmt: skip
    longest = 0

    def right(kinds: tuple[int, ...], total: Curve) -> bool:
        nonlocal longest
        holds = within(total, epsilon, delta)
        longest = max(longest, sum(kinds) if holds else 0)
        return holds

    for exchanged in (pairs, [(q, p) for p, q in pairs]):
        assert 0.1 * delta < worst(exchanged, lambda loss, _: max(0.0, 1 - math.exp(epsilon - loss)), right) <= delta
    assert longest > 20


def test_the_average_over_orders_is_a_supermartingale_only_with_all_releases_in_the_total() -> None:
    """E[M] for the best adaptive strategy of four releases: the inequality that the proof rests on, without reserve."""
    w = np.array(weights(8))

    def average(loss: float, total: Curve) -> float:
        return float(w @ np.exp((A - 1) * (loss - np.array(total))))

    for pairs in game(1.0, 1e-2):
        assert worst(pairs, average, lambda kinds, _: sum(kinds) <= 4) == pytest.approx(1.0, abs=1e-9)
        first = curve_of_pair(pairs[0])

        def without_one(loss: float, total: Curve, first: Curve = first) -> float:
            return average(loss, tuple(max(0.0, each - one) for each, one in zip(total, first, strict=True)))

        assert worst(pairs, without_one, lambda kinds, _: sum(kinds) <= 4) > 1.01
