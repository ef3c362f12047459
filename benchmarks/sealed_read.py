"""How much slower is it to read sealed tables than plain Parquet?

One thread reads shards that lie in memory, one after the other, and keeps every table, as a worker does. All sides in
turn, several times; medians. GB are 10**9 bytes of rows. The plain sides:

    uncompressed   `pq.write_table` without compression and dictionaries, `pq.read_table`: the fastest plain way
    by default     `pq.write_table` and `pq.read_table` with pyarrow's defaults: what most plain files are
    same file      the very layout of a sealed file, without encryption, read in the way of a sealed one: what
                   encryption alone costs

    python benchmarks/sealed_read.py [--quick] [--json]
"""

from __future__ import annotations

import hashlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _report import Row, options, report, row

from cloister.sealing import shard
from cloister.sealing.envelope import new_key
from cloister.sealing.shard import open_table, seal_table, shard_aad

GOALS = {"tensors": 0.7, "typed": 0.9}
SHARD_BYTES = 16 << 20
SHARDS, SHARDS_QUICK = 32, 12
ROUNDS, ROUNDS_QUICK = 15, 7
SEED = 20261123
AAD = shard_aad("benchmark", 1, "confidential", "train-000", "eu")

Read = Callable[[pa.Buffer], Any]


def tensors(row_bytes: int) -> pa.Table:
    """Rows of one tensor each."""
    count = SHARD_BYTES // row_bytes
    data = pa.py_buffer(np.random.default_rng(SEED).bytes(count * row_bytes))
    return pa.table({"tensor": pa.Array.from_buffers(pa.binary(row_bytes), count, [None, data])})


def typed() -> pa.Table:
    """Six integers, six numbers, four categories a row, as ingestion stores them."""
    random, count = np.random.default_rng(SEED), SHARD_BYTES // (12 * 4 + 4 * 2)
    columns = {f"i{k}": random.integers(0, 10**6, count).astype(np.int32) for k in range(6)}
    columns |= {f"n{k}": random.normal(size=count).astype(np.float32) for k in range(6)}
    columns |= {f"c{k}": random.integers(0, 9, count).astype(np.int16) for k in range(4)}
    return pa.table(columns)


TABLES: tuple[tuple[str, str, Callable[[], pa.Table]], ...] = (
    ("tensors of 512 B (an embedding)", "tensors", lambda: tensors(512)),
    ("tensors of 3 KB (32 × 32 × 3)", "tensors", lambda: tensors(3 * 32 * 32)),
    ("tensors of 147 KB (224 × 224 × 3)", "tensors", lambda: tensors(3 * 224 * 224)),
    ("typed columns", "typed", typed),
)


def measure(quick: bool) -> Iterator[Row]:
    for what, kind, make in TABLES:
        table, key = make(), new_key()

        def opened(sealed: pa.Buffer, key: bytes = key) -> pa.Table:
            return open_table(sealed, key, AAD)

        def checked(sealed: pa.Buffer, opened: Read = opened) -> pa.Table:
            hashlib.sha256(sealed).hexdigest()
            return opened(sealed)

        sealed = seal_table(table, key, AAD)
        sides: list[tuple[bytes, Read]] = [
            (sealed, opened),
            (_plain(table, compression="NONE", use_dictionary=False, write_statistics=False), _read),
            (_plain(table), _read),
            (shard._written(table, None), _read_file),  # all of what `seal_table` does, but for the encryption
            (sealed, checked),
        ]
        if opened(pa.py_buffer(sealed)) != table:
            raise SystemExit("what was sealed does not come back")
        *fast, two_threads = _speeds(sides, table.nbytes, SHARDS_QUICK if quick else SHARDS,
                                     ROUNDS_QUICK if quick else ROUNDS)  # fmt: skip
        own, uncompressed, default, same, with_digest = fast
        goal, ratio = GOALS[kind], own / uncompressed
        yield row(f"{what}: sealed", own, "GB/s")
        yield row(f"{what}: plain, uncompressed", uncompressed, "GB/s")
        yield row(f"{what}: sealed, relative to that", ratio, "ratio", f">= {goal}", ratio >= goal)
        yield row(f"{what}: sealed, relative to plain by default", own / default, "ratio")
        yield row(f"{what}: sealed, relative to the same file unencrypted", own / same, "ratio")
        yield row(f"{what}: sealed, with the digest checked first", with_digest, "GB/s")
        yield row(f"{what}: the same in two threads, as workers do", two_threads, "GB/s")


def _plain(table: pa.Table, **choices: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **choices)
    return sink.getvalue()


def _read(plain: pa.Buffer) -> pa.Table:
    return pq.read_table(pa.BufferReader(plain), use_threads=False)


def _read_file(plain: pa.Buffer) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(plain)).read(use_threads=False)


def _speeds(sides: list[tuple[bytes, Read]], size: int, shards: int, rounds: int) -> list[float]:
    """GB/s of each side, and of the last one in two threads: medians over the rounds.

    Each side has its own copies of its shard, since bytes that were just read would still be in the cores' caches.
    """
    copies = [[pa.py_buffer(bytes(bytearray(data))) for _ in range(shards)] for data, _ in sides]
    taken: list[list[float]] = [[] for _ in range(len(sides) + 1)]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(rounds):
            for times, (_, read), files in zip(taken, sides, copies, strict=False):
                times.append(_seconds(lambda read=read, files=files: [read(file) for file in files]))  # type: ignore[misc]
            taken[-1].append(_seconds(lambda: list(threads.map(sides[-1][1], copies[-1]))))
    return [size * shards / statistics.median(times[1:]) / 1e9 for times in taken]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def main() -> None:
    arguments = options(__doc__, "fewer shards and rounds, within 60 s").parse_args()
    report("sealed_read", arguments, lambda: list(measure(arguments.quick)))


if __name__ == "__main__":
    main()
