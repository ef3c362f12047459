"""Sealing a table on its owner's machine, block by block, so that memory does not grow with the file (but by two bytes
for each row where a unit has several).

Guarantees: rows leave this process only encrypted, and no file on this machine gets any; each file has its own fresh
key, which travels HPKE-sealed to the authority and nowhere else; the version exists when the authority has recorded
all of it, and not before: what a failure leaves behind is ciphertext whose keys are gone, and it is removed. Of a
process that is killed, `cloister fsck` finds it.

    1. ask        which version is coming, where its files go, the keys of its subjects
    2. read       a few MB after the other, each value validated against the schema; some ahead
    3. protect    identifiers become pseudonyms, and each row gets its subject's tag
    4. split      a block's rows, in an order drawn from the CSPRNG, into shards, columns by sensitivity class
    5. encrypt    one Parquet file, one key, one name (AAD) each
    6. upload     write-once
    7. number     where a unit has several rows: each row gets its place in a secret order of its unit (`ordinals`)
    8. register   manifest signed with the owner's key, keys sealed to the authority

Rows are mixed within a block, not across blocks: which block of the file a row came from can be told from its shard's
number. Training draws its batches at random over all of them.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister.canonical import b64, canonical_json, unb64
from cloister.client.authority import AuthorityClient
from cloister.client.code import package_digest
from cloister.client.grant import Grant, ask_to_seal, open_ordinals, open_tags
from cloister.client.upload import Upload, ahead
from cloister.client.verify import signed_manifest
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest, Lineage, SealedFile, parse_reference
from cloister.datasets.ordinals import Ordinals, number_units, ordinal_table
from cloister.datasets.partition import Numbering, Part, partition
from cloister.datasets.schema import INDEX, ORDINAL, DatasetSchema
from cloister.datasets.subjects import Tags, check_units, held_out, protect
from cloister.errors import CloisterError, InputError, NotFoundError, PermissionDeniedError
from cloister.sealing import purposes
from cloister.sealing.lease import seal_to
from cloister.signing import dsse
from cloister.signing.keys import ed25519_from_pem

BLOCK_BYTES = 32 << 20  # of rows as they are stored; what is in memory is a small multiple of it
TABLES_AHEAD = 4
SMALL_PART = 4  # what is left at the end is no block of its own, if it has less than this part of the rows of one
_NUMBERED = re.compile(r"(train|holdout)-([0-9]+)")


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a small file that a person named.

    Raises:
        NotFoundError: there is none. InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {what} {path}", "check the path") from error
    except OSError as error:
        raise InputError(f"the {what} {path} cannot be read: {error.strerror}", "check its permissions") from error


def seal_dataset(
    client: AuthorityClient,
    private_key_pem: bytes,
    tables: Iterable[pa.Table],
    schema: DatasetSchema,
    *,
    shards: int,
    holdout: float,
    receiving_key: bytes,
    derived_from: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Seal a file's `tables`, in stored form (`datasets.ingest`), as the next version of the dataset of `schema`.

    They are joined to blocks of `BLOCK_BYTES`. Each block becomes `shards` training shards and, if `holdout` > 0, one
    holdout shard. `receiving_key` is the authority's HPKE public key, as this machine has pinned it; `derived_from`
    names versions of other datasets that this one was made from.

    Raises:
        InputError: the data does not fit the schema.
        CloisterError: the store or the authority refused. Either way there is no version, and its files are removed.
    """
    _check_parents(client, schema, derived_from)
    with _started(tables) as started:
        grant = ask_to_seal(client, "seal", schema)  # 1
        made = _seal(started, schema, grant, "seal", derived_from, shards, holdout)
        return _register(client, private_key_pem, *made, receiving_key)


def append_to_dataset(
    client: AuthorityClient,
    private_key_pem: bytes,
    tables: Iterable[pa.Table],
    schema: DatasetSchema,
    *,
    shards: int,
    holdout: float,
    receiving_key: bytes,
) -> dict[str, Any]:
    """Seal `tables` as further shards of the newest live version: the next one lists its files, as they are, and these.

    Raises:
        InputError: the data does not fit the schema; the schema is not the version's; a unit has too many rows over
            both, or would be in training and in the holdout.
        ConflictError: another version came in between.
        CloisterError: as `seal_dataset`.
    """
    with _started(tables) as started:
        grant = ask_to_seal(client, "append", schema)  # 1
        if grant.parent is None or DatasetSchema.from_mapping(grant.parent.dataset_schema).digest() != schema.digest():
            raise InputError(
                f"{schema.name} has another schema by now", "append under the newest one, or seal all of it anew"
            )
        parents = (f"{grant.parent.name}@{grant.parent.version}",)
        made = _seal(started, schema, grant, "append", parents, shards, holdout)
        return _register(client, private_key_pem, *made, receiving_key)


