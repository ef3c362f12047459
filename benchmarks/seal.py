"""How fast does `cloister data seal` take a file, and how much memory does it need for a large one?

Each measurement is the whole command, in a process of its own, against an authority on this machine: start, read,
check every value, split, encrypt, write, register. MB are 10**6 bytes of the file. Beside it, in turn: pyarrow alone,
which streams the same file into plain Parquet and checks nothing.

    python benchmarks/seal.py [--quick] [--json]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from _report import Row, options, report, row

from command_line import CommandLine

GOAL_CSV_MB_PER_S = 60
GOAL_PARQUET_MB_PER_S = 150
GOAL_MEMORY_MB = 600
CSV_MB, OTHERS_MB, QUICK_MB = 4_000, 1_000, 250
ROUNDS = 3
SEED = 20261123
PIXELS = 3 * 32 * 32

SEALER = """
import atexit, re
def told():
    status = open("/proc/self/status").read()
    print("peak_kb", re.search(r"VmHWM:\\s+(\\d+)", status)[1], flush=True)
atexit.register(told)
from cloister.cli import main
raise SystemExit(main())
"""
CSV_PEER = """
import sys, pyarrow.csv, pyarrow.parquet
reader = pyarrow.csv.open_csv(sys.argv[1])
with pyarrow.parquet.ParquetWriter(sys.argv[2], reader.schema) as writer:
    for batch in reader:
        writer.write_batch(batch)
"""
PARQUET_PEER = """
import sys, pyarrow.parquet
file = pyarrow.parquet.ParquetFile(sys.argv[1])
with pyarrow.parquet.ParquetWriter(sys.argv[2], file.schema_arrow) as writer:
    for batch in file.iter_batches():
        writer.write_batch(batch)
