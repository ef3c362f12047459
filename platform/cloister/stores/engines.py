"""How the two databases are connected to: SQLite in one file, PostgreSQL over TLS.

Guarantees, on both: a commit is on disk before it is acknowledged (synchronous=FULL, synchronous_commit=on); nothing
is waited for longer than `ANSWER_TIMEOUT_S` at a time; no statement's values are in an error. On PostgreSQL: the
password itself never travels (SCRAM); TLS with a verified name, unless the server is on this machine.
Not guaranteed: that the server's own disk keeps its word (leave `fsync` on).
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import select
import ssl
import stat
from pathlib import Path
from typing import Any

import pg8000
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError

from cloister.errors import InputError, UnavailableError

BUSY_TIMEOUT_S = 5.0  # for the lock, and for a connection
STATEMENT_TIMEOUT_S = 7.0  # more than for the lock, so that who is locked out is told so
ANSWER_TIMEOUT_S = 9.0  # more than for a statement: what is longer silent hangs
IDLE_TIMEOUT_S = 20.0  # an authority that was cut off within a transaction gives its lock back after this
WRITE_LOCK = 0x636C6F6973746572  # PostgreSQL's number of our advisory lock: "cloister"

# What a SQLSTATE says, the longest beginning first (PostgreSQL manual, appendix A). Fixed sentences: the server's own
# texts quote values.
SQLSTATES = {
    "25006": "it is read-only",
    "25P03": "the transaction took too long",
    "28": "it does not know the user, or the password is another one",
    "3D000": "there is no database of that name",
    "42501": "the user lacks a privilege",
    "53100": "its disk is full",
    "53300": "it has no connection left",
    "53": "it has too little memory or disk",
    "55P03": "it is locked",
    "57014": "it took too long",
    "57P": "it is shutting down",
    "58": "its disk failed",
}


def sqlite_engine(file: Path, *, reading: bool) -> Engine:
    """One for writing, whose transactions take the write lock as they begin; or one that cannot write.

    Raises:
        UnavailableError: the file cannot be opened or made.
    """
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it readable by others
        file.chmod(0o600)
    except OSError as error:
        raise UnavailableError(
            f"the state database cannot be opened: {error.strerror}", "check the folder and its permissions"
        ) from error
    url = URL.create("sqlite", database=str(file))
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, **_pool(reading))
    pragmas = ("query_only=ON",) if reading else (
        "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON",
    )  # fmt: skip
    event.listen(engine, "connect", functools.partial(_configure, pragmas))
    event.listen(engine, "begin", functools.partial(_execute, "BEGIN" if reading else "BEGIN IMMEDIATE"))
    return engine


def postgresql_engine(url: str, *, password_file: Path | None, ca: Path | None, reading: bool) -> Engine:
    """As `sqlite_engine`, for `postgresql://USER@HOST:PORT/NAME`, or `postgresql://USER@/NAME?host=/SOCKET/FOLDER`.

    Raises:
        InputError: the URL, the password's file or the CA's cannot be used.
    """
    where = _address(url)
    local = where.pop("local")
    if ca is not None or not local:
        try:
            where["ssl_context"] = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise InputError("the database's CA cannot be read", "name a PEM file with the CA's certificate") from error
    where["password"] = _password(password_file)
    settings = {
        "client_encoding": "UTF8",
        "synchronous_commit": "on",
        "lock_timeout": _ms(BUSY_TIMEOUT_S),
        "statement_timeout": _ms(STATEMENT_TIMEOUT_S),
        "idle_in_transaction_session_timeout": _ms(IDLE_TIMEOUT_S),
        # Each statement of a writer sees what was committed before it got the lock; a reader sees one moment.
        "default_transaction_isolation": "repeatable read" if reading else "read committed",
    }
    if reading:
        settings["default_transaction_read_only"] = "on"
    connect = functools.partial(_connect, application_name="cloister", startup_params=settings, **where)
    engine = create_engine("postgresql+pg8000://", creator=connect, **_pool(reading))
    event.listen(engine, "checkout", _refuse_ended)
    if not reading:
        event.listen(engine, "begin", functools.partial(_execute, f"SELECT pg_advisory_xact_lock({WRITE_LOCK})"))
    return engine


def cause(error: Exception) -> str:
    """What a driver's error means, in words that hold no values."""
    if not isinstance(error, DBAPIError):
        return "it is busy"
    if not isinstance(error.orig, pg8000.Error):
        return str(error.orig)  # SQLite names tables and columns only
    state = _sqlstate(error)
    for beginning, meaning in SQLSTATES.items():
        if state.startswith(beginning):
            return f"{meaning} (SQLSTATE {state})"
    return f"SQLSTATE {state}" if state else "it cannot be reached, or does not answer"


