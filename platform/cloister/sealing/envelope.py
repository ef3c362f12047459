"""Data keys wrapped under a key-encryption key (FORMAT.md, "Envelope").

Guarantees: a wrapped key opens only under the same key-encryption key and the same associated data, so a wrapped
key that was moved to another row or another dataset is refused; no error holds a key.

Does not guarantee: freshness (an old wrapped key still opens), nor secrecy once one key-encryption key has wrapped
2**32 keys, because nonces are random 96-bit values (NIST SP 800-38D, section 8.3). Rotate it long before that.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import InputError, IntegrityError

KEY_BYTES = 32
NONCE_BYTES = 12  # NIST SP 800-38D, section 8.2.2: a random nonce of 96 bits
TAG_BYTES = 16
VERSION = b"\x01"
KEY_VERSION_BYTES = 4
WRAPPED_BYTES = len(VERSION) + NONCE_BYTES + KEY_BYTES + TAG_BYTES
_LABEL = b"cloister.dev/envelope/v1\x00"
_CHECKPOINT_LABEL = b"cloister/checkpoint-key/v1"


def new_key() -> bytes:
    """A fresh 256-bit key from the operating system's generator."""
    return os.urandom(KEY_BYTES)


def checkpoint_key(model_key: bytes) -> bytes:
    """The key that a run's checkpoints are sealed under, so that ranks which never see the model's key can open them.

    Raises:
        InputError: the model's key is not 32 bytes.
    """
    if len(model_key) != KEY_BYTES:
        raise InputError("the model's key is not 32 bytes", "make it with new_key()")
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=_CHECKPOINT_LABEL).derive(model_key)


def wrap_key(kek: bytes, key: bytes, associated_data: bytes) -> bytes:
    """Seal `key` under `kek`, bound to `associated_data`, which is not stored.

    Raises:
        InputError: either key is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise InputError("the key to wrap is not 32 bytes", "make it with new_key()")
    nonce = os.urandom(NONCE_BYTES)
    return VERSION + nonce + _cipher(kek).encrypt(nonce, key, _LABEL + associated_data)


def unwrap_key(kek: bytes, wrapped: bytes, associated_data: bytes) -> bytes:
    """The key that `wrap_key` sealed.

    Raises:
        InputError: `kek` is not 32 bytes.
        IntegrityError: another key-encryption key, other associated data, or changed bytes.
    """
    cipher = _cipher(kek)
    if len(wrapped) != WRAPPED_BYTES or wrapped[:1] != VERSION:
        raise IntegrityError("this is not a wrapped key of a known version", "restore the row from a backup")
    nonce, sealed = wrapped[1 : 1 + NONCE_BYTES], wrapped[1 + NONCE_BYTES :]
    try:
        return cipher.decrypt(nonce, sealed, _LABEL + associated_data)
    except InvalidTag:
        raise IntegrityError(
            "the wrapped key does not open: it was changed, moved, or sealed under another key-encryption key",
            "check which key-encryption key is active, or restore the row from a backup",
        ) from None


def wrap_named(kek: bytes, key: bytes, associated_data: bytes, *, name: str, version: int) -> bytes:
    """As `wrap_key`, under version `version` of the key called `name`, which is bound too; the version is in front.

    Raises:
        InputError: as `wrap_key`.
    """
    number = version.to_bytes(KEY_VERSION_BYTES, "big")
    return number + wrap_key(kek, key, _named(name, number, associated_data))


def key_version(wrapped: bytes) -> int:
    """Under which version of its key something was wrapped. What it says is only bound once it was opened.

    Raises:
        IntegrityError: these are no bytes of `wrap_named`.
    """
    if len(wrapped) != KEY_VERSION_BYTES + WRAPPED_BYTES:
        raise IntegrityError("this is not a wrapped key of a known version", "restore the row from a backup")
    return int.from_bytes(wrapped[:KEY_VERSION_BYTES], "big")


def unwrap_named(kek: bytes, wrapped: bytes, associated_data: bytes, *, name: str) -> bytes:
    """The key that `wrap_named` sealed. Raises as `unwrap_key`."""
    number = key_version(wrapped).to_bytes(KEY_VERSION_BYTES, "big")
    return unwrap_key(kek, wrapped[KEY_VERSION_BYTES:], _named(name, number, associated_data))


def _named(name: str, number: bytes, associated_data: bytes) -> bytes:
    return name.encode() + b"\x00" + number + associated_data


def _cipher(kek: bytes) -> AESGCM:
    if len(kek) != KEY_BYTES:
        raise InputError("the key-encryption key is not 32 bytes", "make it with new_key()")
    return AESGCM(kek)
