"""Sealed datasets and their privacy budgets.

Guarantees: a version is registered whole (manifest, owner's signature, every wrapped key) or not at all; data keys
arrive HPKE-sealed and rest wrapped, each bound to dataset, version and file; a budget is never lowered below what
is spent.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from cloister.authority import resources
from cloister.authority.approvals import Approvals
from cloister.authority.core import Action, Caller, Core, Resource
from cloister.authority.identity import signing_key
from cloister.authority.ledger import budget_state, charged_so_far
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
from cloister.stores.tables import budgets, data_keys, datasets, runs


class Datasets:
    """Registered dataset versions."""

    def __init__(self, core: Core, approvals: Approvals, receiving_key: ReceivingKey, blobs_url: str) -> None:
        self._core = core
        self._approvals = approvals
        self._receiving_key = receiving_key
        self.blobs_url = blobs_url

    def next_version(self, caller: Caller, name: str) -> int:
        """The version that the next seal of `name` gets, if the caller may seal it."""
        with self._core.reading(caller, "dataset:seal") as act:
            last = latest(act.connection, name)
            act.allow(_coming(act.connection, name, last, caller))
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
            # No work for somebody who may not seal anything.
            act.allow(resources.new_dataset("any", caller.name))
            public = signing_key(act.connection, caller.name)
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
            act.allow(_coming(act.connection, f"{manifest.name}@{manifest.version}", last, caller))
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
                    owner_key=public.decode(),
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
        with self._core.reading(caller, "dataset:read") as act:
            row = load(act.connection, name, version)
            act.allow(resources.dataset(act.connection, row))
            return {
                "dataset": f"{name}@{version}",
                "owner": row.owner,
                "digest": row.manifest_digest,
                "manifest": row.manifest,
                "envelope": row.envelope,
                "owner_key": row.owner_key,
                "budget": budget_state(act.connection, name),
            }

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        """Every version that the caller may see."""
        with self._core.reading(caller, "dataset:read") as act:
            rows = act.connection.execute(select(datasets).order_by(datasets.c.name, datasets.c.version)).all()
            act.allow(resources.new_dataset("any", caller.name))
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
                if act.permits(resources.dataset(act.connection, row))
            ]

    def set_budget(self, caller: Caller, name: str, epsilon: float, delta: float) -> dict[str, Any]:
        """Set the total that all runs on all versions of a dataset may spend. To raise it takes approval.

        Raises:
            BudgetError: less than what is spent or held already.
            ApprovalMissingError: more than it was, and not enough others agreed; names the request.
        """
        with self._core.action(caller, "budget:set", epsilon=epsilon, delta=delta) as act:
            last = latest(act.connection, name)
            if last is None:
                raise NotFoundError(f"there is no dataset {name}", "seal it first: cloister data seal")
            act.allow(resources.dataset(act.connection, last))
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
            before = budget_state(act.connection, name)
            if before["epsilon"] and (epsilon > before["epsilon"] or delta > before["delta"]):
                self._approve_raise(act, last, before, epsilon, delta)
            changed = act.connection.execute(
                update(budgets).where(budgets.c.dataset == name).values(epsilon=epsilon, delta=delta)
            )
            if not changed.rowcount:
                act.connection.execute(insert(budgets).values(dataset=name, epsilon=epsilon, delta=delta))
            return budget_state(act.connection, name)

    def _approve_raise(self, act: Action, row: Any, before: dict[str, Any], epsilon: float, delta: float) -> None:
        if not self._approvals.required.budget:
            return
        details = {
            "dataset": row.name, "epsilon": [before["epsilon"], epsilon], "delta": [before["delta"], delta],
        }  # fmt: skip
        next_step = f"set it again: cloister budget set {row.name}"
        self._approvals.demand(act, "budget", f"budget of {row.name}", details, owner=row.owner, next_step=next_step)

    def destroy_keys(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Destroy a version's data keys, for good: every copy and backup of its files is noise from then on.

        Raises:
            ApprovalMissingError: not enough others agreed; names the request.
            ConflictError: they are destroyed already.
        """
        with self._core.action(caller, "key:destroy") as act:
            row = load(act.connection, name, version)
            act.allow(resources.dataset(act.connection, row))
            mine = (data_keys.c.name == name) & (data_keys.c.version == version)
            if act.connection.execute(select(data_keys.c.file).where(mine).limit(1)).first() is None:
                raise ConflictError(f"the keys of {name}@{version} are destroyed already", "nothing to do")
            details = {"dataset": f"{name}@{version}", "manifest": row.manifest_digest}
            self._approvals.demand(
                act, "key-destruction", f"keys of {name}@{version}", details, owner=row.owner,
                next_step=f"destroy them: cloister key destroy {name}@{version}",
            )  # fmt: skip
            act.details["keys"] = act.connection.execute(delete(data_keys).where(mine)).rowcount
        self._core.database.scrub()
        return {"dataset": f"{name}@{version}", "keys_destroyed": act.details["keys"]}

    def budget(self, caller: Caller, name: str) -> dict[str, Any]:
        """The budget, what is left of it, and who spent it."""
        with self._core.reading(caller, "dataset:read") as act:
            last = latest(act.connection, name)
            act.allow(resources.dataset(act.connection, last) if last else resources.new_dataset(name, ""))
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


def _coming(connection: Connection, name: str, last: Any, caller: Caller) -> Resource:
    """The next version of what is `last` now: its owner's, or the caller's if there is none yet."""
    return resources.dataset(connection, last) if last else resources.new_dataset(name, caller.name)


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
