"""Hostile files: each is refused, by its kind or by column and row, and no cell of it is ever shown."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import pickle
import sqlite3
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from cloister.client.source import open_source
from cloister.datasets import ingest
from cloister.datasets.ingest import read_blocks, read_table
from cloister.datasets.ingest.kinds import recognise
from cloister.datasets.ingest.limits import MAX_CELL_BYTES, MAX_DECODED_BYTES, MAX_ROW_BYTES
from cloister.datasets.ingest.lines import TEXT_RATIO_GRACE
from cloister.datasets.ingest.parquet_pages import read_groups
from cloister.datasets.ingest.thrift import Message
from cloister.datasets.inspect import draft, inspect
from cloister.datasets.schema import DatasetSchema
from cloister.errors import CloisterError, InputError
from mutations import FRUGAL

NEEDLE = "Zarathustra77"
SCHEMA_TEXT = """
name: people
purpose: research
region: eu
retention: P1Y
columns:
  - {name: age, type: integer, class: confidential, bounds: [0, 120]}
  - {name: dose, type: number, class: internal, bounds: [-10, 10]}
  - {name: job, type: category, class: internal, values: [nurse, clerk, "?"]}
  - {name: note, type: text, class: restricted}
"""
SCHEMA = DatasetSchema.from_yaml_text(SCHEMA_TEXT)
HEADER = b"age,dose,job,note\n"
GOOD = HEADER + f"41,0.5,nurse,{NEEDLE}\n7,-1e-3,?,x\n".encode()
TENSOR = DatasetSchema.from_yaml_text(
    SCHEMA_TEXT + "  - {name: image, type: tensor, class: internal, bounds: [0, 9], shape: [2, 2], dtype: float32}\n"
)


def shown_by(data: bytes, schema: DatasetSchema = SCHEMA) -> str:
    """What is said about a file that has to be refused. Nothing in the error or its causes holds the needle."""
    with pytest.raises(InputError) as refusal:
        for _ in read_blocks(io.BytesIO(data), schema, block_bytes=1 << 16):
            pass
    error: Any = refusal.value
    said = f"{error.message} | {error.hint}"
    while error is not None:
        assert NEEDLE not in f"{error!s}{error!r}{getattr(error, 'hint', '')}"
        error = error.__cause__ or error.__context__
    return said


def csv(*rows: str | bytes) -> bytes:
    return HEADER + b"".join((row if isinstance(row, bytes) else row.encode()) + b"\n" for row in rows)


def line(**cells: object) -> bytes:
    return json.dumps({"age": 1, "dose": 0.5, "job": "nurse", "note": NEEDLE} | cells).encode() + b"\n"


def table(**columns: Any) -> pa.Table:
    return pa.table({"age": [1, 2], "dose": [0.5, 1.0], "job": ["nurse", "?"], "note": [NEEDLE, "b"]} | columns)


def parquet(found: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(found, sink, **options)
    return sink.getvalue()


def arrow(found: pa.Table, compression: str | None = None, file: bool = True) -> bytes:
    sink = io.BytesIO()
    options = ipc.IpcWriteOptions(compression=compression)
    with (ipc.new_file if file else ipc.new_stream)(sink, found.schema, options=options) as writer:
        writer.write_table(found)
    return sink.getvalue()


def in_zip(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, GOOD)
    return sink.getvalue()


def in_tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("rows.csv")
        entry.size = len(GOOD)
        archive.addfile(entry, io.BytesIO(GOOD))
    return sink.getvalue()


def in_numpy(**options: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([NEEDLE], object), **options)
    return sink.getvalue()


def in_sqlite(folder: Path) -> bytes:
    with sqlite3.connect(folder / "rows.db") as database:
        database.execute("create table rows (note text)")
    return (folder / "rows.db").read_bytes()


def encrypted(plaintext_footer: bool) -> bytes:
    class Wrapper(pe.KmsClient):
        def wrap_key(self, key_bytes: bytes, _name: str) -> bytes:
            return key_bytes

        def unwrap_key(self, wrapped: bytes, _name: str) -> bytes:
            return wrapped

    factory = pe.CryptoFactory(lambda _: Wrapper())
    settings = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["age", "dose", "job", "note"]}, plaintext_footer=plaintext_footer
    )
    sink = io.BytesIO()
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(sink, table().schema, encryption_properties=properties) as writer:
        writer.write_table(table())
    return sink.getvalue()


TAIL = f"\n1,2,nurse,{NEEDLE}\n".encode() * 9
OTHER_KINDS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "zip": (lambda: in_zip("rows.csv"), "a zip archive"),
    "xlsx": (lambda: in_zip("xl/workbook.xml"), "a zip archive"),
    "torch": (lambda: in_zip("archive/data.pkl"), "a zip archive"),
    "tar": (in_tar, "a tar archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04" + TAIL, "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\0" + TAIL, "a rar archive"),
    "xz": (b"\xfd7zXZ\0\0\x04" + TAIL, "xz-compressed"),
    "bzip2": (b"BZh91AY&SY\xf9\0\0" + TAIL, "bzip2-compressed"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\0" + TAIL, "zstd-compressed"),
    "lz4": (b"\x04\x22\x4d\x18\x60\x40" + TAIL, "lz4-compressed"),
    "pickle 0": (lambda: pickle.dumps([NEEDLE, 1], 0), "a pickle"),
    "pickle 2": (lambda: pickle.dumps([NEEDLE, 1], 2), "a pickle"),
    "pickle 5": (lambda: pickle.dumps({NEEDLE: 1}, 5), "a pickle"),
    "pickle with code": (f"cposix\nsystem\n(S'echo {NEEDLE}'\ntR.".encode(), "a pickle"),
    "npy": (lambda: in_numpy(allow_pickle=True), "a NumPy array"),
    "ELF": (b"\x7fELF\x02\x01\x01" + TAIL, "a program (ELF)"),
    "PE": (b"MZ\x90\0\x03\0\0\0" + TAIL, "a program (PE)"),
    "Mach-O": (b"\xcf\xfa\xed\xfe\x07\0" + TAIL, "a program (Mach-O)"),
    "Mach-O for two processors": (b"\xca\xfe\xba\xbe\0\0\0\x02" + TAIL, "a program (Mach-O or Java)"),
    "script": (b"#!/bin/sh\necho " + TAIL, "a script"),
    "PDF": (b"%PDF-1.7\n" + TAIL, "a PDF document"),
    "old Office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + TAIL, "an old Office document"),
    "HTML": (b"\n <!DOCTYPE html><table>" + TAIL, "HTML or XML"),
    "XML": (b"<?xml version='1.0'?>" + TAIL, "HTML or XML"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), "NUL bytes"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + TAIL, "HDF5"),
    "Feather 1": (b"FEA1" + TAIL, "Feather version 1"),
    "encrypted Parquet": (lambda: encrypted(plaintext_footer=False), "encrypted Parquet"),
    "encrypted Parquet, footer in clear": (lambda: encrypted(plaintext_footer=True), "damaged or encrypted"),
    "JSON array": (b"[" + line() + b"]", "a JSON array"),
    "old Mac text": (GOOD.replace(b"\n", b"\r"), "bare carriage returns"),
    "gzip in gzip": (lambda: gzip.compress(gzip.compress(GOOD)), "something else than text"),
    "zip in gzip": (lambda: gzip.compress(in_zip("rows.csv")), "zip archive"),
    "tar in gzip": (lambda: gzip.compress(in_tar()), "tar archive"),
    "program in gzip": (lambda: gzip.compress(b"\x7fELF\x02" + TAIL), "a program"),
    "two gzip members": (lambda: gzip.compress(GOOD) + gzip.compress(GOOD[18:]), "after its first member"),
    "gzip and more": (lambda: gzip.compress(GOOD) + b"\x7fELF", "after its first member"),
    "gzip cut": (lambda: gzip.compress(GOOD)[:-4], "damaged"),
    "empty": (b"", "neither CSV"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_another_kind_of_file_behind_a_csv_name_is_refused_by_its_kind(name: str) -> None:
    data, told = OTHER_KINDS[name]
    said = shown_by(data if isinstance(data, bytes) else data())
    assert told in said


def test_a_database_is_no_table(tmp_path: Path) -> None:
    assert "SQLite" in shown_by(in_sqlite(tmp_path))


FULL_WIDTH = ["＝1+1", "＋SUM(A1)", "－A1", "＠SUM(A1)", "﹦1+1"]
FORMULAS = ["=1+1", "=cmd|' /C calc'!A0", "+SUM(A1)", "-A1", "@SUM(A1)", "\t=1", "\tx", "-2+3+cmd|'x'!A0", *FULL_WIDTH]
NO_FORMULAS = ["-", "?", "--", "-5", "+5 %", "+49 170 1234567", "-1.5e-3", "- 3/4", "a=b", "<50K", "=", "@"]

CELLS: dict[str, tuple[bytes, str]] = {
    "a wrong type": (csv(f"{NEEDLE},0,nurse,a"), "column 'age', row 1: not an integer"),
    "hexadecimal": (csv("1,0,nurse,a", "0x1F,0,nurse,a"), "column 'age', row 2: not an integer"),
    "a point in an integer": (csv("1.0,0,nurse,a"), "column 'age', row 1: not an integer"),
    "no number": (csv("1,nan,nurse,a"), "column 'dose', row 1: not a number"),
    "infinity": (csv("1,inf,nurse,a"), "column 'dose', row 1: not a number"),
    "a number beyond the largest": (csv("1,1e999,nurse,a"), "column 'dose', row 1: outside"),
    "out of bounds": (csv("1,0,?,a", "121,0,?,a"), "column 'age', row 2: outside"),
    "a wrapped integer": (csv("4294967297,0,?,a"), "column 'age', row 1: outside"),
    "an unknown category": (csv(f"1,0,{NEEDLE},a"), "column 'job', row 1: not one of"),
    "a category in other letters": (csv("1,0,NURSE,a"), "column 'job', row 1: not one of"),
    "a gap": (csv("1,0,?,a", ",0,?,a"), "column 'age', row 2: no value"),
    "a short row": (csv("1,0,?,a", f"1,0,{NEEDLE}"), "row 2: the number of fields"),
    "a long row": (csv("1,0,?,a", "", f"1,0,?,a,{NEEDLE}"), "row 2: the number of fields"),
    "a quote inside": (csv("1,0,?,a", f'1,0,?,a"{NEEDLE}"'), "row 2: a quote in the middle"),
    "more after a quote": (csv(f'1,0,?,"a"{NEEDLE}'), "row 1: a quote in the middle"),
    "a quote that stays open": (csv("1,0,?,a", f'1,0,?,"{NEEDLE}'), "row 2: a quote that stays open"),
    "a bare carriage return": (csv("1,0,?,a", f"1,0,?,{NEEDLE}\rx"), "row 2: a carriage return"),
    "not UTF-8": (csv("1,0,?,a", b"1,0,?,\xff" + NEEDLE.encode()), "column 'note', row 2: not UTF-8"),
    "an overlong encoding": (csv(b"1,0,?,\xc0\xaf" + NEEDLE.encode()), "column 'note', row 1: not UTF-8"),
    "a surrogate": (csv(b"1,0,?,\xed\xa0\x80" + NEEDLE.encode()), "column 'note', row 1: not UTF-8"),
    "not UTF-8 in a number": (csv(b"\xff,0,?,a"), "column 'age', row 1: not UTF-8"),
    "a late NUL": (csv(*["1,0,?,a"] * 20_000, f"1,0,?,\0{NEEDLE}"), "column 'note', row 20001: the cell has control"),
    "an escape sequence": (csv(f"1,0,?,\x1b[31m{NEEDLE}"), "column 'note', row 1: the cell has control"),
    "a C1 control": (csv(f"1,0,?,\x9b31m{NEEDLE}"), "column 'note', row 1: the cell has control"),
    "a control before a number": (csv("\x1f1,0,?,a"), "column 'age', row 1: the cell has control"),
    "an oversize cell": (csv("1,0,?,a", "1,0,?," + "a" * (MAX_CELL_BYTES + 1)), "column 'note', row 2: the cell is"),
    "an oversize number": (csv("1" * (MAX_CELL_BYTES + 1) + ",0,?,a"), "column 'age', row 1: the cell is larger"),
    "an endless line": (csv("1,0,?,a", "1,0,?," + "a" * (MAX_ROW_BYTES + (1 << 17))), "row 2: the row goes on"),
    "an endless header": (b"a" * (MAX_ROW_BYTES + (1 << 17)), "the header: the row goes on"),
    "two columns of one name": (GOOD.replace(b"note", b"note,note"), "occurs twice"),
    "an unknown column": (GOOD.replace(b"note", f"note,{NEEDLE}".encode()), "column 5 of the file"),
    "semicolons": (GOOD.replace(b",", b";"), "no comma"),
    "JSON: a key twice": (line() + line()[:-2] + b', "age": 2}\n', "row 2: a key occurs twice"),
    "JSON: an unknown key": (line(**{NEEDLE: 1}), "row 1: key 5 is not a column"),
    "JSON: a missing key": (b'{"age": 1}\n', "column 'dose', row 1: no such key"),
    "JSON: null": (line() + line(age=None), "column 'age', row 2: no value"),
    "JSON: a number as text": (line(age="41"), "column 'age', row 1: not an integer"),
    "JSON: a truth value": (line(age=True), "column 'age', row 1: not an integer"),
    "JSON: a number for text": (line(note=41), "column 'note', row 1: not a string"),
    "JSON: an object": (line(note={"a": NEEDLE}), "column 'note', row 1: not a string"),
    "JSON: half a surrogate pair": (line(note="\ud800" + NEEDLE), "column 'note', row 1: half of a surrogate"),
    "JSON: NUL": (line(note="\0" + NEEDLE), "column 'note', row 1: the cell has control"),
    "JSON: not a number": (line() + line(dose=float("nan")), "row 2: not a JSON object"),
    "JSON: far too deep": (line(note=0).replace(b"0}", b"[" * 200_000), "row 1: not a JSON object"),
    "JSON: far too many digits": (line(age=7).replace(b"7,", b"9" * 9_999 + b","), "row 1: not a JSON object"),
    "JSON: a wide integer": (line(age=10**30), "column 'age', row 1: outside"),
    "JSON: two on a line": (line().strip() + b" " + line(), "row 1: not a JSON object"),
    "JSON: not UTF-8": (line() + line().replace(b"Zara", b"\xff"), "row 2: not UTF-8"),
    "Parquet: not UTF-8": (
        parquet(pa.table(table(note=pa.array([b"a", b"\xff"]).cast(pa.binary())).set_column(
            3, "note", pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())))),
        "column 'note', row 2: bytes that are no UTF-8",
    ),
    "Parquet: a gap": (parquet(table(note=["a", None])), "column 'note', row 2: no value"),
    "Parquet: nested": (parquet(table(note=[{"a": NEEDLE}, {"a": "b"}])), "column 'note' holds no strings"),
    "Parquet: a list": (parquet(table(age=[[1], [2]])), "column 'age' has the wrong type"),
    "Parquet: a time": (parquet(table(age=[datetime.datetime(2026, 1, 1)] * 2)), "column 'age' has the wrong type"),
    "Parquet: cut": (parquet(table())[:-30], "damaged"),
    "Parquet: a lying footer": (parquet(table())[:-8] + b"\xff\xff\xff\x7fPAR1", "damaged"),
    "Arrow: out of bounds": (arrow(table(age=[1, 400])), "column 'age', row 2: outside"),
    "Arrow: cut": (arrow(table())[:-400], "damaged"),
    "Arrow: nested": (arrow(table(note=[{"a": NEEDLE}, {"a": "b"}])), "column 'note' holds no strings"),
    "Arrow: repeated runs": (
        arrow(table(age=pa.RunEndEncodedArray.from_arrays([2], [1]))), "column 'age' has the wrong type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_a_hostile_cell_is_refused_by_place_and_never_shown(name: str) -> None:
    data, told = CELLS[name]
    assert told in shown_by(data)


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_spreadsheet_formula_is_refused_in_every_format(formula: str) -> None:
    told = "column 'note', row 2: the cell is a spreadsheet formula"
    assert told in shown_by(csv("1,0,?,a", f'1,0,?,"{formula}"'))
    assert told in shown_by(line() + line(note=formula))
    assert told in shown_by(parquet(table(note=["a", formula])))
    assert told in shown_by(arrow(table(note=pa.array(["a", formula]).dictionary_encode())))
    identifier = DatasetSchema.from_yaml_text(SCHEMA_TEXT.replace("restricted}", "restricted, role: identifier}"))
    assert told in shown_by(line() + line(note=formula), identifier)
    if formula == formula.strip():
        declared = DatasetSchema.from_yaml_text(SCHEMA_TEXT.replace('"?"', json.dumps(formula)))
        assert "value 3 of the schema is a spreadsheet formula" in shown_by(GOOD, declared)


def test_what_only_begins_like_a_formula_is_read() -> None:
    found = read_table(b"".join(line(note=text) for text in NO_FORMULAS), SCHEMA)
    assert found["note"].to_pylist() == NO_FORMULAS


TENSORS: dict[str, tuple[Any, str]] = {
    "too short": ([[[1.0, 2], [3, 4]], [[1.0, 2], [3]]], "row 2: not of shape"),
    "flat and too long": ([[1.0, 2, 3, 4], [1.0, 2, 3, 4, 5]], "row 2: not of shape"),
    "too deep": ([[[[1.0]]], [[[1.0]]]], "row 1: not of shape"),
    "a gap inside": ([[[1.0, 2], [3, 4]], [[1.0, None], [3, 4]]], "row 2: a gap"),
    "no row": ([[1.0, 2, 3, 4], None], "row 2: no value"),
    "not finite": ([[1.0, 2, 3, 4], [1.0, 2, 3, float("nan")]], "row 2: an element outside"),
    "infinite": ([[1.0, 2, 3, 4], [1.0, 2, 3, float("inf")]], "row 2: an element outside"),
    "out of bounds": ([[1.0, 2, 3, 4], [1.0, 2, 3, 10]], "row 2: an element outside"),
    "too large for its dtype": ([[1.0, 2, 3, 4], [1.0, 2, 3, 1e300]], "row 2: an element outside"),
    "bytes of another size": ([b"a" * 16, b"a" * 15], "row 2: not 16 bytes"),
    "bytes that are no number": ([bytes(16), b"\xff" * 16], "row 2: an element outside"),
    "text": ([NEEDLE, NEEDLE], "has the wrong type"),
    "of another shape": (
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, 4, 1), np.float32)),
        "has the wrong type",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_has_exactly_its_shape_and_bounds(name: str) -> None:
    values, told = TENSORS[name]
    assert told in shown_by(parquet(table(image=values)), TENSOR)
    assert told in shown_by(arrow(table(image=values)), TENSOR)


def test_a_tensor_is_not_read_from_csv_or_from_odd_json() -> None:
    assert "which CSV cannot hold" in shown_by(GOOD, TENSOR)
    for odd in ([[1, 2], [3, True]], [[1, 2], [3, NEEDLE]], NEEDLE, {"a": 1}, [[1, 2], [3]], [[1, 2], 3]):
        assert "column 'image', row 2: " in shown_by(line(image=[[1, 2], [3, 4]]) + line(image=odd), TENSOR)


def test_a_list_that_hides_many_elements_is_refused_before_it_is_decoded() -> None:
    hidden = parquet(table(image=[[1.0] * 1_000_000, [1.0] * 4]))
    assert len(hidden) < 100_000
    assert "longer lists than its shape" in shown_by(hidden, TENSOR)


@pytest.mark.parametrize("bomb", [b"\x19\xf3\x80\xad\xe2\x04" + bytes(10_000_000), b"\x1c" * 100_000])
def test_a_footer_of_too_many_or_too_deep_values_is_refused(bomb: bytes) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        Message(bomb).struct()


@pytest.mark.parametrize(
    "text", ["city\nBerlin\n", "Length\n.5\n", "dose\n.5\n", "lp1\nx\n", "MZ\n5\n", "ORC,BZh\n1,2\n"]
)
def test_a_small_table_is_not_taken_for_another_kind(text: str) -> None:
    assert recognise(text.encode()) == "csv"


def test_only_a_regular_file_is_opened_and_nothing_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    (tmp_path / "terminal.csv").symlink_to("/dev/tty")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name in ("pipe.csv", "device.csv", "terminal.csv", "loop.csv", ".", "none.csv", "a\0b"):
        with pytest.raises(CloisterError):
            open_source(tmp_path / name)
    (tmp_path / "rows.csv").write_bytes(GOOD)
    (tmp_path / "link.csv").symlink_to("rows.csv")
    with open_source(tmp_path / "link.csv") as source:
        assert sum(block.num_rows for block in source.read_blocks(SCHEMA)) == 2
        assert source.position == source.size == len(GOOD)
        assert stat.S_ISREG(os.fstat(source.stream.fileno()).st_mode)


def page_bomb() -> bytes:
    """A page of 300 MiB zeros, in a few kilobytes."""
    zeros = pa.array(np.zeros(300 << 17, np.int64))
    found = pa.table({"age": zeros})
    return parquet(found, use_dictionary=False, compression="zstd", data_page_size=1 << 30,
                   max_rows_per_page=1 << 30, row_group_size=1 << 30)  # fmt: skip


def repeated_value(write: Callable[[pa.Table], bytes]) -> bytes:
    """A cell of 1 MiB that 20,000 rows point to."""
    rows = 20_000
    notes = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["a" * MAX_CELL_BYTES])
    jobs = pa.array(["nurse"] * rows)
    return write(pa.table({"age": [1] * rows, "dose": [0.5] * rows, "job": jobs, "note": notes}))


def lying_buffer() -> bytes:
    """A compressed Arrow buffer that says it inflates to a terabyte."""
    found = pa.table({"age": np.arange(10_000) % 100})
    data = arrow(found, "zstd")
    honest = struct.pack("<q", 80_000)
    assert data.count(honest) == 1
    return data.replace(honest, struct.pack("<q", 1 << 40))


def gzip_of(piece: bytes, times: int) -> bytes:
    compressor = zlib.compressobj(wbits=31)
    return b"".join([compressor.compress(HEADER), *(compressor.compress(piece) for _ in range(times))]) + (
        compressor.flush()
    )


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip that inflates": (lambda: gzip_of(b"1,0,?,a\n" * 131072, 80), "inflates more than 200 times"),
    "gzip of one endless line": (lambda: gzip_of(b"a" * (1 << 20), 60), "row 1: the row goes on"),
    "Parquet value repeated": (lambda: repeated_value(parquet), "inflates more than 1000 times"),
    "Parquet prefix repeated": (
        lambda: parquet(
            repeated_plain(), use_dictionary=False, column_encoding={"note": "DELTA_BYTE_ARRAY"}, compression="zstd"
        ), "inflates more than 1000 times",
    ),
    "Parquet categories": (lambda: repeated_category(), "column 'job', row 1: not one of"),
    "Parquet number repeated": (lambda: repeated_number(), "column 'age', row 1: not an integer"),
    "Arrow value repeated": (lambda: repeated_value(arrow), "inflates more than 1000 times"),
    "Arrow buffer that lies": (lying_buffer, "larger than 256 MiB"),
    "Arrow body that lies": (lambda: lying_body(), "larger than 256 MiB"),
}  # fmt: skip


def repeated_category() -> bytes:
    """Category cells of 1 MiB that differ in their last letters only, which a dictionary does not keep small."""
    rows = 450
    found = repeated_plain(rows).set_column(2, "job", [["a" * MAX_CELL_BYTES + str(at) for at in range(rows)]])
    encoding = {"job": "DELTA_BYTE_ARRAY"}
    return parquet(found.drop("note").append_column("note", [["x"] * rows]), use_dictionary=False,
                   column_encoding=encoding, compression="zstd")  # fmt: skip


def repeated_number() -> bytes:
    """An integer of a million digits, written once as text, that 20,000 rows point to."""
    rows = 20_000
    ages = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["1" * MAX_CELL_BYTES])
    return parquet(pa.table({"age": ages.cast(pa.dictionary(pa.int32(), pa.string())), "dose": [0.5] * rows,
                             "job": ["?"] * rows, "note": ["x"] * rows}), store_schema=False)  # fmt: skip


def repeated_plain(rows: int = 300) -> pa.Table:
    return pa.table(
        {"age": [1] * rows, "dose": [0.5] * rows, "job": ["?"] * rows, "note": ["a" * MAX_CELL_BYTES] * rows}
    )


def lying_body() -> bytes:
    data = arrow(pa.table({"age": np.arange(10_000) % 100}), file=False)
    honest = struct.pack("<q", 80_000)
    return data.replace(honest, struct.pack("<q", 1 << 40))


SOURCE_ROOT = os.environ | {"PYTHONPATH": str(Path(ingest.__file__).parents[3])}
LIMITED = """
import io, resource, sys
from cloister.datasets.ingest import read_blocks
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError
schema = DatasetSchema.from_yaml_text(sys.argv[2])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
try:
    with open(sys.argv[1], "rb") as file:
        for _ in read_blocks(file, schema):
            pass
