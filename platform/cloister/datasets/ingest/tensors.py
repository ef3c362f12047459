"""Tensor columns: images, embeddings, signals.

Guarantees: each row becomes exactly the bytes that the schema's shape and dtype ask for, little-endian and in C order;
every element is finite and inside the bounds. Numbers that the dtype cannot hold are refused; floating-point numbers
are rounded to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister.datasets.ingest.refusal import Place, refuse_any
from cloister.datasets.schema import Column

_HELD = "hold it as fixed-size binary, or as lists of numbers, of that shape"


def is_tensor_type(kind: pa.DataType, column: Column) -> bool:
    """Whether a column of that Arrow type can hold its tensors: binary of their size, or (nested) lists of numbers."""
    if isinstance(kind, pa.FixedShapeTensorType):
        in_order = kind.permutation is None or list(kind.permutation) == sorted(kind.permutation)
        kind = kind.storage_type if in_order and tuple(kind.shape) == column.shape else pa.null()
    if pa.types.is_fixed_size_binary(kind):
        return bool(kind.byte_width == column.tensor_bytes)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    if not _is_list(kind):
        return False
    while _is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_tensor_list(kind: pa.DataType) -> bool:
    """Whether the tensors are lists, whose rows may be of any length."""
    return isinstance(kind, pa.FixedShapeTensorType) or _is_list(kind)


def stored_tensor(array: pa.Array, column: Column, place: Place) -> pa.Array:
    """The column as fixed-size binary.

    Raises:
        InputError: names the first row of another size or shape, with a gap, or out of bounds.
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    dtype = np.dtype(str(column.dtype)).newbyteorder("<")
    rows = len(array)
    if _is_list(array.type):
        elements = _elements(array, column, place).reshape(rows, -1)
        # Before the cast, which wraps integers and turns large numbers into infinity.
        _check_bounds(elements, column, place)
        whole = elements.dtype.kind in "iu" or (elements.dtype.kind == "f" and dtype.kind == "f")
        refuse_any(np.full(rows, not whole), place, column.name, f"not numbers of dtype {column.dtype}", _HELD)
        elements = np.ascontiguousarray(elements.astype(dtype))
    else:
        elements = _bytes(array, column, place).view(dtype).reshape(rows, -1)
    _check_bounds(elements, column, place)
    data = pa.py_buffer(elements)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(column.tensor_bytes), rows, [None, data])


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _bytes(array: pa.Array, column: Column, place: Place) -> npt.NDArray[np.uint8]:
    size = column.tensor_bytes
    problem = f"not {size} bytes"
    if pa.types.is_fixed_size_binary(array.type):
        start = array.offset * size
    else:
        wide = np.int64 if pa.types.is_large_binary(array.type) else np.int32
        offsets = np.frombuffer(array.buffers()[1], wide, array.offset + len(array) + 1)[array.offset :]
        refuse_any(np.diff(offsets) != size, place, column.name, problem, _HELD)
        start = int(offsets[0])
    return np.frombuffer(array.buffers()[-1], np.uint8)[start : start + len(array) * size]


def _elements(array: pa.Array, column: Column, place: Place) -> npt.NDArray[Any]:
    """All numbers of nested lists of exactly the schema's shape, or of flat lists of as many elements."""
    assert column.shape is not None  # noqa: S101 - the schema gives every tensor column a shape
    depth, kind = 0, array.type
    while _is_list(kind):
        depth, kind = depth + 1, kind.value_type
    shape = column.shape if depth == len(column.shape) else (math.prod(column.shape),) if depth == 1 else ()
    problem = f"not of shape {list(column.shape)}"
    refuse_any(np.full(len(array), not shape), place, column.name, problem, _HELD)
    inside = 1  # how many entries of this level belong to one row
    for size in shape:
        if array.null_count:
            refuse_any(_any_in_row(array.is_null(), inside), place, column.name, "a gap in the tensor", _HELD)
        if pa.types.is_fixed_size_list(array.type):
            wrong = np.full(len(array), array.type.list_size != size)
        else:
            wrong = np.asarray(array.value_lengths()) != size
        refuse_any(_any_in_row(wrong, inside), place, column.name, problem, _HELD)
        array, inside = array.flatten(), inside * size
    if array.null_count:
        refuse_any(_any_in_row(array.is_null(), inside), place, column.name, "a gap in the tensor", _HELD)
    return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]  # pyarrow has no types


def _any_in_row(wrong: Any, inside: int) -> npt.NDArray[np.bool_]:
    return np.asarray(np.asarray(wrong).reshape(-1, inside).any(axis=1))


def rounded_bounds(column: Column, dtype: np.dtype[Any]) -> tuple[float, float]:
    """The bounds, widened to the nearest numbers of a floating-point dtype: a value at a bound stays inside."""
    assert column.bounds is not None  # noqa: S101 - the schema gives every numeric column bounds
    low, high = column.bounds
    if dtype.kind != "f":
        return low, high
    with np.errstate(over="ignore"):
        near_low, near_high = float(dtype.type(low)), float(dtype.type(high))
    # Beyond the dtype's range lies only infinity, which no bound admits.
    limit = float(np.finfo(dtype).max)
    return max(min(low, near_low), -limit), min(max(high, near_high), limit)


def _check_bounds(elements: npt.NDArray[Any], column: Column, place: Place) -> None:
    if elements.size == 0:
        return
    low, high = rounded_bounds(column, elements.dtype)
    if elements.dtype.kind in "iu":
        info = np.iinfo(elements.dtype)
        if low <= info.min and high >= info.max:
            return
    # A NaN makes both NaN, which is inside nothing.
    if elements.min() >= low and elements.max() <= high:
        return
    wrong = ~((elements >= low) & (elements <= high)).all(axis=1)
    refuse_any(wrong, place, column.name, "an element outside the declared bounds", "see the column's bounds")
