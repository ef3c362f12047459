"""A sealed version, checked by anybody who may see its manifest: no key is needed.

Guarantees: a manifest is used only under its owner's signature; a version is called whole only if every stored byte of
it is as the manifest says. Its owner has the manifest; all others have the authority's word of what it says, without
what would count rows. Whatever a store sends, no more of it than one piece for each reader is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cloister.client.authority import AuthorityClient
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest, file_check
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
    """Compare every stored file with the manifest. `progress(done, total)` counts bytes; the total is the owner's.

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
    total: int | None = None
    checks = shown["checks"]
    if shown["envelope"] is not None:
        manifest = signed_manifest(shown["envelope"], shown["owner_key"])
        total, checks = sum(file.bytes for file in manifest.files), [file.check() for file in manifest.files]
    blobs, done = open_blobs(shown["blobs"]), 0
    with ThreadPoolExecutor(READERS) as readers:
        found = [readers.submit(_check, blobs, check, f"{name}@{version}") for check in checks]
        try:
            for each in found:
                done += each.result()
                if progress:
                    progress(done, total)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
    return {"dataset": f"{name}@{version}", "digest": shown["digest"], "files": len(checks), "bytes": done}


def _check(blobs: Blobs, check: Mapping[str, Any], dataset: str) -> int:
    """The size of a stored file that is as it was sealed."""
    path, at_most = str(check["path"]), int(check["at_most_bytes"])
    hashed, size = hashlib.sha256(), 0
    for chunk in blobs.chunks(path):
        hashed.update(chunk)
        size += len(chunk)
        if size > at_most:  # it may never end
            break
    if file_check(path, hashed.hexdigest()) != check["check"]:
        raise IntegrityError(
            f"{check['file']} of {dataset} changed since it was sealed",
            f"restore {path} from a backup, or seal the data again",
        )
    return size
