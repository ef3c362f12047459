"""Signed states of the log: C2SP tlog-checkpoint v1.0.0 inside a C2SP signed note, with Ed25519.

Guarantees: `verify` returns a checkpoint only if the note carries a good signature of the given key over exactly that
origin, size and root. Lines signed by others (witnesses) are allowed and ignored.

Does not guarantee: that it is the latest, or the only, checkpoint of that log. Keep the last one you saw and give it
to `cloister.audit.verify` as `trusted`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from cloister.canonical import b64, unb64
from cloister.errors import InputError, IntegrityError

ED25519 = b"\x01"  # C2SP signed-note, "Signature types"
COSIGNATURE = b"\x04"  # the same: timestamped Ed25519 witness cosignatures
KEY_ID_BYTES = 4
KEY_BYTES = 32
ROOT_BYTES = 32
MAX_SIZE = (1 << 63) - 1
MAX_SIGNATURES = 100
_SIGNATURE_PREFIX = "\u2014 "  # an em dash and a space
_NAME = re.compile(r"[^\s+\x00-\x1f\x7f\ud800-\udfff]+")
_ORIGIN = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The log `origin` had `size` entries, and their Merkle root was `root`."""

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if not _ORIGIN.fullmatch(self.origin) or not 0 <= self.size <= MAX_SIZE or len(self.root) != ROOT_BYTES:
            raise InputError("this is not a checkpoint", "it has a one-line origin, a size from 0 up, a 32-byte root")

    def to_text(self) -> str:
        """The note's text: what is signed (C2SP tlog-checkpoint, "Note text")."""
        return f"{self.origin}\n{self.size}\n{b64(self.root)}\n"


@dataclass(frozen=True, slots=True)
class SignatureLine:
    """What a signature line of a note claims."""

    name: str
    key_id: bytes
    signature: bytes


def key_id(name: str, public: bytes, kind: bytes = ED25519) -> bytes:
    """C2SP signed-note: the first 4 bytes of SHA-256(name ‖ LF ‖ kind ‖ public key). A hint, never an identity."""
    return hashlib.sha256(name.encode() + b"\n" + kind + public).digest()[:KEY_ID_BYTES]


def verifier_key_text(name: str, public: bytes, kind: bytes = ED25519) -> str:
    """The verifier key as tlog tools take it: `name+hash+key`. Its `kind` is `ED25519`, or `COSIGNATURE` of a witness.

    Raises:
        InputError: a name with a space or a plus sign, or a key that is not 32 bytes.
    """
    _check_name(name)
    if len(public) != KEY_BYTES:
        raise InputError("an Ed25519 public key has 32 bytes", "pass bytes(signing_key.verify_key)")
    return f"{name}+{key_id(name, public, kind).hex()}+{b64(kind + public)}"


def parse_verifier_key(text: str, kind: bytes = ED25519) -> tuple[str, bytes]:
    """The name and the public key in a verifier key.

    Raises:
        InputError: not an Ed25519 verifier key of this kind.
    """
    name, _, rest = text.strip().partition("+")
    _, _, encoded = rest.partition("+")
    key = unb64(encoded)[1:]
    if len(key) != KEY_BYTES or verifier_key_text(name, key, kind) != text.strip():
        what = "a log's" if kind == ED25519 else "a witness's"
        raise InputError(f"this is not {what} Ed25519 verifier key", "it reads name+hash+key, in one line")
    return name, key


def sign(checkpoint: Checkpoint, signing_key: SigningKey, name: str) -> str:
    """The signed note. `name` is the key's name; C2SP asks that it be the same as the origin.

    Raises:
        InputError: a name with a space or a plus sign.
    """
    _check_name(name)
    text = checkpoint.to_text()
    signature = signing_key.sign(text.encode()).signature
    return f"{text}\n{signature_line(name, key_id(name, bytes(signing_key.verify_key)), signature)}"


def signature_line(name: str, hint: bytes, signature: bytes) -> str:
    """One line of a signed note: an em dash, the key's name, and the base64 of key id and signature."""
    return f"{_SIGNATURE_PREFIX}{name} {b64(hint + signature)}\n"


def verify(note: str, verify_key: bytes, origin: str) -> Checkpoint:
    """The checkpoint in `note`, once it is known to come from `verify_key` and to be about `origin`.

    Raises:
        InputError: `verify_key` is not 32 bytes.
        IntegrityError: no good signature of that key, another origin, or not a checkpoint.
    """
    if len(verify_key) != KEY_BYTES:
        raise InputError("an Ed25519 public key has 32 bytes", "pass bytes(signing_key.verify_key)")
    text, lines = split(note)
    # A signature of this very key that does not hold spoils the note, even beside one that does (C2SP signed-note).
    ours = [line.signature for line in lines if line.key_id == key_id(line.name, verify_key)]
    if not ours:
        raise _refused("the checkpoint is not signed by the expected key")
    try:
        for signature in ours:
            VerifyKey(verify_key).verify(text.encode(), signature)
    except (BadSignatureError, ValueError):
        raise _refused("the checkpoint's signature does not hold") from None
    checkpoint = parse(text)
    if checkpoint.origin != origin:
        raise _refused("the checkpoint belongs to another log")
    return checkpoint


def split(note: str) -> tuple[str, list[SignatureLine]]:
    """The text of a signed note, and its signature lines, none of which is verified yet.

    Raises:
        IntegrityError: not a signed note.
    """
    text, separator, signatures = note.rpartition("\n\n")
    lines = signatures.split("\n")
    if not separator or lines.pop() != "" or not 0 < len(lines) <= MAX_SIGNATURES:
        raise _refused("this is not a signed checkpoint")
    return text + "\n", [_signature(line) for line in lines]


def parse(text: str) -> Checkpoint:
    """The checkpoint that the text of a note states. Nothing about it is verified.

    Raises:
        IntegrityError: not the text of a checkpoint.
    """
    lines = text.split("\n")
    if len(lines) != 4 or lines[3] or not _ORIGIN.fullmatch(lines[0]) or not _SIZE.fullmatch(lines[1]):
        raise _refused("the signed text is not a checkpoint")
    try:
        checkpoint = Checkpoint(lines[0], int(lines[1]), unb64(lines[2]))
    except InputError:
        raise _refused("the signed text is not a checkpoint") from None
    if checkpoint.to_text() != text:
        raise _refused("the signed text is not a checkpoint")
    return checkpoint


def _signature(line: str) -> SignatureLine:
    name, _, encoded = line.removeprefix(_SIGNATURE_PREFIX).rpartition(" ")
    if not line.startswith(_SIGNATURE_PREFIX) or not _NAME.fullmatch(name):
        raise _refused("the checkpoint has a malformed signature line")
    try:
        blob = unb64(encoded)
    except InputError:
        blob = b""
    if b64(blob) != encoded or len(blob) <= KEY_ID_BYTES:
        raise _refused("the checkpoint has a malformed signature line")
    return SignatureLine(name, blob[:KEY_ID_BYTES], blob[KEY_ID_BYTES:])


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError("a checkpoint key needs a name without spaces and plus signs", "use the log's origin")


def _refused(message: str) -> IntegrityError:
    return IntegrityError(message, "fetch the checkpoint again, and check the log's verifier key")
