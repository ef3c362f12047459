"""The README's session about data through the years, as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import ROOT, CommandLine, readme_session
from ports import free_port


@pytest.fixture
def own_line(tmp_path: Path) -> Iterator[CommandLine]:
    """A home that nobody else uses: the session takes it down and restores it."""
    line = CommandLine(tmp_path / "home")
    line.home.mkdir(mode=0o700)
    # The session's own `cloister up` names no port: it shall not be the one that any Cloister here has by default.
    (line.home / "config.yaml").write_text(f"authority: {{port: {free_port()}}}\n")
    line.up()
    yield line
    line.run("down")


def test_the_readmes_data_session(own_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "cloister").write_text(f'#!/bin/sh\nexec {sys.executable} -m cloister.cli "$@"\n')
    (tmp_path / "cloister").chmod(0o755)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "CLOISTER_HOME": str(own_line.home),
        "CLOISTER_AS": "operator",
    }  # fmt: skip
    said = {}
    session = readme_session("data")
    assert len(session) > 15
    for command, wanted in session:
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        assert done.returncode == wanted, f"{command}: {done.stdout}{done.stderr}"
        said[command] = done.stdout
    assert "visits@4" in said["cloister data show visits@4 --as olga"]
    assert "keys destroyed" in said["cloister data list --as olga"]
    everything = [file for file in own_line.home.rglob("*") if file.is_file()]
    everything += [file for file in (tmp_path / "visits.backup").rglob("*") if file.is_file()]
    assert len(everything) > 50
    assert not [file for file in everything if b"P-0001" in file.read_bytes() or b"mail.example" in file.read_bytes()]
