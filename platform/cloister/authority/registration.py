"""Taking sealed versions into custody, and giving owners the keys that making one takes.

Guarantees: a version is registered whole (manifest, owner's signature, every wrapped key) or not at all, and only if it
follows from those before it (`cloister.datasets.lineage`); data keys arrive HPKE-sealed and rest wrapped, each bound to
dataset, version and file; keys go to a dataset's owner alone, HPKE-sealed to a one-time key, after the grant is on
record and anchored. What an erasure or a correction ends is destroyed in the transaction that registers it.

The keys of a dataset's subjects are derived from its name and its owner's: whoever asks for those of a name that
somebody else takes later has none of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, insert, select

from cloister.authority import resources
from cloister.authority.core import Action, Caller, Core, Resource
from cloister.authority.data import keys_of, latest, live_versions, load, require_live
from cloister.authority.identity import signing_key
from cloister.authority.key_use import dataset_key, key_context
from cloister.authority.lifecycle import Lifecycle
from cloister.authority.overlap import Overlap
from cloister.authority.shredding import Shredding
from cloister.canonical import b64, canonical_json, unb64
from cloister.datasets.erasure import Reason
from cloister.datasets.lineage import check_ends, check_lineage
from cloister.datasets.manifest import (
    MANIFEST_PREDICATE,
    NAME_PATTERN,
    DatasetManifest,
    SealedFile,
    parse_reference,
)
from cloister.datasets.schema import INDEX, ORDINAL, DatasetSchema
from cloister.errors import CloisterError, ConflictError, InputError, IntegrityError, NotFoundError
from cloister.sealing import purposes
from cloister.sealing.envelope import KEY_BYTES
from cloister.sealing.lease import ReceivingKey, seal_to
from cloister.signing import dsse
from cloister.signing.keys import ed25519_public_from_pem, key_id
from cloister.stores.blobs import Stores, check_path
from cloister.stores.tables import data_keys, datasets

SUBJECTS = "subjects"
"""The key that those of every dataset's subjects are derived from."""
# A signed manifest's payload of 36 MiB of `[],[],…` would be gigabytes of objects. 50,000 files have 600,000 commas.
MAX_MANIFEST_COMMAS = 2_000_000
_ACTIONS = {"erase": "dataset:erase", "rectify": "dataset:rectify"}


@dataclass(frozen=True, slots=True)
class _Signed:
    """A manifest that was read with the owner's public key `public` (PEM)."""

    manifest: DatasetManifest
    public: bytes
    taken: frozenset[str]
    """Of the paths of its new files, those that a version of that name lists or listed, `after` being the newest."""
    after: int


