"""How runs end, and go on after all: on their own signed word, on a person's, and by resuming.

Guarantees: what a run did not use is given back only once the run itself has said, signed by its own key, that it has
ended; then it is charged for every step that the ledger has on record, whatever the statement says. Until then its
whole reservation stays charged. Whoever stops a run ends it at once: no lease and no block is granted any more. A run
goes on only by its author, from its checkpoint, after its signed end, and if the budget pays for the rest.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import update

from cloister.authority import ledger_seals, resources
from cloister.authority.core import Caller, Core
from cloister.authority.costs import again
from cloister.authority.identity import signing_key
from cloister.authority.ledger import Cost, reserve
from cloister.authority.runs import Runs, close, load, public, require_attempts, settle_beforehand
from cloister.errors import ConflictError, PermissionDeniedError
from cloister.privacy.spec import TrainingSpec
from cloister.signing import run_end
from cloister.signing.run_end import ENDED
from cloister.stores.tables import runs


class Ends:
    """Ends runs, settles what they cost, and lets them go on."""

    def __init__(self, core: Core, runs: Runs) -> None:
        self._core = core
        self._runs = runs

    def end(self, caller: Caller, run: str, envelope: dict[str, Any], error: dict[str, Any] | None) -> dict[str, Any]:
        """Take a run's own signed word that it has ended, and give back what it did not use. Twice does no harm.

        Raises:
            IntegrityError: the run's key did not sign it, or it is about another run or plan.
            ConflictError: it is about another attempt than the last.
        """
        settle_beforehand(self._core, run, lambda row: int(row.steps_committed))
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
                cost = Cost.of_steps(row.plan, row.steps_committed)
                act.details.update(epsilon_charged=cost.epsilon, steps=row.steps_committed)
                values = cost.columns() | {"settled": True, "run_end": envelope}
                with ledger_seals.changing(act, row.ledger):
                    act.connection.execute(update(runs).where(runs.c.id == run).values(**values))
            return public(load(act.connection, run))

    def stop(self, caller: Caller, run: str) -> dict[str, Any]:
        """End a run on a person's word. Its whole reservation stays charged until its own signed end arrives."""
        with self._core.action(caller, "run:stop") as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            if row.state not in ENDED:
                close(act.connection, run, "stopped", None, self._core.clock())
            return public(load(act.connection, run))

    def resume(self, caller: Caller, run: str) -> dict[str, Any]:
        """Let a run that failed or was stopped go on from its checkpoint, with what that costs reserved again.

        Raises:
            PermissionDeniedError: it is somebody else's.
            ConflictError: it has not ended, has no checkpoint or no signed end, or its attempts are used up.
            BudgetError: the budget, or what was approved, does not pay for it.
        """
        settle_beforehand(self._core, run, again)
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
