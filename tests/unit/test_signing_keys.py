from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from cloister.errors import InputError, IntegrityError
from cloister.signing import keys

PAIR = [keys.generate_p256(), keys.generate_ed25519()]


@pytest.mark.parametrize("key", PAIR)
def test_keys_come_back_from_pem_and_sign(key: keys.PrivateKey) -> None:
    again = keys.private_from_pem(keys.private_to_pem(key))
    public = keys.public_from_pem(keys.public_to_pem(key.public_key()))
    keys.verify(public, keys.sign(again, b"data"), b"data")
    for signature, data in ((keys.sign(again, b"data"), b"date"), (b"", b"data"), (bytes(64), b"data")):
        with pytest.raises(IntegrityError):
            keys.verify(public, signature, data)


def test_one_kind_is_not_taken_for_the_other() -> None:
    p256, ed25519 = (keys.private_to_pem(key) for key in PAIR)
    with pytest.raises(InputError):
        keys.p256_from_pem(ed25519)
    with pytest.raises(InputError):
        keys.ed25519_from_pem(p256)
    p256_public, ed25519_public = (keys.public_to_pem(key.public_key()) for key in PAIR)
    with pytest.raises(InputError):
        keys.p256_public_from_pem(ed25519_public)
    with pytest.raises(InputError):
        keys.ed25519_public_from_pem(p256_public)
    assert isinstance(keys.p256_from_pem(p256), ec.EllipticCurvePrivateKey)
    assert keys.public_to_pem(keys.ed25519_public_from_pem(ed25519_public)) == ed25519_public


@pytest.mark.parametrize(
    "other", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(public_exponent=65537, key_size=2048)]
)
def test_other_curves_and_kinds_are_refused(other: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    with pytest.raises(InputError):
        keys.private_from_pem(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InputError):
        keys.public_from_pem(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def test_junk_and_encrypted_pem_are_refused() -> None:
    locked = PAIR[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    for pem in (b"", b"junk", locked, keys.public_to_pem(PAIR[0].public_key())):
        with pytest.raises(InputError):
            keys.private_from_pem(pem)
    with pytest.raises(InputError):
        keys.public_from_pem(keys.private_to_pem(PAIR[0]))


def test_a_key_has_one_id_whatever_the_line_endings() -> None:
    pem = keys.public_to_pem(PAIR[0].public_key())
    assert keys.key_id(pem) == hashlib.sha256(pem).hexdigest()
    assert keys.key_id(pem.replace(b"\n", b"\r\n")) == keys.key_id(pem) == keys.key_id_of(PAIR[0].public_key())
