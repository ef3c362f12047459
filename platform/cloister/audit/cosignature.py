"""What a witness says about a checkpoint: cosignature/v1 of C2SP tlog-cosignature, with Ed25519.

A cosignature states that, at its time, this was the largest tree of that log that the witness had seen, and that it
extends every one that the witness saw before. It is one more signature line of the checkpoint's note.

Guarantees: `cosigned` returns only cosignatures that hold over exactly this checkpoint and that time.

Does not guarantee: that the witness is independent of the log. Choose who keeps its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from cloister.audit import checkpoint
from cloister.audit.checkpoint import COSIGNATURE
from cloister.errors import InputError, IntegrityError

TIMESTAMP_BYTES = 8
SIGNATURE_BYTES = 64
MAX_TIMESTAMP = 2**63 - 1


@dataclass(frozen=True, slots=True)
class WitnessKey:
    """The public half of a witness's key, under the witness's name."""

    name: str
    public: bytes

    @classmethod
    def parse(cls, text: str) -> WitnessKey:
        """From the text form, `name+hash+key`.

        Raises:
            InputError: not a witness's verifier key.
        """
        return cls(*checkpoint.parse_verifier_key(text, COSIGNATURE))

    def to_text(self) -> str:
        return checkpoint.verifier_key_text(self.name, self.public, COSIGNATURE)


@dataclass(frozen=True, slots=True)
class Cosignature:
    """Witness `witness` (a name) saw the checkpoint at `timestamp` (Unix time, seconds)."""

    witness: str
    timestamp: int


def cosign(text: str, key: SigningKey, name: str, timestamp: int) -> str:
    """The signature line of witness `name` for the checkpoint with this note text.

    Raises:
        InputError: a time before 1970, or a name with a space or a plus sign.
    """
    if not 0 <= timestamp <= MAX_TIMESTAMP:
        raise InputError("a cosignature's time is in seconds since 1970", "set the witness's clock")
    public = bytes(key.verify_key)
    WitnessKey(name, public).to_text()  # refuses a name that a note cannot hold
    signature = key.sign(_message(text, timestamp)).signature
    blob = timestamp.to_bytes(TIMESTAMP_BYTES, "big") + signature
    return checkpoint.signature_line(name, checkpoint.key_id(name, public, COSIGNATURE), blob)


def cosigned(note: str, keys: Iterable[WitnessKey]) -> list[Cosignature]:
    """The cosignatures of known witnesses in `note`, of each key once, the latest. Lines of others are ignored.

    The log's own signature is not looked at: `checkpoint.verify` does.

    Raises:
        IntegrityError: not a signed note, or a line that claims to be by one of `keys` does not hold.
    """
    return [Cosignature(key.name, timestamp) for key, timestamp in _timestamps(note, keys).items()]


def require_cosigned(note: str, keys: Sequence[WitnessKey]) -> list[Cosignature]:
    """As `cosigned`, when every one of `keys` has to be there.

    Raises:
        IntegrityError: a witness's cosignature is missing, or does not hold.
    """
    found = _timestamps(note, keys)
    missing = sorted({key.name for key in keys if key not in found})
    if missing:
        raise IntegrityError(
            f"the checkpoint is not cosigned by {', '.join(missing)}",
            "ask for it again once the witness has seen the log: cloister audit witness",
        )
    return [Cosignature(key.name, timestamp) for key, timestamp in found.items()]


def lines_of(note: str, keys: Iterable[WitnessKey]) -> list[str]:
    """The signature lines in `note` of known witnesses, to be added to another copy of the same note.

    Raises:
        IntegrityError: as `cosigned`.
    """
    _timestamps(note, keys := list(keys))
    hints = {(key.name, checkpoint.key_id(key.name, key.public, COSIGNATURE)) for key in keys}
    lines = checkpoint.split(note)[1]
    return [
        checkpoint.signature_line(line.name, line.key_id, line.signature)
        for line in lines
        if (line.name, line.key_id) in hints
    ]


def _timestamps(note: str, keys: Iterable[WitnessKey]) -> dict[WitnessKey, int]:
    text, lines = checkpoint.split(note)
    found: dict[WitnessKey, int] = {}
    for key in keys:
        hint = checkpoint.key_id(key.name, key.public, COSIGNATURE)
        for line in lines:
            if (line.name, line.key_id) == (key.name, hint):
                found[key] = max(found.get(key, 0), _verified(text, key, line.signature))
    return found


def _verified(text: str, key: WitnessKey, blob: bytes) -> int:
    refused = IntegrityError(
        f"the cosignature of {key.name} does not hold", "fetch the checkpoint again, and check the witness's key"
    )
    timestamp = int.from_bytes(blob[:TIMESTAMP_BYTES], "big")
    if len(blob) != TIMESTAMP_BYTES + SIGNATURE_BYTES or timestamp > MAX_TIMESTAMP:
        raise refused
    try:
        VerifyKey(key.public).verify(_message(text, timestamp), blob[TIMESTAMP_BYTES:])
    except (BadSignatureError, ValueError):
        raise refused from None
    return timestamp


def _message(text: str, timestamp: int) -> bytes:
    return f"cosignature/v1\ntime {timestamp}\n{text}".encode()
