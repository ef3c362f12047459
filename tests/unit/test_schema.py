"""A schema is complete, public and frozen, and its errors show no value."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from cloister.datasets.schema import Column, DatasetSchema
from cloister.errors import InputError

BODY = """
name: people
purpose: research
region: eu
retention: P1Y
columns:
  - {name: age, type: integer, class: confidential, bounds: [0, 120], encoding: {bins: [20, 40]}}
  - {name: job, type: category, class: internal, values: [nurse, clerk]}
  - {name: origin, type: category, class: restricted, role: protected, values: [a, b]}
  - {name: note, type: text, class: restricted, role: identifier}
  - {name: weight, type: number, class: internal, role: weight, bounds: [0, 1.5]}
  - {name: rich, type: category, class: confidential, role: label, values: ["no", "yes"]}
"""


def test_restricted_label_and_weight_columns_are_no_inputs_by_default() -> None:
    schema = DatasetSchema.from_yaml_text(BODY)
    assert [column.name for column in schema.feature_columns()] == ["age", "job"]
    assert schema.stored_columns("restricted") == ("origin", "note")
    assert schema.label_column().name == "rich"
    assert schema.unit == "row"


@pytest.mark.parametrize("name", ["origin", "note", "rich"])
def test_a_restricted_column_cannot_be_named_as_an_input(name: str) -> None:
    with pytest.raises(InputError, match=name):
        DatasetSchema.from_yaml_text(BODY).feature_columns(["age", name])


def test_a_feature_named_twice_or_not_at_all_is_refused() -> None:
    schema = DatasetSchema.from_yaml_text(BODY)
    for names in (["age", "age"], []):
        with pytest.raises(InputError, match="at least one input"):
            schema.feature_columns(names)
    with pytest.raises(InputError, match="no column 'ages'"):
        schema.feature_columns(["ages"])


def test_equal_schemas_have_equal_digests_and_any_change_shows() -> None:
    schema = DatasetSchema.from_yaml_text(BODY)
    assert schema.digest() == DatasetSchema.model_validate(schema.to_dict()).digest()
    assert schema.digest() != DatasetSchema.from_yaml_text(BODY.replace("120", "121")).digest()


def test_a_column_survives_the_plain_map_of_a_model_manifest() -> None:
    for column in DatasetSchema.from_yaml_text(BODY).columns:
        assert Column.model_validate(column.model_dump(mode="json", by_alias=True)) == column


def test_a_schema_cannot_be_changed_after_it_was_digested() -> None:
    with pytest.raises(ValidationError):
        DatasetSchema.from_yaml_text(BODY).name = "other"  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("bounds: [0, 120], ", "", "integer, number and tensor columns have bounds"),
        ("bounds: [0, 120]", "bounds: [120, 0]", "ascending"),
        ("bounds: [0, 120]", "bounds: [0, .inf]", "finite"),
        ("bounds: [0, 120]", "bounds: [.nan, 120]", "ascending"),
        ("bounds: [0, 120]", "bounds: [0.5, 120]", "integers of 32 bits"),
        ("bounds: [0, 1.5]", "bounds: [0, 1.0e+39]", "no larger than what is stored"),
        (", bounds: [0, 1.5]", "", "integer, number and tensor columns have bounds"),
        ("values: [nurse, clerk]", "values: []", "at least one"),
        ("values: [nurse, clerk]", "values: [nurse, ' clerk']", "white space"),
        (", values: [nurse, clerk]", "", "category columns have values"),
        (', values: ["no", "yes"]', "", "category columns have values"),
        ("type: text", "type: text, values: [a]", "category columns have values"),
        ("type: text", "type: text, bounds: [0, 1]", "integer, number and tensor columns have bounds"),
        ("role: label, ", "role: label, bounds: [0, 1], ", "integer, number and tensor columns have bounds"),
        ("role: identifier", "role: identifier, shape: [2]", "tensor columns have a shape"),
        ("role: protected", "role: identifier", "an identifier is a text column"),
        ("role: protected", "role: protected, keep_original: true", "only identifiers"),
        ("role: weight", "role: unit", "a unit is an integer, category or text column"),
        ("role: weight", "role: label", "a label is a category column"),
        ("retention: P1Y", "retention: 1 year", "ISO 8601"),
        ("region: eu\n", "region: eu/west\n", "region"),
        ("region: eu\n", 'region: ""\n', "region"),
        ("region: eu\n", "region: .hidden\n", "region"),
        ("bounds: [0, 120]", "bounds: [0, 99999999999]", "32 bits"),
        ("bins: [20, 40]", "bins: [40, 20]", "bins ascend"),
        ("bins: [20, 40]", "bins: [20, 400]", "bins ascend"),
        ("values: [nurse, clerk]", "values: [nurse, nurse]", "distinct"),
        ("values: [nurse, clerk]", "values: [nurse, 7]", "valid string"),
        ("class: internal, values", "class: secret, values", "class"),
        ("name: job", "name: age", "column names are distinct"),
        ("role: protected", "role: label", "at most one"),
        ("region: eu\n", "", "region"),
        ("region: eu\n", "region: eu\nsurprise: 1\n", "surprise"),
        ("name: people", "name: {", "line"),
    ],
)
def test_an_incomplete_schema_is_refused_with_its_place(old: str, new: str, told: str) -> None:
    assert old in BODY
    with pytest.raises(InputError) as refusal:
        DatasetSchema.from_yaml_text(BODY.replace(old, new))
    assert told in refusal.value.message
    assert refusal.value.hint


def test_an_error_shows_no_value() -> None:
    with pytest.raises(InputError) as refusal:
        DatasetSchema.from_yaml_text(BODY.replace("[nurse, clerk]", "[nurse, 424242]"))
    assert "424242" not in f"{refusal.value.message}{refusal.value.hint}"


def column(**facts: Any) -> Column:
    return Column.model_validate({"name": "c", "class": "internal"} | facts)


IMAGE: dict[str, Any] = {"type": "tensor", "shape": [28, 28], "dtype": "uint8", "bounds": [0, 255]}


def test_a_tensor_has_shape_dtype_and_bounds_and_a_size() -> None:
    assert column(**IMAGE).tensor_bytes == 784
    assert column(**IMAGE | {"shape": [3], "dtype": "float64", "bounds": [-1, 1]}).tensor_bytes == 24
    assert column(type="integer", bounds=[0, 1]).tensor_bytes == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": None}, "tensor columns have a shape"),
        ({"dtype": None}, "tensor columns have a shape"),
        ({"bounds": None}, "tensor columns have bounds"),
        ({"shape": [0]}, "greater than or equal to 1"),
        ({"shape": [4096, 4097]}, "at most 16 MiB"),
        ({"shape": [1 << 24, 1 << 24]}, "at most 16 MiB"),
        ({"dtype": "uint16"}, "uint8"),
        ({"dtype": "object"}, "uint8"),
        ({"bounds": [0, 256]}, "integers of its dtype"),
        ({"bounds": [-1, 255]}, "integers of its dtype"),
        ({"bounds": [0, 0.5]}, "integers of its dtype"),
        ({"dtype": "float16", "bounds": [0, 70_000]}, "no larger than what is stored"),
        ({"dtype": "float64", "bounds": [-1.7e308, 1.7e308]}, "no larger than what is stored"),
        ({"role": "label"}, "a label is a category column"),
        ({"role": "unit"}, "a unit is"),
        ({"role": "identifier"}, "an identifier is a text column"),
        ({"encoding": {"scale": "log"}}, "only integer and number columns have an encoding"),
        ({"values": ["a"]}, "category columns have values"),
    ],
)
def test_a_tensor_that_is_not_described_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        column(**IMAGE | change)


PATIENTS = """
name: visits
purpose: research
region: eu
retention: P18M
unit: {column: patient, max_rows: 8}
columns:
  - {name: patient, type: text, class: internal, role: identifier, keep_original: true}
  - {name: doctor, type: text, class: restricted, role: identifier}
  - {name: age, type: integer, class: confidential, bounds: [0, 120]}