def newest_schema(client: AuthorityClient, name: str) -> DatasetSchema:
    """The schema of the newest live version of a dataset.

    Raises:
        NotFoundError: there is none. IntegrityError: it is not signed by its owner.
        PermissionDeniedError: somebody else owns it.
    """
    live = [
        int(shown["dataset"].rpartition("@")[2])
        for shown in client.get("/v1/datasets")
        if shown["dataset"].rpartition("@")[0] == name and shown.get("state", "live") == "live"
    ]
    if not live:
        raise NotFoundError(f"there is no live version of {name} to append to", "seal it: cloister data seal")
    shown = client.get(f"/v1/datasets/{name}/versions/{max(live)}")
    if shown["envelope"] is None:
        raise PermissionDeniedError(f"only its owner appends to {name}", f"ask {shown['owner']}")
    return DatasetSchema.from_mapping(signed_manifest(shown["envelope"], shown["owner_key"]).dataset_schema)


def _check_parents(client: AuthorityClient, schema: DatasetSchema, parents: tuple[str, ...]) -> None:
    """Refuse now what the authority would refuse at the end of a long upload."""
    for parent in parents:
        name, version = parse_reference(parent)
        if name == schema.name:
            raise InputError(
                f"{parent} is a version of the dataset itself", f"to add rows to it: cloister data append --to {name}"
            )
        client.get(f"/v1/datasets/{name}/versions/{version}")


def _seal(
    tables: Iterator[pa.Table], schema: DatasetSchema, grant: Grant, kind: Literal["seal", "append"],
    parents: tuple[str, ...], shards: int, holdout: float,
) -> tuple[DatasetManifest, Upload]:  # fmt: skip
    parent = grant.parent
    _check_holdout(schema, grant, holdout)
    numbering = _next_numbers(parent)
    upload = Upload(grant.blobs, schema.name, grant.version, schema.region)
    rows = 0
    try:
        protected = (protect(table, schema, grant.subjects) for table in tables)  # 2, 3
        for block, tags in _blocks(protected):  # 4
            rows += block.num_rows
            order = _secret_permutation(block.num_rows)
            for part in partition(block, tags, schema, shards, holdout, order, numbering):
                upload.add(part)  # 5, 6
        upload.finish()
        before = parent.all_rows if parent else 0
        manifest = DatasetManifest(
            name=schema.name, version=grant.version, dataset_schema=schema.to_dict(),
            files=(*(parent.files if parent else ()), *upload.files),
            lineage=Lineage(
                kind=kind, parents=parents, code=package_digest(), rows_before=before, rows_after=before + rows
            ),
        )  # fmt: skip
        if holdout > 0.0 and not manifest.rows("holdout"):
            raise InputError("no unit is left for the holdout", "use a larger --holdout")
        _check_units(schema, grant, manifest, upload)
        for part in _ordinals(schema, grant, manifest, upload):  # 7
            upload.add(part)
        upload.finish()
        manifest = manifest.model_copy(update={"files": (*(parent.files if parent else ()), *upload.files)})
    except BaseException:
        upload.discard()
        raise
    upload.close()
    return manifest, upload


def _register(
    client: AuthorityClient, private_key_pem: bytes, manifest: DatasetManifest, upload: Upload, receiving_key: bytes
) -> dict[str, Any]:
    population = None
    try:
        population = register(client, private_key_pem, manifest, upload.keys, receiving_key)["population"]  # 8
    except CloisterError as error:
        if not was_lost(error):
            upload.discard()
            raise
        if not _is_registered(client, manifest):
            raise
    return _summary(manifest, upload.files) | {"population": population}


def was_lost(error: CloisterError) -> bool:
    """Whether the authority may have recorded the version after all, so that its files are needed: no refusal came."""
    return error.status >= 500


def _check_holdout(schema: DatasetSchema, grant: Grant, holdout: float) -> None:
    """With units of several rows, what is appended has to be split as what is there was.

    Raises:
        InputError: it would not be.
    """
    if schema.unit == "row" or grant.parent is None:
        return
    for file in grant.parent.files:
        if file.part == INDEX:
            tags = open_tags(grant.blobs, grant.parent, file, grant.files[file.ref])
            if (held_out(tags, holdout) != (file.role == "holdout")).any():
                raise InputError(
                    "with this holdout, one unit would be both in training and in the holdout",
                    "append with the --holdout that the first version was sealed with",
                )


def _check_units(schema: DatasetSchema, grant: Grant, manifest: DatasetManifest, upload: Upload) -> None:
    """Count the rows of each unit over all of the version, from its indexes, which are sealed by now."""
    keys = _file_keys(grant, manifest, upload)

    def indexes() -> Iterator[Tags]:
        for file in manifest.files:
            if file.part == INDEX:
                yield open_tags(grant.blobs, manifest, file, keys[file.ref])

    check_units(schema, manifest.all_rows, indexes)


