"""Sealed bytes by path, written once; and which store holds those of which region.

Guarantees: a reader sees the whole blob or none; a path cannot leave the store; a path that is taken is not written
again (of S3, see `stores.s3` for what that is worth).
Not guaranteed: that the bytes are the ones written. Storage is untrusted: readers check digest and tag.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from cloister.errors import CloisterError, ConflictError, InputError, NotFoundError, UnavailableError
from cloister.stores.files import private_directory, write_atomic

CHUNK_BYTES = 1 << 20
# Variables that say where AWS credentials are to be had, and hold none. Those that do (AWS_SECRET_ACCESS_KEY,
# AWS_SESSION_TOKEN) reach no process that stays.
AWS_PLACES = (
    "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_EC2_METADATA_DISABLED", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE",
)  # fmt: skip
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
# What `write_atomic` leaves when it is killed. It can be listed and removed, and nothing else.
_LEFT = re.compile(r"(?:(?P<folder>.+)/)?\.(?P<name>[^/]+)")


class Blobs(Protocol):
    """A store. Thread-safe. Every method raises InputError for a path that `check_path` refuses."""

    @property
    def url(self) -> str:
        """What `open_blobs` opens it by; holds no credentials."""

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Store `data`, whole and durably, or not at all.

        Raises:
            ConflictError: the path is taken.
            UnavailableError: the store refused, or did not answer.
        """

    def get(self, path: str) -> bytes:
        """Read a whole blob.

        Raises:
            NotFoundError: nothing is stored there.
            UnavailableError: the store refused, or did not answer.
        """

    def chunks(self, path: str) -> Iterator[bytes]:
        """Read a blob piece by piece, of at most `CHUNK_BYTES` each. Raises as `get`."""

    def list(self, prefix: str) -> dict[str, float]:
        """Every path below the folder `prefix`, and when it was written (Unix time): blobs, and what a writer that was
        killed left behind."""

    def remove(self, path: str) -> None:
        """Remove one blob, if it is there.

        Raises:
            UnavailableError: the store refused, or did not answer.
        """

    def remove_tree(self, prefix: str) -> None:
        """Remove everything below the folder `prefix`, as far as the store lets us: for clearing what a failed upload
        left."""


def aws_places() -> dict[str, str]:
    """What a process needs in its environment to find the AWS credentials that the caller finds in files or nearby."""
    places = {name: os.environ[name] for name in AWS_PLACES if name in os.environ}
    usual = Path("~/.aws/credentials").expanduser()
    return ({"AWS_SHARED_CREDENTIALS_FILE": str(usual)} if usual.is_file() else {}) | places


def open_blobs(url: str) -> Blobs:
    """The store at `file:///a/folder` or `s3://bucket/prefix?endpoint=host:port&region=…`.

    Raises:
        InputError: not such a URL. UnavailableError: the folder is not on this machine.
    """
    scheme = urlsplit(url).scheme
    if scheme == "s3":
        from cloister.stores.s3 import S3Blobs

        return S3Blobs(url)
    if scheme == "file":
        return FolderBlobs.from_url(url)
    # Not shown: whoever wrote a password into a URL gets it back in no text.
    raise InputError("a blob store is at a file:// or s3:// URL", "such as file:///srv/blobs or s3://bucket/prefix")


def check_path(path: str, *, below: str = "") -> str:
    """`path`, if it may name a blob and lies below the folder `below` (which ends in '/').

    Raises:
        InputError: it does not.
    """
    if not _PATH.fullmatch(path):
        raise InputError("a blob path has letters, digits, '_', '-', '.' and '/' only", "use the manifest's path")
    if not path.startswith(below):
        raise InputError(f"this blob has to lie below {below}", "upload it there")
    return path


