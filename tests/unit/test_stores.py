"""Storage is untrusted, full, locked, or in the hands of somebody else."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from cloister.errors import CloisterError, ConflictError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.sealing.envelope import new_key
from cloister.stores import database as database_module
from cloister.stores import files
from cloister.stores.blobs import FolderBlobs, check_path
from cloister.stores.database import Database, budgets
from cloister.stores.files import write_atomic
from cloister.stores.keys import EmbeddedKeys


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- blobs ----


def test_a_blob_is_written_once(tmp_path: Path) -> None:
    blobs = FolderBlobs.make(tmp_path / "blobs")
    blobs.put("a/b", b"first")
    with pytest.raises(ConflictError):
        blobs.put("a/b", b"second")
    assert blobs.get("a/b") == b"first"
    assert [path.name for path in (tmp_path / "blobs" / "a").iterdir()] == ["b"]
    assert (mode(tmp_path / "blobs"), mode(tmp_path / "blobs" / "a" / "b")) == (0o700, 0o600)


ESCAPES = ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", ".hidden", "a/.git", "", "a/", "a\x00b", "a\n", "a\\b",
           "~/x", "a b", "ä"]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
def test_a_path_cannot_leave_the_store(tmp_path: Path, path: str) -> None:
    blobs = FolderBlobs.make(tmp_path / "blobs")
    for attempt in (lambda: blobs.put(path, b"x"), lambda: blobs.get(path), lambda: blobs.remove_tree(path)):
        with pytest.raises(InputError):
            attempt()
    assert [file.name for file in tmp_path.rglob("*")] == ["blobs"]


def test_a_path_below_another_folder_is_refused() -> None:
    assert check_path("models/run-1/x", below="models/run-1/") == "models/run-1/x"
    for path in ("models/run-1", "models/run-10/x", "models/run-1x/y", "x/models/run-1/y"):
        with pytest.raises(InputError):
            check_path(path, below="models/run-1/")


def test_a_missing_blob_and_a_full_disk_are_our_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FolderBlobs.make(tmp_path / "blobs")
    with pytest.raises(NotFoundError):
        blobs.get("a")
    blobs.put("folder/a", b"x")
    with pytest.raises(UnavailableError):
        blobs.get("folder")
    with pytest.raises(CloisterError):
        blobs.put("folder/a/b", b"x")
    with pytest.raises(UnavailableError):
        blobs.put("n" * 300, b"x")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="No space left"):
        blobs.put("b", b"x")
    assert sorted(file.name for file in (tmp_path / "blobs").rglob("*")) == ["a", "folder"]


@pytest.mark.parametrize("url", ["http://host/x", "s3://bucket/x", "file://host/x", "/x", ""])
def test_a_store_elsewhere_is_refused(url: str) -> None:
    with pytest.raises(InputError):
        FolderBlobs.from_url(url)


def test_a_store_is_found_again_by_its_url(tmp_path: Path) -> None:
    blobs = FolderBlobs.make(tmp_path / "a folder with % and ä")
    blobs.put("x", b"1")
    assert FolderBlobs.from_url(blobs.url).get("x") == b"1"


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


# ---- keys ----


def test_a_key_ring_does_not_open_under_another_root_key(tmp_path: Path) -> None:
    ring = EmbeddedKeys(tmp_path / "keys")
    ring.store_secret("log", b"secret")
    wrapped = ring.wrap(new_key(), b"here")
    for file in (tmp_path / "keys").iterdir():
        assert mode(file) == 0o600
    text = (tmp_path / "keys" / "keyring.json").read_bytes()
    (tmp_path / "keys" / "root.key").write_bytes(new_key())
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path / "keys")
    assert (tmp_path / "keys" / "keyring.json").read_bytes() == text
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path / "other").unwrap(wrapped, b"here")
    with pytest.raises(IntegrityError):
        ring.unwrap(wrapped, b"elsewhere")


@pytest.mark.parametrize("name", ["root.key", "keyring.json"])
def test_half_a_key_service_is_never_started_anew(tmp_path: Path, name: str) -> None:
    EmbeddedKeys(tmp_path)
    (tmp_path / name).unlink()
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("ring", ["", "[]", "{}", "null", '{"format": "cloister.dev/keyring/v2"}', "\udcff"])
def test_a_damaged_or_newer_key_ring_is_refused(tmp_path: Path, ring: str) -> None:
    EmbeddedKeys(tmp_path)
    whole = json.loads((tmp_path / "keyring.json").read_text())
    if ring.startswith('{"format"'):
        ring = json.dumps(whole | json.loads(ring))
    (tmp_path / "keyring.json").write_bytes(ring.encode(errors="surrogateescape"))
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path)


def test_secrets_are_bound_to_their_names(tmp_path: Path) -> None:
    ring = EmbeddedKeys(tmp_path)
    ring.store_secret("log", b"one")
    ring.store_secret("ca", b"two")
    stored = json.loads((tmp_path / "keyring.json").read_text())
    stored["secrets"] = {"log": stored["secrets"]["ca"], "ca": stored["secrets"]["log"]}
    (tmp_path / "keyring.json").write_text(json.dumps(stored))
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path).secret("log")
    with pytest.raises(NotFoundError):
        ring.secret("tokens")


# ---- database ----


def test_the_state_is_closed_to_others_from_its_first_byte(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        state = Database(tmp_path / "state.db")
        with state.transaction() as connection:
            connection.execute(insert(budgets).values(dataset="a", epsilon=1.0, delta=1e-5))
            assert {file.name: mode(file) for file in tmp_path.iterdir()} == dict.fromkeys(
                ("state.db", "state.db-wal", "state.db-shm"), 0o600
            )
    finally:
        os.umask(before)
    state.close()


def test_a_path_with_special_characters_is_that_path(tmp_path: Path) -> None:
    Database(tmp_path / "state?mode=memory%20#.db").close()
    assert (tmp_path / "state?mode=memory%20#.db").stat().st_size


def test_an_exception_undoes_the_whole_transaction(tmp_path: Path) -> None:
    state = Database(tmp_path / "state.db")

    def die() -> None:
        with state.transaction() as connection:
            connection.execute(insert(budgets).values(dataset="a", epsilon=1.0, delta=1e-5))
            raise KeyError

    with pytest.raises(KeyError):
        die()
    with state.transaction() as connection:
        assert connection.execute(select(budgets)).all() == []
    state.close()


def test_a_locked_database_is_unavailable_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database_module.BUSY_TIMEOUT_S <= 5
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.5)
    state = Database(tmp_path / "state.db")
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="locked"), state.transaction():
        pass
    assert 0.4 < time.monotonic() - started < 2
    other.execute("ROLLBACK")
    other.close()
    with state.transaction():
        pass
    state.close()


@pytest.mark.parametrize("content", [b"this is not a database, but long enough to be taken for one" * 100])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.db").write_bytes(content)
    with pytest.raises(UnavailableError):
        Database(tmp_path / "state.db")
    assert (tmp_path / "state.db").read_bytes() == content
    with pytest.raises(UnavailableError):
        Database(tmp_path / "no-folder" / "state.db")


def test_more_callers_than_connections_all_get_their_turn(tmp_path: Path) -> None:
    state = Database(tmp_path / "state.db")
    with state.transaction() as connection:
        connection.execute(insert(budgets).values(dataset="a", epsilon=0.0, delta=0.0))
    failed: list[BaseException] = []

    def add() -> None:
        try:
            for _ in range(5):
                with state.transaction() as connection:
                    epsilon = connection.execute(select(budgets.c.epsilon)).scalar_one()
                    connection.execute(budgets.update().values(epsilon=epsilon + 1))
        except CloisterError as error:
            failed.append(error)

    threads = [threading.Thread(target=add) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with state.transaction() as connection:
        assert connection.execute(select(budgets.c.epsilon)).scalar_one() == 200
    state.close()
