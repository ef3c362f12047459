"""Workers die and start again: a left-over one goes on, one wants more than is paid for, one lies about its end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import select, update

from authority_world import (
    AUDIT,
    CODE,
    DELTA,
    EPSILON,
    HISTOGRAM,
    STEPS,
    Person,
    World,
    attempt_body,
    lease_body,
    training_spec,
)
from cloister.authority import ledger_seals
from cloister.authority.core import PLATFORM, Caller
from cloister.authority.costs import settle
from cloister.authority.ends import CERTAIN_S, UNSTARTED_S
from cloister.authority.maintenance import recorded_blobs
from cloister.canonical import b64, unb64
from cloister.errors import CloisterError, InputError, IntegrityError
from cloister.privacy import renyi
from cloister.privacy.plan import BLOCK_STEPS, PrivacyPlan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing import purposes
from cloister.sealing.envelope import checkpoint_key
from cloister.sealing.lease import OneTimeKey
from cloister.signing import run_end
from cloister.stores.tables import runs

TRAINING = training_spec()["training"]
LONG = 70
"""More steps than a block has."""


def shown(world: World, run: str) -> dict[str, Any]:
    return dict(world.get("ed", f"/v1/runs/{run}"))


def charged(world: World) -> float:
    return float(world.budget()["epsilon_added"])


def refused(world: World, run: str, path: str, body: Any, status: int = 409) -> str:
    """The kind of the error; nothing changes but the log."""
    before = world.content()
    kind = world.refused(status, run, "POST", f"/v1/runs/{run}/{path}", body)
    assert world.content() == before
    return kind


def block(attempt: int, first: int, last: int) -> dict[str, int]:
    return {"attempt": attempt, "first": first, "last": last}


def killed(world: World, committed: int = 8, at: int | None = 5, **spec: Any) -> str:
    """A run whose first attempt committed some steps, and kept a checkpoint before its last block."""
    run = world.submit(**spec)
    world.lease(run)
    if at:
        world.commit(run, 0, at)
        world.checkpoint(run, at)
    world.commit(run, at or 0, committed)
    return run


# ---- opening ----


def test_the_first_attempt_begins_at_nothing(world: World) -> None:
    run = world.submit()
    with world.recorded(run, "run:work"):
        opened = world.attempt(run)
    assert (opened["attempt"], opened["resume_from"], opened["checkpoint"]) == (1, 0, None)
    assert (shown(world, run)["state"], shown(world, run)["workers"]) == ("training", 2)
    assert charged(world) == EPSILON  # a first attempt costs nothing that is not held


def test_an_attempt_says_what_its_leases_say_and_gives_no_key(world: World) -> None:
    run = world.submit()
    opened = world.attempt(run)
    lease = world.lease(run)
    facts = {"manifest": lease.manifest, "owner_key": lease.owner_key, "spec": lease.spec, "plan": lease.plan}
    assert opened == {"attempt": 1, "resume_from": 0, "checkpoint": None} | facts
    text = json.dumps(opened)
    assert not any(b64(key) in text for key in (*lease.keys.values(), lease.checkpoint_key, lease.model_key or b"-"))


def test_the_next_attempt_goes_on_from_the_checkpoint(world: World) -> None:
    run = killed(world)
    opened = world.attempt(run)
    assert (opened["attempt"], opened["resume_from"], opened["checkpoint"]["step"]) == (2, 5, 5)
    now = shown(world, run)
    assert (now["attempt"], now["resumed_from"], now["checkpoint"], now["steps_committed"]) == (2, 5, 5, 8)
    refused(world, run, "blocks", block(2, 8, 10))  # it is not where the first attempt was
    world.commit(run, 5, STEPS)
    assert shown(world, run)["steps_committed"] == 8 + 5


def test_without_a_checkpoint_everything_is_run_again(world: World) -> None:
    run = killed(world, at=None)
    opened = world.attempt(run)
    assert (opened["attempt"], opened["resume_from"], opened["checkpoint"]) == (2, 0, None)
    refused(world, run, "blocks", block(2, 8, 10))


def test_an_attempt_that_is_over_gets_nothing_more(world: World) -> None:
    run = killed(world)
    world.attempt(run)
    for path, body in (
        ("leases", lease_body(1, attempt=1)),
        ("blocks", block(1, 8, 10)),
        ("blocks", block(1, 5, 10)),
        ("checkpoints", world.checkpoint_body(run, 5) | {"attempt": 1}),
        ("progress", {"attempt": 1, "steps_done": 5, "rows_per_s": 1.0}),
        ("leases", lease_body(1, attempt=3)),
        ("blocks", block(3, 5, 10)),
    ):
        assert refused(world, run, path, body) == "ConflictError"
    assert shown(world, run)["steps_committed"] == 8  # what it committed stays


@pytest.mark.parametrize(("workers", "status"), [(0, 400), (1, 400), (3, 400), (4097, 400)])
def test_an_attempt_with_other_workers_than_the_spec_allows_is_refused(world: World, workers: int, status: int) -> None:
    run = world.submit()
    assert refused(world, run, "attempts", attempt_body(workers), status) == "InputError"


def test_an_attempt_with_fewer_workers_shares_all_the_data(world: World) -> None:
    run = world.submit(resources={"workers": 2, "min_workers": 1, "region": "eu"})
    shares = {name for rank in (0, 1) for name in world.lease(run, rank).keys}
    world.attempt(run, 1)
    assert set(world.lease(run).keys) == shares
    assert refused(world, run, "leases", lease_body(1, attempt=2), 400) == "InputError"


def test_more_workers_at_least_than_at_most_is_no_spec() -> None:
    with pytest.raises(InputError, match="min_workers"):
        TrainingSpec.parse(training_spec(resources={"workers": 1, "min_workers": 2, "region": "eu"}))


def test_an_attempt_on_other_code_is_refused(world: World) -> None:
    run = world.submit()
    assert refused(world, run, "attempts", attempt_body(code="sha256:" + "0" * 64), 403) == "PermissionDeniedError"


def test_nobody_opens_anothers_attempt(world: World) -> None:
    run, other = world.submit(), world.submit()
    for name in ("ed", "olga", "operator", other):
        with world.still("denied"):
            world.refused(403, name, "POST", f"/v1/runs/{run}/attempts", attempt_body())


def test_of_many_attempts_at_once_one_is_open(world: World) -> None:
    run = world.submit()
    caller = world.caller(run)

    def opened(_: int) -> int:
        return int(world.authority.attempts.open(caller, run, 2, CODE)["attempt"])

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(opened, range(4))) == [1, 2, 3, 4]
    assert refused(world, run, "blocks", block(3, 0, 1)) == "ConflictError"
    world.attempts[run] = 4
    world.commit(run, 0, 1)


# ---- leases ----


def test_a_rank_gets_its_keys_once_an_attempt(world: World) -> None:
    run = world.submit()
    first = world.lease(run)
    refused(world, run, "leases", lease_body())
    world.attempt(run)
    again = world.lease(run)
    refused(world, run, "leases", lease_body(attempt=2))
    assert (again.keys, again.model_key) == (first.keys, first.model_key)


def test_every_rank_gets_the_key_of_checkpoints_and_only_the_first_the_models(world: World) -> None:
    run = world.submit()
    first, second = world.lease(run, 0), world.lease(run, 1)
    assert first.model_key is not None
    assert second.model_key is None
    assert first.checkpoint_key == second.checkpoint_key == checkpoint_key(first.model_key) != first.model_key
    assert first.checkpoint_context["run"] == run
    assert first.checkpoint_context != first.seal_context


def test_a_lease_of_one_attempt_does_not_open_as_another(world: World) -> None:
    run, key = world.submit(), OneTimeKey.generate()
    world.attempt(run)
    answer = world.post(run, f"/v1/runs/{run}/leases", lease_body(key=key.public))
    for info in (purposes.training_lease(run, 2, 0), purposes.training_lease(run, 1, 1)):
        with pytest.raises(IntegrityError):
            key.open(unb64(answer["sealed"]), info)
    assert key.open(unb64(answer["sealed"]), purposes.training_lease(run, 1, 0))


@pytest.mark.parametrize("column", ["epsilon_charged", "delta_charged"])
def test_no_key_leaves_for_more_than_is_held(world: World, column: str) -> None:
    run = world.submit()
    world.attempt(run)
    with world.authority.core.of_itself("ledger:seal") as act, ledger_seals.changing(act, world.ledger()):
        act.connection.execute(update(runs).where(runs.c.id == run).values({column: 1e-6}))
        act.resource = PLATFORM
    assert refused(world, run, "leases", lease_body()) == "BudgetError"


# ---- checkpoints ----


def test_a_checkpoint_is_of_the_steps_that_are_committed(world: World) -> None:
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 5)
    for step in (0, 4, 6, 10):
        assert refused(world, run, "checkpoints", world.checkpoint_body(run, step)) == "ConflictError"
    with world.recorded(run, "run:work"):
        world.checkpoint(run, 5)
    world.commit(run, 5, 8)
    world.checkpoint(run, 8)
    assert shown(world, run)["checkpoint"] == 8  # the newest only


@pytest.mark.parametrize(
    "blob", ["models/x/checkpoints/1", "models/{run}/1", "datasets/adult/1", "models/{run}/checkpoints/../1"]
)
def test_a_checkpoint_lies_in_the_runs_own_folder(world: World, blob: str) -> None:
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 5)
    body = world.checkpoint_body(run, 5) | {"blob": blob.format(run=run)}
    assert refused(world, run, "checkpoints", body, 400) == "InputError"


def test_a_checkpoint_is_backed_up_until_the_model_is_there(world: World) -> None:
    run = world.submit()
    lease = world.lease(run)
    world.commit(run)
    world.checkpoint(run, STEPS)

    def kept() -> list[str]:
        with world.authority.core.database.reading() as connection:
            return [blob.path for blob in recorded_blobs(connection) if "/checkpoints/" in blob.path]

    assert kept() == [f"models/{run}/checkpoints/{STEPS}.sealed"]
    world.post(run, f"/v1/runs/{run}/model", world.model_body(run, lease))
    assert kept() == []
    assert shown(world, run)["checkpoint"] is None


def test_progress_is_within_the_attempt(world: World) -> None:
    run = killed(world)
    world.attempt(run)
    for steps in (4, 6, 8):
        body = {"attempt": 2, "steps_done": steps, "rows_per_s": 1.0}
        assert refused(world, run, "progress", body, 400) == "InputError"
    world.post(run, f"/v1/runs/{run}/progress", {"attempt": 2, "steps_done": 5, "rows_per_s": 1.0})


# ---- what it costs ----


def test_a_plan_says_what_it_costs_at_most_and_that_is_what_is_approved(world: World) -> None:
    plan = world.post("ed", "/v1/plans", {"spec": training_spec()})["plan"]
    assert plan["redo_steps"] == 3 * STEPS  # three retries, each of all there is, since that is less than a block
    assert plan["epsilon_at_most"] == settle(plan, STEPS + plan["redo_steps"])[0] > plan["epsilon"]
    workload = Person("new", ["run"])
    body = {"spec": training_spec(), "code_digest": CODE, "public_key": workload.public}
    request = world.missing(world.ask("ed", "POST", "/v1/runs", body))
    assert request["details"]["epsilon_at_most"] == plan["epsilon_at_most"]


def test_a_plan_of_before_there_were_retries_is_one_without() -> None:
    old = {
        "epsilon": 3.0, "delta": 1e-5, "epsilon_certified": 2.9, "noise_multiplier": 1.0, "max_grad_norm": 1.0,
        "sample_rate": 0.1, "steps": 10, "rows": 100, "rows_per_unit": 1,
    }  # fmt: skip
    plan = PrivacyPlan.from_dict(old)
    assert (plan.redo_steps, plan.epsilon_at_most) == (0, 3.0)
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan


def test_steps_that_are_run_again_are_charged_again(world: World) -> None:
    run = killed(world)
    plan = shown(world, run)["plan"]
    world.attempt(run)
    again = settle(plan, 8 + 5)[0]
    assert EPSILON < again < plan["epsilon_at_most"]
    assert charged(world) == again  # before any key is given out
    lease = world.lease(run)
    world.commit(run, 5, STEPS)
    world.post(run, f"/v1/runs/{run}/model", world.model_body(run, lease))
    assert shown(world, run)["epsilon_charged"] == charged(world) == again
    provenance = world.get("ed", "/v1/models/adult/versions/1")["provenance"]
    privacy = json.loads(unb64(provenance["payload"]))["predicate"]["privacy"]
    assert (privacy["epsilon"], privacy["delta"], privacy["attempts"]) == (again, DELTA, 2)
    assert (privacy["steps"], privacy["redone_steps"]) == (13, 3)


def test_a_budget_that_cannot_pay_for_the_redo_ends_the_run_and_keeps_its_checkpoint(world: World) -> None:
    world.set_budget(EPSILON)
    run = killed(world)
    assert world.refused(409, run, "POST", f"/v1/runs/{run}/attempts", attempt_body()) == "BudgetError"
    entry = world.log()[-1]
    assert (entry.actor, entry.action, entry.outcome, entry.details["attempt"]) == (run, "run:work", "failure", 2)
    now = shown(world, run)
    assert (now["state"], now["error"]["kind"], now["checkpoint"], now["attempt"]) == ("failed", "BudgetError", 5, 1)
    assert charged(world) == EPSILON
    refused(world, run, "blocks", block(1, 8, 10))
    refused(world, run, "attempts", attempt_body())
    world.end(run)
    assert charged(world) == settle(now["plan"], 8)[0] < EPSILON
    with world.still():  # what is left does not pay for what would be run again
        assert world.refused(409, "ed", "POST", f"/v1/runs/{run}/resume") == "BudgetError"
    world.set_budget(10.0)
    world.post("ed", f"/v1/runs/{run}/resume")
    assert world.attempt(run)["resume_from"] == 5


def test_more_steps_than_were_approved_are_not_run_again(world: World) -> None:
    """The budget would pay; a reviewer has seen less."""
    run = world.submit(training=TRAINING | {"epochs": 14, "retries": 1})
    plan = shown(world, run)["plan"]
    assert (plan["steps"], plan["redo_steps"]) == (LONG, BLOCK_STEPS)
    world.lease(run)
    world.commit(run, 0, LONG)  # more than a block at once, and no checkpoint
    assert world.refused(409, run, "POST", f"/v1/runs/{run}/attempts", attempt_body()) == "BudgetError"
    assert shown(world, run)["state"] == "failed"
    assert charged(world) == EPSILON < plan["epsilon_at_most"] < 10.0


def test_attempts_are_bounded(world: World) -> None:
    run = world.submit()
    for number in (1, 2, 3, 4):  # the first, and three retries
        assert world.attempt(run)["attempt"] == number
    assert world.refused(409, run, "POST", f"/v1/runs/{run}/attempts", attempt_body()) == "ConflictError"
    now = shown(world, run)
    assert (now["state"], now["error"]["kind"], now["attempt"]) == ("failed", "ConflictError", 4)


def test_a_run_on_data_that_was_destroyed_opens_no_attempt(world: World) -> None:
    run = world.submit()
    world.register("second-officer", ["security-officer"])
    path = "/v1/datasets/adult/versions/1/key-destruction"
    request = world.missing(world.ask("olga", "POST", path, {}))
    for officer in ("sofia", "second-officer"):
        world.vote(officer, request)
    world.post("olga", path)
    with world.still():
        assert world.refused(409, run, "POST", f"/v1/runs/{run}/attempts", attempt_body()) == "ConflictError"


# ---- the end ----


def forged(world: World, run: str, which: str) -> dict[str, Any]:
    other = world.submit(name="other")
    match which:
        case "by another key":
            return world.end_body(run, key=Person("x", []).key)
        case "by its author":
            return world.end_body(run, key=world.people["ed"].key)
        case "by another run":
            return world.end_body(run, key=world.people[other].key)
        case "about another run":
            return world.end_body(run, run=other)
        case "about another plan":
            return world.end_body(run, plan=shown(world, run)["plan"] | {"steps": 5})
        case "with another outcome":
            return world.end_body(run, outcome="finished")
        case "with a negative step":
            return world.end_body(run, steps_done=-1)
        case "with more said":
            return world.end_body(run, refund=1.0)
        case "of another kind":
            body = world.end_body(run)
            return body | {"envelope": body["envelope"] | {"payloadType": "text/plain"}}
        case _:
            raise AssertionError(which)


@pytest.mark.parametrize(
    "which",
    ["by another key", "by its author", "by another run", "about another run", "about another plan",
     "with another outcome", "with a negative step", "with more said", "of another kind"],
)  # fmt: skip
def test_only_the_runs_own_word_gives_anything_back(world: World, which: str) -> None:
    run = killed(world)
    body = forged(world, run, which)
    held = charged(world)
    assert refused(world, run, "end", body, 422) == "IntegrityError"
    assert (charged(world), shown(world, run)["state"]) == (held, "training")


def test_a_worker_of_an_older_attempt_cannot_end_the_run(world: World) -> None:
    run = killed(world)
    old = world.end_body(run)
    world.attempt(run)
    assert refused(world, run, "end", old) == "ConflictError"
    world.commit(run, 5, 6)


def test_the_ledger_decides_what_is_given_back_and_not_the_statement(world: World) -> None:
    run = killed(world)
    plan = shown(world, run)["plan"]
    world.post(run, f"/v1/runs/{run}/end", world.end_body(run, steps_done=0))
    assert charged(world) == settle(plan, 8)[0] > 0


def test_who_stops_a_run_gets_nothing_back_until_the_run_has_said_so(world: World) -> None:
    run = killed(world)
    with world.recorded("ed", "run:stop"):
        world.post("ed", f"/v1/runs/{run}/stop")
    now = shown(world, run)
    assert (now["state"], now["settled"], now["end"], charged(world)) == ("stopped", False, None, EPSILON)
    for path, body in (("attempts", attempt_body()), ("leases", lease_body(1)), ("blocks", block(1, 8, 9))):
        refused(world, run, path, body)
    world.end(run, "failed")  # whatever it says, a person has stopped it
    now = shown(world, run)
    assert (now["state"], now["settled"], now["error"]) == ("stopped", True, None)
    assert charged(world) == settle(now["plan"], 8)[0]


def test_the_signed_end_is_kept_for_whoever_asks(world: World) -> None:
    run = killed(world)
    said = world.end_body(run)
    world.post(run, f"/v1/runs/{run}/end", said)
    kept = shown(world, run)
    known = run_end.verify(kept["end"], world.people[run].public.encode(), run=run, plan=kept["plan"])
    assert (known.attempt, known.outcome) == (1, "failed")
    with world.still("success"):  # saying it again changes nothing
        world.post(run, f"/v1/runs/{run}/end", world.end_body(run, "stopped"))


def test_a_run_that_never_began_gives_back_everything_once_it_says_so(world: World) -> None:
    run = world.submit()
    world.end(run, "stopped")
    assert (charged(world), world.budget()["delta_added"]) == (0.0, 0.0)


def test_a_lost_submission_holds_nothing_once_anybody_stops_it(world: World) -> None:
    run = world.submit()
    with world.recorded("operator", "run:stop"):  # whoever submitted it is gone, and the run's key with them
        now = world.post("operator", f"/v1/runs/{run}/stop")
    assert (now["state"], now["settled"], now["epsilon_charged"]) == ("stopped", True, 0.0)
    assert (charged(world), world.budget()["delta_added"]) == (0.0, 0.0)
    assert refused(world, run, "attempts", attempt_body()) == "ConflictError"
    with world.still():
        assert world.refused(409, "ed", "POST", f"/v1/runs/{run}/resume") == "ConflictError"
    with world.still("success"):
        world.end(run)


@pytest.mark.parametrize("begun", ["opened", "leased"])
def test_a_run_that_began_and_committed_nothing_holds_all_until_it_says_so(world: World, begun: str) -> None:
    run = world.submit()
    world.attempt(run) if begun == "opened" else world.lease(run)
    world.post("operator", f"/v1/runs/{run}/stop")
    assert (shown(world, run)["settled"], charged(world)) == (False, EPSILON)
    after_a_week(world)
    assert (shown(world, run)["settled"], charged(world)) == (False, EPSILON)


def test_a_run_is_stopped_also_where_its_ledger_was_edited(world: World) -> None:
    run = world.submit()
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(epsilon_charged=2.0))
    with world.recorded("ed", "run:stop"):
        world.post("ed", f"/v1/runs/{run}/stop")
    assert (shown(world, run)["state"], charged(world)) == ("stopped", 2.0)
    assert refused(world, run, "attempts", attempt_body()) == "ConflictError"


def test_of_an_attempt_and_a_stop_at_once_exactly_one_wins(world: World) -> None:
    world.set_budget(100.0, 1e-3)
    ed, stopped_first = world.caller("ed"), 0
    for number in range(12):
        run = world.submit()
        caller, barrier = world.caller(run), Barrier(2)

        def opened(run: str = run, caller: Caller = caller, barrier: Barrier = barrier) -> bool:
            barrier.wait()
            try:
                world.authority.attempts.open(caller, run, 2, CODE)
            except CloisterError:
                return False
            return True

        def stopped(run: str = run, barrier: Barrier = barrier, late: float = number % 3 / 100) -> bool:
            barrier.wait()
            time.sleep(late)
            return bool(world.authority.ends.stop(ed, run)["settled"])

        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(opened), pool.submit(stopped)]
            has_begun, is_settled = [each.result() for each in both]
        assert has_begun != is_settled
        now = shown(world, run)
        assert (now["state"], now["epsilon_charged"]) == ("stopped", 0.0 if is_settled else EPSILON)
        stopped_first += is_settled
    assert charged(world) == EPSILON * (12 - stopped_first)


def test_submitting_resuming_and_settling_lock_each_other_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any order of them: what is charged is the sum of what each was told, and within the budget."""
    costly = (math.inf,) * len(renyi.ORDERS)  # no filter lets more pass than what adds up
    monkeypatch.setattr("cloister.authority.ledger.curve", lambda *_: costly)
    world.set_budget(100.0, 1e-3)
    ends, failed = world.authority.ends, killed(world)
    world.end(failed)
    plan = shown(world, failed)["plan"]
    ended, resumed, after_three = (settle(plan, steps)[0] for steps in (8, 13, 3))
    ed, before = world.caller("ed"), 0.0
    for each in range(4):
        training = killed(world, committed=3, at=None)
        caller, said = world.caller(training), world.end_body(training)
        bodies = [submission(world, f"model-{each}-{number}") for number in range(2)]
        # Once the run that trains is settled, there is room for another, or for the one that goes on: not for both.
        budget = before + ended + after_three + EPSILON + 0.01
        world.set_budget(budget, 1e-3)

        def submit(body: dict[str, Any]) -> str:
            return str(world.authority.runs.submit(ed, body["spec"], body["code_digest"], body["public_key"])["run"])

        def resume(late: float) -> None:
            time.sleep(late)
            ends.resume(ed, failed)

        acts: list[Callable[[], Any]] = [partial(submit, body) for body in bodies]
        acts += [partial(resume, (3 - each) / 40)] * 2  # who is first differs
        acts += [partial(ends.end, caller, training, said["envelope"], None)] * 2
        barrier = Barrier(len(acts))

        def done(act: Callable[[], Any], barrier: Barrier = barrier) -> bool:
            barrier.wait()
            try:
                act()
            except CloisterError:
                return False
            return True

        with ThreadPoolExecutor(len(acts)) as pool:
            answers = list(pool.map(done, acts))
        submits, resumes, settles = (answers[start : start + 2] for start in (0, 2, 4))
        assert (settles, sum(submits) + sum(resumes) <= 1) == ([True, True], True)
        before += after_three + EPSILON * sum(submits)
        assert charged(world) == pytest.approx(before + (resumed if any(resumes) else ended))
        assert charged(world) <= budget
        world.set_budget(100.0, 1e-3)  # which asks for the ledger's seal
        if any(resumes):
            world.attempt(failed)
            world.commit(failed, 5, 10)
            break


