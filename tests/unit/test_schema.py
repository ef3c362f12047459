"""A schema is complete, public and frozen, and its errors show no value."""

from __future__ import annotations

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
    assert [column.name for column in schema.columns_of_class("restricted")] == ["origin", "note"]
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
        ("bounds: [0, 120], ", "", "integer and number columns have bounds"),
        ("bounds: [0, 120]", "bounds: [120, 0]", "ascending"),
        ("bounds: [0, 120]", "bounds: [0, .inf]", "finite"),
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
