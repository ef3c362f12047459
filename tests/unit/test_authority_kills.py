"""1,000 workers die at random instants: what was seen is charged, and at most a block a death that was not seen.

Over the real authority on SQLite. A worker here is only its calls, in their order, and a count of the steps whose noise
it has released; it is killed before or after any of them, also after the authority did what it asked and before it
heard so. A left-over worker of the attempt before goes on meanwhile. The count is the test's own, not the ledger's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from authority_world import CODE, World, training_spec
from cloister.authority import ledger_seals
from cloister.authority.core import Caller
from cloister.authority.costs import settle
from cloister.errors import BudgetError, ConflictError
from cloister.sealing.lease import OneTimeKey
from cloister.stores.tables import runs
from databases import Place

KILLS = 1_000
RETRIES = 20
EPSILON = 0.3
PLANS = ((2, 5), (4, 10))
"""Epochs, of 5 steps each, and steps a block: few distinct totals, since accounting for each takes a core."""
INSTANTS = (
    "before the attempt", "after the attempt", "after a lease", "before the commit", "after the commit",
    "after a release", "before the checkpoint", "after the checkpoint",
)  # fmt: skip


class KilledError(Exception):
    """The worker is gone."""


@dataclass
class Worker:
    """Of one run; `dice` decides at which of its instants it dies."""

    world: World
    run: str
    block: int
    dice: random.Random
    caller: Caller
    steps: int
    released: int = 0
    """Steps whose noise somebody may have seen, over all attempts."""
    lost: list[int] = field(default_factory=list)
    """How many steps of each death were committed and never released."""
    where: Counter[str] = field(default_factory=Counter)
    deadly: float = 0.0
    open: int = 0
    """Steps of the block under way that are committed and not released."""

    def instant(self, name: str) -> None:
        if self.dice.random() < self.deadly:
            self.where[name] += 1
            raise KilledError

    def attempt(self) -> None:
        """From the opening to the last step.

        Raises:
            KilledError: on its way.
        """
        attempts = self.world.authority.attempts
        self.deadly, self.open = self.dice.choice((0.15, 0.3, 0.6)), 0
        self.instant("before the attempt")
        workers = self.dice.choice((1, 2))
        opened = attempts.open(self.caller, self.run, workers, CODE)
        number, at = opened["attempt"], opened["resume_from"]
        self.instant("after the attempt")
        for rank in range(workers):
            attempts.lease(self.caller, self.run, number, rank, OneTimeKey.generate().public, CODE)
            self.instant("after a lease")
        self.left_over(number - 1, at)
        while at < self.steps:
            last = min(at + self.block, self.steps)
            self.instant("before the commit")
            attempts.commit_block(self.caller, self.run, number, at, last)
            self.open = last - at
            self.instant("after the commit")
            for _ in range(last - at):
                self.released += 1
                self.open -= 1
                self.instant("after a release")
            at = last
            self.instant("before the checkpoint")
            blob = f"models/{self.run}/checkpoints/{at}.sealed"
            attempts.checkpoint(self.caller, self.run, number, at, blob, "ab" * 32)
            self.instant("after the checkpoint")

    def left_over(self, number: int, at: int) -> None:
        """A worker of the attempt before would release a block, were it committed."""
        if number and self.dice.random() < 0.2:
            last = min(at + self.block, self.steps)
            with pytest.raises(ConflictError):
                self.world.authority.attempts.commit_block(self.caller, self.run, number, at, last)


def row_of(world: World, run: str) -> Any:
    with world.authority.core.database.reading() as connection:
        return connection.execute(select(runs).where(runs.c.id == run)).one()


def holds(world: World, worker: Worker) -> None:
    """What has to be true of a run at any instant."""
    row = row_of(world, worker.run)
    assert worker.released <= row.steps_committed
    assert row.epsilon_charged >= settle(row.plan, worker.released)[0]
    assert row.epsilon_charged >= settle(row.plan, row.steps_committed)[0]
    assert row.steps_committed - worker.released == sum(worker.lost)
    assert all(lost <= worker.block for lost in worker.lost)


def adds_up(world: World) -> None:
    """The budget's charge is the sum over the runs, within the total; the ledger is as it was sealed."""
    with world.authority.core.database.reading() as connection:
        charged = list(connection.execute(select(runs.c.epsilon_charged)).scalars())
        assert ledger_seals.check(connection, world.authority.core.keys, world.ledger())[1] == ""
    shown = world.budget()
    assert shown["epsilon_added"] == pytest.approx(sum(charged), rel=1e-12)
    assert shown["epsilon_added"] <= shown["epsilon"] * (1 + 1e-9)


def drive(world: World, dice: random.Random, number: int) -> Worker:
    """A run to its end, whatever dies on the way."""
    epochs, block = dice.choice(PLANS)
    spec = training_spec()
    run = world.submit(
        name=f"killed-{number}",
        training=spec["training"] | {"epochs": epochs, "retries": RETRIES},
        privacy=spec["privacy"] | {"epsilon": EPSILON, "delta": 2e-6},
        resources=spec["resources"] | {"min_workers": 1},
    )
    worker = Worker(world, run, block, dice, world.caller(run), row_of(world, run).plan["steps"])
    outcome = "finished"
    while True:
        try:
            worker.attempt()
            break
        except KilledError:
            worker.lost.append(worker.open)
            holds(world, worker)
        except (BudgetError, ConflictError) as error:  # its attempts are used up, or the budget is
            outcome = type(error).__name__
            break
    holds(world, worker)
    world.attempts[run] = row_of(world, run).attempt
    world.end(run, "stopped" if outcome == "finished" else "failed")
    row = row_of(world, run)
    assert row.settled
    assert row.epsilon_charged == settle(row.plan, row.steps_committed)[0]
    holds(world, worker)
    worker.where[outcome] += 1
    return worker


@pytest.fixture
def cheap_world(tmp_path: Path) -> Iterator[World]:
    directory = tmp_path / "authority"
    directory.mkdir()
    world = World(directory, place=Place.new(directory / "state.db", None))
    world.register_everybody()
    world.seal()
    world.set_budget(100.0, 2e-3)  # its delta is below that of a row
    yield world
    world.close()


@pytest.mark.long
def test_a_thousand_workers_die_and_no_step_that_was_seen_is_free(cheap_world: World) -> None:
    dice = random.Random(20261129)  # noqa: S311 - the same deaths each time
    workers: list[Worker] = []
    while sum(len(worker.lost) for worker in workers) < KILLS:
        workers.append(drive(cheap_world, dice, len(workers)))
        adds_up(cheap_world)
    where = sum((worker.where for worker in workers), Counter[str]())
    assert min(where[name] for name in INSTANTS) >= 5
    assert where["finished"] >= 10
    assert where["BudgetError"] == 0  # what is run again is held before it is run, and the budget pays for it here
