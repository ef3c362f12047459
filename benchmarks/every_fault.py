"""Does an error or a `kill -9` at any single write of seal, append, rotate, erase, backup and restore lose anything?

Every write-like system call of each operation, in each of three ways (killed before it, EIO, a full disk from then on);
after each, a new process looks whether the state is consistent: `tests/attacks/test_faults.py` says how.

    python benchmarks/every_fault.py [--quick] [--json]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from _report import Row, options, report, row

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "attacks"), str(TESTS.parent / "platform")]
PARTS = {False: (("erase", "rotate", "backup"), ("seal", "append", "restore")), True: (("rotate",), ("append",))}


def measure(quick: bool) -> list[Row]:
    """All faults, in two processes that fork one for each."""
    if not quick:
        os.environ["CLOISTER_EVERY_FAULT"] = "1"  # for the processes to come
    from test_faults import try_faults

    import faults
    from postgres import roomy_memory

    if not faults.usable():
        sys.exit(
            "error: this kernel does not let a process answer for another's system calls\nhint:  Linux 5.14 or newer"
        )
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(dir=roomy_memory()) as folder,
        ProcessPoolExecutor(2, get_context("spawn")) as pool,
    ):
        parts = [pool.submit(try_faults, Path(folder, str(index)), names) for index, names in enumerate(PARTS[quick])]
        found = [part.result() for part in parts]
    problems = [problem for _, each in found for problem in each]
    for problem in problems:
        print(problem, file=sys.stderr)
    hits = sum((each for each, _ in found), Counter[str]())
    return [
        *(row(what, count, "faults") for what, count in sorted(hits.items())),
        row("left something lost, broken or in clear", len(problems), "faults", "0", not problems),
        row("time", time.perf_counter() - started, "s"),
    ]


def main() -> None:
    arguments = options(__doc__, quick="one write of each kind, of two operations").parse_args()
    report("Does a fault at any write lose anything?", arguments, lambda: measure(arguments.quick))


if __name__ == "__main__":
    main()
