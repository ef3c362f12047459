"""A sealed version, checked by anybody who may see its manifest: no key is needed.

Guarantees: a manifest is used only under its owner's signature; a version is called whole only if every stored byte of
it is as the manifest says. Whatever a store sends, no more of it than one piece for each reader is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cloister.client.authority import AuthorityClient
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest, SealedFile
from cloister.errors import ConflictError, IntegrityError
from cloister.signing import dsse
from cloister.signing.keys import ed25519_public_from_pem, key_id
from cloister.stores.blobs import Blobs, open_blobs

READERS = 4  # hashing takes one core each; more of them hide how long a distant store takes to answer
Progress = Callable[[float, float | None], None]
"""Told how much is done, and of how much if that is known."""


def signed_manifest(envelope: dict[str, Any], owner_key: str) -> DatasetManifest:
    """The manifest in an envelope that its owner signed.

    Raises:
        IntegrityError: not signed by that key, or about something else.
    """
    public = owner_key.encode()
    trusted = {key_id(public): ed25519_public_from_pem(public)}
    verified = dsse.verify(envelope, trusted, predicate_type=MANIFEST_PREDICATE, subject_digest=None)
    return DatasetManifest.parse(verified.predicate)


def verify_dataset(
    client: AuthorityClient, name: str, version: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare every stored file with the signed manifest. `progress(done, total)` counts bytes.

    Raises:
        IntegrityError: names the first file, in the manifest's order, that changed.
        NotFoundError: a file is missing. ConflictError: the version has ended.
    """
    shown = client.get(f"/v1/datasets/{name}/versions/{version}")
    if shown["state"] != "live":
        why = f"what is gone, and why: cloister data certificate {shown['erasure']}"
        raise ConflictError(
            f"{name}@{version} has ended, and its files are gone or will be",
            why if shown["erasure"] else "see what is live: cloister data list",
        )
    manifest = signed_manifest(shown["envelope"], shown["owner_key"])
    blobs = open_blobs(shown["blobs"])
    total, done = sum(file.bytes for file in manifest.files), 0
    with ThreadPoolExecutor(READERS) as readers:
        checked = [readers.submit(_check, blobs, file, f"{name}@{version}") for file in manifest.files]
        try:
            for file, check in zip(manifest.files, checked, strict=True):
                check.result()
                done += file.bytes
                if progress:
                    progress(done, total)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
    return {
        "dataset": f"{name}@{version}", "digest": manifest.digest, "files": len(manifest.files), "bytes": total,
    }  # fmt: skip


def _check(blobs: Blobs, file: SealedFile, dataset: str) -> None:
    hashed, size = hashlib.sha256(), 0
    for chunk in blobs.chunks(file.path):
        hashed.update(chunk)
        size += len(chunk)
        if size > file.bytes:  # it may never end
            break
    if size != file.bytes or hashed.hexdigest() != file.sha256:
        raise IntegrityError(
            f"{file.key_name} of {dataset} changed since it was sealed",
            f"restore {file.path} from a backup, or seal the data again",
        )
