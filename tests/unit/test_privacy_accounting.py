"""The stated epsilon is an upper bound, two accountants agree about it, and no plan exceeds its target."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import InputError
from cloister.privacy import accounting, units
from cloister.privacy.plan import PrivacyPlan, make_plan
from cloister.privacy.spec import TrainingSpec

SPEC = """
dataset: adult@1
label: income
model: {architecture: mlp, hidden: [256, 128]}
privacy: {epsilon: 3.0, delta: 1.0e-5, max_grad_norm: 1.0, engine: opacus}
training: {epochs: 20, expected_batch_size: 1024, optimizer: adam, learning_rate: 0.002}
resources: {workers: 2, gpus_per_worker: 0, region: eu}
purpose: income-research
"""


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(epsilon=3.0, delta=1e-5, max_grad_norm=1.0, epochs=20, expected_batch_size=1024, rows=26_049)


def test_both_accountants_give_the_known_figure() -> None:
    known = {"noise_multiplier": 1.0, "sample_rate": 0.02048, "steps": 2441, "delta": 1e-5}
    assert accounting.prv_epsilon(**known) == pytest.approx(6.436, rel=0.005)
    assert accounting.pld_epsilon(**known) == pytest.approx(6.436, rel=0.001)
    assert accounting.epsilon(**known) == max(accounting.prv_epsilon(**known), accounting.pld_epsilon(**known))
    assert accounting.rdp_epsilon(**known) == pytest.approx(7.034, abs=0.01)


def test_gaussian_steps_are_not_understated() -> None:
    """At q close to 1 steps are plain Gaussian mechanisms, whose curve is known in closed form (Balle 2018): up to the
    largest number of steps, and down to the least delta, where Fourier transforms round the most."""

    def exact_delta(sigma: float, eps: float) -> mpmath.mpf:
        left, right = mpmath.ncdf(0.5 / sigma - eps * sigma), mpmath.ncdf(-0.5 / sigma - eps * sigma)
        return left - mpmath.exp(eps) * right

    with mpmath.workdps(50):
        for steps, delta, whole in itertools.product((1, 50_000), (1e-10, 1e-5), (0.4, 2.0, 10.0)):
            stated = accounting.accounts(whole * math.sqrt(steps), 1 - 1e-9, steps, delta)
            for epsilon in stated.values():
                assert exact_delta(whole, epsilon) <= delta, (steps, delta, whole, stated)
            assert delta <= exact_delta(whole, accounting.certified(stated) * 0.98), (steps, delta, whole, stated)


def test_a_delta_that_rounding_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="delta"):
        accounting.epsilon(1.0, 0.1, 10, 0.99e-10)
    with pytest.raises(InputError, match=r"privacy\.delta"):
        TrainingSpec.from_yaml_text(SPEC.replace("1.0e-5", "0.99e-10"))


def test_small_epsilons_are_told_as_finely_as_large_ones() -> None:
    """Errors were absolute: at 0.05 one accountant said 0.34, and Rényi divergences less than either."""
    for sigma, rate, steps in ((53.78, 0.01, 5000), (20.0, 0.01, 500), (6.0, 0.003, 2000)):
        found = accounting.accounts(sigma, rate, steps, 1e-6)
        assert accounting.certified(found) <= found["rdp"]
        assert found["pld"] <= accounting.certified(found) < 1.05 * found["pld"] < 0.1


def test_renyi_divergences_are_not_understated() -> None:
    """Whatever logarithms of sums near 1 round: the sum in 60 digits."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with mpmath.workdps(60):
        for rate, sigma in itertools.product((1e-6, 0.01, 0.7), (0.5, 5.0, 1000.0)):
            for order in (2, 17, 128, 1024):
                q, exponent = mpmath.mpf(rate), 2 * mpmath.mpf(sigma) ** 2
                exact = mpmath.log(mpmath.fsum(
                    mpmath.binomial(order, k) * q**k * (1 - q) ** (order - k) * mpmath.exp(k * (k - 1) / exponent)
                    for k in range(order + 1)
                )) / (order - 1)  # fmt: skip
                stated = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])[0]
                assert stated + accounting._RDP_ROUNDING >= exact * (1 - mpmath.mpf(1e-12)), (rate, sigma, order)


