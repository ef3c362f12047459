"""The file that a data owner wants to seal.

Guarantees: only a regular file is opened, and opening never waits: a FIFO, a device or a folder is refused before a
byte is read. What is read is told apart by content and checked as `cloister.datasets.ingest` says.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import pyarrow as pa

from cloister.datasets.ingest import read_blocks
from cloister.datasets.ingest.limits import BLOCK_BYTES
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError, NotFoundError


@dataclass(slots=True)
class Source:
    """An open file. A context manager; `read_blocks` may be called again, and starts over."""

    stream: BinaryIO
    size: int
    """In bytes."""
    position: int = 0
    """How many bytes of it are done, for progress."""

    def read_blocks(self, schema: DatasetSchema, *, block_bytes: int = BLOCK_BYTES) -> Iterator[pa.Table]:
        """The file's rows in stored form, in tables of about `block_bytes`.

        Raises:
            InputError: the file does not fit the schema, or cannot be read to its end.
        """
        self.position = 0
        problem = ""
        try:
            yield from read_blocks(self.stream, schema, block_bytes=block_bytes, advance=self._advance)
        except OSError as error:
            problem = os.strerror(error.errno or 0)
        if problem:
            raise InputError(f"the data file cannot be read to its end: {problem}", "check the disk, and try again")

    def _advance(self, position: int) -> None:
        self.position = position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()


def open_source(path: Path, what: str = "data file") -> Source:
    """Open a file that a person named.

    Raises:
        NotFoundError: there is none. InputError: it is no regular file, or it cannot be read.
    """
    try:
        # O_NONBLOCK: without it, opening a FIFO waits for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {what} {path}", "check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "the path is not valid"
        raise InputError(f"the {what} {path} cannot be read: {reason}", "check its permissions") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is no regular file", "name a file, not a folder, a pipe or a device")
    # Unbuffered: blocks are large, and a buffer would be one more copy.
    return Source(os.fdopen(descriptor, "rb", buffering=0), status.st_size)
