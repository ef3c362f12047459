"""The registry: candidates, what they came from, who approved them, and which one is in production.

Guarantees: a model is registered only by the run that made it, signed (OMS) and with provenance (in-toto) in the same
transaction as its entry; it reaches production only with enough approvals, each signed by the approver's own key
over exactly this model's digest, from distinct people, never its author.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, insert, select, update

from cloister.authority import ledger_seals, resources
from cloister.authority.approvals import Approvals
from cloister.authority.certified import privacy_of
from cloister.authority.core import Action, Caller, Core
from cloister.authority.costs import accounts, curve, replacing
from cloister.authority.data import load as load_dataset
from cloister.authority.key_use import MODELS, RELEASE, model_key_context
from cloister.authority.ledger import Cost
from cloister.authority.runs import load as load_run
from cloister.authority.runs import standing
from cloister.canonical import b64, canonical_json, sha256_hex
from cloister.datasets.manifest import DatasetManifest
from cloister.errors import ConflictError, InputError, IntegrityError, NotFoundError
from cloister.models.manifest import MANIFEST_FILE, MODEL_FILE, ModelManifest
from cloister.models.release import (
    APPROVERS_PREDICATE,
    PRODUCTION,
    PROVENANCE_PREDICATE,
    model_seal_context,
    provenance_digest,
)
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing import purposes
from cloister.sealing.lease import seal_to
from cloister.signing import dsse, oms
from cloister.stores.blobs import Blobs, Stores, check_path
from cloister.stores.tables import identities, models, runs


class Models:
    """Registered models. The key `RELEASE` signs bundles, provenance and the list of approvers."""

    def __init__(self, core: Core, approvals: Approvals, stores: Stores) -> None:
        self._core = core
        self._approvals = approvals
        approvals.on_refused["promotion"] = _refuse
        self._stores = stores

    def register(
        self, caller: Caller, run: str, manifest_bytes: bytes, model_sha256: str, blob: str, blob_sha256: str,
        evaluation: list[list[list[int]]], audit: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Register what a run made as a candidate, and settle the run's charge.

        A noisy histogram of its evaluation, and what its audits saw, the worker may state; everything else is the
        authority's own knowledge.

        Raises:
            ConflictError: the run is not training, or it has steps left.
            InputError: the manifest is not about this run, the blob is not in its folder, or the histogram has another
                shape than the run's evaluation.
            IntegrityError: the audits falsify the run's epsilon, or the store has another model.
        """
        with self._core.reading(caller, "run:work") as asked:
            row = load_run(asked.connection, run)
            asked.allow(resources.run(row))
        check_path(blob, below=f"models/{run}/")
        accounts(row.plan, row.steps_committed, caller.name)  # takes seconds, and is remembered; as this
        replacing(row.plan, row.steps_committed, caller.name)
        curve(row.plan, row.steps_committed, caller.name)
        # Before the transaction: however large the file is, it must not hold the database's lock.
        stored = sha256_hex(_store(self._stores, row).get(blob)) if _is_trained(row) else ""
        with self._core.action(caller, "run:work", step="register") as act:
            row = load_run(act.connection, run)
            act.allow(resources.run(row))
            if not _is_trained(row):
                raise ConflictError(f"{run} is {row.state} after {row.position} steps", "submit a new run")
            manifest, spec = ModelManifest.from_bytes(manifest_bytes), TrainingSpec.parse(row.spec)
            about = (manifest.run, manifest.dataset, manifest.name, manifest.label)
            if about != (run, spec.dataset, spec.model_name, spec.label):
                raise InputError("the model manifest is about another run", "export the model of this run")
            if stored != blob_sha256:
                raise IntegrityError("the stored model is not the one that is registered", "submit the run again")
            name = manifest.name
            version = self._next_version(act.connection, name)
            files = {MODEL_FILE: model_sha256, MANIFEST_FILE: sha256_hex(manifest_bytes)}
            release_key = act.keys.signer(RELEASE)
            bundle = oms.sign_model(name, files, release_key)
            root = oms.verify_model(bundle, files, release_key.public_key())
            cost = Cost.settled(row)
            metrics = self._evaluated(act.connection, row, spec.label, evaluation)
            provenance = _provenance(act, row, name, root, metrics, privacy_of(row, audit))
            act.details.update(model=f"{name}@{version}", root=root, epsilon_charged=cost.epsilon)
            act.connection.execute(
                insert(models).values(
                    name=name,
                    version=version,
                    run=run,
                    author=row.author,
                    stage="candidate",
                    root_digest=root,
                    manifest=manifest_bytes,
                    bundle=bundle,
                    provenance=provenance,
                    blob=blob,
                    blob_sha256=blob_sha256,
                    model_key=row.model_key,
                    seal_context=model_seal_context(run),
                    metrics=metrics,
                    flags=row.flags,
                    created=self._core.clock(),
                )
            )
            with ledger_seals.changing(act, row.ledger):
                act.connection.execute(
                    update(runs)
                    .where(runs.c.id == run)
                    .values(
                        state="finished", steps_done=row.position, ended=self._core.clock(), world_size=0,
                        checkpoint=None, settled=True, **cost.columns(),
                    )
                )  # fmt: skip
        return {"model": f"{name}@{version}", "root_digest": root}

    def _evaluated(
        self, connection: Connection, run: Any, label: str, counts: list[list[list[int]]]
    ) -> dict[str, Any]:  # fmt: skip
        """What a noisy histogram says, and what it is of."""
        manifest = DatasetManifest.parse(load_dataset(connection, run.dataset, run.version).manifest)
        labels, rows = manifest.evaluated(label)
        evaluation = PrivacyPlan.from_dict(run.plan).evaluation(labels, rows)
        if {len(bins) for sides in counts for bins in sides} != {evaluation.bins} or len(counts) != len(labels):
            raise InputError("this is no histogram of the run's evaluation", "register what the run's own code made")
        figures = evaluation.figures(np.array(counts, dtype=np.int64), labels)
        return {
            "holdout_accuracy": figures["accuracy"]["value"], "holdout_rows": evaluation.rows,
            "evaluation_epsilon": evaluation.epsilon, "histogram": counts, **figures,
        }  # fmt: skip

    def _next_version(self, connection: Connection, name: str) -> int:
        query = select(func.coalesce(func.max(models.c.version), 0)).where(models.c.name == name)
        return int(connection.execute(query).scalar_one()) + 1

    def promote(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Make a version the production one, if enough people approved it; otherwise ask for approval.

        Raises:
            ApprovalMissingError: names the open request; the refusal is on record.
            ConflictError: it is in production, or somebody refused it.
        """
        with self._core.action(caller, "model:promote") as act:
            row = load(act.connection, name, version)
            act.allow(resources.model(row))
            if row.stage not in ("candidate", "superseded"):  # superseded: back to a version that was good once
                raise ConflictError(f"{name}@{version} is in {row.stage}", "list the models: cloister model list")
            details = {
                "model": f"{name}@{version}",
                "stage": PRODUCTION,
                "provenance": provenance_digest(row.provenance),
            }
            if row.flags:  # erasures of what it learned from: who approves it has to see them
                details["flags"] = row.flags
            _, good = self._approvals.demand(
                act, "promotion", f"{name}@{version}", details, author=row.author, digest=row.root_digest,
                next_step=f"promote it again: cloister model promote {name}@{version}",
            )  # fmt: skip
            act.connection.execute(
                update(models).where(models.c.name == name, models.c.stage == "production").values(stage="superseded")
            )
            release = {
                "directory": _directory(act, row, good),
                "approvals": [vote.envelope for vote in good],
            }
            mine = (models.c.name == name) & (models.c.version == version)
            act.connection.execute(update(models).where(mine).values(stage="production", release=release))
        return {"model": f"{name}@{version}", "stage": "production", "approvals": [vote.person for vote in good]}

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        with self._core.reading(caller, "model:read") as act:
            act.allow(resources.ANY_MODEL)
            rows = act.connection.execute(select(models).order_by(models.c.name, models.c.version)).all()
            return [_in_a_list(row) for row in rows if act.permits(resources.model(row))]

    def show(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Everything that is public about a model: manifest, bundle, provenance, approvals."""
        with self._core.reading(caller, "model:read") as act:
            row = load(act.connection, name, version)
            act.allow(resources.model(row))
            return _public(row) | self.evidence(act.connection, row)

    def export(self, caller: Caller, name: str, version: int, public_key: bytes) -> dict[str, Any]:
        """Evidence and sealed key of a production model, for a copy outside Cloister. A disclosure, so on record."""
        with self._core.action(caller, "model:export") as act:
            row = load(act.connection, name, version)
            act.allow(resources.model(row))
            act.details["root"] = row.root_digest
            evidence = self.evidence(act.connection, row) | {
                "model": f"{name}@{version}",
                "sealed": self.sealed_key(act, row, public_key, purposes.model_export(name, version)),
            }
        self._core.anchor(act)
        return evidence

    def sealed_key(self, act: Action, row: Any, public_key: bytes, info: bytes) -> str:
        """The model's key, sealed to its receiver (HPKE), as base64."""
        (key,) = act.keys.unwrap(MODELS, [(row.model_key, model_key_context(row.run))])
        return b64(seal_to(public_key, canonical_json({"model_key": b64(key)}), info))

    def evidence(self, connection: Connection, row: Any) -> dict[str, Any]:
        """What a replica needs to verify a release by itself, except the model's bytes and key."""
        release = row.release or {"directory": None, "approvals": []}
        return {
            "manifest": b64(row.manifest),
            "bundle": b64(row.bundle),
            "provenance": row.provenance,
            "directory": release["directory"],
            "approvals": release["approvals"],
            "blobs": _store(self._stores, load_run(connection, row.run)).url,
            "blob": row.blob,
            "blob_sha256": row.blob_sha256,
            "seal_context": row.seal_context,
        }


def _store(stores: Stores, run: Any) -> Blobs:
    """Where a run's model lies: with the data that it was trained on."""
    return stores.for_region(run.attributes["region"])


def _is_trained(run: Any) -> bool:
    return bool(standing(run) == "training" and run.world_size and run.position == run.plan["steps"])


def _refuse(act: Action, request: Any) -> None:
    """A refusal also takes a model out of production: leases and exports end with it."""
    name, _, version = request.subject.partition("@")
    mine = (models.c.name == name) & (models.c.version == int(version))
    act.connection.execute(update(models).where(mine).values(stage="refused"))


def load(connection: Connection, name: str, version: int) -> Any:
    """One model's row.

    Raises:
        NotFoundError: there is none.
    """
    row = connection.execute(select(models).where(models.c.name == name, models.c.version == version)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no model {name}@{version}", "list them: cloister model list")
    return row


def production(connection: Connection, name: str) -> Any:
    """The production version's row.

    Raises:
        NotFoundError: none is in production.
    """
    row = connection.execute(select(models).where(models.c.name == name, models.c.stage == "production")).one_or_none()
    if row is None:
        raise NotFoundError(
            f"no version of {name[:63]} is in production", f"promote one: cloister model promote {name[:63]}@1"
        )
    return row


def _provenance(
    act: Action, run: Any, name: str, root: str, metrics: dict[str, float], privacy: dict[str, Any]
) -> dict[str, Any]:
    dataset = load_dataset(act.connection, run.dataset, run.version)
    predicate = {
        "run": run.id,
        "author": run.author,
        "dataset": {"name": f"{run.dataset}@{run.version}", "digest": dataset.manifest_digest},
        "spec": run.spec,
        "code_digest": run.code_digest,
        "privacy": privacy,
        "metrics": metrics,
        "assurance": "L0",
    }
    return dsse.sign(dsse.statement(name, root, PROVENANCE_PREDICATE, predicate), act.keys.signer(RELEASE))


def _directory(act: Action, row: Any, good: list[Any]) -> dict[str, Any]:
    """Author and approvers with their keys, signed: whom a replica believes."""
    people = [row.author, *(vote.person for vote in good)]
    found = {
        person.name: person
        for person in act.connection.execute(select(identities).where(identities.c.name.in_(people)))
    }
    predicate = {
        "author": _person(found[row.author]),
        "approvers": [_person(found[vote.person]) for vote in good],
    }
    return dsse.sign(
        dsse.statement(row.name, row.root_digest, APPROVERS_PREDICATE, predicate), act.keys.signer(RELEASE)
    )


def _person(row: Any) -> dict[str, Any]:
    return {"person": row.name, "roles": row.roles, "public_key": row.public_key}


def _in_a_list(row: Any) -> dict[str, Any]:
    """Without what is long."""
    shown = _public(row)
    kept = {name: each for name, each in row.metrics.items() if name not in ("histogram", "by_label", "calibration")}
    return shown | {"metrics": kept}


def _public(row: Any) -> dict[str, Any]:
    return {
        "model": f"{row.name}@{row.version}",
        "stage": row.stage,
        "run": row.run,
        "author": row.author,
        "root_digest": row.root_digest,
        "metrics": row.metrics,
        "flags": row.flags,
        "created": row.created,
    }