def test_replacing_a_row_costs_more_than_adding_it_and_less_than_twice(plan: PrivacyPlan) -> None:
    """The figure beside a plan's epsilon. One step is integrated by brute force."""
    assert plan.epsilon_replacing == pytest.approx(5.48, abs=0.01)
    assert plan.epsilon < plan.epsilon_replacing < 2 * plan.epsilon
    rare = 0.5, 1e-5, 50_000, 1e-7  # by one accountant alone, replacing would be less
    assert accounting.replacing_epsilon(*rare) >= accounting.epsilon(*rare)
    sigma, rate, delta = 1.5, 0.1, 1e-5
    stated = accounting.replacing_epsilon(sigma, rate, 1, delta)
    x = np.linspace(-15 * sigma, 15 * sigma, 400_001)
    one, other = (
        (1 - rate) * np.exp(-x * x / (2 * sigma**2)) + rate * np.exp(-((x - side) ** 2) / (2 * sigma**2))
        for side in (1, -1)
    )
    scale = (x[1] - x[0]) / (sigma * math.sqrt(2 * math.pi))

    def exact_delta(eps: float) -> float:
        return float(np.maximum(one - math.exp(eps) * other, 0).sum() * scale)

    assert exact_delta(stated) <= delta <= exact_delta(stated * 0.98)


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_what_is_planned_is_certified_whatever_the_accountants_last_digits_do(
    monkeypatch: pytest.MonkeyPatch, target: float
) -> None:
    """A search over a function that does not fall everywhere once gave a plan of 8.615 where 8 was asked."""
    true = accounting.pld_epsilon
    monkeypatch.setattr(
        accounting, "prv_epsilon",
        lambda sigma, *rest: true(sigma, *rest) * (1.01 + 0.1 * math.sin(977 * sigma) * math.cos(61 * sigma)),
    )  # fmt: skip
    found = make_plan(epsilon=target, delta=1e-6, max_grad_norm=1.0, epochs=5, expected_batch_size=100, rows=10_000)
    assert found.epsilon_certified <= target
    for above in (target + 1e-9, math.nan):
        with pytest.raises(InputError, match="costs more"):
            replace(found, epsilon_certified=above)


@pytest.mark.parametrize("rows_per_unit", [1, 2])
def test_accountants_that_answer_infinity_or_nothing_do_not_end_a_search(
    monkeypatch: pytest.MonkeyPatch, rows_per_unit: int
) -> None:
    """As where a grid would be too large, or all that is left is less than delta."""

    def stepped(nothing: float, infinite: float) -> None:
        for name in ("prv_epsilon", "pld_epsilon", "rdp_epsilon", "prv_of_unit"):
            monkeypatch.setattr(
                accounting, name,
                lambda sigma, *_, **__: 0.0 if sigma >= nothing else math.inf if sigma < infinite else 100.0 / sigma,
            )  # fmt: skip

    for target, nothing, infinite, expected in (
        (2.0, 20.0, 20.0, 20.0), (0.15, 500.0, 300.0, 500.0), (2.0, math.inf, 60.0, 60.0), (2.0, math.inf, 2.0, 50.0),
        (2.0, 0.1, 0.0, 0.5),
    ):  # fmt: skip
        stepped(nothing, infinite)
        found = accounting.noise_multiplier_for(target, 1e-5, 0.01, 100, rows_per_unit)
        assert expected <= found <= expected * 1.002
        assert accounting.epsilon(found, 0.01, 100, 1e-5, rows_per_unit) <= target
    stepped(math.inf, math.inf)
    with pytest.raises(InputError, match="no amount of noise"):
        accounting.noise_multiplier_for(2.0, 1e-5, 0.01, 100, rows_per_unit)


