"""Reading the audit log: search, and an export that anybody can verify offline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import select

from cloister.audit.event import Event
from cloister.authority.core import LOG_ORIGIN, PLATFORM, Caller, Core
from cloister.canonical import b64
from cloister.errors import NotFoundError
from cloister.stores.database import Database, log_checkpoints, log_entries

EXPORT_FORMAT = "cloister.dev/log-export/v1"


class Log:
    """`verifier_key` is the C2SP verifier key text of the log."""

    def __init__(self, core: Core, verifier_key: str) -> None:
        self._core = core
        self.verifier_key = verifier_key

    def search(self, caller: Caller, *, action: str, actor: str, limit: int) -> list[dict[str, Any]]:
        """The newest matching entries, newest last. Empty strings match everything; `action` matches as a prefix.

        Raises:
            IntegrityError: an entry is not one: the log was changed.
        """
        with self._core.unlogged(caller, "audit:read") as act:
            act.allow(PLATFORM)
            found: list[dict[str, Any]] = []
            query = select(log_entries).order_by(log_entries.c["index"].desc())
            with act.connection.execute(query) as rows:  # an open cursor would keep the connection's old snapshot
                for row in rows:
                    event = Event.from_bytes(_stored(row.entry))
                    if event.action.startswith(action) and (not actor or event.actor == actor):
                        found.append({"index": row.index} | asdict(event))
                    if len(found) >= limit:
                        break
        return found[::-1]

    def export(self, caller: Caller) -> dict[str, Any]:
        """Every entry and every checkpoint, including the one that records this export."""
        with self._core.action(caller, "audit:read", step="export") as act:
            act.allow(PLATFORM)
        return export_of(self._core.database, self.verifier_key)

    def checkpoint(self) -> str:
        """The newest signed checkpoint. Public: it shows only how long the log is."""
        with self._core.database.transaction() as connection:
            query = select(log_checkpoints.c.note).order_by(log_checkpoints.c.size.desc()).limit(1)
            note = connection.execute(query).scalar_one_or_none()
        if note is None:
            raise NotFoundError("the log is empty", "start the authority: cloister up")
        return str(note)


def export_of(database: Database, verifier_key: str) -> dict[str, Any]:
    """All entries and checkpoints, with what is needed to verify them."""
    with database.transaction() as connection:
        entries = connection.execute(select(log_entries).order_by(log_entries.c["index"])).all()
        notes = connection.execute(select(log_checkpoints.c.note).order_by(log_checkpoints.c.size)).scalars().all()
    return {
        "format": EXPORT_FORMAT,
        "origin": LOG_ORIGIN,
        "verifier_key": verifier_key,
        "entries": [b64(_stored(row.entry)) for row in entries],
        "checkpoints": list(notes),
    }


def _stored(value: object) -> bytes:
    """What a column holds as bytes, even if somebody put text or a number there: verifying it must not stumble."""
    return value if isinstance(value, bytes) else str(value).encode()


def read_export(state: Path, verifier_key_file: Path) -> dict[str, Any]:
    """An export straight from the files of an authority that need not run.

    Raises:
        NotFoundError: the log's public key is not there.
    """
    if not verifier_key_file.exists():
        raise NotFoundError(f"{verifier_key_file} is missing", "start the authority once: cloister up")
    database = Database(state)
    try:
        return export_of(database, verifier_key_file.read_text().strip())
    finally:
        database.close()
