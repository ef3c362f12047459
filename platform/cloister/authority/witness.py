"""Witnesses of the log: who keeps its authority from showing two logs, or yesterday's, and how they are asked.

Guarantees: a witness cosigns only what extends all that it has cosigned before, and remembers it durably before it
answers; the authority keeps a cosignature only once it has verified it; a log that a witness finds shortened or forked
is said so at once, in the authority's own log of errors and to whoever asks for its state.

Does not guarantee: independence. A file witness on the authority's own disk falls with it: put it on another machine
(`cloister audit witness DIR`), or name an HTTP witness of somebody else.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
from nacl.signing import SigningKey
from pydantic import BaseModel, ConfigDict, model_validator
from sqlalchemy import insert, select, update

from cloister.audit import checkpoint, cosignature
from cloister.audit.cosignature import WitnessKey
from cloister.audit.witness import MAX_REQUEST_BYTES, Answer, Request, Witness
from cloister.authority.core import Core
from cloister.authority.journal import LOG_ORIGIN, Head
from cloister.errors import CloisterError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.stores.files import locked, private_directory, write_atomic
from cloister.stores.tables import log_checkpoints

TIMEOUT_S = 10.0
DEFAULT_NAME = "cloister.dev/witness"
MAX_ATTEMPTS = 4  # the witness may know another size, and another authority may tell it a newer one meanwhile
_SIZE = re.compile(r"(0|[1-9][0-9]{0,18})\n")
_HINT = "stop the authority, keep a copy of its state, and find out who changed or restored it"
_log = logging.getLogger("cloister.witness")


class WitnessClient(Protocol):
    """Somebody who cosigns. `key` is the only one whose lines are taken from the answers."""

    key: WitnessKey

    def add_checkpoint(self, body: bytes) -> Answer:
        """C2SP tlog-witness, `add-checkpoint`.

        Raises:
            UnavailableError: no answer.
        """


class FileWitness:
    """A witness of one log in a folder: `witness.key`, `witness.pub`, `log.pub` and `latest.note`, all its memory."""

    def __init__(self, directory: Path, *, log_verifier_key: str, name: str = DEFAULT_NAME) -> None:
        """Open the witness, or make it; it knows the log's key from then on.

        Raises:
            IntegrityError: the witness knows another log, or has lost its memory.
        """
        private_directory(directory)
        self._latest, self._lock = directory / "latest.note", directory / "lock"
        with locked(self._lock):
            if not (directory / "witness.key").exists():
                write_atomic(self._latest, b"")
                write_atomic(directory / "log.pub", f"{log_verifier_key}\n".encode())
                write_atomic(directory / "witness.key", f"{name}\n{os.urandom(32).hex()}\n".encode())
            try:
                name, seed = (directory / "witness.key").read_text().split()
                known, key = (directory / "log.pub").read_text().strip(), SigningKey(bytes.fromhex(seed))
            except (OSError, ValueError):
                raise IntegrityError("the witness's files are damaged", f"restore {directory} from a backup") from None
            if known != log_verifier_key:
                raise IntegrityError(
                    "fork: the log is signed with another key than the one that this witness knows",
                    f"if the authority was set up anew, start a new witness in another folder than {directory}",
                )
            origin, public = checkpoint.parse_verifier_key(known)
            self._witness = Witness(name, key, {origin: public})
            self.key = WitnessKey.parse(self._witness.verifier_key)
            write_atomic(directory / "witness.pub", f"{self._witness.verifier_key}\n".encode())

    @property
    def size(self) -> int:
        """How many entries it has cosigned. Raises IntegrityError as `add_checkpoint`."""
        note = self._remembered()
        return checkpoint.parse(checkpoint.split(note)[0]).size if note else 0

    def add_checkpoint(self, body: bytes) -> Answer:
        """Judge, remember, then answer.

        Raises:
            IntegrityError: the witness has lost its memory, or that was changed.
        """
        with locked(self._lock):
            answer = self._witness.add_checkpoint(body, self._remembered() or None, int(time.time()))
            if answer.latest is not None:
                write_atomic(self._latest, (answer.latest + answer.body).encode())
        return answer

    def _remembered(self) -> str:
        try:
            return self._latest.read_text()
        except (OSError, ValueError):
            raise IntegrityError(
                "the witness has lost its memory", f"restore {self._latest} from a backup, or start a new witness"
            ) from None


class HttpWitness:
    """A C2SP tlog-witness at `url`, its submission prefix. `ca_path` replaces the system's certificate authorities."""

    def __init__(self, url: str, verifier_key: str, *, ca_path: Path | None = None) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            InputError: not HTTPS, not a witness's key, or no certificate at `ca_path`.
        """
        if not url.startswith("https://"):
            raise InputError("a witness is reached over HTTPS only", "write https:// in its URL")
        self.key = WitnessKey.parse(verifier_key)
        try:
            context = ssl.create_default_context(cafile=ca_path)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"{ca_path} is not a usable CA certificate", "name a PEM file") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._url = url.rstrip("/") + "/add-checkpoint"
        self._http = httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=False, follow_redirects=False)

    def add_checkpoint(self, body: bytes) -> Answer:
        """As `WitnessClient` has it. Raises UnavailableError: no answer, or one that is too long."""
        try:
            with self._http.stream("POST", self._url, content=body) as response:
                text = b""
                for part in response.iter_bytes():
                    text += part
                    if len(text) > MAX_REQUEST_BYTES:
                        raise UnavailableError(f"the witness {self.key.name} answers too much", "check its URL")
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the witness {self.key.name} does not answer ({type(error).__name__})", "check its URL and its CA"
            ) from error
        return Answer(response.status_code, text.decode(errors="replace"))

    def close(self) -> None:
        self._http.close()


class WitnessSettings(BaseModel):
    """One witness in config.yaml: a `folder` of this machine; a `url` with its `key`, or a `key` alone, whose witness
    on another machine brings its cosignatures by itself (`cloister audit witness`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path | None = None
    url: str | None = None
    """The submission prefix of a C2SP tlog-witness."""
    key: str | None = None
    """Its verifier key, `name+hash+key`."""
    ca: Path | None = None
    """PEM of the CA of `url`; without it, the system's."""

    @model_validator(mode="after")
    def _whole(self) -> WitnessSettings:
        if (self.folder is None) == (self.key is None) or (self.folder and self.url) or (self.ca and not self.url):
            raise ValueError("a witness has a folder, or a key, or a url and a key")
        return self

    def open(self, log_verifier_key: str) -> tuple[WitnessKey, WitnessClient | None]:
        """The witness's key, and the witness itself where the authority is to ask it.

        Raises:
            InputError, IntegrityError: as `FileWitness` and `HttpWitness`.
        """
        if self.folder is not None:
            here = FileWitness(self.folder, log_verifier_key=log_verifier_key)
            return here.key, here
        key = WitnessKey.parse(self.key or "")
        return key, HttpWitness(self.url, self.key or "", ca_path=self.ca) if self.url else None


def ask(witness: WitnessClient, head: Head, old: int, prove: Callable[[int], Sequence[bytes]]) -> list[str]:
    """The witness's signature lines over `head`. `old` is the size that it saw last, as far as is known.

    Raises:
        IntegrityError: `rollback` or `fork`, as the witness sees it; or its cosignature does not hold.
        UnavailableError: it does not answer, or does not know this log.
    """
    for _ in range(MAX_ATTEMPTS):
        if old > head.size:
            raise RollbackError(witness.key.name, old, head.size)
        answer = witness.add_checkpoint(Request(old, prove(old), head.note).to_bytes())
        if answer.status == 200:
            note = head.note + answer.body
            cosignature.require_cosigned(note, [witness.key])
            return cosignature.lines_of(note, [witness.key])
        if answer.status == 422:
            raise IntegrityError(f"fork: this log does not extend the one that {witness.key.name} has seen", _HINT)
        seen = _SIZE.fullmatch(answer.body) if answer.status == 409 else None
        if seen is None:
            raise UnavailableError(
                f"the witness {witness.key.name} answered {answer.status}", "check that it knows this log and its key"
            )
        if int(seen[1]) == old == head.size:
            raise IntegrityError(f"fork: {witness.key.name} has seen another log of {old} entries", _HINT)
        old = int(seen[1])
    raise UnavailableError(f"the witness {witness.key.name} keeps changing its mind", "ask again later")


class RollbackError(IntegrityError):
    """The witness has seen more than there is now: a rollback, unless another authority has appended meanwhile."""

    def __init__(self, witness: str, seen: int, size: int) -> None:
        super().__init__(f"rollback: {witness} has seen {seen} entries of this log, now there are {size}", _HINT)
        self.args = (witness, seen, size)
        self.seen = seen


@dataclass(frozen=True, slots=True)
class Report:
    """What became of asking one witness: it has cosigned `size` entries, or there was an error."""

    witness: str
    size: int
    error: CloisterError | None = None


def keep(core: Core, note: str, keys: Iterable[WitnessKey]) -> int:
    """Store a checkpoint of this log with the cosignatures of known witnesses, beside those that it has already.

    Returns its size.

    Raises:
        NotFoundError: no known witness cosigned it.
        IntegrityError: this log did not sign it, or never had that root.
        KeyServiceError: it is stored, but the key service cannot remember it now: bring it again.
    """
    keys = list(keys)
    _, public = checkpoint.parse_verifier_key(core.journal.verifier_key)
    known = checkpoint.verify(note, public, LOG_ORIGIN)
    if not (lines := cosignature.lines_of(note, keys)):
        raise NotFoundError(
            "no witness that this authority knows cosigned that checkpoint",
            "name its key under authority.witnesses in config.yaml",
        )
    with core.database.transaction() as connection:
        head = core.journal.head(connection)
        if known.size > head.size or core.journal.root_at(connection, known.size) != known.root:
            raise IntegrityError("that checkpoint is not of this log: rollback or fork", _HINT)
        where = log_checkpoints.c.size == known.size
        old = connection.execute(select(log_checkpoints.c.note).where(where)).scalar_one_or_none()
        base = old or _with_lines(note, checkpoint.key_id(LOG_ORIGIN, public))
        merged = base + "".join(line for line in lines if line not in base)
        statement = (
            insert(log_checkpoints).values(size=known.size) if old is None else update(log_checkpoints).where(where)
        )
        connection.execute(statement.values(note=merged))
    core.anchor_at(known.size, known.root)  # a state that is older than this is known for one from now on
    return known.size


def _with_lines(note: str, key_id: bytes) -> str:
    """The note with the lines of one key only, the log's."""
    text, lines = checkpoint.split(note)
    ours = (line for line in lines if line.key_id == key_id)
    return text + "\n" + "".join(checkpoint.signature_line(line.name, line.key_id, line.signature) for line in ours)


class Witnessing:
    """Shows the log to `witnesses`, every `interval_s` seconds once started, and when `cosign_now` is called."""

    def __init__(self, core: Core, witnesses: Sequence[WitnessClient], *, interval_s: float = 60.0) -> None:
        self._core = core
        self._witnesses = list(witnesses)
        self._interval_s = interval_s
        self._seen: dict[WitnessKey, int] = {}
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.reports: Sequence[Report] = ()
        """Of the last time that the witnesses were asked."""

    @property
    def keys(self) -> list[WitnessKey]:
        return [witness.key for witness in self._witnesses]

    def start(self) -> None:
        """Begin to ask in the background; at once, and then every interval."""
        self._thread = threading.Thread(target=self._run, name="witnessing", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; waits for a request under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def cosign_now(self) -> Sequence[Report]:
        """Ask every witness about the log as it is now, and keep what they say. One fails, the others are asked still.

        An `IntegrityError` in a report means that this log was rolled back or forked: stop, and find out why.

        Raises:
            CloisterError: the log itself cannot be read, or is not whole.
        """
        with self._turn:
            self.reports = [self._ask(witness) for witness in self._witnesses]
        for report in self.reports:
            if isinstance(report.error, IntegrityError):
                _log.critical("%s (%s)", report.error, report.error.hint)
            elif report.error is not None:
                _log.warning("%s", report.error)
        return self.reports

    def _ask(self, witness: WitnessClient) -> Report:
        seen = self._seen.get(witness.key, 0)
        for last in (False, True):
            head = self._head()
            if head.size == seen:
                break
            try:
                lines = ask(witness, head, seen, lambda old, size=head.size: self._prove(old, size))  # type: ignore[misc]
                seen = self._seen[witness.key] = keep(self._core, head.note + "".join(lines), [witness.key])
                break
            except RollbackError as error:  # another authority may have told the witness of entries that came meanwhile
                if last or self._head().size < error.seen:
                    return Report(witness.key.name, seen, error)
            except CloisterError as error:
                return Report(witness.key.name, seen, error)
        return Report(witness.key.name, seen)

    def _head(self) -> Head:
        with self._core.database.reading() as connection:
            return self._core.journal.head(connection)

    def _prove(self, old: int, size: int) -> Sequence[bytes]:
        with self._core.database.reading() as connection:
            return self._core.journal.consistency(connection, old, size)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.cosign_now()
            except CloisterError as error:
                _log.critical("the log cannot be shown to its witnesses: %s", error)
            self._stop.wait(self._interval_s)
