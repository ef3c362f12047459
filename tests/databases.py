"""Databases for tests, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, insert, make_url, select

from cloister.stores import engines
from cloister.stores.database import Database
from cloister.stores.tables import budgets
from postgres import Server


def set_limits(patch: pytest.MonkeyPatch, **seconds: float) -> None:
    """How long databases wait in this test: `BUSY`, `STATEMENT`, `ANSWER`, `IDLE`."""
    for name, limit in seconds.items():
        patch.setattr(engines, f"{name}_TIMEOUT_S", limit)


@dataclass
class Place:
    """Where a database is, or will be: `open()` as often as need be. `server` where it is PostgreSQL's."""

    options: dict[str, Any]
    server: Server | None = None
    opened: list[Database] = field(default_factory=list)

    @classmethod
    def new(cls, file: Path, server: Server | None) -> Place:
        """An empty one: `file` where there is no server."""
        return cls(server.options(server.new()), server) if server else cls({"place": file})

    @property
    def file(self) -> Path:
        assert self.server is None
        return Path(self.options["place"])

    @property
    def name(self) -> str:
        return str(self.options["place"]).rpartition("/")[2]

    def open(self) -> Database:
        database = Database(**self.options)
        self.opened.append(database)
        return database

    def copy(self, file: Path) -> Place:
        """As it is now: in `file`, or in another database of the server, for which all connections are ended."""
        if self.server:
            self.server.end_connections(self.name)
            return Place(self.server.options(self.server.new(self.name)), self.server)
        with contextlib.closing(sqlite3.connect(self.file)) as here, contextlib.closing(sqlite3.connect(file)) as there:
            here.backup(there)
        return Place({"place": file})

    @contextlib.contextmanager
    def kept(self, file: Path) -> Iterator[Callable[[], None]]:
        """Keep what is there now, with nobody connected, for the block: the function brings it back."""
        if self.server:
            server, name = self.server, self.name
            server.end_connections(name)
            kept = server.new(name)

            def bring_back() -> None:
                server.drop(name)
                server.new(kept, name)

            yield bring_back
            server.drop(kept)
            return
        here = self.file
        with contextlib.closing(sqlite3.connect(here)) as connection:
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            assert not busy
        shutil.copyfile(here, file)

        def put_back() -> None:
            for end in ("-wal", "-shm"):
                here.with_name(here.name + end).unlink(missing_ok=True)
            shutil.copyfile(file, here)

        yield put_back

    @contextlib.contextmanager
    def raw(self) -> Iterator[Connection]:
        """A transaction of somebody who has the database, but not Cloister."""
        if self.server:
            url = make_url(self.server.url(self.name)).set(drivername="postgresql+pg8000")
            engine = create_engine(url.set(password=self.server.password_file.read_text()))
        else:
            engine = create_engine(f"sqlite:///{self.file}")
        with engine.begin() as connection:
            yield connection
        engine.dispose()

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()

    def drop(self) -> None:
        self.close()
        if self.server:
            self.server.drop(self.name)


@pytest.fixture
def postgres_place(postgres_server: Server, tmp_path: Path) -> Iterator[Place]:
    place = Place.new(tmp_path, postgres_server)
    yield place
    place.drop()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.story)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty one, of each kind in turn."""
    server = request.getfixturevalue("postgres_server") if request.param == "postgres" else None
    place = Place.new(tmp_path / "state.db", server)
    yield place
    place.drop()


def add(database: Database, dataset: str, epsilon: float = 1.0) -> None:
    with database.transaction() as connection:
        connection.execute(insert(budgets).values(ledger=dataset, epsilon=epsilon, delta=1e-5))


def held(database: Database) -> list[str]:
    with database.reading() as connection:
        return list(connection.execute(select(budgets.c.ledger).order_by(budgets.c.ledger)).scalars())
