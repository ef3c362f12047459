"""Long-running processes of our own: start them detached, wait until they are ready, stop exactly them.

Guarantees: `stop` signals a process only if its pid *and* its start time are the ones recorded, so a reused pid is
never hit; what the process inherits is an allow-listed environment without secrets, `umask 077`, no core dumps.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cloister.errors import CloisterError, UnavailableError, from_dict
from cloister.stores.blobs import aws_places
from cloister.stores.files import private_directory, write_json

INHERITED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "TMPDIR",
    "CLOISTER_HOME",
    "CLOISTER_NODE",
    "CLOISTER_TMPFS",
)
STOP_TIMEOUT_S = 30.0


def no_core_dumps() -> None:
    """A core file would hold keys and rows in clear."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment, reduced to names that hold no secret."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ} | aws_places() | dict(extra or {})


@dataclass(frozen=True, slots=True)
class Daemon:
    """A process of ours that outlives the command that started it. Its folder has `pid.json`, `status.json`, `log`."""

    directory: Path

    def start(
        self, module: str, arguments: Sequence[str], extra_env: Mapping[str, str] | None = None, secret: bytes = b""
    ) -> None:
        """Run `python -m module arguments…` in a session of its own. It can read `secret` from its standard input."""
        private_directory(self.directory)
        self._status_file.unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE if secret else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(extra_env),
                start_new_session=True,
                umask=0o077,
                preexec_fn=no_core_dumps,
            )
        if process.stdin:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(secret)
        write_json(self._pid_file, {"pid": process.pid, "born": _birth(process.pid)})

    def process(self) -> psutil.Process | None:
        """The running process, or None."""
        try:
            record = json.loads(self._pid_file.read_bytes())
            process = psutil.Process(record["pid"])
            same = _birth(process.pid) == record["born"]
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None
        return process if same and alive else None

    def report(self, state: str, **facts: Any) -> None:
        """Called by the daemon itself: publish its state."""
        write_json(self._status_file, {"state": state, **facts})

    def status(self) -> dict[str, Any]:
        """The last published state; `{"state": "starting"}` before the first."""
        try:
            return dict(json.loads(self._status_file.read_bytes()))
        except (OSError, ValueError):
            return {"state": "starting"}

    def wait_ready(
        self, timeout_s: float, *, what: str, tick: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Wait until the state is `ready`.

        Raises:
            CloisterError: the one that the daemon reported.
            UnavailableError: it died or is not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.status()
            if tick:
                tick(status)
            if status["state"] == "ready":
                return status
            if status["state"] == "failed":
                raise from_dict(status.get("error", {}))
            if self.process() is None:
                raise UnavailableError(f"{what} stopped while starting", f"read {self.directory / 'log'}")
            time.sleep(0.05)
        self.stop()
        raise UnavailableError(f"{what} was not ready after {timeout_s:.0f} s", f"read {self.directory / 'log'}")

    def stop(self) -> bool:
        """Stop it, and only it: SIGTERM, then SIGKILL. True if something was running."""
        process = self.process()
        if process is None:
            self._pid_file.unlink(missing_ok=True)
            return False
        with contextlib.suppress(psutil.Error):
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(5)
        self._pid_file.unlink(missing_ok=True)
        return True

    @property
    def _pid_file(self) -> Path:
        return self.directory / "pid.json"

    @property
    def _status_file(self) -> Path:
        return self.directory / "status.json"


def _birth(pid: int) -> str:
    """When a process began, in ticks of this boot: no step of the clock changes it, as it would a time of day."""
    ticks = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])  # proc(5): field 22, starttime
    return f"{since_boot()[0]} {ticks}"


def since_boot() -> tuple[str, float]:
    """Which boot of this machine it is, and its age in seconds. All processes see the same; no step of the clock does
    anything to it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME)


def describe(error: BaseException) -> dict[str, Any]:
    """An error as data that may be written down: our own errors in full, of any other only its type."""
    if isinstance(error, CloisterError):
        return error.to_dict()
    name = type(error).__name__
    return CloisterError(f"an unexpected {name} stopped it", "run `cloister doctor`, then report this").to_dict()
