"""Inputs are a function of the public columns alone, equal in training and serving."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cloister.datasets.encoding import FeatureEncoder, stored_array
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


IMAGE = Column.model_validate(
    {"name": "image", "type": "tensor", "class": "internal", "shape": [2, 3], "dtype": "uint8", "bounds": [0, 255]}
)
EMBEDDING = Column.model_validate(
    {
        "name": "embedding",
        "type": "tensor",
        "class": "internal",
        "shape": [4],
        "dtype": "float32",
        "bounds": [-0.1, 0.1],
    }
)
TENSORS = FeatureEncoder([IMAGE, AGE, EMBEDDING])
PIXELS = np.arange(0, 240, 20).reshape(2, 2, 3)
TENSOR_REQUEST = {"image": PIXELS, "age": [0, 20], "embedding": np.array([[-0.1, 0.0, 0.05, 0.1]] * 2)}


def sealed_form(array: np.ndarray, rows_per_chunk: int = 1000) -> pa.ChunkedArray:
    size = array[0].nbytes
    rows = [array[i].tobytes() for i in range(len(array))]
    chunks = [pa.array(rows[i : i + rows_per_chunk], pa.binary(size)) for i in range(0, len(rows), rows_per_chunk)]
    return pa.chunked_array(chunks, pa.binary(size))


def test_tensors_become_inputs_between_0_and_1_in_c_order() -> None:
    inputs = TENSORS.encode(TENSORS.parse_request(TENSOR_REQUEST))
    assert inputs.shape == (2, TENSORS.width) == (2, 6 + 4 + 4)
    np.testing.assert_allclose(inputs[:, :6], PIXELS.reshape(2, 6) / 255, atol=1e-7)
    np.testing.assert_allclose(inputs[:, 10:], [[0.0, 0.5, 0.75, 1.0]] * 2, atol=1e-6)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 1000])
def test_sealed_tensors_are_read_as_they_were_sent(rows_per_chunk: int) -> None:
    parsed = TENSORS.parse_request(TENSOR_REQUEST)
    stored = {
        "image": stored_array(sealed_form(PIXELS.astype("u1"), rows_per_chunk), IMAGE),
        "age": stored_array(pa.chunked_array([pa.array([0, 20], pa.int32())]), AGE),
        "embedding": stored_array(sealed_form(parsed["embedding"].astype("<f4"), rows_per_chunk), EMBEDDING),
    }
    assert np.array_equal(TENSORS.encode(stored), TENSORS.encode(parsed))


def test_a_slice_of_sealed_tensors_is_its_rows_and_none_are_none() -> None:
    whole = sealed_form(PIXELS.astype("u1"))
    assert np.array_equal(stored_array(whole.slice(1), IMAGE), PIXELS.astype("u1").reshape(2, 6)[1:])
    assert stored_array(whole.slice(2), IMAGE).shape == (0, 6)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "float16", "float32", "float64"])
def test_every_type_of_tensor_is_scaled_by_its_bounds(dtype: str) -> None:
    column = Column.model_validate(
        {"name": "t", "type": "tensor", "class": "internal", "shape": [3], "dtype": dtype, "bounds": [1, 101]}
    )
    encoder = FeatureEncoder([column])
    parsed = encoder.parse_request({"t": [[1, 51, 101]]})
    assert parsed["t"].dtype == dtype
    np.testing.assert_allclose(encoder.encode(parsed), [[0.0, 0.5, 1.0]], atol=1e-6)


def test_large_offsets_lose_no_precision() -> None:
    column = Column.model_validate(
        {"name": "t", "type": "tensor", "class": "internal", "shape": [1], "dtype": "int32",
         "bounds": [2_000_000_000, 2_000_000_010]}
    )  # fmt: skip
    encoder = FeatureEncoder([column])
    np.testing.assert_allclose(encoder.encode(encoder.parse_request({"t": [[2_000_000_003]]})), [[0.3]], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": PIXELS.reshape(2, 6)[:, :5]}, "column 'image' is not a tensor"),
        ({"image": PIXELS.reshape(2, 3, 2)}, "column 'image' is not a tensor"),
        ({"image": PIXELS.reshape(12)}, "column 'image' is not a tensor"),
        ({"image": [[1] * 6, [1] * 5]}, "column 'image' is not a tensor"),
        ({"image": [["424242"] * 6] * 2}, "column 'image' is not a tensor"),
        ({"image": [[True] * 6] * 2}, "column 'image' is not a tensor"),
        ({"image": [[None] * 6] * 2}, "column 'image' is not a tensor"),
        ({"image": [[0] * 6, [0] * 5 + [256]]}, "column 'image', index 1: an element outside"),
        ({"image": [[0] * 6, [0] * 5 + [-1]]}, "column 'image', index 1: an element outside"),
        ({"image": [[0] * 6, [0] * 5 + [1.5]]}, "column 'image', index 1: not integers"),
        ({"embedding": [[0] * 4, [0, 0, 0, float("nan")]]}, "column 'embedding', index 1: an element outside"),
        ({"embedding": [[0, 0, 0, 1e300], [0] * 4]}, "column 'embedding', index 0: an element outside"),
        ({"embedding": [[0, 0, 0, 0.1001], [0] * 4]}, "column 'embedding', index 0: an element outside"),
        ({"image": PIXELS[:1]}, "differ in length"),
    ],
)
def test_a_tensor_outside_its_public_domain_is_refused_without_its_value(change: dict[str, object], told: str) -> None:
    with pytest.raises(InputError) as refusal:
        TENSORS.parse_request(TENSOR_REQUEST | change)  # type: ignore[arg-type]  # wrong types are what is tested
    assert told in refusal.value.message
    assert "424242" not in f"{refusal.value.message}{refusal.value.hint}"


def test_a_stored_tensor_of_another_schema_is_refused() -> None:
    stored = TENSORS.parse_request(TENSOR_REQUEST)
    narrow = Column.model_validate(IMAGE.model_dump(mode="json", by_alias=True) | {"bounds": [0, 100]})
    with pytest.raises(InputError, match="stored form"):
        FeatureEncoder([narrow]).encode(stored)
    for broken in (stored["image"][:, :5], stored["image"].astype("i4"), stored["image"].reshape(2, 2, 3)):
        with pytest.raises(InputError, match="stored form"):
            TENSORS.encode(stored | {"image": broken})
    for kind in (pa.array([b"12345"], pa.binary(5)), pa.array([b"123456"], pa.binary()), pa.array([1])):
        with pytest.raises(InputError, match="stored form"):
            stored_array(pa.chunked_array([kind]), IMAGE)
