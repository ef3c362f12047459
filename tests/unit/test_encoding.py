"""Inputs are a function of the public columns alone, equal in training and serving."""

from __future__ import annotations

import numpy as np
import pytest

from cloister.datasets.encoding import FeatureEncoder
from cloister.datasets.schema import Column
from cloister.errors import InputError

AGE = Column.model_validate(
    {"name": "age", "type": "integer", "class": "internal", "bounds": [0, 100], "encoding": {"bins": [20, 40]}}
)
DOSE = Column.model_validate({"name": "dose", "type": "number", "class": "internal", "bounds": [0.1, 0.9]})
GAIN = Column.model_validate(
    {"name": "gain", "type": "integer", "class": "internal", "bounds": [0, 99], "encoding": {"scale": "log"}}
)
JOB = Column.model_validate({"name": "job", "type": "category", "class": "internal", "values": ["nurse", "clerk", "?"]})
ENCODER = FeatureEncoder([AGE, DOSE, GAIN, JOB])
REQUEST = {"age": [0, 20, 100], "dose": [0.1, 0.5, 0.9], "gain": [0, 9, 99], "job": ["nurse", "?", "clerk"]}


def test_known_rows_have_known_inputs() -> None:
    inputs = ENCODER.encode(ENCODER.parse_request(REQUEST))
    assert inputs.dtype == np.float32
    assert inputs.shape == (3, ENCODER.width) == (3, 4 + 1 + 1 + 3)
    expected = [
        [0.0, 1, 0, 0, 0.0, 0.0, 1, 0, 0],
        [0.2, 0, 1, 0, 0.5, 0.5, 0, 0, 1],
        [1.0, 0, 0, 1, 1.0, 1.0, 0, 1, 0],
    ]
    np.testing.assert_allclose(inputs, expected, atol=1e-6)


def test_an_encoder_rebuilt_from_a_manifest_encodes_alike() -> None:
    plain = [column.model_dump(mode="json", by_alias=True) for column in ENCODER.columns]
    rebuilt = FeatureEncoder([Column.model_validate(column) for column in plain])
    stored = ENCODER.parse_request(REQUEST)
    assert rebuilt.width == ENCODER.width
    assert np.array_equal(rebuilt.encode(stored), ENCODER.encode(stored))


def test_a_row_is_encoded_alike_alone_and_in_a_batch() -> None:
    batch = ENCODER.encode(ENCODER.parse_request(REQUEST))
    for index in range(3):
        alone = ENCODER.encode(ENCODER.parse_request({name: [values[index]] for name, values in REQUEST.items()}))
        assert np.array_equal(alone[0], batch[index])


def test_arrays_of_a_binary_request_are_read_like_lists() -> None:
    arrays = REQUEST | {"age": np.array([0, 20, 100], dtype=np.float32), "dose": np.array(REQUEST["dose"])}
    assert np.array_equal(ENCODER.encode(ENCODER.parse_request(arrays)), ENCODER.encode(ENCODER.parse_request(REQUEST)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"age": [0, 424242, 1]}, "column 'age', index 1: outside"),
        ({"age": [0, float("nan"), 1]}, "column 'age', index 1: outside"),
        ({"age": [0, 10**400, 1]}, "column 'age', index 1: outside"),
        ({"age": [0, 1, 2.5424242]}, "column 'age', index 2: not an integer"),
        ({"age": [0, 1, True]}, "column 'age', index 2: not a number"),
        ({"age": [0, 1, "424242"]}, "column 'age', index 2: not a number"),
        ({"age": [0, 1, None]}, "column 'age', index 2: not a number"),
        ({"age": np.zeros((3, 1))}, "column 'age' is not a list of numbers"),
        ({"dose": np.array([0.5, np.inf, 0.5])}, "column 'dose', index 1: outside"),
        ({"job": ["nurse", "s424242", "?"]}, "column 'job', index 1: not one of"),
        ({"job": ["nurse", 424242, "?"]}, "column 'job', index 1: not one of"),
        ({"job": [["nurse"], "?", "?"]}, "column 'job', index 0: not one of"),
        ({"job": ["nurse"]}, "differ in length"),
        ({"s424242": [1, 2, 3]}, "a column that the model does not take"),
    ],
)
def test_a_request_outside_the_public_domain_is_refused_without_its_value(change: dict[str, object], told: str) -> None:
    with pytest.raises(InputError) as refusal:
        ENCODER.parse_request(REQUEST | change)  # type: ignore[arg-type]  # wrong types are what is tested
    assert told in refusal.value.message
    assert "424242" not in f"{refusal.value.message}{refusal.value.hint}"


def test_a_missing_column_is_named() -> None:
    with pytest.raises(InputError, match="'dose' is missing"):
        ENCODER.parse_request({name: values for name, values in REQUEST.items() if name != "dose"})


def test_a_stored_column_of_another_schema_is_refused() -> None:
    stored = ENCODER.parse_request(REQUEST)
    for broken in ({"job": np.array([0, 3, 0])}, {"job": np.array([0, -1, 0])}, {"age": np.array([0, 101, 0])}):
        with pytest.raises(InputError, match="stored form"):
            ENCODER.encode(stored | broken)


def test_free_text_is_no_input() -> None:
    with pytest.raises(InputError, match="free text"):
        FeatureEncoder([Column.model_validate({"name": "note", "type": "text", "class": "restricted"})])
