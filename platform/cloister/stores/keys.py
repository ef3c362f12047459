"""The embedded key service: a root key in a 0600 file, everything else sealed under it.

Guarantees: keys and signing keys rest only encrypted; each wrapped key is bound to its associated data; the key
ring file is replaced atomically, so a crash leaves the old ring or the new one.
Not guaranteed: protection from whoever can read the root key file. Name a Vault for that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from cloister.canonical import b64, unb64
from cloister.errors import InputError, IntegrityError, NotFoundError
from cloister.sealing.envelope import KEY_BYTES, new_key, unwrap_key, wrap_key
from cloister.sealing.stream import open_sealed, seal
from cloister.stores.files import locked, private_directory, read_json, write_atomic, write_json

_FORMAT = "cloister.dev/keyring/v1"
_KEK_LABEL = b"cloister.dev/keyring/v1/kek"


class KeyService(Protocol):
    """What the authority needs from a key management service."""

    def wrap(self, key: bytes, associated_data: bytes) -> bytes:
        """Encrypt a data key under the current key-encryption key."""

    def unwrap(self, wrapped: bytes, associated_data: bytes) -> bytes:
        """The inverse of `wrap`; IntegrityError when bytes or associated data differ."""

    def secret(self, name: str) -> bytes:
        """A stored secret, such as a signing key's PEM; NotFoundError when there is none."""

    def store_secret(self, name: str, value: bytes) -> None:
        """Store or replace a secret."""

    def remember(self, size: int, root: str) -> None:
        """Keep how long the log was, and its root in hex, where restoring the database does not reach."""

    def remembered(self) -> tuple[int, str] | None:
        """What was last kept; None before the first time."""


class EmbeddedKeys:
    """`directory/root.key` and `directory/keyring.json`."""

    def __init__(self, directory: Path) -> None:
        """Open the key service, or make a new one in an empty folder.

        Raises:
            IntegrityError: one of the two files is missing or the root key does not open the ring.
        """
        private_directory(directory)
        self._ring_file = directory / "keyring.json"
        self._anchor_file = directory / "anchor.json"
        root_file = directory / "root.key"
        if not self._ring_file.exists() and not root_file.exists():
            write_atomic(root_file, os.urandom(KEY_BYTES), replace=False)
            self._root = root_file.read_bytes()
            ring = {
                "format": _FORMAT,
                "kek": b64(wrap_key(self._root, new_key(), _KEK_LABEL)),
                "secrets": {},
            }
            write_json(self._ring_file, ring)
        if not root_file.exists() or len(root_file.read_bytes()) != KEY_BYTES:
            raise IntegrityError(
                f"the root key {root_file} is missing or damaged", "restore it: without it no key opens"
            )
        self._root = root_file.read_bytes()
        self._ring = self._read_ring()
        self._kek = unwrap_key(self._root, unb64(self._ring["kek"]), _KEK_LABEL)

    def _read_ring(self) -> dict[str, Any]:
        hint = f"restore {self._ring_file} from a backup: without it no key opens"
        try:
            ring = read_json(self._ring_file, what="key ring", hint=hint)
            known = ring["format"] == _FORMAT and isinstance(ring["kek"], str) and isinstance(ring["secrets"], dict)
        except (NotFoundError, InputError, KeyError, TypeError):
            known = False
        if not known:
            raise IntegrityError(f"the key ring {self._ring_file} is missing, damaged or of an unknown version", hint)
        return dict(ring)

    def wrap(self, key: bytes, associated_data: bytes) -> bytes:
        return wrap_key(self._kek, key, associated_data)

    def unwrap(self, wrapped: bytes, associated_data: bytes) -> bytes:
        return unwrap_key(self._kek, wrapped, associated_data)

    def secret(self, name: str) -> bytes:
        if name not in self._ring["secrets"]:
            self._ring = self._read_ring()  # another process may have stored it
        if name not in self._ring["secrets"]:
            raise NotFoundError(f"the key ring holds no secret {name!r}", "start the authority once to make it")
        return open_sealed(self._root, unb64(self._ring["secrets"][name]), _secret_context(name))

    def store_secret(self, name: str, value: bytes) -> None:
        sealed = b64(seal(self._root, value, _secret_context(name)))
        with locked(self._ring_file.with_suffix(".lock")):
            self._ring = self._read_ring()
            self._ring["secrets"][name] = sealed
            write_json(self._ring_file, self._ring)

    def remember(self, size: int, root: str) -> None:
        with locked(self._anchor_file.with_suffix(".lock")):
            kept = self.remembered()
            if kept is None or kept[0] < size:  # another process may have come further
                write_json(self._anchor_file, {"size": size, "root": root})

    def remembered(self) -> tuple[int, str] | None:
        if not self._anchor_file.exists():
            return None
        kept = read_json(self._anchor_file, what="anchor of the log", hint=f"restore {self._anchor_file} from a backup")
        return int(kept["size"]), str(kept["root"])


def _secret_context(name: str) -> dict[str, str]:
    return {"use": "cloister.dev/keyring/v1/secret", "name": name}
