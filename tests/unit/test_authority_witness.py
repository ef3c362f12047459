"""Witnesses on a disk and over real TLS, and an authority that shows them its log."""

from __future__ import annotations

import contextlib
import logging
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey
from sqlalchemy import select

from cloister.audit import checkpoint, cosignature, export
from cloister.audit.cosignature import WitnessKey
from cloister.audit.event import Event
from cloister.audit.witness import MAX_REQUEST_BYTES, Answer, Witness
from cloister.authority.core import Core
from cloister.authority.journal import LOG_ORIGIN, Journal
from cloister.authority.log import read_export
from cloister.authority.witness import FileWitness, HttpWitness, RollbackError, Witnessing, WitnessSettings, keep
from cloister.errors import InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.signing import certificates
from cloister.stores.database import Database
from cloister.stores.keys import EmbeddedKeys
from cloister.stores.tables import log_checkpoints
from waiting import wait_for

KEY = SigningKey(bytes(32))
VERIFIER_KEY = Journal(KEY).verifier_key
WITNESS_KEY = SigningKey(b"\x07" * 32)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    core = opened(tmp_path / "authority")
    yield core
    core.database.close()


def opened(directory: Path) -> Core:
    directory.mkdir(exist_ok=True)
    return Core(database=Database(directory / "state.db"), keys=EmbeddedKeys(directory / "keys"), journal=Journal(KEY))


def grow(core: Core, count: int, actor: str = "ada") -> int:
    """The size after it."""
    one = Event(time="2026-11-22T09:30:00.000Z", actor=actor, action="a:b", resource="c/d", outcome="success")
    with core.database.transaction() as connection:
        return core.journal.append(connection, [one] * count).size


def stored(core: Core) -> dict[int, str]:
    with core.database.reading() as connection:
        return {row.size: row.note for row in connection.execute(select(log_checkpoints))}


def file_witness(directory: Path) -> FileWitness:
    return FileWitness(directory, log_verifier_key=VERIFIER_KEY)


def errors(witnessing: Witnessing) -> list[Exception | None]:
    return [report.error for report in witnessing.cosign_now()]


# ---- in a folder ----


def test_a_file_witness_cosigns_what_grows_and_remembers_it(core: Core, tmp_path: Path) -> None:
    for _ in range(3):
        size = grow(core, 5)
        witness = file_witness(tmp_path / "witness")  # a new process each time, which knows only what is on the disk
        witnessing = Witnessing(core, [witness])
        assert errors(witnessing) == [None]
        assert witnessing.reports[0].size == witness.size == size
        note = stored(core)[size]
        assert len(cosignature.require_cosigned(note, [witness.key])) == 1
        assert checkpoint.verify(note, bytes(KEY.verify_key), LOG_ORIGIN).size == size
    assert len(stored(core)) == 3
    assert (tmp_path / "witness" / "witness.pub").read_text().strip() == witness.key.to_text()
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "witness").iterdir()} == {0}


def test_an_export_tells_up_to_where_a_witness_has_seen_the_log(core: Core, tmp_path: Path) -> None:
    grow(core, 5)
    witness = file_witness(tmp_path / "witness")
    Witnessing(core, [witness]).cosign_now()
    grow(core, 5)
    header, entries = read_export(core.database, VERIFIER_KEY)
    report = export.verify_export(header, entries, witnesses=[witness.key])
    assert (report.size, report.checkpoints_checked) == (10, 2)
    assert [(one.witness, one.size) for one in report.witnessed] == [(witness.key.name, 5)]
    assert abs(report.witnessed[0].timestamp - time.time()) < 60
    stranger = WitnessKey("stranger", bytes(WITNESS_KEY.verify_key))
    with pytest.raises(IntegrityError, match="cosigned by stranger"):
        export.verify_export(*read_export(core.database, VERIFIER_KEY), witnesses=[stranger])


