"""A database that is full, read-only, locked, hung, crashed or cut off: an error in time, no effect, and then it works.

Every outage is a real one: a full tmpfs or a limit of the kernel's, stopped processes, a server killed by its owner.
A test that would wait for ever is ended by its time limit.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, text

from authority_world import Person, World, lease_body
from cloister.errors import UnavailableError
from cloister.stores import engines
from cloister.stores.database import Database
from cloister.stores.tables import budgets
from databases import Place, add, held, set_limits
from postgres import Server, running

LOCK_SQLITE = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""
LOCK_POSTGRES = """
import sys, pg8000.native
host, port, user, name, file, lock = sys.argv[1:]
other = pg8000.native.Connection(
    user, host=host, port=int(port), database=name, password=open(file).read(), ssl_context=False
)
other.run(f"SELECT pg_advisory_lock({lock})")
print("locked", flush=True)
sys.stdin.read()
other.run(f"SELECT pg_advisory_unlock({lock})")  # the server takes a moment to see that somebody is gone
other.close()
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what ends by a limit of time: the same order of limits as always, all of them short."""
    set_limits(monkeypatch, BUSY=1.0, STATEMENT=2.0, ANSWER=3.0)


@contextlib.contextmanager
def unavailable(match: str | None = None) -> Iterator[pytest.ExceptionInfo[UnavailableError]]:
    with pytest.raises(UnavailableError, match=match) as caught:
        yield caught


@contextlib.contextmanager
def locked(place: Place) -> Iterator[None]:
    """By another process, which does not let go."""
    if place.server is None:
        command = [LOCK_SQLITE, place.file]
    else:
        where = place.server
        command = [
            LOCK_POSTGRES, "127.0.0.1", str(where.port), "cloister", place.name, where.password_file,
            str(engines.WRITE_LOCK),
        ]  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"locked\n"
        yield
        other.stdin.close()


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own at `folder`, where this machine lets us have one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can make a disk that is small")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a test that failed may have left it open


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Filled to its last byte."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def file_limit(max_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `max_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_until_refused(state: Database) -> list[str]:
    """What was acknowledged, before the first refusal."""
    acknowledged: list[str] = []
    with unavailable():
        while True:
            name = f"{len(acknowledged):06}" + "x" * 2000
            add(state, name)
            acknowledged.append(name)
    return acknowledged


@pytest.fixture(scope="module")
def poor_server() -> Iterator[Server]:
    """One of this file's own, since nobody else should have to work with it."""
    with running() as server:
        yield server


@pytest.fixture
def poor_place(poor_server: Server, tmp_path: Path) -> Iterator[Place]:
    place = Place.new(tmp_path, poor_server)
    yield place
    place.drop()


@pytest.mark.usefixtures("impatient")
def test_a_locked_database(place: Place) -> None:
    state = place.open()
    add(state, "a")
    with locked(place):
        for _ in range(2):
            with unavailable("locked") as caught:
                add(state, "b")
            assert "nothing was changed" in caught.value.hint
        assert held(state) == ["a"]
    add(state, "c")
    assert held(state) == ["a", "c"]


