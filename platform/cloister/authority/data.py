"""Sealed datasets and their privacy budgets.

Guarantees: a version is registered whole (manifest, owner's signature, every wrapped key) or not at all; data keys
arrive HPKE-sealed and rest wrapped, each bound to dataset, version and file; a budget is never lowered below what
is spent.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from cloister.authority.core import Caller, Core, Resource
from cloister.canonical import canonical_json, unb64
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest, SealedFile
from cloister.datasets.schema import CLASSES, DatasetSchema
from cloister.errors import BudgetError, ConflictError, InputError, IntegrityError, NotFoundError
from cloister.sealing import purposes
from cloister.sealing.envelope import KEY_BYTES
from cloister.sealing.lease import ReceivingKey
from cloister.signing import dsse
from cloister.signing.keys import ed25519_public_from_pem, key_id
from cloister.stores.blobs import check_path
from cloister.stores.database import budgets, data_keys, datasets, identities, runs


class Datasets:
    """Registered dataset versions."""

    def __init__(self, core: Core, receiving_key: ReceivingKey, blobs_url: str) -> None:
        self._core = core
        self._receiving_key = receiving_key
        self.blobs_url = blobs_url

    def next_version(self, caller: Caller, name: str) -> int:
        """The version that the next seal of `name` gets, if the caller may seal it."""
        with self._core.unlogged(caller, "dataset:seal") as act:
            last = latest(act.connection, name)
            act.allow(dataset_resource(name, last.owner if last else caller.name))
        return last.version + 1 if last else 1

    def register(self, caller: Caller, envelope: dict[str, Any], sealed_keys: bytes) -> dict[str, Any]:
        """Take a sealed version into custody.

        1. the owner's signature over the manifest (DSSE, their registered key); 2. the schema, which the files follow;
        3. policy and version number; 4. the data keys: opened, complete, wrapped; 5. all of it in one transaction
        with its entry.

        Raises:
            IntegrityError: signature, files or keys do not fit the manifest.
            ConflictError: that version exists.
        """
        with self._core.action(caller, "dataset:seal") as act:
            act.allow(dataset_resource("any", caller.name))  # no work for somebody who may not seal anything
            row = act.connection.execute(select(identities).where(identities.c.name == caller.name)).one()
            public = row.public_key.encode()
            verified = dsse.verify(  # 1
                envelope, {key_id(public): ed25519_public_from_pem(public)}, predicate_type=MANIFEST_PREDICATE,
                subject_digest=None,
            )  # fmt: skip
            manifest = DatasetManifest.parse(verified.predicate)
            _check_files(manifest)  # 2
            if verified.statement["subject"][0]["digest"]["sha256"] != manifest.digest.removeprefix("sha256:"):
                raise IntegrityError("the signed digest is not that of the manifest", "seal the data again")
            act.details.update(digest=manifest.digest, files=len(manifest.files), rows=manifest.rows("train"))
            last = latest(act.connection, manifest.name)  # 3
            act.allow(dataset_resource(f"{manifest.name}@{manifest.version}", last.owner if last else caller.name))
            expected = last.version + 1 if last else 1
            if manifest.version != expected:
                raise ConflictError(
                    f"{manifest.name}@{manifest.version} cannot be registered: the next version is {expected}",
                    "seal again",
                )
            keys = self._open_keys(manifest, sealed_keys)  # 4
            act.connection.execute(  # 5
                insert(datasets).values(
                    name=manifest.name,
                    version=manifest.version,
                    owner=caller.name,
                    manifest=manifest.model_dump(mode="json"),
                    manifest_digest=manifest.digest,
                    envelope=envelope,
                    created=self._core.clock(),
                )
            )
            act.connection.execute(
                insert(data_keys),
                [
                    {
                        "name": manifest.name,
                        "version": manifest.version,
                        "file": file.key_name,
                        "wrapped": self._core.keys.wrap(keys[file.key_name], key_context(manifest, file.key_name)),
                    }
                    for file in manifest.files
                ],
            )
        return {"dataset": f"{manifest.name}@{manifest.version}", "digest": manifest.digest}

    def _open_keys(self, manifest: DatasetManifest, sealed_keys: bytes) -> dict[str, bytes]:
        opened = self._receiving_key.open(sealed_keys, purposes.data_keys(manifest.digest))
        listed = dsse.strict_json(opened)
        if not isinstance(listed, dict) or listed.keys() != {file.key_name for file in manifest.files}:
            raise IntegrityError("the data keys are not those of the manifest's files", "seal the data again")
        keys = {name: unb64(value) for name, value in listed.items()}
        if any(len(key) != KEY_BYTES for key in keys.values()) or len(set(keys.values())) != len(keys):
            raise IntegrityError("each file needs its own 256-bit data key", "seal the data again")
        return keys

    def show(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Manifest, owner and budget of one version."""
        with self._core.unlogged(caller, "dataset:read") as act:
            row = load(act.connection, name, version)
            act.allow(dataset_resource(name, row.owner))
            return {
                "dataset": f"{name}@{version}",
                "owner": row.owner,
                "digest": row.manifest_digest,
                "manifest": row.manifest,
                "envelope": row.envelope,
                "owner_key": owner_key(act.connection, row),
                "budget": budget_state(act.connection, name),
            }

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        """Every version that the caller may see."""
        with self._core.unlogged(caller, "dataset:read") as act:
            rows = act.connection.execute(select(datasets).order_by(datasets.c.name, datasets.c.version)).all()
            if not rows:
                act.allow(dataset_resource("any", "nobody"))
            for row in rows:
                act.allow(dataset_resource(row.name, row.owner))
            return [
                {
                    "dataset": f"{row.name}@{row.version}",
                    "owner": row.owner,
                    "rows": DatasetManifest.parse(row.manifest).rows("train")
                    + DatasetManifest.parse(row.manifest).rows("holdout"),
                    "files": len(row.manifest["files"]),
                    "budget": budget_state(act.connection, row.name),
                }
                for row in rows
            ]

    def set_budget(self, caller: Caller, name: str, epsilon: float, delta: float) -> dict[str, Any]:
        """Set the total that all runs on all versions of a dataset may spend.

        Raises:
            BudgetError: less than what is spent or held already.
        """
        with self._core.action(caller, "budget:set", epsilon=epsilon, delta=delta) as act:
            last = latest(act.connection, name)
            if last is None:
                raise NotFoundError(f"there is no dataset {name}", "seal it first: cloister data seal")
            act.allow(dataset_resource(name, last.owner))
            if not (0 < epsilon <= 100 and 0 < delta < 1e-2):
                raise InputError(
                    "a budget has 0 < epsilon <= 100 and 0 < delta < 0.01", "see `cloister budget set --help`"
                )
            charged = charged_so_far(act.connection, name)
            if epsilon * (1 + 1e-9) < charged[0] or delta * (1 + 1e-9) < charged[1]:  # sums of decimal fractions
                raise BudgetError(
                    f"{name} has spent or holds epsilon {charged[0]:.3f} already",
                    "a budget cannot be below what is spent",
                )
            changed = act.connection.execute(
                update(budgets).where(budgets.c.dataset == name).values(epsilon=epsilon, delta=delta)
            )
            if not changed.rowcount:
                act.connection.execute(insert(budgets).values(dataset=name, epsilon=epsilon, delta=delta))
            return budget_state(act.connection, name)

    def budget(self, caller: Caller, name: str) -> dict[str, Any]:
        """The budget, what is left of it, and who spent it."""
        with self._core.unlogged(caller, "dataset:read") as act:
            last = latest(act.connection, name)
            act.allow(dataset_resource(name, last.owner if last else "nobody"))
            if last is None:
                raise NotFoundError(f"there is no dataset {name}", "list them: cloister data list")
            rows = act.connection.execute(select(runs).where(runs.c.dataset == name).order_by(runs.c.created)).all()
            history = [
                {"run": row.id, "author": row.author, "state": row.state, "epsilon": row.epsilon_charged}
                for row in rows
            ]
            return budget_state(act.connection, name) | {"history": history}


