"""Model signatures: OpenSSF Model Signing v1.0 in a Sigstore bundle v0.3, signed with a P-256 key.

Guarantees: `verify_model` returns only if the given files are exactly the signed ones, by name and SHA-256 digest: a
changed, missing or added file is refused, hidden files included. The reference verifier accepts these bundles.

Does not guarantee: anything about files that the caller did not hash. Load only the files that were passed in, from
the very bytes that were hashed. The reference verifier passes over `.git` and its like; this one does not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from cloister.canonical import canonical_json
from cloister.errors import InputError, IntegrityError
from cloister.signing import dsse, keys
from cloister.signing.keys import P256PrivateKey, P256PublicKey, Signer

PREDICATE_TYPE = "https://model_signing/signature/v1.0"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_IGNORED_BY_REFERENCE = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")
_HINT = "fetch the model and its signature again; do not load it"


def root_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256, in hex, over the raw digests of the files in path order (folder by folder, not character by character).

    Raises:
        InputError: no files, a path that is not relative and plain, or a digest that is not 32 bytes.
    """
    if not files:
        raise InputError("a model has at least one file", "name the files to sign")
    hasher = hashlib.sha256()
    for name in _in_order(files):
        if not _is_plain(name) or len(files[name]) != hashlib.sha256().digest_size:
            raise InputError("a model file needs a plain relative path and a SHA-256 digest", "list model files only")
        hasher.update(files[name])
    return hasher.hexdigest()


def sign_model(name: str, files: Mapping[str, str], private_key: P256PrivateKey | Signer) -> bytes:
    """The bundle for a model whose `files` map each path to its hex SHA-256 digest.

    Raises:
        InputError: as `root_digest`; or a path that the reference verifier would pass over.
    """
    root = root_digest(_raw(files))
    if any(path.split("/")[0] in _IGNORED_BY_REFERENCE for path in files):
        raise InputError("model signing leaves out .git files", "move them out of the model")
    predicate = {
        "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []},
        "resources": [{"name": path, "algorithm": "sha256", "digest": files[path]} for path in _in_order(files)],
    }
    envelope = dsse.sign(dsse.statement(name, root, PREDICATE_TYPE, predicate), private_key)
    return canonical_json(
        {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": keys.key_id_of(private_key.public_key())},
                "tlogEntries": [],
            },
            "dsseEnvelope": envelope,
        }
    )


def verify_model(bundle: bytes, files: Mapping[str, str], public_key: P256PublicKey) -> str:
    """The root digest of the model, once `public_key` is known to have signed exactly these `files`.

    Raises:
        InputError: as `root_digest`.
        IntegrityError: another key, another predicate, a changed bundle, or a changed, missing or added file.
    """
    root = root_digest(_raw(files))
    fields = dsse.strict_json(bundle)
    try:
        kind, envelope = fields["mediaType"], fields["dsseEnvelope"]
        hint = fields["verificationMaterial"]["publicKey"]["hint"]
        several = len(envelope["signatures"]) != 1
    except (KeyError, TypeError):
        raise IntegrityError("this is not a model signature made with a key", _HINT) from None
    if kind != BUNDLE_TYPE or several:
        raise IntegrityError("this is not a model signature of a known version", _HINT)
    if hint != keys.key_id_of(public_key):
        raise IntegrityError("the model was signed with another key", "check which release key is trusted")
    signed = dsse.verify(envelope, {hint: public_key}, predicate_type=PREDICATE_TYPE, subject_digest=None).statement
    listed = _resources(signed["predicate"])
    if changed := sorted(name for name in listed.keys() & files.keys() if listed[name] != files[name]):
        raise IntegrityError(f"changed since it was signed: {changed[0]}", _HINT)
    if missing := sorted(listed.keys() - files.keys()):
        raise IntegrityError(f"signed but missing: {missing[0]}", _HINT)
    if extra := sorted(files.keys() - listed.keys()):
        raise IntegrityError(f"present but never signed: {extra[0]}", _HINT)
    if signed["subject"][0]["digest"]["sha256"] != root:
        raise IntegrityError("the signed root digest is not that of the signed files", _HINT)
    return root


def _resources(predicate: dict[str, Any]) -> dict[str, str]:
    """The signed files. Only whole-file SHA-256 signatures are understood; anything else is refused."""
    try:
        method = predicate["serialization"]["method"], predicate["serialization"]["hash_type"]
        listed = [(entry["name"], entry["algorithm"], entry["digest"]) for entry in predicate["resources"]]
        files = {name: digest for name, algorithm, digest in listed if algorithm == "sha256"}
    except (KeyError, TypeError):
        raise IntegrityError("the model signature lists no files", _HINT) from None
    if method != ("files", "sha256") or len(files) != len(listed):
        raise IntegrityError("the model signature uses a method or digest that is not supported", _HINT)
    return files


def _raw(files: Mapping[str, str]) -> dict[str, bytes]:
    if not all(_SHA256_HEX.fullmatch(digest) for digest in files.values()):
        raise InputError("a file's digest is 64 lower-case hex digits", "leave out the prefix sha256:")
    return {name: bytes.fromhex(digest) for name, digest in files.items()}


def _in_order(names: Mapping[str, Any]) -> list[str]:
    """The order of the reference implementation: by path parts, so that `a/x` comes before `a.txt`."""
    return sorted(names, key=lambda name: name.split("/"))


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and str(path) == name and not path.is_absolute() and not {".", ".."} & set(path.parts)
