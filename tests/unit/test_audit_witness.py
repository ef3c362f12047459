"""A witness: C2SP tlog-cosignature and tlog-witness, without a disk or a network."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from nacl.signing import SigningKey

from cloister.audit import checkpoint, cosignature, merkle, proof
from cloister.audit.cosignature import Cosignature, WitnessKey, cosign, cosigned, lines_of, require_cosigned
from cloister.audit.event import Event
from cloister.audit.witness import MAX_PROOF, SIZE_TYPE, Request, Witness
from cloister.canonical import b64
from cloister.errors import InputError, IntegrityError

LOG_KEY = SigningKey(bytes(32))
LOG_PUBLIC = bytes(LOG_KEY.verify_key)
ORIGIN = "cloister.example/log"
VERIFIER_KEY = checkpoint.verifier_key_text(ORIGIN, LOG_PUBLIC)
KEY = SigningKey(b"\x07" * 32)
WITNESS = Witness("witness.example", KEY, {ORIGIN: LOG_PUBLIC})
PUBLIC = WitnessKey("witness.example", bytes(KEY.verify_key))
NOW = 1_795_339_800

ENTRIES = [
    Event(
        time="2026-11-22T09:30:00.000Z", actor="p-1", action="lease.grant", resource="adult@1", outcome="success",
        details={"step": index},
    ).to_bytes()
    for index in range(20)
]  # fmt: skip
LEAVES = [merkle.leaf_hash(entry) for entry in ENTRIES]
OTHER = [*LEAVES[:3], merkle.leaf_hash(b"other"), *LEAVES[4:]]


def note_of(leaves: Sequence[bytes], key: SigningKey = LOG_KEY, origin: str = ORIGIN) -> str:
    return checkpoint.sign(checkpoint.Checkpoint(origin, len(leaves), merkle.root_of(leaves)), key, origin)


def consistency(leaves: Sequence[bytes], first: int) -> list[bytes]:
    return merkle.consistency_proof(
        first, len(leaves), lambda height, index: merkle.root_of(leaves[index << height : (index + 1) << height])
    )


def request(leaves: Sequence[bytes], old: int) -> bytes:
    return Request(old, consistency(leaves, old), note_of(leaves)).to_bytes()


NOTE = note_of(LEAVES)
COSIGNED = NOTE + cosign(checkpoint.split(NOTE)[0], KEY, "witness.example", NOW)


# ---- cosignatures ----


def test_the_example_of_the_specification_has_our_layout() -> None:
    """C2SP tlog-cosignature, the first example; its keys are not published."""
    log = "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8="
    witness = "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA=="
    note = (
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        f"\u2014 example.com/behind-the-sofa {log}\n\u2014 witness.example.com/w1 {witness}\n"
    )
    text, lines = checkpoint.split(note)
    assert checkpoint.parse(text).size == 20852163
    assert int.from_bytes(lines[1].signature[:8], "big") == 1679315147
    assert len(lines[1].signature) == cosignature.TIMESTAMP_BYTES + cosignature.SIGNATURE_BYTES


def test_a_cosignature_signs_what_the_specification_says() -> None:
    text, lines = checkpoint.split(COSIGNED)
    blob = lines[-1].signature
    KEY.verify_key.verify(f"cosignature/v1\ntime {NOW}\n{text}".encode(), blob[8:])
    assert lines[-1].key_id == checkpoint.key_id("witness.example", PUBLIC.public, b"\x04")
    assert PUBLIC.to_text().endswith(b64(b"\x04" + PUBLIC.public))
    assert WitnessKey.parse(PUBLIC.to_text()) == PUBLIC
    with pytest.raises(InputError):
        WitnessKey.parse(VERIFIER_KEY)  # a log's key is not a witness's
    with pytest.raises(InputError):
        checkpoint.parse_verifier_key(PUBLIC.to_text())


def test_a_known_witness_is_found_and_others_are_passed_over() -> None:
    stranger = WitnessKey("stranger.example", bytes(SigningKey(b"\x08" * 32).verify_key))
    same_name = WitnessKey("witness.example", stranger.public)
    assert cosigned(COSIGNED, [PUBLIC, stranger]) == [Cosignature("witness.example", NOW)]
    assert require_cosigned(COSIGNED, [PUBLIC]) == [Cosignature("witness.example", NOW)]
    assert checkpoint.verify(COSIGNED, LOG_PUBLIC, ORIGIN).size == 20
    assert cosigned(NOTE, [PUBLIC]) == []
    assert lines_of(COSIGNED, [PUBLIC]) == [COSIGNED.removeprefix(NOTE)]
    for missing in ([stranger], [PUBLIC, stranger], [PUBLIC, same_name]):
        with pytest.raises(IntegrityError, match="not cosigned"):
            require_cosigned(COSIGNED, missing)


def test_the_latest_of_two_cosignatures_counts() -> None:
    later = COSIGNED + cosign(checkpoint.split(NOTE)[0], KEY, "witness.example", NOW + 60)
    assert cosigned(later, [PUBLIC]) == [Cosignature("witness.example", NOW + 60)]


def check_both(note: str) -> None:
    checkpoint.verify(note, LOG_PUBLIC, ORIGIN)
    require_cosigned(note, [PUBLIC])


def test_every_flipped_bit_of_a_cosigned_checkpoint_is_refused() -> None:
    raw = COSIGNED.encode()
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            check_both(changed.decode("utf-8", "surrogateescape"))


def test_a_cosignature_is_of_one_checkpoint_and_one_time() -> None:
    line = COSIGNED.removeprefix(NOTE)
    with pytest.raises(IntegrityError, match="does not hold"):
        cosigned(note_of(LEAVES[:19]) + line, [PUBLIC])
    name, blob = "witness.example", checkpoint.split(COSIGNED)[1][-1].signature
    hint = checkpoint.key_id(name, PUBLIC.public, b"\x04")
    for bad in ((NOW + 1).to_bytes(8, "big") + blob[8:], blob[8:], blob + b"x", b"\x80" + blob[1:], blob[:8]):
        with pytest.raises(IntegrityError, match="does not hold"):
            cosigned(NOTE + checkpoint.signature_line(name, hint, bad), [PUBLIC])
    with pytest.raises(InputError):
        cosign("x", KEY, name, -1)
    with pytest.raises(InputError):
        cosign("x", KEY, "a b", NOW)


# ---- add-checkpoint ----


def test_a_growing_log_is_cosigned_step_by_step() -> None:
    known: str | None = None
    old = 0
    for size in (0, 1, 1, 7, 20, 20):
        answer = WITNESS.add_checkpoint(request(LEAVES[:size], old), known, NOW)
        assert (answer.status, answer.latest) == (200, note_of(LEAVES[:size]))
        assert require_cosigned(note_of(LEAVES[:size]) + answer.body, [PUBLIC])
        known, old = answer.latest, size


def refused(status: int, body: bytes, known: str | None = None) -> str:
    answer = WITNESS.add_checkpoint(body, known, NOW)
    assert (answer.status, answer.latest) == (status, None)
    assert "\u2014" not in answer.body
    assert (answer.content_type == SIZE_TYPE) == (status == 409)
    return answer.body


def test_an_unknown_log_is_not_found() -> None:
    refused(404, Request(0, [], note_of(LEAVES, origin="other.example/log")).to_bytes())


def test_a_checkpoint_that_the_log_did_not_sign_is_forbidden() -> None:
    refused(403, Request(0, [], note_of(LEAVES, SigningKey(b"\x01" * 32))).to_bytes())
    refused(403, Request(0, [], NOTE.replace("\n20\n", "\n21\n")).to_bytes())


def test_another_old_size_is_a_conflict_that_says_the_right_one() -> None:
    assert refused(409, request(LEAVES, 0), note_of(LEAVES[:7])) == "7\n"
    assert refused(409, request(LEAVES, 8), note_of(LEAVES[:7])) == "7\n"
    assert refused(409, request(LEAVES, 8)) == "0\n"


def test_a_shortened_log_is_never_cosigned() -> None:
    """Whoever holds the log's key shows an old log: it cannot name the old size that the witness knows."""
    for size in range(19):
        assert refused(409, request(LEAVES[:size], size), NOTE) == "20\n"
        refused(400, Request(20, [], note_of(LEAVES[:size])).to_bytes(), NOTE)


