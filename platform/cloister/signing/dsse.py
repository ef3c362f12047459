"""Signed statements: a DSSE v1.0.2 envelope around an in-toto Statement v1.

Guarantees: `verify` returns only a statement that at least one of the given keys signed, about the expected predicate
and subject; the payload is parsed after its signature was checked, never before; `key_ids` has one entry for each
*raw key* that signed, however many ids or signatures it appears under, so its length may be compared with a threshold.

Does not guarantee: that two keys are two people, nor that a statement is recent. Both are the caller's to check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloister.canonical import b64, canonical_json, unb64
from cloister.errors import InputError, IntegrityError
from cloister.signing import keys
from cloister.signing.keys import PublicKey, SigningKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MAX_SIGNATURES = 64  # bounds the work that an envelope can ask for
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")
_HINT = "ask whoever sent it for the original, and check which keys are trusted"


@dataclass(frozen=True, slots=True)
class Verified:
    """A statement whose signatures held. `key_ids` are the caller's ids, one for each raw key, sorted."""

    statement: dict[str, Any]
    key_ids: tuple[str, ...]

    @property
    def predicate(self) -> Any:
        return self.statement["predicate"]


def statement(subject_name: str, digest_hex: str, predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """An in-toto Statement v1 with one subject, as canonical JSON.

    Raises:
        InputError: a digest that is not 64 lower-case hex digits, or a predicate that JSON cannot hold.
    """
    if not _SHA256_HEX.fullmatch(digest_hex):
        raise InputError("a subject's digest is 64 lower-case hex digits", "leave out the prefix sha256:")
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": subject_name, "digest": {"sha256": digest_hex}}],
            "predicateType": predicate_type,
            "predicate": dict(predicate),
        }
    )


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE protocol, "Signature Definition": what is really signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, private_key: SigningKey) -> dict[str, Any]:
    """An envelope with one signature. For several signers, join the `signatures` of envelopes over equal payloads."""
    return {
        "payload": b64(payload),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {
                "keyid": keys.key_id_of(private_key.public_key()),
                "sig": b64(keys.sign(private_key, pae(PAYLOAD_TYPE, payload))),
            }
        ],
    }


def verify(
    envelope: Mapping[str, Any],
    public_keys: Mapping[str, PublicKey],
    *,
    predicate_type: str,
    subject_digest: str | None,
) -> Verified:
    """The statement in `envelope`, once one or more of `public_keys` (id to key) is known to have signed it.

    1. The envelope is well formed and of the in-toto payload type.
    2. Signatures that hold are counted by raw key. A `keyid` is a hint: one that is unknown or empty means that
       every key is tried, and a signature by nobody we know counts for nothing.
    3. The payload is a Statement v1 with this predicate type and one subject with this digest (None: any).

    Raises:
        InputError: no keys were given, or `subject_digest` is not 64 hex digits.
        IntegrityError: one of the steps fails.
    """
    if not public_keys:
        raise InputError("no trusted keys were given, so nothing can be verified", "name at least one public key")
    if subject_digest is not None and not _SHA256_HEX.fullmatch(subject_digest):
        raise InputError("a subject's digest is 64 lower-case hex digits", "leave out the prefix sha256:")
    payload, signatures = _open_envelope(envelope)  # 1.
    # 2. Of several ids for one raw key, the first in order stands for it.
    by_raw_key = {keys.public_to_pem(public_keys[name]): name for name in sorted(public_keys, reverse=True)}
    message = pae(PAYLOAD_TYPE, payload)
    signers: set[str] = set()
    for hint, signature in signatures:
        candidates = [public_keys[hint]] if hint in public_keys else [public_keys[name] for name in by_raw_key.values()]
        signers.update(by_raw_key[keys.public_to_pem(key)] for key in candidates if _holds(key, signature, message))
    if not signers:
        raise IntegrityError("no trusted key signed this statement", _HINT)
    return Verified(_read_statement(payload, predicate_type, subject_digest), tuple(sorted(signers)))  # 3.


def strict_json(data: bytes) -> Any:
    """JSON in which no map names a field twice: two readers could pick different ones.

    Raises:
        IntegrityError: not JSON, or a field named twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError
        return fields

    try:
        return json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise IntegrityError("this is not JSON, or it names a field twice", _HINT) from None


def _open_envelope(envelope: Mapping[str, Any]) -> tuple[bytes, list[tuple[str, bytes]]]:
    malformed = IntegrityError("this is not a DSSE envelope", _HINT)
    if not isinstance(envelope, Mapping):
        raise malformed
    payload, listed = envelope.get("payload"), envelope.get("signatures")
    if not isinstance(payload, str) or not isinstance(listed, list) or not 0 < len(listed) <= MAX_SIGNATURES:
        raise malformed
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise IntegrityError("the envelope holds something other than an in-toto statement", _HINT)
    signatures = []
    try:
        for entry in listed:
            hint, signature = entry.get("keyid", ""), entry["sig"]
            if not isinstance(hint, str) or not isinstance(signature, str):
                raise malformed
            signatures.append((hint, unb64(signature)))
        return unb64(payload), signatures
    except (InputError, AttributeError, KeyError):
        raise malformed from None


def _holds(key: PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        keys.verify(key, signature, message)
    except IntegrityError:
        return False
    return True


def _read_statement(payload: bytes, predicate_type: str, subject_digest: str | None) -> dict[str, Any]:
    fields = strict_json(payload)
    if not isinstance(fields, dict) or fields.get("_type") != STATEMENT_TYPE:
        raise IntegrityError("the signed payload is not an in-toto Statement v1", _HINT)
    if fields.get("predicateType") != predicate_type:
        raise IntegrityError("the statement is of another kind than expected", _HINT)
    try:
        (subject,) = fields["subject"]
        found = subject["digest"]["sha256"]
        well_formed = isinstance(subject["name"], str) and bool(_SHA256_HEX.fullmatch(found))
        well_formed = well_formed and isinstance(fields["predicate"], dict)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise IntegrityError("the statement does not have one subject with a SHA-256 digest", _HINT)
    if subject_digest is not None and found != subject_digest:
        raise IntegrityError("the statement is about something else", _HINT)
    return fields
