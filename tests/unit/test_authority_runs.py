"""Somebody tries to train for free, twice, too long, or on rows that are not theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from authority_world import (
    AUDIT,
    CODE,
    DELTA,
    EPSILON,
    HISTOGRAM,
    NODE,
    STEPS,
    URL,
    Person,
    World,
    adult_schema,
    attempt_body,
    lease_body,
    training_spec,
)
from cloister.authority import attempts as attempts_module
from cloister.authority import costs, ledger_seals
from cloister.authority import runs as runs_module
from cloister.authority.core import PLATFORM
from cloister.authority.ledger import Budget, Cost
from cloister.authority.service import Authority
from cloister.datasets.schema import DatasetSchema
from cloister.errors import CloisterError, IntegrityError, UnavailableError
from cloister.privacy import renyi
from cloister.sealing.lease import OneTimeKey
from cloister.stores.tables import runs


def run_body(**spec: Any) -> dict[str, Any]:
    return {"spec": training_spec(**spec), "code_digest": CODE, "public_key": Person("new", []).public}


def charged(world: World) -> float:
    return float(world.budget()["epsilon_added"])


# ---- submitting ----


def test_the_whole_plan_is_charged_at_submit(world: World) -> None:
    plan = world.post("ed", "/v1/plans", {"spec": training_spec()})
    before, after = plan["budget"]["before"], plan["budget"]["after"]
    assert (charged(world), before["epsilon_left"], after["epsilon_left"]) == (0.0, 10.0, 10.0 - EPSILON)
    with world.recorded("ed", "train:submit", "denied"):
        request = world.missing(world.ask("ed", "POST", "/v1/runs", run_body()))
    assert charged(world) == 0.0  # asking for approval costs nothing
    assert world.vote("rita", request).status_code == 200
    with world.recorded("ed", "train:submit"):
        run = world.submit()
    assert charged(world) == EPSILON
    assert world.budget()["delta_added"] == DELTA
    (spent,) = world.budget()["runs"]
    assert (spent["run"], spent["author"], spent["state"], spent["epsilon"]) == (run, "ed", "submitted", EPSILON)
    assert spent["evaluation_epsilon"] == 0.0, "nothing is told of held-out rows yet"


def test_a_run_over_budget_is_refused(world: World) -> None:
    world.set_budget(2.99)
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", run_body()) == "BudgetError"
    world.set_budget(EPSILON, DELTA * 1.5)  # half of that is for adding up, and by the other half one run is more
    with world.still():
        answer = world.ask("ed", "POST", "/v1/runs", run_body())
    assert answer.json()["kind"] == "BudgetError"
    assert "lower privacy.delta to 7.5e-06" in answer.json()["hint"]
    world.set_budget(EPSILON * 1.4, DELTA * 2)
    world.submit()
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", run_body()) == "BudgetError"


def test_runs_that_a_filter_allows_need_not_add_up(world: World) -> None:
    world.set_budget(EPSILON * 2)
    together = [0.0]
    while world.post("ed", "/v1/plans", {"spec": training_spec()})["affordable"]:
        world.submit()
        together.append(world.budget()["epsilon_charged"])
        assert len(together) < 10
    shown = world.budget()
    assert (shown["rule"], charged(world)) == ("renyi", EPSILON * (len(together) - 1))
    assert together == sorted(together)
    assert together[:2] == [0.0, EPSILON]
    assert together[-1] <= EPSILON * 2 < charged(world)
    assert [run["after"] for run in shown["runs"]] == pytest.approx(together[1:])
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", run_body()) == "BudgetError"


def test_a_run_of_before_there_was_a_filter_adds_up_with_all_of_delta(world: World) -> None:
    world.set_budget(EPSILON * 2, DELTA * 2)
    world.submit()
    with world.authority.core.of_itself("ledger:seal") as act, ledger_seals.changing(act, world.ledger()):
        act.resource = PLATFORM
        act.connection.execute(update(runs).values(renyi_charged=None))
    world.submit()
    shown = world.budget()
    assert (shown["rule"], shown["epsilon_charged"], shown["delta_of_each_rule"]) == ("adding", 6.0, DELTA * 2)
    with world.still("denied"):
        assert world.refused(403, "ed", "POST", "/v1/runs", run_body()) == "PermissionDeniedError"


def test_a_key_has_one_run(world: World) -> None:
    body = run_body()
    run = world.agreed("rita", "ed", "POST", "/v1/runs", body)["run"]
    assert run.startswith("run-")
    assert world.vote("rita", world.missing(world.ask("ed", "POST", "/v1/runs", body))).status_code == 200
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", body) == "ConflictError"


def test_a_dataset_without_a_budget_cannot_be_trained_on(empty_world: World) -> None:
    empty_world.seal()
    with empty_world.still(entries=0):
        answer = empty_world.ask("ed", "POST", "/v1/runs", run_body())
    assert (answer.status_code, answer.json()["kind"]) == (409, "BudgetError")
    assert answer.json()["error"] == "adult has no budget yet"
    assert "ask olga: cloister budget set adult" in answer.json()["hint"]
    with empty_world.still("denied"):  # who could not train anyway is told that
        assert empty_world.refused(403, "rita", "POST", "/v1/runs", run_body()) == "PermissionDeniedError"


def test_decimal_fractions_that_add_up_are_not_refused() -> None:
    costly = (math.inf,) * len(renyi.ORDERS)
    spent = Cost.sum([Cost(0.1, 1e-5, costly)] * 3)  # 0.1 + 0.1 + 0.1 > 0.3 in binary, and so are 1e-5
    assert Budget(0.3, 6e-5, spent).holds()
    assert not Budget(0.2999, 6e-5, spent).holds()
    assert not Budget(0.3, 5.999e-5, spent).holds()
    assert not Budget(0.3, 6e-5, Cost.sum((spent, Cost(1e-6, 0.0, costly)))).holds()


def test_a_submission_without_anything_left_is_refused_by_policy(world: World) -> None:
    world.set_budget(EPSILON)
    world.submit()
    with world.still("denied"):
        assert world.refused(403, "ed", "POST", "/v1/runs", run_body()) == "PermissionDeniedError"


def test_two_submits_at_once_cannot_both_take_the_last_epsilon(world: World) -> None:
    world.set_budget(EPSILON * 1.2)
    ed, bodies = world.caller("ed"), [run_body(name=f"model-{number}") for number in range(6)]
    for body in bodies:  # each of them is approved: the budget alone decides
        assert world.vote("rita", world.missing(world.ask("ed", "POST", "/v1/runs", body))).status_code == 200

    def submit(body: dict[str, Any]) -> bool:
        try:
            world.authority.runs.submit(ed, body["spec"], body["code_digest"], body["public_key"])
        except CloisterError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(submit, bodies)) == [False] * 5 + [True]
    assert charged(world) == EPSILON
    assert world.counts()["runs"] == 1


@pytest.mark.parametrize(
    "spec",
    [
        {"training": {"epochs": 1e9, "expected_batch_size": 64, "learning_rate": 0.01}},
        {"training": {"epochs": 1e308, "expected_batch_size": 1, "learning_rate": 0.01}},
        {"privacy": {"epsilon": 1e-300, "delta": DELTA}},
        {"privacy": {"epsilon": 1.0, "delta": 0.5}},
        {"resources": {"workers": 4, "region": "eu"}},
        {"features": ["age", "race"]},
        {"features": ["age", "fnlwgt", "nothing"]},
        {"label": "sex"},  # restricted: its lease would open every restricted column
        {"label": "race"},
        {"label": "age"},
        {"label": "nothing"},
        {"label": "workclass"},  # an input as well
        {"dataset": "adult@1' OR '1'='1"},
        {"name": "../../adult"},
    ],
)
def test_a_spec_that_cannot_be_is_refused_at_once(calm_world: World, spec: dict[str, Any]) -> None:
    before = calm_world.content()
    for path, body in (("/v1/plans", {"spec": training_spec(**spec)}), ("/v1/runs", run_body(**spec))):
        assert calm_world.refused(400, "ed", "POST", path, body) == "InputError"
    assert calm_world.content() == before


def test_an_unknown_dataset_is_not_found(calm_world: World) -> None:
    assert calm_world.refused(404, "ed", "POST", "/v1/plans", {"spec": training_spec(dataset="adult@2")})


# ---- leases ----


def test_a_lease_holds_the_keys_of_its_rank_and_never_the_restricted_ones(world: World) -> None:
    run = world.submit()
    first, second = world.lease(run, 0), world.lease(run, 1)
    assert first.keys.keys() == {f"1/{shard}/{cls}" for shard in ("train-000", "train-002", "holdout-000")
                                 for cls in ("internal", "confidential")}  # fmt: skip
    assert second.keys.keys() == {"1/train-001/internal", "1/train-001/confidential"}
    assert first.model_key is not None
    assert second.model_key is None
    assert not set(first.keys.values()) & set(second.keys.values())


def test_a_lease_opens_only_the_classes_of_the_columns_that_are_used(world: World) -> None:
    schema = adult_schema()
    only = [name for name in schema.stored_columns("confidential") if schema.column(name).role is None]
    run = world.submit(features=only)
    assert {name.split("/")[2] for name in world.lease(run).keys} == {"confidential"}


def test_a_run_on_a_restricted_label_from_before_gets_no_restricted_key(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a spec were accepted that must not be: the lease holds the line by itself."""
    run = world.submit()
    schema = DatasetSchema.from_mapping(adult_schema().to_dict())
    for module in (runs_module, attempts_module):
        monkeypatch.setattr(module, "columns_of", lambda *_: (schema.feature_columns(None), schema.column("sex")))
    with world.still("denied"):
        assert world.refused(403, "ed", "POST", "/v1/runs", run_body()) == "PermissionDeniedError"
    assert not any("restricted" in name for name in world.lease(run).keys)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (lease_body(2), 400),
        (lease_body(4097), 400),
        (lease_body(-1), 400),
        (lease_body(code="sha256:" + "0" * 64), 403),
        (lease_body(code="c0de" * 16), 400),
        (lease_body(key=b"short"), 400),
        (lease_body(key=bytes(32)), 400),
    ],
)
def test_a_lease_for_another_rank_code_or_key_is_refused(world: World, body: dict[str, Any], status: int) -> None:
    run = world.submit()
    world.attempt(run)
    before = world.content()
    answer = world.ask(run, "POST", f"/v1/runs/{run}/leases", body)
    assert answer.status_code == status
    assert "sealed" not in answer.json()
    assert world.content() == before