def test_a_full_disk_under_sqlite(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        place = Place({"place": disk / "state.db"})
        state = place.open()
        add(state, "a")
        with full(disk):
            acknowledged = write_until_refused(state)
            with unavailable("is full|disk I/O"):
                add(state, "b")
            assert held(state) == [*acknowledged, "a"]
        add(state, "c")
        place.close()
        assert held(place.open()) == [*acknowledged, "a", "c"]
        place.close()


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    place = Place({"place": tmp_path / "state.db"})
    state = place.open()
    add(state, "a")
    with file_limit(max(file.stat().st_size for file in tmp_path.iterdir()) + 30_000):
        acknowledged = write_until_refused(state)
        assert held(state) == [*acknowledged, "a"]
    add(state, "c")
    place.close()
    assert held(place.open()) == [*acknowledged, "a", "c"]
    place.close()


def test_a_full_disk_under_postgres(tmp_path: Path, poor_server: Server) -> None:
    # A server may not enter pytest's folders, which are closed to others.
    with small_disk(poor_server.folder / f"disk-{os.urandom(4).hex()}", 24) as disk:
        space = poor_server.own(disk / "space")
        poor_server.admin(f"CREATE TABLESPACE small LOCATION '{space}'")
        name = poor_server.new(options="TABLESPACE small")
        place = Place(poor_server.options(name), poor_server)
        try:
            state = place.open()
            add(state, "a")
            with full(disk):
                acknowledged = write_until_refused(state)
                with unavailable("its disk is full"):
                    add(state, "b" * 2000)
                assert held(state) == [*acknowledged, "a"]
            add(state, "c" * 2000)
            assert held(state) == [*acknowledged, "a", "c" * 2000]
        finally:  # the server is for all tests of this file
            place.close()
            poor_server.drop(name)
            poor_server.admin("DROP TABLESPACE small")


def test_a_file_that_became_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        place = Place({"place": disk / "state.db"})
        add(place.open(), "a")
        place.close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with unavailable("Read-only"):
            place.open()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        add(place.open(), "b")
        assert held(place.opened[-1]) == ["a", "b"]
        place.close()


def test_a_server_that_became_read_only(poor_place: Place) -> None:
    state, server = poor_place.open(), poor_place.server
    assert server is not None
    add(state, "a")
    server.set("default_transaction_read_only", "on")
    with unavailable("it is read-only"):
        add(state, "b")
    assert held(state) == ["a"]
    server.set("default_transaction_read_only", None)
    add(state, "c")
    assert held(state) == ["a", "c"]


@pytest.mark.usefixtures("impatient")
def test_a_hung_server(poor_place: Place) -> None:
    state, server = poor_place.open(), poor_place.server
    assert server is not None
    add(state, "a")
    with server.hung():
        for _ in range(2):  # on a connection that was open, and on a new one
            with unavailable():
                add(state, "b")
            with unavailable():
                held(state)
        with unavailable():
            poor_place.open()
    server.settle(poor_place.name)
    assert held(state) == ["a"]
    add(state, "c")
    assert held(state) == ["a", "c"]


def test_a_server_that_crashes_and_comes_back(poor_place: Place) -> None:
    state, server = poor_place.open(), poor_place.server
    assert server is not None
    add(state, "a")
    with unavailable(), state.transaction() as connection:
        connection.execute(insert(budgets).values(ledger="b", epsilon=1.0, delta=1e-5))
        server.stop(signal.SIGQUIT)
    for attempt in (lambda: add(state, "b"), lambda: held(state), poor_place.open):
        with unavailable("cannot be reached"):
            attempt()
    server.start()
    assert held(state) == ["a"]
    add(state, "c")
    assert held(state) == ["a", "c"]


def test_a_server_that_was_restarted_meanwhile_is_not_noticed(poor_place: Place) -> None:
    state, server = poor_place.open(), poor_place.server
    assert server is not None
    add(state, "a")
    server.restart()
    assert held(state) == ["a"]
    server.restart()
    add(state, "b")
    assert held(state) == ["a", "b"]


def test_a_connection_that_is_ended_in_the_middle(poor_place: Place) -> None:
    state, server = poor_place.open(), poor_place.server
    assert server is not None
    with unavailable(), state.transaction() as connection:
        connection.execute(insert(budgets).values(ledger="a", epsilon=1.0, delta=1e-5))
        server.end_connections(poor_place.name)
        connection.execute(insert(budgets).values(ledger="b", epsilon=1.0, delta=1e-5))
    with unavailable(), state.reading() as connection:
        connection.execute(text("SELECT 1"))
        server.end_connections(poor_place.name)
        connection.execute(text("SELECT 1"))
    assert held(state) == []
    add(state, "c")
    assert held(state) == ["c"]


def test_a_user_who_is_locked_out(poor_place: Place) -> None:
    state, server = poor_place.open(), poor_place.server
    assert server is not None
    add(state, "a")
    poor_place.close()
    server.admin(f"ALTER DATABASE {poor_place.name} ALLOW_CONNECTIONS false")
    for attempt in (lambda: add(state, "b"), lambda: held(state), poor_place.open):
        with unavailable():
            attempt()
    server.admin(f"ALTER DATABASE {poor_place.name} ALLOW_CONNECTIONS true")
    add(state, "c")
    assert held(state) == ["a", "c"]


@contextlib.contextmanager
def cutting(server: Server) -> Iterator[tuple[int, threading.Event]]:
    """A port whose other end is the server. Once told to, it cuts a connection that should say a COMMIT is done."""
    told = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=pump, args=[listener.accept()[0]], daemon=True).start()

    def pump(here: socket.socket) -> None:
        with here, socket.create_connection(("127.0.0.1", server.port)) as there:
            while True:
                for ready in select.select([here, there], [], [])[0]:
                    message = ready.recv(1 << 16)
                    if not message or (told.is_set() and ready is there and b"COMMIT\0" in message):
                        return
                    (there if ready is here else here).sendall(message)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], told
        listener.shutdown(socket.SHUT_RDWR)