class Registration:
    """How versions come about. `receiving_key` is what owners seal data keys to."""

    def __init__(
        self, core: Core, receiving_key: ReceivingKey, stores: Stores, lifecycle: Lifecycle, shredding: Shredding,
        overlap: Overlap,
    ) -> None:  # fmt: skip
        self._core = core
        self._receiving_key = receiving_key
        self._stores = stores
        self._lifecycle = lifecycle
        self._shredding = shredding
        self._overlap = overlap

    def sealing(
        self, caller: Caller, name: str, kind: Literal["seal", "append"], region: str, public_key: bytes
    ) -> dict[str, Any]:
        """What sealing the coming version of `name` takes: its number, its store, the keys of its subjects; and for
        appending the newest live version, with the keys of its indexes and ordinals, so that no unit gets more rows
        than it may, nor two rows of one number.

        Raises:
            InputError: there is no store for that region, or it is not the one of the version to append to.
            NotFoundError: there is no live version to append to.
        """
        with self._core.action(caller, "dataset:seal", step="keys", kind=kind) as act:
            last = latest(act.connection, name)
            act.allow(_coming(act.connection, name, last, caller))
            if not re.fullmatch(NAME_PATTERN, name):
                raise InputError("a dataset's name has small letters, digits and hyphens", "rename it in its schema")
            store = self._stores.for_region(region)
            parent = self._parent(act.connection, name, region) if kind == "append" else None
            files = DatasetManifest.parse(parent.manifest).files if parent else ()
            needed = [file.ref for file in files if file.part in (INDEX, ORDINAL)]
            answer = self._sealed(act, name, last, caller, needed, public_key) | {
                "blobs": store.url,
                "parent": _public(parent) if parent else None,
            }
        self._core.anchor(act)
        return answer

    def _parent(self, connection: Connection, name: str, region: str) -> Any:
        live = live_versions(connection, name)
        if not live:
            raise NotFoundError(f"there is no live version of {name} to append to", "seal it: cloister data seal")
        if live[-1].schema["region"] != region:
            raise InputError(f"{name} is held in region {live[-1].schema['region']}", "append under the same schema")
        return live[-1]

    def openings(
        self, caller: Caller, name: str, purpose: str, files: list[str] | None, public_key: bytes
    ) -> dict[str, Any]:
        """The keys of `files` (`SealedFile.ref`) of live versions, for their owner; of all their indexes by default.

        Raises:
            NotFoundError: there is no live version.
            InputError: a file that no live version lists.
        """
        with self._core.action(caller, "dataset:open", purpose=purpose) as act:
            last = latest(act.connection, name)
            act.allow(_coming(act.connection, name, last, caller))
            live = live_versions(act.connection, name)
            if not live:
                raise NotFoundError(f"there is no live version of {name}", "list them: cloister data list")
            listed = {file.ref: file for row in live for file in DatasetManifest.parse(row.manifest).files}
            wanted = {ref for ref, file in listed.items() if file.part == INDEX} if files is None else set(files)
            if not wanted <= listed.keys():
                raise InputError("a file is asked for that no live version has", "ask for the indexes first")
            act.details["files"] = len(wanted)
            answer = self._sealed(act, name, last, caller, wanted, public_key) | {
                "blobs": self._stores.for_region(live[-1].schema["region"]).url,
                "versions": [
                    _public(row) | {"blobs": self._stores.for_region(row.schema["region"]).url} for row in live
                ],
            }
        self._core.anchor(act)
        return answer

    def _sealed(
        self, act: Action, name: str, last: Any, caller: Caller, refs: Iterable[str], public_key: bytes
    ) -> dict[str, Any]:
        """The coming version and its keys, sealed. They may leave once the entry of `act` is anchored."""
        version, owner = (last.version + 1, last.owner) if last else (1, caller.name)
        keys = {f"{use}_key": b64(_subject_key(act, name, owner, use)) for use in ("pseudonym", "index")}
        rows, wanted = keys_of(act.connection, name, refs), set(refs)
        if len(rows) != len(wanted):
            raise ConflictError(f"keys of {name} were destroyed", "list what is live: cloister data list")
        opened = act.keys.unwrap(
            dataset_key(name), [(row.wrapped, key_context(name, row.version, row.file)) for row in rows]
        )
        files = {f"{row.version}/{row.file}": b64(key) for row, key in zip(rows, opened, strict=True)}
        sealed = seal_to(public_key, canonical_json({**keys, "files": files}), purposes.sealing(name, version))
        return {"version": version, "sealed": b64(sealed)}

    def register(
        self, caller: Caller, envelope: dict[str, Any], sealed_keys: bytes, ends: list[str], reason: Reason | None
    ) -> dict[str, Any]:
        """Take a sealed version into custody, and destroy what it ends.

        1. the owner's signature over the manifest (DSSE, their registered key); 2. the schema, which the files follow;
        3. policy, version number and lineage; 4. the data keys: opened, complete, wrapped; 5. all of it in one
        transaction with its entry; 6. for an erasure or a correction, the certificate.

        Raises:
            IntegrityError: signature, files or keys do not fit the manifest.
            ConflictError: that version exists, or it follows one that is not the newest any more.
        """
        read = self._read(caller, envelope)
        kind = read.manifest.lineage.kind if isinstance(read, _Signed) else "seal"
        if ends and isinstance(read, _Signed):
            self._lifecycle.account_beforehand(caller, read.manifest, set(ends))
        with self._core.action(caller, _ACTIONS.get(kind, "dataset:seal")) as act:
            # No work for somebody who may not seal anything.
            act.allow(resources.new_dataset("any", caller.name))
            if isinstance(read, CloisterError):
                raise read
            manifest, public = read.manifest, read.public
            if signing_key(act.connection, caller.name) != public:
                raise ConflictError("your key changed at this moment", "seal again")
            schema = DatasetSchema.from_mapping(manifest.dataset_schema)
            act.details.update(digest=manifest.digest, files=len(manifest.files), rows=manifest.published_rows("train"))
            last = latest(act.connection, manifest.name)  # 3
            act.allow(_coming(act.connection, f"{manifest.name}@{manifest.version}", last, caller))
            expected = last.version + 1 if last else 1
            if manifest.version != expected or read.after + 1 != expected:
                raise ConflictError(
                    f"{manifest.name}@{manifest.version} cannot be registered: the next version is {expected}",
                    "seal again",
                )
            self._stores.for_region(schema.region)
            before = [] if kind == "seal" else live_versions(act.connection, manifest.name)
            check_lineage(manifest, [DatasetManifest.parse(row.manifest) for row in before], set(ends), read.taken)
            _check_parents(act, manifest)
            keys = self._open_keys(manifest, sealed_keys)  # 4
            self._insert(act, read, envelope, schema, before)  # 5
            self._wrap(act, manifest, keys)
            asked = self._overlap.register(act, latest(act.connection, manifest.name))
            erasure = self._lifecycle.replace(act, manifest, before, set(ends), reason) if ends else None
        done = {"dataset": f"{manifest.name}@{manifest.version}", "digest": manifest.digest, "population": asked}
        return done | (self._shredding.finished(act, erasure) if erasure else {})  # 6

    def end(self, caller: Caller, name: str, version: int, ends: list[str], reason: Reason | None) -> dict[str, Any]:
        """Destroy files of older live versions, as an erasure that the newest one needs none for. `version` is the one
        that was coming when they were searched: rows that were registered since were not.

        Raises:
            ConflictError: the newest live version lists one of them: it needs a successor; or another one came since.
        """
        with self._core.action(caller, "dataset:erase") as act:
            last = latest(act.connection, name)
            act.allow(_coming(act.connection, name, last, caller))
            if version != (last.version + 1 if last else 1):
                raise ConflictError(
                    f"{name} has another version by now, which was not searched",
                    f"erase again; nothing was changed: cloister data erase {name}",
                )
            rows = live_versions(act.connection, name)
            live = [DatasetManifest.parse(row.manifest) for row in rows]
            check_ends(live, set(ends))
            if not ends or set(ends) & {file.ref for file in live[-1].files}:
                raise ConflictError(
                    "an erasure leaves a live version", f"to destroy all of it: cloister key destroy {name}@VERSION"
                )
            erasure = self._lifecycle.replace(act, None, rows, set(ends), reason)
        return self._shredding.finished(act, erasure)

    def _read(self, caller: Caller, envelope: dict[str, Any]) -> _Signed | CloisterError:
        """1 and 2, or why not. A manifest may be long: reading it must not hold the database's lock."""
        with self._core.reading(caller, "dataset:seal") as asked:
            asked.allow(resources.new_dataset("any", caller.name))
        try:
            with self._core.database.reading() as connection:
                public = signing_key(connection, caller.name)
            if unb64(str(envelope.get("payload", ""))).count(b",") > MAX_MANIFEST_COMMAS:
                raise InputError("the manifest has too many values", "seal with fewer shards")
            verified = dsse.verify(  # 1
                envelope, {key_id(public): ed25519_public_from_pem(public)}, predicate_type=MANIFEST_PREDICATE,
                subject_digest=None,
            )  # fmt: skip
            manifest = DatasetManifest.parse(verified.predicate)
            _check_files(manifest)  # 2
            if verified.statement["subject"][0]["digest"]["sha256"] != manifest.digest.removeprefix("sha256:"):
                raise IntegrityError("the signed digest is not that of the manifest", "seal the data again")
            own = {file.path for file in manifest.files if file.sealed_in == manifest.version}
            with self._core.database.reading() as connection:
                last = latest(connection, manifest.name)
                taken = frozenset(own.intersection(_paths(connection, manifest.name)))
            return _Signed(manifest, public, taken, last.version if last else 0)
        except CloisterError as error:
            return error

    def _insert(
        self, act: Action, signed: _Signed, envelope: dict[str, Any], schema: DatasetSchema, before: list[Any]
    ) -> None:
        manifest, now = signed.manifest, self._core.clock()
        known = act.connection.execute(
            select(datasets.c.version, datasets.c.files_due).where(datasets.c.name == manifest.name)
        )
        due = {row.version: float(row.files_due) for row in known}
        due[manifest.version] = _files_due(manifest, schema, before, due, now)
        act.connection.execute(
            insert(datasets).values(
                name=manifest.name,
                version=manifest.version,
                owner=act.caller.name,
                owner_key=signed.public.decode(),
                schema=manifest.dataset_schema,
                kind=manifest.lineage.kind,
                parents=list(manifest.lineage.parents),
                rows=manifest.published_total,
                files=len(manifest.files),
                manifest=manifest.model_dump(mode="json"),
                manifest_digest=manifest.digest,
                envelope=envelope,
                created=now,
                files_due=due[manifest.version],
                due=min(due[version] for version in {file.sealed_in for file in manifest.files}),
            )
        )

    def _wrap(self, act: Action, manifest: DatasetManifest, keys: dict[str, bytes]) -> None:
        names = sorted(keys)
        wrapped = act.keys.wrap(
            dataset_key(manifest.name),
            [(keys[each], key_context(manifest.name, manifest.version, each)) for each in names],
        )
        rows = [
            {"name": manifest.name, "version": manifest.version, "file": each, "wrapped": sealed}
            for each, sealed in zip(names, wrapped, strict=True)
        ]
        if rows:  # an erasure may only drop shards
            act.connection.execute(insert(data_keys), rows)

    def _open_keys(self, manifest: DatasetManifest, sealed_keys: bytes) -> dict[str, bytes]:
        """The keys of the files that were sealed in this version."""
        opened = self._receiving_key.open(sealed_keys, purposes.data_keys(manifest.digest))
        listed = dsse.strict_json(opened)
        own = {file.key_name for file in manifest.files if file.sealed_in == manifest.version}
        if not isinstance(listed, dict) or listed.keys() != own:
            raise IntegrityError("the data keys are not those of the manifest's files", "seal the data again")
        keys = {name: unb64(value) for name, value in listed.items()}
        if any(len(key) != KEY_BYTES for key in keys.values()) or len(set(keys.values())) != len(keys):
            raise IntegrityError("each file needs its own 256-bit data key", "seal the data again")
        return keys