def test_a_second_lease_for_a_rank_is_refused(world: World) -> None:
    run = world.submit()
    world.lease(run)
    with world.still():
        assert world.refused(409, run, "POST", f"/v1/runs/{run}/leases", lease_body()) == "ConflictError"


def test_only_one_of_many_leases_at_once_is_given(world: World) -> None:
    run = world.submit()
    world.attempt(run)
    caller = world.caller(run)

    def ask(_: int) -> bool:
        try:
            world.authority.attempts.lease(caller, run, 1, 0, OneTimeKey.generate().public, CODE)
        except CloisterError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1
    assert world.counts()["leases"] == 1


@pytest.mark.parametrize("end", ["stop", "end"])
def test_a_run_that_has_ended_gets_nothing_more(world: World, end: str) -> None:
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 3)
    world.post("ed", f"/v1/runs/{run}/stop") if end == "stop" else world.end(run)
    for path, body in (
        ("attempts", attempt_body()),
        ("leases", lease_body(1)),
        ("blocks", {"attempt": 1, "first": 3, "last": 4}),
        ("checkpoints", world.checkpoint_body(run, 3)),
        ("progress", {"attempt": 1, "steps_done": 1, "rows_per_s": 1.0}),
        ("model", {"manifest": "e30=", "model_sha256": "0" * 64, "blob": f"models/{run}/x", "blob_sha256": "0" * 64,
                   "evaluation": HISTOGRAM, "audit": AUDIT}),
    ):  # fmt: skip
        before = world.content()
        world.refused(409, run, "POST", f"/v1/runs/{run}/{path}", body)
        assert world.content() == before


