"""The processes of a cluster: the guardian that starts them, and what ends them.

Guarantees: when the guardian's standard input ends, or `ray start` does, or a SIGTERM comes, every descendant of the
guardian is gone before the guardian is, and so is the cluster's directory. The guardian is a subreaper, prctl(2): an
orphan below it becomes its child, so that nothing gets away by turning itself into a daemon.
Does not guarantee anything when the guardian itself is killed: then `reap` finds what bears the cluster's marker.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from cloister.errors import InputError, UnavailableError

LOG = "guardian.log"  # in the cluster's directory: what the guardian and `ray start` print
MARKER = "CLOISTER_CLUSTER"  # names the directory in the environment of every process of the cluster
GRACE_S = 1.0  # between SIGTERM and SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def guard(command: Sequence[str]) -> None:
    """The guardian: when the caller says that the directory is there, run `command` in it.

    When that ends, or the caller, or a SIGTERM says so, end every descendant and remove the directory.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the caller has it wait until here
        if not os.read(0, 1):  # end of file instead of a byte: the caller died while it made the directory
            return
        os.chdir(os.environ[MARKER])
        log = os.open(LOG, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        ray = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while ray.pid not in _bury():
            if select.select([sys.stdin], [], [], 0.2)[0]:  # end of file: the caller closed it, or died
                break
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + GRACE_S
        asked: set[int] = set()
        # A subreaper inherits every orphan below it, so nothing gets away by becoming a daemon.
        while descendants := psutil.Process().children(recursive=True):
            for process in descendants:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if time.monotonic() > deadline:
                        process.kill()
                    elif process.pid not in asked:
                        process.terminate()
                        asked.add(process.pid)
            time.sleep(0.02)
            _bury()
        shutil.rmtree(os.environ[MARKER], ignore_errors=True)


def _bury() -> set[int]:
    """Collect the dead children, also those inherited."""
    dead: set[int] = set()
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            dead.add(pid)
    return dead


def start_less(ray_params: Any, head: bool) -> None:  # noqa: ARG001 Ray calls it with both
    """Called inside `ray start`, to leave out what none of its options leaves out.

    The names below are private to Ray. If a Ray without them is installed, the cluster does not start.
    """
    ray_params.ray_client_server_port = None  # a way in that nobody here uses
    services: Any = sys.modules["ray._private.services"]
    start_api_server, start_process = services.start_api_server, services.start_ray_process

    def start_ray_process(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == "dashboard":  # left out of its ten modules: profiler, logs, state, metrics, Serve, ...
            command = [*command, "--modules-to-load=JobHead,NodeHead"]
        return start_process(command, process_type, **options)

    def start_api_server_if_wanted(include_dashboard: bool, *rest: Any, **options: Any) -> Any:
        return start_api_server(include_dashboard, *rest, **options) if include_dashboard else (None, None)

    services.start_ray_process, services.start_api_server = start_ray_process, start_api_server_if_wanted


def reap(directory: Path) -> int:
    """End every process of the cluster in `directory`, remove the directory, and return how many had to be ended.

    For a cluster whose guardian was killed. Finds this user's processes that have the marker in their environment,
    and their descendants. A job that removed the marker from its own environment is found only by the guardian.

    Raises:
        InputError: this is not a directory that `ray_cluster` made, so nothing is touched.
    """
    if directory.is_symlink() or not re.fullmatch(r"[0-9a-f]{8}", directory.name):
        raise InputError(f"{directory} is not a cluster's directory", "pass the `directory` of a RayCluster")
    ended: set[int] = set()
    while found := {process.pid: process for process in _members(directory)}:
        ended |= found.keys()
        _terminate(list(found.values()))
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise UnavailableError("a cluster's directory could not be removed", f"remove {directory} by hand")
    return len(ended)


def _members(directory: Path) -> list[psutil.Process]:
    marker = os.fsencode(f"{MARKER}={directory}")
    members: dict[int, psutil.Process] = {}
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            entry = Path(f"/proc/{pid}")
            if pid == os.getpid() or entry.stat().st_uid != os.getuid():
                continue
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                process = psutil.Process(pid)
                for each in (process, *process.children(recursive=True)):
                    if each.status() != psutil.STATUS_ZOMBIE:
                        members[each.pid] = each
    return list(members.values())


def _terminate(processes: Sequence[psutil.Process]) -> None:
    for kill in (False, True):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if kill else process.terminate()
        _, processes = psutil.wait_procs(processes, GRACE_S)