def test_an_old_database_is_a_rollback_that_is_said_loudly(
    core: Core, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grow(core, 5)
    core.database.close()
    shutil.copytree(tmp_path / "authority", tmp_path / "old")
    witness = file_witness(tmp_path / "witness")
    again = opened(tmp_path / "authority")
    running = Witnessing(again, [witness])
    assert errors(running) == [None]
    grow(again, 5)
    assert errors(running) == [None]
    old = opened(tmp_path / "old")
    with caplog.at_level(logging.CRITICAL):
        (error,) = errors(Witnessing(old, [witness]))
    assert isinstance(error, RollbackError)
    assert "rollback" in caplog.text
    assert witness.size == 10
    assert stored(old) == {}
    # Longer than what was seen, but not its continuation.
    grow(old, 20, actor="mallory")
    (error,) = errors(Witnessing(old, [witness]))
    assert isinstance(error, IntegrityError)
    assert "fork" in str(error)
    # Exactly as long.
    shutil.rmtree(tmp_path / "witness")
    fresh = file_witness(tmp_path / "witness")
    assert errors(Witnessing(old, [fresh])) == [None]
    grow(again, 15)
    (error,) = errors(Witnessing(again, [fresh]))
    assert "fork" in str(error)
    for one in (again, old):
        one.database.close()


def test_a_running_authority_notices_that_its_database_was_put_back(core: Core, tmp_path: Path) -> None:
    grow(core, 5)
    witness = file_witness(tmp_path / "witness")
    witnessing = Witnessing(core, [witness])
    witnessing.cosign_now()
    witnessing._core = other = opened(tmp_path / "other")  # as if the file under it had been replaced
    grow(other, 3)
    assert isinstance(errors(witnessing)[0], RollbackError)
    other.database.close()


def test_a_witness_that_lost_its_memory_does_not_begin_anew(core: Core, tmp_path: Path) -> None:
    grow(core, 5)
    Witnessing(core, [file_witness(tmp_path / "witness")]).cosign_now()
    latest = tmp_path / "witness" / "latest.note"
    kept = latest.read_bytes()
    for damage in (latest.unlink, lambda: latest.write_bytes(kept[:50]), lambda: latest.write_bytes(b"\xff")):
        damage()
        grow(core, 1)
        assert isinstance(errors(Witnessing(core, [file_witness(tmp_path / "witness")]))[0], IntegrityError)
    with pytest.raises(IntegrityError, match="another key"):
        FileWitness(tmp_path / "witness", log_verifier_key=Journal(SigningKey(b"\x01" * 32)).verifier_key)
    (tmp_path / "witness" / "witness.key").write_text("x")
    with pytest.raises(IntegrityError, match="damaged"):
        file_witness(tmp_path / "witness")


def test_two_processes_of_one_witness_take_turns(core: Core, tmp_path: Path) -> None:
    grow(core, 5)
    witnesses = [Witnessing(core, [file_witness(tmp_path / "witness")]) for _ in range(4)]
    threads = [threading.Thread(target=one.cosign_now) for one in witnesses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.reports[0].error for one in witnesses] == [None] * 4
    assert file_witness(tmp_path / "witness").size == 5


def test_a_newer_entry_of_another_authority_is_no_rollback(core: Core, tmp_path: Path) -> None:
    """The witness is told of a newer head between our look at the log and our question."""
    grow(core, 5)
    witness = file_witness(tmp_path / "witness")

    class Late:
        key = witness.key
        asked = 0

        def add_checkpoint(self, body: bytes) -> Answer:
            self.asked += 1
            if self.asked == 1:
                grow(core, 5)
                Witnessing(core, [witness]).cosign_now()
            return witness.add_checkpoint(body)

    assert errors(Witnessing(core, [Late()])) == [None]
    assert witness.size == 10


# ---- over HTTPS ----


class Handler(BaseHTTPRequestHandler):
    """What a witness's server does around `Witness`."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/prefix/add-checkpoint"
        answer = self.server.twist(self.server.judge(body))
        raw = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Server:
    """A witness behind TLS on a real socket; `twist` may spoil its answers."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        ca_key, key = certificates.new_private_key(), certificates.new_private_key()
        ca = certificates.new_ca(ca_key, "witness CA")
        issued = certificates.issue(ca_key, ca, certificates.signing_request(key, "w"), hosts=("127.0.0.1",))
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(ca)
        (directory / "tls.pem").write_bytes(issued)
        (directory / "tls.key").write_bytes(key)
        self.witness = Witness("w.example", WITNESS_KEY, {LOG_ORIGIN: bytes(KEY.verify_key)})
        self.known: str | None = None
        self._lock = threading.Lock()
        self._http: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.judge, self._http.twist = self.judge, lambda answer: self.twist(answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "tls.pem", directory / "tls.key")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._http.server_address[1]}/prefix"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def judge(self, body: bytes) -> Answer:
        with self._lock:
            answer = self.witness.add_checkpoint(body, self.known, int(time.time()))
            self.known = answer.latest or self.known
            return answer

    def twist(self, answer: Answer) -> Answer:
        return answer

    def client(self, **options: Any) -> HttpWitness:
        return HttpWitness(self.url, self.witness.verifier_key, **{"ca_path": self.ca, **options})

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    yield server
    server.close()


