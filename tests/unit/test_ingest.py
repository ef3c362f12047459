"""A file that does not fit its schema is refused by column and row, never by value; partitions lose no row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.datasets.ingest import read_blocks, read_table
from cloister.datasets.ingest.columns import is_formula
from cloister.datasets.partition import Numbering, partition
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


PACKED = gzip.compress(GOOD, mtime=0)  # without the time, or each worker would name the test otherwise


@pytest.mark.parametrize("data", [GOOD, PACKED, GOOD.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + GOOD])
def test_csv_becomes_compact_columns_in_schema_order(data: bytes) -> None:
    table = read_table(data, SCHEMA)
    assert table.schema == pa.schema(
        [("age", pa.int32()), ("dose", pa.float32()), ("job", pa.int16()), ("note", pa.string())]
    )
    assert table["age"].to_pylist() == [41, 7, 0]
    assert table["job"].to_pylist() == [0, 2, 1]


def test_parquet_gives_the_same_table_as_csv() -> None:
    expected = read_table(b"age,dose,job,note\n1,0.5,nurse,a\n2,1.0,clerk,b\n", SCHEMA)
    assert read_table(parquet(), SCHEMA).equals(expected)
    assert read_table(parquet(job=pa.array(["nurse", "clerk"]).dictionary_encode()), SCHEMA).equals(expected)


SECRET = "424242"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (GOOD.replace(b"41", b"424242"), "column 'age', row 1: outside"),
        (GOOD.replace(b" 7 ", b"-424242"), "column 'age', row 2: outside"),
        (GOOD.replace(b" 7 ", b"x424242"), "column 'age', row 2: not an integer"),
        (GOOD.replace(b" 7 ", b"7.5424242"), "column 'age', row 2: not an integer"),
        (GOOD.replace(b" 7 ", b"9" * 30 + b"424242"), "column 'age', row 2: not an integer"),
        (GOOD.replace(b" 7 ", b""), "column 'age', row 2: no value"),
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
        (PACKED[:-9], "gzip file is damaged"),
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


def test_adult_is_read_in_seconds_and_is_what_was_published() -> None:
    schema = DatasetSchema.from_yaml_text((ADULT / "schema.yaml").read_text())
    data = (ADULT / "adult.csv.gz").read_bytes()
    assert data[4:8] == bytes(4), "a gzip time stamp makes the file differ from build to build"
    start = time.process_time()
    table = read_table(data, schema)
    assert time.process_time() - start < 10.0, "processor time, usually 0.3 s"
    assert table.num_rows == 32561
    assert table["income-per-year"].to_numpy().sum() == 7841


def test_partitions_lose_no_row_and_mix_no_class() -> None:
    rows = 103
    text = "age,dose,job,note\n" + "".join(f"{i},0,nurse,n{i}\n" for i in range(rows))
    table = read_table(text.encode(), SCHEMA)
    permutation = np.random.default_rng(1).permutation(rows)
    parts = list(partition(table, None, SCHEMA, 3, 0.2, permutation, Numbering()))
    assert {(part.shard, part.role) for part in parts} == {
        ("train-000", "train"), ("train-001", "train"), ("train-002", "train"), ("holdout-000", "holdout"),
    }  # fmt: skip
    assert {part.part: part.table.column_names for part in parts} == {
        "internal": ["dose", "job"], "confidential": ["age"], "restricted": ["note"],
    }  # fmt: skip
    ages = {part.shard: part.table["age"].to_pylist() for part in parts if part.part == "confidential"}
    notes = {part.shard: part.table["note"].to_pylist() for part in parts if part.part == "restricted"}
    assert {shard: [f"n{age}" for age in ages[shard]] for shard in ages} == notes, "classes must stay row-aligned"
    assert sorted(age for shard in ages.values() for age in shard) == list(range(rows))
    assert ages["holdout-000"] == permutation[:21].tolist()


def test_a_permutation_that_repeats_a_row_is_refused() -> None:
    table = read_table(GOOD, SCHEMA)
    with pytest.raises(ValueError, match="every row once"):
        list(partition(table, None, SCHEMA, 1, 0.0, np.array([0, 1, 1]), Numbering()))
    with pytest.raises(InputError, match="too few rows"):
        list(partition(table, None, SCHEMA, 4, 0.0, np.arange(3), Numbering()))


TENSOR_SCHEMA = DatasetSchema.from_yaml_text("""
name: scans
purpose: research
region: eu
retention: P1Y
columns:
  - {name: image, type: tensor, class: internal, bounds: [0, 200], shape: [2, 3], dtype: uint8}
  - {name: vector, type: tensor, class: internal, bounds: [-1, 1], shape: [3], dtype: float32}
