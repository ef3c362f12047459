"""The registry: candidates, what they came from, who approved them, and which one is in production.

Guarantees: a model is registered only by the run that made it, signed (OMS) and with provenance (in-toto) in the same
transaction as its entry; it reaches production only with enough approvals, each signed by the approver's own key
over exactly this model's digest, from distinct people, never its author.
"""

from __future__ import annotations

import secrets
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from sqlalchemy import Connection, func, insert, select, update

from cloister.authority.core import Action, Caller, Core, Resource
from cloister.authority.data import load as load_dataset
from cloister.authority.runs import evaluation_epsilon, model_key_context, run_resource, settle
from cloister.authority.runs import load as load_run
from cloister.canonical import b64, canonical_json, sha256_hex
from cloister.datasets.manifest import DatasetManifest
from cloister.errors import ApprovalMissingError, ConflictError, InputError, IntegrityError, NotFoundError
from cloister.models.manifest import MANIFEST_FILE, MODEL_FILE, ModelManifest
from cloister.models.release import (
    APPROVAL_LIFETIME_S,
    APPROVAL_PREDICATE,
    APPROVERS_PREDICATE,
    PRODUCTION,
    PROVENANCE_PREDICATE,
    REQUIRED_APPROVALS,
    model_seal_context,
    provenance_digest,
)
from cloister.privacy.spec import TrainingSpec
from cloister.sealing import purposes
from cloister.sealing.lease import seal_to
from cloister.signing import dsse, oms
from cloister.signing.keys import ed25519_public_from_pem, key_id
from cloister.stores.blobs import FolderBlobs, check_path
from cloister.stores.database import approvals, identities, models, runs, votes


