"""All tables of the state as portable lines: what is written from SQLite can be read into PostgreSQL, and back.

Guarantees: a dump is the state at one moment; every value comes back as it was (a JSON text byte for byte into SQLite,
by value into PostgreSQL); `load` takes only whole dumps, of a schema that this version knows, into an empty database.
Memory does not grow with the state: a few hundred rows are held at a time, however many there are.
Not guaranteed: secrecy or integrity. Whoever stores a dump seals it.

JSON Lines: `{"format", "revision"}`; for each table `{"table", "columns": [[name, kind], …]}` and its rows as arrays;
`{"rows"}`, their number, last.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    LargeBinary,
    MetaData,
    Table,
    Text,
    cast,
    insert,
    inspect,
    select,
)
from sqlalchemy.types import TypeEngine

from cloister.errors import IntegrityError
from cloister.stores import migrations
from cloister.stores.tables import metadata

FORMAT = "cloister.dev/dump/v1"
ROWS_AT_ONCE = 200
_HINT = "take another backup; this one cannot be used"

# kind: (what it is in Python, its column type when it is read back)
_KINDS: dict[str, tuple[Any, TypeEngine[Any]]] = {
    "text": (str, Text()),
    "integer": (int, BigInteger()),
    "number": ((float, int), Float()),
    "boolean": (bool, Boolean()),
    "bytes": (bytes, LargeBinary()),
    "json": (str, JSON(none_as_null=True)),
}


def dump(connection: Connection) -> Iterator[bytes]:
    """The state as lines, each with its end.

    Raises:
        IntegrityError: the database holds a value that is not of its column's type.
        UnavailableError: it is not at this version's schema.
    """
    yield _line({"format": FORMAT, "revision": migrations.revision(connection)})
    rows = 0
    for table in metadata.sorted_tables:
        kinds = [_kind(column) for column in table.columns]
        yield _line({"table": table.name, "columns": list(zip(table.columns.keys(), kinds, strict=True))})
        columns = [
            cast(column, Text).label(column.name) if kind == "json" else column
            for column, kind in zip(table.columns, kinds, strict=True)
        ]
        query = select(*columns).order_by(*table.primary_key)
        for row in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(query):
            yield _line([_written(value, kind, table.name) for value, kind in zip(row, kinds, strict=True)])
            rows += 1
    yield _line({"rows": rows})


def load(connection: Connection, pieces: Iterable[bytes]) -> None:
    """Make the tables and fill them, in the transaction of `connection`, whose database is empty.

    The tables are as they were when the dump was written: `migrations.upgrade` brings them up to date.

    Raises:
        IntegrityError: this is no dump, not a whole one, or of tables that its revision does not have.
        UnavailableError: the dump is of a newer Cloister.
    """
    lines = map(_value, _lines(pieces))
    head = next(lines, None)
    if not isinstance(head, dict) or head.get("format") != FORMAT or not isinstance(head.get("revision"), str):
        raise _broken("this is no dump of Cloister's state")
    migrations.upgrade(connection, head["revision"])
    tables = inspect(connection)
    known = {name: {each["name"] for each in tables.get_columns(name)} for name in tables.get_table_names()}
    loaded: set[str] = set()
    rows, end = 0, None
    add: Callable[[list[Any]], None] | None = None
    flush: Callable[[], None] = lambda: None  # noqa: E731
    for value in lines:
        if end is not None:
            raise _broken("the dump goes on after its end")
        if isinstance(value, list):
            if add is None:
                raise _broken("the dump has rows of no table")
            add(value)
            rows += 1
        elif isinstance(value, dict) and "table" in value:
            flush()
            table, kinds = _table(value, known, loaded)
            add, flush = _filler(connection, table, kinds)
        elif isinstance(value, dict) and "rows" in value:
            flush()
            end = value["rows"]
        else:
            raise _broken("the dump has a line that is none")
    if end != rows or loaded != known.keys() - {"alembic_version"}:
        raise _broken("the dump is not whole")


def _table(value: dict[str, Any], known: dict[str, set[str]], loaded: set[str]) -> tuple[Table, list[str]]:
    name = value["table"]
    try:
        columns = [(str(column), str(kind)) for column, kind in value["columns"]]
    except (KeyError, TypeError, ValueError):
        columns = []
    same = {column for column, _ in columns} == known.get(name) and len(columns) == len(known[name])
    if name in loaded or not same or any(kind not in _KINDS for _, kind in columns):
        raise _broken("the dump has a table that its version of Cloister does not have")
    loaded.add(name)
    made = Table(name, MetaData(), *(Column(column, _KINDS[kind][1]) for column, kind in columns))
    return made, [kind for _, kind in columns]


def _filler(
    connection: Connection, table: Table, kinds: list[str]
) -> tuple[Callable[[list[Any]], None], Callable[[], None]]:
    """Adds rows to a table, some at a time; and the rest of them."""
    names: list[str] = table.columns.keys()
    waiting: list[dict[str, Any]] = []
    statement = insert(table)
    if connection.dialect.name == "postgresql":  # with RETURNING, many rows travel in one statement
        statement = statement.returning(table.columns[names[0]])

    def flush() -> None:
        if waiting:
            connection.execute(statement, waiting)
            waiting.clear()

    def add(row: list[Any]) -> None:
        if len(row) != len(names):
            raise _broken("the dump has a row that does not fit its table")
        waiting.append({name: _read(cell, kind) for name, cell, kind in zip(names, row, kinds, strict=True)})
        if len(waiting) >= ROWS_AT_ONCE:
            flush()

    return add, flush


def _kind(column: Column[Any]) -> str:
    if isinstance(column.type, JSON):
        return "json"
    names = {str: "text", int: "integer", float: "number", bool: "boolean", bytes: "bytes"}
    return names[column.type.python_type]


def _written(value: Any, kind: str, table: str) -> Any:
    """A value as JSON has it."""
    if value is None:
        return None
    if not isinstance(value, _KINDS[kind][0]) or (isinstance(value, bool) and kind != "boolean"):
        raise IntegrityError(f"the table {table} holds a value that is not {kind}", "look at it: cloister fsck")
    return base64.b64encode(value).decode() if kind == "bytes" else value


def _read(value: Any, kind: str) -> Any:
    """The inverse of `_written`."""
    if value is None:
        return None
    if kind == "bytes" and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise _broken("the dump has bytes that are not base64") from None
    if not isinstance(value, _KINDS[kind][0]) or (isinstance(value, bool) and kind != "boolean"):
        raise _broken(f"the dump has a value that is not {kind}")
    if kind == "json":
        found = _value(value.encode())
        return JSON.NULL if found is None else found
    return value


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = bytearray()
    for piece in pieces:
        rest += piece
        if b"\n" in piece:
            *whole, last = bytes(rest).split(b"\n")
            yield from whole
            rest = bytearray(last)
    if rest:
        raise _broken("the dump is cut within a line")


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise _broken("the dump has a line that is not JSON") from None


def _broken(message: str) -> IntegrityError:
    return IntegrityError(message, _HINT)
