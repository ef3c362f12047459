"""The stated epsilon is an upper bound by two accountants, and the plan never exceeds its target."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cloister.errors import InputError
from cloister.privacy import accounting
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
    assert accounting.prv_epsilon(**known) == pytest.approx(6.446, abs=0.005)
    assert accounting.pld_epsilon(**known) == pytest.approx(6.436, abs=0.005)
    assert accounting.epsilon(**known) == max(accounting.prv_epsilon(**known), accounting.pld_epsilon(**known))


def test_one_gaussian_step_is_not_understated() -> None:
    """At q close to 1 one step is the plain Gaussian mechanism, whose curve is known in closed form (Balle 2018)."""
    sigma, delta = 2.0, 1e-5
    stated = accounting.epsilon(sigma, 1 - 1e-9, 1, delta)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def exact_delta(eps: float) -> float:
        return phi(0.5 / sigma - eps * sigma) - math.exp(eps) * phi(-0.5 / sigma - eps * sigma)

    assert exact_delta(stated) <= delta <= exact_delta(stated - 0.03)


def test_the_bound_does_not_depend_on_which_accountant_is_right() -> None:
    for sigma, rate, steps in ((0.8, 0.01, 500), (2.0, 0.1, 200), (5.0, 0.5, 50)):
        prv = accounting.prv_epsilon(sigma, rate, steps, 1e-6)
        pld = accounting.pld_epsilon(sigma, rate, steps, 1e-6)
        assert abs(prv - pld) < 0.03, "two independent implementations must agree"


def test_no_noise_is_no_privacy_and_no_step_costs_nothing() -> None:
    assert accounting.epsilon(0.0, 0.1, 1, 1e-5) == math.inf
    assert accounting.epsilon(1.0, 0.1, 0, 1e-5) == 0.0
    for wrong in ((-1.0, 0.1, 1, 1e-5), (1.0, 1.0, 1, 1e-5), (1.0, 0.0, 1, 1e-5), (1.0, 0.1, -1, 1e-5),
                  (1.0, 0.1, 1, 0.0), (math.nan, 0.1, 1, 1e-5)):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            accounting.epsilon(*wrong)


def test_a_plan_is_certified_below_its_target_and_wastes_little(plan: PrivacyPlan) -> None:
    assert 2.98 < plan.epsilon_certified <= plan.epsilon == 3.0
    assert plan.epsilon_certified == plan.epsilon_after(plan.steps)
    assert accounting.epsilon(plan.noise_multiplier - 0.002, plan.sample_rate, plan.steps, plan.delta) > 3.0
    assert plan.steps == round(20 * 26_049 / 1024)
    assert plan.expected_batch_size == pytest.approx(1024, abs=1e-9)
    assert plan.epochs == pytest.approx(20, abs=0.05)


def test_redone_steps_cost_more(plan: PrivacyPlan) -> None:
    assert plan.epsilon_after(plan.steps // 2) < plan.epsilon_certified < plan.epsilon_after(plan.steps + 50)


def test_a_plan_survives_its_plain_map_and_refuses_any_other(plan: PrivacyPlan) -> None:
    body = plan.to_dict()
    assert PrivacyPlan.from_dict(body) == plan
    for wrong in (body | {"extra": 1}, {k: v for k, v in body.items() if k != "rows"}, body | {"steps": 1.5},
                  body | {"steps": True}, body | {"epsilon": "3"}, body | {"sample_rate": 1.5}, body | {"steps": 0},
                  body | {"noise_multiplier": math.nan}, body | {"max_grad_norm": math.inf}):  # fmt: skip
        with pytest.raises(InputError):
            PrivacyPlan.from_dict(wrong)
    with pytest.raises(InputError):
        replace(plan, rows=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"expected_batch_size": 26_049}, "expected_batch_size"),
        ({"delta": 1e-4}, "delta"),
        ({"epsilon": 0.01}, "no amount of noise"),
    ],
)
def test_a_plan_that_cannot_be_private_is_refused(change: dict[str, float], told: str) -> None:
    fields = {"epsilon": 3.0, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 20, "expected_batch_size": 1024}
    with pytest.raises(InputError, match=told):
        make_plan(**(fields | {"rows": 26_049} | change))  # type: ignore[arg-type]  # ints and floats


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