def submission(world: World, name: str) -> dict[str, Any]:
    """A run that is approved, to be submitted."""
    body = {"spec": training_spec(name=name), "code_digest": CODE, "public_key": Person("new", []).public}
    assert world.vote("rita", world.missing(world.ask("ed", "POST", "/v1/runs", body))).status_code == 200
    return body


def after_a_week(world: World) -> list[str]:
    """What the authority ends by itself once it has known for an hour that the week is over."""
    ends, now = world.authority.ends, time.monotonic()
    world.clock.offset = UNSTARTED_S + 60
    try:
        with pytest.MonkeyPatch.context() as patched:
            ends.expire()
            patched.setattr(ends, "_steady", lambda: now + CERTAIN_S + 60)
            return ends.expire()
    finally:
        world.clock.offset = 0.0


def test_a_run_that_does_not_begin_within_a_week_is_ended_and_charged_nothing(world: World) -> None:
    lost, begun, stopped = world.submit(), world.submit(), world.submit()
    world.attempt(begun)
    world.post("ed", f"/v1/runs/{stopped}/stop")
    held = charged(world)
    size = len(world.log())
    assert after_a_week(world) == [lost]
    (entry,) = world.log()[size:]
    assert (entry.actor, entry.action, entry.resource, entry.rule) == (
        "authority",
        "run:expire",
        f"Run/{lost}",
        "itself",
    )
    assert (entry.details["epsilon_charged"], entry.details["steps"]) == (0.0, 0)
    now = shown(world, lost)
    assert (now["state"], now["settled"], now["epsilon_charged"]) == ("failed", True, 0.0)
    assert "within a week" in now["error"]["error"]
    assert charged(world) == held - EPSILON
    assert refused(world, lost, "attempts", attempt_body()) == "ConflictError"
    with world.still(None, 0):
        assert after_a_week(world) == []


