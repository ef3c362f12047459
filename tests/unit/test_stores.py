"""Storage is untrusted, full, locked, or in the hands of somebody else."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import DBAPIError

from cloister.errors import CloisterError, InputError, UnavailableError
from cloister.signing import certificates
from cloister.stores import engines, files, migrations
from cloister.stores.database import Database
from cloister.stores.files import write_atomic
from cloister.stores.tables import budgets, metadata
from databases import Place, add, held, set_limits
from postgres import Server


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- files ----


@pytest.mark.parametrize("failing", ["fsync", "link", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    file = tmp_path / "file"
    if failing != "link":
        write_atomic(file, b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path if failing == "replace" else files.os, failing, fail)
        with pytest.raises(OSError, match="Input/output"):
            write_atomic(file, b"new", replace=failing != "link")
    assert [path.name for path in tmp_path.iterdir()] == ([] if failing == "link" else ["file"])
    if failing != "link":
        assert file.read_bytes() == b"old"


# ---- database ----


def test_the_state_is_closed_to_others_from_its_first_byte(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        state = Database(tmp_path / "state.db")
        with state.transaction() as connection:
            connection.execute(insert(budgets).values(ledger="a", epsilon=1.0, delta=1e-5))
            assert {file.name: mode(file) for file in tmp_path.iterdir()} == dict.fromkeys(
                ("state.db", "state.db-wal", "state.db-shm"), 0o600
            )
    finally:
        os.umask(before)
    state.close()


def test_a_path_with_special_characters_is_that_path(tmp_path: Path) -> None:
    Database(tmp_path / "state?mode=memory%20#.db").close()
    assert (tmp_path / "state?mode=memory%20#.db").stat().st_size


def test_an_exception_undoes_the_whole_transaction(place: Place) -> None:
    state = place.open()

    def die() -> None:
        with state.transaction() as connection:
            connection.execute(insert(budgets).values(ledger="a", epsilon=1.0, delta=1e-5))
            raise KeyError

    with pytest.raises(KeyError):
        die()
    assert held(state) == []


def test_a_swallowed_failure_is_never_taken_for_a_commit(place: Place) -> None:
    """PostgreSQL answers a COMMIT after a failed statement with ROLLBACK; that must not look like success."""
    state = place.open()
    add(state, "a")
    acknowledged = True
    try:
        with state.transaction() as connection:
            connection.execute(insert(budgets).values(ledger="b", epsilon=1.0, delta=1e-5))
            with contextlib.suppress(DBAPIError):
                connection.execute(insert(budgets).values(ledger="a", epsilon=1.0, delta=1e-5))
    except UnavailableError:
        acknowledged = False
    assert ("b" in held(state)) == acknowledged


def test_a_locked_database_is_unavailable_in_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines.ANSWER_TIMEOUT_S < 10
    assert engines.BUSY_TIMEOUT_S < engines.STATEMENT_TIMEOUT_S < engines.ANSWER_TIMEOUT_S < engines.IDLE_TIMEOUT_S
    set_limits(monkeypatch, BUSY=2.0)
    state, other = place.open(), place.open()
    with other.transaction() as connection:
        connection.execute(insert(budgets).values(ledger="a", epsilon=1.0, delta=1e-5))
        with pytest.raises(UnavailableError, match="locked"), state.transaction():
            pass
        with ThreadPoolExecutor() as pool, pytest.raises(UnavailableError, match="busy"):
            pool.submit(lambda: other.transaction().__enter__()).result()
        assert held(state) == []  # who reads waits for nobody
    add(state, "b")
    assert held(other) == ["a", "b"]


def test_who_reads_sees_one_moment(place: Place) -> None:
    state = place.open()
    add(state, "a")
    with state.reading() as connection:
        assert connection.execute(select(budgets.c.ledger)).scalars().all() == ["a"]
        add(state, "b")
        assert connection.execute(select(budgets.c.ledger)).scalars().all() == ["a"]
    assert held(state) == ["a", "b"]


def test_who_reads_cannot_write(place: Place) -> None:
    state = place.open()
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"readonly|read-only"), state.reading() as connection:
            connection.execute(insert(budgets).values(ledger="a", epsilon=1.0, delta=1e-5))
    assert held(state) == []
    add(state, "a")


@pytest.mark.parametrize("content", [b"this is not a database, but long enough to be taken for one" * 100])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.db").write_bytes(content)
    with pytest.raises(UnavailableError):
        Database(tmp_path / "state.db")
    assert (tmp_path / "state.db").read_bytes() == content
    with pytest.raises(UnavailableError):
        Database(tmp_path / "no-folder" / "state.db")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk makes nobody give up."""
    set_limits(monkeypatch, BUSY=120, STATEMENT=130, ANSWER=140, IDLE=200)