def _subject_key(act: Action, name: str, owner: str, use: str) -> bytes:
    context = {"use": "cloister.dev/subject-key/v1", "dataset": name, "owner": owner, "key": use}
    return act.keys.derive(SUBJECTS, canonical_json(context))


def _public(row: Any) -> dict[str, Any]:
    return {"version": row.version, "envelope": row.envelope, "owner_key": row.owner_key}


def _paths(connection: Connection, name: str) -> Iterator[str]:
    """Where the files of every version lie or lay, one manifest in memory at a time."""
    for version in connection.execute(select(datasets.c.version).where(datasets.c.name == name)).scalars().all():
        yield from (file["path"] for file in load(connection, name, version).manifest["files"])


def _coming(connection: Connection, name: str, last: Any, caller: Caller) -> Resource:
    """The next version of what is `last` now: its owner's, or the caller's if there is none yet."""
    return resources.dataset(connection, last) if last else resources.new_dataset(name, caller.name)


def _check_parents(act: Action, manifest: DatasetManifest) -> None:
    """The other datasets that a sealed version is said to be made from are live, and theirs who made it.

    Raises:
        NotFoundError: one is not on record. InputError: it is somebody else's.
        ConflictError: it has ended: no later erasure could name what was made from it.
    """
    if manifest.lineage.kind == "seal":
        for parent in manifest.lineage.parents:
            row = load(act.connection, *parse_reference(parent))
            if row.owner != act.caller.name:
                raise InputError(f"{parent} is not yours to make a version from", "name datasets of your own")
            require_live(act.connection, row)


