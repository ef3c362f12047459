"""The README's session about access, as it stands there, and what is refused on the way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import CommandLine, readme_session

SITE = """@id("no-training-at-night")
forbid (principal, action == Action::"train:submit", resource is Dataset)
when { context.time < 0 };
"""


@pytest.fixture(scope="module")
def folder(line: CommandLine) -> Path:
    """Where the commands are typed: with `cloister` on the path and a site's policies."""
    folder = line.home.parent / "typed"
    folder.mkdir()
    (folder / "cloister").write_text(f'#!/bin/sh\nexec {sys.executable} -m cloister.cli "$@"\n')
    (folder / "cloister").chmod(0o755)
    (folder / "policies.cedar").write_text(SITE)
    return folder


def test_the_readmes_access_session(line: CommandLine, folder: Path) -> None:
    line.json("identity", "revoke", "sofia")  # the session registers its own; names are not given twice
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "CLOISTER_HOME": str(line.home)}
    said = {}
    session = readme_session("access")
    assert len(session) > 15
    for command, wanted in session:
        typed = command.replace("sofia", "susan")
        if "APPROVAL" in typed:
            typed = typed.replace("APPROVAL", re.findall(r"apr-[0-9a-f]+", said["cloister approvals list"])[0])
            line.refused("approve", typed.split()[2], who="ed")  # not for oneself
        done = subprocess.run(
            ["bash", "-c", typed], env=environment, capture_output=True, text=True, timeout=300, cwd=folder
        )
        assert done.returncode == wanted, f"{typed}: {done.stdout}{done.stderr}"
        said[" ".join(command.split()[:3])] = done.stdout
    assert "operator (lent)" in said["cloister identity list"]
    assert "resource.owner is olga" in said["cloister policy explain"]
    assert "carl" not in (folder / "log.jsonl").read_text()


def test_a_revoked_person_is_out_and_says_why(line: CommandLine) -> None:
    line.json("identity", "add", "rex", "--role", "auditor")
    line.json("identity", "list", who="rex")
    line.json("identity", "revoke", "rex")
    assert "does not know" in line.refused("identity", "list", who="rex")


def test_the_last_operator_stays(line: CommandLine) -> None:
    assert "nobody would be left" in line.refused("identity", "revoke", "operator")
    assert "nobody-changes-their-own-roles" in line.refused("identity", "roles", "operator", "--role", "auditor")


def test_who_has_access_is_not_forgotten(line: CommandLine) -> None:
    line.json("identity", "add", "sue", "--role", "security-officer")
    assert "still has access" in line.refused("identity", "forget", "rita", who="sue")


def test_a_policy_that_takes_a_shipped_name_or_does_not_parse_is_refused(line: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "p.cedar"
    for text in (
        SITE.replace("no-training-at-night", "engineers-train-and-release"),
        "permit(",
        SITE.replace("time", "tim"),
    ):
        file.write_text(text)
        line.refused("policy", "validate", file)


def test_what_nobody_can_lend_or_register(line: CommandLine) -> None:
    line.refused("access", "request", "--role", "king", "--for", "1h", "--reason", "x", who="ed")
    line.refused("access", "request", "--role", "engineer", "--for", "1h", "--reason", "x", who="ed")
    line.refused("access", "request", "--role", "operator", "--for", "99h", "--reason", "x", who="ed")
    line.refused("identity", "add", "kim", "--role", "reviewer", "--issuer", "https://x.example")
    line.refused("login", who="ed")
    line.refused("login", "--issuer", "https://nobody.example")
    line.refused("node", "add", "Local", "--region", "eu")


def test_keys_are_listed_and_rotated(line: CommandLine) -> None:
    shown = {each["name"]: each for each in line.json("key", "list")}
    assert (shown["dataset/adult"]["use"], shown["dataset/adult"]["newest"]) == ("wrap", 1)
    assert (shown["release"]["use"], shown["release"]["keys"]) == ("sign", None)
    said = line.run("key", "rotate", "dataset/adult")
    assert said.returncode == 0
    assert f"dataset/adult is at version 2: {shown['dataset/adult']['keys']} keys" in said.stdout
    assert "No data was touched." in said.stdout
    rotated = line.json("key", "rotate", "--all")
    assert {each["name"]: each["version"] for each in rotated}["dataset/adult"] == 3
    assert "1 to 3" in line.run("key", "list").stdout
    line.refused("key", "rotate")
    line.refused("key", "rotate", "release")
    line.refused("key", "rotate", "dataset/adult", "--tokens")
    line.refused("key", "rotate", "dataset/adult", who="ed")
    line.refused("key", "list", who="carl")
    assert line.json("data", "verify", "adult@1", who="olga")
