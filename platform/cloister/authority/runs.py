"""Training runs: what one would cost, who may start it, and what is known of it.

Guarantees: a run is accepted only if the dataset's budget pays for its whole plan, which is charged at once, before any
key is given out; and, where its data is sensitive, only as exactly what others have approved, what it costs at most if
workers die included. How it then trains is in `attempts`, how it ends in `ends`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Connection, insert, select, update

from cloister.authority import ledger_seals, resources
from cloister.authority.approvals import Approvals
from cloister.authority.core import Action, Caller, Core, Resource
from cloister.authority.costs import curve, plan_for, settle, so_far
from cloister.authority.data import load as load_dataset
from cloister.authority.data import most_rows_of, require_live, unit_of
from cloister.authority.identity import add_identity
from cloister.authority.key_use import MODELS, model_key_context
from cloister.authority.ledger import Budget, Cost, budget_of, has_budget
from cloister.authority.overlap import joined
from cloister.authority.populations import described, ledger_of
from cloister.canonical import canonical_json, sha256_hex
from cloister.datasets.manifest import DatasetManifest, parse_reference
from cloister.datasets.schema import Column, DatasetSchema
from cloister.errors import BudgetError, ConflictError, InputError, NotFoundError
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing.envelope import new_key
from cloister.signing.keys import run_name
from cloister.stores.tables import runs


class Runs:
    """Plans runs, accepts them, and shows them."""

    def __init__(self, core: Core, approvals: Approvals) -> None:
        self._core = core
        self._approvals = approvals

    def plan(self, caller: Caller, spec_value: dict[str, Any]) -> dict[str, Any]:
        """What a run would cost. Reads the manifest's public facts, never data."""
        spec = TrainingSpec.parse(spec_value)
        with self._core.action(caller, "train:plan", epsilon=spec.privacy.epsilon) as act:
            manifest, row = self.manifest(act, spec)
            resource = act.resource
        plan = plan_for(spec, manifest, caller.name)
        with self._core.database.reading() as connection:
            budget = budget_of(connection, ledger_of(connection, row))
            shown = described(connection, row)
        after = budget.after(Cost.of_plan(plan, caller.name))
        most = Cost.of_steps(plan.to_dict(), plan.steps + plan.redo_steps, caller.name)
        schema = DatasetSchema.from_mapping(manifest.dataset_schema)
        evaluation = plan.evaluation(*manifest.evaluated(spec.label))
        return {
            "spec": spec.to_dict(),
            "plan": plan.to_dict(),
            "budget": shown | {"before": budget.to_dict(), "after": after.to_dict()},
            "affordable": after.holds() and shown["joined"],
            "affordable_at_most": budget.after(most).holds(),
            "approvals": self._approvals_needed(resource),
            "owner": row.owner,
            "holdout_rows": evaluation.rows,
            "evaluation_noise": evaluation.noise_of_accuracy,
            "unit": unit_of(schema),
            "columns": [column.name for column in columns_of(spec, manifest)[0]],
        }

    def submit(self, caller: Caller, spec_value: dict[str, Any], code_digest: str, public_key: str) -> dict[str, Any]:
        """Accept a run: charge its whole plan and register its workload identity.

        Raises:
            BudgetError: the dataset's budget cannot pay for the plan.
            ApprovalMissingError: the data is of a sensitive class, and not enough others approved exactly this run.
        """
        spec = TrainingSpec.parse(spec_value)
        with self._core.reading(caller, "train:submit") as act:
            manifest, _ = self.manifest(act, spec)
        plan = plan_for(spec, manifest, caller.name)  # seconds of arithmetic: outside the transaction
        cost = Cost.of_plan(plan, caller.name)
        run = run_name(public_key.encode())
        with self._core.action(caller, "train:submit", run=run, epsilon=plan.epsilon, code=code_digest[:80]) as act:
            _, dataset = self.manifest(act, spec)
            ledger = joined(act.connection, dataset)
            rows = most_rows_of(act.connection, ledger, manifest)
            _require_budget(budget_of(act.connection, ledger), cost, manifest.name, rows)
            approval = self._approve(act, spec, plan, dataset, code_digest)
            now = self._core.clock()
            # First: it refuses a key that has had a run.
            add_identity(act.connection, run, ["run"], public_key, caller.name, now, kind="run")
            (model_key,) = act.keys.wrap(MODELS, [(new_key(), model_key_context(run))])
            with ledger_seals.changing(act, ledger):
                act.connection.execute(
                    insert(runs).values(
                        id=run,
                        author=caller.name,
                        dataset=manifest.name,
                        version=manifest.version,
                        spec=spec.to_dict(),
                        plan=plan.to_dict(),
                        code_digest=code_digest,
                        approval=approval,
                        attributes=_attributes(act.resource),
                        state="submitted",
                        steps_committed=0,
                        steps_done=0,
                        attempt=0,
                        world_size=0,
                        resume_from=0,
                        position=0,
                        settled=False,
                        ledger=ledger,
                        **cost.columns(),
                        model_key=model_key,
                        flags=[],
                        created=now,
                    )
                )
        return {"run": run, "plan": plan.to_dict(), "spec": spec.to_dict()}

    def _approvals_needed(self, resource: Resource | None) -> int:
        required = self._approvals.required
        sensitive = resource is not None and resource.attributes["class"] in required.training_classes
        return required.training if sensitive else 0

    def _approve(self, act: Action, spec: TrainingSpec, plan: PrivacyPlan, dataset: Any, code: str) -> str | None:
        if not self._approvals_needed(act.resource):
            return None
        wanted = spec.to_dict()
        details = {
            "dataset": spec.dataset, "manifest": dataset.manifest_digest, "spec": wanted, "code": code,
            "epsilon": plan.epsilon, "epsilon_at_most": plan.epsilon_at_most, "delta": plan.delta,
            "rows_per_unit": plan.rows_per_unit, "purpose": spec.purpose,
        }  # fmt: skip
        subject = f"training {spec.model_name} on {spec.dataset}, spec {sha256_hex(canonical_json(wanted))[:8]}"
        approval, _ = self._approvals.demand(
            act, "training", subject, details, owner=dataset.owner, next_step="submit it again: cloister train submit"
        )
        return approval

    def show(self, caller: Caller, run: str) -> dict[str, Any]:
        """State, steps and epsilon spent so far."""
        with self._core.reading(caller, "run:read") as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
        spent = row.epsilon_charged if row.settled else so_far(row.plan, row.steps_committed)
        return public(row) | {"epsilon_spent": spent, "end": row.run_end}

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        with self._core.reading(caller, "run:read") as act:
            rows = act.connection.execute(select(runs).order_by(runs.c.created.desc()).limit(100)).all()
            act.allow(resources.any_run(caller.name))
            return [public(row) for row in rows if act.permits(resources.run(row))]

    def manifest(self, act: Action, spec: TrainingSpec) -> tuple[DatasetManifest, Any]:
        """The dataset that a spec means, once policy allows its use: asked about the classes of the columns used."""
        name, version = parse_reference(spec.dataset)
        row = load_dataset(act.connection, name, version)
        act.allow(resources.dataset(act.connection, row), "dataset:read")  # before it is told which columns there are
        manifest = DatasetManifest.parse(row.manifest)
        features, label = columns_of(spec, manifest)
        used = [column.sensitivity for column in (*features, label)]
        if act.action != "train:plan":  # before policy says only that there is no budget
            _require_some_budget(act, row, used)
        act.allow(resources.dataset(act.connection, row, used))
        require_live(act.connection, row)
        if manifest.published_rows("holdout") == 0:  # whether an erasure has left any is not told
            raise InputError(f"{spec.dataset} has no holdout rows to evaluate on", "seal it with --holdout 0.2")
        if spec.resources.gpus_per_worker:
            raise InputError("workers with GPUs are not supported yet", "set resources.gpus_per_worker to 0")
        schema = DatasetSchema.from_mapping(manifest.dataset_schema)
        for field, asked, granted in (
            ("purpose", spec.purpose, schema.purpose),
            ("resources.region", spec.resources.region, schema.region),
        ):
            if asked != granted:
                raise InputError(
                    f"{spec.dataset} is held for {field} {granted!r} only",
                    f"set {field} in the spec, or ask {row.owner}",
                )
        if spec.resources.workers > len(manifest.shards("train")):
            raise InputError(
                f"{spec.resources.workers} workers cannot share {len(manifest.shards('train'))} shards",
                "ask for fewer workers, or seal with more --shards",
            )
        return manifest, row


