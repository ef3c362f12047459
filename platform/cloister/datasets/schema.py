"""What is publicly known about a table before anyone looks into it.

Guarantees: a schema is complete (each column has a type, a sensitivity class and, but for text, public bounds or
values), frozen, and has one digest. Bounds, values and bins are facts that its author publishes; no code computes
them from data. An error about a schema names the field at fault and shows no value.

Not promised: that the classification is right. That is the judgement of the person who signs the data set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from cloister.canonical import digest
from cloister.errors import InputError
from cloister.validation import first_problem

SensitivityClass = Literal["public", "internal", "confidential", "restricted"]
CLASSES: tuple[SensitivityClass, ...] = ("public", "internal", "confidential", "restricted")
# Stored widths: integers are int32, category codes are int16 (see ingest.py).
MAX_INTEGER = 2**31 - 1
MAX_VALUES = 2**15 - 1
MAX_TENSOR_BYTES = 1 << 24

ORIGINAL_SUFFIX = ".original"
INDEX: Literal["index"] = "index"
"""The part of a shard that holds its subject index, beside those of the classes."""
SUBJECT_COLUMN = "subject"
"""The one column of an index."""
ORDINAL: Literal["ordinal"] = "ordinal"
"""The part of a shard that numbers each row within its unit (`ordinals.py`), where a unit has several."""
ORDINAL_COLUMN = "#ordinal"
"""Its one column. No column of a schema has this name: `_Name` allows no such character."""
PartName = SensitivityClass | Literal["index", "ordinal"]

# ISO 8601 durations in whole days or longer, such as P5Y, P18M, P2W or P1Y6M.
_DURATION = re.compile(r"P(?=[0-9])(?:([0-9]{1,3})Y)?(?:([0-9]{1,3})M)?(?:([0-9]{1,4})W)?(?:([0-9]{1,5})D)?")

_Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$")]

_SHORT_NAMES = {"name": "adult", "population": "us-1994"}
"""The fields that have such a name, each with an example."""


class Encoding(BaseModel):
    """How a number becomes model inputs: scaled linearly or by logarithm, plus one indicator for each bin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: Literal["linear", "log"] = "linear"
    bins: tuple[float, ...] = ()


class Column(BaseModel):
    """One column. As a plain map (`model_dump(mode="json", by_alias=True)`) it travels in model manifests."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: _Name
    type: Literal["integer", "number", "category", "text", "tensor"]
    sensitivity: SensitivityClass = Field(alias="class")
    bounds: tuple[float, float] | None = None
    """Of each number; of each element, in a tensor."""
    values: tuple[StrictStr, ...] | None = None
    shape: tuple[Annotated[int, Field(ge=1, le=MAX_TENSOR_BYTES)], ...] | None = None
    dtype: Literal["uint8", "int8", "int16", "int32", "float16", "float32", "float64"] | None = None
    """Of a tensor's elements, which are stored little-endian in C order."""
    role: Literal["label", "protected", "identifier", "unit", "weight"] | None = None
    keep_original: bool | None = None
    """Of an identifier: its originals are kept too, as `<name>.original` in the class `restricted`."""
    encoding: Encoding | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.bounds is not None) != (self.type in ("integer", "number", "tensor")):
            raise ValueError("integer, number and tensor columns have bounds, and only they")
        if (self.values is not None) != (self.type == "category"):
            raise ValueError("category columns have values, and only they")
        if (self.shape is not None) != (self.type == "tensor") or (self.dtype is not None) != (self.type == "tensor"):
            raise ValueError("tensor columns have a shape and a dtype, and only they")
        if self.type == "tensor" and self.tensor_bytes > MAX_TENSOR_BYTES:
            raise ValueError("a tensor has at most 16 MiB")
        if self.role == "label" and self.type != "category":
            raise ValueError("a label is a category column")
        if self.role == "identifier" and self.type != "text":
            raise ValueError("an identifier is a text column")
        if self.role == "unit" and self.type not in ("integer", "category", "text"):
            raise ValueError("a unit is an integer, category or text column")
        if self.keep_original is not None and self.role != "identifier":
            raise ValueError("only identifiers have originals to keep")
        if self.bounds is not None:
            self._check_bounds(*self.bounds)
        if self.values is not None and not (
            1 <= len(self.values) <= MAX_VALUES and len(set(self.values)) == len(self.values)
        ):
            raise ValueError("values are distinct and there is at least one")
        if self.values is not None and any(value != value.strip() for value in self.values):
            raise ValueError("values have no white space around them")
        if self.encoding is not None:
            self._check_encoding(self.encoding)
        return self

    def _check_bounds(self, low: float, high: float) -> None:
        stored = {"number": "float32", "tensor": self.dtype}.get(self.type) or "int32"
        # Beyond what is stored there is only infinity, which would scale every value to 0 or to nothing at all.
        limit = float(np.finfo(stored).max) if stored.startswith("float") else float("inf")
        if not (low < high and abs(low) <= limit and abs(high) <= limit and math.isfinite(high - low)):
            raise ValueError("bounds are finite, ascending, and no larger than what is stored")
        if self.type == "tensor" and self.dtype and not self.dtype.startswith("float"):
            info = np.iinfo(self.dtype)
            if not (low.is_integer() and high.is_integer() and info.min <= low and high <= info.max):
                raise ValueError("bounds of a tensor of integers are integers of its dtype")
        if self.type == "integer" and not (
            low.is_integer() and high.is_integer() and max(abs(low), abs(high)) <= MAX_INTEGER
        ):
            raise ValueError("bounds of an integer column are integers of 32 bits")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one row of a tensor column; 0 for others."""
        if self.shape is None or self.dtype is None:
            return 0
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def _check_encoding(self, encoding: Encoding) -> None:
        if self.bounds is None or self.type == "tensor":
            raise ValueError("only integer and number columns have an encoding")
        low, high = self.bounds
        ascending = all(a < b for a, b in zip(encoding.bins, encoding.bins[1:], strict=False))
        if not ascending or any(not low < edge <= high for edge in encoding.bins):
            raise ValueError("bins ascend and lie within the bounds")
        if encoding.scale == "log" and low < 0:
            raise ValueError("a logarithmic scale needs bounds that are not negative")


class Unit(BaseModel):
    """Whose privacy is protected, where that is not one row: all rows with the same value in `column`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: _Name
    max_rows: int = Field(ge=1, le=10_000)
    """How many rows one unit may have in a version: sealing refuses more, and accounting reckons with as many."""


