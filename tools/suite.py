"""Run the tests in tiers, and try once more, alone, what the environment has failed.

    python tools/suite.py gate story          what must pass before a change lands; `make test`
    python tools/suite.py long                kills, a fault at every write, fuzzing; `make long`
    python tools/suite.py gate -- -k ledger   what follows `--` goes to pytest

Guarantees:
  1. A test has a second try only if its failure was a time-out, a refused connection, a taken port or a fixture's
     set-up, and never where chance is what is tested (`tests/outcomes.py`). It runs after the rest, in one process,
     and is listed with its first failure.
  2. Red: whatever else fails, a test that does not pass the second time, more than three such failures, a file that
     does not load, a test that was collected and did not come to its end, a process that does not end as it should, and
     a tier in which nothing ran. A fixture of many tests whose set-up failed is one failure.
  3. At the end: the time and the processor time of each tier. The latter includes servers and clusters that nobody
     waited for, if they ended before the tier did.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIERS = {"gate": "not story and not long", "story": "story and not long", "long": "long"}
# Two workers, each with whole files, whose tests share authorities and clusters (tests/conftest.py).
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
MAX_SECOND_TRIES = 3
CLEAN_UP_S = 60.0  # for fixtures, when a run is told to end
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
TESTS_FAILED, NO_TESTS = 1, 5  # pytest's exit codes
WORST_LAST = ("passed", "skipped", "failed")

Line = dict[str, Any]
"""What became of one phase of one test (`tests/outcomes.py`)."""


@dataclass(frozen=True)
class Run:
    """One call of pytest: how it ended, and what it took."""

    code: int
    wall_s: float
    cpu_s: float
    lines: list[Line]
    collected: list[str]

    @property
    def ended(self) -> set[str]:
        """The tests that came to their end, whatever became of them."""
        return {line["test"] for line in self.lines if line["when"] == "teardown"}

    @property
    def unfinished(self) -> list[str]:
        """Those that were collected, and before whose end the run stopped."""
        ended = self.ended
        return [test for test in self.collected if test not in ended]

    @property
    def failures(self) -> list[Line]:
        return [line for line in self.lines if line["outcome"] == "failed"]

    def outcomes(self) -> dict[str, str]:
        """For each test, the worst of its phases."""
        ordered = sorted(self.lines, key=lambda line: WORST_LAST.index(line["outcome"]))
        return {line["test"]: line["outcome"] for line in ordered}

    def passed(self) -> set[str]:
        """The tests that came to their end, with nothing but success on the way."""
        return self.ended - {line["test"] for line in self.lines if line["outcome"] != "passed"}


def run_pytest(arguments: list[str]) -> Run:
    """Run pytest in this folder, with the arguments."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes"
        start, cpu_s = time.monotonic(), 0.0
        command = [sys.executable, "-m", "pytest", f"--outcomes={file}", *arguments]
        process = subprocess.Popen(command, process_group=0)  # an interruption reaches it once, from here
        try:
            while True:  # as a subreaper: what outlives its parent, such as a cluster, is waited for here
                pid, status, used = os.wait4(-1, 0)
                cpu_s += used.ru_utime + used.ru_stime
                if pid == process.pid:
                    break
        except BaseException:
            os.killpg(process.pid, signal.SIGINT)  # its workers too
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(CLEAN_UP_S)  # it ends what the tests have started
            finally:  # also if somebody is impatient
                process.terminate()
                process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        collected = [test for line in lines if "collected" in line for test in line["collected"]]
        lines = [line for line in lines if "test" in line]
        return Run(process.returncode, time.monotonic() - start, cpu_s, lines, list(dict.fromkeys(collected)))


def say(text: str = "") -> None:
    print(text, flush=True)  # noqa: T201


def judge(runs: dict[str, Run], selected: bool) -> tuple[list[str], list[Line]]:
    """What is red whatever comes next, and the first failures of the tests that have a second try.

    `selected`: the caller chose the tests, so that a tier may be empty.
    """
    failures = [line for run in runs.values() for line in run.failures]
    inside = {line["test"] for line in failures if not line["outside"]}
    red = [f"failed: {test}" for test in sorted(inside)]
    for tier, run in runs.items():
        if run.code not in (0, TESTS_FAILED, NO_TESTS):
            red.append(f"{tier}: pytest ended with {run.code}")
        if run.code == TESTS_FAILED and not run.failures:
            red.append(f"{tier}: pytest ended with {run.code}, and no test failed")
        if unfinished := run.unfinished:
            red.append(f"{tier}: {len(unfinished)} tests did not come to their end, such as {unfinished[0]}")
    empty = [tier for tier, run in runs.items() if not run.lines]
    if len(empty) == len(runs) or not selected:
        red += [f"no test ran: {tier}" for tier in empty]
    again = {line["test"]: line for line in reversed(failures) if line["test"] not in inside}
    return red, list(again.values())[::-1]


def occasions(lines: list[Line]) -> int:
    """How often the environment failed: a fixture that failed for many tests of a file did so once."""
    return len({
        (line["test"].partition("::")[0], line["cause"]) if line["when"] == "setup" else line["test"] for line in lines
    })  # fmt: skip


def second_try(first: list[Line]) -> tuple[list[str], Run | None]:
    """Run these tests once more. Returns what is red, and the run."""
    if (count := occasions(first)) > MAX_SECOND_TRIES:
        red = [f"{count} failures of the environment, more than {MAX_SECOND_TRIES}"]
        return red + [f"failed: {line['test']}: {line['outside']}" for line in first], None
    say(f"\nOnce more, alone: {len(first)} of the failures were the environment's.")
    run = run_pytest([line["test"] for line in first])
    passed = run.passed()
    red = [f"not passed on the second try: {line['test']}" for line in first if line["test"] not in passed]
    if run.code not in (0, TESTS_FAILED):
        red.append(f"the second try: pytest ended with {run.code}")
    say("\nPassed on the second try:")
    for line in (line for line in first if line["test"] in passed):
        say(f"  {line['test']}: {line['outside']} ({line['when']})")
        say("    " + line["detail"].replace("\n", "\n    "))
    return red, run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tiers", nargs="+", choices=TIERS)
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    tiers, more = dict.fromkeys(parser.parse_args(words[:split]).tiers), words[split + 1 :]
    if any(word in ("-x", "--exitfirst") or word.startswith("--maxfail") for word in more):
        parser.error("a run that stops at the first failure tells nothing about the rest: call pytest itself")
    if not Path("tests").is_dir():
        parser.error("there are no tests in this folder: call it from the root of the project")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    runs: dict[str, Run] = {}
    for tier in tiers:
        say(f"\n{tier}")
        runs[tier] = run_pytest([*WORKERS, "-m", TIERS[tier], *more])
    outcomes = {test: outcome for run in runs.values() for test, outcome in run.outcomes().items()}
    red, first = judge(runs, selected=bool(more))
    if first:
        more_red, again = second_try(first)
        red += more_red
        if again:
            runs["second try"] = again
            outcomes |= dict.fromkeys(again.passed(), "passed")

    say()
    for name, run in runs.items():
        say(f"{name:10}  {run.wall_s:6.0f} s, {run.cpu_s:6.0f} CPU-seconds")
    for reason in red:
        say(f"RED: {reason}")
    total = Counter(outcomes.values())
    say(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if red else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
