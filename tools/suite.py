"""Run the tests in tiers, and try once more, alone, what the environment has failed.

    python tools/suite.py gate story          what must pass before a change lands; `make test`
    python tools/suite.py long                kills, exhaustive faults, fuzzing; `make long`
    python tools/suite.py gate -- -k ledger   what follows `--` goes to pytest

Guarantees:
  1. A test has a second try only if its failure was a time-out, a refused connection, a taken port or a fixture's
     set-up, and never in attacks, properties, faults, kills and privacy (`tests/outcomes.py`). It runs alone, after the
     rest, and is listed with its first failure.
  2. Red: whatever else fails, whatever fails twice, and a run with more than three such failures.
  3. At the end: processor time by tier, also of servers and clusters that nobody waited for.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIERS = {"gate": "not story and not long", "story": "story and not long", "long": "long"}
# Two workers, each with whole files, whose tests share authorities and clusters (tests/conftest.py).
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
MAX_SECOND_TRIES = 3
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
TESTS_FAILED, NO_TESTS = 1, 5  # pytest's exit codes


@dataclass
class Run:
    """One call of pytest: how it ended, what it took, and a line for each test (`tests/outcomes.py`)."""

    code: int
    wall_s: float
    cpu_s: float
    lines: list[dict[str, Any]]
    failures: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.failures = [line for line in self.lines if line["outcome"] == "failed"]

    def count(self) -> Counter[str]:
        last = {line["test"]: line["outcome"] for line in self.lines}
        return Counter(last.values())


def run_pytest(arguments: list[str]) -> Run:
    """Run pytest in this folder, with the arguments."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", f"--outcomes={file}", *arguments]
        start = time.monotonic()
        process = subprocess.Popen(command)
        cpu_s = 0.0
        while True:  # as a subreaper: what outlives its parent, such as a cluster, is waited for here
            pid, status, used = os.wait4(-1, 0)
            cpu_s += used.ru_utime + used.ru_stime
            if pid == process.pid:
                break
        process.returncode = os.waitstatus_to_exitcode(status)
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return Run(process.returncode, time.monotonic() - start, cpu_s, lines)


def say(text: str = "") -> None:
    print(text, flush=True)  # noqa: T201


def second_try(first: list[Run]) -> tuple[list[str], Run | None]:
    """Why the run is red, and the second try if there was one."""
    failures = {line["test"]: line for run in first for line in run.failures}
    inside = {line["test"] for run in first for line in run.failures if not line["outside"]}
    again = [test for test in failures if test not in inside]
    red = [f"failed: {test}" for test in sorted(inside)]
    red += [f"pytest ended with {run.code}" for run in first if run.code not in (0, TESTS_FAILED, NO_TESTS)]
    silent = [run for run in first if run.code == TESTS_FAILED and not run.failures]
    red += [f"pytest ended with {run.code}, and no test failed" for run in silent]
    if not again:
        return red, None
    if len(again) > MAX_SECOND_TRIES:
        red += [f"{len(again)} failures of the environment, more than {MAX_SECOND_TRIES}", *again]
        return red, None
    say(f"\nOnce more, alone: {len(again)} of the failures were the environment's.")
    run = run_pytest(again)
    passed = {line["test"] for line in run.lines if line["outcome"] == "passed"}
    passed -= {line["test"] for line in run.failures}
    red += [f"failed twice: {test}" for test in again if test not in passed]
    if passed:
        say("\nPassed on the second try:")
    for test in (test for test in again if test in passed):
        say(f"  {test}: {failures[test]['outside']} ({failures[test]['when']})")
        say("    " + failures[test]["detail"].replace("\n", "\n    "))
    return red, run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tiers", nargs="+", choices=TIERS)
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    tiers, more = parser.parse_args(words[:split]).tiers, words[split + 1 :]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    runs: dict[str, Run] = {}
    for tier in tiers:
        say(f"\n{tier}")
        runs[tier] = run_pytest([*WORKERS, "-m", TIERS[tier], *more])
    red, again = second_try(list(runs.values()))
    if not any(run.lines for run in runs.values()):
        red.append("no test ran")

    say()
    for name, run in (runs | ({"second try": again} if again else {})).items():
        say(f"{name:10}  {run.wall_s:6.0f} s, {run.cpu_s:6.0f} CPU-seconds")
    for line in red:
        say(f"RED: {line}")
    total = sum((run.count() for run in runs.values()), Counter())
    if again:
        total += Counter(passed=again.count()["passed"])
        total["failed"] -= again.count()["passed"]
    say(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if red else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # pytest got it too
        sys.exit(130)