class Models:
    """Registered models. `release_key` signs bundles, provenance and the list of approvers."""

    def __init__(self, core: Core, release_key: EllipticCurvePrivateKey, blobs: FolderBlobs) -> None:
        self._core = core
        self._blobs = blobs
        self._release_key = release_key

    def register(
        self, caller: Caller, run: str, manifest_bytes: bytes, model_sha256: str, blob: str, blob_sha256: str,
        holdout_accuracy: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Register what a run made as a candidate, and settle the run's charge.

        The accuracy is the one figure that the worker may state; everything else is the authority's own knowledge.

        Raises:
            ConflictError: the run is not training, or it has steps left.
            InputError: the manifest is not about this run, or the blob is not in its folder.
        """
        with self._core.action(caller, "run:work", step="register") as act:
            row = load_run(act.connection, run)
            act.allow(run_resource(row))
            if row.state != "training" or row.steps_committed != row.plan["steps"]:
                raise ConflictError(f"{run} is {row.state} after {row.steps_committed} steps", "submit a new run")
            manifest, spec = ModelManifest.from_bytes(manifest_bytes), TrainingSpec.parse(row.spec)
            about = (manifest.run, manifest.dataset, manifest.name, manifest.label)
            if about != (run, spec.dataset, spec.model_name, spec.label):
                raise InputError("the model manifest is about another run", "export the model of this run")
            check_path(blob, below=f"models/{run}/")
            if sha256_hex(self._blobs.get(blob)) != blob_sha256:
                raise IntegrityError("the stored model is not the one that is registered", "submit the run again")
            name = manifest.name
            version = self._next_version(act.connection, name)
            files = {MODEL_FILE: model_sha256, MANIFEST_FILE: sha256_hex(manifest_bytes)}
            bundle = oms.sign_model(name, files, self._release_key)
            root = oms.verify_model(bundle, files, self._release_key.public_key())
            epsilon, delta = settle(row.plan, row.steps_committed)
            metrics = {
                "holdout_accuracy": holdout_accuracy,
                "holdout_rows": self._holdout_rows(act.connection, row),
                "evaluation_epsilon": evaluation_epsilon(row.plan),
            }
            provenance = self._provenance(act.connection, row, name, root, epsilon, metrics)
            act.details.update(model=f"{name}@{version}", root=root, epsilon_charged=epsilon)
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
                    created=self._core.clock(),
                )
            )
            act.connection.execute(
                update(runs)
                .where(runs.c.id == run)
                .values(
                    state="finished", steps_done=row.steps_committed, ended=self._core.clock(),
                    epsilon_charged=epsilon, delta_charged=delta,
                )
            )  # fmt: skip
        return {"model": f"{name}@{version}", "root_digest": root}

    def _provenance(
        self, connection: Connection, run: Any, name: str, root: str, epsilon: float, metrics: dict[str, float]
    ) -> dict[str, Any]:
        dataset = load_dataset(connection, run.dataset, run.version)
        predicate = {
            "run": run.id,
            "author": run.author,
            "dataset": {"name": f"{run.dataset}@{run.version}", "digest": dataset.manifest_digest},
            "spec": run.spec,
            "code_digest": run.code_digest,
            "privacy": {"epsilon": epsilon, "delta": run.plan["delta"], "plan": run.plan},
            "metrics": metrics,
            "assurance": "L0",
        }
        return dsse.sign(dsse.statement(name, root, PROVENANCE_PREDICATE, predicate), self._release_key)

    def _holdout_rows(self, connection: Connection, run: Any) -> int:
        return DatasetManifest.parse(load_dataset(connection, run.dataset, run.version).manifest).rows("holdout")

    def _next_version(self, connection: Connection, name: str) -> int:
        query = select(func.coalesce(func.max(models.c.version), 0)).where(models.c.name == name)
        return int(connection.execute(query).scalar_one()) + 1

    def promote(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Make a version the production one, if enough people approved it; otherwise ask for approval.

        Raises:
            ApprovalMissingError: names the open request; the refusal is on record.
        """
        missing = ""
        with self._core.action(caller, "model:promote") as act:
            row = load(act.connection, name, version)
            act.allow(model_resource(row))
            if row.stage not in ("candidate", "superseded"):  # superseded: back to a version that was good once
                raise ConflictError(f"{name}@{version} is in {row.stage}", "list the models: cloister model list")
            good, refused = self._votes(act.connection, row)
            if refused:
                raise ConflictError(
                    f"{name}@{version} was refused by {', '.join(refused)}", "train a new version; a refusal is final"
                )
            if len(good) < REQUIRED_APPROVALS:
                missing = self._request(act, row, caller)
                act.outcome = "denied"
                act.details.update(approval=missing, approvals=len(good), required=REQUIRED_APPROVALS)
            else:
                act.details["approvals"] = len(good)
                mine = (models.c.name == name) & (models.c.version == version)
                act.connection.execute(
                    update(models)
                    .where(models.c.name == name, models.c.stage == "production")
                    .values(stage="superseded")
                )
                act.connection.execute(update(models).where(mine).values(stage="production"))
        if missing:
            raise ApprovalMissingError(
                f"{name}@{version} has {len(good)} of {REQUIRED_APPROVALS} approvals that it needs",
                f"a reviewer who is not its author runs: cloister approve {missing}",
            )
        return {"model": f"{name}@{version}", "stage": "production", "approvals": [vote.person for vote in good]}

    def _request(self, act: Action, row: Any, caller: Caller) -> str:
        now = self._core.clock()
        open_request = act.connection.execute(
            select(approvals).where(
                approvals.c.model == row.name, approvals.c.version == row.version,
                approvals.c.root_digest == row.root_digest, approvals.c.expires > now,
            )
        ).first()  # fmt: skip
        if open_request:
            return str(open_request.id)
        approval = "apr-" + secrets.token_hex(4)
        act.connection.execute(
            insert(approvals).values(
                id=approval, model=row.name, version=row.version, root_digest=row.root_digest,
                requested_by=caller.name, expires=now + APPROVAL_LIFETIME_S, created=now,
            )
        )  # fmt: skip
        return approval

    def _votes(self, connection: Connection, row: Any) -> tuple[list[Any], list[str]]:
        """Unexpired approvals of this digest by people other than the author, and who refused it."""
        query = (
            select(votes)
            .join(approvals, approvals.c.id == votes.c.approval)
            .where(
                approvals.c.model == row.name, approvals.c.version == row.version,
                approvals.c.root_digest == row.root_digest, approvals.c.expires > self._core.clock(),
            )
        )  # fmt: skip
        rows = connection.execute(query).all()
        refused = sorted(vote.person for vote in rows if vote.decision != "approve")
        good = {vote.person: vote for vote in rows if vote.decision == "approve" and vote.person != row.author}
        return list(good.values()), refused

    def approvals(self, caller: Caller) -> list[dict[str, Any]]:
        """Requests that have not expired, with their votes."""
        with self._core.unlogged(caller, "model:read") as act:
            act.allow(Resource(type="Model", name="any", attributes={"author": "nobody", "stage": "candidate"}))
            rows = act.connection.execute(
                select(approvals).where(approvals.c.expires > self._core.clock()).order_by(approvals.c.created)
            ).all()
            return [self._approval(act.connection, row) for row in rows]

    def _approval(self, connection: Connection, row: Any) -> dict[str, Any]:
        cast = connection.execute(select(votes).where(votes.c.approval == row.id)).all()
        return {
            "approval": row.id,
            "model": f"{row.model}@{row.version}",
            "root_digest": row.root_digest,
            "provenance": provenance_digest(load(connection, row.model, row.version).provenance),
            "requested_by": row.requested_by,
            "expires": row.expires,
            "votes": [{"person": vote.person, "decision": vote.decision} for vote in cast],
        }

    def vote(self, caller: Caller, approval: str, envelope: dict[str, Any]) -> dict[str, Any]:
        """Take a reviewer's signed decision.

        Raises:
            PermissionDeniedError: the author, or not a reviewer.
            IntegrityError: not signed by the caller's own key, or about something else.
        """
        with self._core.action(caller, "model:approve", approval=approval[:40]) as act:
            request = act.connection.execute(select(approvals).where(approvals.c.id == approval)).one_or_none()
            if request is None or request.expires <= self._core.clock():
                raise NotFoundError("there is no such open approval", "list them: cloister approvals list")
            row = load(act.connection, request.model, request.version)
            act.allow(model_resource(row))
            person = act.connection.execute(select(identities).where(identities.c.name == caller.name)).one()
            public = person.public_key.encode()
            verified = dsse.verify(
                envelope, {key_id(public): ed25519_public_from_pem(public)}, predicate_type=APPROVAL_PREDICATE,
                subject_digest=request.root_digest,
            )  # fmt: skip
            said = verified.predicate
            about = {name: said.get(name) for name in ("approval", "person", "stage", "expires", "provenance")}
            if about != {
                "approval": approval,
                "person": caller.name,
                "stage": PRODUCTION,
                "expires": int(request.expires),
                "provenance": provenance_digest(row.provenance),
            }:
                raise IntegrityError("the signed decision is about another request", "run cloister approve again")
            decision = said.get("decision")
            if decision not in ("approve", "deny"):
                raise InputError("a decision is 'approve' or 'deny'", "run cloister approve or cloister deny")
            if act.connection.execute(
                select(votes).where(votes.c.approval == approval, votes.c.person == caller.name)
            ).first():
                raise ConflictError("you have decided on this already", "a decision is final; ask for a new request")
            act.details.update(decision=decision, root=request.root_digest)
            act.connection.execute(
                insert(votes).values(
                    approval=approval,
                    person=caller.name,
                    decision=decision,
                    envelope=envelope,
                    created=self._core.clock(),
                )
            )
            if decision == "deny":  # also takes a model out of production: leases and exports end with it
                mine = (models.c.name == row.name) & (models.c.version == row.version)
                act.connection.execute(update(models).where(mine).values(stage="refused"))
            return self._approval(act.connection, request)

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        with self._core.unlogged(caller, "model:read") as act:
            act.allow(Resource(type="Model", name="any", attributes={"author": "nobody", "stage": "candidate"}))
            rows = act.connection.execute(select(models).order_by(models.c.name, models.c.version)).all()
        return [_public(row) for row in rows]

    def show(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Everything that is public about a model: manifest, bundle, provenance, approvals."""
        with self._core.unlogged(caller, "model:read") as act:
            row = load(act.connection, name, version)
            act.allow(model_resource(row))
            return _public(row) | self.evidence(act.connection, row)

    def export(self, caller: Caller, name: str, version: int, public_key: bytes) -> dict[str, Any]:
        """Evidence and sealed key of a production model, for a copy outside Cloister. A disclosure, so on record."""
        with self._core.action(caller, "model:export") as act:
            row = load(act.connection, name, version)
            act.allow(model_resource(row))
            act.details["root"] = row.root_digest
            return self.evidence(act.connection, row) | {
                "sealed": self.sealed_key(row, public_key, purposes.model_export(name, version))
            }

    def sealed_key(self, row: Any, public_key: bytes, info: bytes) -> str:
        """The model's key, sealed to its receiver (HPKE), as base64."""
        key = self._core.keys.unwrap(row.model_key, model_key_context(row.run))
        return b64(seal_to(public_key, canonical_json({"model_key": b64(key)}), info))

    def evidence(self, connection: Connection, row: Any) -> dict[str, Any]:
        """What a replica needs to verify a release by itself, except the model's bytes and key."""
        good, _ = self._votes(connection, row)
        people = [row.author, *(vote.person for vote in good)]
        found = {
            person.name: person
            for person in connection.execute(select(identities).where(identities.c.name.in_(people)))
        }
        predicate = {
            "author": _person(found[row.author]),
            "approvers": [_person(found[vote.person]) for vote in good],
        }
        directory = dsse.sign(
            dsse.statement(row.name, row.root_digest, APPROVERS_PREDICATE, predicate), self._release_key
        )
        return {
            "manifest": b64(row.manifest),
            "bundle": b64(row.bundle),
            "provenance": row.provenance,
            "directory": directory,
            "approvals": [vote.envelope for vote in good],
            "blob": row.blob,
            "blob_sha256": row.blob_sha256,
            "seal_context": row.seal_context,
        }


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


def model_resource(row: Any) -> Resource:
    attributes = {"author": row.author, "stage": row.stage}
    return Resource(type="Model", name=f"{row.name}@{row.version}", attributes=attributes)


def _person(row: Any) -> dict[str, Any]:
    return {"person": row.name, "roles": row.roles, "public_key": row.public_key}


def _public(row: Any) -> dict[str, Any]:
    return {
        "model": f"{row.name}@{row.version}",
        "stage": row.stage,
        "run": row.run,
        "author": row.author,
        "root_digest": row.root_digest,
        "metrics": row.metrics,
        "created": row.created,
    }