""")


def test_tensors_are_read_alike_from_bytes_and_lists() -> None:
    images = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    vectors = np.array([[0.1, -1, 1], [0, 0.5, 0.25]], np.float32)
    as_bytes = {"image": pa.array([each.tobytes() for each in images], pa.binary(6)),
                "vector": pa.array([each.tobytes() for each in vectors], pa.binary(12))}  # fmt: skip
    as_lists = {"image": images.tolist(), "vector": vectors.tolist()}
    fixed = {"image": pa.array([each.ravel().tolist() for each in images], pa.list_(pa.uint8(), 6)),
             "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)}  # fmt: skip
    large = {"image": pa.array([each.tobytes() for each in images], pa.large_binary()),
             "vector": pa.array(vectors.tolist(), pa.large_list(pa.float64()))}  # fmt: skip
    expected = pa.table(as_bytes)
    for columns in (as_bytes, as_lists, fixed, large):
        for data in (_parquet(pa.table(columns)), _arrow(pa.table(columns), file=False)):
            assert read_table(data, TENSOR_SCHEMA).equals(expected)
    lines = "".join(json.dumps({"image": image, "vector": vector}) + "\n" for image, vector in
                    zip(images.tolist(), vectors.tolist(), strict=True))  # fmt: skip
    assert read_table(lines.encode(), TENSOR_SCHEMA).equals(expected)


def test_identifiers_may_be_integers_and_are_never_empty() -> None:
    schema = DatasetSchema.from_yaml_text("""
name: people
purpose: research
region: eu
retention: P1Y
columns:
  - {name: id, type: text, class: restricted, role: identifier}
  - {name: ok, type: category, class: internal, values: ["true", "false"]}
""")
    expected = pa.table({"id": ["7", "8"], "ok": pa.array([0, 1], pa.int16())})
    found = pa.table({"id": [7, 8], "ok": [True, False]})
    for data in (
        b"id,ok\n7,true\n 8,false\n",
        b'{"id":7,"ok":true}\n{"id":8,"ok":false}\n',
        _parquet(found),
        _arrow(found),
    ):
        assert read_table(data, schema).equals(expected)
    with pytest.raises(InputError, match="column 'id', row 2: no value"):
        read_table(b"id,ok\n7,true\n,false\n", schema)


def _parquet(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _arrow(table: pa.Table, compression: str | None = None, *, file: bool = True) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def _csv(rows: list[dict[str, object]], quoting: int) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(rows[0]), quoting=quoting, lineterminator="\r\n" if quoting else "\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",\n\t;'), max_size=30).filter(
    lambda text: pc.utf8_trim_whitespace(pa.scalar(text)).as_py() == text and not is_formula(text)
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "note": TEXTS,
            "dose": st.floats(0, 1.5, width=32),
            "job": st.sampled_from(["nurse", "clerk", "?"]),
            "age": st.integers(0, 120),
        }
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, block_bytes=st.sampled_from([1, 7, 64, 1 << 20]))
def test_a_valid_table_is_the_same_from_every_format(rows: list[dict[str, object]], block_bytes: int) -> None:
    table = pa.Table.from_pylist(rows)
    codes = [["nurse", "clerk", "?"].index(str(row["job"])) for row in rows]
    expected = pa.table(
        {
            "age": pa.array([row["age"] for row in rows], pa.int32()),
            "dose": pa.array([row["dose"] for row in rows], pa.float32()),
            "job": pa.array(codes, pa.int16()),
            "note": pa.array([row["note"] for row in rows], pa.string()),
        }
    )
    json_lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    encoded = table.set_column(table.column_names.index("note"), "note", table["note"].dictionary_encode())
    delta = {"use_dictionary": False, "column_encoding": {"note": "DELTA_BYTE_ARRAY", "job": "DELTA_LENGTH_BYTE_ARRAY"},
             "data_page_version": "2.0"}  # fmt: skip
    files = (
        _csv(rows, csv.QUOTE_MINIMAL), _csv(rows, csv.QUOTE_ALL), gzip.compress(_csv(rows, csv.QUOTE_MINIMAL)),
        json_lines, json_lines.rstrip(), gzip.compress(json_lines),
        _parquet(table, row_group_size=3), _parquet(encoded, compression="zstd"), _parquet(table, **delta),
        _arrow(table), _arrow(encoded, "lz4"), _arrow(table, "zstd", file=False),
    )  # fmt: skip
    for data in files:
        blocks = list(read_blocks(io.BytesIO(data), SCHEMA, block_bytes=block_bytes))
        assert pa.concat_tables(blocks).equals(expected)


def test_rows_are_counted_over_the_whole_file_whatever_the_blocks() -> None:
    rows = [{"age": 1, "dose": 0.5, "job": "nurse", "note": f'"{at}",\n'.strip()} for at in range(500)]
    rows[432]["age"] = 121
    table = pa.Table.from_pylist(rows)
    json_lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for data in (_csv(rows, csv.QUOTE_ALL), json_lines, _parquet(table, row_group_size=100), _arrow(table)):
        for block_bytes in (50, 3000, 1 << 20):
            done: list[int] = []
            with pytest.raises(InputError, match="column 'age', row 433: outside"):
                for _ in read_blocks(io.BytesIO(data), SCHEMA, block_bytes=block_bytes, advance=done.append):
                    pass
            assert done == sorted(done)
            assert not done or done[-1] <= len(data)