def test_an_http_witness_cosigns_beside_a_file_witness(core: Core, server: Server, tmp_path: Path) -> None:
    with contextlib.closing(server.client()) as remote:
        here = file_witness(tmp_path / "witness")
        witnessing = Witnessing(core, [remote, here])
        for count in (3, 300):
            size = grow(core, count)
            assert errors(witnessing) == [None, None]
            assert len(cosignature.require_cosigned(stored(core)[size], witnessing.keys)) == 2
            note = stored(core)[size]
            assert errors(witnessing) == [None, None]  # nothing new: nobody is asked
            assert stored(core)[size] == note
        # A new process of the authority, which does not know what the witness has seen.
        size = grow(core, 7)
        assert errors(Witnessing(core, [remote])) == [None]
        assert server.known is not None
        assert checkpoint.parse(checkpoint.split(server.known)[0]).size == size


def test_an_http_witness_sees_a_rollback(core: Core, server: Server, tmp_path: Path) -> None:
    grow(core, 9)
    with contextlib.closing(server.client()) as remote:
        assert errors(Witnessing(core, [remote])) == [None]
        other = opened(tmp_path / "other")
        grow(other, 4)
        assert isinstance(errors(Witnessing(other, [remote]))[0], RollbackError)
        grow(other, 5, actor="mallory")
        assert "fork" in str(errors(Witnessing(other, [remote]))[0])
        grow(other, 5)
        assert "fork" in str(errors(Witnessing(other, [remote]))[0])
        other.database.close()


def test_a_false_cosignature_is_not_kept(core: Core, server: Server) -> None:
    grow(core, 3)
    liar = Witness("w.example", SigningKey(b"\x08" * 32), {LOG_ORIGIN: bytes(KEY.verify_key)})

    def another_key(answer: Answer) -> Answer:
        with core.database.reading() as connection:
            text = checkpoint.split(core.journal.head(connection).note)[0]
        return Answer(200, cosignature.cosign(text, liar._key, "w.example", 5))

    def another_text(_answer: Answer) -> Answer:
        return Answer(200, cosignature.cosign("other\n1\nx\n", WITNESS_KEY, "w.example", 5))

    twists = (
        another_key, another_text, lambda _: Answer(200, ""), lambda _: Answer(200, "junk\n"),
        lambda answer: Answer(200, answer.body[:-9] + "AAAAAAA=\n"),
    )  # fmt: skip
    with contextlib.closing(server.client()) as remote:
        for twist in twists:
            server.known = None
            server.twist = twist  # type: ignore[method-assign]
            assert isinstance(errors(Witnessing(core, [remote]))[0], IntegrityError)
    assert stored(core) == {}


def test_a_witness_that_does_not_answer_well_is_only_unavailable(core: Core, server: Server, tmp_path: Path) -> None:
    grow(core, 3)
    answers = (
        Answer(404, "no"), Answer(403, "no"), Answer(500, "x"), Answer(409, "x"), Answer(409, "07\n"), Answer(302, ""),
        Answer(409, "1\n"), Answer(200, "x" * (MAX_REQUEST_BYTES + 1)),
    )  # fmt: skip
    with contextlib.closing(server.client()) as remote:
        for answer in answers:
            server.twist = lambda _, answer=answer: answer  # type: ignore[method-assign]
            assert isinstance(errors(Witnessing(core, [remote]))[0], UnavailableError), answer.status
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(certificates.new_ca(certificates.new_private_key(), "stranger"))
    for untrusted in (stranger, None):
        with contextlib.closing(server.client(ca_path=untrusted)) as remote:
            assert isinstance(errors(Witnessing(core, [remote]))[0], UnavailableError)
    server.close()
    with contextlib.closing(server.client()) as remote:
        assert isinstance(errors(Witnessing(core, [remote]))[0], UnavailableError)


