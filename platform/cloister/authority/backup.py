"""Backups: the state at one moment, sealed under a key of the key service, and the blobs, which are sealed already.

Guarantees: a backup is on record, and the record anchored in the key service, before anything of it is written, and it
holds that record; it is whole under its name or not there, and nothing is ever overwritten; whoever has it, and not the
key service, learns how long the log was, how many blobs there are and how large everything is; a change to it is
refused. Memory does not grow with the state.

Not guaranteed: anything without the key service, which is not in it. Its newest copy opens every backup but what was
destroyed since; a copy of it from before a destruction would bring destroyed keys back, so it is kept apart, and only
in its newest state.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cloister.authority.core import PLATFORM, Caller, Core
from cloister.authority.maintenance import Recorded, recorded_blobs
from cloister.canonical import b64, canonical_json, unb64
from cloister.errors import CloisterError, ConflictError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.sealing.envelope import new_key
from cloister.sealing.stream import CHUNK_BYTES, OpeningStream, SealingStream
from cloister.stores import migrations
from cloister.stores.blobs import Stores, check_path
from cloister.stores.dump import dump
from cloister.stores.files import write_json
from cloister.stores.keys import KeyService

FORMAT = "cloister.dev/backup/v1"
KEY = "backup"
HEADER_FILE, STATE_FILE, BLOBS_FOLDER = "backup.json", "state.sealed", "blobs"
Progress = Callable[[int, int], None]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Header(BaseModel):
    """`backup.json`: what anybody may know. All of it but the last three is bound to the sealed state."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["cloister.dev/backup/v1"] = "cloister.dev/backup/v1"
    id: str = Field(pattern=r"^bak-[0-9a-f]{12}$")
    created: str = Field(max_length=40)
    revision: str = Field(max_length=32)
    """Of the tables: the migration that they are at."""
    log_size: int = Field(ge=1)
    log_root: _Digest
    blobs: int | None = Field(ge=0)
    """How many there are beside the state; None where they are backed up otherwise."""
    wrapped_key: str = Field(max_length=1000)
    """Of the sealed state, wrapped under the key `backup` of the key service; base64."""
    state_bytes: int = Field(ge=0)
    state_sha256: _Digest

    @classmethod
    def read(cls, folder: Path) -> Header:
        """The header of the backup in `folder`.

        Raises:
            NotFoundError: there is no backup. IntegrityError: it is damaged, or of another version.
        """
        try:
            return cls.model_validate_json((folder / HEADER_FILE).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"there is no backup in {folder}", "name the folder that cloister backup made"
            ) from None
        except ValidationError:
            raise IntegrityError(
                f"{folder / HEADER_FILE} is damaged or of another version", "use another backup"
            ) from None

    @property
    def context(self) -> dict[str, str]:
        """What the sealed state is bound to."""
        facts = self.model_dump(include={"id", "created", "revision", "log_size", "log_root", "blobs"})
        return {"use": FORMAT} | {name: str(value) for name, value in facts.items()}


