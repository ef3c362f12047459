"""Where a person has several rows, what is planned, approved, charged and told is about the person."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

import clinic
from authority_world import CODE, Person, World, training_spec
from cloister.authority.costs import for_rows
from cloister.canonical import unb64
from cloister.privacy import accounting
from cloister.privacy.plan import make_plan

SPEC: dict[str, Any] = {
    "name": "clinic", "dataset": "clinic@1", "label": "ill", "features": ["age", "city"],
    "privacy": {"epsilon": 3.0, "delta": 1e-3},
    "training": {"epochs": 2, "expected_batch_size": 8, "learning_rate": 0.1},
    "resources": {"workers": 1, "region": "eu"},
}  # fmt: skip
MAX_ROWS = clinic.SCHEMA["unit"]["max_rows"]  # type: ignore[index]  # a map


@pytest.fixture
def clinic_world(world: World) -> World:
    clinic.seal(world)
    body = {"epsilon": 9.0, "delta": 9e-3}
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", body)
    return world


def test_a_plan_says_whom_it_protects_and_its_noise_is_for_all_of_their_rows(clinic_world: World) -> None:
    shown = clinic_world.post("ed", "/v1/plans", {"spec": training_spec(**SPEC)})
    assert shown["unit"] == {"column": "patient", "max_rows": MAX_ROWS}
    plan = shown["plan"]
    assert plan["rows_per_unit"] == MAX_ROWS
    known = plan["noise_multiplier"], plan["sample_rate"], plan["steps"], plan["delta"]
    assert plan["epsilon_certified"] == pytest.approx(accounting.epsilon(*known, MAX_ROWS), rel=1e-9)  # other threads
    assert plan["epsilon_certified"] <= 3.0
    assert accounting.epsilon(*known) < 1.5, "noise for one row would do with far less"


def test_rows_that_were_trained_on_and_held_out_cost_both() -> None:
    """A group of rows may lie on both sides, and an evaluation is then on top: the sum, and not the larger of both.

    Their epsilon for five rows at epsilon 3 was said to be 15, at delta 1.
    """
    plan = make_plan(epsilon=3.0, delta=1e-5, max_grad_norm=1.0, epochs=20, expected_batch_size=1024, rows=26_049)
    run = SimpleNamespace(
        plan=plan.to_dict(), steps_committed=plan.steps, epsilon_charged=plan.epsilon_certified, delta_charged=1e-5
    )
    mechanism = plan.noise_multiplier, plan.sample_rate, plan.steps, plan.delta
    one, five = plan.epsilon_certified, accounting.prv_epsilon(*mechanism, 5)
    evaluation = plan.evaluation_epsilon
    assert five == pytest.approx(20.9, abs=0.2)
    for (trained, held_out), expected in {
        (1, 0): one, (0, 1): evaluation, (0, 4): 4 * evaluation, (1, 1): one + evaluation, (5, 0): five,
        (5, 3): five + 3 * evaluation,
    }.items():  # fmt: skip
        assert for_rows(run, trained, held_out) == (pytest.approx(expected, rel=0.01), 1e-5)
    for many in (300, 10_000):
        assert for_rows(run, many, 0) == (many * one, 1.0), "what no accountant can tell is no bound"


def test_the_unit_is_approved_charged_and_in_the_provenance(clinic_world: World) -> None:
    world, workload = clinic_world, Person("new", ["run"])
    body = {"spec": training_spec(**SPEC), "code_digest": CODE, "public_key": workload.public}
    request = world.missing(world.ask("ed", "POST", "/v1/runs", body))
    assert request["details"]["rows_per_unit"] == MAX_ROWS
    assert world.vote("rita", request).status_code == 200
    run = world.post("ed", "/v1/runs", body)["run"]
    workload.name, world.people[run] = run, workload
    assert world.budget("clinic")["epsilon_added"] == 3.0
    lease = world.lease(run)
    assert lease.plan["rows_per_unit"] == MAX_ROWS
    steps = lease.plan["steps"]
    world.commit(run, 0, steps)
    facts: dict[str, Any] = {
        "name": "clinic", "dataset": "clinic@1", "label": "ill", "labels": ("no", "yes"),
        "features": ({"name": "age", "type": "integer", "class": "confidential", "bounds": [0, 120]},),
    }  # fmt: skip
    world.post(run, f"/v1/runs/{run}/model", world.model_body(run, lease, b"small", **facts))
    assert world.budget("clinic")["epsilon_added"] == lease.plan["epsilon_certified"]
    provenance = world.get("ed", "/v1/models/clinic/versions/1")["provenance"]
    privacy = json.loads(unb64(provenance["payload"]))["predicate"]["privacy"]
    assert privacy["plan"]["rows_per_unit"] == MAX_ROWS


def test_a_run_that_is_stopped_is_charged_for_persons_and_not_for_rows(clinic_world: World) -> None:
    world, workload = clinic_world, Person("new", ["run"])
    body = {"spec": training_spec(**SPEC), "code_digest": CODE, "public_key": workload.public}
    run = world.agreed("rita", "ed", "POST", "/v1/runs", body)["run"]
    workload.name, world.people[run] = run, workload
    plan = world.lease(run).plan
    world.commit(run, 0, 3)
    world.post("ed", f"/v1/runs/{run}/stop")
    world.end(run, "stopped")
    known = plan["noise_multiplier"], plan["sample_rate"], 3, plan["delta"]
    expected = accounting.epsilon(*known, MAX_ROWS)
    assert world.budget("clinic")["epsilon_added"] == pytest.approx(expected, rel=1e-9)