def test_a_witness_without_tls_or_with_a_wrong_key_is_refused(server: Server, tmp_path: Path) -> None:
    for url, key, ca in (
        (server.url.replace("https", "http"), server.witness.verifier_key, server.ca),
        (server.url, VERIFIER_KEY, server.ca),
        (server.url, server.witness.verifier_key, tmp_path / "missing.pem"),
    ):
        with pytest.raises(InputError):
            HttpWitness(url, key, ca_path=ca)


# ---- in the authority ----


def test_one_failing_witness_does_not_keep_the_others_from_being_asked(
    core: Core, server: Server, tmp_path: Path
) -> None:
    size = grow(core, 3)
    server.twist = lambda _: Answer(500, "")  # type: ignore[method-assign]
    here = file_witness(tmp_path / "witness")
    with contextlib.closing(server.client()) as remote:
        failed, fine = errors(Witnessing(core, [remote, here]))
    assert isinstance(failed, UnavailableError)
    assert fine is None
    assert cosignature.require_cosigned(stored(core)[size], [here.key])


def test_it_goes_on_in_the_background_until_it_is_stopped(core: Core, tmp_path: Path) -> None:
    grow(core, 3)
    witness = file_witness(tmp_path / "witness")
    witnessing = Witnessing(core, [witness], interval_s=0.01)
    witnessing.start()
    try:
        for size in (3, 7):
            wait_for(lambda size=size: size in stored(core))
            grow(core, 4)
    finally:
        witnessing.stop()
    size = grow(core, 1)
    time.sleep(0.1)
    assert size not in stored(core)


def test_only_what_this_log_signed_and_a_known_witness_saw_is_kept(core: Core, tmp_path: Path) -> None:
    grow(core, 3)
    with core.database.reading() as connection:
        note = core.journal.head(connection).note
    key = WitnessKey("w.example", bytes(WITNESS_KEY.verify_key))

    def cosigned(text: str) -> str:
        return text + cosignature.cosign(checkpoint.split(text)[0], WITNESS_KEY, "w.example", 5)

    with pytest.raises(NotFoundError):
        keep(core, note, [key])
    with pytest.raises(NotFoundError):
        keep(core, cosigned(note), [])
    other = checkpoint.Checkpoint(LOG_ORIGIN, 3, b"x" * 32), checkpoint.Checkpoint(LOG_ORIGIN, 9, b"x" * 32)
    for false in other:
        for by in (KEY, SigningKey(b"\x01" * 32)):
            with pytest.raises(IntegrityError):
                keep(core, cosigned(checkpoint.sign(false, by, LOG_ORIGIN)), [key])
    assert stored(core) == {}
    stranger = cosignature.cosign(checkpoint.split(note)[0], SigningKey(b"\x09" * 32), "stranger", 5)
    for _ in range(2):
        assert keep(core, cosigned(note) + stranger, [key]) == 3
        assert stored(core) == {3: cosigned(note)}


def test_settings_name_a_folder_a_url_or_a_key(server: Server, tmp_path: Path) -> None:
    key, here = WitnessSettings(folder=tmp_path / "witness").open(VERIFIER_KEY)
    assert isinstance(here, FileWitness)
    assert here.key == key
    key, there = WitnessSettings(url=server.url, key=server.witness.verifier_key, ca=server.ca).open(VERIFIER_KEY)
    assert isinstance(there, HttpWitness)
    there.close()
    assert WitnessSettings(key=server.witness.verifier_key).open(VERIFIER_KEY) == (key, None)
    folder, known = tmp_path / "w", server.witness.verifier_key
    for wrong in ({}, {"folder": folder, "key": known}, {"url": "https://x"}, {"key": known, "ca": folder},
                  {"folder": folder, "url": "https://x"}, {"keys": known}):  # fmt: skip
        with pytest.raises(ValueError, match=r"witness|extra"):
            WitnessSettings(**wrong)