def create(
    core: Core, stores: Stores, caller: Caller, folder: Path, *, with_blobs: bool = True,
    progress: Progress | None = None,
) -> Header:  # fmt: skip
    """Write a backup to `folder`, which must not exist. `progress(done, total)` counts blobs.

    1. on record, with the wrapped key of the backup to be; 2. the state at one moment, sealed; 3. the blobs that it
    names, compared with their digests; 4. the header, and the folder gets its name.

    Raises:
        ConflictError: there is something at `folder`.
        IntegrityError: a blob is missing or changed, or the database holds what it must not: see `cloister fsck`.
        UnavailableError: the disk refused. Then nothing is at `folder`, and the log says that it failed.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if folder.exists():
        raise ConflictError(f"{folder} exists, and a backup overwrites nothing", "name a folder that is not there yet")
    if not folder.parent.is_dir():
        raise InputError(f"there is no folder {folder.parent}", "make it first")
    backup, key = f"bak-{secrets.token_hex(6)}", new_key()
    with core.action(caller, "backup:create", backup=backup, blobs=with_blobs) as act:  # 1
        act.allow(PLATFORM)
        (wrapped,) = act.keys.wrap(KEY, [(key, key_context(backup))])
    core.anchor(act)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        partial.mkdir(mode=0o700)
        facts: dict[str, Any] = {"id": backup, "created": core.now_text(), "wrapped_key": b64(wrapped)}
        header, needed = _write_state(core, partial / STATE_FILE, key, facts, with_blobs)  # 2
        if with_blobs:
            _copy_blobs(core, stores, needed, partial / BLOBS_FOLDER, progress)  # 3
        write_json(partial / HEADER_FILE, header.model_dump())  # 4
        sync_tree(partial)
        partial.rename(folder)
        sync(folder.parent)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(CloisterError):
            reason = type(error).__name__
            core.record(caller, "backup:create", PLATFORM, "failure", act.rule or "", backup=backup, error=reason)
        if isinstance(error, OSError):
            raise UnavailableError(
                f"the backup cannot be written: {error.strerror or type(error).__name__}", "check its disk"
            ) from error
        raise
    return header


def key_context(backup: str) -> bytes:
    """What the wrapped key of a backup is bound to."""
    return canonical_json({"use": FORMAT, "id": backup})


def open_state(keys: KeyService, folder: Path, header: Header) -> Iterator[bytes]:
    """The dump in a backup, piece by piece. Only when it ends without an error was it the whole.

    Raises:
        IntegrityError: changed, cut, another backup's, or sealed under a key that was destroyed.
    """
    try:
        wrapped = unb64(header.wrapped_key)
    except CloisterError:
        raise IntegrityError(f"{folder / HEADER_FILE} is damaged", "use another backup") from None
    (key,) = keys.unwrap(KEY, [(wrapped, key_context(header.id))])
    stream = OpeningStream(key, header.context)
    with (folder / STATE_FILE).open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield stream.update(piece)
    yield stream.finish()


def _write_state(
    core: Core, file: Path, key: bytes, facts: dict[str, Any], with_blobs: bool
) -> tuple[Header, list[Recorded]]:
    """Seal the state as it is at this moment; returns the header over it, and the blobs that it needs."""
    with core.database.reading() as connection, file.open("xb") as out:
        head = core.journal.head(connection)
        needed = list(recorded_blobs(connection)) if with_blobs else []
        facts |= {
            "revision": migrations.revision(connection), "log_size": head.size, "log_root": head.root.hex(),
            "blobs": len(needed) if with_blobs else None,
        }  # fmt: skip
        bound = Header(**facts, state_bytes=0, state_sha256="0" * 64)
        stream, written = SealingStream(key, bound.context), _Counted(out)
        for piece in _pieces(dump(connection)):
            written.write(stream.update(piece))
        written.write(stream.finish())
    return bound.model_copy(update={"state_bytes": written.size, "state_sha256": written.digest.hexdigest()}), needed


class _Counted:
    """A file with the size and the digest of what was written to it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.size, self.digest = 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._out.write(data)
        self.digest.update(data)
        self.size += len(data)


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines, many at a time."""
    waiting: list[bytes] = []
    size = 0
    for line in lines:
        waiting.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


def _copy_blobs(
    core: Core, stores: Stores, needed: list[Recorded], folder: Path, progress: Progress | None
) -> None:  # fmt: skip
    """Copy what the state needs. What was erased since the state was read is left out: its keys are gone."""
    for done, blob in enumerate(needed, start=1):
        target = folder / check_path(blob.path)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            digest = hashlib.sha256()
            with target.open("xb") as file:
                for chunk in stores.for_region(blob.region).chunks(blob.path):
                    digest.update(chunk)
                    file.write(chunk)
        except NotFoundError:
            target.unlink()
            with core.database.reading() as connection:
                if any(still.path == blob.path for still in recorded_blobs(connection)):
                    raise
            continue
        if digest.hexdigest() != blob.sha256:
            raise IntegrityError(f"a stored file is not the one that was sealed: {blob.what}", "see: cloister fsck")
        if progress:
            progress(done, len(needed))


def sync_tree(folder: Path) -> None:
    """Have everything below a folder on disk: files, then the folders that name them."""
    for here, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(here, name))
        sync(Path(here))


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