@pytest.mark.usefixtures("patient")
def test_more_callers_than_connections_all_get_their_turn(place: Place) -> None:
    """Through two that are open at once, as two authorities would be."""
    both = [place.open(), place.open()]
    add(both[0], "a", 0.0)
    failed: list[BaseException] = []

    def count(state: Database) -> None:
        try:
            for _ in range(5):
                with state.transaction() as connection:
                    epsilon = connection.execute(select(budgets.c.epsilon)).scalar_one()
                    connection.execute(budgets.update().values(epsilon=epsilon + 1))
                held(state)
        except CloisterError as error:
            failed.append(error)

    threads = [threading.Thread(target=count, args=(both[each % 2],)) for each in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with both[1].reading() as connection:
        assert connection.execute(select(budgets.c.epsilon)).scalar_one() == 200


def test_no_error_of_a_database_quotes_a_value(place: Place) -> None:
    state, patient = place.open(), secrets.token_hex()
    add(state, patient)
    with pytest.raises(UnavailableError) as caught:
        add(state, patient)
    assert patient not in "".join(traceback.format_exception(caught.value))
    assert "nothing was changed" in caught.value.hint


def test_a_value_that_postgres_cannot_hold_is_the_callers_fault(postgres_place: Place) -> None:
    state = postgres_place.open()
    with pytest.raises(InputError):
        add(state, "a\0b")
    with pytest.raises(InputError), state.reading() as connection:
        connection.execute(select(budgets).where(budgets.c.ledger == "a\0b"))
    add(state, "a")
    assert held(state) == ["a"]


# ---- migrations ----


def test_the_migrations_lead_to_the_tables(place: Place) -> None:
    options = {"compare_type": True, "compare_server_default": True}
    with place.open().reading() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == migrations.HEAD
    config = Config()
    config.set_main_option("script_location", "cloister.stores:migrations")
    assert ScriptDirectory.from_config(config).get_current_head() == migrations.HEAD


def test_a_database_of_a_newer_cloister_is_refused_untouched(place: Place) -> None:
    state = place.open()
    add(state, "a")
    with state.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UnavailableError) as caught:
        place.open()
    assert caught.value.hint.startswith("upgrade Cloister")
    assert held(state) == ["a"]


def test_a_database_of_somebody_else_is_refused_untouched(place: Place) -> None:
    for made in ("CREATE TABLE theirs (a INTEGER)", "CREATE TABLE alembic_version (version_num TEXT)"):
        with place.raw() as connection:
            connection.execute(text(made))
        where = place.options["place"]
        before = where.read_bytes() if isinstance(where, Path) else b""
        with pytest.raises(UnavailableError):
            place.open()
        assert not before or before == where.read_bytes()
        with place.raw() as connection:
            names = inspect(connection).get_table_names()
            assert names == [made.split()[2]]
            connection.execute(text(f"DROP TABLE {names[0]}"))


def test_a_migration_that_fails_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(Operations, "create_index", fail, raising=False)
        with pytest.raises(KeyError):
            place.open()
    with place.raw() as connection:
        assert inspect(connection).get_table_names() == []
    add(place.open(), "a")


@pytest.mark.usefixtures("patient")
def test_two_that_open_a_new_database_at_once_both_can(place: Place) -> None:
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: place.open(), range(4)))
    add(both[0], "a")
    assert held(both[1]) == ["a"]


