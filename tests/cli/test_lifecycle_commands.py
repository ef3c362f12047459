"""A person's rows are erased and corrected by the real command line; the certificate is read and checked offline."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import clinic
from command_line import ROOT, CommandLine


@pytest.fixture(scope="module")
def sealed(line: CommandLine) -> Path:
    """A folder with the clinic's table, sealed as clinic@1."""
    folder = line.home.parent / "clinic"
    folder.mkdir()
    (folder / "clinic.csv").write_bytes(clinic.rows())
    (folder / "schema.yaml").write_text(yaml.safe_dump(clinic.SCHEMA))
    line.json("data", "seal", folder / "clinic.csv", "--schema", folder / "schema.yaml", who="olga")
    return folder


def typed(line: CommandLine, *words: str | Path, said: str) -> subprocess.CompletedProcess[str]:
    """A command of olga's, with this on its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "cloister.cli", *map(str, words)], input=said, capture_output=True, text=True,
        timeout=300, env={"PATH": "/usr/bin", "CLOISTER_HOME": str(line.home), "CLOISTER_AS": "olga"}, cwd=ROOT,
    )  # fmt: skip


def test_erasing_and_correcting_by_hand(line: CommandLine, sealed: Path) -> None:
    nobody = line.refused("data", "erase", "clinic", "--subject", "no such patient", who="olga")
    assert "no live version" in nobody
    assert "no such patient" not in nobody
    done = typed(line, "data", "erase", "clinic", "--subject", "-", said=clinic.person(7) + "\n")
    assert done.returncode == 0, done.stderr
    assert "Erased 2 rows of 1 subject(s) from clinic." in done.stdout
    assert "clinic@2" in done.stdout
    assert clinic.person(7) not in done.stdout + done.stderr
    (sealed / "gone.txt").write_text(f"{clinic.person(8)}\n\n{clinic.person(999)}\n")
    done = line.run("data", "erase", "clinic", "--subjects-file", sealed / "gone.txt", who="olga")
    assert "1 of 2 subjects are in no live version." in done.stdout
    wrong = line.refused("data", "rectify", "clinic", "--subject", clinic.person(9), "--set", "age=9000", who="olga")
    assert "9000" not in wrong
    fixed = typed(line, "data", "rectify", "clinic", "--subject", clinic.person(9), "--set", "age=-", said="90\n")
    assert "Corrected 1 column(s) in 2 rows of clinic." in fixed.stdout
    shown = line.run("data", "show", "clinic@4", who="olga").stdout
    drawn = [line.split(", about ")[1][:7] for line in shown.splitlines() if ", about " in line and "clinic@" in line]
    assert drawn == ["60 rows"] * 4, "erasing does not change what is published"
    exact = re.search(r"exactly (\d+) and (\d+)", shown)
    assert exact is not None
    assert int(exact[1]) + int(exact[2]) == 56
    assert "exactly" not in line.run("data", "show", "clinic@4", who="ed").stdout
    states = [each["state"] for each in line.json("data", "list", who="olga") if each["dataset"].startswith("clinic@")]
    assert states == ["ended", "ended", "ended", "live"]


def test_a_certificate_is_checked_offline(line: CommandLine, sealed: Path) -> None:
    done = line.json("data", "erase", "clinic", "--subject", clinic.person(11), who="olga")
    assert done["rows"] == 2
    erasure = done["erasure"]
    file = sealed / "certificate.json"
    told = line.run("data", "certificate", erasure, "--to", file, who="olga").stdout
    assert "about 60 rows. Nobody can open it any more." in told
    assert "Signed by this authority's release key" in told
    offline = CommandLine(line.home.parent / "elsewhere")
    (offline.home / "client").mkdir(parents=True, mode=0o700)
    pinned = (line.home / "client" / "authority.json").read_bytes()
    (offline.home / "client" / "authority.json").write_bytes(pinned)
    assert offline.json("data", "certificate", file)["facts"]["dataset"] == "clinic"
    envelope = json.loads(file.read_bytes())
    file.write_text(json.dumps(envelope | {"payload": envelope["payload"][:-8] + "AAAAAAA="}))
    assert "signed" in offline.refused("data", "certificate", file)


def test_before_its_time_nothing_expires_on_one_persons_word(line: CommandLine, sealed: Path) -> None:
    assert sealed.is_dir()
    newest = line.json("data", "list", who="olga")[-1]["dataset"]
    assert "is kept until" in line.refused("data", "expire", newest, who="olga")
