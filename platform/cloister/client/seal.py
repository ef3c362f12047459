"""Sealing a table on its owner's machine.

Guarantees: rows leave this process only encrypted; each (shard, class) file has its own fresh key, which travels
HPKE-sealed to the authority and nowhere else; the version exists when the authority has recorded all of it, and
not before: what a failure leaves behind is ciphertext whose keys are gone, and it is removed.

    1. validate   every value against the schema, before anything is written
    2. split      rows in an order drawn from the CSPRNG into shards, columns by sensitivity class
    3. encrypt    one Parquet file, one key, one name (AAD) each
    4. upload     write-once
    5. register   manifest signed with the owner's key, keys sealed to the authority
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloister.canonical import b64, canonical_json, sha256_hex
from cloister.client.authority import AuthorityClient
from cloister.datasets.ingest import read_table
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest, SealedFile
from cloister.datasets.partition import partition
from cloister.datasets.schema import DatasetSchema
from cloister.errors import CloisterError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.sealing import purposes
from cloister.sealing.envelope import new_key
from cloister.sealing.lease import seal_to
from cloister.sealing.shard import seal_table, shard_aad
from cloister.signing import dsse
from cloister.signing.keys import ed25519_from_pem, ed25519_public_from_pem, key_id
from cloister.stores.blobs import FolderBlobs

Progress = Callable[[int, int], None]


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a file that a person named.

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
    data: bytes,
    schema: DatasetSchema,
    *,
    shards: int,
    holdout: float,
    receiving_key: bytes,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Seal `data` as the next version of the dataset that `schema` names. `progress(done, total)` counts files.

    `receiving_key` is the authority's HPKE public key, as this machine has pinned it.

    Raises:
        InputError: the data does not fit the schema; nothing was written.
        CloisterError: the store or the authority refused; no version exists.
    """
    table = read_table(data, schema)  # 1
    parts = partition(table, schema, shards, holdout, _secret_permutation(table.num_rows))  # 2
    coming = client.get(f"/v1/datasets/{schema.name}/next")
    version, blobs = int(coming["version"]), FolderBlobs.from_url(coming["blobs"])
    folder = f"datasets/{schema.name}/{secrets.token_hex(8)}"
    files: list[SealedFile] = []
    keys: dict[str, str] = {}
    try:
        for done, part in enumerate(parts, start=1):
            key = new_key()
            sealed = seal_table(part.table, key, shard_aad(schema.name, version, part.cls, part.shard))  # 3
            file = SealedFile(
                shard=part.shard,
                role=part.role,
                sensitivity=part.cls,
                columns=tuple(part.table.column_names),
                rows=part.table.num_rows,
                path=f"{folder}/{part.shard}.{part.cls}.parquet",
                bytes=len(sealed),
                sha256=sha256_hex(sealed),
            )
            blobs.put(file.path, sealed)  # 4
            files.append(file)
            keys[file.key_name] = b64(key)
            if progress:
                progress(done, len(parts))
    except BaseException:
        blobs.remove_tree(folder)
        raise
    manifest = DatasetManifest(name=schema.name, version=version, dataset_schema=schema.to_dict(), files=tuple(files))
    try:
        return _register(client, private_key_pem, manifest, keys, receiving_key)  # 5
    except UnavailableError:
        # The answer may have been lost after the version was recorded: then its files are needed.
        if _is_registered(client, manifest):
            return _summary(manifest)
        raise
    except CloisterError:
        blobs.remove_tree(folder)
        raise


def _is_registered(client: AuthorityClient, manifest: DatasetManifest) -> bool:
    try:
        shown = client.get(f"/v1/datasets/{manifest.name}/versions/{manifest.version}")
    except NotFoundError:
        return False
    return bool(shown["digest"] == manifest.digest)


def _register(
    client: AuthorityClient, private_key_pem: bytes, manifest: DatasetManifest, keys: dict[str, str], receiver: bytes
) -> dict[str, Any]:
    digest_hex = manifest.digest.removeprefix("sha256:")
    statement = dsse.statement(manifest.name, digest_hex, MANIFEST_PREDICATE, manifest.model_dump(mode="json"))
    body = {
        "envelope": dsse.sign(statement, ed25519_from_pem(private_key_pem)),
        "sealed_keys": b64(seal_to(receiver, canonical_json(keys), purposes.data_keys(manifest.digest))),
    }
    client.post("/v1/datasets", body)
    return _summary(manifest)


def _summary(manifest: DatasetManifest) -> dict[str, Any]:
    return {
        "dataset": f"{manifest.name}@{manifest.version}",
        "digest": manifest.digest,
        "files": len(manifest.files),
        "rows": manifest.rows("train") + manifest.rows("holdout"),
        "holdout_rows": manifest.rows("holdout"),
        "shards": len(manifest.shards("train")),
        "bytes": sum(file.bytes for file in manifest.files),
        "classes": sorted({file.sensitivity for file in manifest.files}),
    }


def verify_dataset(
    client: AuthorityClient, name: str, version: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare every stored file with the signed manifest, without any key.

    Raises:
        IntegrityError: names the first file that changed.
    """
    shown = client.get(f"/v1/datasets/{name}/versions/{version}")
    manifest = signed_manifest(shown["envelope"], shown["owner_key"])
    blobs = FolderBlobs.from_url(shown["blobs"])
    for done, file in enumerate(manifest.files, start=1):
        if sha256_hex(blobs.get(file.path)) != file.sha256:
            raise IntegrityError(
                f"{file.key_name} of {name}@{version} changed since it was sealed",
                f"restore {file.path} from a backup, or seal the data again",
            )
        if progress:
            progress(done, len(manifest.files))
    return {"dataset": f"{name}@{version}", "digest": manifest.digest, "files": len(manifest.files)}


def signed_manifest(envelope: dict[str, Any], owner_key: str) -> DatasetManifest:
    """The manifest in an envelope that its owner signed.

    Raises:
        IntegrityError: not signed by that key, or about something else.
    """
    public = owner_key.encode()
    trusted = {key_id(public): ed25519_public_from_pem(public)}
    verified = dsse.verify(envelope, trusted, predicate_type=MANIFEST_PREDICATE, subject_digest=None)
    return DatasetManifest.parse(verified.predicate)


def _secret_permutation(rows: int) -> npt.NDArray[np.int64]:
    """A uniform order of the rows from the operating system's generator: nobody can predict a row's shard.

    Sorting by 128 random bits a row; two equal ones among a billion rows have probability below 2**-68.
    """
    keys = np.frombuffer(secrets.token_bytes(16 * rows), dtype=np.uint64).reshape(2, rows)
    return np.lexsort(keys).astype(np.int64)
