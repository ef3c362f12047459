"""The stores of sealed bytes: one contract for a folder and for a bucket of a real S3 endpoint."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloister.errors import CloisterError, ConflictError, InputError, NotFoundError, UnavailableError
from cloister.process import clean_environment
from cloister.stores import s3 as s3_store
from cloister.stores.blobs import CHUNK_BYTES, Blobs, FolderBlobs, Stores, check_path, open_blobs
from s3 import CREDENTIALS, Endpoint

LARGE = os.urandom(6 * 1024 * 1024 + 1)  # above what S3 takes in one part


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """A new, empty store."""
    if request.param == "folder":
        return open_blobs(FolderBlobs.make(tmp_path / "a folder with % and ä").url)
    return open_blobs(request.getfixturevalue("s3").url())


# ---- the contract ----


@pytest.mark.parametrize("data", [b"", b"x", LARGE], ids=["empty", "small", "large"])
def test_a_blob_comes_back_as_it_was(blobs: Blobs, data: bytes) -> None:
    blobs.put("datasets/adult/a.parquet", memoryview(data))
    assert blobs.get("datasets/adult/a.parquet") == data
    chunks = list(blobs.chunks("datasets/adult/a.parquet"))
    assert b"".join(chunks) == data
    assert all(len(chunk) <= CHUNK_BYTES for chunk in chunks)


def test_a_blob_is_written_once(blobs: Blobs) -> None:
    blobs.put("a/b", b"first")
    with pytest.raises(ConflictError, match="never overwritten"):
        blobs.put("a/b", b"second")
    assert blobs.get("a/b") == b"first"
    assert list(blobs.list("a")) == ["a/b"]


def test_a_missing_blob_is_told_from_a_store_that_fails(blobs: Blobs) -> None:
    for read in (blobs.get, lambda path: list(blobs.chunks(path))):
        with pytest.raises(NotFoundError):
            read("datasets/none")
    blobs.remove("datasets/none")
    blobs.remove_tree("datasets/none")
    assert blobs.list("datasets") == {}


def test_what_lies_below_a_folder_is_listed_and_removed(blobs: Blobs) -> None:
    before = time.time()
    for path in ("datasets/adult/1/x", "datasets/adult/1/deep/y", "datasets/adult/10/z", "models/m"):
        blobs.put(path, b"sealed")
    listed = blobs.list("datasets/adult/1")
    assert list(listed) == ["datasets/adult/1/deep/y", "datasets/adult/1/x"]
    assert all(before - 2 < written < time.time() + 2 for written in listed.values())
    blobs.remove("datasets/adult/1/x")
    assert list(blobs.list("datasets")) == ["datasets/adult/1/deep/y", "datasets/adult/10/z"]
    blobs.remove_tree("datasets/adult/1")
    assert list(blobs.list("datasets")) == ["datasets/adult/10/z"]
    assert blobs.get("models/m") == b"sealed"


ESCAPES = ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", ".hidden", "a/.git", "", "a/", "a\x00b", "a\n", "a\\b",
           "~/x", "a b", "ä"]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
def test_a_path_cannot_leave_the_store(blobs: Blobs, path: str) -> None:
    attempts = [lambda: blobs.put(path, b"x"), lambda: blobs.get(path), lambda: list(blobs.chunks(path)),
                lambda: blobs.list(path), lambda: blobs.remove_tree(path)]  # fmt: skip
    if path not in (".hidden", "a/.git"):  # which may be what a killed writer left
        attempts.append(lambda: blobs.remove(path))
    for attempt in attempts:
        with pytest.raises(InputError):
            attempt()


def test_a_store_is_found_again_by_its_url(blobs: Blobs) -> None:
    blobs.put("x", b"1")
    assert open_blobs(blobs.url).get("x") == b"1"


def test_many_threads_share_a_store(blobs: Blobs) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: blobs.put(f"a/{number}", str(number).encode()), range(12)))
        assert list(threads.map(blobs.get, (f"a/{n}" for n in range(12)))) == [str(n).encode() for n in range(12)]


def test_a_path_below_another_folder_is_refused() -> None:
    assert check_path("models/run-1/x", below="models/run-1/") == "models/run-1/x"
    for path in ("models/run-1", "models/run-10/x", "models/run-1x/y", "x/models/run-1/y"):
        with pytest.raises(InputError):
            check_path(path, below="models/run-1/")


# ---- a folder ----


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_closed_to_others(tmp_path: Path) -> None:
    FolderBlobs.make(tmp_path / "blobs").put("a/b", b"x")
    modes = [mode(tmp_path / "blobs" / part) for part in ("", "a", "a/b")]
    assert modes == [0o700, 0o700, 0o600]


def test_a_full_disk_is_our_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FolderBlobs.make(tmp_path / "blobs")
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


def test_what_a_killed_writer_left_can_be_found_and_removed(tmp_path: Path) -> None:
    blobs = FolderBlobs.make(tmp_path / "blobs")
    blobs.put("datasets/adult/x", b"sealed")
    left = tmp_path / "blobs" / "datasets" / "adult" / ".train-000.internal.parquet.0123456789abcdef"
    left.write_bytes(b"seal")
    found = set(blobs.list("datasets")) - {"datasets/adult/x"}
    assert found == {f"datasets/adult/{left.name}"}
    with pytest.raises(InputError):
        blobs.get(*found)
    blobs.remove(*found)
    assert not left.exists()
    for path in ("datasets/../.ssh", ".a/b/../.c", "../.x", "./.x"):
        with pytest.raises(InputError):
            blobs.remove(path)


# ---- S3 ----


def test_of_two_prefixes_neither_sees_the_other(s3: Endpoint) -> None:
    url = s3.url("one")
    one, other = open_blobs(url), open_blobs(url.replace("/one?", "/other/deep?"))
    one.put("x", b"1")
    other.put("x", b"2")
    assert (one.get("x"), other.get("x")) == (b"1", b"2")
    assert (list(one.list("x")), list(other.list("deep"))) == ([], [])


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:topsecret@bucket/x", "s3://bucket/x?endpoint=user:topsecret@127.0.0.1:9000",
        "s3://bucket/x?access_key=topsecret", "s3://bucket/x?endpoint=http://127.0.0.1:9000", "s3://", "s3:///x",
        "s3://b/x", "s3://Bucket/x", "s3://bucket/../x", "s3://bucket/a b", "s3://bucket/x#part",
        "s3://bucket/x?region=eu&region=us", "s3://bucket/x?region=EU/..", "s3://bucket/x?scheme=ftp",
        "s3://bucket/x?endpoint=", "s3://bucket/x?scheme=http", "s3://bucket/x?scheme=http&endpoint=192.0.2.1:9000",
        "s3://bucket/x?scheme=http&endpoint=localhost.example.com", "file://host/x", "file:x", "file:///x?y=topsecret",
        "https://bucket/x", "/x", "",
    ],
)  # fmt: skip
def test_a_url_that_is_no_store_or_holds_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InputError) as refused:
        open_blobs(url)
    assert "topsecret" not in refused.value.message + refused.value.hint + repr(refused.value.__cause__)


def test_a_bucket_that_is_not_there_is_a_clear_error(s3: Endpoint) -> None:
    blobs = open_blobs(f"s3://no-such-bucket/x?endpoint={s3.address}&scheme=http&region=us-east-1")
    with pytest.raises(UnavailableError, match="s3://no-such-bucket did not take a: NO_SUCH_BUCKET"):
        blobs.put("a", b"x")


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that takes connections and closes each without a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close_all() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=close_all, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_an_endpoint_that_fails_shows_no_credentials(silent: str, s3: Endpoint) -> None:
    blobs = open_blobs(f"s3://bucket/x?endpoint={silent}&scheme=http&region=us-east-1")
    for attempt in (lambda: blobs.put("a", b"x"), lambda: blobs.get("a")):
        with pytest.raises(UnavailableError) as failed:
            attempt()
        text = f"{failed.value.message} {failed.value.hint} {failed.value.__cause__!r}"
        assert not any(secret in text for secret in CREDENTIALS.values())


def test_a_silent_store_is_given_up_in_time() -> None:
    assert s3_store.ATTEMPTS * (s3_store.CONNECT_TIMEOUT_S + s3_store.REQUEST_TIMEOUT_S) <= 60


# ---- regions ----


def test_each_region_has_its_store_and_no_other_region_has_one(tmp_path: Path) -> None:
    stores = Stores({"eu": (tmp_path / "eu").as_uri(), "us": (tmp_path / "us").as_uri()}, tmp_path / "any")
    stores.for_region("eu").put("x", b"eu")
    assert (tmp_path / "eu" / "x").read_bytes() == b"eu"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eu", "us"]
    assert [blobs.url for blobs in stores.all()] == [(tmp_path / name).as_uri() for name in ("eu", "us")]
    with pytest.raises(InputError, match="no blob store for the region 'asia', only for eu, us"):
        stores.for_region("asia")


def test_one_machine_holds_every_region_by_default(tmp_path: Path) -> None:
    stores = Stores({}, tmp_path / "any")
    assert stores.for_region("eu").url == stores.for_region("us").url == (tmp_path / "any").as_uri()
    assert len(stores.all()) == 1


# ---- credentials of processes that stay ----


def test_where_credentials_are_is_passed_on_and_the_credentials_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**CREDENTIALS, "AWS_SESSION_TOKEN": "test-session"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_PROFILE", "hospital")
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    inherited = clean_environment()
    assert inherited["AWS_PROFILE"] == "hospital"
    assert not set(inherited.values()) & {*CREDENTIALS.values(), "test-session"}
    assert "AWS_SHARED_CREDENTIALS_FILE" not in inherited
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").touch()
    assert clean_environment()["AWS_SHARED_CREDENTIALS_FILE"] == str(tmp_path / ".aws" / "credentials")
