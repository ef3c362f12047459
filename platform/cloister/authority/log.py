"""Reading the audit log: search, exports, and proofs that anybody can verify offline.

Guarantees: memory does not grow with the log; an export leaves an entry of its own; people are named only to those who
may read the log, and only while their pseudonyms are not shredded. Exports and proofs hold pseudonyms alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, select

from cloister.audit import export, merkle, proof, siem
from cloister.audit.checkpoint import Checkpoint, parse_verifier_key, verify
from cloister.audit.cosignature import WitnessKey
from cloister.audit.event import Event, utc_text
from cloister.authority.core import PLATFORM, Caller, Core
from cloister.authority.journal import LOG_ORIGIN, Head, stored
from cloister.authority.pseudonyms import values_of
from cloister.authority.witness import keep
from cloister.errors import InputError, IntegrityError, NotFoundError
from cloister.stores.database import Database
from cloister.stores.tables import log_checkpoints, log_entries, log_head, pseudonyms

PAGE = 1000  # entries that are read at once
BLOCK_BYTES = 64 * 1024
EVENTS_VERSION = "2"  # what CEF calls the version of the device: the format of our events

_PSEUDONYM = re.compile(r"\b[ap]-[0-9a-f]{16}\b")
_TIME = re.compile(rb'"time":(-?[0-9]+),"type_uid"')  # a quotation mark within a text would be escaped


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What to look for. Empty texts match everything; `action` matches as a prefix, `since` and `until` are RFC 3339.

    Raises:
        InputError: not a time, or one without a time zone.
    """

    action: str = ""
    actor: str = ""
    outcome: str = ""
    since: str = ""
    until: str = ""
    limit: int = 50

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            if text := getattr(self, name):
                object.__setattr__(self, name, _utc(text))