def test_the_lease_is_on_record_before_its_keys_exist_outside(world: World) -> None:
    run = world.submit()
    size = len(world.log())
    world.lease(run)
    (entry,) = [entry for entry in world.log()[size:] if entry.action == "run:lease"]
    assert (entry.actor, entry.outcome, entry.details["node"], entry.details["rank"]) == (run, "success", NODE, 0)
    assert "1/holdout-000/internal" in str(entry.details["files"])


@pytest.mark.parametrize(("event", "table"), [("INSERT", "log_entries"), ("UPDATE", "log_head")])
def test_without_a_log_no_key_leaves(world: World, event: str, table: str) -> None:
    run, approved = world.submit(), run_body()
    world.attempt(run)
    assert world.vote("rita", world.missing(world.ask("ed", "POST", "/v1/runs", approved))).status_code == 200
    world.token(run)
    with world.place.raw() as database:
        body = "BEGIN SELECT RAISE(ABORT, 'no'); END"
        if world.place.server:
            database.exec_driver_sql(
                "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$"
            )
            body = "FOR EACH ROW EXECUTE FUNCTION no()"
        database.exec_driver_sql(f"CREATE TRIGGER t BEFORE {event} ON {table} {body}")
    before = world.content()
    answer = world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body())
    assert answer.status_code in (422, 503)
    assert "sealed" not in answer.text
    with pytest.raises((UnavailableError, IntegrityError)):
        world.authority.runs.submit(world.caller("ed"), approved["spec"], CODE, approved["public_key"])
    assert world.content() == before


