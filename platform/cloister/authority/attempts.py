"""The attempts of a run: who may train, on which keys, how far, and from where it goes on when workers died.

Guarantees: one attempt is open at a time, and opening the next ends the one before, whose leases and blocks are refused
from then on; what it committed stays charged. An attempt opens only if the dataset's budget pays for all that the run
then comes to, steps that are run again counted again, and never for more than was approved. Each rank gets its data
keys once an attempt, HPKE-sealed to its one-time key, after the grant is on record. A block of steps is committed
before its noise is released, so a run is charged for every step that can have been seen.
A lease needs the run's key *and* a registered node's certificate, of the dataset's region. Not guaranteed: that a
worker runs the code whose digest it states, if whoever controls its node lies (assurance level L0: software only).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select, update

from cloister.authority import ledger_seals, resources
from cloister.authority.core import Action, Caller, Core
from cloister.authority.costs import again, rest_of, resumes_from
from cloister.authority.data import brief, keys_of, require_live
from cloister.authority.data import load as load_dataset
from cloister.authority.key_use import MODELS, dataset_key, key_context, model_key_context
from cloister.authority.ledger import Cost, reserve
from cloister.authority.populations import ledger_of
from cloister.authority.runs import close, columns_of, load, require_attempts, settle_beforehand, standing
from cloister.canonical import b64, canonical_json
from cloister.datasets.manifest import DatasetManifest
from cloister.datasets.schema import ORDINAL, DatasetSchema, PartName
from cloister.errors import (
    BudgetError,
    CloisterError,
    ConflictError,
    InputError,
    IntegrityError,
    PermissionDeniedError,
)
from cloister.models.release import checkpoint_seal_context, model_seal_context
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing import purposes
from cloister.sealing.envelope import checkpoint_key
from cloister.sealing.lease import seal_to
from cloister.stores.blobs import Stores, check_path
from cloister.stores.tables import datasets, leases, runs

MAX_MANIFESTS = 32
_STALE = "stop this worker"


class Attempts:
    """What a run's own workload asks for while it trains."""

    def __init__(self, core: Core, stores: Stores) -> None:
        self._core = core
        self._stores = stores
        self._manifests: dict[str, DatasetManifest] = {}

    def open(self, caller: Caller, run: str, world_size: int, code_digest: str) -> dict[str, Any]:
        """Open the next attempt, with `world_size` workers, and end the one before. Says from where it goes on, and all
        that is public of the run: workers try on it what they are about to do, before they ask for a key.

        Raises:
            ConflictError: the run is over; or its attempts are used up, which ends it.
            BudgetError: the budget does not pay for what would be run again, which ends it. Its checkpoint is kept.
            InputError: more or fewer workers than the spec says.
        """
        settle_beforehand(self._core, caller, run, again)
        refusal: CloisterError | None = None
        dataset: Any = None
        with self._core.action(caller, "run:work", step="attempt", world_size=world_size) as act:
            row = self._working(act, run, code_digest)
            spec = TrainingSpec.parse(row.spec)
            if not spec.resources.least <= world_size <= spec.resources.workers:
                raise InputError("an attempt has as many workers as the spec says", "start as many, or min_workers")
            resume_from = resumes_from(row)
            number = row.attempt + 1
            act.details.update(attempt=number, resume_from=resume_from)
            try:
                require_attempts(row, spec)
                values = {
                    "state": "training", "attempt": number, "world_size": world_size, "resume_from": resume_from,
                    "position": resume_from, "steps_done": resume_from,
                }  # fmt: skip
                with ledger_seals.changing(act, row.ledger):
                    reserve(act.connection, row, again(row))
                    act.connection.execute(update(runs).where(runs.c.id == run).values(**values))
                dataset, _ = self._leased(act.connection, row)
            except ConflictError as error:
                refusal, act.outcome = error, "failure"
                close(act.connection, run, "failed", error.to_dict(), self._core.clock())
        if refusal:
            raise refusal
        return {
            "attempt": number,
            "resume_from": resume_from,
            "checkpoint": row.checkpoint,
            "manifest": dataset.envelope,
            "owner_key": dataset.owner_key,
            "spec": row.spec,
            "plan": row.plan,
        }

    def lease(
        self, caller: Caller, run: str, attempt: int, rank: int, public_key: bytes, code_digest: str
    ) -> dict[str, Any]:  # fmt: skip
        """Give rank `rank` the keys of its own shards, sealed to its one-time key.

        Raises:
            ConflictError: the attempt is over, or this rank has had its lease.
            BudgetError: what is held for the run does not pay for its rest.
            PermissionDeniedError: the worker runs other code than was submitted.
        """
        settle_beforehand(self._core, caller, run, rest_of)
        with self._core.action(caller, "run:lease", attempt=attempt, rank=rank) as act:
            row = self._working(act, run, code_digest)
            _require_current(row, attempt)
            if not 0 <= rank < row.world_size:
                raise InputError("there is no worker of that rank in the attempt", "start as many as it was opened for")
            mine = (leases.c.run == run) & (leases.c.attempt == attempt) & (leases.c.rank == rank)
            if act.connection.execute(select(leases).where(mine)).first():
                raise ConflictError(
                    f"rank {rank} of {run} has had its lease", "a lease is given once an attempt; open another"
                )
            ledger_seals.require_whole(act, row.ledger)
            if ledger_of(act.connection, brief(act.connection, row.dataset, row.version)) != row.ledger:
                raise IntegrityError(f"{run} is charged to another ledger than that of its data", "see: cloister fsck")
            held = Cost.of(row)
            if held != held.at_least(Cost.of_steps(row.plan, rest_of(row))):
                raise BudgetError(f"what is held for {run} does not pay for its rest", "open another attempt")
            dataset, manifest = self._leased(act.connection, row)
            keys = _shard_keys(act, manifest, row, rank)
            (model_key,) = act.keys.unwrap(MODELS, [(row.model_key, model_key_context(run))])
            payload: dict[str, Any] = {
                "keys": {name: b64(key) for name, key in keys.items()},
                "checkpoint_key": b64(checkpoint_key(model_key)),
            }
            if rank == 0:
                payload["model_key"] = b64(model_key)
            act.details["files"] = ",".join(sorted(keys))[:512]
            act.connection.execute(insert(leases).values(run=run, attempt=attempt, rank=rank,
                                                         created=self._core.clock()))  # fmt: skip
            sealed = seal_to(public_key, canonical_json(payload), purposes.training_lease(run, attempt, rank))
        self._core.anchor(act)
        return {
            "sealed": b64(sealed),
            "manifest": dataset.envelope,
            "owner_key": dataset.owner_key,
            "spec": row.spec,
            "plan": row.plan,
            "blobs": self._stores.for_region(row.attributes["region"]).url,
            "seal_context": model_seal_context(run),
            "checkpoint_context": checkpoint_seal_context(run),
        }

    def commit_block(self, caller: Caller, run: str, attempt: int, first: int, last: int) -> dict[str, Any]:
        """Put steps `first`…`last` on record. Only after this returns may their noise be released.

        Raises:
            ConflictError: the attempt is over, or the block is not its next one.
        """
        with self._core.action(caller, "run:work", step="block", attempt=attempt, first=first, last=last) as act:
            row = self._training(act, run, attempt)
            require_live(act.connection, brief(act.connection, row.dataset, row.version))
            if first != row.position or not first < last <= row.plan["steps"]:
                raise ConflictError("these steps are not the next ones of the plan", _STALE)
            committed = row.steps_committed + last - first
            values = {"position": last, "steps_committed": committed}
            with ledger_seals.changing(act, row.ledger):
                act.connection.execute(update(runs).where(runs.c.id == run).values(**values))
        self._core.anchor(act)  # so that no older state passes for one in which they were not committed
        return {"steps_committed": committed, "position": last}

    def checkpoint(self, caller: Caller, run: str, attempt: int, step: int, blob: str, sha256: str) -> dict[str, Any]:
        """Keep where the next attempt goes on from: the sealed state after `step`, which is stored already.

        Raises:
            ConflictError: the attempt is over, or it has not committed exactly `step`.
            InputError: the blob is not in the run's folder of checkpoints.
        """
        check_path(blob, below=f"models/{run}/checkpoints/")
        with self._core.action(caller, "run:work", step="checkpoint", attempt=attempt, at=step, sha256=sha256) as act:
            row = self._training(act, run, attempt)
            if step != row.position:
                raise ConflictError("this is not the state after the steps that are committed", _STALE)
            kept = {"step": step, "blob": blob, "sha256": sha256}
            act.connection.execute(update(runs).where(runs.c.id == run).values(checkpoint=kept))
        return kept

    def progress(self, caller: Caller, run: str, attempt: int, steps_done: int, rows_per_s: float) -> None:
        """What people watch, after each block: steps, and planned rows over measured time. Realised batch sizes stay in
        the worker.
        """
        with self._core.unlogged(caller, "run:work") as act:
            row = self._training(act, run, attempt)
            if not row.resume_from <= steps_done <= row.position:
                raise InputError("more steps reported than committed", "commit the block first")
            values = {"steps_done": steps_done, "rows_per_s": rows_per_s}
            act.connection.execute(update(runs).where(runs.c.id == run).values(**values))

    def _working(self, act: Action, run: str, code_digest: str) -> Any:
        """The row of a run that is not over, for a worker that says that it runs the code that was submitted."""
        row = load(act.connection, run)
        act.allow(resources.run(row), "run:lease")
        if code_digest != row.code_digest:
            raise PermissionDeniedError("the worker's code is not the code that was submitted", "submit the run again")
        if standing(row) not in ("submitted", "training"):
            raise ConflictError(f"{run} is {standing(row)}", "submit a new run")
        require_live(act.connection, brief(act.connection, row.dataset, row.version))
        return row

    def _training(self, act: Action, run: str, attempt: int) -> Any:
        row = load(act.connection, run)
        act.allow(resources.run(row))
        _require_current(row, attempt)
        return row

    def _leased(self, connection: Connection, run: Any) -> tuple[Any, DatasetManifest]:
        """The run's dataset version with its manifest, which is parsed once: it never changes, and may be long."""
        c = datasets.c
        mine = (c.name == run.dataset) & (c.version == run.version)
        known = connection.execute(select(c.owner_key, c.envelope, c.manifest_digest).where(mine)).one()
        manifest = self._manifests.get(known.manifest_digest)
        if manifest is None:
            manifest = DatasetManifest.parse(load_dataset(connection, run.dataset, run.version).manifest)
            if len(self._manifests) >= MAX_MANIFESTS:
                self._manifests.clear()
            self._manifests[known.manifest_digest] = manifest
        return known, manifest


