"""What is publicly known about a table before anyone looks into it.

Guarantees: a schema is complete (each column has a type, a sensitivity class and, but for free text, public bounds or
values), frozen, and has one digest. Bounds, values and bins are facts that its author publishes; no code computes
them from data. An error about a schema names the field at fault and shows no value.

Not promised: that the classification is right. That is the judgement of the person who signs the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from cloister.canonical import digest
from cloister.errors import InputError

SensitivityClass = Literal["public", "internal", "confidential", "restricted"]
CLASSES: tuple[SensitivityClass, ...] = ("public", "internal", "confidential", "restricted")
# Stored widths: integers are int32, category codes are int16 (see ingest.py).
MAX_INTEGER = 2**31 - 1
MAX_VALUES = 2**15 - 1

_Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$")]


class Encoding(BaseModel):
    """How a number becomes model inputs: scaled linearly or by logarithm, plus one indicator for each bin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: Literal["linear", "log"] = "linear"
    bins: tuple[float, ...] = ()


class Column(BaseModel):
    """One column. As a plain map (`model_dump(mode="json", by_alias=True)`) it travels in model manifests."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: _Name
    type: Literal["integer", "number", "category", "text"]
    sensitivity: SensitivityClass = Field(alias="class")
    bounds: tuple[float, float] | None = None
    values: tuple[StrictStr, ...] | None = None
    role: Literal["label", "protected", "identifier", "unit", "weight"] | None = None
    encoding: Encoding | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.bounds is not None) != (self.type in ("integer", "number")):
            raise ValueError("integer and number columns have bounds, and only they")
        if (self.values is not None) != (self.type == "category"):
            raise ValueError("category columns have values, and only they")
        if self.role == "label" and self.type != "category":
            raise ValueError("a label is a category column")
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
        if not (low < high and abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("bounds are finite and ascending")
        if self.type == "integer" and not (
            low.is_integer() and high.is_integer() and max(abs(low), abs(high)) <= MAX_INTEGER
        ):
            raise ValueError("bounds of an integer column are integers of 32 bits")

    def _check_encoding(self, encoding: Encoding) -> None:
        if self.bounds is None:
            raise ValueError("only integer and number columns have an encoding")
        low, high = self.bounds
        ascending = all(a < b for a, b in zip(encoding.bins, encoding.bins[1:], strict=False))
        if not ascending or any(not low < edge <= high for edge in encoding.bins):
            raise ValueError("bins ascend and lie within the bounds")
        if encoding.scale == "log" and low < 0:
            raise ValueError("a logarithmic scale needs bounds that are not negative")


class DatasetSchema(BaseModel):
    """The columns of one data set and the public terms under which it is held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    purpose: StrictStr = Field(min_length=1, max_length=300)
    region: StrictStr = Field(min_length=1, max_length=300)
    retention: StrictStr = Field(min_length=1, max_length=300)
    unit: Literal["row"] = "row"
    columns: tuple[Column, ...] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("column names are distinct")
        if sum(column.role == "label" for column in self.columns) > 1:
            raise ValueError("at most one column has the role label")
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
            error = _first_problem(found)
        raise InputError(f"the schema is not valid: {error}", "see jobs/examples/adult/schema.yaml for a whole one")

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

    def columns_of_class(self, sensitivity: SensitivityClass) -> tuple[Column, ...]:
        return tuple(column for column in self.columns if column.sensitivity == sensitivity)

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
    return column.sensitivity != "restricted" and column.role not in ("label", "identifier") and column.type != "text"


def _yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
    raise InputError(f"this is not YAML{where}", "check the indentation and the quotes")


def _first_problem(error: ValidationError) -> str:
    """Place and reason of the first problem, without the value that pydantic would show."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
