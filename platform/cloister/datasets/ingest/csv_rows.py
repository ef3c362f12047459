"""CSV: a header line, commas, and quotes as RFC 4180 has them.

Guarantees: a quote stands only around a whole cell, or doubled inside a quoted one, so that every reader agrees on
where a row ends; lines end in LF or CRLF; each row has the header's number of cells. Blank lines are skipped, but in
a file of one column, where they are empty cells.

Arrow parses numbers into typed columns at once. Only when it, or a check, refuses a block, the block is parsed again
cell by cell, to find the row and the column. Arrow's own messages quote data and are never shown.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.csv

from cloister.datasets.ingest.columns import raw_texts, stored
from cloister.datasets.ingest.lines import Text, row_blocks
from cloister.datasets.ingest.names import check_names
from cloister.datasets.ingest.refusal import Place, refuse_row
from cloister.datasets.schema import Column, DatasetSchema
from cloister.errors import InputError

_FAST: dict[str, pa.DataType] = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "category": pa.dictionary(pa.int32(), pa.string()),
    "text": pa.string(),
}
_BEFORE_QUOTE = np.isin(np.arange(256), np.frombuffer(b',\n"', np.uint8))
_AFTER_QUOTE = np.isin(np.arange(256), np.frombuffer(b',\r\n"', np.uint8))
_NOT_CSV = "export it as CSV with a header line, in UTF-8, with commas"


def csv_tables(text: Text, schema: DatasetSchema, block_bytes: int) -> Iterator[pa.Table]:
    """The file's rows as stored tables, a block at a time.

    Raises:
        InputError: the file, or a row of it, does not fit the schema.
    """
    for column in schema.columns:
        if column.type == "tensor":
            hint = "write the table as Parquet, Arrow or JSON Lines"
            raise InputError(f"column '{column.name}' is a tensor, which CSV cannot hold", hint)
    place = Place()
    names, blocks = csv_blocks(text, block_bytes, place)
    if len(names) == 1 and len(schema.columns) > 1 and (";" in names[0] or "\t" in names[0]):
        raise InputError("the header has no comma", "export the file with commas between the cells")
    check_names(names, schema)
    columns = [schema.column(name) for name in names]
    for block in blocks:
        table = _fast(block, columns, place)
        if table is None:
            table = _slow(block, columns, place)
        place.rows += table.num_rows
        yield table.select([column.name for column in schema.columns])


def csv_blocks(text: Text, block_bytes: int, place: Place) -> tuple[list[str], Iterator[bytes]]:
    """The header's names, and blocks of whole rows, whose quotes are well-formed.

    Raises:
        InputError: there is no header. The iterator: a row whose quotes are not well-formed.
    """
    place.rows = -1
    blocks = row_blocks(text.read, block_bytes, place, _last_row_end)
    first = next(blocks, b"")
    place.rows = 0
    end = first.find(b"\n") + 1
    while end and first.count(b'"', 0, end) % 2:
        end = first.find(b"\n", end) + 1
    end = end or len(first)
    try:
        names = next(csv.reader(io.StringIO(first[:end].decode(), newline=""), strict=True), [])
    except (UnicodeDecodeError, csv.Error):
        names = []
    names = [name.strip() for name in names]
    if not any(names):
        raise InputError("the file is neither CSV in UTF-8 nor another table that is read", _NOT_CSV)
    return names, _closed(chain([first[end:]] if end < len(first) else [], blocks), place)


def _closed(blocks: Iterator[bytes], place: Place) -> Iterator[bytes]:
    for block in blocks:
        if block.count(b'"') % 2:  # only at the end of the file: blocks end outside of quotes
            refuse_row(place, _rows(block[: block.rfind(b'"')]), None, "a quote that stays open", "close it")
        yield block


def parse_cells(block: bytes, names: list[str], place: Place) -> list[pa.Array]:
    """Every cell of a block as bytes, a column each.

    Raises:
        InputError: a row has another number of cells than the header.
    """
    bad: list[int] = []

    def remember(row: pyarrow.csv.InvalidRow) -> str:
        bad.append(row.number or 1)
        return "skip"

    table = _parse(block, [pa.binary()] * len(names), remember)
    if bad:
        hint = f"the header has {len(names)}; quote cells that hold commas"
        refuse_row(place, bad[0] - 1, None, "the number of fields differs from the header", hint)
    if table is None:
        hint = "quote cells that hold commas, quotes or line ends"
        raise InputError(f"the rows from {place.rows + 1:,} on are not CSV", hint)
    return [_single(table.column(index)) for index in range(len(names))]


def _fast(block: bytes, columns: list[Column], place: Place) -> pa.Table | None:
    """The stored table, or None where something is to be looked at more closely."""
    if any(column.type == "integer" for column in columns) and _has_hexadecimal(block):
        return None
    table = _parse(block, [_FAST[column.type] for column in columns])
    if table is None:
        return None
    try:
        arrays = [stored(_single(table.column(index)), column, place) for index, column in enumerate(columns)]
    except InputError:
        return None
    return pa.table(arrays, names=[column.name for column in columns])


def _has_hexadecimal(block: bytes) -> bool:
    """Arrow takes 0x1F for an integer; the schema's integers are decimal."""
    data = np.frombuffer(block, np.uint8)
    return bool((((data[1:] | 32) == ord("x")) & (data[:-1] == ord("0"))).any())


