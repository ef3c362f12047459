"""A file that does not fit its schema is refused by column and row, never by value; partitions lose no row."""

from __future__ import annotations

import gzip
import io
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloister.datasets.ingest import read_table
from cloister.datasets.partition import partition
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError

ADULT = Path(__file__).parents[2] / "jobs" / "examples" / "adult"
SCHEMA = DatasetSchema.from_yaml_text("""
name: people
purpose: research
region: eu
retention: P1Y
columns:
  - {name: age, type: integer, class: confidential, bounds: [0, 120]}
  - {name: dose, type: number, class: internal, bounds: [0, 1.5]}
  - {name: job, type: category, class: internal, values: [nurse, clerk, "?"]}
  - {name: note, type: text, class: restricted}
""")
GOOD = b"job,age,dose,note\nnurse,41,0.5,hello\n ? , 7 ,1e-3,x\nclerk,0,1.5,\n"


def parquet(**columns: object) -> bytes:
    body = {"age": [1, 2], "dose": [0.5, 1.0], "job": ["nurse", "clerk"], "note": ["a", "b"]} | columns
    sink = io.BytesIO()
    pq.write_table(pa.table(body), sink)
    return sink.getvalue()


@pytest.mark.parametrize("data", [GOOD, gzip.compress(GOOD), GOOD.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + GOOD])
def test_csv_becomes_compact_columns_in_schema_order(data: bytes) -> None:
    table = read_table(data, SCHEMA)
    assert table.schema == pa.schema(
        [("age", pa.int32()), ("dose", pa.float32()), ("job", pa.int16()), ("note", pa.string())]
    )
    assert table["age"].to_pylist() == [41, 7, 0]
    assert table["job"].to_pylist() == [0, 2, 1]


def test_parquet_gives_the_same_table_as_csv() -> None:
    csv = read_table(b"age,dose,job,note\n1,0.5,nurse,a\n2,1.0,clerk,b\n", SCHEMA)
    assert read_table(parquet(), SCHEMA).equals(csv)
    assert read_table(parquet(job=pa.array(["nurse", "clerk"]).dictionary_encode()), SCHEMA).equals(csv)


