"""`cloister backup | restore | fsck` as an operator types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import ROOT, CommandLine
from ports import free_port

VISITS = ROOT / "jobs" / "examples" / "visits"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path / "home")
    try:
        line.json("up", "--port", str(free_port()))
        yield line
    finally:
        line.run("down")


def test_a_machine_is_lost_and_restored_from_a_backup_and_the_keys(own: CommandLine, tmp_path: Path) -> None:
    own.json("identity", "add", "olga", "--role", "data-owner")
    own.json("data", "seal", VISITS / "visits.csv", "--schema", VISITS / "schema.yaml", who="olga")
    folder = tmp_path / "backup"
    said = own.run("backup", folder)  # while it runs
    assert said.returncode == 0, said.stderr
    assert "without the key service a backup is noise" in said.stdout
    assert "overwrites nothing" in own.refused("backup", folder)
    assert own.refused("backup", tmp_path / "other", who="olga")
    assert "runs" in own.refused("restore", folder)
    assert "runs" in own.refused("fsck", "--all")
    report = own.json("fsck")
    assert (report["clean"], report["findings"]) == (True, [])
    assert own.run("fsck").stdout.startswith("Everything fits together.")

    own.run("down")
    keys = tmp_path / "kept-apart"
    shutil.copytree(own.home / "authority" / "keys", keys)
    shutil.rmtree(own.home / "authority")
    assert "no key service" in own.refused("restore", folder)
    assert "no key service" in own.refused("fsck")
    (own.home / "authority").mkdir(mode=0o700)
    shutil.copytree(keys, own.home / "authority" / "keys")
    assert "no authority" in own.refused("fsck")
    restored = own.json("restore", folder)
    assert (restored["rolled_back_from"], restored["blobs_lost"]) == (None, [])
    assert own.json("fsck")["clean"]
    own.json("up", "--port", str(free_port()))
    assert own.json("data", "verify", "visits@1", who="olga")

    # What is broken is named, and the exit code says so.
    own.run("down")
    blob = next(path for path in own.blobs() if "train" in path.name)
    blob.unlink()
    found = own.run("fsck", "--json")
    assert found.returncode == 1
    assert blob.name in found.stdout
    assert json.loads(found.stdout)["clean"] is False
    stray = blob.with_name("stray.parquet")
    stray.write_bytes(b"left over")
    assert "restore FOLDER --blobs" in own.refused("fsck", "--repair", "--all")  # what it cannot mend stays said
    assert not stray.exists()
    assert own.json("restore", folder, "--blobs") == {"blobs_put": 1, "blobs_lost": []}
    assert own.json("fsck")["clean"]