def _require_current(row: Any, attempt: int) -> None:
    if standing(row) != "training" or not row.world_size:
        raise ConflictError(f"{row.id} is {standing(row)}; no attempt is open", _STALE)
    if attempt != row.attempt:
        raise ConflictError(f"attempt {attempt} of {row.id} is over", _STALE)


def _shard_keys(act: Action, manifest: DatasetManifest, run: Any, rank: int) -> dict[str, bytes]:
    """Only what this rank trains on: its shards, the classes of the columns that are used, never `restricted`; and the
    ordinals, if it is to use fewer rows of a unit than there may be.
    """
    mine = set(manifest.shards("train")[rank :: run.world_size])
    if rank == 0:
        mine |= set(manifest.shards("holdout"))
    features, label = columns_of(TrainingSpec.parse(run.spec), manifest)
    wanted: set[PartName] = {column.sensitivity for column in (*features, label)}
    wanted.discard("restricted")
    schema = DatasetSchema.from_mapping(manifest.dataset_schema)
    if PrivacyPlan.from_dict(run.plan).is_capped(schema.rows_per_unit):
        wanted.add(ORDINAL)
    refs = {file.ref for file in manifest.files if file.shard in mine and file.part in wanted}
    rows = keys_of(act.connection, manifest.name, refs)
    if len(rows) != len(refs):
        raise ConflictError(f"the keys of {manifest.name}@{manifest.version} were destroyed", "seal the data again")
    wrapped = [(row.wrapped, key_context(row.name, row.version, row.file)) for row in rows]
    opened = act.keys.unwrap(dataset_key(manifest.name), wrapped)
    return {f"{row.version}/{row.file}": key for row, key in zip(rows, opened, strict=True)}
