"""`cloister audit`, against a true authority's application, and a syslog server on a real TLS socket."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from authority_world import World
from cloister.audit import checkpoint, siem
from cloister.audit.cosignature import WitnessKey
from cloister.audit.event import Event
from cloister.authority.witness import Witnessing
from cloister.cli import audit as commands
from cloister.cli.context import Context
from cloister.errors import CloisterError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.signing import certificates
from cloister.stores.files import write_json


class Command:
    """The commands as an auditor types them on a machine that has met the authority."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *words: object) -> Any:
        done = CliRunner().invoke(commands.audit, [*map(str, words), "--json"])
        if done.exception:
            raise done.exception
        return json.loads(done.stdout)

    def said(self, *words: object) -> str:
        done = CliRunner().invoke(commands.audit, [*map(str, words)])
        if done.exception:
            raise done.exception
        return done.stdout


@pytest.fixture
def run(empty_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    command = Command(tmp_path / "home")
    monkeypatch.setenv("CLOISTER_HOME", str(command.home))
    # Only the socket is left out: the client is the real one, and so is the application that it is led into.
    client = empty_world.client("ada")
    client.token()  # which leaves an entry
    monkeypatch.setattr(Context, "client", lambda _self: client)
    meet(command.home, empty_world)
    return command


def meet(home: Path, world: World) -> None:
    (home / "client").mkdir(parents=True)
    pinned = {"log_verifier_key": world.authority.log.verifier_key}
    write_json(home / "client" / "authority.json", {"url": "https://127.0.0.1:8443", "pinned": pinned})


def test_search_shows_names_and_takes_filters(run: Command) -> None:
    rows = run("search", "--action", "identity:", "--outcome", "success", "--since", "2020-01-01T00:00:00Z")
    assert {row["actor"] for row in rows} == {"operator", "authority"}
    assert run("search", "--until", "2020-01-01T00:00:00Z") == []
    assert run.said("search", "--actor", "nobody") == "No such entry.\n"
    with pytest.raises(InputError):
        run("search", "--since", "yesterday")


def test_an_export_verifies_and_is_remembered(run: Command, tmp_path: Path, empty_world: World) -> None:
    file = tmp_path / "log.jsonl"
    exported = run("export", file)
    assert exported == {"file": str(file), "format": "cloister", "entries": len(empty_world.log())}
    first = run("verify", file)
    assert (first["entries"], first["witnesses"]) == (exported["entries"], [])
    assert "first verification" in first["since"]
    assert "that this machine verified before" in run.said("verify", file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(IntegrityError, match="cut"):
        run("verify", file)
    old = tmp_path / "old.jsonl"
    old.write_bytes(b"".join(lines))
    run("export", file)
    run("verify", file)
    with pytest.raises(IntegrityError, match="rollback"):
        run("verify", old)
    assert [path.name for path in tmp_path.glob(".*partial")] == []


def test_a_log_of_another_key_is_refused(run: Command, tmp_path: Path, empty_world: World) -> None:
    file = tmp_path / "log.jsonl"
    run("export", file)
    other = checkpoint.verifier_key_text("cloister.dev/log", bytes(32))
    with pytest.raises(IntegrityError, match="the one given"):
        run("verify", file, "--log-key", other)
    (run.home / "client" / "authority.json").unlink()
    assert "key alone" in run("verify", file, "--log-key", empty_world.authority.log.verifier_key)["since"]
    assert not (run.home / "client" / "log.json").exists()
    (tmp_path / "log.pub").write_text(empty_world.authority.log.verifier_key + "\n")
    assert run("verify", file, "--log-key", tmp_path / "log.pub")["entries"]
    run("verify", file)  # trusts the key on first use, and remembers it
    file.write_bytes(file.read_bytes().replace(empty_world.authority.log.verifier_key.encode(), other.encode()))
    with pytest.raises(IntegrityError, match="this machine knows"):
        run("verify", file)


def test_other_forms_are_for_collectors(run: Command, tmp_path: Path) -> None:
    ocsf, cef = tmp_path / "ocsf.jsonl", tmp_path / "log.cef"
    entries = run("export", ocsf, "--format", "ocsf")["entries"]
    events = [Event.from_bytes(line) for line in ocsf.read_bytes().splitlines()]
    assert len(events) == entries
    assert run("export", cef, "--format", "cef", "--from", entries)["entries"] == 1
    assert cef.read_text().startswith("CEF:0|Cloister|")
    assert "cannot be verified" in run.said("export", cef, "--format", "cef")
    with pytest.raises(InputError, match="not an export"):
        run("verify", ocsf)
    for words in (("export",), ("export", ocsf, "--syslog", "x"), ("export", ocsf, "--from", 3),
                  ("export", tmp_path / "no" / "folder")):  # fmt: skip
        with pytest.raises(InputError):
            run(*words)
    with pytest.raises(NotFoundError):
        run("verify", tmp_path / "missing")


def test_a_proof_is_a_file_that_needs_no_authority(
    run: Command, tmp_path: Path, empty_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, growth, key = tmp_path / "proof.json", tmp_path / "growth.json", empty_world.authority.log.verifier_key
    for what in ("three", "\u0663", "999999"):
        with pytest.raises(CloisterError):
            run("prove", what, file)
    proven = run("prove", 3, file)
    assert proven["index"] == 3
    with pytest.raises(NotFoundError, match="not verified"):
        run("prove", "growth", growth)
    run("export", tmp_path / "log.jsonl")
    run("verify", tmp_path / "log.jsonl")
    empty_world.exchange(empty_world.assertion("ed"))
    grown = run("prove", "growth", growth)
    assert grown["first"] < grown["second"] == len(empty_world.log())
    monkeypatch.delattr(Context, "client")  # from here on without an authority
    (run.home / "client" / "authority.json").unlink()
    (run.home / "client" / "log.json").unlink()
    with pytest.raises(NotFoundError, match="log's key"):
        run("verify", file)
    seen = run("verify", file, "--log-key", key)
    assert (seen["index"], seen["event"]) == (3, json.loads(empty_world.entries()[3]))
    assert "Entry 3 is in the log" in run.said("verify", file, "--log-key", key)
    assert run("verify", growth, "--log-key", key)["second"] == grown["second"]
    file.write_text(file.read_text().replace('"index": 3', '"index": 4'))
    with pytest.raises(IntegrityError):
        run("verify", file, "--log-key", key)


def test_a_witness_on_another_machine(run: Command, tmp_path: Path, empty_world: World) -> None:
    folder, file = tmp_path / "witness", tmp_path / "log.jsonl"
    seen = run("witness", folder)
    assert seen["taken_by_authority"] is False
    assert "does not know this witness" in run.said("witness", folder)
    key = WitnessKey.parse(seen["witness_key"])
    empty_world.authority.log._witnesses.append(key)  # as the settings do
    empty_world.exchange(empty_world.assertion("ed"))
    seen = run("witness", folder)
    assert seen["taken_by_authority"] is True
    run("export", file)
    report = run("verify", file, "--witness-key", key.to_text())
    assert [(one["witness"], one["entries"]) for one in report["witnesses"]] == [(key.name, seen["entries"])]
    assert "seen by" in run.said("verify", file, "--witness-key", folder / "witness.pub")
    proven = run("prove", 0, tmp_path / "proof.json")
    assert proven["size"] == seen["entries"]
    assert run("verify", tmp_path / "proof.json", "--witness-key", key.to_text())["witnesses"]
    assert empty_world.http.get("/v1/checkpoint").json()["cosigned"].count("\u2014") == 2
    with pytest.raises(IntegrityError, match="not cosigned"):
        run("verify", tmp_path / "proof.json", "--witness-key", WitnessKey("x", key.public).to_text())
    # The authority's database is put back to what it was.
    old = empty_world.copy(tmp_path / "old")
    assert Witnessing(empty_world.authority.core, []).cosign_now() == []
    empty_world.exchange(empty_world.assertion("ed"))
    run("witness", folder)
    empty_world.authority, kept = old.authority, empty_world.authority
    with pytest.raises(IntegrityError, match="rollback"):
        run("witness", folder)
    empty_world.authority = kept
    old.close()


# ---- syslog over TLS ----


class SyslogServer:
    """RFC 5425 on a real socket: takes frames until the sender says goodbye."""

    def __init__(self, directory: Path, serve: Callable[[ssl.SSLSocket, SyslogServer], None] | None = None) -> None:
        directory.mkdir()
        ca_key, key = certificates.new_private_key(), certificates.new_private_key()
        ca = certificates.new_ca(ca_key, "syslog CA")
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(ca)
        issued = certificates.issue(ca_key, ca, certificates.signing_request(key, "s"), hosts=("127.0.0.1",))
        (directory / "tls.pem").write_bytes(issued)
        (directory / "tls.key").write_bytes(key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "tls.pem", directory / "tls.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.messages: list[bytes] = []
        self._serve = serve or SyslogServer.receive
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        plain, _ = self._listener.accept()
        plain.settimeout(20)
        try:
            with self._context.wrap_socket(plain, server_side=True) as secure:
                self._serve(secure, self)
        except OSError:
            return

    def receive(self: Any, server: Any) -> None:
        data = b""
        while part := self.recv(65536):
            data += part
        while data:
            length, _, rest = data.partition(b" ")
            server.messages.append(rest[: int(length)])
            data = rest[int(length) :]
        self.unwrap()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def syslog(tmp_path: Path) -> Iterator[SyslogServer]:
    server = SyslogServer(tmp_path / "syslog")
    yield server
    server.close()


def test_the_log_goes_to_a_syslog_server_over_tls(run: Command, syslog: SyslogServer, empty_world: World) -> None:
    sent = run("export", "--syslog", syslog.address, "--ca", syslog.ca, "--from", 2)
    syslog.thread.join(20)
    entries = empty_world.entries()
    assert sent == {"server": syslog.address, "first": 2, "entries": len(entries) - 2}
    host = socket.gethostname()
    assert syslog.messages == [
        siem.syslog(index, Event.from_bytes(entry), host) for index, entry in enumerate(entries) if index >= 2
    ]
    assert syslog.messages[0].startswith(b"<110>1 ")


def test_a_server_of_another_ca_gets_nothing(run: Command, syslog: SyslogServer, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(certificates.new_ca(certificates.new_private_key(), "stranger"))
    with pytest.raises(UnavailableError, match="0 entries"):
        run("export", "--syslog", syslog.address, "--ca", stranger)
    syslog.thread.join(20)
    assert syslog.messages == []
    with pytest.raises(InputError):
        run("export", "--syslog", syslog.address, "--ca", tmp_path / "missing.pem")


def test_a_server_that_hangs_up_is_no_success(run: Command, tmp_path: Path) -> None:
    server = SyslogServer(tmp_path / "hangs-up", lambda secure, _: secure.close())
    with pytest.raises(UnavailableError, match="did not take the log"):
        run("export", "--syslog", server.address, "--ca", server.ca)
    server.close()
    with pytest.raises(UnavailableError):
        run("export", "--syslog", server.address, "--ca", server.ca)  # nobody listens
    for address in ("127.0.0.1:0", "127.0.0.1:99999"):
        with pytest.raises(InputError):
            run("export", "--syslog", address)


def test_this_machines_own_log_needs_no_authority_that_runs(run: Command, empty_world: World) -> None:
    (run.home / "authority").symlink_to(empty_world.directory)
    if server := empty_world.place.server:
        options = empty_world.place.options
        settings = {"database": options["place"], "database_password_file": str(server.password_file)}
        if options.get("ca"):
            settings["database_ca"] = str(options["ca"])
        (run.home / "config.yaml").write_text(json.dumps({"authority": settings}))
    assert run("verify")["entries"] == len(empty_world.log())
    assert "that this machine verified before" in run("verify")["since"]
    (run.home / "authority" / "log.pub").unlink()
    with pytest.raises(NotFoundError):
        run("verify")
