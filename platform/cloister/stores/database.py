"""The authority's state: transactions that are whole or nothing, on SQLite or PostgreSQL.

Guarantees: every write runs in one serialised transaction, on PostgreSQL also across all authorities that share it, so
budgets and versions are checked and changed without a gap; what `transaction` has ended without an error is durable;
wrapped data keys live beside the ledger, so that clearing one clears the other. (Restoring an old copy is noticed by
the key service's anchor: `Core.anchor`.) A database that this version does not know is never written to.
Not guaranteed: secrecy beyond the file's mode or the server's. There is no key in clear, no row of data and no token.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from cloister.errors import CloisterError, InputError, UnavailableError
from cloister.stores import engines, migrations

UNDONE = "free the disk or the lock; nothing was changed"
IN_DOUBT = "look in the log whether it was done"


class Database:
    """The state in a file (a path: SQLite), or in PostgreSQL (a `postgresql://` URL without a password).

    Opening brings the tables up to date.

    Raises:
        InputError: the URL, the password's file or the CA's cannot be used.
        UnavailableError: the database cannot be had, is newer than this Cloister, or is not Cloister's.
    """

    def __init__(self, place: Path | str, *, password_file: Path | None = None, ca: Path | None = None) -> None:
        if isinstance(place, Path):
            self._writer, self._reader = (engines.sqlite_engine(place, reading=each) for each in (False, True))
        else:
            self._writer, self._reader = (
                engines.postgresql_engine(place, password_file=password_file, ca=ca, reading=each)
                for each in (False, True)
            )
        # Threads queue here; on the database's own lock they would poll, each with a connection.
        self._turn = threading.Lock()
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One serialised transaction: committed durably at the end of the block, undone by any exception.

        Raises:
            UnavailableError: the database is locked, busy, read-only, full, damaged or gone.
            InputError: a value that PostgreSQL has no room for, such as a text with a NUL.
        """
        if not self._turn.acquire(timeout=engines.BUSY_TIMEOUT_S):
            raise UnavailableError("the state database is busy", "try again; nothing was changed")
        committing = False
        try:
            with self._writer.begin() as connection:
                yield connection
                committing = True
        except (DBAPIError, PoolTimeoutError) as error:
            in_doubt = committing and isinstance(error, DBAPIError) and error.connection_invalidated
            raise _refusal(error, IN_DOUBT if in_doubt else UNDONE) from None
        finally:
            self._turn.release()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """The state at one moment, without waiting for writers. The block cannot change anything.

        Raises:
            UnavailableError: the database is locked, busy, damaged or gone; or the block tried to write.
            InputError: as `transaction`.
        """
        try:
            with self._reader.begin() as connection:
                yield connection
        except (DBAPIError, PoolTimeoutError) as error:
            raise _refusal(error, "check that the database runs and can be reached") from None

    def scrub(self) -> None:
        """Overwrite what was deleted (destroyed keys, shredded names) in SQLite's file and its journal too.

        As far as nobody is reading at this moment; closing the database does the rest. PostgreSQL vacuums later.

        Raises:
            UnavailableError: the disk refused. It is deleted, and not yet overwritten.
        """
        if self._writer.dialect.name != "sqlite":
            return
        try:
            with contextlib.closing(self._writer.raw_connection()) as connection, self._turn:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (sqlite3.Error, DBAPIError, PoolTimeoutError) as error:
            raise UnavailableError(
                f"what was deleted is deleted, but not yet overwritten on the disk: {error}"[:200],
                "check the disk; stopping the authority overwrites it too",
            ) from None

    def close(self) -> None:
        self._writer.dispose()
        self._reader.dispose()

    def _migrate(self) -> None:
        with self.reading() as connection:
            if migrations.revision(connection) == migrations.HEAD:
                return
        with self.transaction() as connection:  # one authority at a time, and the second finds it done
            migrations.upgrade(connection)


def _refusal(error: Exception, hint: str) -> CloisterError:
    if engines.is_value(error):
        return InputError("a text or number in this is one that the state database cannot hold", "leave it out")
    return UnavailableError(f"the state database refused: {engines.cause(error)}", hint)