except InputError as error:
    print(error.message)
    # Not ru_maxrss, which a child inherits.
    print(next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_bounded_memory(name: str, tmp_path: Path) -> None:
    make, told = BOMBS[name]
    (tmp_path / "bomb").write_bytes(make())
    columns = SCHEMA_TEXT if "lies" not in name else SCHEMA_TEXT.split("  - {name: dose")[0]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "bomb"), columns],
        capture_output=True, text=True, timeout=600, env=SOURCE_ROOT | FRUGAL,
    )  # fmt: skip
    said, peak = done.stdout.splitlines() or [done.stderr, "0"]
    assert told in said
    assert 0 < int(peak) < 500


def test_a_page_that_inflates_hugely_is_refused_before_it_is_decoded() -> None:
    bomb = page_bomb()
    assert len(bomb) < 1 << 20 < MAX_DECODED_BYTES
    with pytest.raises(InputError, match="pages inflate to more than 256 MiB"):
        read_groups(io.BytesIO(bomb), len(bomb))


def test_the_gzip_limit_leaves_room_for_repetitive_tables() -> None:
    found = gzip.compress(csv(*["1,0.5,nurse,the same note in every row"] * 20_000))
    assert len(found) * 200 < 20_000 * 40 < TEXT_RATIO_GRACE
    assert read_table(found, SCHEMA).num_rows == 20_000