def test_a_commit_without_an_answer_is_not_called_undone(poor_place: Place) -> None:
    add(poor_place.open(), "a")
    assert poor_place.server is not None
    with cutting(poor_place.server) as (port, told):
        place = str(poor_place.options["place"]).replace(f":{poor_place.server.port}/", f":{port}/")
        state = Database(**poor_place.options | {"place": place})
        told.set()
        with unavailable() as caught:
            add(state, "b")
        assert caught.value.hint == "look in the log whether it was done"
        state.close()
    assert held(poor_place.open()) == ["a", "b"]


def test_an_authority_that_is_cut_off_gives_the_lock_back(poor_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only who is cut off runs out of time here, even where the machine does: the other waits for the lock.
    set_limits(monkeypatch, IDLE=2, BUSY=10, STATEMENT=15, ANSWER=20)
    stuck, other = poor_place.open(), poor_place.open()
    with unavailable(), stuck.transaction() as connection:
        connection.execute(insert(budgets).values(ledger="a", epsilon=1.0, delta=1e-5))
        add(other, "b")
        connection.execute(text("SELECT 1"))
    assert held(other) == ["b"]
    add(stuck, "c")
    assert held(other) == ["b", "c"]


# ---- the authority, when its database is out ----


@contextlib.contextmanager
def no_room(place: Place) -> Iterator[None]:
    with file_limit(4096):
        yield


@contextlib.contextmanager
def hung(place: Place) -> Iterator[None]:
    assert place.server is not None
    with place.server.hung():
        yield


@contextlib.contextmanager
def read_only(place: Place) -> Iterator[None]:
    assert place.server is not None
    place.server.set("default_transaction_read_only", "on")
    try:
        yield
    finally:
        place.server.set("default_transaction_read_only", None)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("outage", [locked, no_room, hung, read_only], ids=lambda each: each.__name__)
def test_an_authority_without_its_database_says_so_and_changes_nothing(
    world: World, outage: Callable[[Place], contextlib.AbstractContextManager[None]]
) -> None:
    if world.place.server is None and outage in (hung, read_only):
        pytest.skip("PostgreSQL only: SQLite has no server that could hang or refuse to write")
    if world.place.server is not None and outage is no_room:
        pytest.skip("the limit is this process's own, and not the server's: see the test of a full disk")
    person = Person("new", ["consumer"])
    newcomer = {"name": person.name, "roles": person.roles, "public_key": person.public}
    run = world.submit()
    world.attempt(run)
    asked: list[Callable[[], Any]] = [
        lambda: world.ask("operator", "POST", "/v1/identities", newcomer),
        lambda: world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body()),
        lambda: world.ask("carl", "POST", "/v1/identities", newcomer),  # not even a refusal without a record
        lambda: world.exchange(world.assertion("ed")),
    ]
    for name in ("operator", "carl", run):
        world.token(name)
    before = world.content(), world.entries()
    with outage(world.place):
        for ask in asked:
            answer = ask()
            assert answer.status_code == 503, answer.text
            assert answer.json()["kind"] == "UnavailableError"
    if world.place.server:
        world.place.server.settle(world.place.name)
    assert (world.content(), world.entries()) == before
    assert [ask().status_code for ask in asked] == [200, 200, 403, 200]
