from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from cloister.canonical import b64
from cloister.errors import InputError, IntegrityError
from cloister.signing import dsse, keys

KIND = "https://cloister.dev/approval/v1"
DIGEST = "ab" * 32
ALICE, BOB, MALLORY = keys.generate_p256(), keys.generate_ed25519(), keys.generate_ed25519()
TRUSTED: dict[str, keys.PublicKey] = {"alice": ALICE.public_key(), "bob": BOB.public_key()}
PAYLOAD = dsse.statement("adult@1", DIGEST, KIND, {"epsilon": 3.0})


def signed_by(*people: keys.PrivateKey, payload: bytes = PAYLOAD) -> dict[str, Any]:
    envelopes = [dsse.sign(payload, person) for person in people]
    return {**envelopes[0], "signatures": [one["signatures"][0] for one in envelopes]}


def check(envelope: Any, trusted: dict[str, keys.PublicKey] = TRUSTED, digest: str | None = DIGEST) -> dsse.Verified:
    return dsse.verify(envelope, trusted, predicate_type=KIND, subject_digest=digest)


@pytest.mark.parametrize("person", [ALICE, BOB])
def test_a_signed_statement_verifies(person: keys.PrivateKey) -> None:
    verified = check(json.loads(json.dumps(signed_by(person))))
    assert verified.predicate == {"epsilon": 3}
    assert verified.statement["subject"] == [{"name": "adult@1", "digest": {"sha256": DIGEST}}]
    assert verified.key_ids == (("alice",) if person is ALICE else ("bob",))
    assert check(signed_by(person), digest=None) == verified


def test_pae_is_that_of_the_specification() -> None:
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_two_people_count_as_two() -> None:
    assert check(signed_by(ALICE, BOB)).key_ids == ("alice", "bob")


def test_one_key_under_two_ids_counts_once() -> None:
    trusted = {"a1": ALICE.public_key(), "a2": keys.public_from_pem(keys.public_to_pem(ALICE.public_key()))}
    envelope = signed_by(ALICE, ALICE)
    envelope["signatures"][0]["keyid"], envelope["signatures"][1]["keyid"] = "a1", "a2"
    assert check(envelope, trusted).key_ids == ("a1",)


def test_the_same_signature_repeated_counts_once() -> None:
    assert check(signed_by(BOB, BOB, BOB)).key_ids == ("bob",)


def test_a_stranger_beside_a_trusted_signer_counts_for_nothing() -> None:
    assert check(signed_by(MALLORY, ALICE)).key_ids == ("alice",)


def test_a_stranger_alone_is_refused_under_any_key_id() -> None:
    for hint in ("alice", "", "nobody"):
        envelope = signed_by(MALLORY)
        envelope["signatures"][0]["keyid"] = hint
        with pytest.raises(IntegrityError):
            check(envelope)


def test_the_key_id_is_only_a_hint() -> None:
    envelope = signed_by(ALICE)
    del envelope["signatures"][0]["keyid"]
    assert check(envelope).key_ids == ("alice",)
    envelope["signatures"][0]["keyid"] = "bob"
    with pytest.raises(IntegrityError):
        check(envelope)


def test_no_trusted_keys_is_an_error_not_a_pass() -> None:
    with pytest.raises(InputError):
        check(signed_by(ALICE), {})


def test_every_flipped_bit_of_payload_and_signature_is_refused() -> None:
    envelope = signed_by(BOB)
    for field in ("payload", "sig"):
        place = envelope if field == "payload" else envelope["signatures"][0]
        raw = bytearray(dsse.unb64(place[field]))
        for bit in range(len(raw) * 8):
            raw[bit // 8] ^= 1 << bit % 8
            changed = copy.deepcopy(envelope)
            (changed if field == "payload" else changed["signatures"][0])[field] = b64(bytes(raw))
            with pytest.raises(IntegrityError):
                check(changed)
            raw[bit // 8] ^= 1 << bit % 8


def test_another_subject_or_predicate_is_refused() -> None:
    with pytest.raises(IntegrityError):
        check(signed_by(ALICE), digest="cd" * 32)
    with pytest.raises(InputError):
        check(signed_by(ALICE), digest="sha256:" + DIGEST)
    other = dsse.statement("adult@1", DIGEST, "https://cloister.dev/gate/v1", {})
    with pytest.raises(IntegrityError):
        check(signed_by(ALICE, payload=other))


def test_a_signature_over_another_payload_type_is_refused() -> None:
    payload_type = "application/json"
    envelope = {
        "payload": b64(PAYLOAD),
        "payloadType": payload_type,
        "signatures": [{"keyid": "alice", "sig": b64(keys.sign(ALICE, dsse.pae(payload_type, PAYLOAD)))}],
    }
    relabelled = {**signed_by(ALICE), "payloadType": payload_type}
    for changed in (envelope, {**envelope, "payloadType": dsse.PAYLOAD_TYPE}, relabelled):
        with pytest.raises(IntegrityError):
            check(changed)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b'{"_type":"https://in-toto.io/Statement/v0.1"}',
        PAYLOAD.replace(b'"predicate":', b'"predicate":{},"predicate":'),
        PAYLOAD.replace(b'"subject":[', b'"subject":[{"name":"x","digest":{"sha256":"' + b"00" * 32 + b'"}},'),
        PAYLOAD.replace(b'"subject":[', b'"subject":[],"x":['),
        PAYLOAD.replace(b'"sha256"', b'"sha512"'),
        b"[" * 100_000,
    ],
)
def test_a_signed_payload_that_is_no_statement_is_refused(payload: bytes) -> None:
    with pytest.raises(IntegrityError):
        check(signed_by(ALICE, payload=payload))


@pytest.mark.parametrize(
    "envelope",
    [
        None,
        [],
        {},
        {**signed_by(ALICE), "signatures": []},
        {**signed_by(ALICE), "signatures": None},
        {**signed_by(ALICE), "signatures": ["x"]},
        {**signed_by(ALICE), "signatures": [{}]},
        {**signed_by(ALICE), "signatures": [{"keyid": 1, "sig": "AA=="}]},
        {**signed_by(ALICE), "signatures": [{"keyid": "alice", "sig": "?"}]},
        {**signed_by(ALICE), "signatures": signed_by(ALICE)["signatures"] * 65},
        {**signed_by(ALICE), "payload": "?"},
        {**signed_by(ALICE), "payload": 7},
    ],
)
def test_a_malformed_envelope_is_refused(envelope: Any) -> None:
    with pytest.raises(IntegrityError):
        check(envelope)


def test_a_statement_needs_a_plain_digest() -> None:
    for digest in ("", "AB" * 32, "sha256:" + DIGEST, DIGEST + "\n"):
        with pytest.raises(InputError):
            dsse.statement("x", digest, KIND, {})
