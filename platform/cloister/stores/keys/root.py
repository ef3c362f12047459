"""The root key of the embedded key service: 32 bytes in a file of mode 0600, or sealed by a passphrase.

Guarantees: a passphrase's key is made by Argon2id (RFC 9106) and seals the root key, so the folder alone opens nothing;
a key file that others may read is refused; a crash while the first root key is made leaves nothing that counts as one.
Not guaranteed: a passphrase that nobody guesses, nor that a key file is safe from whoever reads the folder.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nacl import pwhash

from cloister.canonical import b64, unb64
from cloister.errors import CloisterError, InputError, IntegrityError
from cloister.sealing.envelope import KEY_BYTES, new_key, unwrap_key, wrap_key
from cloister.stores.files import write_atomic

KEY_FILE, SEALED_FILE = "root.key", "root.sealed"
MIN_PASSPHRASE_BYTES = 12
_FORMAT = "cloister.dev/root-key/v1"
_LABEL = b"cloister.dev/root-key/v1"
# libsodium's "moderate": 3 passes over 256 MiB, about half a second. What a file may ask for is bounded by "sensitive".
COST = (pwhash.argon2id.OPSLIMIT_MODERATE, pwhash.argon2id.MEMLIMIT_MODERATE)
MAX_COST = (pwhash.argon2id.OPSLIMIT_SENSITIVE, pwhash.argon2id.MEMLIMIT_SENSITIVE)

PASSPHRASE_VARIABLE = "CLOISTER_PASSPHRASE_FILE"  # noqa: S105  (the name of a variable)

Passphrase = Callable[[], bytes]


class RootKey:
    """The file in `directory` that says the root key."""

    def __init__(self, directory: Path, passphrase: Passphrase | None) -> None:
        self._files = {name: directory / name for name in (KEY_FILE, SEALED_FILE)}
        self._passphrase = passphrase
        self._own = self._files[SEALED_FILE if passphrase else KEY_FILE]
        self._coming = self._own.with_name(self._own.name + ".new")

    def exists(self) -> bool:
        return any(file.exists() for file in self._files.values())

    def make(self) -> bytes:
        """A new root key. It counts from `commit` on.

        Raises:
            InputError: the passphrase is too short.
        """
        root = new_key()
        write_atomic(self._coming, root if self._passphrase is None else _sealed(root, self._passphrase()))
        return root

    def commit(self) -> None:
        """From here on the root key is there, and nothing is ever started anew."""
        self._coming.replace(self._own)
        for file in self._files.values():
            file.with_name(file.name + ".new").unlink(missing_ok=True)
        folder = os.open(self._own.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def half_made(self) -> bool:
        """Whether `make` was interrupted before `commit`."""
        return any(file.with_name(file.name + ".new").exists() for file in self._files.values())

    def read(self) -> bytes:
        """The root key.

        Raises:
            InputError: open to others; another kind of protection than what is asked for; not this passphrase.
            IntegrityError: damaged.
        """
        file = self._own
        if not file.exists():
            if self._passphrase is None:
                raise InputError(
                    "the root key is sealed by a passphrase", "set authority.keys.passphrase: true in config.yaml"
                )
            raise InputError(
                "the root key is in a file, and no passphrase seals it",
                "leave authority.keys.passphrase out of config.yaml; only a new key service can have one",
            )
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise InputError(f"the root key is open to others: {file}", f"chmod 600 {file}")
        content = file.read_bytes()
        if self._passphrase is None:
            if len(content) != KEY_BYTES:
                raise damaged(file)
            return content
        return _opened(content, self._passphrase(), file)


def passphrase_in(file: Path) -> bytes:
    """The passphrase in a file: its first line.

    Raises:
        InputError: it cannot be read, or is open to others.
    """
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise InputError(f"the passphrase's file is open to others: {file}", f"chmod 600 {file}")
        return file.read_bytes().partition(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise InputError(
            f"the passphrase's file cannot be read: {error.strerror}", "check CLOISTER_PASSPHRASE_FILE, and config.yaml"
        ) from None


def damaged(file: Path) -> IntegrityError:
    return IntegrityError(f"the root key {file} is missing or damaged", "restore it: without it no key opens")


def _sealed(root: bytes, passphrase: bytes) -> bytes:
    if len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise InputError(
            f"the passphrase has fewer than {MIN_PASSPHRASE_BYTES} characters", "choose several random words"
        )
    salt, (passes, memory) = os.urandom(pwhash.argon2id.SALTBYTES), COST
    kek = pwhash.argon2id.kdf(KEY_BYTES, passphrase, salt, opslimit=passes, memlimit=memory)
    content = {
        "format": _FORMAT, "kdf": "argon2id", "passes": passes, "memory_bytes": memory, "salt": b64(salt),
        "root": b64(wrap_key(kek, root, _LABEL)),
    }  # fmt: skip
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _opened(content: bytes, passphrase: bytes, file: Path) -> bytes:
    try:
        known: dict[str, Any] = json.loads(content)
        passes, memory = known["passes"], known["memory_bytes"]
        good = (known["format"], known["kdf"]) == (_FORMAT, "argon2id")
        good = good and 0 < passes <= MAX_COST[0] and 0 < memory <= MAX_COST[1]
        salt, sealed = unb64(known["salt"]), unb64(known["root"])
        if not good:
            raise damaged(file)
        kek = pwhash.argon2id.kdf(KEY_BYTES, passphrase, salt, opslimit=passes, memlimit=memory)
    except (ValueError, KeyError, TypeError, CloisterError):
        raise damaged(file) from None
    try:
        return unwrap_key(kek, sealed, _LABEL)
    except IntegrityError:
        raise InputError("this passphrase does not open the root key", "type it again, or check its file") from None
