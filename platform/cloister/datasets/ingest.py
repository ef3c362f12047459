"""Reads a data owner's file into the compact form that is sealed.

Guarantees: the table that comes out has exactly the schema's columns in the schema's order, without gaps, each value
inside its public bounds or values; categories are int16 codes (positions in `values`), integers int32, numbers
float32, text strings. Anything else is refused with the column and the data row (counted from 1, the header not
counted) and never with the value.

Not promised: to find personal data in free text, or to guess what a malformed file meant.
"""

from __future__ import annotations

import difflib
import gzip
import zlib

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from cloister.datasets.schema import Column, DatasetSchema
from cloister.errors import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_INTEGER = r"^-?[0-9]{1,18}$"
_NUMBER = r"^[-+]?([0-9]{1,300}\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?$"


def read_table(data: bytes, schema: DatasetSchema) -> pa.Table:
    """Read CSV, gzipped CSV or Parquet, told apart by their first bytes, and validate every value.

    Raises:
        InputError: the file does not fit the schema.
    """
    if data[:4] == _PARQUET_MAGIC:
        raw = _read_parquet(data)
    else:
        raw = _read_csv(_gunzip(data) if data[:2] == _GZIP_MAGIC else data)
    _check_names(raw.column_names, schema)
    if raw.num_rows == 0:
        raise InputError("the file has no data row", "check that the export is complete")
    arrays = [_stored(raw.column(column.name).combine_chunks(), column) for column in schema.columns]
    return pa.table(arrays, names=[column.name for column in schema.columns])


def _gunzip(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        pass
    # Raised outside the handler, here and below: a library's message may quote the data, even as context.
    raise InputError("the gzip file is damaged", "export the file again")


def _read_csv(data: bytes) -> pa.Table:
    try:
        str(memoryview(data), "utf-8")
    except UnicodeDecodeError as error:
        place = error.start
    else:
        place = -1
    if place >= 0:  # raised outside the handler: the library's message quotes the data
        raise InputError(f"the file is not UTF-8 text (byte {place})", "export it as UTF-8 CSV, or as Parquet")
    bad_rows: list[int | None] = []

    def remember(row: pyarrow.csv.InvalidRow) -> str:
        bad_rows.append(row.number)
        return "skip"

    table = None
    try:
        header = pyarrow.csv.read_csv(
            pa.BufferReader(data.split(b"\n", 1)[0] + b"\n"),
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
        ).column_names
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            # Row numbers of malformed rows are known only without threads.
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=max(1 << 20, len(data) + 1)),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=remember),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False, null_values=[]
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError, UnicodeDecodeError):
        table = None
    if table is None:
        raise InputError("the file is neither CSV in UTF-8 nor Parquet", "export it as CSV with a header line")
    if bad_rows:
        # pyarrow counts the header as row 1.
        where = "" if bad_rows[0] is None else f"row {bad_rows[0] - 1}: "
        raise InputError(f"{where}the number of fields differs from the header", "quote fields that hold commas")
    table = table.rename_columns([name.strip().removeprefix("\ufeff") for name in table.column_names])
    return table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))


def _read_parquet(data: bytes) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError):
        pass
    raise InputError("the Parquet file is damaged", "export the file again")


def _check_names(found: list[str], schema: DatasetSchema) -> None:
    wanted = [column.name for column in schema.columns]
    # A name that the schema does not know could be a data value, in a file without a header: only its place is told.
    for name in wanted:
        if name not in found:
            close = difflib.get_close_matches(name, [other for other in found if other not in wanted], n=1)
            place = f"is it column {found.index(close[0]) + 1} of the file?" if close else ""
            hint = place or "add the column or take it out of the schema"
            raise InputError(f"column '{name}' is missing", hint)
    for position, name in enumerate(found, start=1):
        if name not in wanted:
            close = difflib.get_close_matches(name, wanted, n=1)
            hint = f"the closest column of the schema is '{close[0]}'" if close else "add it to the schema or drop it"
            raise InputError(f"column {position} of the file is not in the schema", hint)
    if len(found) != len(wanted):
        raise InputError("a column name occurs twice in the file", "keep one of them")


def _stored(array: pa.Array, column: Column) -> pa.Array:
    if column.type == "category":
        return _codes(_strings(array, column), column)
    if column.type == "text":
        return _strings(array, column)
    return _numbers(array, column)


def _strings(array: pa.Array, column: Column) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        raise InputError(f"column '{column.name}' holds no strings", f"the schema says {column.type}")
    _refuse(array.is_null(), column, "no value", "fill the gap or declare a value for it")
    return pc.utf8_trim_whitespace(array.cast(pa.string()))


def _codes(array: pa.Array, column: Column) -> pa.Array:
    codes = pc.index_in(array, value_set=pa.array(column.values, pa.string()))
    _refuse(codes.is_null(), column, "not one of the declared values", "correct the row, or add the value to `values`")
    return codes.cast(pa.int16())


def _numbers(array: pa.Array, column: Column) -> pa.Array:
    whole = column.type == "integer"
    if pa.types.is_string(array.type):
        array = pc.utf8_trim_whitespace(array)
        fits = pc.match_substring_regex(array, _INTEGER if whole else _NUMBER)
        article = "an integer" if whole else "a number"
        _refuse(pc.invert(fits), column, f"not {article}", f"the schema says {column.type}")
        array = array.cast(pa.int64() if whole else pa.float64())
    elif not (pa.types.is_integer(array.type) or (not whole and pa.types.is_floating(array.type))):
        raise InputError(f"column '{column.name}' has the wrong type", f"the schema says {column.type}")
    _refuse(array.is_null(), column, "no value", "fill the gap")
    assert column.bounds is not None  # noqa: S101 - the schema gives every numeric column bounds
    low, high = column.bounds
    numbers = array.cast(pa.float64(), safe=False)
    # A NaN is neither: `inside` is false for it.
    inside = pc.and_(pc.greater_equal(numbers, low), pc.less_equal(numbers, high))
    _refuse(pc.invert(inside), column, "outside the declared bounds", f"bounds: {low:g} to {high:g}")
    return array.cast(pa.int32()) if whole else numbers.cast(pa.float32(), safe=False)


def _refuse(wrong: pa.BooleanArray, column: Column, problem: str, hint: str) -> None:
    """Raise for the first row that is wrong."""
    first = pc.index(wrong, True).as_py()
    if first >= 0:
        count = pc.sum(wrong).as_py()
        others = "" if count == 1 else f" (and {count - 1} more)"
        raise InputError(f"column '{column.name}', row {first + 1}: {problem}{others}", hint)