def test_without_the_log_table_no_key_leaves(world: World) -> None:
    run = world.submit()
    world.attempt(run)
    world.token(run)  # which is on record too: what is refused has to be the lease
    with world.place.raw() as database:
        database.exec_driver_sql("ALTER TABLE log_entries RENAME TO gone")
    before = world.content()
    assert world.refused(503, run, "POST", f"/v1/runs/{run}/leases", lease_body()) == "UnavailableError"
    assert world.content() == before


# ---- blocks ----


@pytest.mark.parametrize(
    "block", [(0, 3), (4, 3), (3, 3), (2, 5), (5, 6), (3, STEPS + 1), (3, 1_000_000_000), (-1, 3), (3, 10**30)]
)
def test_a_block_that_is_not_the_next_one_is_refused(world: World, block: tuple[int, int]) -> None:
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 3)
    before = world.content()
    answer = world.ask(run, "POST", f"/v1/runs/{run}/blocks", {"attempt": 1, "first": block[0], "last": block[1]})
    assert answer.status_code in (400, 409)
    assert world.content() == before


def test_no_lease_and_no_block_before_an_attempt(world: World) -> None:
    run = world.submit()
    with world.still():
        world.refused(409, run, "POST", f"/v1/runs/{run}/leases", lease_body())
    with world.still():
        world.refused(409, run, "POST", f"/v1/runs/{run}/blocks", {"attempt": 1, "first": 0, "last": 1})


def test_progress_is_never_ahead_of_what_is_committed(world: World) -> None:
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 3)
    with world.still(entries=0):
        world.refused(400, run, "POST", f"/v1/runs/{run}/progress", {"attempt": 1, "steps_done": 4, "rows_per_s": 1.0})
    world.post(run, f"/v1/runs/{run}/progress", {"attempt": 1, "steps_done": 3, "rows_per_s": 1.0})
    assert world.get("ed", f"/v1/runs/{run}")["steps_done"] == 3


# ---- what it costs ----


def test_failing_before_any_block_gives_everything_back(world: World) -> None:
    run = world.submit()
    world.lease(run)
    body = world.end_body(run) | {"error": {"kind": "InputError", "error": "x" * 9999}}
    with world.recorded(run, "run:work"):
        world.post(run, f"/v1/runs/{run}/end", body)
    assert (charged(world), world.budget()["delta_added"]) == (0.0, 0.0)
    assert len(world.get("ed", f"/v1/runs/{run}")["error"]["error"]) == 500


@pytest.mark.parametrize("end", ["stop", "end"])
def test_ending_after_some_steps_charges_for_them(world: World, end: str) -> None:
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 3)
    spent = world.get("ed", f"/v1/runs/{run}")["epsilon_spent"]
    if end == "stop":
        world.post("ed", f"/v1/runs/{run}/stop")
        assert charged(world) == EPSILON  # on a person's word nothing is given back
    world.end(run)
    shown = world.get("ed", f"/v1/runs/{run}")
    assert shown["state"] == ("stopped" if end == "stop" else "failed")
    assert 0 < shown["epsilon_charged"] == charged(world) <= spent < shown["plan"]["epsilon_certified"]
    assert shown["epsilon_spent"] == shown["epsilon_charged"]
    assert world.budget()["delta_added"] == DELTA
    with world.still("success"):  # an end is an end: saying it again changes nothing
        world.end(run)


def test_a_finished_run_is_charged_what_is_certified(world: World) -> None:
    run = world.train()
    shown = world.get("ed", f"/v1/runs/{run}")
    assert shown["state"] == "finished"
    assert shown["epsilon_charged"] == charged(world) == shown["plan"]["epsilon_certified"] <= EPSILON
    with world.still("success"):
        world.post("ed", f"/v1/runs/{run}/stop")