def test_the_bound_does_not_depend_on_which_accountant_is_right() -> None:
    for sigma, rate, steps in ((0.8, 0.01, 500), (2.0, 0.1, 200), (5.0, 0.5, 50)):
        prv = accounting.prv_epsilon(sigma, rate, steps, 1e-6)
        pld = accounting.pld_epsilon(sigma, rate, steps, 1e-6)
        assert abs(prv - pld) < 0.03, "two independent implementations must agree"


def test_an_account_that_is_no_number_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a number and one that is none, `max` and `min` say the one that comes first."""
    for answers in itertools.permutations((1.0, math.nan, math.nan)):
        names = ("prv_epsilon", "pld_epsilon", "rdp_epsilon")
        for name, answer in zip(names, answers, strict=True):
            monkeypatch.setattr(accounting, name, lambda *_, answer=answer: answer)
        expected = answers[2] if not math.isnan(answers[2]) else math.inf
        assert accounting.epsilon(1.0, 0.01, 10, 1e-5) == expected


def test_no_noise_is_no_privacy_and_no_step_costs_nothing() -> None:
    assert accounting.epsilon(0.0, 0.1, 1, 1e-5) == math.inf
    assert accounting.epsilon(1.0, 0.1, 0, 1e-5) == 0.0
    for wrong in ((-1.0, 0.1, 1, 1e-5), (1.0, 1.0, 1, 1e-5), (1.0, 0.0, 1, 1e-5), (1.0, 0.1, -1, 1e-5),
                  (1.0, 0.1, 1, 0.0), (math.nan, 0.1, 1, 1e-5)):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            accounting.epsilon(*wrong)


def test_a_plan_is_certified_below_its_target_and_wastes_little(plan: PrivacyPlan) -> None:
    assert 2.98 < plan.epsilon_certified <= plan.epsilon == 3.0
    assert plan.epsilon_certified == accounting.certified(plan.accounts_after(plan.steps))
    assert accounting.epsilon(plan.noise_multiplier - 0.002, plan.sample_rate, plan.steps, plan.delta) > 3.0
    assert plan.steps == round(20 * 26_049 / 1024)
    assert plan.expected_batch_size == pytest.approx(1024, abs=1e-9)
    assert plan.epochs == pytest.approx(20, abs=0.05)


def test_redone_steps_cost_more(plan: PrivacyPlan) -> None:
    fewer, more = (accounting.certified(plan.accounts_after(steps)) for steps in (plan.steps // 2, plan.steps + 50))
    assert fewer < plan.epsilon_certified < more


def test_a_plan_survives_its_plain_map_and_refuses_any_other(plan: PrivacyPlan) -> None:
    body = plan.to_dict()
    assert PrivacyPlan.from_dict(body) == plan
    for wrong in (body | {"extra": 1}, {k: v for k, v in body.items() if k != "rows"}, body | {"steps": 1.5},
                  body | {"steps": True}, body | {"epsilon": "3"}, body | {"sample_rate": 1.5}, body | {"steps": 0},
                  body | {"noise_multiplier": math.nan}, body | {"max_grad_norm": math.inf},
                  body | {"rows_per_unit": 0}, body | {"rows_per_unit": 1.5}):  # fmt: skip
        with pytest.raises(InputError):
            PrivacyPlan.from_dict(wrong)
    older = {k: v for k, v in body.items() if k not in ("rows_per_unit", "epsilon_replacing")}
    assert PrivacyPlan.from_dict(older) == replace(plan, epsilon_replacing=None), "an older plan"
    with pytest.raises(InputError):
        replace(plan, rows=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"expected_batch_size": 26_049}, "expected_batch_size"),
        ({"delta": 1e-4}, "delta"),
        ({"epsilon": 0.001}, "no amount of noise"),
    ],
)
def test_a_plan_that_cannot_be_private_is_refused(change: dict[str, float], told: str) -> None:
    fields = {"epsilon": 3.0, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 20, "expected_batch_size": 1024}
    with pytest.raises(InputError, match=told):
        make_plan(**(fields | {"rows": 26_049} | change))  # type: ignore[arg-type]  # ints and floats


# Units of several rows. The rate, steps and delta of the plan above; the multipliers give epsilons that people ask for.
UNITS = [(2, 2.0), (8, 8.0), (8, 4.0), (100, 60.0)]


@pytest.mark.parametrize(("rows", "sigma"), UNITS)
def test_two_accountants_agree_about_units(rows: int, sigma: float) -> None:
    prv = accounting.prv_epsilon(sigma, 0.02048, 2441, 1e-5, rows)
    pld = accounting.pld_epsilon(sigma, 0.02048, 2441, 1e-5, rows)
    assert prv == pytest.approx(pld, rel=0.005)
    assert accounting.epsilon(sigma, 0.02048, 2441, 1e-5, rows) == max(prv, pld)


@pytest.mark.parametrize(("rows", "sigma"), UNITS)
def test_what_a_unit_costs_lies_between_what_others_prove(rows: int, sigma: float) -> None:
    """More than one of its rows; less than coarser bounds that need no mixture: all its rows whenever one is drawn."""
    rate, steps, delta = 0.02048, 2441, 1e-5
    certified = accounting.epsilon(sigma, rate, steps, delta, rows)
    assert certified > accounting.epsilon(sigma, rate, steps, delta)
    together = accounting.pld_epsilon(sigma / rows, 1 - (1 - rate) ** rows, steps, delta)
    assert certified < together


def test_a_unit_costs_less_than_group_privacy_says() -> None:
    """k·epsilon at delta·(1 + e^epsilon + …): valid for every mechanism, and far above."""
    rows, sigma, rate, steps = 3, 4.0, 0.02, 500
    one, delta = 0.0, 0.0
    for delta_of_one in (1e-10, 1e-8, 1e-6):
        one = accounting.pld_epsilon(sigma, rate, steps, delta_of_one)
        delta = delta_of_one * sum(math.exp(index * one) for index in range(rows))
        certified = accounting.epsilon(sigma, rate, steps, delta, rows)
        assert certified < rows * one
    assert one > 0.0


@pytest.mark.parametrize(("rows", "sigma", "rate"), [(1, 1.0, 0.02), (3, 1.5, 0.1), (8, 6.0, 0.3)])
def test_one_step_of_a_unit_is_not_understated(rows: int, sigma: float, rate: float) -> None:
    """One step is integrated by brute force, in both directions: no accountant's code takes part."""
    delta = 1e-5
    stated = accounting.epsilon(sigma, rate, 1, delta, rows)
    x = np.linspace(-15 * sigma, rows + 15 * sigma, 400_001)
    without = np.exp(-x * x / (2 * sigma**2))
    owned = sum(
        math.comb(rows, j) * rate**j * (1 - rate) ** (rows - j) * np.exp(-((x - j) ** 2) / (2 * sigma**2))
        for j in range(rows + 1)
    )

    def exact_delta(eps: float) -> float:
        scale = (x[1] - x[0]) / (sigma * math.sqrt(2 * math.pi))
        sides = [np.maximum(a - math.exp(eps) * b, 0).sum() * scale for a, b in ((owned, without), (without, owned))]
        return float(max(sides))

    assert exact_delta(stated) <= delta <= exact_delta(max(0.0, stated - 0.03))


