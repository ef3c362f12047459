"""How runs end, and go on after all: on their own signed word, on a person's, for want of a start, and by resuming.

Guarantees: what a run did not use is given back only once the run itself has said, signed by its own key, that it has
ended; then it is charged for every step that the ledger has on record, whatever the statement says. Until then its
whole reservation stays charged. Whoever stops a run ends it at once: no lease and no block is granted any more. A run
goes on only by its author, from its checkpoint, after its signed end, and if the budget pays for the rest.

A run that never began has nobody to say so for it: its submission may be lost, or the machine that had its key. Without
an attempt there was no lease, so nothing can have been released. The authority itself charges nothing for it, as soon
as somebody stops it, or after `UNSTARTED_S`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select, update

from cloister.authority import ledger_seals, resources
from cloister.authority.core import Action, Caller, Core
from cloister.authority.costs import again
from cloister.authority.identity import signing_key
from cloister.authority.ledger import Cost, reserve
from cloister.authority.runs import Runs, close, load, public, require_attempts, settle_beforehand
from cloister.errors import CloisterError, ConflictError, PermissionDeniedError, UnavailableError
from cloister.privacy.spec import TrainingSpec
from cloister.signing import run_end
from cloister.signing.run_end import ENDED
from cloister.stores.tables import leases, runs

UNSTARTED_S = 7 * 24 * 3600.0
"""How long an accepted run may hold its part of the budget without an attempt. Clusters start in minutes; `--hold`
waits for a person, and a week covers their weekend."""
CERTAIN_S = 3600.0
"""How long this process must have known, by a clock that nobody sets, that a run is that old. The week is by the wall
clock, since it outlasts restarts: if that is set forward, a job that is about to start has an hour to do so."""
_log = logging.getLogger("cloister.authority")


class Ends:
    """Ends runs, settles what they cost, and lets them go on."""

    def __init__(self, core: Core, runs: Runs, *, steady: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._runs = runs
        self._steady = steady
        self._unstarted: dict[str, float] = {}
        """Since when, by `steady`, each run is known to be overdue."""

    def end(self, caller: Caller, run: str, envelope: dict[str, Any], error: dict[str, Any] | None) -> dict[str, Any]:
        """Take a run's own signed word that it has ended, and give back what it did not use. Twice does no harm.

        Raises:
            IntegrityError: the run's key did not sign it, or it is about another run or plan.
            ConflictError: it is about another attempt than the last.
        """
        settle_beforehand(self._core, caller, run, lambda row: int(row.steps_committed))
        with self._core.action(caller, "run:work", step="end") as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            said = run_end.verify(envelope, signing_key(act.connection, run), run=run, plan=row.plan)
            act.details.update(attempt=said.attempt, said=said.outcome, error=str((error or {}).get("kind", ""))[:80])
            if said.attempt != row.attempt:
                raise ConflictError(f"attempt {said.attempt} of {run} is not its last", "stop this worker")
            if row.state not in ENDED:
                kept = {name: str((error or {}).get(name, ""))[:500] for name in ("error", "hint", "kind")}
                failure = kept if said.outcome == "failed" else None
                close(act.connection, run, said.outcome, failure, self._core.clock())
            if not row.settled:
                _settle(act, row, run_end=envelope)
            return public(load(act.connection, run))

    def stop(self, caller: Caller, run: str) -> dict[str, Any]:
        """End a run on a person's word. If it has begun, its whole reservation stays charged until its own signed end
        arrives. Otherwise nothing is charged for it any more.
        """
        with self._core.action(caller, "run:stop") as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            if row.state not in ENDED:
                close(act.connection, run, "stopped", None, self._core.clock())
            if _never_began(act.connection, row) and _may_change(act, row.ledger):
                _settle(act, row)
            return public(load(act.connection, run))

    def expire(self) -> list[str]:
        """End the runs that were accepted `UNSTARTED_S` ago and never began. The authority's own doing, on record as
        such. Returns them.

        What fails for one of them is told to the operator's log, and keeps no other from ending.
        """
        c, now = runs.c, self._steady()
        overdue = (c.attempt == 0) & c.settled.is_(False) & (c.created <= self._core.clock() - UNSTARTED_S)
        with self._core.database.reading() as connection:
            found = connection.execute(select(c.id).where(overdue)).scalars().all()
        self._unstarted = {run: self._unstarted.get(run, now) for run in found}
        done = []
        for run in (run for run, since in self._unstarted.items() if now - since >= CERTAIN_S):
            try:
                with self._core.of_itself("run:expire") as act:
                    row = load(act.connection, run)
                    if _never_began(act.connection, row):  # or it begins at this moment
                        act.resource = resources.run(row)
                        if row.state not in ENDED:
                            close(act.connection, run, "failed", _UNSTARTED.to_dict(), self._core.clock())
                        _settle(act, row)
                if act.resource is not None:
                    done.append(run)
            except Exception as error:  # noqa: BLE001  (the others are due too; the text may hold anything)
                _log.error("expiry: %s of %s; it is tried again", type(error).__name__, run)
        return done

    def resume(self, caller: Caller, run: str) -> dict[str, Any]:
        """Let a run that failed or was stopped go on from its checkpoint, with what that costs reserved again.

        Raises:
            PermissionDeniedError: it is somebody else's.
            ConflictError: it has not ended, has no checkpoint or no signed end, or its attempts are used up.
            BudgetError: the budget, or what was approved, does not pay for it.
        """
        settle_beforehand(self._core, caller, run, again)
        with self._core.action(caller, "train:submit", run=run, step="resume") as act:
            row = load(act.connection, run)
            spec = TrainingSpec.parse(row.spec)
            self._runs.manifest(act, spec)
            if row.author != caller.name:
                raise PermissionDeniedError(f"{run} is somebody else's", "submit a run of your own")
            if row.state not in ("failed", "stopped") or row.checkpoint is None:
                raise ConflictError(f"{run} is {row.state}, or has no checkpoint", "submit a new run")
            if not row.settled or row.run_end is None:
                raise ConflictError(
                    f"{run} has not said itself that it has ended", f"have it settled first: cloister train watch {run}"
                )
            # The plan is the one that it signed: no seal covers those of runs that are settled.
            run_end.verify(row.run_end, signing_key(act.connection, run), run=run, plan=row.plan)
            require_attempts(row, spec)
            act.details.update(attempts=row.attempt, resume_from=row.checkpoint["step"])
            values = {
                "state": "training", "settled": False, "run_end": None, "error": None, "ended": None,
                "position": row.checkpoint["step"], "steps_done": row.checkpoint["step"],
            }  # fmt: skip
            with ledger_seals.changing(act, row.ledger):
                reserve(act.connection, row, again(row))
                act.connection.execute(update(runs).where(runs.c.id == run).values(**values))
            return public(load(act.connection, run))


_UNSTARTED = UnavailableError("the run did not begin within a week of its submission", "submit a new run")


def _never_began(connection: Connection, row: Any) -> bool:
    """Whether no attempt of an unsettled run was ever opened. From then on it has to be stopped before one is."""
    leased = connection.execute(select(leases.c.run).where(leases.c.run == row.id)).first()
    return not (row.settled or row.attempt or row.steps_committed or leased)


def _may_change(act: Action, name: str) -> bool:
    """Whether a ledger is whole, and its key service there. Whoever stops a run has it stopped where it is not, and
    `expire` comes back to what it is charged."""
    try:
        ledger_seals.require_whole(act, name)
    except CloisterError:
        return False
    return True


def _settle(act: Action, row: Any, **more: Any) -> None:
    """Charge a run that has ended for the steps that the ledger has on record, and for no other."""
    cost = Cost.settled(row)
    act.details.update(epsilon_charged=cost.epsilon, steps=row.steps_committed)
    values = cost.columns() | {"settled": True} | more
    with ledger_seals.changing(act, row.ledger):
        act.connection.execute(update(runs).where(runs.c.id == row.id).values(**values))