def test_two_forks_are_never_both_cosigned() -> None:
    known = note_of(LEAVES[:7])
    assert WITNESS.add_checkpoint(request(LEAVES, 7), known, NOW).status == 200
    refused(422, request(OTHER, 7), known)
    refused(422, Request(7, consistency(LEAVES, 7), note_of(OTHER)).to_bytes(), known)
    assert refused(409, request(OTHER[:7], 7), known) == "7\n"  # the same size, another root
    # And the other way round: who was shown the fork first refuses the true log.
    refused(422, request(LEAVES, 7), note_of(OTHER[:7]))


def test_a_proof_that_was_changed_in_any_bit_is_refused() -> None:
    known, good = note_of(LEAVES[:7]), consistency(LEAVES, 7)
    for at in range(len(good)):
        for bit in range(256):
            changed = bytearray(good[at])
            changed[bit // 8] ^= 1 << bit % 8
            refused(422, Request(7, [*good[:at], bytes(changed), *good[at + 1 :]], NOTE).to_bytes(), known)
    for bad in (good[:-1], [*good, good[0]], good[::-1], []):
        refused(422, Request(7, bad, NOTE).to_bytes(), known)
    refused(422, Request(0, good, NOTE).to_bytes())  # from the empty log the proof is empty


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"old 0\n",
        b"old 0\n\n",
        b"old 0\n" + NOTE.encode(),
        b"old 00\n\n" + NOTE.encode(),
        b"old -1\n\n" + NOTE.encode(),
        b"old +1\n\n" + NOTE.encode(),
        b"old \xd9\xa1\n\n" + NOTE.encode(),
        b"old 1 \n\n" + NOTE.encode(),
        b"old 99999999999999999999\n\n" + NOTE.encode(),
        b"Old 0\n\n" + NOTE.encode(),
        b"old 0\r\n\r\n" + NOTE.encode(),
        b"old 7\nAAAA\n\n" + NOTE.encode(),
        b"old 7\nx\n\n" + NOTE.encode(),
        b"old 7\n" + b64(bytes(31) + b"\x01").replace("E=", "F=").encode() + b"\n\n" + NOTE.encode(),
        b"old 0\n\n" + NOTE.encode() + b"\n",
        b"old 0\n\n" + NOTE.encode()[:-1],
        b"old 0\n\nnot a checkpoint\n\n" + NOTE.splitlines(keepends=True)[-1].encode(),
        Request(0, [bytes(32)] * (MAX_PROOF + 1), NOTE).to_bytes(),
    ],
)
def test_a_malformed_request_is_a_bad_request(body: bytes) -> None:
    refused(400, body)


