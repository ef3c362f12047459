"""The random bytes behind sampling and noise: ChaCha20 keystreams under keys that exist once.

Guarantees: streams for different purposes, runs, attempts, ranks, steps or shards are independent (RFC 5869 HKDF,
RFC 8439 ChaCha20); a stream only moves forward, so no block of it is handed out twice; `repr` and pickle never show a
key.
Not promised: secrecy of draws against somebody who reads this process's memory.

An attempt makes its own `fresh_secret()` and never stores it. A crashed attempt can therefore not be replayed: its
noise could otherwise be subtracted from what a resumed attempt releases.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.canonical import canonical_json

SECRET_BYTES = 32
KEY_BYTES = 32
_LABEL = "cloister/privacy-stream/v2"
# RFC 8439 section 2.3: a 32-bit block counter under one nonce. `cryptography` takes counter and nonce as 16 bytes.
_COUNTER_BYTES = 4
_NONCE_BYTES = 12
_MAX_BYTES_PER_DRAW = 64 * 2**32


def fresh_secret() -> bytes:
    """32 bytes from the operating system. One per process and attempt; never stored, never sent."""
    return os.urandom(SECRET_BYTES)


def derive_key(
    secret: bytes, *, purpose: str, run: str, attempt: int, rank: int, step: int | None = None, shard: str | None = None
) -> bytes:
    """The key of one stream: HKDF-SHA256 of a secret, an attempt's or a run's, bound to all that names it.

    A stream that serves all steps or all shards of its rank has none of its own; `None` is unlike any number or name.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a stream secret has {SECRET_BYTES} bytes")
    name = {"purpose": purpose, "run": run, "attempt": attempt, "rank": rank, "step": step, "shard": shard}
    info = canonical_json({"label": _LABEL, **name})
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def chacha20(key: bytes, nonce: int) -> CipherContext:
    """The keystream of one nonce from its first block on: what it makes of zeros is uniform."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a ChaCha20 key has {KEY_BYTES} bytes")
    full_nonce = bytes(_COUNTER_BYTES) + nonce.to_bytes(_NONCE_BYTES, "little")
    return Cipher(ChaCha20(key, full_nonce), mode=None).encryptor()


class Unrepeatable:
    """Can be neither copied nor pickled: the copy, or what is restored, would repeat what was drawn."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("random streams are never pickled: restoring one would repeat released noise")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("random streams are never copied: the copy would repeat their draws")

    __copy__ = __reduce__


class Keystream(Unrepeatable):
    """Uniform 64-bit words. Every draw uses the next nonce under the key; there is no way back."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a ChaCha20 key has {KEY_BYTES} bytes")
        self._key = key
        self._draw = 0

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next `count` independent uniform words."""
        if 8 * count > _MAX_BYTES_PER_DRAW:
            raise ValueError("one draw may not exceed the ChaCha20 block counter")
        stream = chacha20(self._key, self._draw)
        self._draw += 1
        return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def __repr__(self) -> str:
        return f"Keystream(draw={self._draw})"
