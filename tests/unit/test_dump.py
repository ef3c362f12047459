"""The state in portable lines: into either database from either, and nothing that is not whole."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, Boolean, Float, Integer, LargeBinary, insert, inspect, null, select, text

from cloister.errors import CloisterError, IntegrityError, UnavailableError
from cloister.stores import dump, engines
from cloister.stores.database import Database
from cloister.stores.tables import log_entries, metadata, models
from databases import Place
from postgres import Server


def value_for(column: Any, number: int) -> Any:
    if column.name == "release":  # a column that may be empty, and one whose JSON is `null`
        return null() if number else JSON.NULL
    for kind, value in (
        (JSON, {"text": "ε \u2028 \"quoted\"\n", "deep": [1, 0.1 + 0.2, None, True], "number": number}),
        (LargeBinary, bytes([0, 255, number, 10])), (Boolean, bool(number % 2)), (Float, 0.1 + 0.2 + number),
        (Integer, number),
    ):  # fmt: skip
        if isinstance(column.type, kind):
            return value
    return f"{column.name} ε\n{number}"


def fill(database: Database, rows: int = 3) -> None:
    """Some rows in every table."""
    with database.transaction() as connection:
        for table in metadata.sorted_tables:
            for number in range(rows):
                row = {each.name: value_for(each, number) for each in table.columns}
                connection.execute(insert(table).values(row))


def content(database: Database) -> dict[str, list[Any]]:
    with database.reading() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in metadata.sorted_tables
        }


def lines_of(database: Database) -> list[bytes]:
    with database.reading() as connection:
        return list(dump.dump(connection))


def empty(database: Database) -> None:
    with database.transaction() as connection:
        metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))


def loaded(place: Place, pieces: Iterable[bytes]) -> Database:
    database = place.open()
    empty(database)
    with database.transaction() as connection:
        dump.load(connection, pieces)
    return database


@pytest.mark.parametrize("to", ["sqlite", pytest.param("postgres", marks=pytest.mark.story)])
def test_everything_comes_back_from_either_database_into_either(
    place: Place, to: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database = place.open()
    fill(database)
    server: Server | None = request.getfixturevalue("postgres_server") if to == "postgres" else None
    other = Place.new(tmp_path / "other.db", server)
    try:
        there = loaded(other, lines_of(database))
        assert content(there) == content(database)
        with there.reading() as connection:
            kinds = connection.execute(select(models.c.release.is_(None)).order_by(models.c.version)).scalars().all()
            assert kinds[1:] == [True, True]
        assert lines_of(there) == lines_of(database)
    finally:
        other.drop()


def test_a_dump_is_one_moment_and_takes_little_memory(place: Place) -> None:
    database = place.open()
    with database.transaction() as connection:
        big = [{"index": index, "entry": bytes(1000)} for index in range(8_000)]
        connection.execute(insert(log_entries).returning(log_entries.c["index"]), big)
    gc.collect()
    tracemalloc.start()
    try:
        with database.reading() as connection:
            lines = dump.dump(connection)
            next(lines)
            with database.transaction() as writing:
                writing.execute(insert(log_entries).values(index=999_999, entry=b"later"))
            assert sum(1 for line in lines if line.startswith(b"[")) == 8_000
        assert tracemalloc.get_traced_memory()[1] < 2_500_000
    finally:
        tracemalloc.stop()


def without(lines: list[bytes], what: str) -> list[bytes]:
    return [line for line in lines if what.encode() not in line]


DAMAGE = {
    "nothing": lambda lines: lines[:0],
    "no head": lambda lines: lines[1:],
    "no end": lambda lines: lines[:-1],
    "a row too few": lambda lines: [*lines[:-2], lines[-1]],
    "cut in a line": lambda lines: [*lines[:-1], lines[-1][:-3]],
    "more after the end": lambda lines: [*lines, lines[-2]],
    "a table less": lambda lines: [*without(lines[:-1], '"budgets"')[:2], lines[-1]],
    "rows of no table": lambda lines: [lines[0], b"[1]\n", *lines[1:]],
    "an unknown table": lambda lines: [each.replace(b'"table":"budgets"', b'"table":"purses"') for each in lines],
    "another column": lambda lines: [each.replace(b'["epsilon","number"]', b'["eps","number"]') for each in lines],
    "an unknown kind": lambda lines: [each.replace(b'["epsilon","number"]', b'["epsilon","pickle"]') for each in lines],
    "a wrong type": lambda lines: [each.replace(b'["epsilon","number"]', b'["epsilon","text"]') for each in lines],
    "not JSON": lambda lines: [lines[0], b"{\n", *lines[1:]],
    "another format": lambda lines: [each.replace(b"dump/v1", b"dump/v9") for each in lines],
    "a newer Cloister": lambda lines: [lines[0].replace(b'"revision":"', b'"revision":"9'), *lines[1:]],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_a_whole_dump_of_a_known_schema_is_refused(damage: str, tmp_path: Path) -> None:
    place = Place.new(tmp_path / "state.db", None)
    fill(place.open(), 1)
    lines = DAMAGE[damage](lines_of(place.opened[0]))
    engine = engines.sqlite_engine(tmp_path / "new.db", reading=False)
    with pytest.raises((IntegrityError, UnavailableError)), engine.begin() as connection:
        dump.load(connection, lines)
    with engine.begin() as connection:
        assert inspect(connection).get_table_names() == []
    engine.dispose()
    place.drop()


def test_a_value_that_is_not_of_its_column_is_not_written(tmp_path: Path) -> None:
    place = Place.new(tmp_path / "state.db", None)
    database = place.open()
    fill(database, 1)
    with place.raw() as connection:
        connection.execute(text("UPDATE budgets SET epsilon = 'secret'"))
    with pytest.raises(CloisterError) as caught:
        lines_of(database)
    assert "secret" not in str(caught.value) + caught.value.hint
    place.drop()


def test_lines_say_what_they_are(tmp_path: Path) -> None:
    place = Place.new(tmp_path / "state.db", None)
    head, first, *_, end = (json.loads(line) for line in lines_of(place.open()))
    assert head["format"] == dump.FORMAT
    assert first["columns"][0][1] in ("text", "integer")
    assert end == {"rows": 0}
    place.drop()