def test_a_request_reads_as_it_was_written() -> None:
    for old in (0, 7):
        one = Request(old, consistency(LEAVES, old), NOTE)
        assert Request.from_bytes(one.to_bytes()) == one
        assert one.to_bytes().startswith(f"old {old}\n".encode())
        assert WITNESS.origin_of(one.to_bytes()) == ORIGIN
    assert WITNESS.origin_of(b"junk") == ""


def test_a_witness_whose_memory_was_changed_says_so() -> None:
    for known in ("", "junk", note_of(LEAVES[:7], SigningKey(b"\x01" * 32))):
        with pytest.raises(IntegrityError):
            WITNESS.add_checkpoint(request(LEAVES, 7), known, NOW)


# ---- proofs as files ----


def included(index: int, note: str = COSIGNED) -> bytes:
    path = merkle.inclusion_proof(
        index, len(LEAVES), lambda height, at: merkle.root_of(LEAVES[at << height : (at + 1) << height])
    )
    return json.dumps(proof.inclusion_bundle(VERIFIER_KEY, index, ENTRIES[index], path, note)).encode()


def grown(first: int) -> bytes:
    bundle = proof.consistency_bundle(VERIFIER_KEY, note_of(LEAVES[:first]), COSIGNED, consistency(LEAVES, first))
    return json.dumps(bundle).encode()


