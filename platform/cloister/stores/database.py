"""The authority's state: tables, and transactions that are whole or nothing.

Guarantees: every write runs in one serialised transaction (`BEGIN IMMEDIATE` on SQLite with synchronous=FULL), so
budgets and versions are checked and changed without a gap; wrapped data keys live beside the ledger, so that
clearing one clears the other. (Restoring an old copy is noticed by the key service's anchor: `Core.anchor`.)
Not guaranteed: secrecy of this file beyond its mode. It holds no key in clear, no row of data and no token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Float,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from cloister.errors import UnavailableError

BUSY_TIMEOUT_S = 5.0

metadata = MetaData()

identities = Table(
    "identities",
    metadata,
    Column("name", String, primary_key=True),
    Column("roles", JSON, nullable=False),
    Column("public_key", Text, nullable=False, unique=True),
    Column("registered_by", String, nullable=False),
    Column("created", Float, nullable=False),
)

used_assertions = Table(
    "used_assertions",
    metadata,
    Column("jti", String, primary_key=True),
    Column("expires", Float, nullable=False, index=True),
)

datasets = Table(
    "datasets",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("owner", String, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("manifest_digest", String, nullable=False),
    Column("envelope", JSON, nullable=False),
    Column("created", Float, nullable=False),
)

data_keys = Table(
    "data_keys",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("file", String, primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
    ForeignKeyConstraint(["name", "version"], ["datasets.name", "datasets.version"]),
)

budgets = Table(
    "budgets",
    metadata,
    Column("dataset", String, primary_key=True),
    Column("epsilon", Float, nullable=False),
    Column("delta", Float, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String, primary_key=True),
    Column("author", String, nullable=False),
    Column("dataset", String, nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("code_digest", String, nullable=False),
    Column("state", String, nullable=False),
    Column("steps_committed", Integer, nullable=False),
    Column("steps_done", Integer, nullable=False),
    Column("rows_per_s", Float),
    # The ledger's columns: what this run holds of the dataset's budget, now and for good.
    Column("epsilon_charged", Float, nullable=False),
    Column("delta_charged", Float, nullable=False),
    Column("model_key", LargeBinary, nullable=False),
    Column("error", JSON),
    Column("created", Float, nullable=False),
    Column("ended", Float),
)

# One lease a rank and run, so that neither a replayed request nor a left-over worker gets keys again.
leases = Table(
    "leases",
    metadata,
    Column("run", String, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("created", Float, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("run", String, nullable=False, unique=True),
    Column("author", String, nullable=False),
    Column("stage", String, nullable=False),
    Column("root_digest", String, nullable=False),
    Column("manifest", LargeBinary, nullable=False),
    Column("bundle", LargeBinary, nullable=False),
    Column("provenance", JSON, nullable=False),
    Column("blob", String, nullable=False),
    Column("blob_sha256", String, nullable=False),
    Column("model_key", LargeBinary, nullable=False),
    Column("seal_context", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("created", Float, nullable=False),
)

approvals = Table(
    "approvals",
    metadata,
    Column("id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("root_digest", String, nullable=False),
    Column("requested_by", String, nullable=False),
    Column("expires", Float, nullable=False),
    Column("created", Float, nullable=False),
)

votes = Table(
    "votes",
    metadata,
    Column("approval", String, primary_key=True),
    Column("person", String, primary_key=True),
    Column("decision", String, nullable=False),
    Column("envelope", JSON, nullable=False),
    Column("created", Float, nullable=False),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("deployed_by", String, nullable=False),
    Column("quota_requests", Integer, nullable=False),
    Column("quota_window_s", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("created", Float, nullable=False),
)

quota_windows = Table(
    "quota_windows",
    metadata,
    Column("model", String, primary_key=True),
    Column("subject", String, primary_key=True),
    Column("window_start", Integer, primary_key=True),
    Column("granted", Integer, nullable=False),
)

log_entries = Table(
    "log_entries",
    metadata,
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("entry", LargeBinary, nullable=False),
)

log_checkpoints = Table(
    "log_checkpoints",
    metadata,
    Column("size", Integer, primary_key=True, autoincrement=False),
    Column("tree", JSON, nullable=False),
    Column("note", Text, nullable=False),
)


class Database:
    """Open or create the state in one SQLite file."""

    def __init__(self, file: Path) -> None:
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it readable by others
            file.chmod(0o600)
        except OSError as error:
            raise UnavailableError(
                f"the state database cannot be opened: {error.strerror}", "check the folder and its permissions"
            ) from error
        url = URL.create("sqlite", database=str(file))
        self._engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(self._engine, "connect", _configure_connection)
        event.listen(self._engine, "begin", _begin_immediately)
        with self._guard():
            metadata.create_all(self._engine)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One serialised transaction: committed durably at the end of the block, undone by any exception.

        Raises:
            UnavailableError: the database is locked, busy, read-only, full, damaged or gone.
        """
        with self._guard(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeoutError) as error:
            cause = getattr(error, "orig", None) or type(error).__name__
            raise UnavailableError(
                f"the state database refused: {cause}", "free the disk or the lock; nothing was changed"
            ) from error

    def close(self) -> None:
        self._engine.dispose()


def _configure_connection(connection: object, _record: object) -> None:
    # sqlite3 would open transactions by itself, and too late; `_begin_immediately` opens them instead.
    connection.isolation_level = None  # type: ignore[attr-defined]
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediately(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
