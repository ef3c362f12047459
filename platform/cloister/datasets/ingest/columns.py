"""One column of a block: from how a file holds it to how it is stored.

Guarantees: what comes out is complete, of the stored type, and each value is inside its public bounds or values.

    integer   int32
    number    float32
    category  int16, the position in `values`
    text      string without white space around it, at most 1 MiB, without control characters but tab and line ends
    tensor    fixed_size_binary, little-endian, C order

**Formulas.** A spreadsheet takes a cell for a formula that begins with = + - @, with a tab or a carriage return, or
with the full-width or small form of these signs (OWASP, CSV injection). Such a text is refused, but for what cannot
call anything: a lone sign, as "-" for no answer, and digits with the punctuation of numbers, dates and telephone
numbers after a + or -. Numbers are parsed as numbers, so that "-5" is one. A category's cell is one of the declared
values or refused; a declared value that is a formula is refused too.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cloister.datasets.ingest.limits import MAX_CELL_BYTES
from cloister.datasets.ingest.refusal import Place, refuse_any, refuse_row
from cloister.datasets.ingest.tensors import is_tensor_type, rounded_bounds, stored_tensor
from cloister.datasets.schema import Column, DatasetSchema
from cloister.errors import InputError

_INTEGER = r"^-?[0-9]{1,18}$"
_NUMBER = r"^[-+]?([0-9]{1,300}\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?$"

_SIGNS = "=+-@＝＋－＠﹦﹢﹣﹫"
_SIGN_BYTES = np.zeros(256, bool)
_SIGN_BYTES[[sign.encode()[0] for sign in _SIGNS]] = True
_SIGN_BYTES[[9, 13]] = True
_HARMLESS = re.compile(r"[-+＋－﹢﹣][-+＋－﹢﹣0-9 .,:/()%]*(?:[0-9]\.?[eE][-+]?[0-9]{1,3})?|.")


def is_formula(text: str) -> bool:
    """Whether a spreadsheet would compute this cell, as the module's text defines it."""
    return text[:1] in ("\t", "\r") or (text[:1] in tuple(_SIGNS) and not _HARMLESS.fullmatch(text))


def check_schema(schema: DatasetSchema) -> None:
    """Refuse a schema that declares a formula as a category's value.

    Raises:
        InputError: names the column and the value's position.
    """
    for column in schema.columns:
        for position, value in enumerate(column.values or (), start=1):
            if is_formula(value):
                raise InputError(
                    f"column '{column.name}': value {position} of the schema is a spreadsheet formula",
                    "let it begin with another character, there and in the file",
                )


def check_type(kind: pa.DataType, column: Column) -> None:
    """Refuse a column by its type in the file, before any of it is decoded.

    Raises:
        InputError: it cannot hold what the schema says.
    """
    if pa.types.is_dictionary(kind) and column.type in ("category", "text"):
        kind = kind.value_type
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    whole = pa.types.is_integer(kind)
    fits = {
        "tensor": is_tensor_type(kind, column),
        "integer": whole or strings,
        "number": whole or strings or pa.types.is_floating(kind),
        "category": strings or pa.types.is_boolean(kind),
        "text": strings or (whole and column.role in ("identifier", "unit")),
    }
    if not fits[column.type]:
        what = "holds no strings" if column.type in ("category", "text") else "has the wrong type"
        size = f" of {column.tensor_bytes} bytes" if column.type == "tensor" else ""
        raise InputError(f"column '{column.name}' {what}", f"the schema says {column.type}{size}")


def stored(array: pa.Array, column: Column, place: Place) -> pa.Array:
    """The column as it is stored. `array` is one of the types that `check_type` lets pass.

    Raises:
        InputError: names the column and the first row that does not fit.
    """
    if array.null_count:
        refuse_any(array.is_null(), place, column.name, "no value", "fill the gap or declare a value for it")
    if column.type == "category":
        return _codes(array, column, place)
    if column.type == "tensor":
        return stored_tensor(array, column, place)
    if column.type == "text":
        return _texts(array, column, place)
    return _numbers(array, column, place)


def raw_texts(array: pa.Array, column: Column, place: Place) -> pa.Array:
    """Cells of a text file as strings.

    Raises:
        InputError: one is too long, not UTF-8, or has control characters.
    """
    offsets, data = _spans(array)
    _check_bytes(offsets, data, column, place)
    try:
        strings = array.cast(pa.string())
        strings.validate(full=True)
    except pa.ArrowInvalid:
        strings = None
    if strings is None:
        for row, cell in enumerate(array.to_pylist()):
            if not _is_utf8(cell):
                refuse_row(place, row, column.name, "not UTF-8 text", "export the file as UTF-8")
    return strings