def test_a_proof_of_an_entry_verifies_with_public_keys_alone() -> None:
    for index in range(len(LEAVES)):
        found = proof.verify_inclusion(proof.parse(included(index)), VERIFIER_KEY, [PUBLIC])
        assert (found.index, found.checkpoint.size, found.event.details) == (index, 20, {"step": index})
        assert found.cosignatures == [Cosignature("witness.example", NOW)]


def test_a_proof_of_growth_verifies_with_public_keys_alone() -> None:
    for first in range(len(LEAVES) + 1):
        found = proof.verify_consistency(proof.parse(grown(first)), VERIFIER_KEY, [PUBLIC])
        assert (found.first.size, found.second.size) == (first, 20)


@pytest.mark.parametrize("data", [included(3), grown(7)])
def test_every_flipped_bit_of_a_proof_is_refused(data: bytes) -> None:
    """All bits but those that say nothing: the hint of the log's key, for which the verifier has the true one."""
    told = json.loads(data)
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            bundle = proof.parse(bytes(changed))
            check = proof.verify_inclusion if bundle["format"] == proof.INCLUSION else proof.verify_consistency
            check(bundle, VERIFIER_KEY, [PUBLIC])
        except (InputError, IntegrityError):
            continue
        assert {**bundle, "verifier_key": ""} == {**told, "verifier_key": ""}, bit


def test_a_proof_from_elsewhere_is_refused() -> None:
    good = proof.parse(included(3))
    for change in (
        {"index": 4}, {"index": -1}, {"index": 20}, {"entry": ENTRIES[4].decode()}, {"entry": "\ud800"},
        {"proof": good["proof"][:-1]}, {"proof": good["proof"][::-1]}, {"proof": [*good["proof"], good["proof"][0]]},
        {"proof": ["x"]}, {"checkpoint": note_of(LEAVES[:19])}, {"checkpoint": note_of(OTHER)}, {"checkpoint": ""},
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            proof.verify_inclusion(good | change, VERIFIER_KEY)
    assert proof.verify_inclusion(proof.parse(included(3, NOTE)), VERIFIER_KEY).cosignatures == []
    with pytest.raises(IntegrityError, match="not cosigned"):
        proof.verify_inclusion(proof.parse(included(3, NOTE)), VERIFIER_KEY, [PUBLIC])
    stranger = checkpoint.verifier_key_text(ORIGIN, bytes(SigningKey(b"\x01" * 32).verify_key))
    with pytest.raises(IntegrityError):
        proof.verify_inclusion(good, stranger)


def test_growth_from_a_fork_or_backwards_is_refused() -> None:
    good = proof.parse(grown(7))
    for change in (
        {"first": note_of(OTHER[:7])}, {"first": note_of(LEAVES[:6])}, {"second": note_of(OTHER)},
        {"first": good["second"], "second": good["first"]}, {"proof": good["proof"][1:]}, {"first": ""},
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            proof.verify_consistency(good | change, VERIFIER_KEY)


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b"x" * (proof.MAX_BYTES + 1),
     included(3).replace(b"log-proof/v1", b"log-proof/v2"), included(3).replace(b'"index": 3', b'"index": true'),
     included(3).replace(b'"index": 3', b'"index": 3.0'), included(3)[:-1] + b', "more": 1}',
     included(3).replace(b'"proof": [', b'"proof": [1, '), grown(7).replace(b'"first"', b'"fist"')],
)  # fmt: skip
def test_what_is_no_proof_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        proof.parse(data)
