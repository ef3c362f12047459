"""What became of each test, whose fault it was, and what it cost: for `tools/suite.py`, and at the end of each run.

A failure is the environment's if it is a time-out, a refused connection, a taken port or a fixture's set-up. Never
where chance is what is tested: `attacks`, `properties`, and files about faults, kills and privacy.
"""

from __future__ import annotations

import collections
import errno
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

NEVER = re.compile(r"(^|/)(attacks|properties)/|_(faults?|kills?|privacy)[_.]")
TIME_OUTS = (TimeoutError, subprocess.TimeoutExpired, psutil.TimeoutExpired, httpx.TimeoutException)
REFUSED = (ConnectionRefusedError, httpx.ConnectError)
DETAIL_CHARS = 4000


def cause_outside(nodeid: str, when: str, error: BaseException) -> str:
    """Which part of the environment failed the test; "" if the test's own assertion did, or nothing may excuse it."""
    if NEVER.search(nodeid.partition("::")[0]):
        return ""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, TIME_OUTS) or str(each).startswith("Timeout ("):  # the latter is pytest-timeout's
            return "a time-out"
        if isinstance(each, REFUSED):
            return "a refused connection"
        if isinstance(each, OSError) and each.errno == errno.EADDRINUSE:
            return "a taken port"
        each = each.__cause__
    return "a fixture's set-up" if when == "setup" else ""


def _cpu_s() -> float:
    """Processor time of this process and of those that it has waited for."""
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class Outcomes:
    """In each worker: marks the reports. Where they come together: sums them up, and writes them to `file`."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._before = _cpu_s()
        self._cpu_s: collections.Counter[str] = collections.Counter()
        self._tests: collections.Counter[str] = collections.Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        now = _cpu_s()
        report.cpu_s, self._before = now - self._before, now
        if report.failed and call.excinfo is not None:
            report.outside = cause_outside(item.nodeid, call.when, call.excinfo.value)
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        folder = "/".join(report.nodeid.split("::")[0].split("/")[:2])
        self._cpu_s[folder] += getattr(report, "cpu_s", 0.0)
        self._tests[folder] += report.when == "call" and type(report) is pytest.TestReport  # no subtest
        if self._file is None or not (report.failed or report.when == "call" or report.skipped):
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "when": report.when}
        if report.failed:
            line |= {"outside": getattr(report, "outside", ""), "detail": report.longreprtext[-DETAIL_CHARS:]}
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
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))
