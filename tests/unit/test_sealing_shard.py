from __future__ import annotations

import datetime

import pyarrow as pa
import pytest

from cloister.errors import InputError, IntegrityError
from cloister.sealing import shard
from cloister.sealing.envelope import new_key

AAD = shard.shard_aad("adult", 1, "confidential", "0000", "eu")
TABLE = pa.table(
    {
        "age": pa.array([39, 50, None], pa.int32()),
        "income": ["<=50K", ">50K", "<=50K"],
        "pixels": pa.array([b"abcd", b"efgh", b"ijkl"], pa.binary(4)),
        "born": pa.array([datetime.date(1980, 1, 2), None, datetime.date(1999, 12, 31)]),
        "weight.kg": [70.5, 80.25, 1e-300],
    }
)


def test_a_table_comes_back_with_its_types() -> None:
    key = new_key()
    sealed = shard.seal_table(TABLE, key, AAD)
    assert shard.open_table(sealed, key, AAD).equals(TABLE)
    assert shard.open_table(pa.py_buffer(sealed), key, AAD).schema == TABLE.schema


def test_only_the_columns_that_were_asked_for_are_read() -> None:
    key = new_key()
    sealed = shard.seal_table(TABLE, key, AAD)
    assert shard.open_table(sealed, key, AAD, ["income", "age"]).column_names == ["income", "age"]
    with pytest.raises(InputError):
        shard.open_table(sealed, key, AAD, ["age", "salary"])


def test_an_empty_table_comes_back() -> None:
    key = new_key()
    assert shard.open_table(shard.seal_table(TABLE.slice(0, 0), key, AAD), key, AAD).num_rows == 0


def test_neither_values_nor_column_names_nor_the_prefix_are_in_the_file() -> None:
    values = ["more than fifty thousand", "at most fifty thousand"]  # long: short ones turn up in noise
    table = TABLE.set_column(1, "income", [[*values, values[0]]])
    sealed = shard.seal_table(table, new_key(), AAD)
    for text in (*(value.encode() for value in values), b"income", b"weight.kg", b"ARROW:schema", AAD):
        assert text not in sealed


@pytest.mark.parametrize(
    "other",
    [
        ("adult2", 1, "confidential", "0000", "eu"), ("adult", 2, "confidential", "0000", "eu"),
        ("adult", 1, "restricted", "0000", "eu"), ("adult", 1, "confidential", "0001", "eu"),
        ("adult", 1, "confidential", "0000", "us"),
    ],
)  # fmt: skip
def test_the_prefix_names_the_shard(other: tuple[str, int, str, str, str]) -> None:
    sealed = shard.seal_table(TABLE, bytes(32), AAD)
    with pytest.raises(IntegrityError):
        shard.open_table(sealed, bytes(32), shard.shard_aad(*other))
    # Names cannot run into each other.
    assert shard.shard_aad("a", 1, "bc", "d", "e") != shard.shard_aad("a", 1, "b", "cd", "e")


@pytest.mark.parametrize(
    "bad",
    [("", 1, "c", "s", "r"), ("d", 0, "c", "s", "r"), ("d", 1, "", "s", "r"), ("d", 1, "c", "", "r"),
     ("d", 1, "c", "s", "")],
)  # fmt: skip
def test_an_incomplete_prefix_is_refused(bad: tuple[str, int, str, str, str]) -> None:
    with pytest.raises(InputError):
        shard.shard_aad(*bad)


def test_rows_that_are_wider_than_a_page_come_back() -> None:
    row = pa.binary(600_000)
    table = pa.table({"tensor": pa.array([bytes([n]) * 600_000 for n in range(5)], row), "gap": [1, None, 3, None, 5]})
    assert shard.open_table(shard.seal_table(table, bytes(32), AAD), bytes(32), AAD).equals(table)


@pytest.mark.parametrize(("key", "aad"), [(bytes(16), AAD), (b"", AAD), (bytes(32), b"")])
def test_a_short_key_or_an_empty_prefix_is_refused(key: bytes, aad: bytes) -> None:
    with pytest.raises(InputError):
        shard.seal_table(TABLE, key, aad)
    with pytest.raises(InputError):
        shard.open_table(shard.seal_table(TABLE, bytes(32), AAD), key, aad)


def test_an_error_holds_no_value() -> None:
    sealed = bytearray(shard.seal_table(TABLE, bytes(32), AAD))
    sealed[20] ^= 1
    with pytest.raises(IntegrityError) as caught:
        shard.open_table(bytes(sealed), bytes(32), AAD)
    assert "50K" not in str(caught.value.to_dict())
    assert caught.value.__cause__ is None
