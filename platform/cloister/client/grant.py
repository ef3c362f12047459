"""What the authority gives an owner to make the coming version of a dataset with.

Guarantees: keys arrive HPKE-sealed to a key that was made here for one answer; what they were given for (dataset and
version) is checked by opening them; a version that is to be built upon is used only under its owner's signature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from cloister.canonical import b64, sha256_hex, unb64
from cloister.client.authority import AuthorityClient
from cloister.client.verify import signed_manifest
from cloister.datasets.manifest import DatasetManifest, SealedFile
from cloister.datasets.ordinals import Ordinals, read_ordinals
from cloister.datasets.schema import INDEX, ORDINAL, DatasetSchema, PartName
from cloister.datasets.subjects import SubjectKeys, Tags, read_index
from cloister.errors import IntegrityError
from cloister.sealing import purposes
from cloister.sealing.lease import OneTimeKey
from cloister.sealing.shard import open_table, shard_aad
from cloister.stores.blobs import Blobs, open_blobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """`files` maps `SealedFile.ref` to the data keys of files that are already sealed."""

    version: int
    blobs: Blobs
    parent: DatasetManifest | None
    subjects: SubjectKeys = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)


def ask_to_seal(client: AuthorityClient, kind: Literal["seal", "append"], schema: DatasetSchema) -> Grant:
    """Ask for what sealing, or appending to, the dataset of that schema takes.

    Raises:
        CloisterError: the authority refused.
    """
    one_time = OneTimeKey.generate()
    body = {"public_key": b64(one_time.public), "kind": kind, "region": schema.region}
    answer = client.post_in_turn(f"/v1/datasets/{schema.name}/sealing", body)
    version, parent = int(answer["version"]), answer["parent"]
    subjects, files = opened_keys(one_time, answer["sealed"], schema.name, version)
    return Grant(
        version=version,
        blobs=open_blobs(answer["blobs"]),
        parent=signed_manifest(parent["envelope"], parent["owner_key"]) if parent else None,
        subjects=subjects,
        files=files,
    )


def opened_keys(one_time: OneTimeKey, sealed: str, name: str, version: int) -> tuple[SubjectKeys, dict[str, bytes]]:
    """The keys of a dataset's subjects, and those of files by their `ref`, from an answer that made `version` coming.

    Raises:
        IntegrityError: sealed to another key, for another dataset or version, or changed.
    """
    keys: dict[str, Any] = json.loads(one_time.open(unb64(sealed), purposes.sealing(name, version)))
    subjects = SubjectKeys(pseudonym=unb64(keys["pseudonym_key"]), index=unb64(keys["index_key"]))
    return subjects, {ref: unb64(key) for ref, key in keys["files"].items()}


def open_tags(blobs: Blobs, manifest: DatasetManifest, file: SealedFile, key: bytes) -> Tags:
    """The subject tags [N] of the rows of one shard, from its file of part `index`.

    Raises:
        IntegrityError: the file is not the one that the manifest lists, or does not open.
    """
    return read_index(_opened(blobs, manifest, file, INDEX, key))


def open_ordinals(blobs: Blobs, manifest: DatasetManifest, file: SealedFile, key: bytes) -> Ordinals:
    """The ordinals [N] of the rows of one shard within their units, from its file of part `ordinal`.

    Raises:
        IntegrityError: as `open_tags`.
    """
    return read_ordinals(_opened(blobs, manifest, file, ORDINAL, key))


def _opened(blobs: Blobs, manifest: DatasetManifest, file: SealedFile, part: PartName, key: bytes) -> pa.Table:
    sealed = blobs.get(file.path)
    if sha256_hex(sealed) != file.sha256 or file.part != part:
        raise IntegrityError(
            f"{file.key_name} of {manifest.name}@{manifest.version} changed since it was sealed",
            f"check the dataset: cloister data verify {manifest.name}@{manifest.version}",
        )
    region = DatasetSchema.from_mapping(manifest.dataset_schema).region
    return open_table(sealed, key, shard_aad(manifest.name, file.sealed_in, part, file.shard, region))