def _codes(array: pa.Array, column: Column, place: Place) -> pa.Array:
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.string())
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    # A value that is too long, or anything else than text, is not among the declared ones.
    found = pc.utf8_trim_whitespace(encoded.dictionary.cast(pa.string()))
    code_of = pc.fill_null(pc.index_in(found, value_set=pa.array(column.values, pa.string())), -1)
    codes = code_of.cast(pa.int16()).to_numpy(zero_copy_only=False)[encoded.indices.to_numpy(zero_copy_only=False)]
    hint = "correct the row, or add the value to `values`"
    refuse_any(codes < 0, place, column.name, "not one of the declared values", hint)
    return pa.array(codes)


def _texts(array: pa.Array, column: Column, place: Place) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
        if array.null_count:
            refuse_any(array.is_null(), place, column.name, "no value", "fill the gap or declare a value for it")
    array = array.cast(pa.string())
    offsets, data = _spans(array)
    _check_bytes(offsets, data, column, place)
    if _may_have_blanks(offsets, data):
        _check_formulas(array, offsets, data, column, place)  # trimming takes a leading tab away
        array = pc.utf8_trim_whitespace(array)
        offsets, data = _spans(array)
    _check_formulas(array, offsets, data, column, place)
    if column.role in ("identifier", "unit"):
        refuse_any(np.diff(offsets) == 0, place, column.name, "no value", "every row says whose it is")
    return array


def _spans(array: pa.Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """Where each cell of a string or binary array begins and ends in its bytes, and those bytes."""
    _, offsets, data = array.buffers()
    if offsets is None or len(array) == 0:
        return np.zeros(len(array) + 1, np.int32), np.zeros(0, np.uint8)
    # A file's buffer may be longer than its offsets.
    spans = np.frombuffer(offsets, np.int32, array.offset + len(array) + 1)[array.offset :]
    return spans, np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)


def _check_bytes(offsets: npt.NDArray[Any], data: npt.NDArray[np.uint8], column: Column, place: Place) -> None:
    long = np.diff(offsets) > MAX_CELL_BYTES
    refuse_any(long, place, column.name, "the cell is larger than 1 MiB", "shorten it, or leave it out")
    used = data[offsets[0] : offsets[-1]]
    if used.size == 0 or (used.min() >= 32 and used.max() < 127):
        return
    wrong = (used < 32) & (used != 9) & (used != 10) & (used != 13) | (used == 127)
    # U+0080 to U+009F, which are 0xC2 and then 0x80 to 0x9F.
    wrong[1:] |= (used[:-1] == 0xC2) & (used[1:] >= 0x80) & (used[1:] < 0xA0)
    if wrong.any():
        row = int(np.searchsorted(offsets, offsets[0] + int(wrong.argmax()), side="right")) - 1
        refuse_row(place, row, column.name, "the cell has control characters", "remove them")


def _may_have_blanks(offsets: npt.NDArray[Any], data: npt.NDArray[np.uint8]) -> bool:
    filled = offsets[1:] > offsets[:-1]
    first, last = data[offsets[:-1][filled]], data[offsets[1:][filled] - 1]
    return bool(((first <= 32) | (first >= 0xC2) | (last <= 32) | (last >= 0x80)).any())


def _check_formulas(
    array: pa.Array, offsets: npt.NDArray[Any], data: npt.NDArray[np.uint8], column: Column, place: Place
) -> None:
    filled = np.flatnonzero(offsets[1:] > offsets[:-1])
    suspects = filled[_SIGN_BYTES[data[offsets[filled]]]]
    if suspects.size == 0:
        return
    for row, text in zip(suspects.tolist(), array.take(pa.array(suspects)).to_pylist(), strict=True):
        if is_formula(text):
            refuse_row(place, row, column.name, "the cell is a spreadsheet formula", "let it begin with a letter")


def _numbers(array: pa.Array, column: Column, place: Place) -> pa.Array:
    whole = column.type == "integer"
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = pc.utf8_trim_whitespace(array)
        empty = pc.equal(pc.binary_length(array), 0)
        refuse_any(empty, place, column.name, "no value", "fill the gap or declare a value for it")
        fits = pc.match_substring_regex(array, _INTEGER if whole else _NUMBER)
        article = "an integer" if whole else "a number"
        refuse_any(pc.invert(fits), place, column.name, f"not {article}", f"the schema says {column.type}")
        array = array.cast(pa.int64() if whole else pa.float64())
    numbers = array.to_numpy(zero_copy_only=False)
    low, high = rounded_bounds(column, numbers.dtype)
    # A NaN is neither above nor below: it is not inside.
    inside = (numbers >= low) & (numbers <= high)
    hint = f"bounds: {low:g} to {high:g}"
    refuse_any(~inside, place, column.name, "outside the declared bounds", hint)
    return pa.array(numbers.astype(np.int32 if whole else np.float32, copy=False))


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return True
