"""JSON Lines: one object a line, with exactly the schema's keys.

Guarantees: strict JSON (RFC 8259) in UTF-8, no key twice, no NaN or infinity, no lone surrogate; values of the
schema's types (an integer is written without a point, a number is not a string), nothing nested but tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pyarrow as pa

from cloister.datasets.ingest.columns import stored
from cloister.datasets.ingest.lines import Text, row_blocks
from cloister.datasets.ingest.refusal import Place, refuse_row
from cloister.datasets.schema import Column, DatasetSchema

_ARROW = {"integer": pa.int64(), "number": pa.float64(), "category": pa.string(), "text": pa.string()}


class _TwiceError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError
    return found


def _no_constant(_name: str) -> float:
    raise ValueError


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def json_tables(text: Text, schema: DatasetSchema, block_bytes: int) -> Iterator[pa.Table]:
    """The file's rows as stored tables, a block at a time.

    Raises:
        InputError: the file, or a row of it, does not fit the schema.
    """
    place = Place()
    names = [column.name for column in schema.columns]
    wanted = set(names)
    for rows in json_rows(text, block_bytes, place):
        for row, found in enumerate(rows):
            if found.keys() != wanted:
                _refuse_keys(found, names, place, row)
        arrays = [_column([found[column.name] for found in rows], column, place) for column in schema.columns]
        place.rows += len(rows)
        if rows:
            yield pa.table(arrays, names=names)


def json_rows(text: Text, block_bytes: int, place: Place) -> Iterator[list[dict[str, Any]]]:
    """The objects of each block of lines. The consumer counts them into `place`.

    Raises:
        InputError: a line is no JSON object.
    """
    # Objects in memory are several times as large as their text.
    for block in row_blocks(text.read, max(1, block_bytes // 4), place, lambda block, _: block.rfind(b"\n") + 1):
        rows: list[dict[str, Any]] = []
        for line in block.split(b"\n"):
            if line and not line.isspace():
                rows.append(_row(line, place, len(rows)))
        yield rows


def _row(line: bytes, place: Place, row: int) -> dict[str, Any]:
    problem, hint = "not a JSON object", "one object a line"
    try:
        found = _DECODER.decode(line.decode())
        if type(found) is dict:
            return found
    except UnicodeDecodeError:
        problem, hint = "not UTF-8 text", "export the file as UTF-8"
    except _TwiceError:
        problem, hint = "a key occurs twice", "keep one of them"
    except (ValueError, RecursionError):
        pass
    refuse_row(place, row, None, problem, hint)  # outside the handler: the library's error holds the line


def _refuse_keys(found: dict[str, Any], names: list[str], place: Place, row: int) -> None:
    for name in names:
        if name not in found:
            refuse_row(place, row, name, "no such key", "every object has all columns of the schema")
    position = next(at for at, key in enumerate(found, start=1) if key not in names)
    refuse_row(place, row, None, f"key {position} is not a column of the schema", "add it to the schema or drop it")


def _column(values: list[Any], column: Column, place: Place) -> pa.Array:
    if column.type == "tensor":
        return stored(_tensors(values, column, place), column, place)
    identifier = column.role in ("identifier", "unit") and column.type == "text"
    allowed: dict[str, tuple[set[type], str]] = {
        "integer": ({int}, "not an integer"),
        "number": ({int, float}, "not a number"),
        "category": ({str, bool}, "not a string"),
        "text": ({str, int} if identifier else {str}, "not a string"),
    }
    types, problem = allowed[column.type]
    if not set(map(type, values)) <= types:
        row = next(row for row, value in enumerate(values) if type(value) not in types)
        missing = values[row] is None or values[row] == ""
        refuse_row(place, row, column.name, "no value" if missing else problem, f"the schema says {column.type}")
    if column.type in ("category", "text"):
        values = [value if type(value) is str else json.dumps(value) for value in values]
        _refuse_where(values, column, place, lambda text: not _is_unicode(text), "half of a surrogate pair")
    elif column.bounds:
        low, high = column.bounds  # compared before Arrow, whose numbers are of 64 bits
        _refuse_where(values, column, place, lambda number: not low <= number <= high, "outside the declared bounds")
    return stored(pa.array(values, _ARROW[column.type]), column, place)


def _tensors(values: list[Any], column: Column, place: Place) -> pa.Array:
    kind: pa.DataType = pa.float64() if str(column.dtype).startswith("float") else pa.int64()
    # Nested as the shape, or flat; the first value tells which, and all agree.
    first = values[0] if values else None
    depth = 1 if isinstance(first, list) and first and type(first[0]) is not list else len(column.shape or ())
    for _ in range(depth):
        kind = pa.list_(kind)
    array = _nested(values, kind, depth)
    if array is None:
        row = next(row for row, value in enumerate(values) if _nested([value], kind, depth) is None)
        problem = (
            "no value" if values[row] is None else f"not lists of {column.dtype} of shape {list(column.shape or ())}"
        )
        refuse_row(place, row, column.name, problem, "write a tensor as nested lists of numbers")
    return array


def _nested(values: list[Any], kind: pa.DataType, depth: int) -> pa.Array | None:
    leaves: Any = values
    for _ in range(depth):
        leaves = chain.from_iterable(leaves)
    try:
        # Arrow takes true and false for numbers; a text's or an object's leaves are texts.
        return pa.array(values, kind) if set(map(type, leaves)) <= {int, float} else None
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None


def _refuse_where(values: list[Any], column: Column, place: Place, wrong: Callable[[Any], bool], problem: str) -> None:
    for row, value in enumerate(values):
        if wrong(value):
            refuse_row(place, row, column.name, problem, f"the schema says {column.type}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