def _check_files(manifest: DatasetManifest) -> None:
    """Each shard has one file for each class of the schema, with exactly that class's columns and the same rows.

    What a lease grants is decided by a file's class, and what a plan costs by the number of rows.

    Raises:
        InputError: the manifest contradicts its schema or itself.
    """
    schema = DatasetSchema.from_mapping(manifest.dataset_schema)
    if schema.name != manifest.name:
        raise InputError("manifest and schema name different datasets", "seal the data again")
    wanted = {cls: tuple(column.name for column in schema.columns_of_class(cls)) for cls in CLASSES}
    classes = {cls for cls, columns in wanted.items() if columns}
    shards: dict[str, list[SealedFile]] = {}
    for file in manifest.files:
        check_path(file.path, below=f"datasets/{manifest.name}/")
        if file.columns != wanted[file.sensitivity]:
            raise InputError("a file's columns are not those of its class", "seal the data again")
        shards.setdefault(file.shard, []).append(file)
    for files in shards.values():
        same = len({(file.role, file.rows) for file in files}) == 1
        if not same or {file.sensitivity for file in files} != classes:
            raise InputError("the files of a shard do not fit together", "seal the data again")
    if not manifest.rows("train"):
        raise InputError("there is no row to train on", "seal the data again")


def dataset_resource(name: str, owner: str) -> Resource:
    return Resource(type="Dataset", name=name, attributes={"owner": owner})


