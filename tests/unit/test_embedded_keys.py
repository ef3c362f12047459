"""The embedded key service when its folder is damaged, open, half-made, shared, or on a disk that fails."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from nacl import pwhash

from cloister.errors import CloisterError, InputError, IntegrityError, KeyServiceError, NotFoundError
from cloister.sealing.envelope import new_key
from cloister.stores import files
from cloister.stores.keys import EmbeddedKeys, root
from cloister.stores.keys.root import passphrase_in

NAME = "dataset/adult"
KEY = new_key()
PASSPHRASE = b"correct horse battery staple"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "COST", (pwhash.argon2id.OPSLIMIT_MIN, pwhash.argon2id.MEMLIMIT_MIN))


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def wrapped(ring: EmbeddedKeys) -> list[tuple[bytes, bytes]]:
    return [(ring.wrap(NAME, [(KEY, b"here")])[0], b"here")]


# ---- the root key ----


def test_a_ring_does_not_open_under_another_root_key(tmp_path: Path) -> None:
    ring = EmbeddedKeys(tmp_path)
    sealed = wrapped(ring)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    (tmp_path / "root.key").write_bytes(new_key())
    before = content(tmp_path)
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path)
    assert content(tmp_path) == before
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path / "other").unwrap(NAME, sealed)


@pytest.mark.parametrize("name", ["root.key", "keyring.json"])
def test_half_a_key_service_is_never_started_anew(tmp_path: Path, name: str) -> None:
    EmbeddedKeys(tmp_path)
    (tmp_path / name).unlink()
    before = content(tmp_path)
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["root.key", "root.sealed"])
def test_a_root_key_that_is_open_to_others_is_refused(tmp_path: Path, name: str) -> None:
    passphrase = {"root.sealed": lambda: PASSPHRASE}.get(name)
    EmbeddedKeys(tmp_path, passphrase=passphrase)
    (tmp_path / name).chmod(0o640)
    with pytest.raises(InputError, match="open to others"):
        EmbeddedKeys(tmp_path, passphrase=passphrase)


def test_a_passphrase_alone_opens_what_it_sealed(tmp_path: Path) -> None:
    sealed = wrapped(EmbeddedKeys(tmp_path, passphrase=lambda: PASSPHRASE))
    assert not (tmp_path / "root.key").exists()
    assert KEY not in b"".join(content(tmp_path).values())
    assert EmbeddedKeys(tmp_path, passphrase=lambda: PASSPHRASE).unwrap(NAME, sealed) == [KEY]
    before = content(tmp_path)
    for passphrase in (lambda: PASSPHRASE + b"!", lambda: b"", None):
        with pytest.raises(InputError):
            EmbeddedKeys(tmp_path, passphrase=passphrase)
    assert content(tmp_path) == before


def test_a_passphrase_is_argon2id_at_a_cost_that_hurts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    EmbeddedKeys(tmp_path, passphrase=lambda: PASSPHRASE)
    known = json.loads((tmp_path / "root.sealed").read_text())
    assert known["kdf"] == "argon2id"
    assert known["memory_bytes"] >= 19 << 20  # what OWASP asks for at the least
    assert known["passes"] >= 2


def test_a_short_passphrase_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fewer than"):
        EmbeddedKeys(tmp_path, passphrase=lambda: b"short")
    assert EmbeddedKeys(tmp_path, passphrase=lambda: PASSPHRASE).states() == []


def test_a_key_file_is_not_taken_for_a_passphrase(tmp_path: Path) -> None:
    EmbeddedKeys(tmp_path)
    with pytest.raises(InputError, match="no passphrase"):
        EmbeddedKeys(tmp_path, passphrase=lambda: PASSPHRASE)


@pytest.mark.parametrize(
    "change",
    [{"memory_bytes": 1 << 62}, {"passes": 1 << 40}, {"kdf": "none"}, {"format": "v2"}, {"salt": "AAAA"}, {"root": ""}],
)
def test_a_sealed_root_key_that_was_edited_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    EmbeddedKeys(tmp_path, passphrase=lambda: PASSPHRASE)
    file = tmp_path / "root.sealed"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CloisterError):
        EmbeddedKeys(tmp_path, passphrase=lambda: PASSPHRASE)


def test_the_passphrases_file_is_read_if_nobody_else_may(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(PASSPHRASE + b"\r\nanother line\n")
    file.chmod(0o600)
    assert passphrase_in(file) == PASSPHRASE
    file.chmod(0o604)
    with pytest.raises(InputError, match="open to others"):
        passphrase_in(file)
    with pytest.raises(InputError, match="cannot be read"):
        passphrase_in(tmp_path / "none")


# ---- the ring ----


@pytest.mark.parametrize("ring", ["", "[]", "{}", "null", '{"format": "cloister.dev/keyring/v9"}', "\udcff"])
def test_a_damaged_or_newer_ring_is_refused(tmp_path: Path, ring: str) -> None:
    EmbeddedKeys(tmp_path)
    if ring.startswith('{"format"'):
        ring = json.dumps(json.loads((tmp_path / "keyring.json").read_text()) | json.loads(ring))
    (tmp_path / "keyring.json").write_bytes(ring.encode(errors="surrogateescape"))
    with pytest.raises(IntegrityError):
        EmbeddedKeys(tmp_path)


def test_what_is_in_the_ring_is_bound_to_its_name_use_and_version(tmp_path: Path) -> None:
    ring = EmbeddedKeys(tmp_path)
    ring.store_secret("log", b"one")
    ring.store_secret("ca", b"two")
    sealed = wrapped(ring)
    ring.rotate(NAME)
    ring.derive("subjects", b"")
    whole = json.loads((tmp_path / "keyring.json").read_text())

    def edited(change: Callable[[Any], None]) -> EmbeddedKeys:
        stored = json.loads(json.dumps(whole))
        change(stored)
        (tmp_path / "keyring.json").write_text(json.dumps(stored))
        return EmbeddedKeys(tmp_path)

    def swap(stored: Any) -> None:
        stored["secrets"] = {"log": stored["secrets"]["ca"], "ca": stored["secrets"]["log"]}

    def other_version(stored: Any) -> None:
        stored["keys"][NAME]["versions"]["1"] = stored["keys"][NAME]["versions"]["2"]

    def other_use(stored: Any) -> None:
        stored["keys"][NAME] = stored["keys"]["subjects"] | {"use": "wrap"}

    def other_name(stored: Any) -> None:
        stored["keys"][NAME + "-b"] = stored["keys"][NAME]

    with pytest.raises(IntegrityError):
        edited(swap).secret("log")
    for change in (other_version, other_use):
        with pytest.raises(IntegrityError):
            edited(change).unwrap(NAME, sealed)
    with pytest.raises(IntegrityError):
        edited(other_name).wrap(NAME + "-b", [(KEY, b"")])


def test_a_ring_that_is_older_than_what_it_is_asked_for_says_so(tmp_path: Path) -> None:
    ring = EmbeddedKeys(tmp_path)
    wrapped(ring)
    old = (tmp_path / "keyring.json").read_bytes()
    ring.rotate(NAME)
    sealed = wrapped(ring)
    (tmp_path / "keyring.json").write_bytes(old)
    with pytest.raises(IntegrityError, match="older"):
        ring.unwrap(NAME, sealed)


def test_what_was_destroyed_is_not_in_the_folder_any_more(tmp_path: Path) -> None:
    ring = EmbeddedKeys(tmp_path)
    wrapped(ring)
    first = json.loads((tmp_path / "keyring.json").read_text())["keys"][NAME]["versions"]["1"]["sealed"].encode()
    (tmp_path / ".keyring.json.0123").write_bytes((tmp_path / "keyring.json").read_bytes())  # as a crash leaves it
    ring.rotate(NAME)
    (tmp_path / "disk").hardlink_to(tmp_path / "keyring.json")  # what a file's bytes are, after its name is gone
    assert first in (tmp_path / "disk").read_bytes()
    ring.destroy_below(NAME, 2)
    assert first not in b"".join(content(tmp_path).values())


# ---- errors and crashes ----


class _Disk:
    """Counts what is done to files, and fails at step `at`: with an error, or by the end of the process."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, how: int | None) -> None:
        self.steps, self.at, self.how = 0, at, how
        for name in ("open", "fdopen", "fsync", "link", "pwrite"):
            patch.setattr(os, name, self._failing(getattr(os, name)))
        patch.setattr(Path, "replace", self._failing(Path.replace))
        patch.setattr(Path, "unlink", self._failing(Path.unlink))

    def _failing(self, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.steps += 1
            if self.steps == self.at:
                if self.how is None:
                    os._exit(9)
                raise OSError(self.how, os.strerror(self.how))
            return real(*arguments, **options)

        return call


CHANGES: dict[str, Callable[[EmbeddedKeys], Any]] = {
    "first key": lambda ring: ring.wrap("models", [(KEY, b"")]),
    "rotation": lambda ring: ring.rotate(NAME),
    "destruction": lambda ring: ring.destroy_below(NAME, 2),
    "secret": lambda ring: ring.store_secret("ca", b"value"),
}


def prepared(directory: Path) -> tuple[EmbeddedKeys, list[tuple[bytes, bytes]]]:
    ring = EmbeddedKeys(directory)
    wrapped(ring)
    ring.rotate(NAME)
    return ring, wrapped(ring)


def steps_of(change: Callable[[EmbeddedKeys], Any], directory: Path) -> int:
    ring, _ = prepared(directory)
    with pytest.MonkeyPatch.context() as patch:
        disk = _Disk(patch, -1, None)
        change(ring)
    return disk.steps


def check(directory: Path, before: bytes, sealed: list[tuple[bytes, bytes]]) -> None:
    """The ring is the old one or the new one, opens what it opened, and takes the next change."""
    ring = EmbeddedKeys(directory)
    assert ring.unwrap(NAME, sealed) == [KEY]
    after = json.loads((directory / "keyring.json").read_bytes())
    assert after["keys"].keys() | {"models"} == {NAME, "models"}
    newest = ring.rotate(NAME)
    assert newest in (3, 4)
    assert ring.unwrap(NAME, [(ring.rewrap(NAME, sealed)[0], b"here")]) == [KEY]
    assert not list(directory.glob(".keyring.json.*"))
    assert before


@pytest.mark.parametrize("how", [errno.ENOSPC, errno.EIO, None], ids=["ENOSPC", "EIO", "crash"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_ring_is_old_or_new_whatever_write_fails(
    tmp_path: Path, change: Callable[[EmbeddedKeys], Any], how: int | None
) -> None:
    steps = steps_of(change, tmp_path / "counted")
    assert steps >= 5
    for at in range(1, steps + 1):
        directory = tmp_path / str(at)
        ring, sealed = prepared(directory)
        before = (directory / "keyring.json").read_bytes()
        failing(lambda ring=ring: change(ring), at, how)
        assert EmbeddedKeys(directory).unwrap(NAME, sealed) == [KEY]
        check(directory, before, sealed)


@pytest.mark.parametrize("passphrase", [None, lambda: PASSPHRASE], ids=["key file", "passphrase"])
@pytest.mark.parametrize("how", [errno.ENOSPC, None], ids=["ENOSPC", "crash"])
def test_a_first_start_that_fails_is_begun_again(tmp_path: Path, how: int | None, passphrase: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = _Disk(patch, -1, None)
        EmbeddedKeys(tmp_path / "counted", passphrase=passphrase)
    assert disk.steps >= 10
    for at in range(1, disk.steps + 1):
        directory = tmp_path / str(at)
        failing(lambda directory=directory: EmbeddedKeys(directory, passphrase=passphrase), at, how)
        ring = EmbeddedKeys(directory, passphrase=passphrase)
        assert ring.unwrap(NAME, wrapped(ring)) == [KEY]
        assert not list(directory.glob("*.new"))


def failing(work: Callable[[], Any], at: int, how: int | None) -> None:
    """Do it on a disk that fails at step `at`; where that is the end, in a process of its own."""
    if how is not None:
        with pytest.MonkeyPatch.context() as patch:
            _Disk(patch, at, how)
            with pytest.raises(KeyServiceError):
                work()
        return
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                _Disk(patch, at, how)
                work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_two_processes_rotate_without_losing_a_version(tmp_path: Path) -> None:
    ring = EmbeddedKeys(tmp_path)
    sealed = wrapped(ring)
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                own = EmbeddedKeys(tmp_path)
                for index in range(5):
                    own.rotate(NAME)
                    own.store_secret(f"s-{number}-{index}", b"kept")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert ring.states()[0].newest == 21
    assert ring.unwrap(NAME, sealed) == [KEY]
    assert all(ring.secret(f"s-{number}-{index}") == b"kept" for number in range(4) for index in range(5))


def test_a_folder_that_cannot_be_written_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = EmbeddedKeys(tmp_path)

    def full(*_: Any, **__: Any) -> Iterator[None]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for change in (lambda: ring.wrap(NAME, [(KEY, b"")]), lambda: ring.remember(1, "aa")):
        with pytest.raises(KeyServiceError, match="No space left"):
            change()
    monkeypatch.undo()
    assert ring.states() == []
    with pytest.raises(NotFoundError):
        ring.secret("log")


def test_who_reads_the_ring_while_it_is_overwritten_reads_it_again(tmp_path: Path) -> None:
    """A reader that opened the old ring may meet the zeros that the next one's writer puts there."""
    sealed = wrapped(EmbeddedKeys(tmp_path))
    ring, file = EmbeddedKeys(tmp_path), tmp_path / "keyring.json"
    good = file.read_bytes()
    with ThreadPoolExecutor(1) as pool:
        with files.locked(tmp_path / "keyring.lock"):
            file.write_bytes(bytes(len(good)))
            reading = pool.submit(ring.unwrap, NAME, sealed)
            with pytest.raises(TimeoutError):
                reading.result(0.2)
            file.write_bytes(good)
        assert reading.result(60) == [KEY]