def test_no_number_of_steps_costs_more_than_the_plan(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = world.get("ed", f"/v1/runs/{world.submit()}")["plan"]
    monkeypatch.setattr(costs, "accounts", lambda *_: {"prv": EPSILON + 0.01, "pld": EPSILON})
    assert costs.settle(plan, STEPS - 1) == (EPSILON, DELTA)
    assert costs.settle(plan, 0) == (0.0, 0.0)


def test_accounting_is_done_one_at_a_time_whatever_is_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = world.get("ed", f"/v1/runs/{world.submit()}")["plan"]
    computed = watched(monkeypatch, beside := [])
    asked = [costs.accounts, costs.replacing, costs.settle]
    with ThreadPoolExecutor(2 * len(asked)) as pool:
        list(pool.map(lambda each: asked[each % 3](plan, STEPS - 1 - each, f"caller {each}"), range(2 * len(asked))))
    assert sorted(computed) == ["accounts"] * 4 + ["replacing"] * 2
    assert max(beside) == 1


def test_a_look_at_a_run_is_a_look_up_and_says_no_less_than_it_is_charged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    run = world.submit()
    plan = world.get("ed", f"/v1/runs/{run}")["plan"]
    computed = watched(monkeypatch, [], lambda: None)
    looks = [costs.so_far(plan, steps) for steps in range(STEPS + plan["redo_steps"] + 1)]
    assert computed == ["step"]
    for steps, look in enumerate(looks):
        assert costs.settle(plan, steps)[0] <= look <= 1.5 * costs.settle(plan, steps)[0]


def test_nothing_is_accounted_for_within_a_transaction(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases, ends, resumed runs and models: whatever they cost is known before the database is locked."""
    turn, within = world.authority.core.database._turn, []
    computed = watched(monkeypatch, [], lambda: within.append(turn.locked()))
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 5)
    world.checkpoint(run, 5)
    world.commit(run, 5, 8)
    world.attempt(run)
    world.post("ed", f"/v1/runs/{run}/stop")
    world.end(run, "stopped")
    world.post("ed", f"/v1/runs/{run}/resume")
    world.train()
    assert {"plan", "step", "accounts", "replacing"} == set(computed)
    assert not any(within)


def watched(
    monkeypatch: pytest.MonkeyPatch, beside: list[int], also: Callable[[], None] = lambda: None
) -> list[str]:  # fmt: skip
    """What is computed from now on, for which nothing is remembered; into `beside` goes how many are at a time."""
    shared, computed, at_once = costs.accountant.shared, list[str](), list[str]()
    original = shared._computed

    def computing(name: str, arguments: tuple[float, ...]) -> Any:
        computed.append(name)
        at_once.append(name)
        beside.append(len(at_once))
        also()
        try:
            return original(name, arguments)
        finally:
            at_once.remove(name)

    monkeypatch.setattr(shared, "_remembered", {})
    monkeypatch.setattr(shared, "_computed", computing)
    return computed


# ---- people ----


def test_nobody_stops_anothers_run_but_the_operator(world: World) -> None:
    run = world.submit("ed")
    for name in ("eve", "olga", "rita", "carl", run):
        with world.still("denied"):
            world.refused(403, name, "POST", f"/v1/runs/{run}/stop")
    with world.recorded("operator", "run:stop"):
        assert world.post("operator", f"/v1/runs/{run}/stop")["state"] == "stopped"


def test_a_run_sees_itself_and_no_other(world: World) -> None:
    mine, other = world.submit(), world.submit()
    assert world.get(mine, f"/v1/runs/{mine}")["run"] == mine
    for path in (f"/v1/runs/{other}", "/v1/runs", "/v1/datasets/adult/versions/1", "/v1/models", "/v1/log"):
        world.refused(403, mine, "GET", path)


def test_a_row_shows_no_key(world: World) -> None:
    run = world.submit()
    lease = world.lease(run)
    assert lease.model_key is not None
    with world.authority.core.database.transaction() as connection:
        stored = repr(connection.execute(runs.select()).all()).encode()
    for secret in (lease.model_key, *lease.keys.values()):
        assert repr(secret).encode()[2:-1] not in stored
    assert "key" not in world.get("ed", f"/v1/runs/{run}")


def test_an_old_backup_does_not_give_the_budget_back(world: World, tmp_path: Path) -> None:
    """Clearing the ledger loses the data: a state from before a lease is refused as long as the keys are there."""
    backup = world.place.copy(tmp_path / "backup.db")
    run = world.submit()
    world.lease(run)
    world.commit(run)
    newest = world.place.copy(tmp_path / "newest.db")
    world.authority.close()
    Authority(world.directory, url=URL, database=newest.open()).close()  # as new as the keys remember
    with pytest.raises(IntegrityError, match="older than"):
        Authority(world.directory, url=URL, database=backup.open())
    newest.drop()
    backup.drop()