MUTATE = """
import io, random, sys
import pyarrow as pa
from cloister.datasets import ingest
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError
ingest._UNFORESEEN = ()  # the safety net is not what is tested here
schema, seed = DatasetSchema.from_yaml_text(sys.argv[1]), random.Random(int(sys.argv[2]))
refused = 0
for path in sys.argv[3:]:
    whole = open(path, "rb").read()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(seed.choice([1, 1, 2, 5])):
            at, kind = seed.randrange(len(data)), seed.random()
            if kind < 0.6:
                data[at] ^= 1 << seed.randrange(8)
            elif kind < 0.8:
                data[at : at + 8] = seed.choice([b"\\xff" * 8, b"\\xff" * 7 + b"\\x7f", bytes(8)])
            else:
                del data[at : at + seed.randrange(1, 9)]
        try:
            ingest.read_table(bytes(data), schema)
        except InputError as error:
            assert "Zarathustra" not in f"{error}{error.hint}"
            refused += 1
print(refused)
"""


def test_a_damaged_binary_file_is_refused_and_never_a_crash(tmp_path: Path) -> None:
    """In a process of its own: Arrow and Parquet are native code."""
    found = pa.concat_tables([table(image=[[1.0, 2, 3, 4], [4.0, 3, 2, 1]])] * 30).combine_chunks()
    found = found.set_column(2, "job", found["job"].combine_chunks().dictionary_encode())
    plain = {"use_dictionary": False, "data_page_version": "2.0", "column_encoding": {"note": "DELTA_BYTE_ARRAY"}}
    sink = io.BytesIO()
    feather.write_feather(found, sink)
    files = (parquet(found, row_group_size=20), parquet(found, **plain), arrow(found), arrow(found, "zstd", file=False),
             sink.getvalue())  # fmt: skip
    for number, data in enumerate(files):
        (tmp_path / str(number)).write_bytes(data)
    columns = SCHEMA_TEXT + (
        "  - {name: image, type: tensor, class: internal, bounds: [0, 9], shape: [2, 2], dtype: float32}\n"
    )
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    seed = "4"  # fixed, so that a failure is one of the code; others were tried
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, columns, seed, *paths],
        capture_output=True,
        text=True,
        timeout=600,
        env=SOURCE_ROOT,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    assert int(done.stdout) > 1000


def test_an_error_of_a_library_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> Any:
        raise pa.ArrowInvalid(f"unexpected {NEEDLE}")

    monkeypatch.setattr(ingest, "csv_tables", fail)
    assert "the file is damaged" in shown_by(GOOD)


def test_inspection_shows_no_cell() -> None:
    """Neither of a good file, nor of one without a header, nor of one whose header holds a cell."""
    rows = [f"{at},0.5,{NEEDLE}{at},{NEEDLE} was here again today" for at in range(30)]
    for data in (
        csv(*rows),
        "\n".join(rows).encode(),
        csv(*rows).replace(b"job", f"{NEEDLE}1".encode()),
        b"".join(line(age=at) for at in range(30)),
        parquet(table(job=[NEEDLE, NEEDLE])),
        arrow(table(job=[NEEDLE, NEEDLE])),
    ):
        report = inspect(io.BytesIO(data))
        assert NEEDLE not in repr(report.to_dict()) + draft(report, "rows.csv")
