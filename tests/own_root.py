"""Each run of the suite has a folder of its own for Ray clusters, whatever else runs on the machine.

Homes and databases are below pytest's own numbered folders, ports are reserved (`ports.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from cloister.cluster.files import CLUSTERS_FOLDER

MEMORY = Path("/dev/shm")  # noqa: S108
PREFIX = "ct-"  # short: UNIX sockets have their paths below it
OLD_S = 3600.0


def pytest_configure(config: pytest.Config) -> None:
    """In the process that was started first: its workers inherit what it sets."""
    if hasattr(config, "workerinput") or not os.access(MEMORY, os.W_OK):
        return
    _remove_what_killed_runs_left()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY))
    lock = (folder / "lock").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    patch = pytest.MonkeyPatch()
    patch.setenv(CLUSTERS_FOLDER, str(folder))
    config.add_cleanup(lock.close)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.add_cleanup(patch.undo)


def _remove_what_killed_runs_left() -> None:
    for folder in MEMORY.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever runs has it
            if folder.stat().st_uid == os.getuid() and time.time() - folder.stat().st_mtime > OLD_S:
                shutil.rmtree(folder, ignore_errors=True)
