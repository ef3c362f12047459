"""A witness of logs, without its disk and its network: C2SP tlog-witness, `add-checkpoint`.

Guarantees: it cosigns a checkpoint only if the log signed it and its tree extends the last one that the witness
cosigned. A shortened log and a forked one are refused, whoever holds the log's key. The caller must keep
`Answer.latest` durably before it passes the answer on, and must not run two requests about one log at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nacl.signing import SigningKey

from cloister.audit import checkpoint, cosignature
from cloister.audit.checkpoint import COSIGNATURE, Checkpoint
from cloister.audit.merkle import EMPTY_ROOT, HASH_BYTES, verify_consistency
from cloister.canonical import b64, unb64
from cloister.errors import InputError, IntegrityError

MAX_PROOF = 63  # tlog-witness: "MUST NOT send more than 63 consistency proof lines"
MAX_REQUEST_BYTES = 64 * 1024
SIZE_TYPE = "text/x.tlog.size"
TEXT_TYPE = "text/plain; charset=utf-8"
_OLD = re.compile(r"old (0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True)
class Request:
    """The body of `add-checkpoint`: the log grew from `old_size` to what `note` says, as `proof` shows."""

    old_size: int
    proof: Sequence[bytes]
    note: str

    def to_bytes(self) -> bytes:
        lines = [f"old {self.old_size}", *map(b64, self.proof), "", self.note]
        return "\n".join(lines).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Request:
        """Strict.

        Raises:
            InputError: not the body of such a request.
        """
        refused = InputError("this is not the body of add-checkpoint", "see https://c2sp.org/tlog-witness")
        try:
            head, separator, note = body.decode().partition("\n\n")
            first, *lines = head.split("\n")
            proof = [unb64(line) for line in lines]
        except (UnicodeDecodeError, InputError):
            raise refused from None
        old = _OLD.fullmatch(first)
        right = all(len(value) == HASH_BYTES and b64(value) == line for value, line in zip(proof, lines, strict=True))
        if not old or not separator or not right or len(proof) > MAX_PROOF or len(body) > MAX_REQUEST_BYTES:
            raise refused
        return cls(int(old[1]), proof, note)


@dataclass(frozen=True, slots=True)
class Answer:
    """What to send back. `latest`, if there is one, is the note to remember before anything is sent."""

    status: int
    body: str
    content_type: str = TEXT_TYPE
    latest: str | None = None


class Witness:
    """Witness `name`, which signs with `key` and knows `logs`: the public key of each, by its origin."""

    def __init__(self, name: str, key: SigningKey, logs: Mapping[str, bytes]) -> None:
        self.name = name
        self._key = key
        self._logs = dict(logs)
        self.verifier_key = checkpoint.verifier_key_text(name, bytes(key.verify_key), COSIGNATURE)

    def origin_of(self, body: bytes) -> str:
        """Which log a request is about: under what to look up `known`. Empty if that cannot be told."""
        try:
            return Request.from_bytes(body).note.partition("\n")[0]
        except InputError:
            return ""

    def add_checkpoint(self, body: bytes, known: str | None, now: int) -> Answer:
        """Judge a request. `known` is the `latest` of the last answer about this log, `now` is Unix time in seconds.

        1. 400: the body is malformed.        2. 404: the log is unknown.       3. 403: the log did not sign it.
        4. 400: the old size is the larger.   5. 409: the old size is not the last cosigned one; the body says that.
        6. 409: the same size, another root.  7. 422: the proof does not hold.  8. 200: the cosignature.

        Raises:
            IntegrityError: `known` is not a checkpoint of that log.
        """
        try:  # 1.
            request = Request.from_bytes(body)
            text, _ = checkpoint.split(request.note)
            origin = checkpoint.parse(text).origin
        except (InputError, IntegrityError) as error:
            return Answer(400, f"{error}\n")
        if origin not in self._logs:  # 2.
            return Answer(404, "this witness does not know that log\n")
        try:  # 3.
            new = checkpoint.verify(request.note, self._logs[origin], origin)
        except IntegrityError as error:
            return Answer(403, f"{error}\n")
        last = self._last(known, origin)
        if request.old_size > new.size:  # 4.
            return Answer(400, "the old size is larger than the checkpoint's\n")
        conflict = Answer(409, f"{last.size}\n", SIZE_TYPE)
        if request.old_size != last.size:  # 5.
            return conflict
        if new.size == last.size and new.root != last.root:  # 6.
            return conflict
        try:  # 7.
            verify_consistency(last.size, new.size, last.root, new.root, request.proof)
        except IntegrityError as error:
            return Answer(422, f"{error}\n")
        # 8.
        return Answer(200, cosignature.cosign(text, self._key, self.name, now), latest=request.note)

    def _last(self, known: str | None, origin: str) -> Checkpoint:
        if known is None:
            return Checkpoint(origin, 0, EMPTY_ROOT)
        return checkpoint.verify(known, self._logs[origin], origin)
