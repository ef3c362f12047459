"""Small files that must never be seen half-written, and folders that only their owner may enter."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloister.errors import InputError, NotFoundError


def private_directory(path: Path) -> Path:
    """Make `path` (and its parents) and close it to others: mode 0700."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def write_atomic(path: Path, data: bytes | memoryview, *, replace: bool = True) -> None:
    """Write all of `data` durably under `path` (mode 0600), or nothing.

    Raises:
        FileExistsError: `replace` is False and the file is there already.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # the only call that refuses an existing name atomically
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock: one process or thread at a time. The file stays, empty."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which also lets go of the lock


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


def read_json(path: Path, *, what: str, hint: str) -> Any:
    """Read JSON that `write_json` wrote.

    Raises:
        NotFoundError: there is no such file; the message names `what`.
        InputError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {what}", hint) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the {what} is damaged: {path} is not JSON", hint) from error
