"""Reads a data owner's file, block by block, into the compact form that is sealed.

Guarantees: the tables that come out have exactly the schema's columns in the schema's order, without gaps, each value
of its stored type and inside its public bounds or values (see `columns`). Anything else is refused with the column and
the data row, counted over the whole file from 1, the header not counted; never with the value, and never with the
message of a library, which may quote it. Memory is bounded by the block, whatever the file claims or inflates to
(see `limits`); no path leads from a file to code that it brings.

Not promised: to find personal data in free text (see `cloister.datasets.inspect`), or to guess what a malformed file
meant.

    kinds         what the file is, by its first bytes
    lines         text: gunzip, blocks of whole rows       csv_rows, json_lines
    blocks        Arrow batches of a bounded size          parquet, parquet_pages, arrow_ipc
    names, columns, tensors, refusal                       the schema's side
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow as pa

from cloister.datasets.ingest.arrow_ipc import arrow_tables
from cloister.datasets.ingest.columns import check_schema
from cloister.datasets.ingest.csv_rows import csv_tables
from cloister.datasets.ingest.json_lines import json_tables
from cloister.datasets.ingest.kinds import HEAD_BYTES, recognise
from cloister.datasets.ingest.limits import BLOCK_BYTES, MAX_BLOCK_BYTES
from cloister.datasets.ingest.lines import Text
from cloister.datasets.ingest.parquet import parquet_tables
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError

# What Arrow or Python may raise for a file that no check of ours foresaw.
_UNFORESEEN = (pa.ArrowException, ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def read_blocks(
    stream: BinaryIO,
    schema: DatasetSchema,
    *,
    block_bytes: int = BLOCK_BYTES,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[pa.Table]:
    """Read CSV, gzipped CSV, JSON Lines, Parquet or Arrow IPC, told apart by content, and check every value.

    `stream` is a seekable binary file, read from its start. `block_bytes` is about the size of each table;
    `advance` is told how many bytes of the file are done.

    Raises:
        InputError: the file does not fit the schema. Blocks before the misfit have been handed out by then.
    """
    check_schema(schema)
    block_bytes = min(max(1, block_bytes), MAX_BLOCK_BYTES)
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    kind = recognise(stream.read(HEAD_BYTES))
    stream.seek(0)
    rows = 0
    tables = _tables(stream, kind, size, schema, block_bytes, advance)
    while (table := _next(tables)) is not None:
        rows += table.num_rows
        if table.num_rows:
            yield table
    if rows == 0:
        raise InputError("the file has no data row", "check that the export is complete")
    advance(size)


def read_table(data: bytes, schema: DatasetSchema) -> pa.Table:
    """All rows of a file that is small enough to be held whole.

    Raises:
        InputError: the file does not fit the schema.
    """
    return pa.concat_tables(list(read_blocks(io.BytesIO(data), schema))).combine_chunks()


def _next(tables: Iterator[pa.Table]) -> pa.Table | None:
    try:
        return next(tables, None)
    except _UNFORESEEN:
        pass
    # Outside the handler: what a library says about a malformed file may quote it.
    raise InputError("the file is damaged", "export the file again")


def _tables(
    stream: BinaryIO, kind: str, size: int, schema: DatasetSchema, block_bytes: int, advance: Callable[[int], None]
) -> Iterator[pa.Table]:
    if kind == "parquet":
        yield from parquet_tables(stream, size, schema, block_bytes, advance)
    elif kind in ("arrow file", "arrow stream"):
        yield from arrow_tables(stream, size, schema, block_bytes, advance)
    else:
        text = Text(stream, kind)
        read = csv_tables if text.kind == "csv" else json_tables
        for table in read(text, schema, block_bytes):
            yield table
            advance(stream.tell())
