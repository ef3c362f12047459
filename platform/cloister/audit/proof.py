"""Proofs to hand over: that one entry is in the log, and that the log has only grown. Each is one JSON file.

Guarantees: `verify_inclusion` and `verify_consistency` return only what follows from the bundle and the public keys
that they are given, of the log and of trusted witnesses. They need no network and no authority.

Does not guarantee: without a witness, that other people were shown the same log.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloister.audit import checkpoint, cosignature, merkle
from cloister.audit.checkpoint import Checkpoint
from cloister.audit.cosignature import Cosignature, WitnessKey
from cloister.audit.event import Event
from cloister.canonical import b64, unb64
from cloister.errors import InputError, IntegrityError

INCLUSION = "cloister.dev/log-proof/v1"
CONSISTENCY = "cloister.dev/log-consistency/v1"
MAX_BYTES = 256 * 1024
_FIELDS: dict[str, dict[str, type]] = {
    INCLUSION: {"verifier_key": str, "index": int, "entry": str, "proof": list, "checkpoint": str},
    CONSISTENCY: {"verifier_key": str, "first": str, "second": str, "proof": list},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Included:
    """`event` is entry `index` of the log that `checkpoint` describes."""

    event: Event
    index: int
    checkpoint: Checkpoint
    cosignatures: Sequence[Cosignature]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """The log of `second` begins with all of the log of `first`. `cosignatures` are those over `second`."""

    first: Checkpoint
    second: Checkpoint
    cosignatures: Sequence[Cosignature]


def inclusion_bundle(verifier_key: str, index: int, entry: bytes, proof: Sequence[bytes], note: str) -> dict[str, Any]:
    """That `entry` is entry `index` of the log of `note`, which may carry cosignatures.

    Raises:
        IntegrityError: the entry is not text: no event.
    """
    try:
        text = entry.decode()
    except UnicodeDecodeError:
        raise IntegrityError("that entry is not an event", "verify the log: cloister audit verify") from None
    return {"format": INCLUSION, "verifier_key": verifier_key, "index": index, "entry": text,
            "proof": [b64(value) for value in proof], "checkpoint": note}  # fmt: skip


def consistency_bundle(verifier_key: str, first: str, second: str, proof: Sequence[bytes]) -> dict[str, Any]:
    """That the log of the note `second` extends that of the note `first`."""
    return {"format": CONSISTENCY, "verifier_key": verifier_key, "first": first, "second": second,
            "proof": [b64(value) for value in proof]}  # fmt: skip


def parse(data: bytes) -> dict[str, Any]:
    """The bundle in a file: of known format, with every field of the right kind. Nothing about it is verified.

    Raises:
        InputError: not a bundle.
    """
    refused = InputError("this is not a proof of a log", "make one: cloister audit prove INDEX FILE")
    try:
        bundle: Any = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        raise refused from None
    fields = _FIELDS.get(str(bundle.get("format"))) if isinstance(bundle, dict) else None
    if fields is None or bundle.keys() != {"format", *fields}:
        raise refused
    if any(type(bundle[name]) is not kind for name, kind in fields.items()):
        raise refused
    if not all(isinstance(value, str) for value in bundle["proof"]):
        raise refused
    return dict(bundle)


def verify_inclusion(bundle: dict[str, Any], verifier_key: str, witnesses: Sequence[WitnessKey] = ()) -> Included:
    """Check a bundle of `inclusion_bundle` that `parse` gave: all of `witnesses` must have cosigned its checkpoint.

    1. The log signed the checkpoint. 2. So did every witness. 3. The entry is in the checkpoint's tree, at its place.
    4. The entry is an event.

    Raises:
        IntegrityError: one of these does not hold.
    """
    known, cosignatures = _checkpoint(bundle["checkpoint"], verifier_key, witnesses)  # 1. 2.
    entry = _utf8(bundle["entry"])
    leaf = merkle.leaf_hash(entry)
    merkle.verify_inclusion(leaf, bundle["index"], known.size, _hashes(bundle["proof"]), known.root)  # 3.
    event = Event.from_bytes(entry)  # 4.
    return Included(event=event, index=bundle["index"], checkpoint=known, cosignatures=cosignatures)


def verify_consistency(bundle: dict[str, Any], verifier_key: str, witnesses: Sequence[WitnessKey] = ()) -> Grown:
    """Check a bundle of `consistency_bundle` that `parse` gave: all of `witnesses` must have cosigned the second note.

    Raises:
        IntegrityError: a note is not the log's, a cosignature is missing or false, or the proof does not hold.
    """
    first, _ = _checkpoint(bundle["first"], verifier_key, ())
    second, cosignatures = _checkpoint(bundle["second"], verifier_key, witnesses)
    merkle.verify_consistency(first.size, second.size, first.root, second.root, _hashes(bundle["proof"]))
    return Grown(first=first, second=second, cosignatures=cosignatures)


def _checkpoint(
    note: str, verifier_key: str, witnesses: Sequence[WitnessKey]
) -> tuple[Checkpoint, Sequence[Cosignature]]:
    origin, public = checkpoint.parse_verifier_key(verifier_key)
    return checkpoint.verify(note, public, origin), cosignature.require_cosigned(note, witnesses)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise IntegrityError("the proof's entry is not text", "ask for the proof again") from None


def _hashes(texts: Sequence[str]) -> list[bytes]:
    try:
        values = [unb64(text) for text in texts]
    except InputError:
        values = []
    if [b64(value) for value in values] != list(texts):
        raise IntegrityError("the proof holds something that is not a hash", "ask for the proof again")
    return values
