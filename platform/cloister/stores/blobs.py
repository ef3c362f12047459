"""Sealed bytes by path, written once.

Guarantees: a path, once written, never changes; a reader sees the whole blob or none; a path cannot leave the store.
Not guaranteed: that the bytes are the ones written. Storage is untrusted: readers check digest and tag.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

from cloister.errors import ConflictError, InputError, NotFoundError, UnavailableError
from cloister.stores.files import private_directory, write_atomic

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


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
    """Blobs in a folder that is closed to other users."""

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
            InputError: another scheme.
        """
        parts = urlparse(url)
        if parts.scheme != "file" or parts.netloc:
            raise InputError(f"blob store {url!r} is not a file:// URL", "set `blobs: file:///a/folder`")
        return cls(Path(unquote(parts.path)))

    @property
    def url(self) -> str:
        return self.root.resolve().as_uri()

    def _file(self, path: str) -> Path:
        return self.root / check_path(path)

    def put(self, path: str, data: bytes) -> None:
        """Store `data`.

        Raises:
            ConflictError: the path is taken.
            UnavailableError: the disk refused.
        """
        file = self._file(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(file, data, replace=False)
        except FileExistsError as error:
            raise ConflictError(
                f"blob {path} exists and is never overwritten", "seal again: it takes a new path"
            ) from error
        except OSError as error:
            raise UnavailableError(
                f"the blob store did not take {path}: {error.strerror}", "free disk space"
            ) from error

    def get(self, path: str) -> bytes:
        """Read a whole blob.

        Raises:
            NotFoundError: nothing is stored there.
        """
        try:
            return self._file(path).read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"blob {path} is missing from the store", "restore it from a backup") from error
        except OSError as error:
            raise UnavailableError(f"the blob store did not give {path}: {error.strerror}", "check the disk") from error

    def remove_tree(self, prefix: str) -> None:
        """Remove everything below `prefix`: for clearing what a failed upload left."""
        shutil.rmtree(self._file(prefix), ignore_errors=True)