SECRET = "424242"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (GOOD.replace(b"41", b"424242"), "column 'age', row 1: outside"),
        (GOOD.replace(b" 7 ", b"-424242"), "column 'age', row 2: outside"),
        (GOOD.replace(b" 7 ", b"x424242"), "column 'age', row 2: not an integer"),
        (GOOD.replace(b" 7 ", b"7.5424242"), "column 'age', row 2: not an integer"),
        (GOOD.replace(b" 7 ", b"9" * 30 + b"424242"), "column 'age', row 2: not an integer"),
        (GOOD.replace(b" 7 ", b""), "column 'age', row 2: not an integer"),
        (GOOD.replace(b"1.5", b"nan"), "column 'dose', row 3: not a number"),
        (GOOD.replace(b"1.5", b"4e242"), "column 'dose', row 3: outside"),
        (GOOD.replace(b"clerk", b"s424242"), "column 'job', row 3: not one of"),
        (GOOD.replace(b"0.5,hello", b"0.5,424242,x,y"), "row 1: the number of fields"),
        (GOOD.replace(b"hello", b"\xff\xfe424242"), "not UTF-8 text"),
        (GOOD.replace(b"job,", b"j0b,"), "column 'job' is missing"),
        (GOOD.replace(b"\n", b",424242\n"), "column 5 of the file is not in the schema"),
        (GOOD.replace(b"note", b"age"), "column 'note' is missing"),
        (GOOD.replace(b"\n", b",x\n").replace(b"note,x", b"note,age"), "occurs twice"),
        (GOOD.split(b"\n")[0] + b"\n", "no data row"),
        (b"", "neither CSV"),
        (gzip.compress(GOOD)[:-9], "gzip file is damaged"),
        (parquet()[:-9], "Parquet file is damaged"),
        (parquet(age=[424242, 1]), "column 'age', row 1: outside"),
        (parquet(age=[1, None]), "column 'age', row 2: no value"),
        (parquet(age=["1", "x424242"]), "column 'age', row 2: not an integer"),
        (parquet(age=[1.0, 424242.0]), "column 'age' has the wrong type"),
        (parquet(dose=[0.1, float("nan")]), "column 'dose', row 2: outside"),
        (parquet(dose=[0.1, float("inf")]), "column 'dose', row 2: outside"),
        (parquet(job=[424242, 1]), "column 'job' holds no strings"),
        (parquet(job=["nurse", None]), "column 'job', row 2: no value"),
    ],
)
def test_a_misfit_is_refused_by_place_and_never_by_value(data: bytes, told: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_table(data, SCHEMA)
    error = refusal.value
    assert told in error.message
    # Neither the message nor the chain of causes, which a traceback would print, shows data.
    while error is not None:
        assert SECRET not in f"{error}{getattr(error, 'hint', '')}"
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # the chain holds any exception


def test_a_misspelt_column_is_found_by_place_and_closest_name() -> None:
    with pytest.raises(InputError) as missing:
        read_table(GOOD.replace(b"dose", b"does"), SCHEMA)
    assert missing.value.hint == "is it column 3 of the file?"
    with pytest.raises(InputError) as unknown:
        read_table(GOOD.replace(b"\n", b",x\n").replace(b"note,x", b"note,ages"), SCHEMA)
    assert "'age'" in unknown.value.hint


def test_adult_is_read_in_under_a_second_and_is_what_was_published() -> None:
    schema = DatasetSchema.from_yaml_text((ADULT / "schema.yaml").read_text())
    data = (ADULT / "adult.csv.gz").read_bytes()
    assert data[4:8] == bytes(4), "a gzip time stamp makes the file differ from build to build"
    start = time.perf_counter()
    table = read_table(data, schema)
    assert time.perf_counter() - start < 3.0, "usually 0.2 s; slow machines are forgiven"
    assert table.num_rows == 32561
    assert table["income-per-year"].to_numpy().sum() == 7841


def test_partitions_lose_no_row_and_mix_no_class() -> None:
    rows = 103
    csv = "age,dose,job,note\n" + "".join(f"{i},0,nurse,n{i}\n" for i in range(rows))
    table = read_table(csv.encode(), SCHEMA)
    permutation = np.random.default_rng(1).permutation(rows)
    parts = partition(table, SCHEMA, 3, 0.2, permutation)
    assert {(part.shard, part.role) for part in parts} == {
        ("train-000", "train"), ("train-001", "train"), ("train-002", "train"), ("holdout", "holdout"),
    }  # fmt: skip
    assert {part.cls: part.table.column_names for part in parts} == {
        "internal": ["dose", "job"], "confidential": ["age"], "restricted": ["note"],
    }  # fmt: skip
    ages = {part.shard: part.table["age"].to_pylist() for part in parts if part.cls == "confidential"}
    notes = {part.shard: part.table["note"].to_pylist() for part in parts if part.cls == "restricted"}
    assert {shard: [f"n{age}" for age in ages[shard]] for shard in ages} == notes, "classes must stay row-aligned"
    assert sorted(age for shard in ages.values() for age in shard) == list(range(rows))
    assert len(ages["holdout"]) == 21
    assert ages["holdout"] == permutation[:21].tolist()


def test_a_permutation_that_repeats_a_row_is_refused() -> None:
    table = read_table(GOOD, SCHEMA)
    with pytest.raises(ValueError, match="every row once"):
        partition(table, SCHEMA, 1, 0.0, np.array([0, 1, 1]))
    with pytest.raises(InputError, match="too few rows"):
        partition(table, SCHEMA, 4, 0.0, np.arange(3))
