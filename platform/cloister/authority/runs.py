"""Training runs and the privacy ledger.

Guarantees: a run is accepted only if the dataset's budget pays for its whole plan, which is charged before any key is
given out; each rank gets its data keys once, HPKE-sealed to its one-time key, after the grant is on record; a block
of steps is committed before its noise is released, so when a run ends for whatever reason it is charged for every
step that can have been seen, and never for less.
A lease needs the run's key *and* a registered node's certificate, of the dataset's region. Not guaranteed: that a
worker runs the code whose digest it states, if whoever controls its node lies (assurance level L0: software only).
"""

from __future__ import annotations

import secrets
import threading
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, insert, select, update

from cloister.authority import resources
from cloister.authority.approvals import Approvals
from cloister.authority.core import Action, Caller, Core, Resource
from cloister.authority.data import brief, keys_of, require_live
from cloister.authority.data import load as load_dataset
from cloister.authority.identity import add_identity
from cloister.authority.key_use import MODELS, dataset_key, key_context, model_key_context
from cloister.authority.ledger import budget_state
from cloister.canonical import b64, canonical_json, sha256_hex
from cloister.datasets.manifest import DatasetManifest, parse_reference
from cloister.datasets.schema import Column, DatasetSchema, Unit
from cloister.errors import (
    BudgetError,
    ConflictError,
    InputError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from cloister.models.release import model_seal_context
from cloister.privacy.plan import PrivacyPlan, make_plan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing import purposes
from cloister.sealing.envelope import new_key
from cloister.sealing.lease import seal_to
from cloister.stores.blobs import Stores
from cloister.stores.tables import datasets, leases, runs

# Accounting takes a core for seconds and up to a gigabyte: one at a time, whoever asks.
_ACCOUNTING = threading.Lock()
_PLANS = threading.BoundedSemaphore(4)  # who waits for a plan holds a thread of the server's
ENDED = frozenset({"finished", "failed", "stopped"})
EVALUATION_EPSILON = 1.0
MAX_MANIFESTS = 32
MAX_STEPS = 50_000  # accounting for this many takes about 20 s of a core, inside one request


class Runs:
    """Plans, runs, leases and what they cost."""

    def __init__(self, core: Core, approvals: Approvals, stores: Stores) -> None:
        self._core = core
        self._approvals = approvals
        self._stores = stores
        self._manifests: dict[str, DatasetManifest] = {}

    def plan(self, caller: Caller, spec_value: dict[str, Any]) -> dict[str, Any]:
        """What a run would cost. Reads the manifest's public facts, never data."""
        spec = TrainingSpec.parse(spec_value)
        with self._core.action(caller, "train:plan", epsilon=spec.privacy.epsilon) as act:
            manifest, row = self._manifest(act, spec)
            resource = act.resource
        plan = _plan(spec, manifest)
        with self._core.database.reading() as connection:
            budget = budget_state(connection, manifest.name)
        return {
            "spec": spec.to_dict(),
            "plan": plan.to_dict(),
            "budget_before": budget["epsilon_left"],
            "budget_after": budget["epsilon_left"] - plan.epsilon,
            "affordable": _affordable(budget, plan),
            "approvals": self._approvals_needed(resource),
            "owner": row.owner,
            "holdout_rows": manifest.rows("holdout"),
            "unit": _unit(manifest),
            "columns": [column.name for column in _columns(spec, manifest)[0]],
        }

    def submit(self, caller: Caller, spec_value: dict[str, Any], code_digest: str, public_key: str) -> dict[str, Any]:
        """Accept a run: charge its whole plan and register its workload identity.

        Raises:
            BudgetError: the dataset's budget cannot pay for the plan.
            ApprovalMissingError: the data is of a sensitive class, and not enough others approved exactly this run.
        """
        spec = TrainingSpec.parse(spec_value)
        with self._core.reading(caller, "train:submit") as act:
            manifest, _ = self._manifest(act, spec)
        plan = _plan(spec, manifest)  # seconds of arithmetic: outside the transaction
        run = "run-" + secrets.token_hex(5)
        with self._core.action(caller, "train:submit", run=run, epsilon=plan.epsilon, code=code_digest[:80]) as act:
            _, dataset = self._manifest(act, spec)
            _require_budget(budget_state(act.connection, manifest.name), plan)
            approval = self._approve(act, spec, plan, dataset, code_digest)
            now = self._core.clock()
            (model_key,) = act.keys.wrap(MODELS, [(new_key(), model_key_context(run))])
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
                    epsilon_charged=plan.epsilon,
                    delta_charged=plan.delta,
                    model_key=model_key,
                    flags=[],
                    created=now,
                )
            )
            add_identity(act.connection, run, ["run"], public_key, caller.name, now, kind="run")
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
            "epsilon": plan.epsilon, "delta": plan.delta, "rows_per_unit": plan.rows_per_unit, "purpose": spec.purpose,
        }  # fmt: skip
        subject = f"training {spec.model_name} on {spec.dataset}, spec {sha256_hex(canonical_json(wanted))[:8]}"
        approval, _ = self._approvals.demand(
            act, "training", subject, details, owner=dataset.owner, next_step="submit it again: cloister train submit"
        )
        return approval

    def lease(self, caller: Caller, run: str, rank: int, public_key: bytes, code_digest: str) -> dict[str, Any]:
        """Give rank `rank` the keys of its own shards, sealed to its one-time key.

        Raises:
            ConflictError: the run is over, or this rank has had its lease.
            PermissionDeniedError: the worker runs other code than was submitted.
        """
        with self._core.action(caller, "run:lease", rank=rank) as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            if code_digest != row.code_digest:
                raise PermissionDeniedError(
                    "the worker's code is not the code that was submitted", "submit the run again"
                )
            if row.state not in ("submitted", "training"):
                raise ConflictError(f"{run} is {row.state}", "submit a new run")
            spec = TrainingSpec.parse(row.spec)
            if not 0 <= rank < spec.resources.workers:
                raise InputError(
                    "there is no worker of that rank in the plan", "start as many workers as the spec says"
                )
            if act.connection.execute(select(leases).where(leases.c.run == run, leases.c.rank == rank)).first():
                raise ConflictError(
                    f"rank {rank} of {run} has had its lease", "a lease is given once; submit a new run"
                )
            dataset, manifest = self._leased(act.connection, row)
            keys = _shard_keys(act, manifest, spec, rank)
            payload: dict[str, Any] = {"keys": {name: b64(key) for name, key in keys.items()}}
            if rank == 0:
                (model_key,) = act.keys.unwrap(MODELS, [(row.model_key, model_key_context(run))])
                payload["model_key"] = b64(model_key)
            act.details["files"] = ",".join(sorted(keys))[:512]
            act.connection.execute(insert(leases).values(run=run, rank=rank, created=self._core.clock()))
            act.connection.execute(update(runs).where(runs.c.id == run).values(state="training"))
            sealed = seal_to(public_key, canonical_json(payload), purposes.training_lease(run, rank))
        self._core.anchor(act)
        return {
            "sealed": b64(sealed),
            "manifest": dataset.envelope,
            "owner_key": dataset.owner_key,
            "spec": row.spec,
            "plan": row.plan,
            "blobs": self._stores.for_region(row.attributes["region"]).url,
            "evaluation_epsilon": evaluation_epsilon(row.plan),
            "seal_context": model_seal_context(run),
        }

    def _leased(self, connection: Connection, run: Any) -> tuple[Any, DatasetManifest]:
        """The run's dataset version with its manifest, which is parsed once: it never changes, and may be long."""
        c = datasets.c
        mine = (c.name == run.dataset) & (c.version == run.version)
        known = connection.execute(
            select(c.name, c.version, c.ended, c.erasure, c.owner_key, c.envelope, c.manifest_digest).where(mine)
        ).one()
        require_live(connection, known)
        manifest = self._manifests.get(known.manifest_digest)
        if manifest is None:
            manifest = DatasetManifest.parse(load_dataset(connection, run.dataset, run.version).manifest)
            if len(self._manifests) >= MAX_MANIFESTS:
                self._manifests.clear()
            self._manifests[known.manifest_digest] = manifest
        return known, manifest

    def commit_block(self, caller: Caller, run: str, first: int, last: int) -> dict[str, Any]:
        """Put steps `first`…`last` on record. Only after this returns may their noise be released.

        Raises:
            ConflictError: the run is over, the block is not the next one, or it exceeds the plan.
        """
        with self._core.action(caller, "run:work", step="block", first=first, last=last) as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            if row.state != "training":
                raise ConflictError(f"{run} is {row.state}", "stop this worker")
            require_live(act.connection, brief(act.connection, row.dataset, row.version))
            if first != row.steps_committed or not first < last <= row.plan["steps"]:
                raise ConflictError("these steps are not the next ones of the plan", "stop this worker")
            act.connection.execute(update(runs).where(runs.c.id == run).values(steps_committed=last))
        return {"steps_committed": last}

    def progress(self, caller: Caller, run: str, steps_done: int, rows_per_s: float) -> None:
        """What people watch: steps, and planned rows over measured time. Realised batch sizes stay in the worker."""
        with self._core.unlogged(caller, "run:work") as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            if row.state != "training":
                raise ConflictError(f"{run} is {row.state}", "stop this worker")
            if not 0 <= steps_done <= row.steps_committed:
                raise InputError("more steps reported than committed", "commit the block first")
            values = {"steps_done": steps_done, "rows_per_s": rows_per_s}
            act.connection.execute(update(runs).where(runs.c.id == run).values(**values))

    def fail(self, caller: Caller, run: str, error: dict[str, Any]) -> dict[str, Any]:
        """End a run that went wrong; reported by its own workload."""
        self._settle_beforehand(run)
        with self._core.action(caller, "run:work", step="fail", error=str(error.get("kind", ""))[:80]) as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            kept = {name: str(error.get(name, ""))[:500] for name in ("error", "hint", "kind")}
            return self._end(act, row, "failed", kept)

    def stop(self, caller: Caller, run: str) -> dict[str, Any]:
        """End a run on a person's word."""
        self._settle_beforehand(run)
        with self._core.action(caller, "run:stop") as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
            return self._end(act, row, "stopped", None)

    def _settle_beforehand(self, run: str) -> None:
        """Accounting takes seconds and is remembered: done here, it does not hold the database's write lock."""
        with self._core.database.reading() as connection:
            row = load(connection, run)
        settle(row.plan, row.steps_committed)

    def _end(self, act: Action, row: Any, state: str, error: dict[str, Any] | None) -> dict[str, Any]:
        if row.state in ENDED:
            return _public(row)
        epsilon, delta = settle(row.plan, row.steps_committed)
        act.details.update(epsilon_charged=epsilon, steps=row.steps_committed)
        act.connection.execute(
            update(runs)
            .where(runs.c.id == row.id)
            .values(state=state, error=error, ended=self._core.clock(), epsilon_charged=epsilon, delta_charged=delta)
        )
        return _public(load(act.connection, row.id))

    def show(self, caller: Caller, run: str) -> dict[str, Any]:
        """State, steps and epsilon spent so far."""
        with self._core.reading(caller, "run:read") as act:
            row = load(act.connection, run)
            act.allow(resources.run(row))
        return _public(row) | {"epsilon_spent": settle(row.plan, row.steps_committed)[0]}

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        with self._core.reading(caller, "run:read") as act:
            rows = act.connection.execute(select(runs).order_by(runs.c.created.desc()).limit(100)).all()
            act.allow(resources.any_run(caller.name))
            return [_public(row) for row in rows if act.permits(resources.run(row))]

    def _manifest(self, act: Action, spec: TrainingSpec) -> tuple[DatasetManifest, Any]:
        """The dataset that a spec means, once policy allows its use: asked about the classes of the columns used."""
        name, version = parse_reference(spec.dataset)
        row = load_dataset(act.connection, name, version)
        act.allow(resources.dataset(act.connection, row), "dataset:read")  # before it is told which columns there are
        manifest = DatasetManifest.parse(row.manifest)
        features, label = _columns(spec, manifest)
        used = [column.sensitivity for column in (*features, label)]
        act.allow(resources.dataset(act.connection, row, used))
        require_live(act.connection, row)
        if manifest.rows("holdout") == 0:
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