def test_all_rows_in_every_step_are_one_row_of_their_number() -> None:
    """At q close to 1 a unit of k rows is one row of norm k·C."""
    for accountant in (accounting.prv_epsilon, accounting.pld_epsilon):
        assert accountant(20.0, 1 - 1e-9, 10, 1e-5, 8) == pytest.approx(
            accountant(20.0 / 8, 1 - 1e-9, 10, 1e-5), abs=2e-3
        )


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.02048, 2441), (4.0, 0.5, 50), (0.6, 0.002, 4000)])
def test_the_mixture_of_one_row_is_what_opacus_computes(sigma: float, rate: float, steps: int) -> None:
    ours = units.prv_epsilon(sigma, rate, steps, 1e-5, 1, epsilon_error=0.01, most_points=1 << 20)
    assert ours == pytest.approx(accounting.prv_epsilon(sigma, rate, steps, 1e-5), rel=5e-3)


@settings(max_examples=3, deadline=None)
@given(
    rows=st.integers(1, 8), sigma=st.floats(6.0, 40.0), rate=st.floats(0.002, 0.1), steps=st.integers(1, 400),
    factor=st.floats(1.05, 1.5),
)  # fmt: skip
def test_more_rows_more_often_more_steps_and_less_noise_cost_more(
    rows: int, sigma: float, rate: float, steps: int, factor: float
) -> None:
    base = accounting.epsilon(sigma, rate, steps, 1e-6, rows)
    rounding = 1e-3 + 0.02 * base
    for worse in (
        accounting.epsilon(sigma, rate, steps, 1e-6, rows + 1),
        accounting.epsilon(sigma / factor, rate, steps, 1e-6, rows),
        accounting.epsilon(sigma, min(0.9, rate * factor), steps, 1e-6, rows),
        accounting.epsilon(sigma, rate, math.ceil(steps * factor), 1e-6, rows),
        accounting.epsilon(sigma, rate, steps, 1e-6 / factor, rows),
    ):
        assert worse >= base - rounding