def _slow(block: bytes, columns: list[Column], place: Place) -> pa.Table:
    cells = parse_cells(block, [column.name for column in columns], place)
    texts = [raw_texts(array, column, place) for array, column in zip(cells, columns, strict=True)]
    arrays = [stored(array, column, place) for array, column in zip(texts, columns, strict=True)]
    return pa.table(arrays, names=[column.name for column in columns])


def _parse(block: bytes, types: list[pa.DataType], on_ragged: object = None) -> pa.Table | None:
    names = [str(index) for index in range(len(types))]
    try:
        return pyarrow.csv.read_csv(
            pa.BufferReader(block),
            # One block on one thread: row numbers are exact, and the other core is left to encryption.
            read_options=pyarrow.csv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.csv.ParseOptions(
                newlines_in_values=b'"' in block, ignore_empty_lines=len(types) > 1, invalid_row_handler=on_ragged
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict(zip(names, types, strict=True)), strings_can_be_null=False, null_values=[]
            ),
        )
    except (pa.ArrowException, ValueError):
        return None


def _single(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _last_row_end(block: bytes, place: Place) -> int:
    """After the last line end outside of quotes; the quotes, and bare carriage returns, are checked on the way."""
    if b"\r" in block and block.count(b"\r") != block.count(b"\r\n") + block.endswith(b"\r"):
        at = next(i for i in _positions(block, b"\r") if block[i + 1 : i + 2] != b"\n")
        refuse_row(place, _rows(block[:at]), None, "a carriage return without a line feed", "remove it")
    if b'"' not in block:
        return block.rfind(b"\n") + 1
    _check_quotes(block, place)
    end = len(block)
    inside = block.count(b'"') % 2 == 1
    while True:
        newline = block.rfind(b"\n", 0, end)
        if newline < 0:
            return 0
        inside ^= block.count(b'"', newline, end) % 2 == 1
        if not inside:
            return newline + 1
        end, inside = block.rfind(b'"', 0, newline), False


def _check_quotes(block: bytes, place: Place) -> None:
    """RFC 4180, section 2, rules 5 to 7: quotes open at a cell's start, close at its end, and are doubled inside."""
    data = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(data == ord('"'))
    opening, closing = quotes[0::2], quotes[1::2]
    good = np.ones(len(quotes), bool)
    good[0::2] = _BEFORE_QUOTE[data[opening - 1]] | (opening == 0)
    good[1::2] = _AFTER_QUOTE[data[np.minimum(closing + 1, len(data) - 1)]]
    if not good.all():
        at = int(quotes[good.argmin()])
        hint = "put quotes around whole cells, and double the quotes inside"
        refuse_row(place, _rows(block[:at]), None, "a quote in the middle of a cell", hint)


def _rows(start: bytes) -> int:
    """How many rows end before the end of `start`, whose quotes are well-formed. Blank lines are none."""
    inside = False
    rows = 0
    for line in start.split(b"\n")[:-1]:
        inside ^= line.count(b'"') % 2 == 1
        rows += not inside and line not in (b"", b"\r")
    return rows


def _positions(block: bytes, mark: bytes) -> Iterator[int]:
    at = block.find(mark)
    while at >= 0:
        yield at
        at = block.find(mark, at + 1)