def _files_due(
    manifest: DatasetManifest, schema: DatasetSchema, before: list[Any], due: dict[int, float], now: float
) -> float:
    """When what is sealed in this version is to be gone. What was sealed again keeps its date: rows grow no younger."""
    if manifest.lineage.kind in ("seal", "append"):
        return schema.expiry(datetime.fromtimestamp(now, UTC)).timestamp()
    listed = {file.ref for file in manifest.files}
    gone = {file.sealed_in for file in DatasetManifest.parse(before[-1].manifest).files if file.ref not in listed}
    return min(due[version] for version in gone)


def _check_files(manifest: DatasetManifest) -> None:
    """Each shard has one file for each part of the schema, with exactly that part's columns and the same rows.

    What a lease grants is decided by a file's class, and what a plan costs by the number of rows.

    Raises:
        InputError: the manifest contradicts its schema or itself.
    """
    schema = DatasetSchema.from_mapping(manifest.dataset_schema)
    if schema.name != manifest.name:
        raise InputError("manifest and schema name different datasets", "seal the data again")
    wanted = {part: schema.stored_columns(part) for part in schema.parts(numbered=manifest.numbered)}
    shards: dict[str, list[SealedFile]] = {}
    for file in manifest.files:
        check_path(file.path, below=f"datasets/{manifest.name}/")
        if file.columns != wanted.get(file.part):
            raise InputError("a file's columns are not those of its class", "seal the data again")
        shards.setdefault(file.shard, []).append(file)
    for files in shards.values():
        same = len({(file.role, file.rows) for file in files}) == 1
        if not same or {file.part for file in files} != wanted.keys():
            raise InputError("the files of a shard do not fit together", "seal the data again")
    if not manifest.rows("train"):
        raise InputError("there is no row to train on", "seal the data again")