def test_the_schedule_ends_what_never_began_whatever_else_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(world.authority.ends, "expire", lambda: asked.append("expire"))
    monkeypatch.setattr(world.authority.lifecycle, "expire_due", lambda: 1 / 0)
    monkeypatch.setattr(world.authority.shredding, "settle", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.authority.retention.once()
    assert asked == ["expire"]


def test_no_step_of_the_clock_ends_a_run_that_is_about_to_begin(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ends, now = world.submit(), world.authority.ends, time.monotonic()
    day = 24 * 3600.0
    for hours, step in enumerate((day, UNSTARTED_S + day, 0.0, -day, UNSTARTED_S + day, day, UNSTARTED_S + day)):
        world.clock.offset = step
        monkeypatch.setattr(ends, "_steady", lambda hours=hours: now + 3600.0 * hours)
        assert ends.expire() == []
    world.clock.offset = 0.0
    assert world.attempt(run)["attempt"] == 1


def test_a_run_that_begins_while_it_is_looked_at_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run, core = world.submit(), world.authority.core
    caller, of_itself = world.caller(run), core.of_itself

    def late(action: str) -> Any:
        world.authority.attempts.open(caller, run, 2, CODE)
        return of_itself(action)

    monkeypatch.setattr(core, "of_itself", late)
    assert after_a_week(world) == []
    now = shown(world, run)
    assert (now["state"], now["attempt"], now["epsilon_charged"]) == ("training", 1, EPSILON)
    assert not [entry for entry in world.log() if entry.action == "run:expire"]


def test_what_is_made_for_training_is_what_the_authority_takes(world: World) -> None:
    run = killed(world)
    end = run_end.RunEnd(run=run, attempt=1, outcome="stopped", steps_done=8)
    envelope = run_end.make(end, shown(world, run)["plan"], world.people[run].key)
    assert world.post(run, f"/v1/runs/{run}/end", {"envelope": envelope})["state"] == "stopped"
    for wrong in ({"attempt": -1}, {"outcome": "finished"}, {"steps_done": True}):
        with pytest.raises(InputError):
            run_end.RunEnd(**{"run": run, "attempt": 1, "outcome": "failed", "steps_done": 0} | wrong)  # type: ignore[arg-type]


# ---- going on ----


def test_a_run_that_failed_goes_on_to_its_model(world: World) -> None:
    run = killed(world)
    world.end(run)
    plan = shown(world, run)["plan"]
    with world.recorded("ed", "train:submit"):
        world.post("ed", f"/v1/runs/{run}/resume")
    now = shown(world, run)
    assert (now["state"], now["settled"], now["end"], now["error"]) == ("training", False, None, None)
    assert charged(world) == settle(plan, 13)[0]
    # Nobody of before goes on by it: another attempt has to be opened.
    for path, body in (("leases", lease_body(1)), ("blocks", block(1, 5, 9)), ("blocks", block(1, 8, 9))):
        refused(world, run, path, body)
    refused(world, run, "model", {"manifest": "e30=", "model_sha256": "0" * 64, "blob": f"models/{run}/x",
                                  "blob_sha256": "0" * 64, "evaluation": HISTOGRAM, "audit": AUDIT})  # fmt: skip
    assert world.attempt(run)["resume_from"] == 5
    lease = world.lease(run)
    world.commit(run, 5, STEPS)
    world.post(run, f"/v1/runs/{run}/model", world.model_body(run, lease))
    assert shown(world, run)["state"] == "finished"


def test_only_its_author_lets_a_run_go_on(world: World) -> None:
    run = killed(world)
    world.end(run)
    for name in ("eve", "olga", "rita", "operator", run):
        with world.still("denied"):
            assert world.refused(403, name, "POST", f"/v1/runs/{run}/resume") == "PermissionDeniedError"


def test_a_run_goes_on_only_from_a_checkpoint_after_its_signed_end(world: World) -> None:
    trains = killed(world)
    without = killed(world, at=None)
    world.end(without)
    stopped = killed(world)
    world.post("ed", f"/v1/runs/{stopped}/stop")
    world.set_budget(20.0)
    spent = killed(world, at=STEPS - 1, committed=STEPS)
    for _ in range(3):
        world.attempt(spent)
    world.end(spent)
    for run in (trains, without, stopped, spent):
        with world.still():
            assert world.refused(409, "ed", "POST", f"/v1/runs/{run}/resume") == "ConflictError"
    finished = world.train()
    with world.still():
        assert world.refused(409, "ed", "POST", f"/v1/runs/{finished}/resume") == "ConflictError"


def test_a_plan_that_was_changed_meanwhile_is_not_gone_on_with(world: World) -> None:
    """The plan of a run that is settled is under no seal of the ledger; the run has signed it."""
    run = killed(world)
    world.end(run)
    with world.authority.core.database.transaction() as connection:
        plan = connection.execute(select(runs.c.plan).where(runs.c.id == run)).scalar_one()
        connection.execute(update(runs).where(runs.c.id == run).values(plan=plan | {"noise_multiplier": 0.0}))
    with world.still():
        assert world.refused(422, "ed", "POST", f"/v1/runs/{run}/resume") == "IntegrityError"


def test_resuming_needs_what_training_needs(world: World) -> None:
    run = killed(world)
    world.end(run)
    world.set_budget(charged(world), 1e-4)
    with world.still("denied"):  # nothing is left at all: policy says so
        assert world.refused(403, "ed", "POST", f"/v1/runs/{run}/resume") == "PermissionDeniedError"


def test_a_run_that_goes_on_is_resumed_once(world: World) -> None:
    run = killed(world)
    world.end(run)
    ed = world.caller("ed")

    def resume(_: int) -> bool:
        try:
            world.authority.ends.resume(ed, run)
        except CloisterError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(resume, range(4))) == 1
