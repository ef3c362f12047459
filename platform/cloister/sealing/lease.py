"""Keys on the move: HPKE to the public key of whoever was granted them (FORMAT.md, "Lease").

RFC 9180, base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, empty AAD; `info` carries the context.

Guarantees: only the holder of the private key opens the message, and only with the same `info`; a one-time key opens
one message, then its private half is gone from the object; neither kind of key shows itself in `repr` or in an
error, and neither can be pickled or copied, so Ray cannot move it.

Does not guarantee: who sealed (base mode has no sender: take leases over mutual TLS only); that the memory of the
private half is overwritten (Python and OpenSSL free it).
"""

from __future__ import annotations

import threading
from typing import NoReturn, SupportsIndex

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from cloister.errors import ConflictError, InputError, IntegrityError

VERSION = b"\x01"
PUBLIC_BYTES = 32
SEED_BYTES = 32
_LABEL = b"cloister.dev/lease/v1\x00"
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def seal_to(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """Seal `plaintext` so that only the holder of `public`'s private half reads it, and only with the same `info`.

    Raises:
        InputError: not an X25519 public key, or one of the points that give a predictable secret.
    """
    try:
        return VERSION + _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public), _LABEL + info)
    except ValueError:
        raise InputError("this is not a usable X25519 public key", "make it with OneTimeKey.generate()") from None


class _Unpicklable:
    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a private key: it is neither pickled nor copied")


class OneTimeKey(_Unpicklable):
    """A key pair for one message. Make it where the secret will be used; send only `public`. Thread-safe."""

    __slots__ = ("_lock", "_private", "public")

    def __init__(self, private: X25519PrivateKey) -> None:
        self._lock = threading.Lock()
        self._private: X25519PrivateKey | None = private
        self.public: bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> OneTimeKey:
        return cls(X25519PrivateKey.generate())

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Open the one message and forget the private half. A message that does not open does not use the key up.

        Raises:
            ConflictError: the key has already opened its message.
            IntegrityError: sealed to another key, under another `info`, or changed.
        """
        with self._lock:
            if self._private is None:
                raise ConflictError("this one-time key is used up", "make a fresh one and ask for a new lease")
            plaintext = _open(self._private, sealed, info)
            self._private = None
            return plaintext

    def __repr__(self) -> str:
        return f"OneTimeKey(public={self.public.hex()}, used={self._private is None})"


class ReceivingKey(_Unpicklable):
    """A long-lived key pair: the authority's, to which owners seal data keys. `private_bytes` is for its key store."""

    __slots__ = ("_private", "public")

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> ReceivingKey:
        return cls(X25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> ReceivingKey:
        """The key pair whose `private_bytes()` is `seed`.

        Raises:
            InputError: not 32 bytes.
        """
        if len(seed) != SEED_BYTES:
            raise InputError("the seed is not 32 bytes", "make it with cloister.sealing.envelope.new_key()")
        return cls(X25519PrivateKey.from_private_bytes(seed))

    def private_bytes(self) -> bytes:
        """The seed. Wrap it before it is stored."""
        return self._private.private_bytes_raw()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Open a message sealed to this key.

        Raises:
            IntegrityError: sealed to another key, under another `info`, or changed.
        """
        return _open(self._private, sealed, info)

    def __repr__(self) -> str:
        return f"ReceivingKey(public={self.public.hex()})"


def _open(private: X25519PrivateKey, sealed: bytes, info: bytes) -> bytes:
    if sealed[:1] != VERSION:
        raise IntegrityError("this is not a sealed key of a known version", "ask for a new lease")
    try:
        return _SUITE.decrypt(sealed[1:], private, _LABEL + info)
    except (InvalidTag, ValueError):
        raise IntegrityError(
            "the sealed key does not open: it was changed, or sealed to another key or for another purpose",
            "ask for a new lease",
        ) from None