def _attributes(resource: Resource | None) -> dict[str, Any]:
    """What policy needs to know of a run about its dataset."""
    known = resource.attributes if resource else {}
    return {name: known[name] for name in ("owner", "region", "purpose", "class")}


def _require_some_budget(act: Action, row: Any, classes: Iterable[str]) -> None:
    """Tell whoever might train on a version, if only it had a budget, that it has none. All others policy refuses.

    Raises:
        BudgetError: none was ever set.
        CloisterError: as `overlap.joined`.
    """
    if has_budget(act.connection, joined(act.connection, row)):
        return
    if act.permits(resources.dataset(act.connection, row, classes, budget=Budget(1.0, 0.0, Cost()))):
        raise BudgetError(
            f"{row.name} has no budget yet", f"ask {row.owner}: cloister budget set {row.name} --epsilon E --delta D"
        )


def _require_budget(budget: Budget, cost: Cost, name: str, rows: int) -> None:
    if budget.delta >= 1 / rows:
        raise BudgetError(
            f"data has grown: the budget of {name} has delta {budget.delta:g}, and with up to {rows:,} rows it may "
            f"allow publishing one of them",
            f"ask the owner for a delta below {0.99 / rows:.2e}: cloister budget set {name}",
        )
    after = budget.after(cost)
    if not after.holds():
        together, _ = after.charged()
        hint = f"lower privacy.epsilon in the spec, or ask the owner: cloister budget set {name}"
        if cost.epsilon <= budget.epsilon < together and not budget.spent.epsilon:
            hint = (
                f"lower privacy.delta to {budget.delta_of_each_rule:g}, half of the budget's: the other half is for "
                f"several runs together; or ask the owner: cloister budget set {name}"
            )
        raise BudgetError(
            f"with this run, epsilon {cost.epsilon:g} by itself, {name} would come to epsilon "
            f"{together:.3f}, and its budget is {budget.epsilon:g} at delta {budget.delta:g}",
            hint,
        )


