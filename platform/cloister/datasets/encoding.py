# ruff: noqa: N806 - the letters after a tensor's name are its shape
"""From columns to model inputs, the same in training and in serving.

Guarantees: the encoding is a function of the columns alone (public facts), so it is deterministic, leaks nothing and
costs no privacy; a row's inputs depend on that row only, and every input lies in [0, 1]. A request that does not fit
the public bounds and values is refused by column and row index, never showing the value.

    category            one indicator for each value
    integer, number     position between the bounds, linear or logarithmic, then one indicator for each bin:
                        bins [b1, b2] make (-inf, b1), [b1, b2), [b2, inf)

Shapes: N rows, D inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cloister.datasets.schema import Column
from cloister.errors import InputError

Array = npt.NDArray[np.generic]


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
        """Stored columns (codes, integers, floats) to inputs [N, D]; columns that are no features are ignored.

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
            parsed[column.name] = self._parse_codes(column, values) if column.values else _parse_numbers(column, values)
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
        if column.values is not None:
            good = array.dtype.kind in "iu" and _all_below(array.astype(np.int64), len(column.values))
        else:
            good = array.dtype.kind in "iuf" and _first_outside(column, array.astype(np.float64)) is None
        if not good or array.ndim != 1:
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
    if column.values is not None:
        return len(column.values)
    return 1 + (len(_bins(column)) + 1 if _bins(column) else 0)
