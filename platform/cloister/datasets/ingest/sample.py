"""The first rows of a file, without a schema: what inspection looks at.

Guarantees: reads at most the first `max_rows` rows and about `SAMPLE_BYTES` of a text file, under the same limits as
`read_blocks`. Values are handed on as counted texts, for recognisers; they are data and must not be shown.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa

from cloister.datasets.ingest.arrow_ipc import arrow_batches
from cloister.datasets.ingest.blocks import column_names
from cloister.datasets.ingest.csv_rows import csv_blocks, parse_cells
from cloister.datasets.ingest.json_lines import json_rows
from cloister.datasets.ingest.kinds import HEAD_BYTES, recognise
from cloister.datasets.ingest.limits import MAX_DECODED_BYTES, MIB
from cloister.datasets.ingest.lines import Text
from cloister.datasets.ingest.parquet import first_batch
from cloister.datasets.ingest.refusal import Place
from cloister.errors import InputError

SAMPLE_BYTES = 4 * MIB
_BLOCK_BYTES = MIB
Form = Literal["text", "integer", "number", "boolean", "time", "tensor", "other"]


@dataclass(frozen=True, slots=True)
class ColumnSample:
    """One column of the sample."""

    name: str
    form: Form
    """How the file holds it: always "text" in CSV."""
    cells: dict[str, int]
    """Its distinct filled cells, and how often each occurs. None for tensors and nested values."""
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    kind: str
    rows: int
    whole: bool
    """Whether these are all rows of the file."""
    columns: tuple[ColumnSample, ...]


def read_sample(stream: BinaryIO, max_rows: int) -> Sample:
    """Read the first rows of a file, told apart by content.

    Raises:
        InputError: nothing that can be sealed, or damaged within its first rows.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    kind = recognise(stream.read(HEAD_BYTES))
    stream.seek(0)
    try:
        if kind == "parquet":
            return _of_batch(kind, *first_batch(stream, size, max_rows), max_rows)
        if kind in ("arrow file", "arrow stream"):
            return _of_arrow(stream, kind, max_rows)
        text = Text(stream, kind)
        label = text.kind if kind == text.kind else f"{text.kind}, gzipped"
        return _of_csv(text, label, max_rows) if text.kind == "csv" else _of_json(text, label, max_rows)
    except (pa.ArrowException, ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
        pass
    raise InputError("the file is damaged", "export the file again")  # outside: a library's message may quote it


def _of_csv(text: Text, kind: str, max_rows: int) -> Sample:
    place = Place()
    names, blocks = csv_blocks(text, _BLOCK_BYTES, place)
    columns: list[list[bytes]] = [[] for _ in names]
    for block in islice(blocks, SAMPLE_BYTES // _BLOCK_BYTES):
        for cells, array in zip(columns, parse_cells(block, names, place), strict=True):
            cells += array.to_pylist()
        place.rows = len(columns[0])
        if place.rows > max_rows:
            break
    whole = place.rows <= max_rows and next(blocks, None) is None
    found = (
        ColumnSample(name, "text", _counted(cell.decode(errors="replace") for cell in cells[:max_rows]))
        for name, cells in zip(names, columns, strict=True)
    )
    return Sample(kind, min(place.rows, max_rows), whole, tuple(found))


def _of_json(text: Text, kind: str, max_rows: int) -> Sample:
    place = Place()
    blocks = json_rows(text, 4 * _BLOCK_BYTES, place)
    rows: list[dict[str, Any]] = []
    for found in islice(blocks, SAMPLE_BYTES // _BLOCK_BYTES):
        rows += found
        place.rows = len(rows)
        if place.rows > max_rows:
            break
    whole = place.rows <= max_rows and next(blocks, None) is None
    rows = rows[:max_rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Sample(kind, len(rows), whole, tuple(_json_column(name, [row.get(name) for row in rows]) for name in names))


def _json_column(name: str, values: list[Any]) -> ColumnSample:
    values = [value for value in values if value is not None]
    types = {type(value) for value in values}
    if types == {list}:
        shape: list[int] = []
        inner: Any = values[0]
        while isinstance(inner, list) and inner:
            shape.append(len(inner))
            inner = inner[0]
        if type(inner) in (int, float):
            return ColumnSample(name, "tensor", {}, tuple(shape), "float32")
    forms: tuple[tuple[set[type], Form], ...] = (
        ({str}, "text"), ({int}, "integer"), ({int, float}, "number"), ({bool}, "boolean"),
    )  # fmt: skip
    form: Form = next((form for fits, form in forms if types and types <= fits), "other")
    texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
    return ColumnSample(name, form, _counted(texts) if form != "other" else {})


def _of_arrow(stream: BinaryIO, kind: str, max_rows: int) -> Sample:
    batches = arrow_batches(stream)
    schema, _ = next(batches)
    batch = next((batch for _, batch in batches if batch is not None and batch.num_rows), None)
    whole = batch is None or next(batches, None) is None
    return _of_batch(kind, schema, batch, whole, max_rows)


def _of_batch(kind: str, schema: pa.Schema, batch: pa.RecordBatch | None, whole: bool, max_rows: int) -> Sample:
    rows = 0 if batch is None else batch.num_rows
    columns = []
    for index, name in enumerate(column_names(schema)):
        array = pa.array([], pa.null()) if batch is None else batch.column(index)
        array.validate(full=True)
        columns.append(_arrow_column(name, schema.field(index).type, array[:max_rows]))
    return Sample(kind, min(rows, max_rows), whole and rows <= max_rows, tuple(columns))


def _arrow_column(name: str, kind: pa.DataType, array: pa.Array) -> ColumnSample:
    if isinstance(kind, pa.FixedShapeTensorType):
        return ColumnSample(name, "tensor", {}, tuple(kind.shape), str(kind.value_type))
    if pa.types.is_fixed_size_binary(kind):
        return ColumnSample(name, "tensor", {}, (kind.byte_width,), "uint8")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list_column(name, kind, array)
    form = _form(kind.value_type if pa.types.is_dictionary(kind) else kind)
    if form == "other":
        return ColumnSample(name, form, {})
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    codes = array.indices.drop_null().to_numpy(zero_copy_only=False).astype(np.int64)
    used, times = np.unique(codes, return_counts=True)
    if sum(len(str(value)) for value in array.dictionary.take(pa.array(used)).to_pylist()) > MAX_DECODED_BYTES:
        raise InputError("the first rows are too large to look at", "shorten the cells")
    values = array.dictionary.take(pa.array(used)).to_pylist()
    counts: Counter[str] = Counter()
    for value, count in zip(values, times.tolist(), strict=True):
        if value is not None:
            counts[str(value).lower() if form == "boolean" else str(value)] += count
    return ColumnSample(name, form, dict(counts))


def _list_column(name: str, kind: pa.DataType, array: pa.Array) -> ColumnSample:
    shape: list[int] = []
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = array.drop_null()
        shape.append(kind.list_size if pa.types.is_fixed_size_list(kind) else len(lengths[0]) if len(lengths) else 0)
        kind, array = kind.value_type, lengths.flatten()
    if _form(kind) not in ("integer", "number"):
        return ColumnSample(name, "other", {})
    dtype = {"float": "float32", "double": "float64", "halffloat": "float16"}.get(str(kind), str(kind))
    return ColumnSample(name, "tensor", {}, tuple(shape), dtype)


def _form(kind: pa.DataType) -> Form:
    checks: tuple[tuple[Any, Form], ...] = (
        (pa.types.is_string, "text"), (pa.types.is_large_string, "text"), (pa.types.is_integer, "integer"),
        (pa.types.is_floating, "number"), (pa.types.is_boolean, "boolean"), (pa.types.is_temporal, "time"),
    )  # fmt: skip
    return next((form for fits, form in checks if fits(kind)), "other")


def _counted(texts: Any) -> dict[str, int]:
    counts = Counter(text.strip() for text in texts)
    counts.pop("", None)
    return dict(counts)
