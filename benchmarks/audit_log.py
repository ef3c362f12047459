"""How fast is the audit log: appending, proving one entry, and verifying all of it offline?

A real SQLite database with synchronous=FULL, real events, the code that the authority and the command line use. The log
that is proven and verified has a million entries (with --quick: 50,000, against goals for a million).

    python benchmarks/audit_log.py [--quick] [--json] [--directory FOLDER]
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import Row, options, report, row
from nacl.signing import SigningKey
from sqlalchemy import select

from cloister.audit import export, merkle
from cloister.audit.event import Event, utc_text
from cloister.authority.journal import Journal
from cloister.authority.log import read_export
from cloister.stores.database import Database
from cloister.stores.tables import log_entries

GROUP, ROUNDS = 64, 5
ENTRIES, QUICK_ENTRIES = 1_000_000, 50_000
BUILD_GROUP = 1_000
GOAL_APPEND, GOAL_VERIFY_S, GOAL_PROOF_MS = 5_000, 60.0, 5.0


def events(count: int, first: int = 0) -> list[Event]:
    """As an authority makes them: `count` distinct ones."""
    now = utc_text(datetime.datetime.now(datetime.UTC))
    return [
        Event(
            time=now, actor=f"p-{index:016x}", actor_kind="person", action="train:submit", resource="Dataset/adult@1",
            outcome="success", rule="engineers-train-and-release", source="a-0123456789abcdef",
            correlation=f"{index:016x}", details={"run": f"run-{index}", "epsilon": 3.5, "steps": 1000},
        )
        for index in range(first, first + count)
    ]  # fmt: skip


def appended_per_s(directory: Path, group: int, count: int) -> float:
    """Entries a second, each group in a transaction of its own that is on the disk before the next begins."""
    journal, database = Journal(SigningKey(bytes(32))), Database(directory / f"append-{group}-{time.time_ns()}.db")
    prepared = events(count)
    start = time.perf_counter()
    for place in range(0, count, group):
        with database.transaction() as connection:
            journal.append(connection, prepared[place : place + group])
    elapsed = time.perf_counter() - start
    database.close()
    return count / elapsed


def build(directory: Path, entries: int) -> tuple[Journal, Database]:
    journal, database = Journal(SigningKey(bytes(32))), Database(directory / "state.db")
    for first in range(0, entries, BUILD_GROUP):
        with database.transaction() as connection:
            journal.append(connection, events(BUILD_GROUP, first))
    return journal, database


def proofs_ms(journal: Journal, database: Database, entries: int, count: int) -> tuple[list[float], ...]:
    """Milliseconds for inclusion proofs of random entries, with the head and the entry; of those on the processor; and
    for consistency proofs."""
    inclusion, busy, consistency = [], [], []
    chance = random.Random(1)  # noqa: S311  (which entries are measured is no secret)
    for _ in range(count):
        index, first = chance.randrange(entries), chance.randrange(1, entries)
        start, start_busy = time.perf_counter(), time.thread_time()
        with database.reading() as connection:
            head = journal.head(connection)
            entry = connection.execute(select(log_entries.c.entry).where(log_entries.c["index"] == index)).scalar_one()
            proof = journal.inclusion(connection, index, head.size)
        inclusion.append((time.perf_counter() - start) * 1e3)
        busy.append((time.thread_time() - start_busy) * 1e3)
        merkle.verify_inclusion(merkle.leaf_hash(entry), index, head.size, proof, head.root)
        start = time.perf_counter()
        with database.reading() as connection:
            journal.consistency(connection, first, head.size)
        consistency.append((time.perf_counter() - start) * 1e3)
    return inclusion, busy, consistency


def verify(file: Path) -> dict[str, float]:
    """In a process of its own, so that its memory can be told."""
    script = [sys.executable, __file__, "--verify", str(file)]
    return dict(json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout))


def verify_here(file: Path) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with file.open("rb") as opened:
        header, entries = export.open_export(opened)
        report = export.verify_export(header, entries)
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "entries": report.size, "grown_mb": grown / 1024}


def measure(directory: Path, entries: int, *, quick: bool) -> list[Row]:
    count = GROUP * (50 if quick else 200)
    rates = {group: [] for group in (GROUP, 1)}
    for _ in range(ROUNDS):
        for group, found in rates.items():
            found.append(appended_per_s(directory, group, count if group > 1 else count // 10))
    grouped, single = (statistics.median(rates[group]) for group in (GROUP, 1))
    start = time.perf_counter()
    journal, database = build(directory, entries)
    built_s = time.perf_counter() - start
    inclusion, busy, consistency = proofs_ms(journal, database, entries, 100 if quick else 500)
    file = directory / "export.jsonl"
    start = time.perf_counter()
    header, lines = read_export(database, journal.verifier_key)
    with file.open("wb") as opened:
        opened.write(header.to_line())
        opened.writelines(line + b"\n" for line in lines)
    exported_s = time.perf_counter() - start
    verified = [verify(file) for _ in range(1 if quick else 3)]
    verify_s = statistics.median(one["seconds"] for one in verified)
    verify_all_s = verify_s * ENTRIES / entries
    proof_ms = statistics.median(inclusion)
    p99 = sorted(inclusion)[len(inclusion) * 99 // 100]
    database.close()
    return [
        row(f"appended in groups of {GROUP}", grouped, "entries/s", f">= {GOAL_APPEND}", grouped >= GOAL_APPEND),
        row("appended one by one", single, "entries/s"),
        row("appended in groups of 1,000, while the log grew", entries / built_s, "entries/s"),
        row("a million entries verified offline", verify_all_s, "s", f"<= {GOAL_VERIFY_S:.0f}",
            verify_all_s <= GOAL_VERIFY_S),
        row("memory that verifying took", max(one["grown_mb"] for one in verified), "MB"),
        row("inclusion proof, median", proof_ms, "ms", f"<= {GOAL_PROOF_MS:.0f}", proof_ms <= GOAL_PROOF_MS),
        row("inclusion proof, 99th percentile", p99, "ms"),
        row("inclusion proof, processor time, median", statistics.median(busy), "ms"),
        row("consistency proof, median", statistics.median(consistency), "ms"),
        row("exported", entries / exported_s, "entries/s"),
        row("size of the export", file.stat().st_size / entries, "B/entry"),
        row("size of the database", (directory / "state.db").stat().st_size / entries, "B/entry"),
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__, "50,000 entries, within 60 s")
    parser.add_argument("--directory", type=Path, help="on which disk to measure; must exist")
    parser.add_argument("--verify", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.verify:
        print(json.dumps(verify_here(arguments.verify)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        entries = QUICK_ENTRIES if arguments.quick else ENTRIES
        report("audit_log", arguments, lambda: measure(Path(directory), entries, quick=arguments.quick))


if __name__ == "__main__":
    main()