class Log:
    """`verifier_key` is the C2SP verifier key text of the log; of `witnesses`, cosignatures are taken in."""

    def __init__(self, core: Core, verifier_key: str, witnesses: Sequence[WitnessKey] = ()) -> None:
        self._core = core
        self.verifier_key = verifier_key
        self._witnesses = list(witnesses)

    def search(self, caller: Caller, wanted: Filter) -> list[dict[str, Any]]:
        """The newest matching entries, newest last, with the names that pseudonyms stand for.

        Raises:
            IntegrityError: an entry is not one: the log was changed.
        """
        with self._core.reading(caller, "audit:read") as act:
            act.allow(PLATFORM)
            actors = _pseudonyms_of(act.connection, wanted.actor)
            found: list[tuple[int, Event]] = []
            for index, entry in _newest_first(act.connection, wanted, actors):
                event = Event.from_bytes(entry)
                if _matches(event, wanted, actors):
                    found.append((index, event))
                    if len(found) >= wanted.limit:
                        break
            return _with_names(act.connection, found[::-1])

    def export(self, caller: Caller, form: str = "cloister", first: int = 0) -> Iterator[bytes]:
        """The log in blocks of whole lines, up to and including the entry that records this export.

        `cloister` can be verified (`cloister.audit.export`), `ocsf` is JSON Lines, `cef` is for collectors; these two
        begin with entry `first`.

        Raises:
            InputError: no such form, or a part of the log in the form that is of the whole.
            IntegrityError: (while it is read, but for `cloister`) an entry is not one: the log was changed.
        """
        if form not in _FORMS:
            raise InputError("an export is in the form cloister, ocsf or cef", "pick one of the three")
        if first and form == "cloister":
            raise InputError("only a whole log can be verified", "leave `first` out, or pick ocsf or cef")
        with self._core.action(caller, "audit:export", form=form) as act:
            act.allow(PLATFORM)
        header, entries = read_export(self._core.database, self.verifier_key, first)
        return _in_blocks(_FORMS[form](header, entries, first))

    def prove(self, caller: Caller, index: int) -> dict[str, Any]:
        """A bundle that proves entry `index` (`cloister.audit.proof`).

        It is against the newest checkpoint that witnesses cosigned, or the log's head where that is later.

        Raises:
            NotFoundError: there is no such entry.
            IntegrityError: the log was changed.
        """
        with self._core.reading(caller, "audit:read") as act:
            act.allow(PLATFORM)
            connection, journal = act.connection, self._core.journal
            head = journal.head(connection)
            if not 0 <= index < head.size:
                raise NotFoundError(f"the log has no entry {index}", f"it has {head.size}, counted from 0")
            entry = connection.execute(select(log_entries.c.entry).where(log_entries.c["index"] == index)).scalar_one()
            note = _newest_cosigned(connection, above=index) or head.note
            known = self._verified(note)
            path = journal.inclusion(connection, index, known.size)
            merkle.verify_inclusion(merkle.leaf_hash(stored(entry)), index, known.size, path, known.root)
        return proof.inclusion_bundle(self.verifier_key, index, stored(entry), path, note)

    def consistency(self, caller: Caller, first: int, second: int = 0) -> dict[str, Any]:
        """A bundle that proves that the log of `second` entries (0: of all) extends that of `first`.

        A note of it is empty where no checkpoint of that size was kept: whoever asks has one that they remember.

        Raises:
            NotFoundError: the log never had that size.
            IntegrityError: the log was changed.
        """
        with self._core.reading(caller, "audit:read") as act:
            act.allow(PLATFORM)
            connection, journal = act.connection, self._core.journal
            head = journal.head(connection)
            size = second or head.size
            if not 0 < first <= size <= head.size:
                raise NotFoundError("the log never had that size", f"it has {head.size} entries")
            notes = _note_at(connection, first, head), _note_at(connection, size, head)
            for note in filter(None, notes):
                known = self._verified(note)
                if journal.root_at(connection, known.size) != known.root:
                    raise IntegrityError("the log is not the one that was signed", "verify it: cloister audit verify")
            return proof.consistency_bundle(self.verifier_key, *notes, journal.consistency(connection, first, size))

    def checkpoint(self) -> str:
        """The newest signed checkpoint. Public: it shows only how long the log is.

        Raises:
            NotFoundError: the log is empty.
        """
        with self._core.database.reading() as connection:
            note = self._core.journal.head(connection).note
        if not note:
            raise NotFoundError("the log is empty", "start the authority: cloister up")
        return note

    def take_cosignature(self, caller: Caller, note: str) -> dict[str, int]:
        """Keep a checkpoint that a witness on another machine brings with its cosignature. It says nothing new.

        Raises:
            NotFoundError: no witness that this authority knows cosigned it.
            IntegrityError: it is not this log's.
        """
        with self._core.reading(caller, "audit:read") as act:
            act.allow(PLATFORM)
        return {"size": keep(self._core, note, self._witnesses)}

    def cosigned(self) -> str:
        """The newest checkpoint that witnesses cosigned, with their lines; empty if there is none. Public."""
        with self._core.database.reading() as connection:
            return _newest_cosigned(connection)

    def _verified(self, note: str) -> Checkpoint:
        return verify(note, parse_verifier_key(self.verifier_key)[1], LOG_ORIGIN)


def read_export(database: Database, verifier_key: str, first: int = 0) -> tuple[export.Header, Iterator[bytes]]:
    """The log as it is at this moment: its checkpoints, and its entries from `first` on, read as they are asked for.

    Nothing is verified: whoever has the export does that.
    """
    with database.reading() as connection:
        notes = list(connection.execute(select(log_checkpoints.c.note).order_by(log_checkpoints.c.size)).scalars())
        notes += connection.execute(select(log_head.c.note)).scalars()
        last = connection.execute(select(func.max(log_entries.c["index"]))).scalar_one()
    return export.Header(verifier_key, notes), _oldest_first(database, first, last)


# ---- the forms of an export ----


def _cloister(header: export.Header, entries: Iterable[bytes], _first: int) -> Iterator[bytes]:
    yield header.to_line()
    for entry in entries:
        yield entry + b"\n"


def _ocsf(_header: export.Header, entries: Iterable[bytes], _first: int) -> Iterator[bytes]:
    for entry in entries:
        yield Event.from_bytes(entry).to_bytes() + b"\n"


def _cef(_header: export.Header, entries: Iterable[bytes], first: int) -> Iterator[bytes]:
    for index, entry in enumerate(entries, first):
        yield siem.cef(index, Event.from_bytes(entry), EVENTS_VERSION).encode() + b"\n"


