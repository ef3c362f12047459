"""Parquet, in batches of rows.

Guarantees: what is decoded at a time is bounded before it is decoded: by the page headers (see `parquet_pages`), by
reading repeated strings as dictionaries, and by rows a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cloister.datasets.ingest.blocks import Storer, check_arrow_schema
from cloister.datasets.ingest.limits import (
    MAX_CELL_BYTES,
    MAX_DECODED_BYTES,
    MAX_FOOTER_BYTES,
    MAX_LIST_BYTES,
)
from cloister.datasets.ingest.parquet_pages import Pages, RowGroup, damaged, read_groups
from cloister.datasets.ingest.tensors import is_tensor_list
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError

_MAX_BATCH_ROWS = 1 << 16
_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError)


def parquet_tables(
    stream: BinaryIO, size: int, schema: DatasetSchema, block_bytes: int, advance: Callable[[int], None]
) -> Iterator[pa.Table]:
    """The file's rows as stored tables. `advance` is told about how many bytes of the file are done.

    Raises:
        InputError: the file, or a row of it, does not fit the schema.
    """
    groups, found = open_groups(stream, size)
    check_arrow_schema(found.schema_arrow, schema)
    columns = [_path(found, index) for index in range(len(found.schema))]
    storer = Storer(schema, size, block_bytes)
    done = 0
    total = max(1, sum(group.rows for group in groups))
    for at, group in enumerate(groups):
        pages = dict(zip(columns, group.columns, strict=True))
        _check_lists(group.rows, pages, found.schema_arrow, schema)
        for batch in _batches(stream, found.metadata, at, pages, found.schema_arrow, schema, block_bytes):
            yield from storer.tables(batch)
            done += batch.num_rows
            advance(min(size, size * done // total))


def open_groups(stream: BinaryIO, size: int) -> tuple[list[RowGroup], Any]:
    """What the file's row groups will decode to, and the file opened by pyarrow.

    Raises:
        InputError: no whole Parquet file in clear, or one that inflates like a bomb.
    """
    groups = read_groups(stream, size)
    file = _open(stream)
    if file is None or any(len(group.columns) != len(file.schema) for group in groups):
        raise damaged()
    return groups, file


def first_batch(stream: BinaryIO, size: int, max_rows: int) -> tuple[pa.Schema, pa.RecordBatch | None, bool]:
    """The table's columns, some of its first rows, and whether these are all. For inspection: nothing is checked.

    Raises:
        InputError: as `parquet_tables`, but for the schema's part.
    """
    groups, file = open_groups(stream, size)
    schema = file.schema_arrow
    at = next((at for at, group in enumerate(groups) if group.rows > 0), None)
    if at is None:
        return schema, None, True
    first, leaves = groups[at], [file.schema.column(index) for index in range(len(file.schema))]
    if 8 * sum(each.values for each in first.columns) > MAX_LIST_BYTES * len(leaves):
        raise InputError("the first row group is too large to look at", "write smaller row groups")
    width = sum(each.bytes_per_value * max(1, each.values / first.rows) for each in first.columns)
    width += sum(MAX_CELL_BYTES // 8 for each in first.columns if each.has_shared_prefixes)
    width += sum(leaf.length for leaf in leaves if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY")
    # Repeated values stay in their dictionaries; where they cannot, any row may repeat a whole one.
    strings = []
    for leaf, pages in zip(leaves, first.columns, strict=True):
        if leaf.physical_type == "BYTE_ARRAY" and pages.reads_as_dictionary:
            strings.append(leaf.path)
        else:
            width += pages.dictionary
    file = _open(stream, metadata=file.metadata, read_dictionary=strings)
    batch = _next(_start(file, at, max(1, min(max_rows, int(MAX_DECODED_BYTES / max(8, width))))))
    whole = batch is not None and batch.num_rows == sum(group.rows for group in groups)
    return schema, batch, whole


def _check_lists(rows: int, pages: dict[str, Pages], found: pa.Schema, schema: DatasetSchema) -> None:
    """A list's rows may have any length: twice as many elements as the shape has is no mistake in a row or two."""
    held = 0
    for column in schema.columns:
        if column.shape is None or not is_tensor_list(found.field(column.name).type):
            continue
        values = sum(each.values for path, each in pages.items() if path.split(".")[0] == column.name.split(".")[0])
        if values > 2 * (rows + 1) * math.prod(column.shape):
            raise InputError(f"column '{column.name}' has longer lists than its shape", f"shape: {list(column.shape)}")
        held += 8 * values
    if held > MAX_LIST_BYTES:
        raise InputError(
            f"a row group's lists hold more than {MAX_LIST_BYTES >> 20} MiB",
            "write smaller row groups, or tensors as fixed-size binary",
        )


def _batches(
    stream: BinaryIO, metadata: Any, group: int, pages: dict[str, Pages], found: pa.Schema, schema: DatasetSchema,
    block_bytes: int,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    # Strings, and bytes that hold tensors, of which one stored value may stand for many rows.
    variable = [column.name for column in schema.columns if _is_variable(found.field(column.name).type)]
    if not set(variable) <= pages.keys():
        raise damaged()
    categories = [
        column.name
        for column in schema.columns
        if column.type == "category" and column.name in variable and pages[column.name].reads_as_dictionary
    ]
    width = sum(max(8.0, column.tensor_bytes) for column in schema.columns)
    width += sum(pages[name].bytes_per_value for name in variable)
    width += sum(MAX_CELL_BYTES // 8 for name in variable if pages[name].has_shared_prefixes)
    repeated = [name for name in variable if name not in categories and pages[name].has_dictionary]
    width += sum(pages[name].dictionary for name in repeated if not pages[name].begins_with_dictionary)
    width += _longest_values(stream, metadata, group, [name for name in repeated if pages[name].begins_with_dictionary])
    file = _open(stream, metadata=metadata, read_dictionary=categories)  # whose values are never repeated in memory
    batches = _start(file, group, max(1, min(_MAX_BATCH_ROWS, int(block_bytes / width))))
    while (batch := _next(batches)) is not None:
        yield batch


def _longest_values(stream: BinaryIO, metadata: Any, group: int, names: list[str]) -> int:
    """The bytes of the longest value of each dictionary, together: what any row may repeat."""
    if not names:
        return 0
    file = _open(stream, metadata=metadata, read_dictionary=names)
    batch = _next(_start(file, group, 1, names))  # one row, and with it every dictionary whole
    arrays = batch.columns if batch is not None else []
    values = [array.dictionary if pa.types.is_dictionary(array.type) else array for array in arrays]
    return sum(pc.max(pc.binary_length(each)).as_py() or 0 for each in values)


def _is_variable(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(kind) for check in checks)


def _start(file: Any, group: int, rows: int, columns: list[str] | None = None) -> Any:
    try:
        return file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)
    except (*_ERRORS, AttributeError):
        pass
    raise damaged()


def _next(batches: Any) -> pa.RecordBatch | None:
    """The next batch, None after the last.

    Raises:
        InputError: the file is damaged. Raised outside the handler: Arrow's message may quote data.
    """
    try:
        return next(batches, None)
    except _ERRORS:
        pass
    raise damaged()


def _path(file: Any, index: int) -> str:
    return str(file.schema.column(index).path)


def _open(stream: BinaryIO, **options: Any) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(
            stream,
            # Column chunks are read a little at a time instead of whole.
            pre_buffer=False,
            buffer_size=1 << 20,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=1 << 20,
            **options,
        )
    except _ERRORS:
        return None