def key_context(manifest: DatasetManifest, file: str) -> bytes:
    """What a wrapped data key is bound to."""
    return canonical_json(
        {"use": "cloister.dev/data-key/v1", "dataset": manifest.name, "version": manifest.version, "file": file}
    )


def latest(connection: Connection, name: str) -> Any:
    """The newest version's row, or None."""
    query = select(datasets).where(datasets.c.name == name).order_by(datasets.c.version.desc()).limit(1)
    return connection.execute(query).one_or_none()


def load(connection: Connection, name: str, version: int) -> Any:
    """One version's row.

    Raises:
        NotFoundError: there is none.
    """
    row = connection.execute(
        select(datasets).where(datasets.c.name == name, datasets.c.version == version)
    ).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no dataset {name}@{version}", "list them: cloister data list")
    return row


def owner_key(connection: Connection, row: Any) -> str:
    """The public key (PEM) that signed a version's manifest."""
    return str(connection.execute(select(identities.c.public_key).where(identities.c.name == row.owner)).scalar_one())


def charged_so_far(connection: Connection, name: str) -> tuple[float, float]:
    """Sum of (epsilon, delta) that runs hold or have spent: basic composition over runs."""
    total = select(
        func.coalesce(func.sum(runs.c.epsilon_charged), 0.0), func.coalesce(func.sum(runs.c.delta_charged), 0.0)
    )
    epsilon, delta = connection.execute(total.where(runs.c.dataset == name)).one()
    return float(epsilon), float(delta)


def budget_state(connection: Connection, name: str) -> dict[str, Any]:
    """Total, charged and left; all zero for a dataset without a budget, which therefore cannot be trained on."""
    row = connection.execute(select(budgets).where(budgets.c.dataset == name)).one_or_none()
    epsilon, delta = (row.epsilon, row.delta) if row else (0.0, 0.0)
    spent_epsilon, spent_delta = charged_so_far(connection, name)
    return {
        "dataset": name,
        "epsilon": epsilon,
        "delta": delta,
        "epsilon_charged": spent_epsilon,
        "delta_charged": spent_delta,
        "epsilon_left": max(0.0, epsilon - spent_epsilon),
        "delta_left": max(0.0, delta - spent_delta),
    }
