"""What became of each test, whose fault it was, and what it cost: for `tools/suite.py`, and at the end of each run.

A failure is the environment's if it is a time-out, a refused connection, a taken port or a fixture's set-up. Never
where chance is what is tested: in `attacks` and `properties`, and where the name of a file or test speaks of kills,
crashes, faults, privacy, noise, epsilon, the ledger or a budget.
"""

from __future__ import annotations

import collections
import errno
import itertools
import json
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

NEVER = re.compile(r"(^|/)(attacks|properties)/|kill|crash|(?<!de)fault|privacy|noise|epsilon|ledger|budget")
TIME_OUTS = (TimeoutError, subprocess.TimeoutExpired, psutil.TimeoutExpired, httpx.TimeoutException)
DETAIL_CHARS = 4000
MAX_CAUSES = 20


def cause_outside(nodeid: str, when: str, error: BaseException) -> str:
    """Which part of the environment failed the test; "" if the test's own assertion did, or nothing may excuse it."""
    if NEVER.search(nodeid.partition("[")[0]) or (isinstance(error, AssertionError) and when != "setup"):
        return ""
    if isinstance(error, pytest.fail.Exception) and str(error).startswith("Timeout ("):  # as pytest-timeout says it
        return "a time-out"
    for each in itertools.islice(_causes(error), MAX_CAUSES):
        if isinstance(each, TIME_OUTS):
            return "a time-out"
        if isinstance(each, ConnectionRefusedError):
            return "a refused connection"
        if isinstance(each, OSError) and each.errno == errno.EADDRINUSE:
            return "a taken port"
    return "a fixture's set-up" if when == "setup" else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from. (httpcore, below httpx, has that as its argument.)"""
    while error is not None:
        yield error
        error = error.__cause__ or next((each for each in error.args if isinstance(each, BaseException)), None)


def _cpu_s() -> float:
    """Processor time of this process and of those that it has waited for."""
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class Outcomes:
    """In each worker: marks the reports. Where they come together: sums them up, and writes them to `file`."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._before = 0.0
        self._cpu_s: collections.Counter[str] = collections.Counter()
        self._tests: collections.Counter[str] = collections.Counter()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._before = _cpu_s()
        self._append({"collected": [item.nodeid for item in session.items]})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Each worker collects all."""
        self._append({"collected": ids})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        now = _cpu_s()
        report.cpu_s, self._before = now - self._before, now
        if report.failed and call.excinfo is not None:
            report.outside = cause_outside(item.nodeid, call.when, call.excinfo.value)
            report.cause = repr(call.excinfo.value)
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        folder = "/".join(report.nodeid.split("::")[0].split("/")[:2])
        self._cpu_s[folder] += getattr(report, "cpu_s", 0.0)
        self._tests[folder] += report.when == "call" and type(report) is pytest.TestReport  # no subtest
        self._write(report, report.when)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report, "collection")

    def _write(self, report: Any, when: str) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "when": when}
        if report.failed:
            line |= {name: getattr(report, name, "") for name in ("outside", "cause")}
            line["detail"] = report.longreprtext[-DETAIL_CHARS:]
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("CPU-seconds by folder")
        for folder, seconds in self._cpu_s.most_common():
            terminalreporter.write_line(f"{seconds:8.1f}  {folder}, {self._tests[folder]} tests")
        terminalreporter.write_line(f"{self._cpu_s.total():8.1f}  in all")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="Append what became of each test to this file, as JSON lines.")


def pytest_configure(config: pytest.Config) -> None:
    file = None if hasattr(config, "workerinput") else config.getoption("--outcomes")  # a worker reports to it
    config.pluginmanager.register(Outcomes(file))