def _plan(spec: TrainingSpec, manifest: DatasetManifest) -> PrivacyPlan:
    rows = manifest.rows("train")
    rows_per_unit = DatasetSchema.from_mapping(manifest.dataset_schema).rows_per_unit
    if spec.training.epochs * rows / spec.training.expected_batch_size > MAX_STEPS:
        raise InputError(
            f"a run has at most {MAX_STEPS:,} steps", "lower training.epochs or raise training.expected_batch_size"
        )
    if not _PLANS.acquire(blocking=False):
        raise UnavailableError("other plans are being computed", "try again in a few seconds")
    try:
        with _ACCOUNTING:
            return _cached_plan(
                spec.privacy.epsilon, spec.privacy.delta, spec.privacy.max_grad_norm, spec.training.epochs,
                spec.training.expected_batch_size, rows, rows_per_unit,
            )  # fmt: skip
    finally:
        _PLANS.release()


@lru_cache(maxsize=64)
def _cached_plan(
    epsilon: float, delta: float, max_grad_norm: float, epochs: float, expected_batch_size: int, rows: int,
    rows_per_unit: int,
) -> PrivacyPlan:  # fmt: skip
    return make_plan(
        epsilon=epsilon, delta=delta, max_grad_norm=max_grad_norm, epochs=epochs,
        expected_batch_size=expected_batch_size, rows=rows, rows_per_unit=rows_per_unit,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _epsilon_after(plan: tuple[tuple[str, Any], ...], steps: int) -> float:
    return PrivacyPlan.from_dict(dict(plan)).epsilon_after(steps)


def evaluation_epsilon(plan: dict[str, Any]) -> float:
    """The epsilon of publishing the holdout accuracy. No unit is trained on too, so it composes in parallel."""
    return min(EVALUATION_EPSILON, float(plan["epsilon"]))


def settle(plan: dict[str, Any], steps: int) -> tuple[float, float]:
    """The (epsilon, delta) that `steps` committed steps of a plan cost. Nothing for none; never above the plan."""
    if steps == 0:
        return 0.0, 0.0
    if steps >= plan["steps"]:
        return max(float(plan["epsilon_certified"]), evaluation_epsilon(plan)), float(plan["delta"])
    # Two accountants on two grids: fewer steps never cost more, whatever their last digits say.
    with _ACCOUNTING:
        epsilon = _epsilon_after(tuple(sorted(plan.items())), steps)
    return min(epsilon, float(plan["epsilon"])), float(plan["delta"])


def _unit(manifest: DatasetManifest) -> dict[str, Any]:
    """Whose privacy epsilon is about: `column` is null where it is each row's."""
    schema = DatasetSchema.from_mapping(manifest.dataset_schema)
    column = schema.unit.column if isinstance(schema.unit, Unit) else None
    return {"column": column, "max_rows": schema.rows_per_unit}


def _affordable(budget: dict[str, Any], plan: PrivacyPlan) -> bool:
    # The tolerance is for sums of decimal fractions; it is relative to the total, so it cannot add up.
    return all(
        budget[f"{name}_charged"] + needed <= budget[name] * (1 + 1e-9)
        for name, needed in (("epsilon", plan.epsilon), ("delta", plan.delta))
    )


def _require_budget(budget: dict[str, Any], plan: PrivacyPlan) -> None:
    if not _affordable(budget, plan):
        raise BudgetError(
            f"this run needs epsilon {plan.epsilon:g}, delta {plan.delta:g}; {budget['dataset']} has epsilon "
            f"{budget['epsilon_left']:.3f}, delta {budget['delta_left']:g} left",
            f"lower privacy.epsilon in the spec, or ask the owner: cloister budget set {budget['dataset']}",
        )


def _columns(spec: TrainingSpec, manifest: DatasetManifest) -> tuple[tuple[Column, ...], Column]:
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


def _shard_keys(act: Action, manifest: DatasetManifest, spec: TrainingSpec, rank: int) -> dict[str, bytes]:
    """Only what this rank trains on: its shards, the classes of the columns that are used, never `restricted`."""
    mine = set(manifest.shards("train")[rank :: spec.resources.workers])
    if rank == 0:
        mine |= set(manifest.shards("holdout"))
    features, label = _columns(spec, manifest)
    wanted = {column.sensitivity for column in (*features, label)} - {"restricted"}
    refs = {file.ref for file in manifest.files if file.shard in mine and file.part in wanted}
    rows = keys_of(act.connection, manifest.name, refs)
    if len(rows) != len(refs):
        raise ConflictError(f"the keys of {manifest.name}@{manifest.version} were destroyed", "seal the data again")
    wrapped = [(row.wrapped, key_context(row.name, row.version, row.file)) for row in rows]
    opened = act.keys.unwrap(dataset_key(manifest.name), wrapped)
    return {f"{row.version}/{row.file}": key for row, key in zip(rows, opened, strict=True)}


def _public(row: Any) -> dict[str, Any]:
    return {
        "run": row.id,
        "author": row.author,
        "dataset": f"{row.dataset}@{row.version}",
        "state": row.state,
        "steps": row.plan["steps"],
        "steps_committed": row.steps_committed,
        "steps_done": row.steps_done,
        "rows_per_s": row.rows_per_s,
        "epsilon_planned": row.plan["epsilon"],
        "epsilon_charged": row.epsilon_charged,
        "delta": row.plan["delta"],
        "created": row.created,
        "ended": row.ended,
        "error": row.error,
        "plan": row.plan,
        "spec": row.spec,
    }
