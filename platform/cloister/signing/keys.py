"""Signing keys: ECDSA on P-256 with SHA-256 for releases, Ed25519 for identities.

Guarantees: `verify` returns only for a good signature; a key of any other kind or curve is refused; one public key
has one id, whatever line endings its PEM was sent with.

Does not guarantee: that a key belongs to somebody, nor that a signature over the same bytes is unique (ECDSA's are
not): count keys, never signatures.
"""

from __future__ import annotations

import re
from typing import Protocol, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from cloister.canonical import sha256_hex
from cloister.errors import InputError, IntegrityError

P256PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
P256PublicKey: TypeAlias = ec.EllipticCurvePublicKey
PrivateKey: TypeAlias = P256PrivateKey | Ed25519PrivateKey
PublicKey: TypeAlias = P256PublicKey | Ed25519PublicKey


class Signer(Protocol):
    """A P-256 key that signs, wherever it is: it may be one that never leaves a key service."""

    def sign(self, message: bytes, /) -> bytes:
        """ECDSA with SHA-256 over `message`, ASN.1 DER."""

    def public_key(self) -> P256PublicKey:
        """Its public half."""


SigningKey: TypeAlias = PrivateKey | Signer

_ECDSA = ec.ECDSA(SHA256())


def generate_p256() -> P256PrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def generate_ed25519() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def private_from_pem(pem: bytes) -> PrivateKey:
    """A P-256 or Ed25519 private key from unencrypted PEM.

    Raises:
        InputError: anything else.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError("this is not an unencrypted private key in PEM", "export it as PKCS #8 PEM") from None
    if isinstance(key, Ed25519PrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and _is_p256(key)):
        return key
    raise InputError("this private key is neither P-256 nor Ed25519", "make one of these two kinds")


def p256_from_pem(pem: bytes) -> P256PrivateKey:
    """A P-256 private key; see `private_from_pem`."""
    key = private_from_pem(pem)
    if isinstance(key, Ed25519PrivateKey):
        raise InputError("this is an Ed25519 key, a P-256 key is needed", "release keys are P-256")
    return key


def ed25519_from_pem(pem: bytes) -> Ed25519PrivateKey:
    """An Ed25519 private key; see `private_from_pem`."""
    key = private_from_pem(pem)
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("this is a P-256 key, an Ed25519 key is needed", "identity keys are Ed25519")
    return key


def private_to_pem(key: PrivateKey) -> bytes:
    """PKCS #8 PEM without a password: wrap it before it is stored."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_from_pem(pem: bytes) -> PublicKey:
    """A P-256 or Ed25519 public key from SubjectPublicKeyInfo PEM.

    Raises:
        InputError: anything else.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError("this is not a public key in PEM", "export it as SubjectPublicKeyInfo PEM") from None
    if isinstance(key, Ed25519PublicKey) or (isinstance(key, ec.EllipticCurvePublicKey) and _is_p256(key)):
        return key
    raise InputError("this public key is neither P-256 nor Ed25519", "ask for one of these two kinds")


def p256_public_from_pem(pem: bytes) -> P256PublicKey:
    """A P-256 public key; see `public_from_pem`."""
    key = public_from_pem(pem)
    if isinstance(key, Ed25519PublicKey):
        raise InputError("this is an Ed25519 key, a P-256 key is needed", "release keys are P-256")
    return key


def ed25519_public_from_pem(pem: bytes) -> Ed25519PublicKey:
    """An Ed25519 public key; see `public_from_pem`."""
    key = public_from_pem(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise InputError("this is a P-256 key, an Ed25519 key is needed", "identity keys are Ed25519")
    return key


def public_to_pem(key: PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_id(public_pem: bytes) -> str:
    """Hex SHA-256 of the PEM as `public_to_pem` writes it: the `hint` of an OMS bundle, our DSSE `keyid`.

    Raises:
        InputError: not a P-256 or Ed25519 public key.
    """
    return key_id_of(public_from_pem(public_pem))


def key_id_of(key: PublicKey) -> str:
    return sha256_hex(public_to_pem(key))


def run_name(public_pem: bytes) -> str:
    """A run is called after its key. So whoever submits it can keep the key before there is a run to end with it.

    Raises:
        InputError: as `key_id`.
    """
    return f"run-{key_id(public_pem)[:10]}"


def is_run_name(name: str) -> bool:
    """Whether a run may be called so."""
    return re.fullmatch(r"run-[0-9a-f]{10}", name) is not None


def sign(key: SigningKey, data: bytes) -> bytes:
    """Ed25519 (64 bytes) or ECDSA P-256 with SHA-256 (ASN.1 DER)."""
    return key.sign(data, _ECDSA) if isinstance(key, P256PrivateKey) else key.sign(data)


def verify(key: PublicKey, signature: bytes, data: bytes) -> None:
    """Return only if `signature` is `key`'s over `data`.

    Raises:
        IntegrityError: it is not.
    """
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, _ECDSA)
    except InvalidSignature:
        raise IntegrityError("the signature does not hold", "do not use what it was made for") from None


def _is_p256(key: P256PrivateKey | P256PublicKey) -> bool:
    return isinstance(key.curve, ec.SECP256R1)