class FolderBlobs:
    """Blobs in a folder that is closed to other users. Implements `Blobs`."""

    def __init__(self, root: Path) -> None:
        """Use the folder `root`, which the authority made.

        Raises:
            UnavailableError: there is no such folder here.
        """
        if not root.is_dir():
            raise UnavailableError("the blob store's folder is not on this machine", "mount it, or check its URL")
        self.root = root

    @classmethod
    def make(cls, root: Path) -> FolderBlobs:
        """Make the folder, closed to others, if need be."""
        return cls(private_directory(root))

    @classmethod
    def from_url(cls, url: str) -> FolderBlobs:
        """Open the store at a `file:///…` URL.

        Raises:
            InputError: another URL. UnavailableError: there is no such folder here.
        """
        return cls(folder_of(url))

    @property
    def url(self) -> str:
        return self.root.resolve().as_uri()

    def _file(self, path: str) -> Path:
        return self.root / check_path(path)

    def put(self, path: str, data: bytes | memoryview) -> None:
        file = self._file(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(file, data, replace=False)
        except FileExistsError as error:
            raise taken(path) from error
        except OSError as error:
            raise UnavailableError(
                f"the blob store did not take {path}: {error.strerror}", "free disk space"
            ) from error

    def get(self, path: str) -> bytes:
        try:
            return self._file(path).read_bytes()
        except OSError as error:
            raise _not_read(path, error) from error

    def chunks(self, path: str) -> Iterator[bytes]:
        try:
            with self._file(path).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise _not_read(path, error) from error

    def list(self, prefix: str) -> dict[str, float]:
        found = {}
        for folder, _, names in os.walk(self._file(prefix)):
            for name in names:
                file = Path(folder, name)
                try:
                    found[file.relative_to(self.root).as_posix()] = file.lstat().st_mtime
                except FileNotFoundError:  # a writer that works right now has just removed it
                    continue
        return dict(sorted(found.items()))

    def remove(self, path: str) -> None:
        left = _LEFT.fullmatch(path)
        if left:
            check_path(f"{left['folder']}/{left['name']}" if left["folder"] else left["name"])
        try:
            (self.root / path if left else self._file(path)).unlink(missing_ok=True)
        except OSError as error:
            raise UnavailableError(
                f"the blob store did not remove {path}: {error.strerror}", "check the folder's permissions"
            ) from error

    def remove_tree(self, prefix: str) -> None:
        shutil.rmtree(self._file(prefix), ignore_errors=True)


def folder_of(url: str) -> Path:
    """The folder at a `file:///…` URL, whether or not it is there.

    Raises:
        InputError: another URL.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise InputError("this blob store is not at a file:// URL", "write it as file:///a/folder")
    return Path(unquote(parts.path))


def taken(path: str) -> ConflictError:
    return ConflictError(f"blob {path} exists and is never overwritten", "seal again: it takes a new path")


def missing(path: str) -> NotFoundError:
    return NotFoundError(f"blob {path} is missing from the store", "restore it from a backup")


def _not_read(path: str, error: OSError) -> CloisterError:
    if isinstance(error, FileNotFoundError):
        return missing(path)
    return UnavailableError(f"the blob store did not give {path}: {error.strerror}", "check the disk")


class Stores:
    """Which store holds the blobs of which region."""

    def __init__(self, urls: Mapping[str, str], folder: Path) -> None:
        """The stores at `urls`, by region; without any, `folder` for every region. Folders are made if need be.

        Raises:
            InputError: not a store's URL.
        """
        self._regions = {region: _make(url) for region, url in urls.items()}
        self._everywhere = None if urls else FolderBlobs.make(folder)

    def for_region(self, region: str) -> Blobs:
        """The store of a region.

        Raises:
            InputError: it has none, so its data may not come here.
        """
        blobs = self._regions.get(region, self._everywhere)
        if blobs is None:
            raise InputError(
                f"there is no blob store for the region '{region}', only for {', '.join(sorted(self._regions))}",
                f"set authority.blobs.{region} in config.yaml, or name another region in the schema",
            )
        return blobs

    def all(self) -> list[Blobs]:
        """Every store, once: for looking after what lies there."""
        every = [*self._regions.values(), *([self._everywhere] if self._everywhere else [])]
        return list({blobs.url: blobs for blobs in every}.values())


def _make(url: str) -> Blobs:
    return FolderBlobs.make(folder_of(url)) if urlsplit(url).scheme == "file" else open_blobs(url)