def test_moving_the_tails_of_the_binomial_up_keeps_its_mass() -> None:
    for rows, rate in ((1, 0.1), (8, 0.02), (10_000, 0.01), (10_000, 1 - 1e-9), (500, 1e-9)):
        counts, masses = units.sensitivities(rows, rate)
        assert sum(masses) == pytest.approx(1.0, abs=1e-12)
        assert counts == sorted(set(counts))
        assert np.dot(counts, masses) >= rows * rate * (1 - 1e-9)
        assert counts[-1] <= rows


def test_a_plan_for_units_needs_more_noise_for_the_same_epsilon(plan: PrivacyPlan) -> None:
    fields = {"epsilon": 3.0, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 20, "expected_batch_size": 1024}
    units_plan = make_plan(**fields, rows=26_049, rows_per_unit=8)  # type: ignore[arg-type]  # ints and floats
    assert units_plan.rows_per_unit == 8
    assert 2.97 < units_plan.epsilon_certified <= 3.0
    assert units_plan.noise_multiplier > 4 * plan.noise_multiplier
    assert PrivacyPlan.from_dict(units_plan.to_dict()) == units_plan
    as_if_rows = accounting.epsilon(units_plan.noise_multiplier, plan.sample_rate, plan.steps, plan.delta)
    assert as_if_rows < 0.5, "the epsilon of one row says nothing about its owner"


def test_the_spec_of_the_design_is_read_and_survives_a_round_trip() -> None:
    spec = TrainingSpec.from_yaml_text(SPEC)
    assert spec.model.hidden == (256, 128)
    assert spec.features is None
    assert TrainingSpec.model_validate(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("adult@1", "adult", "dataset"),
        ("hidden: [256, 128]", "hidden: []", "model.hidden"),
        ("epsilon: 3.0", "epsilon: -424242", "privacy.epsilon"),
        ("epsilon: 3.0", "epsilon: .nan", "privacy.epsilon"),
        ("engine: opacus", "engine: none", "privacy.engine"),
        ("optimizer: adam", "optimizer: lion", "training.optimizer"),
        ("workers: 2", "workers: 0", "resources.workers"),
        ("purpose:", "porpoise:", "purpose"),
        ("label: income", "label: income\nfeatures: [age, income]", "label is not a feature"),
        ("dataset: adult@1", "dataset: [", "line"),
    ],
)
def test_a_wrong_spec_is_refused_with_its_place(old: str, new: str, told: str) -> None:
    assert old in SPEC
    with pytest.raises(InputError) as refusal:
        TrainingSpec.from_yaml_text(SPEC.replace(old, new))
    assert told in refusal.value.message
    assert "424242" not in refusal.value.message
