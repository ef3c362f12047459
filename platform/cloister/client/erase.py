"""Erasing people's rows, and correcting them, on the machine of the data's owner.

Guarantees: who is meant leaves this process in no form: neither the value nor its tag is sent, stored or shown; only
the shards that hold one of them are opened, here, and sealed again under fresh keys; nothing has changed until the
authority has registered the version that replaces them, and in the same moment the old keys are destroyed, of every
live version that lists them. What a failure before that leaves behind is ciphertext, and it is removed. Of a process
that is killed, `cloister fsck` finds it.

    1. ask        which versions are live, and the keys of their subject indexes
    2. find       the shards in whose index one of the subjects' tags is
    3. open       those of the newest live version; drop or correct rows; seal each again
    4. register   the new version, and which files end with it
    5. check      the certificate, against the release key that this machine has pinned
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cloister.canonical import b64, sha256_hex
from cloister.client.authority import AuthorityClient
from cloister.client.code import package_digest
from cloister.client.grant import open_tags, opened_keys
from cloister.client.seal import register, was_lost
from cloister.client.upload import Upload
from cloister.client.verify import Progress, signed_manifest
from cloister.datasets.erasure import ERASURE_PREDICATE, Erasure, Reason, subject_digest
from cloister.datasets.ingest import read_table
from cloister.datasets.lineage import shards_of
from cloister.datasets.manifest import DatasetManifest, Lineage, SealedFile
from cloister.datasets.partition import shard_parts
from cloister.datasets.schema import INDEX, DatasetSchema
from cloister.datasets.subjects import TAG_BYTES, SubjectKeys, Tags, protect, subject_tag
from cloister.errors import CloisterError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.sealing.lease import OneTimeKey
from cloister.sealing.shard import open_table, shard_aad
from cloister.signing import dsse
from cloister.signing.keys import key_id, p256_public_from_pem
from cloister.stores.blobs import Blobs, open_blobs

REFS_AT_ONCE = 5_000  # how many keys are asked for in one request
MAX_SUBJECTS = 100_000
Mask = npt.NDArray[np.bool_]
"""Which rows of a shard are meant: [N]."""
# (rows with all stored columns, their tags, which are meant) -> what they become
Change = Callable[[pa.Table, Tags, Mask], tuple[pa.Table, Tags]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who erases: their connection and signing key, and what their machine has pinned of the authority."""

    client: AuthorityClient
    private_key_pem: bytes = field(repr=False)
    receiving_key: bytes
    release_key: bytes


@dataclass(frozen=True, slots=True)
class _Live:
    manifest: DatasetManifest
    schema: DatasetSchema
    blobs: Blobs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """What the authority gave: the live versions, oldest first, and keys."""

    version: int
    live: Sequence[_Live]
    subjects: SubjectKeys = field(repr=False)
    files: dict[str, bytes] = field(repr=False)


def erase(
    owner: Owner, name: str, subjects: Iterable[str], *, reason: Reason = "request", progress: Progress | None = None
) -> dict[str, Any]:
    """Take all rows of `subjects` out of a dataset: out of every version that is live.

    Raises:
        NotFoundError: no live version has a row of any of them; nothing was changed.
        InputError: a version has no column by which people are found; a subject is one that no version can hold; or
            nothing would be left to train on.
        ConflictError: another version came in between; nothing was changed.
        CloisterError: as the store or the authority refused.
    """

    def without(rows: pa.Table, tags: Tags, meant: Mask) -> tuple[pa.Table, Tags]:
        return rows.filter(pa.array(~meant)), tags[~meant]

    return _replace(owner, name, "erase", subjects, reason, lambda _: without, progress)


def rectify(
    owner: Owner, name: str, subject: str, changes: Mapping[str, str], *, progress: Progress | None = None
) -> dict[str, Any]:
    """Put the values `changes` (by column, as the owner's files have them) into all rows of one subject.

    Older versions that hold wrong values end. Raises as `erase`, and:

    Raises:
        InputError: a value that the schema does not allow, a tensor, or the column that says whose a row is.
    """

    def changed(opened: _Opened) -> Change:
        return _correction(opened.live[-1].schema, opened.subjects, changes)

    return _replace(owner, name, "rectify", [subject], "correction", changed, progress)


