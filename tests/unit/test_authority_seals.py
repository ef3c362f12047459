"""Somebody who can write the database clears, edits or puts back a ledger: no key leaves, and it is found."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, select, update

from authority_world import CODE, Person, World, attempt_body, lease_body, training_spec
from cloister.authority import fsck
from cloister.authority.fsck import Finding
from cloister.authority.ledger_log import LedgerLog
from cloister.authority.ledger_seals import require_whole
from cloister.authority.maintenance import Parts
from cloister.errors import IntegrityError
from cloister.signing import run_end
from cloister.stores.blobs import Stores
from cloister.stores.keys import EmbeddedKeys
from cloister.stores.tables import budgets, ledger_seals, runs


def findings(world: World) -> list[Finding]:
    """What fsck says of the ledger of `adult` beyond notes."""
    here = world.directory
    parts = Parts.of(here, EmbeddedKeys(here / "keys"), Stores({}, here / "blobs"), clock=world.clock)
    report = fsck.check(parts, world.authority.core.database, world.caller("operator"))
    return [each for each in report.findings if each.subject == "ledger of adult" and each.kind == "broken"]


def half_trained(world: World) -> str:
    """A run with five steps on record, beside another one."""
    world.submit(name="another")
    run = world.submit()
    world.attempt(run)
    world.commit(run, 0, 5)
    return run


def edit(world: World, how: str, run: str) -> None:
    mine = ledger_seals.c.ledger == world.ledger()
    changes: dict[str, Any] = {
        "budget raised": update(budgets).values(epsilon=99.0),
        "budget cleared": delete(budgets),
        "charge cleared": update(runs).where(runs.c.id == run).values(epsilon_charged=3.0000001),
        "steps cleared": update(runs).where(runs.c.id == run).values(steps_committed=0),
        "another run cleared": delete(runs).where(runs.c.id != run),
        "seal cleared": delete(ledger_seals),
        "seal unset": update(ledger_seals).where(mine).values(counter=0, seal=b""),
        "number changed": update(ledger_seals).where(mine).values(counter=ledger_seals.c.counter + 1),
        "steps said to be undone": update(runs).where(runs.c.id == run).values(position=0),
        "settled": update(runs).where(runs.c.id == run).values(settled=True),
    }
    with world.authority.core.database.transaction() as connection:
        connection.execute(changes[how])


EDITS = ["budget raised", "budget cleared", "charge cleared", "steps cleared", "another run cleared", "seal cleared",
         "seal unset", "number changed", "steps said to be undone", "settled"]  # fmt: skip


@pytest.mark.parametrize("how", EDITS)
def test_no_key_leaves_for_a_ledger_that_was_edited(world: World, how: str) -> None:
    run = half_trained(world)
    edit(world, how, run)
    first = 0 if how == "steps said to be undone" else 5
    refusal = "ConflictError" if how == "settled" else "IntegrityError"  # nobody trains on after that
    before = world.content()
    answer = world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body())
    assert answer.json().get("kind") == refusal, answer.text
    assert "sealed" not in answer.json()
    assert world.content() == before
    answer = world.ask(run, "POST", f"/v1/runs/{run}/blocks", {"attempt": 1, "first": first, "last": 10})
    assert answer.json().get("kind") == refusal, answer.text  # nor is it sealed anew as it is
    assert world.content() == before


@pytest.mark.parametrize("how", EDITS)
def test_fsck_names_a_ledger_that_was_edited(world: World, how: str) -> None:
    run = half_trained(world)
    assert findings(world) == []
    edit(world, how, run)
    assert len(findings(world)) == 1


def test_a_ledger_that_is_put_back_with_its_seal_buys_nothing_twice(world: World) -> None:
    with world.authority.core.database.reading() as connection:
        then = connection.execute(select(ledger_seals)).one()
    world.train()
    waiting = world.submit()
    world.attempt(waiting)
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(runs).where(runs.c.id != waiting).values(ledger="gone"))
        connection.execute(delete(runs).where(runs.c.id == waiting))
        connection.execute(update(ledger_seals).values(counter=then.counter, seal=then.seal))
    assert len(findings(world)) == 1
    body = {"spec": training_spec(), "code_digest": CODE, "public_key": Person("new", ["run"]).public}
    for _ in range(2):
        answer = world.ask("ed", "POST", "/v1/runs", body)
        assert answer.json().get("kind") in ("IntegrityError", "ApprovalMissingError"), answer.text
        if answer.json()["kind"] == "ApprovalMissingError":
            world.vote("rita", world.missing(answer))
    assert answer.json()["kind"] == "IntegrityError"
    other = world.another()
    try:
        with pytest.raises(IntegrityError), other.core.of_itself("ledger:seal") as act:
            require_whole(act, world.ledger())  # which has just started
    finally:
        other.close()


def test_a_settled_run_that_is_opened_again_by_hand_gets_no_key(world: World) -> None:
    """Its plan is under no seal any more: one without noise could be put in its place."""
    run = world.submit()
    lease = world.lease(run)
    world.commit(run, 0, 5)
    model = world.model_body(run, lease, b"small")
    plan = world.get(run, f"/v1/runs/{run}")["plan"]
    said = run_end.RunEnd(run=run, attempt=1, outcome="failed", steps_done=5)
    world.post(run, f"/v1/runs/{run}/end", {"envelope": run_end.make(said, plan, world.people[run].key)})
    forged = plan | {"noise_multiplier": 0.0, "epsilon_certified": 1e-9, "steps": 9999, "redo_steps": 9999}
    open_again = {"plan": forged, "state": "training", "world_size": 2, "position": 5}
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(**open_again))
    for path, body in (
        ("attempts", attempt_body()),
        ("leases", lease_body() | {"rank": 1}),
        ("blocks", {"attempt": 1, "first": 5, "last": 10}),
        ("checkpoints", {"attempt": 1, "step": 5, "blob": f"models/{run}/checkpoints/1", "sha256": "0" * 64}),
    ):
        assert world.refused(409, run, "POST", f"/v1/runs/{run}/{path}", body) == "ConflictError"
    with world.authority.core.database.transaction() as connection:  # as if these had been all of its steps
        values = open_again | {"plan": forged | {"steps": 5}}
        connection.execute(update(runs).where(runs.c.id == run).values(**values))
    assert world.refused(409, run, "POST", f"/v1/runs/{run}/model", model) == "ConflictError"
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(settled=False))
    assert world.ask(run, "POST", f"/v1/runs/{run}/attempts", attempt_body()).status_code == 422


def test_two_changes_of_one_number_stay_in_the_log_for_good() -> None:
    log = LedgerLog()
    for number in (1, 2, 3, 2, 3, 4):
        log.tell("adult", number)
    assert log.disagrees("adult", 4) == "was put back and changed again"
    assert log.disagrees("other", 0) == ""


def test_fsck_finds_a_ledger_that_was_put_back_with_its_seal(world: World) -> None:
    run = world.submit()
    world.attempt(run)
    with world.authority.core.database.reading() as connection:
        seal = connection.execute(select(ledger_seals)).one()
        row = connection.execute(select(runs).where(runs.c.id == run)).one()
    world.commit(run, 0, 5)
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(ledger_seals).values(counter=seal.counter, seal=seal.seal))
        connection.execute(update(runs).where(runs.c.id == run).values(steps_committed=row.steps_committed))
    assert len(findings(world)) == 1
