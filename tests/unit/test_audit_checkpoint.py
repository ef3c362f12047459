from __future__ import annotations

import pytest
from nacl.signing import SigningKey

from cloister.audit import checkpoint
from cloister.audit.checkpoint import Checkpoint
from cloister.errors import InputError, IntegrityError

KEY = SigningKey(bytes(32))
PUBLIC = bytes(KEY.verify_key)
ORIGIN = "cloister.example/log"
POINT = Checkpoint(ORIGIN, 7, bytes(range(32)))
NOTE = checkpoint.sign(POINT, KEY, ORIGIN)


def signed(text: str) -> str:
    """A note over any text, signed with the right key."""
    tail = checkpoint.b64(checkpoint.key_id(ORIGIN, PUBLIC) + KEY.sign(text.encode()).signature)
    return f"{text}\n\u2014 {ORIGIN} {tail}\n"


def refuse(note: str) -> None:
    with pytest.raises(IntegrityError):
        checkpoint.verify(note, PUBLIC, ORIGIN)


def test_a_signed_checkpoint_verifies() -> None:
    assert NOTE.startswith(f"{ORIGIN}\n7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n\n\u2014 {ORIGIN} ")
    assert checkpoint.verify(NOTE, PUBLIC, ORIGIN) == POINT
    assert checkpoint.verify(signed(POINT.to_text()), PUBLIC, ORIGIN) == POINT


def test_the_verifier_key_is_that_of_the_signed_note_specification() -> None:
    # golang.org/x/mod/sumdb/note, package example.
    text = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    name, public = checkpoint.parse_verifier_key(text)
    assert name == "PeterNeumann"
    assert checkpoint.verifier_key_text(name, public) == text
    assert checkpoint.key_id(name, public).hex() == "c74f20a3"


def test_a_note_of_the_go_implementation_has_a_signature_we_accept() -> None:
    """The text is no checkpoint, so it is refused, but only after its signature was found good."""
    note = (
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n\n"
        "\u2014 PeterNeumann "
        "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    _, public = checkpoint.parse_verifier_key("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    with pytest.raises(IntegrityError, match="not a checkpoint"):
        checkpoint.verify(note, public, ORIGIN)
    with pytest.raises(IntegrityError, match="does not hold"):
        checkpoint.verify(note.replace("problem is", "problem was"), public, ORIGIN)


def test_witness_signatures_beside_ours_are_ignored() -> None:
    witness = checkpoint.sign(POINT, SigningKey(b"\x01" * 32), "witness.example").splitlines()[-1]
    assert checkpoint.verify(f"{NOTE}{witness}\n", PUBLIC, ORIGIN) == POINT


def test_a_bad_signature_of_our_key_spoils_the_note() -> None:
    bad = checkpoint.b64(checkpoint.key_id(ORIGIN, PUBLIC) + bytes(64))
    refuse(f"{NOTE}\u2014 {ORIGIN} {bad}\n")


def test_every_flipped_bit_is_refused() -> None:
    raw = NOTE.encode()
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        refuse(changed.decode("utf-8", "surrogateescape"))


def test_every_cut_is_refused() -> None:
    for size in range(len(NOTE)):
        refuse(NOTE[:size])


def test_another_key_or_another_log_is_refused() -> None:
    with pytest.raises(IntegrityError):
        checkpoint.verify(NOTE, bytes(SigningKey(b"\x01" * 32).verify_key), ORIGIN)
    with pytest.raises(IntegrityError):
        checkpoint.verify(NOTE, PUBLIC, "other.example/log")
    with pytest.raises(InputError):
        checkpoint.verify(NOTE, PUBLIC[:31], ORIGIN)


ROOT = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@pytest.mark.parametrize(
    "text",
    [
        "\n",
        f"{ORIGIN}\n7\n",
        f"{ORIGIN}\n07\n{ROOT}\n",
        f"{ORIGIN}\n-7\n{ROOT}\n",
        f"{ORIGIN}\n+7\n{ROOT}\n",
        f"{ORIGIN}\n\u0667\n{ROOT}\n",
        f"{ORIGIN}\n9223372036854775808\n{ROOT}\n",
        f"{ORIGIN}\n7\n{ROOT[:-2]}==\n",
        f"{ORIGIN}\n7\n{ROOT.replace('8=', '9=')}\n",
        f"{ORIGIN}\n7\nAAAA\n",
        f"{ORIGIN}\n7\n{ROOT}\nextension\n",
        f"{ORIGIN}\n7\n{ROOT}\n\n{ORIGIN}\n8\n{ROOT}\n",
        f"{ORIGIN}\r\n7\r\n{ROOT}\r\n",
    ],
)
def test_a_signed_text_that_is_no_checkpoint_is_refused(text: str) -> None:
    refuse(signed(text))


@pytest.mark.parametrize(
    "note", ["", "\n\n", "x", POINT.to_text(), POINT.to_text() + "\n", NOTE * 2, NOTE + "\n", "\n" + NOTE]
)
def test_what_is_no_signed_note_is_refused(note: str) -> None:
    refuse(note)


def test_a_note_with_too_many_signatures_is_refused() -> None:
    refuse(NOTE + NOTE.splitlines()[-1].join(["", "\n"]) * checkpoint.MAX_SIGNATURES)


@pytest.mark.parametrize("fields", [("", 1, bytes(32)), ("a\nb", 1, bytes(32)), ("a", -1, bytes(32)), ("a", 1, b"")])
def test_an_impossible_checkpoint_is_not_made(fields: tuple[str, int, bytes]) -> None:
    with pytest.raises(InputError):
        Checkpoint(*fields)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b"])
def test_a_key_name_that_notes_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        checkpoint.sign(POINT, KEY, name)
    with pytest.raises(InputError):
        checkpoint.verifier_key_text(name, PUBLIC)


@pytest.mark.parametrize(
    "text", ["", "a", "a+b", "a+00000000+AAAA", "PeterNeumann+c74f20a4+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"]
)
def test_a_damaged_verifier_key_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        checkpoint.parse_verifier_key(text)
