"""Each run of the suite has a folder of its own for Ray clusters, whatever else runs on the machine.

Homes and databases are below pytest's own numbered folders, ports are reserved (`ports.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from cloister.cluster.files import CLUSTERS_FOLDER

MEMORY = Path("/dev/shm")  # noqa: S108


def pytest_configure(config: pytest.Config) -> None:
    """In the process that was started first: its workers inherit what it sets."""
    if CLUSTERS_FOLDER not in os.environ and os.access(MEMORY, os.W_OK):
        folder = tempfile.mkdtemp(prefix="ct-", dir=MEMORY)  # short: UNIX sockets have their paths below it
        os.environ[CLUSTERS_FOLDER] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(CLUSTERS_FOLDER))