"""


def test_people_are_in_classes_of_files_and_an_index() -> None:
    schema = DatasetSchema.from_yaml_text(PATIENTS)
    assert schema.parts() == ("internal", "confidential", "restricted", "index")
    assert schema.stored_columns("internal") == ("patient",)
    assert schema.stored_columns("restricted") == ("doctor", "patient.original")
    assert schema.stored_columns("index") == ("subject",)
    assert schema.subject is schema.columns[0]
    assert schema.rows_per_unit == 8
    assert [found.name for found in schema.feature_columns()] == ["age"]
    rows = DatasetSchema.from_yaml_text(BODY)
    assert rows.rows_per_unit == 1
    assert rows.subject is rows.column("note"), "without a unit's column, the first identifier"
    assert DatasetSchema.from_yaml_text(BODY.replace("role: identifier", "")).subject is None


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("column: patient", "column: patience", "there is no such column"),
        ("column: patient", "column: age", "has the role unit or identifier"),
        ("max_rows: 8", "max_rows: 0", "greater than or equal to 1"),
        ("max_rows: 8", "max_rows: 10001", "less than or equal to 10000"),
        (", max_rows: 8", "", "unit"),
        ("{column: patient, max_rows: 8}", "person", "unit"),
        ("bounds: [0, 120]", "bounds: [0, 120], role: unit", "the one that `unit` names"),
        ("{column: patient, max_rows: 8}\n", "row\n", None),
        ("name: age", "name: patient.original", "named as another one's originals"),
    ],
)
def test_a_unit_is_one_column_that_names_people(old: str, new: str, told: str | None) -> None:
    assert old in PATIENTS
    changed = PATIENTS.replace(old, new)
    if told is None:
        assert DatasetSchema.from_yaml_text(changed).rows_per_unit == 1
        return
    with pytest.raises(InputError) as refusal:
        DatasetSchema.from_yaml_text(changed)
    assert told in refusal.value.message


@pytest.mark.parametrize(
    ("retention", "sealed", "gone"),
    [
        ("P1D", "2024-02-28", "2024-02-29"),
        ("P2W", "2024-02-20", "2024-03-05"),
        ("P1M", "2023-01-15", "2023-02-15"),
        ("P1M", "2023-01-31", "2023-03-01"),
        ("P1M", "2024-01-31", "2024-03-01"),
        ("P1M", "2024-01-30", "2024-03-01"),
        ("P1M", "2024-01-29", "2024-02-29"),
        ("P1M", "2023-03-31", "2023-05-01"),
        ("P1M", "2023-12-31", "2024-01-31"),
        ("P18M", "2023-08-31", "2025-03-01"),
        ("P1Y", "2024-02-29", "2025-03-01"),
        ("P4Y", "2024-02-29", "2028-02-29"),
        ("P100Y", "2000-02-29", "2100-03-01"),
        ("P1Y6M10D", "2023-01-31", "2024-08-10"),
        ("P0Y1M", "2023-01-01", "2023-02-01"),
        ("P999Y", "9500-01-01", "9999-12-31"),
        ("P99999D", "9999-12-30", "9999-12-31"),
    ],
)
def test_retention_ends_by_the_calendar_and_never_too_early(retention: str, sealed: str, gone: str) -> None:
    schema = DatasetSchema.from_yaml_text(BODY.replace("P1Y", retention))
    at = datetime.fromisoformat(sealed).replace(hour=13, minute=5, tzinfo=UTC)
    expiry = schema.expiry(at)
    assert expiry.date().isoformat() == gone
    assert expiry.tzinfo is UTC
    assert (expiry.hour, expiry.minute) in ((13, 5), (23, 59))


@pytest.mark.parametrize(
    "retention",
    ["P", "P0D", "P0Y0M", "PT5H", "P1DT1H", "-P1D", "P-1D", "P1.5Y", "P1D1M", "1Y", "P1Y ", "p1y", "P٥Y", "P1000Y"],
)
def test_a_retention_that_is_no_whole_number_of_days_is_refused(retention: str) -> None:
    with pytest.raises(InputError, match="retention is an ISO 8601"):
        DatasetSchema.from_mapping(DatasetSchema.from_yaml_text(BODY).to_dict() | {"retention": retention})


def test_a_name_that_is_not_one_is_answered_with_what_one_is_like() -> None:
    with pytest.raises(InputError, match="population: a short name of lower-case") as found:
        DatasetSchema.from_yaml_text("population: Us 1994" + BODY)
    assert found.value.message.endswith("letters, digits and hyphens, such as us-1994")
    with pytest.raises(InputError, match="schema is not valid: name: a short name"):
        DatasetSchema.from_yaml_text(BODY.replace("people", "My People"))