def test_a_database_that_is_up_to_date_opens_without_alembic(tmp_path: Path) -> None:
    Database(tmp_path / "state.db").close()
    code = (
        "import sys, pathlib; from cloister.stores.database import Database;"
        "Database(pathlib.Path(sys.argv[1])).close(); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "state.db"], check=True)


# ---- PostgreSQL ----


@pytest.mark.parametrize(
    "url",
    [
        "", "state.db", "sqlite:///state.db", "mysql://u@host/n", "postgresql+pg8000://u@host/n", "postgresql://host/n",
        "postgresql://u@host", "postgresql://u@/n", "postgresql://u:password@host/n", "postgresql://u@host:x/n",
        "postgresql://u@127.0.0.1/n?sslmode=disable", "postgresql://u@/n?host=relative", "postgresql://u@h/n?host=/tmp",
    ],
)  # fmt: skip
def test_a_url_that_would_be_half_understood_is_refused(url: str) -> None:
    with pytest.raises(InputError) as caught:
        Database(url)
    assert "password" not in caught.value.message


@pytest.mark.parametrize("permissions", [0o604, 0o640, 0o660])
def test_a_password_that_others_may_read_is_refused(tmp_path: Path, permissions: int) -> None:
    file = tmp_path / "password"
    file.write_text("secret")
    file.chmod(permissions)
    with pytest.raises(InputError, match="others may read"):
        Database("postgresql://u@127.0.0.1/n", password_file=file)
    with pytest.raises(InputError, match="cannot be read"):
        Database("postgresql://u@127.0.0.1/n", password_file=tmp_path / "none")


@contextlib.contextmanager
def listening(answers: list[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Somebody on a port of this machine who gives these answers, and keeps what they are told."""
    heard: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                other, _ = listener.accept()
                with other:
                    for answer in answers:
                        heard.append(other.recv(4096))
                        other.sendall(answer)
                    heard.append(other.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], heard
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("asked", [3, 5], ids=["cleartext", "MD5"])
def test_whoever_listens_instead_of_the_server_does_not_get_the_password(tmp_path: Path, asked: int) -> None:
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("secret\n")
    answer = b"R" + struct.pack("!ii4s", 12, asked, b"salt")
    with listening([answer]) as (port, heard), pytest.raises(UnavailableError):
        Database(f"postgresql://u@127.0.0.1:{port}/n", password_file=file)
    assert [message[8:13] for message in heard if b"user" in message] == [b"user\0"]
    assert not [message for message in heard if message[:1] == b"p"]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 100, b"R\0\0\0\x0c\0\0\0\x63"])
def test_a_strange_server_is_unavailable(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, BUSY=0.3)
    with listening([answer]) as (port, _), pytest.raises(UnavailableError):
        Database(f"postgresql://u@127.0.0.1:{port}/n")


def test_a_server_elsewhere_must_speak_tls(postgres_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is asked here whose answer is not on this machine: what is local is decided by the name alone."""
    monkeypatch.setattr(engines, "_is_loopback", lambda _: False)
    with listening([b"N"]) as (port, heard), pytest.raises(UnavailableError):
        Database(f"postgresql://u@127.0.0.1:{port}/n")
    assert heard[0] == struct.pack("!ii", 8, 80877103)
    assert b"user" not in b"".join(heard)
    options = postgres_server.options("postgres")
    with pytest.raises(UnavailableError):  # a CA that nobody knows
        Database(**options)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls_names_its_server(postgres_server: Server, host: str, tmp_path: Path) -> None:
    name = postgres_server.new()
    options = postgres_server.options(name) | {"ca": postgres_server.ca}
    options["place"] = str(options["place"]).replace("127.0.0.1", host)
    state = Database(**options)
    with state.reading() as connection:
        assert connection.execute(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar_one()
    state.close()
    other = tmp_path / "ca.pem"
    other.write_bytes(certificates.new_ca(certificates.new_private_key(), "test CA"))
    with pytest.raises(UnavailableError):
        Database(**options | {"ca": other})
    with pytest.raises(InputError):
        Database(**options | {"ca": tmp_path / "none.pem"})
    postgres_server.drop(name)


def test_only_this_machine_is_this_machine() -> None:
    local = ["localhost", "127.0.0.1", "127.9.9.9", "::1"]
    assert [engines._is_loopback(host) for host in local] == [True] * 4
    elsewhere = ["localhost.example.org", "127.0.0.1.example.org", "10.0.0.1", "0.0.0.0", "::", "db"]  # noqa: S104
    assert [engines._is_loopback(host) for host in elsewhere] == [False] * 6


def test_a_wrong_password_is_named_but_not_shown(postgres_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("another-secret")
    with pytest.raises(UnavailableError, match="SQLSTATE 28P01") as caught:
        Database(postgres_server.url("postgres"), password_file=file)
    assert "another-secret" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(UnavailableError, match="SQLSTATE 3D000"):
        Database(**postgres_server.options("no_such"))