def verified_certificate(envelope: dict[str, Any], release_key: bytes) -> Erasure:
    """What a certificate says, once its signature holds.

    Raises:
        IntegrityError: not signed by the release key (PEM), changed, or not a certificate of erasure.
    """
    trusted = {key_id(release_key): p256_public_from_pem(release_key)}
    verified = dsse.verify(envelope, trusted, predicate_type=ERASURE_PREDICATE, subject_digest=None)
    erasure = Erasure.parse(verified.predicate)
    if verified.statement["subject"][0]["digest"]["sha256"] != subject_digest(erasure):
        raise IntegrityError("the certificate is about other files than it lists", "ask the authority for it again")
    return erasure


def _replace(
    owner: Owner, name: str, kind: Literal["erase", "rectify"], subjects: Iterable[str], reason: Reason,
    change_of: Callable[[_Opened], Change], progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    opened = _open_indexes(owner.client, name, kind)  # 1
    change = change_of(opened)
    wanted = list(dict.fromkeys(subjects))
    if not wanted or len(wanted) > MAX_SUBJECTS:
        raise InputError(f"name 1 to {MAX_SUBJECTS:,} subjects", "one in each line of a --subjects-file")
    found = _Found(opened)
    for live in opened.live:
        found.search(live, wanted)  # 2
    found.require_admitted()
    if not found.ends:
        raise NotFoundError(
            f"no live version of {name} has a row of that subject", "name them as the data does; nothing was changed"
        )
    parent = opened.live[-1]
    affected = {shard: mask for (version, shard), mask in found.masks.items() if _lists(parent, version, shard)}
    if not affected:  # only older versions have it
        body = {"version": opened.version, "ends": sorted(found.ends), "reason": reason}
        answer = owner.client.post_in_turn(f"/v1/datasets/{name}/endings", body)
        return _told(owner, answer, None, found, len(wanted))
    upload = Upload(parent.blobs, name, opened.version, parent.schema.region)
    try:
        for done, (shard, mask) in enumerate(sorted(affected.items())):  # 3
            if progress:
                progress(done, len(affected))
            for part in _resealed(owner.client, opened, parent, shard, mask, kind, change):
                upload.add(part)
        upload.finish()
        manifest = _successor(parent.manifest, opened.version, affected, upload.files, kind)
    except BaseException:
        upload.discard()
        raise
    upload.close()
    try:
        answer = register(  # 4
            owner.client, owner.private_key_pem, manifest, upload.keys, owner.receiving_key,
            ends=sorted(found.ends), reason=reason,
        )  # fmt: skip
    except CloisterError as error:
        if not was_lost(error):
            upload.discard()
            raise
        answer = _answer_lost(owner.client, manifest, parent.manifest)
    return _told(owner, answer, manifest, found, len(wanted))  # 5


def _open_indexes(client: AuthorityClient, name: str, purpose: str) -> _Opened:
    one_time = OneTimeKey.generate()
    body = {"public_key": b64(one_time.public), "purpose": purpose}
    answer = client.post_in_turn(f"/v1/datasets/{name}/openings", body)
    version = int(answer["version"])
    subjects, files = opened_keys(one_time, answer["sealed"], name, version)
    live = []
    for shown in answer["versions"]:
        manifest = signed_manifest(shown["envelope"], shown["owner_key"])
        schema = DatasetSchema.from_mapping(manifest.dataset_schema)
        if schema.subject is None:
            raise InputError(
                f"{name}@{manifest.version} has no column by which people are found",
                f"its schema names no unit and no identifier; to destroy all of it: cloister key destroy "
                f"{name}@{manifest.version}",
            )
        live.append(_Live(manifest, schema, open_blobs(shown["blobs"])))
    return _Opened(version=version, live=live, subjects=subjects, files=files)


def _keys(client: AuthorityClient, name: str, purpose: str, refs: Sequence[str], version: int) -> dict[str, bytes]:
    """The keys of these files. The version that is coming is still the one that it was."""
    keys: dict[str, bytes] = {}
    for start in range(0, len(refs), REFS_AT_ONCE):
        one_time = OneTimeKey.generate()
        some = list(refs[start : start + REFS_AT_ONCE])
        body = {"public_key": b64(one_time.public), "purpose": purpose, "files": some}
        answer = client.post_in_turn(f"/v1/datasets/{name}/openings", body)
        keys |= opened_keys(one_time, answer["sealed"], name, version)[1]
    return keys


class _Found:
    """Which shards hold a row of the subjects: `masks` by (sealed in, shard), and the files that end with them."""

    def __init__(self, opened: _Opened) -> None:
        self._opened = opened
        self._searched: set[tuple[int, str]] = set()
        self._admitted: set[str] = set()
        self._refused: dict[str, InputError] = {}
        self.masks: dict[tuple[int, str], Mask] = {}
        self.ends: set[str] = set()
        self.subjects: set[bytes] = set()
        """The tags that were found."""

    def require_admitted(self) -> None:
        """After the search of every version.

        Raises:
            InputError: one of the subjects can be in none of them.
        """
        for error in self._refused.values():
            raise error

    def search(self, live: _Live, subjects: Sequence[str]) -> None:
        """Read every index of one version that was not read yet."""
        assert live.schema.subject is not None  # noqa: S101  (`_open_indexes` has checked)
        tags = set()
        for each in subjects:
            try:
                tags.add(subject_tag(self._opened.subjects.index, live.schema.subject, each))
                self._refused.pop(each, None)
                self._admitted.add(each)
            except InputError as error:  # so this version has no row of theirs, whatever others have
                if each not in self._admitted:
                    self._refused[each] = error
        for file in live.manifest.files if tags else ():
            place = (file.sealed_in, file.shard)
            if file.part == INDEX and place not in self._searched:
                self._searched.add(place)
                there = open_tags(live.blobs, live.manifest, file, self._opened.files[file.ref])
                mask, hit = _matching(there, tags)
                if hit:
                    self.masks[place] = mask
                    self.subjects |= hit
        self.ends |= {file.ref for file in live.manifest.files if (file.sealed_in, file.shard) in self.masks}


def _matching(there: Tags, wanted: set[bytes]) -> tuple[Mask, set[bytes]]:
    """Which rows [N] have one of the wanted tags, and which of these there are."""
    halves = np.ascontiguousarray(there).view(np.uint64).reshape(-1, TAG_BYTES // 8)
    firsts = np.frombuffer(b"".join(sorted(wanted)), dtype=np.uint64).reshape(-1, TAG_BYTES // 8)[:, 0]
    mask = np.isin(halves[:, 0], firsts)
    hit = set()
    for row in np.flatnonzero(mask):  # few: compare the whole tag
        tag = there[row].tobytes()
        mask[row] = tag in wanted
        if mask[row]:
            hit.add(tag)
    return mask, hit


def _lists(live: _Live, sealed_in: int, shard: str) -> bool:
    return any((file.sealed_in, file.shard) == (sealed_in, shard) for file in live.manifest.files)


def _resealed(
    client: AuthorityClient, opened: _Opened, live: _Live, shard: str, mask: Mask, kind: str, change: Change
) -> Iterator[Any]:
    """The files that take the place of a shard's; none, if no row is left."""
    files = shards_of(live.manifest.files)[shard]
    keys = _keys(client, live.manifest.name, kind, [file.ref for file in files], opened.version)
    tags = open_tags(live.blobs, live.manifest, next(file for file in files if file.part == INDEX),
                     next(keys[file.ref] for file in files if file.part == INDEX))  # fmt: skip
    parts = [_open_file(live, file, keys[file.ref]) for file in files if file.part != INDEX]
    rows = pa.table({name: part.column(name) for part in parts for name in part.column_names})
    rows, tags = change(rows, tags, mask)
    if rows.num_rows:
        yield from shard_parts(rows.combine_chunks(), tags, live.schema, shard, files[0].role)


def _open_file(live: _Live, file: SealedFile, key: bytes) -> pa.Table:
    sealed = live.blobs.get(file.path)
    name = live.manifest.name
    if sha256_hex(sealed) != file.sha256:
        raise IntegrityError(
            f"{file.key_name} of {name}@{live.manifest.version} changed since it was sealed",
            f"check the dataset: cloister data verify {name}@{live.manifest.version}",
        )
    return open_table(sealed, key, shard_aad(name, file.sealed_in, file.part, file.shard, live.schema.region))


def _successor(
    parent: DatasetManifest, version: int, affected: Iterable[str], new: Sequence[SealedFile], kind: Any
) -> DatasetManifest:
    gone = set(affected)
    files = (*(file for file in parent.files if file.shard not in gone), *new)
    if not any(file.role == "train" and file.rows for file in files):
        raise InputError(
            "no row to train on would be left",
            f"destroy all of it: cloister key destroy {parent.name}@{parent.version}",
        )
    draft = DatasetManifest(
        name=parent.name, version=version, dataset_schema=parent.dataset_schema, files=files,
        lineage=Lineage(kind=kind, parents=(f"{parent.name}@{parent.version}",), code=package_digest(),
                        rows_before=parent.all_rows, rows_after=0),
        published=parent.all_published,
    )  # fmt: skip
    return draft.model_copy(update={"lineage": draft.lineage.model_copy(update={"rows_after": draft.all_rows})})


def _correction(schema: DatasetSchema, keys: SubjectKeys, changes: Mapping[str, str]) -> Change:
    """Puts new values into the rows that are meant, after they have passed every check that sealing makes.

    Raises:
        InputError: one does not pass, or is in a column that cannot be corrected.
    """
    columns = [schema.column(name) for name in changes]
    for column in columns:
        if column.type == "tensor":
            raise InputError(f"column '{column.name}' holds tensors", "erase the rows, and append the right ones")
        if schema.subject is not None and column.name == schema.subject.name:
            raise InputError(
                f"column '{column.name}' says whose a row is", "erase the rows, and append them under the right one"
            )
    if not columns:
        raise InputError("nothing is to be corrected", "name a column and its value: --set column=value")
    part = schema.model_copy(update={"columns": tuple(columns), "unit": "row"})
    text = io.StringIO()
    csv.writer(text).writerows([list(changes), list(changes.values())])
    row, _ = protect(read_table(text.getvalue().encode(), part), part, keys)

    def corrected(rows: pa.Table, tags: Tags, meant: Mask) -> tuple[pa.Table, Tags]:
        for name in row.column_names:
            old = rows.column(name).combine_chunks()
            new = pc.if_else(pa.array(meant), row.column(name).combine_chunks()[0], old)
            rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), new)
        return rows, tags

    return corrected


def _answer_lost(client: AuthorityClient, manifest: DatasetManifest, parent: DatasetManifest) -> dict[str, Any]:
    """What the authority would have said, if it has registered the version; its files are needed then.

    Raises:
        UnavailableError: it is not known whether it has, or it has not: then its files are left to `cloister fsck`.
    """
    try:
        shown = client.get(f"/v1/datasets/{manifest.name}/versions/{manifest.version}")
    except NotFoundError:
        raise UnavailableError(
            "the authority did not answer, and has not registered the version", "try again; nothing was changed"
        ) from None
    if shown["digest"] != manifest.digest:
        raise UnavailableError("the authority did not answer, and another version came in between", "try again")
    erasure = next(each["erasure"] for each in shown["lineage"] if each["dataset"].endswith(f"@{parent.version}"))
    return {"erasure": erasure, **client.get(f"/v1/erasures/{erasure}")}


def _told(
    owner: Owner, answer: Mapping[str, Any], manifest: DatasetManifest | None, found: _Found, asked: int
) -> dict[str, Any]:
    envelope = answer["certificate"]
    told = verified_certificate(envelope, owner.release_key) if envelope else None
    return {
        "dataset": f"{manifest.name}@{manifest.version}" if manifest else None,
        "erasure": answer["erasure"],
        "subjects_asked": asked,
        "subjects_found": len(found.subjects),
        "rows": sum(int(mask.sum()) for mask in found.masks.values()),
        "shards": len(found.masks),
        "certificate": envelope,
        "facts": told.model_dump(mode="json") if told else None,
    }
