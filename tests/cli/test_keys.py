"""The key services that `cloister up` starts with: real processes, a real terminal."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import ROOT, CommandLine
from ports import free_port
from vault_server import VaultServer

PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[CommandLine]:
    """A home of its own, in which nothing runs yet."""
    (tmp_path / "home").mkdir(mode=0o700)
    line = CommandLine(tmp_path / "home")
    yield line
    line.run("down")


def settings(line: CommandLine, text: str) -> None:
    (line.home / "config.yaml").write_text(text)


def test_a_passphrase_in_a_file_opens_the_authority(own: CommandLine, tmp_path: Path) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE + "\n")
    secret.chmod(0o600)
    settings(own, f"authority: {{keys: {{kind: embedded, passphrase: true, passphrase_file: {secret}}}}}")
    own.json("up", "--port", str(free_port()))
    assert own.json("key", "list")
    assert not (own.home / "authority" / "keys" / "root.key").exists()
    own.run("down")
    secret.write_text("another passphrase")
    assert "does not open the root key" in own.refused("up", "--port", str(free_port()))
    settings(own, "authority: {keys: {kind: embedded, passphrase: true}}")
    assert "nobody is there" in own.refused("up", "--port", str(free_port()))
    assert "nobody is there" in own.refused("fsck")
    assert b"battery" not in b"".join(file.read_bytes() for file in own.home.rglob("*") if file.is_file())


def test_a_passphrase_is_asked_for_on_a_terminal(own: CommandLine) -> None:
    settings(own, "authority: {keys: {kind: embedded, passphrase: true}}")
    words = ["-m", "cloister.cli", "up", "--port", str(free_port())]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *words], os.environ | {"CLOISTER_HOME": str(own.home)})  # noqa: S606
    shown, answers = b"", 0
    while True:
        try:
            shown += os.read(terminal, 1024)
        except OSError:  # it closed its end
            break
        if shown.count(b": ") > answers and answers < 2:
            answers += 1
            os.write(terminal, PASSPHRASE.encode() + b"\n")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    os.close(terminal)
    assert PASSPHRASE.encode() not in shown
    assert (own.home / "authority" / "keys" / "root.sealed").exists()
    assert own.json("key", "list")


def test_an_authority_with_a_vault_keeps_no_key_at_home(
    own: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VaultServer(tmp_path) as vault:
        monkeypatch.setenv("VAULT_ADDR", vault.address)
        monkeypatch.setenv("VAULT_CACERT", str(vault.ca))
        settings(own, "authority: {keys: {kind: vault}}")
        assert "VAULT_TOKEN" in own.refused("up", "--port", str(free_port()))
        monkeypatch.setenv("VAULT_TOKEN", vault.token())
        own.json("up", "--port", str(free_port()))
        assert not (own.home / "authority" / "keys").exists()
        assert {each["name"] for each in own.json("key", "list")} == {"release"}
        vault.sealed = True
        assert "sealed" in own.refused("key", "rotate", "models")
        vault.sealed = False
        own.run("down")
        vault.revoke_all()
        assert "refuses" in own.refused("up", "--port", str(free_port()))
