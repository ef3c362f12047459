"""The log's formats of FORMAT.md, frozen: logs, proofs and cosignatures that exist must verify for ever, others never.

Cosignatures and the tree are also checked by a second implementation, written here from the specifications alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from nacl.signing import SigningKey

from cloister.audit import cosignature, export, proof, siem
from cloister.audit.cosignature import WitnessKey
from cloister.audit.event import Event
from cloister.audit.witness import Witness
from cloister.errors import IntegrityError

FILE: dict[str, Any] = json.loads((Path(__file__).parent / "log.json").read_text(encoding="utf-8"))
LOG_PUBLIC = bytes(SigningKey(bytes.fromhex(FILE["log_seed"])).verify_key)
ORIGIN = "cloister.example/log"


def vectors(kind: str) -> Any:
    chosen = [pytest.param(one, id=one["scenario"]) for one in FILE["vectors"] if one["kind"] == kind]
    assert chosen
    return pytest.mark.parametrize("vector", chosen)


def judge(vector: dict[str, Any], action: Any) -> Any:
    """What `action` returns, or None once it has refused as it should."""
    if vector["expect"] == "success":
        return action()
    assert vector["expect"] == "integrity failure"
    with pytest.raises(IntegrityError):
        action()
    return None


@vectors("event")
def test_event(vector: dict[str, Any]) -> None:
    entry = vector["entry"].encode()
    event = judge(vector, lambda: Event.from_bytes(entry))
    if event:
        assert event == Event(**vector["event"])
        assert event.to_bytes() == entry


@vectors("cosignature")
def test_cosignature(vector: dict[str, Any]) -> None:
    key = WitnessKey.parse(vector["witness_key"])
    found = judge(vector, lambda: cosignature.require_cosigned(vector["note"], [key]))
    by_the_book = cosigned_by_the_book(vector["note"], vector["witness_key"])
    if found:
        assert [(one.witness, one.timestamp) for one in found] == [(key.name, vector["timestamp"])]
        assert by_the_book == vector["timestamp"]
    else:
        assert by_the_book is None


@vectors("add-checkpoint")
def test_add_checkpoint(vector: dict[str, Any]) -> None:
    seed = SigningKey(bytes.fromhex(FILE["witness_seed"]))
    witness = Witness("witness.example/w1", seed, {ORIGIN: LOG_PUBLIC})
    answer = witness.add_checkpoint(vector["request"].encode(), vector["known"], 1_795_339_803)
    assert (answer.status, answer.body) == (vector["status"], vector["answer"])
    assert (answer.latest is not None) == (vector["expect"] == "success")


@vectors("proof")
def test_proof(vector: dict[str, Any]) -> None:
    bundle = proof.parse(json.dumps(vector["bundle"]).encode())
    verify: Any = proof.verify_inclusion if bundle["format"] == proof.INCLUSION else proof.verify_consistency
    judge(vector, lambda: verify(bundle, vector["verifier_key"], [WitnessKey.parse(vector["witness_key"])]))


@vectors("export")
def test_export(vector: dict[str, Any]) -> None:
    key, data = WitnessKey.parse(vector["witness_key"]), vector["file"].encode()

    def check() -> Any:
        header, entries = export.open_export(io.BytesIO(data))
        assert header.verifier_key == vector["verifier_key"]
        return export.verify_export(header, entries, witnesses=[key])

    report = judge(vector, check)
    if report:
        assert (report.size, report.root_hex) == (vector["size"], vector["root"])
        assert [one.size for one in report.witnessed] == [vector["witnessed"]]
        assert tree_by_the_book(data.splitlines()[1:]).hex() == vector["root"]


@vectors("siem")
def test_siem(vector: dict[str, Any]) -> None:
    event = Event.from_bytes(vector["entry"].encode())
    assert siem.syslog(vector["index"], event, "authority.example").decode() == vector["syslog"]
    assert siem.cef(vector["index"], event, "2") == vector["cef"]


def test_the_examples_of_the_specification_are_among_the_vectors() -> None:
    text = (Path(export.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    for kind, field in (("event", "entry"), ("cosignature", "note"), ("add-checkpoint", "request"), ("siem", "cef")):
        assert any(one[field] in text for one in FILE["vectors"] if one["kind"] == kind), kind


def tree_by_the_book(entries: list[bytes]) -> bytes:
    """RFC 6962, section 2.1."""
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = 1
    while split * 2 < len(entries):
        split *= 2
    halves = tree_by_the_book(entries[:split]) + tree_by_the_book(entries[split:])
    return hashlib.sha256(b"\x01" + halves).digest()


def cosigned_by_the_book(note: str, witness_key: str) -> int | None:
    """C2SP signed-note and tlog-cosignature: the time of the witness's cosignature, if there is a good one."""
    name, hint, encoded = witness_key.split("+", 2)
    key = base64.b64decode(encoded)
    assert key[0] == 4
    assert hashlib.sha256(name.encode() + b"\n" + key).hexdigest()[:8] == hint
    body, signatures = note.split("\n\n")
    for line in signatures.splitlines():
        dash, signer, blob = line.split(" ")
        raw = base64.b64decode(blob)
        if dash != "\u2014" or signer != name or raw[:4].hex() != hint or len(raw) != 4 + 8 + 64:
            continue
        timestamp = int.from_bytes(raw[4:12], "big")
        message = f"cosignature/v1\ntime {timestamp}\n{body}\n".encode()
        try:
            Ed25519PublicKey.from_public_bytes(key[1:]).verify(raw[12:], message)
        except InvalidSignature:
            continue
        return timestamp
    return None