"""


def schema(name: str, **more: dict[str, Any]) -> dict[str, Any]:
    """Six integers, six numbers, four categories in two classes; `more` columns by name."""
    classes = ("internal", "confidential")
    columns: list[dict[str, Any]] = []
    for k in range(6):
        columns.append({"name": f"i{k}", "type": "integer", "class": classes[k % 2], "bounds": [0, 1_000_000]})
        columns.append({"name": f"n{k}", "type": "number", "class": classes[k % 2], "bounds": [-10, 10]})
    for k in range(4):
        values = [f"value-{k}-{j}" for j in range(5 + k)]
        columns.append({"name": f"c{k}", "type": "category", "class": classes[k % 2], "values": values})
    columns += [{"name": each, **facts} for each, facts in more.items()]
    return {"name": name, "purpose": "benchmark", "region": "eu", "retention": "P1Y", "columns": columns}


TYPED = schema("typed")
PEOPLE = schema("people", person={"type": "text", "class": "confidential", "role": "identifier"}) | {
    "unit": {"column": "person", "max_rows": 10_000}
}
IMAGES = {
    "name": "images", "purpose": "benchmark", "region": "eu", "retention": "P1Y",
    "columns": [
        {"name": "image", "type": "tensor", "class": "confidential", "shape": [3, 32, 32], "dtype": "uint8",
         "bounds": [0, 255]},
        {"name": "label", "type": "category", "class": "confidential", "values": list("0123456789"), "role": "label"},
    ],
}  # fmt: skip


def rows(schema: dict[str, Any], count: int, seed: int) -> pa.Table:
    """Made-up rows that fit a schema."""
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for column in schema["columns"]:
        if column["type"] == "integer":
            columns[column["name"]] = random.integers(0, 1_000_000, count)
        elif column["type"] == "number":
            columns[column["name"]] = np.round(random.normal(size=count).clip(-9, 9), 6)
        elif column["type"] == "category":
            columns[column["name"]] = np.array(column["values"])[random.integers(0, len(column["values"]), count)]
        elif column["type"] == "text":
            columns[column["name"]] = np.char.add("P", random.integers(10**9, 2 * 10**9, count).astype(str))
        else:
            data = pa.py_buffer(random.bytes(count * PIXELS))
            columns[column["name"]] = pa.Array.from_buffers(pa.binary(PIXELS), count, [None, data])
    return pa.table(columns)


def write_csv(path: Path, schema: dict[str, Any], megabytes: int) -> None:
    """One part, over and over: what is measured does not look at rows twice."""
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(rows(schema, 200_000, SEED), sink)
    header, _, body = sink.getvalue().to_pybytes().replace(b'"', b"").partition(b"\n")
    with path.open("wb") as file:
        file.write(header + b"\n")
        while file.tell() < megabytes * 10**6:
            file.write(body)


def write_parquet(path: Path, schema: dict[str, Any], megabytes: int) -> None:
    """As pyarrow writes by default, in row groups of its own rows."""
    part = 10_000 if schema is IMAGES else 200_000
    with pq.ParquetWriter(path, rows(schema, 1, SEED).schema) as writer:
        for seed in range(SEED, SEED + 10_000):
            writer.write_table(rows(schema, part, seed))
            if path.stat().st_size >= megabytes * 10**6:
                return


Writer = Callable[[Path, dict[str, Any], int], None]
KINDS: tuple[tuple[str, str, Writer, dict[str, Any], str, int], ...] = (
    ("CSV, typed columns", "csv", write_csv, TYPED, CSV_PEER, GOAL_CSV_MB_PER_S),
    ("Parquet, typed columns", "parquet", write_parquet, TYPED, PARQUET_PEER, GOAL_PARQUET_MB_PER_S),
    ("Parquet, images", "parquet", write_parquet, IMAGES, PARQUET_PEER, 0),
    ("CSV with units of many rows", "csv", write_csv, PEOPLE, CSV_PEER, 0),
)


def measure(quick: bool) -> Iterator[Row]:
    memory = Path("/dev/shm")  # noqa: S108 - a disk's speed is not the question
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        line = CommandLine(Path(folder) / "home")
        line.up()
        try:
            for what, suffix, write, described, peer, goal in KINDS:
                file = Path(folder) / f"data.{suffix}"
                large = CSV_MB if what == KINDS[0][0] else OTHERS_MB
                write(file, described, QUICK_MB if quick else large)
                yield from compare(line, what, file, described, peer, goal, 1 if quick else ROUNDS)
                file.unlink()
        finally:
            line.run("down")


def compare(
    line: CommandLine, what: str, file: Path, described: dict[str, Any], peer: str, goal: int, rounds: int
) -> Iterator[Row]:
    megabytes = file.stat().st_size / 1e6
    (file.parent / "schema.yaml").write_text(yaml.safe_dump(described))
    sealed, peaks, work, plain, verified = [], [], [], [], []
    for _ in range(rounds):
        before = _processor_seconds()
        seconds, peak = seal(line, file)
        work.append((_processor_seconds() - before) / megabytes * 1e3)
        sealed.append(megabytes / seconds)
        peaks.append(peak)
        newest = max(int(each["dataset"].partition("@")[2]) for each in line.json("data", "list", who="olga")
                     if each["dataset"].startswith(described["name"] + "@"))  # fmt: skip
        start = time.perf_counter()
        shown = line.json("data", "verify", f"{described['name']}@{newest}", who="olga", timeout_s=600)
        verified.append(shown["bytes"] / 1e6 / (time.perf_counter() - start))
        for blob in line.blobs():  # memory is what this machine has least of
            blob.unlink()
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", peer, file, file.parent / "plain"], check=True, timeout=600)
        plain.append(megabytes / (time.perf_counter() - start))
        (file.parent / "plain").unlink()
    speed, beside = statistics.median(sealed), statistics.median(plain)
    size = f"{megabytes / 1e3:.2g} GB"
    yield row(f"{what}: sealed", speed, f"MB/s, {size}", f">= {goal}" if goal else "", speed >= goal if goal else None)
    yield row(f"{what}: processor time", statistics.median(work), "s/GB")
    yield row(f"{what}: peak memory", max(peaks), f"MB, {size}", f"<= {GOAL_MEMORY_MB}", max(peaks) <= GOAL_MEMORY_MB)
    yield row(f"{what}: plain Parquet by pyarrow, nothing checked", beside, "MB/s")
    yield row(f"{what}: sealed, relative to that", speed / beside, "ratio")
    yield row(f"{what}: verified", statistics.median(verified), "MB/s of sealed bytes")


def _processor_seconds() -> float:
    """Of all processes that were waited for: it says what is needed where other work takes its share of the cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seal(line: CommandLine, file: Path) -> tuple[float, float]:
    """Seconds that the command took, and its peak memory in MB.

    The peak is the process's own (VmHWM): that of `getrusage` would begin with the memory of whoever started it.
    """
    environment = os.environ | {"CLOISTER_HOME": str(line.home), "CLOISTER_AS": "olga"}
    command = [sys.executable, "-c", SEALER, "data", "seal", file, "--schema", file.parent / "schema.yaml"]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"sealing failed: {done.stderr}")
    return seconds, int(done.stdout.rsplit("peak_kb", 1)[1]) * 1024 / 1e6


def main() -> None:
    arguments = options(__doc__, f"{QUICK_MB} MB of each kind, once, within 60 s").parse_args()
    report("seal", arguments, lambda: list(measure(arguments.quick)))


if __name__ == "__main__":
    main()