class DatasetSchema(BaseModel):
    """The columns of one data set and the public terms under which it is held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    purpose: StrictStr = Field(min_length=1, max_length=300)
    region: StrictStr = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    retention: StrictStr = Field(min_length=1, max_length=30)
    """How long a version is kept from its sealing on, as an ISO 8601 duration such as P5Y or P18M."""
    population: Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")] | None = None
    """Whose rows these are, where that is not `default`. Datasets of one owner, population and unit share a budget."""
    unit: Literal["row"] | Unit = "row"
    columns: tuple[Column, ...] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("column names are distinct")
        if sum(column.role == "label" for column in self.columns) > 1:
            raise ValueError("at most one column has the role label")
        kept = [column.name + ORIGINAL_SUFFIX for column in self.columns if column.keep_original]
        if set(kept) & set(names):
            raise ValueError(f"a column is named as another one's originals, which end in {ORIGINAL_SUFFIX}")
        match = _DURATION.fullmatch(self.retention)
        if not match or not any(int(part or 0) for part in match.groups()):
            raise ValueError("retention is an ISO 8601 duration of whole days or longer, such as P5Y, P18M or P30D")
        unit_columns = [column.name for column in self.columns if column.role == "unit"]
        if isinstance(self.unit, Unit):
            if self.unit.column not in names:
                raise ValueError("unit: there is no such column")
            if self.column(self.unit.column).role not in ("unit", "identifier"):
                raise ValueError("the unit's column has the role unit or identifier")
            unit_columns = [name for name in unit_columns if name != self.unit.column]
        if unit_columns:
            raise ValueError("a column with the role unit is the one that `unit` names")
        return self

    @classmethod
    def from_yaml_text(cls, text: str) -> Self:
        """Read `schema.yaml`.

        Raises:
            InputError: not YAML, or not a complete schema.
        """
        return cls.from_mapping(_yaml(text))

    @classmethod
    def from_mapping(cls, value: object) -> Self:
        """Validate a plain map, such as `to_dict` gives.

        Raises:
            InputError: not a complete schema.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as found:
            # Of `row` or a unit, pydantic tells first that it is not `row`.
            problem = first_problem(found, silent={Unit.__name__}, not_meant="literal['row']")
        reason = problem.reason
        if problem.kind == "string_pattern_mismatch" and problem.place in _SHORT_NAMES:
            reason = f"a short name of lower-case letters, digits and hyphens, such as {_SHORT_NAMES[problem.place]}"
        raise InputError(
            f"the schema is not valid: {problem.place}: {reason}",
            "see jobs/examples/adult/schema.yaml for a whole one",
        )

    def to_dict(self) -> dict[str, Any]:
        """The plain map that is stored, hashed and signed."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def digest(self) -> str:
        return digest("cloister/schema/v1", self.to_dict())

    def column(self, name: str) -> Column:
        """The column of that name.

        Raises:
            InputError: there is none.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise InputError(f"the schema has no column '{name}'", "columns: " + ", ".join(c.name for c in self.columns))

    def stored_columns(self, part: PartName) -> tuple[str, ...]:
        """The columns of that part's sealed files: of a class, the schema's, and in `restricted` the originals kept."""
        if part == INDEX:
            return (SUBJECT_COLUMN,)
        if part == ORDINAL:
            return (ORDINAL_COLUMN,)
        own = [column.name for column in self.columns if column.sensitivity == part]
        if part == "restricted":
            own += [column.name + ORIGINAL_SUFFIX for column in self.columns if column.keep_original]
        return tuple(own)

    @property
    def subject(self) -> Column | None:
        """The column by which a person's rows are found: the unit's, or else the first identifier; None without."""
        if isinstance(self.unit, Unit):
            return self.column(self.unit.column)
        return next((column for column in self.columns if column.role == "identifier"), None)

    @property
    def rows_per_unit(self) -> int:
        """How many rows one unit of privacy has at most."""
        return self.unit.max_rows if isinstance(self.unit, Unit) else 1

    def parts(self, *, numbered: bool = False) -> tuple[PartName, ...]:
        """The files that each shard has: one for each class with columns, the index where there is a subject, and the
        ordinals where rows are `numbered` and a unit has several.
        """
        classes: tuple[PartName, ...] = tuple(cls for cls in CLASSES if self.stored_columns(cls))
        index = (INDEX,) if self.subject else ()
        return (*classes, *index, ORDINAL) if numbered and self.rows_per_unit > 1 else (*classes, *index)

    def expiry(self, sealed: datetime) -> datetime:
        """When what was sealed at `sealed` is to be gone. Years and months by the calendar, at most to year 9999."""
        match = _DURATION.fullmatch(self.retention)
        assert match  # noqa: S101 - checked above
        years, months, weeks, days = (int(part or 0) for part in match.groups())
        month = sealed.year * 12 + sealed.month - 1 + years * 12 + months
        try:
            first = sealed.replace(year=month // 12, month=month % 12 + 1, day=1)
            # The 31st of a month without one is the day after its last: never earlier than was promised.
            next_first = (first + timedelta(days=31)).replace(day=1)
            return min(first + timedelta(days=sealed.day - 1), next_first) + timedelta(days=weeks * 7 + days)
        except (ValueError, OverflowError):
            return datetime.max.replace(tzinfo=sealed.tzinfo)

    def label_column(self) -> Column:
        """The column with the role `label`.

        Raises:
            InputError: the schema has none.
        """
        for column in self.columns:
            if column.role == "label":
                return column
        raise InputError(f"data set '{self.name}' has no label column", "give one column `role: label`")

    def feature_columns(self, names: Sequence[str] | None = None) -> tuple[Column, ...]:
        """The inputs of a model: those named, or all that have no role, no free text and are not restricted.

        Raises:
            InputError: a named column is restricted, is the label or is free text, or nothing is left.
        """
        if names is None:
            chosen = tuple(c for c in self.columns if c.role is None and _usable(c))
        else:
            chosen = tuple(self.column(name) for name in names)
            for column in chosen:
                if not _usable(column):
                    raise InputError(f"column '{column.name}' may not be a model input", "take it out of `features`")
        if not chosen or len(set(chosen)) != len(chosen):
            raise InputError("a model needs at least one input, each named once", "list columns under `features`")
        return chosen


def _usable(column: Column) -> bool:
    if column.sensitivity == "restricted" or column.type == "text":
        return False
    return column.role not in ("label", "identifier", "unit")


def _yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
    raise InputError(f"this is not YAML{where}", "check the indentation and the quotes")