def is_value(error: Exception) -> bool:
    """Whether it is the caller's value that the database cannot take (SQLSTATE class 22)."""
    return _sqlstate(error).startswith("22")


def _sqlstate(error: Exception) -> str:
    original = error.orig if isinstance(error, DBAPIError) else None
    fields = original.args[0] if original is not None and original.args else None
    return str(fields.get("C", "")) if isinstance(fields, dict) else ""


def _pool(reading: bool) -> dict[str, Any]:
    # One connection writes, since one transaction does at a time. Parameters are values: never in an error's text.
    size = {} if reading else {"pool_size": 1, "max_overflow": 0}
    return {"pool_timeout": BUSY_TIMEOUT_S, "hide_parameters": True, **size}


def _execute(statement: str, connection: Connection) -> None:
    connection.exec_driver_sql(statement)


# ---- SQLite ----


def _configure(pragmas: tuple[str, ...], connection: Any, _record: object) -> None:
    # sqlite3 would open transactions by itself, and too late; the engine's "begin" opens them instead.
    connection.isolation_level = None
    with contextlib.closing(connection.cursor()) as cursor:
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")


# ---- PostgreSQL ----


class _Connection(pg8000.Connection):  # type: ignore[misc]  # the driver ships no types
    """The driver's connection, that gives no password away and knows when it is broken."""

    def handle_messages(self, context: Any) -> None:
        try:
            super().handle_messages(context)
        except OSError as error:  # a timeout: the driver lets it through, and the pool would keep the connection
            raise pg8000.InterfaceError("network error") from error

    def handle_AUTHENTICATION_REQUEST(self, data: bytes, context: Any) -> None:  # noqa: N802  (the driver's name)
        if int.from_bytes(data[:4], "big") in (3, 5):  # cleartext, MD5: whoever listens on that port would have it
            raise pg8000.InterfaceError("the server asked for the password itself")
        super().handle_AUTHENTICATION_REQUEST(data, context)


def _connect(**options: Any) -> _Connection:
    try:
        connection = _Connection(timeout=BUSY_TIMEOUT_S, **options)
    except pg8000.Error:
        raise
    except Exception as error:  # the driver lets through whatever a strange server makes it trip over
        raise pg8000.InterfaceError("network error") from error
    connection._usock.settimeout(ANSWER_TIMEOUT_S)
    return connection


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _refuse_ended(connection: Any, _record: object, _proxy: object) -> None:
    # A server that ends a connection says so, and nothing else comes unasked. (A ping would be a round trip, and hang.)
    poll = select.poll()
    poll.register(connection._usock, select.POLLIN)
    if poll.poll(0):
        raise InvalidatePoolError("the server ended the connection")


def _address(text: str) -> dict[str, Any]:
    hint = "write postgresql://USER@HOST:PORT/NAME; the password belongs in a file of its own"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise InputError("the database's URL cannot be read", hint) from error
    query = dict(url.query)
    folder = query.pop("host", "")
    if url.drivername != "postgresql" or not url.username or not url.database or url.password is not None or query:
        raise InputError("the database's URL is not one that Cloister takes", hint)
    port = url.port or 5432
    where: dict[str, Any] = {"user": url.username, "database": url.database, "ssl_context": False}
    if isinstance(folder, str) and folder.startswith("/") and not url.host:
        return where | {"unix_sock": f"{folder}/.s.PGSQL.{port}", "local": True}
    if not url.host or folder:
        raise InputError("the database's URL names no server", hint)
    return where | {"host": url.host, "port": port, "local": _is_loopback(url.host)}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _password(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        with file.open() as opened:
            if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & 0o077:
                raise InputError("others may read the database's password", f"chmod 600 {file}")
            return opened.read(4096).removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the database's password cannot be read", f"write it to {file}, with mode 600") from error