def columns_of(spec: TrainingSpec, manifest: DatasetManifest) -> tuple[tuple[Column, ...], Column]:
    """The inputs and the label that a spec means.

    Raises:
        InputError: they cannot be trained on; `restricted` columns never can.
    """
    schema = DatasetSchema.from_mapping(manifest.dataset_schema)
    features, label = schema.feature_columns(spec.features), schema.column(spec.label)
    if label.type != "category" or label.sensitivity == "restricted" or label.role not in ("label", None):
        raise InputError(f"column '{label.name}' may not be a label", "name a category column that is not restricted")
    if label in features:
        raise InputError(f"the label '{label.name}' is among the inputs", "list the inputs under `features`")
    return features, label


def load(connection: Connection, run: str) -> Any:
    """One run's row.

    Raises:
        NotFoundError: there is none.
    """
    row = connection.execute(select(runs).where(runs.c.id == run)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no run {run[:40]}", "list them: cloister train list")
    return row


def settle_beforehand(core: Core, caller: Caller, run: str, steps: Callable[[Any], int]) -> None:
    """Account for so many steps of a run. That takes seconds and is remembered: done before an action, it does not hold
    the database's write lock."""
    with core.database.reading() as connection:
        row = load(connection, run)
    settle(row.plan, steps(row), caller.name)
    curve(row.plan, steps(row), caller.name)


def require_attempts(row: Any, spec: TrainingSpec) -> None:
    """Refuse one attempt more than the spec has.

    Raises:
        ConflictError: they are used up.
    """
    if row.attempt > spec.training.retries:
        raise ConflictError(
            f"{row.id} has had all of its attempts ({row.attempt})",
            "submit a new run, with more training.retries if need be",
        )


def standing(row: Any) -> str:
    """A run's state, or "settled", which alone is under the ledger's seal: not the state, nor from then on the plan."""
    return "settled" if row.settled else str(row.state)


def close(connection: Connection, run: str, state: str, error: dict[str, Any] | None, now: float) -> None:
    """End a run: no attempt is open any more. What is charged for it stays."""
    values = {"state": state, "error": error, "ended": now, "world_size": 0}
    connection.execute(update(runs).where(runs.c.id == run).values(**values))


def public(row: Any) -> dict[str, Any]:
    return {
        "run": row.id,
        "author": row.author,
        "dataset": f"{row.dataset}@{row.version}",
        "state": row.state,
        "steps": row.plan["steps"],
        "steps_committed": row.steps_committed,
        "steps_done": row.steps_done,
        "attempt": row.attempt,
        "workers": row.world_size,
        "resumed_from": row.resume_from,
        "checkpoint": row.checkpoint["step"] if row.checkpoint else None,
        "rows_per_s": row.rows_per_s,
        "epsilon_planned": row.plan["epsilon"],
        "epsilon_at_most": row.plan.get("epsilon_at_most", row.plan["epsilon"]),
        "epsilon_charged": row.epsilon_charged,
        "settled": row.settled,
        "delta": row.plan["delta"],
        "created": row.created,
        "ended": row.ended,
        "error": row.error,
        "plan": row.plan,
        "spec": row.spec,
    }
