"""Arrow batches, of Parquet or IPC, to stored tables of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cloister.datasets.ingest.columns import check_type, stored
from cloister.datasets.ingest.limits import MAX_TABLE_RATIO, TABLE_RATIO_GRACE
from cloister.datasets.ingest.names import check_names
from cloister.datasets.ingest.refusal import Place, refuse_row
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError


def check_arrow_schema(found: pa.Schema, schema: DatasetSchema) -> None:
    """Refuse a table by its columns' names and types, before a row of it is decoded.

    Raises:
        InputError: it does not fit the schema.
    """
    check_names(column_names(found), schema)
    for column in schema.columns:
        check_type(found.field(column.name).type, column)


def column_names(found: pa.Schema) -> list[str]:
    """The names of the file's columns.

    Raises:
        InputError: one is not UTF-8.
    """
    try:
        return list(found.names)
    except UnicodeDecodeError:
        pass
    raise InputError("a column's name is not UTF-8 text", "export the file again")


class Storer:
    """Stores batch after batch of one file, and keeps count of rows and of bytes given out."""

    def __init__(self, schema: DatasetSchema, file_bytes: int, block_bytes: int) -> None:
        self._schema = schema
        self._file_bytes = file_bytes
        self._block_bytes = block_bytes
        self._place = Place()
        self._given = 0

    def tables(self, batch: pa.RecordBatch) -> Iterator[pa.Table]:
        """The batch as stored tables, each about as large as a block.

        Raises:
            InputError: a row does not fit the schema, or the file inflates like a bomb.
        """
        # Offsets, dictionary positions and UTF-8 are the file's word until now.
        if not all(_is_sound(array) for array in batch.columns):
            self._refuse_unsound(batch)
        for start, stop in self._slices(batch):
            part = batch.slice(start, stop - start)
            arrays = [stored(part.column(column.name), column, self._place) for column in self._schema.columns]
            table = pa.table(arrays, names=[column.name for column in self._schema.columns])
            self._place.rows += table.num_rows
            self._given += table.nbytes
            if self._given > TABLE_RATIO_GRACE and self._given > MAX_TABLE_RATIO * self._file_bytes:
                raise InputError(
                    f"the file inflates more than {MAX_TABLE_RATIO} times",
                    "write the table again, if you trust its source",
                )
            yield table

    def _slices(self, batch: pa.RecordBatch) -> Iterator[tuple[int, int]]:
        """Rows that together fill a block. A dictionary's values are counted as often as rows point to them."""
        weights = np.zeros(batch.num_rows, np.int64)
        fixed = 0
        for column in self._schema.columns:
            array = batch.column(column.name)
            if column.type == "text" and pa.types.is_dictionary(array.type):
                if array.null_count == 0 and not pa.types.is_integer(array.type.value_type):
                    lengths = pc.fill_null(pc.binary_length(array.dictionary), 0).to_numpy(zero_copy_only=False)
                    weights += lengths[array.indices.to_numpy(zero_copy_only=False)]
            elif column.type == "text" and not pa.types.is_integer(array.type):
                weights += pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
            fixed += max(8, column.tensor_bytes)
        ends = np.cumsum(weights + fixed)
        start = 0
        while start < batch.num_rows:
            full = (ends[start - 1] if start else 0) + self._block_bytes
            stop = max(start + 1, int(np.searchsorted(ends, full, side="right")))
            yield start, stop
            start = stop

    def _refuse_unsound(self, batch: pa.RecordBatch) -> None:
        for column in self._schema.columns:
            array = batch.column(column.name)
            if not _is_sound(array):
                row = next((row for row in range(len(array)) if not _is_sound(array.slice(row, 1))), 0)
                problem = "bytes that are no UTF-8 text, or are damaged"
                refuse_row(self._place, row, column.name, problem, "export the file again, with text as UTF-8")
        raise InputError("the file is damaged", "export the file again")


def _is_sound(array: pa.Array) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