def _ordinals(schema: DatasetSchema, grant: Grant, manifest: DatasetManifest, upload: Upload) -> Iterator[Part]:
    """A file of ordinals for each new shard. None beside a parent that has none: a version has all of them, or none."""
    parent = grant.parent
    if schema.rows_per_unit == 1 or (parent and not parent.numbered):
        return
    keys = _file_keys(grant, manifest, upload)
    numbers = {file.shard: file for file in manifest.files if file.part == ORDINAL}

    def tags(file: SealedFile) -> Tags:
        return open_tags(grant.blobs, manifest, file, keys[file.ref])

    def known(file: SealedFile) -> tuple[Tags, Ordinals]:
        there = numbers[file.shard]
        return tags(file), open_ordinals(grant.blobs, manifest, there, keys[there.ref])

    indexes = [file for file in manifest.files if file.part == INDEX]
    new = [file for file in indexes if file.shard not in numbers]
    found = number_units(
        [(file.rows, partial(tags, file)) for file in new],
        [(file.rows, partial(known, file)) for file in indexes if file.shard in numbers],
        _secret_words,
    )
    for file, ordinals in zip(new, found, strict=True):
        yield Part(shard=file.shard, role=file.role, part=ORDINAL, table=ordinal_table(ordinals))


def _file_keys(grant: Grant, manifest: DatasetManifest, upload: Upload) -> dict[str, bytes]:
    """The data keys of files, by `SealedFile.ref`: those that were granted, and those of what is uploaded by now."""
    return {**grant.files, **{f"{manifest.version}/{name}": unb64(key) for name, key in upload.keys.items()}}


@contextlib.contextmanager
def _started(tables: Iterable[pa.Table]) -> Iterator[Iterator[pa.Table]]:
    """The same tables, read ahead; the first is read (and so validated) already."""
    reader = ahead(iter(tables), TABLES_AHEAD)
    try:
        first = next(reader, None)
        if first is None:
            raise InputError("the file has no data row", "check that the export is complete")
        yield chain([first], reader)
    finally:
        reader.close()


_Rows = tuple[pa.Table, Tags | None]


def _blocks(tables: Iterable[_Rows]) -> Iterator[_Rows]:
    """Tables joined to blocks of `BLOCK_BYTES`; a small rest, which could not be split, goes with the one before."""
    whole: list[_Rows] = []
    waiting: list[_Rows] = []
    for table in tables:
        waiting.append(table)
        if sum(each.nbytes for each, _ in waiting) >= BLOCK_BYTES:
            if whole:
                yield _joined(whole)
            whole, waiting = waiting, []
    if sum(len(each) for each, _ in waiting) * SMALL_PART < sum(len(each) for each, _ in whole):
        whole, waiting = whole + waiting, []
    for rest in (whole, waiting):
        if rest:
            yield _joined(rest)


def _joined(rows: list[_Rows]) -> _Rows:
    tags = [each for _, each in rows if each is not None]
    return pa.concat_tables([table for table, _ in rows]).combine_chunks(), np.concatenate(tags) if tags else None


def _next_numbers(parent: DatasetManifest | None) -> Numbering:
    """Where the names of new shards begin, so that none is one that the version has."""
    numbering = Numbering()
    for file in parent.files if parent else ():
        match = _NUMBERED.fullmatch(file.shard)
        if match:
            setattr(numbering, match[1], max(getattr(numbering, match[1]), int(match[2]) + 1))
    return numbering


def _secret_permutation(rows: int) -> npt.NDArray[np.int64]:
    """A uniform order of the rows from the operating system's generator: nobody can predict a row's shard.

    The order of distinct random numbers; where two are equal, which takes about 2**32 rows, all are drawn again.
    """
    while True:
        drawn = _secret_words(rows)
        order = np.argsort(drawn)
        if (np.diff(drawn[order]) != 0).all():
            return order.astype(np.int64, copy=False)


def _secret_words(number: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(secrets.token_bytes(8 * number), dtype=np.uint64)


def _is_registered(client: AuthorityClient, manifest: DatasetManifest) -> bool:
    try:
        shown = client.get(f"/v1/datasets/{manifest.name}/versions/{manifest.version}")
    except NotFoundError:
        return False
    return bool(shown["digest"] == manifest.digest)


def register(
    client: AuthorityClient, private_key_pem: bytes, manifest: DatasetManifest, keys: Mapping[str, str],
    receiver: bytes, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Sign a manifest and hand it over with the data keys of the files that were sealed in it; the answer.

    `more` goes into the request as it is.
    """
    digest_hex = manifest.digest.removeprefix("sha256:")
    statement = dsse.statement(manifest.name, digest_hex, MANIFEST_PREDICATE, manifest.model_dump(mode="json"))
    body = {
        "envelope": dsse.sign(statement, ed25519_from_pem(private_key_pem)),
        "sealed_keys": b64(seal_to(receiver, canonical_json(dict(keys)), purposes.data_keys(manifest.digest))),
    }
    return dict(client.post_in_turn("/v1/datasets", body | more))


def _summary(manifest: DatasetManifest, new: Sequence[SealedFile]) -> dict[str, Any]:
    return {
        "dataset": f"{manifest.name}@{manifest.version}",
        "digest": manifest.digest,
        "files": len(manifest.files),
        "new_files": len(new),
        "rows": manifest.all_rows,
        "new_rows": manifest.lineage.rows_after - manifest.lineage.rows_before,
        "holdout_rows": manifest.rows("holdout"),
        "shards": len(manifest.shards("train")),
        "bytes": sum(file.bytes for file in manifest.files),
        "classes": sorted({file.part for file in manifest.files}),
        "parents": list(manifest.lineage.parents),
    }
