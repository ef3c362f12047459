"""A daemon is stopped exactly, and inherits nothing that was not meant for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cloister.errors import CloisterError, InputError, UnavailableError
from cloister.process import INHERITED, Daemon, _birth, describe
from cloister.stores.blobs import AWS_PLACES

SLEEPER = """
import json, os, resource, sys, time
from pathlib import Path
from cloister.process import Daemon
umask = os.umask(0o077)
facts = {"environment": dict(os.environ), "core": resource.getrlimit(resource.RLIMIT_CORE), "umask": umask,
         "session": os.getsid(0), "arguments": sys.argv[2:]}
Daemon(Path(sys.argv[1])).report("ready", **facts)
time.sleep(600)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "sleeper_for_tests.py").write_text(SLEEPER)
    platform = str(Path(__file__).parents[2] / "platform")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), platform]))
    return "sleeper_for_tests"


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else, which must outlive every test."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def write_pid(daemon: Daemon, **record: object) -> None:
    daemon.directory.mkdir(exist_ok=True)
    (daemon.directory / "pid.json").write_text(json.dumps(record))


def test_a_reused_pid_is_never_hit(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    daemon = Daemon(tmp_path / "daemon")
    boot, ticks = _birth(stranger.pid).split()
    for born in (f"{boot} {int(ticks) - 1}", f"{boot} {int(ticks) + 100}", f"another-boot {ticks}", "", 0):
        write_pid(daemon, pid=stranger.pid, born=born)
        assert daemon.process() is None
        assert daemon.stop() is False
        assert not (tmp_path / "daemon" / "pid.json").exists()
        assert stranger.poll() is None


def test_a_step_of_the_clock_makes_no_stranger_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(tmp_path / "daemon")
    daemon.start("http.server", ["0", "--bind", "127.0.0.1"])
    booted = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 7)  # what psutil makes of a clock that was put on
    assert daemon.process() is not None
    assert daemon.stop() is True


@pytest.mark.parametrize("text", ["", "{}", '{"pid": 999999999, "born": "1"}', '{"pid": -1, "born": "1"}'])
def test_a_damaged_pid_file_stops_nobody(tmp_path: Path, text: str) -> None:
    daemon = Daemon(tmp_path)
    (tmp_path / "pid.json").write_text(text)
    assert daemon.stop() is False


def test_a_child_inherits_only_what_is_listed(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "CLOISTER_TOKEN",
        "RAY_ADDRESS",
        "HTTPS_PROXY",
        "PYTHONSTARTUP",
        "LD_PRELOAD",
    ):
        monkeypatch.setenv(name, "" if name == "LD_PRELOAD" else "SECRET")
    daemon = Daemon(tmp_path / "daemon")
    daemon.start(module, [str(tmp_path / "daemon"), "--flag"], {"CLOISTER_EXTRA": "1"})
    status = daemon.wait_ready(120, what="the sleeper")
    process = daemon.process()
    assert process is not None
    assert set(status["environment"]) <= {*INHERITED, *AWS_PLACES, "CLOISTER_EXTRA", "LC_CTYPE"}
    assert "SECRET" not in json.dumps(status)
    assert (status["umask"], status["core"], status["arguments"]) == (0o077, [0, 0], ["--flag"])
    assert status["session"] == process.pid != os.getsid(0)
    assert daemon.stop() is True
    with contextlib.suppress(psutil.NoSuchProcess):
        assert process.status() == psutil.STATUS_ZOMBIE
    assert daemon.stop() is False


def test_a_daemon_that_dies_is_reported_at_once(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "daemon")
    daemon.start("no_such_module_at_all", [])
    with pytest.raises(UnavailableError, match="stopped while starting"):  # and not "was not ready after"
        daemon.wait_ready(300, what="it")


def test_a_daemon_says_why_it_failed(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.report("failed", error=describe(InputError("the port is taken", "free it")))
    with pytest.raises(InputError, match="the port is taken"):
        daemon.wait_ready(1, what="it")
    assert "SECRET" not in str(describe(ValueError("SECRET")))
    assert describe(ValueError("SECRET"))["kind"] == CloisterError.__name__