_FORMS: Mapping[str, Callable[[export.Header, Iterable[bytes], int], Iterator[bytes]]] = {
    "cloister": _cloister,
    "ocsf": _ocsf,
    "cef": _cef,
}


def _in_blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, many at once: handing each to the server by itself takes ten times as long."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= BLOCK_BYTES:
            yield b"".join(block)
            block, size = [], 0
    yield b"".join(block)


# ---- reading ----


def _oldest_first(database: Database, first: int, last: int | None) -> Iterator[bytes]:
    """Entries from `first` up to index `last`. Each page in a transaction of its own: a slow reader holds none."""
    if last is None:
        return
    place = log_entries.c["index"]
    query = select(log_entries).where(place <= last).order_by(place).limit(PAGE)
    after = query.where(place >= first) if first else query  # a negative index is somebody's, and has to show
    while True:
        with database.reading() as connection:
            page = connection.execute(after).all()
        if not page:
            return
        yield from (stored(entry) for _, entry in page)
        after = query.where(place > page[-1][0])


def _newest_first(connection: Connection, wanted: Filter, actors: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """Entries that may match. Most of a long log does not, which its bytes tell faster than its JSON."""
    needles = [[b'"uid":"' + _in_json(actor) + b'"' for actor in actors]] if wanted.actor else []
    if wanted.action:
        needles.append([b'"event_code":"' + _in_json(wanted.action)])
    since_ms = datetime.fromisoformat(wanted.since).timestamp() * 1000 if wanted.since else None
    place = log_entries.c["index"]
    query = select(log_entries).order_by(place.desc()).limit(PAGE)
    page = connection.execute(query).all()
    while page:
        entries = [(index, stored(entry)) for index, entry in page]
        for index, entry in entries:
            if all(any(needle in entry for needle in some) for some in needles):
                yield index, entry
        # Clocks are not perfect: one old entry says little, a whole page of them says that the rest is older.
        if since_ms is not None and all(_is_older(entry, since_ms) for _, entry in entries):
            return
        page = connection.execute(query.where(place < page[-1][0])).all()


def _is_older(entry: bytes, moment_ms: float) -> bool:
    found = _TIME.search(entry)
    return found is not None and int(found[1]) < moment_ms


def _matches(event: Event, wanted: Filter, actors: Sequence[str]) -> bool:
    return (
        event.action.startswith(wanted.action)
        and (not wanted.actor or event.actor in actors)
        and wanted.outcome in ("", event.outcome)
        and wanted.since <= event.time
        and (not wanted.until or event.time <= wanted.until)
    )


def _newest_cosigned(connection: Connection, above: int = -1) -> str:
    query = select(log_checkpoints.c.note).where(log_checkpoints.c.size > above)
    note = connection.execute(query.order_by(log_checkpoints.c.size.desc()).limit(1)).scalar_one_or_none()
    return str(note or "")


def _note_at(connection: Connection, size: int, head: Head) -> str:
    query = select(log_checkpoints.c.note).where(log_checkpoints.c.size == size)
    note = connection.execute(query).scalar_one_or_none()
    return str(note or (head.note if size == head.size else ""))


# ---- names ----


def _pseudonyms_of(connection: Connection, actor: str) -> list[str]:
    """What the log may call `actor`: its own name, if it is no person's, or a pseudonym."""
    mine = (pseudonyms.c.person == actor) & (pseudonyms.c.value == actor)
    return [actor, *connection.execute(select(pseudonyms.c.pseudonym).where(mine)).scalars()] if actor else []


def _with_names(connection: Connection, found: Sequence[tuple[int, Event]]) -> list[dict[str, Any]]:
    rows = [{"index": index} | asdict(event) for index, event in found]
    used = {name for row in rows for text in _texts(row) for name in _PSEUDONYM.findall(text)}
    names = values_of(connection, used)

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(part) for key, part in value.items()}
        return _PSEUDONYM.sub(lambda one: names.get(one[0], one[0]), value) if isinstance(value, str) else value

    return [named(row) for row in rows]


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    yield from (value for value in (*row.values(), *row["details"].values()) if isinstance(value, str))


def _in_json(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def _utc(text: str) -> str:
    try:
        return utc_text(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise InputError("this is not a time", "write it like 2026-11-22T09:30:00Z") from None
