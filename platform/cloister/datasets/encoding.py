# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""From columns to model inputs, the same in training and in serving.

Guarantees: the encoding is a function of the columns alone (public facts), so it is deterministic, leaks nothing and
costs no privacy; a row's inputs depend on that row only, and every input lies in [0, 1]. A request that does not fit
the public bounds and values is refused by column and row index, never showing the value.

    category            one indicator for each value
    integer, number     position between the bounds, linear or logarithmic, then one indicator for each bin:
                        bins [b1, b2] make (-inf, b1), [b1, b2), [b2, inf)
    tensor              position of each element between the bounds, in C order

Shapes: N rows, D inputs, T elements of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister.datasets.schema import Column
from cloister.errors import InputError

Array = npt.NDArray[np.generic]

_BLOCK_ELEMENTS = 1 << 20  # tensors are scaled in float64, so much at a time


def stored_array(array: pa.ChunkedArray, column: Column) -> Array:
    """One column of an opened shard: [N], or [N, T] where it holds tensors. Copies nothing that it need not.

    Raises:
        InputError: not in the stored form of this column.
    """
    if column.type != "tensor":
        return np.asarray(array.to_numpy())
    if array.type != pa.binary(column.tensor_bytes):
        raise InputError(f"column '{column.name}' is not in its stored form", "read it with the same schema")
    whole = array.combine_chunks()
    dtype = np.dtype(str(column.dtype)).newbyteorder("<")
    width = column.tensor_bytes // dtype.itemsize
    if len(whole) == 0:
        return np.zeros((0, width), dtype)
    start = whole.offset * column.tensor_bytes
    return np.frombuffer(whole.buffers()[1], dtype, len(whole) * width, start).reshape(-1, width)


class FeatureEncoder:
    """Encodes one fixed sequence of columns. Holds no data."""

    def __init__(self, columns: Sequence[Column]) -> None:
        for column in columns:
            if column.type == "text":
                raise InputError(f"column '{column.name}' is free text and cannot be a model input", "leave it out")
        self.columns = tuple(columns)
        self.width = sum(_width(column) for column in self.columns)
        self._codes = {c.name: {value: i for i, value in enumerate(c.values)} for c in self.columns if c.values}

    def encode(self, columns: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Stored columns (codes, integers, floats, tensors as `stored_array` gives them) to inputs [N, D].

        Columns that are no features are ignored.

        Raises:
            InputError: a column is missing, of another length or outside its public domain.
        """
        arrays = [self._stored(column, columns) for column in self.columns]
        rows = len(arrays[0])
        if any(len(array) != rows for array in arrays):
            raise InputError("the columns differ in length", "send the same number of rows in every column")
        inputs_ND = np.zeros((rows, self.width), dtype=np.float32)
        every_row = np.arange(rows)
        offset = 0
        for column, array in zip(self.columns, arrays, strict=True):
            if column.values is not None:
                inputs_ND[every_row, offset + array.astype(np.int64)] = 1.0
            elif column.type == "tensor":
                _scale_tensor(column, array, inputs_ND[:, offset : offset + _width(column)])
            else:
                numbers = array.astype(np.float64)
                inputs_ND[:, offset] = _scaled(column, numbers)
                bins = _bins(column)
                if bins:
                    inputs_ND[every_row, offset + 1 + np.searchsorted(bins, numbers, side="right")] = 1.0
            offset += _width(column)
        return inputs_ND

    def parse_request(self, columns: Mapping[str, Sequence[object] | Array]) -> dict[str, Array]:
        """What a client sent (category strings and numbers) to stored columns.

        Raises:
            InputError: naming the column and, where one row is at fault, its index from 0.
        """
        names = [column.name for column in self.columns]
        for name in columns:
            if name not in names:
                raise InputError("the request has a column that the model does not take", "inputs: " + ", ".join(names))
        parsed: dict[str, Array] = {}
        for column in self.columns:
            if column.name not in columns:
                raise InputError(f"column '{column.name}' is missing", "inputs: " + ", ".join(names))
            values = columns[column.name]
            if column.type == "tensor":
                parsed[column.name] = _parse_tensor(column, values)
            else:
                parsed[column.name] = (
                    self._parse_codes(column, values) if column.values else _parse_numbers(column, values)
                )
        if len({len(array) for array in parsed.values()}) > 1:
            raise InputError("the columns differ in length", "send the same number of rows in every column")
        return parsed

    def _parse_codes(self, column: Column, values: Sequence[object] | Array) -> Array:
        codes = self._codes[column.name]
        found = [codes.get(value, -1) if isinstance(value, str) else -1 for value in values]
        if -1 in found:
            raise InputError(
                f"column '{column.name}', index {found.index(-1)}: not one of the declared values",
                "values: " + ", ".join(list(codes)[:20]),
            )
        return np.asarray(found, dtype=np.int16)

    def _stored(self, column: Column, columns: Mapping[str, Array]) -> Array:
        if column.name not in columns:
            raise InputError(f"column '{column.name}' is missing", "open every column that the model was trained on")
        array = np.asarray(columns[column.name])
        if column.type == "tensor":
            good = array.shape[1:] == (_width(column),) and array.dtype == column.dtype and _all_inside(column, array)
        elif column.values is not None:
            good = array.dtype.kind in "iu" and _all_below(array.astype(np.int64), len(column.values))
        else:
            good = array.dtype.kind in "iuf" and _first_outside(column, array.astype(np.float64)) is None
        if not good or array.ndim != (2 if column.type == "tensor" else 1):
            raise InputError(f"column '{column.name}' is not in its stored form", "read it with the same schema")
        return array


def _parse_numbers(column: Column, values: Sequence[object] | Array) -> Array:
    if not isinstance(values, np.ndarray):
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"column '{column.name}', index {index}: not a number", "send a JSON number")
        numbers = np.array([_float(value) for value in values], dtype=np.float64)
    elif values.ndim == 1 and values.dtype.kind in "iuf":
        numbers = values.astype(np.float64)
    else:
        raise InputError(f"column '{column.name}' is not a list of numbers", "send one number a row")
    index_outside = _first_outside(column, numbers)
    if index_outside is not None:
        assert column.bounds is not None  # noqa: S101 - the schema gives every numeric column bounds
        raise InputError(
            f"column '{column.name}', index {index_outside}: outside the declared bounds",
            f"bounds: {column.bounds[0]:g} to {column.bounds[1]:g}",
        )
    if column.type == "integer":
        fractional = np.flatnonzero(numbers != np.floor(numbers))
        if len(fractional):
            raise InputError(f"column '{column.name}', index {fractional[0]}: not an integer", "send a whole number")
        return numbers.astype(np.int32)
    return numbers.astype(np.float32)


def _parse_tensor(column: Column, values: Sequence[object] | Array) -> Array:
    """Numbers of shape [N, T] or [N, *shape] to the stored form [N, T]."""
    assert column.shape is not None  # noqa: S101 - the schema gives every tensor column a shape
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths; raised outside, since the text may quote them
        array = np.zeros(0)
    width = _width(column)
    if array.shape[1:] not in ((width,), column.shape) or array.dtype.kind not in "iuf":
        shape = ", ".join(str(size) for size in column.shape)
        raise InputError(
            f"column '{column.name}' is not a tensor of numbers", f"its shape is [N, {shape}] or [N, {width}]"
        )
    flat, dtype = array.reshape(len(array), width), np.dtype(str(column.dtype))
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # becomes infinite, and is refused below
            flat = flat.astype(dtype)
    index_outside = _first_row_outside(column, flat)
    if index_outside is not None:
        assert column.bounds is not None  # noqa: S101 - the schema gives every numeric column bounds
        raise InputError(
            f"column '{column.name}', index {index_outside}: an element outside the declared bounds",
            f"bounds: {column.bounds[0]:g} to {column.bounds[1]:g}",
        )
    if dtype.kind != "f" and flat.dtype.kind == "f":
        fractional = np.flatnonzero((flat != np.floor(flat)).any(axis=1))
        if len(fractional):
            raise InputError(f"column '{column.name}', index {fractional[0]}: not integers", "send whole numbers")
    return flat.astype(dtype)


def _all_inside(column: Column, tensors_NT: npt.NDArray[Any]) -> bool:
    if tensors_NT.size == 0:
        return True
    low, high = _bounds_as(column, tensors_NT.dtype)
    # A NaN makes both extremes NaN, and fails both comparisons.
    return bool(tensors_NT.min() >= low and tensors_NT.max() <= high)


def _first_row_outside(column: Column, tensors_NT: npt.NDArray[Any]) -> int | None:
    if _all_inside(column, tensors_NT):
        return None
    low, high = _bounds_as(column, tensors_NT.dtype)
    return int((~((tensors_NT >= low) & (tensors_NT <= high))).any(axis=1).argmax())


def _bounds_as(column: Column, dtype: np.dtype[Any]) -> tuple[float, float]:
    """The bounds, widened to the nearest numbers of a floating-point type: what was stored rounded stays inside."""
    assert column.bounds is not None  # noqa: S101 - the schema gives every numeric column bounds
    low, high = column.bounds
    if dtype.kind != "f":
        return low, high
    return min(low, float(dtype.type(low))), max(high, float(dtype.type(high)))


def _scale_tensor(column: Column, tensors_NT: Array, out_NT: npt.NDArray[np.float32]) -> None:
    rows = max(1, _BLOCK_ELEMENTS // tensors_NT.shape[1])
    for start in range(0, len(tensors_NT), rows):
        block = slice(start, start + rows)
        out_NT[block] = _scaled(column, tensors_NT[block].astype(np.float64))


def _all_below(codes: npt.NDArray[np.int64], count: int) -> bool:
    return bool(((codes >= 0) & (codes < count)).all())


def _float(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # the caller has checked that it is an int or a float
    except OverflowError:
        return math.inf


def _first_outside(column: Column, numbers: npt.NDArray[np.float64]) -> int | None:
    assert column.bounds is not None  # noqa: S101 - the schema gives every numeric column bounds
    low, high = column.bounds
    # Stored numbers are float32: bounds are compared after the same rounding. A NaN fails both comparisons.
    if column.type == "number":
        low, high = min(low, float(np.float32(low))), max(high, float(np.float32(high)))
    outside = ~((numbers >= low) & (numbers <= high))
    return int(outside.argmax()) if outside.any() else None


def _scaled(column: Column, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    assert column.bounds is not None  # noqa: S101 - the schema gives every numeric column bounds
    low, high = column.bounds
    if column.encoding is not None and column.encoding.scale == "log":
        position = (np.log1p(numbers) - math.log1p(low)) / (math.log1p(high) - math.log1p(low))
    else:
        position = (numbers - low) / (high - low)
    return np.clip(position, 0.0, 1.0)


def _bins(column: Column) -> tuple[float, ...]:
    return column.encoding.bins if column.encoding is not None else ()


def _width(column: Column) -> int:
    if column.shape is not None:
        return math.prod(column.shape)
    if column.values is not None:
        return len(column.values)
    return 1 + (len(_bins(column)) + 1 if _bins(column) else 0)
