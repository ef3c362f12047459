"""Project Wycheproof's edge cases against the primitives as Cloister calls them.

The vectors are not part of this repository. They are looked for in `../shared/vectors/wycheproof` beside it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from cloister.datasets import subjects
from cloister.errors import InputError, IntegrityError
from cloister.sealing.lease import ReceivingKey, seal_to
from cloister.signing import keys

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "wycheproof"


def cases(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"no Wycheproof vectors: put {name} into ../shared/vectors/wycheproof beside the repository")
    for group in json.loads(path.read_text(encoding="utf-8"))["testGroups"]:
        for case in group["tests"]:
            yield group, case


def raw(case: dict[str, Any], *fields: str) -> list[bytes]:
    return [bytes.fromhex(case[field]) for field in fields]


def test_aes_256_gcm() -> None:
    """Sizes that Cloister uses: 256-bit keys, 96-bit nonces, 128-bit tags; into a buffer and without."""
    seen = {"valid": 0, "invalid": 0}
    for group, case in cases("aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
        key, nonce, aad, message, ciphertext, tag = raw(case, "key", "iv", "aad", "msg", "ct", "tag")
        cipher, buffer = AESGCM(key), bytearray(len(ciphertext))
        seen[case["result"]] += 1
        if case["result"] == "valid":
            assert cipher.encrypt(nonce, message, aad) == ciphertext + tag
            assert cipher.decrypt(nonce, ciphertext + tag, aad) == message
            assert cipher.decrypt_into(nonce, ciphertext + tag, aad, buffer) == len(message)
            assert bytes(buffer) == message
        else:
            with pytest.raises(InvalidTag):
                cipher.decrypt(nonce, ciphertext + tag, aad)
            with pytest.raises(InvalidTag):
                cipher.decrypt_into(nonce, ciphertext + tag, aad, buffer)
    assert min(seen.values()) > 20


def test_hkdf_sha256() -> None:
    seen = 0
    for _, case in cases("hkdf_sha256_test.json"):
        secret, salt, info, expected = raw(case, "ikm", "salt", "info", "okm")
        if case["result"] == "valid":
            assert HKDF(SHA256(), case["size"], salt, info).derive(secret) == expected
            seen += 1
        else:
            with pytest.raises(ValueError, match="derive"):
                HKDF(SHA256(), case["size"], salt, info)
    assert seen > 50


def test_x25519_and_hpke_over_it() -> None:
    zero = 0
    for _, case in cases("x25519_test.json"):
        public, private, shared = raw(case, "public", "private", "shared")
        mine, theirs = X25519PrivateKey.from_private_bytes(private), X25519PublicKey.from_public_bytes(public)
        if not any(shared):
            # RFC 9180, section 7.1.4: a secret that everybody can predict is refused, sealing and opening.
            zero += 1
            with pytest.raises(ValueError, match="shared key"):
                mine.exchange(theirs)
            with pytest.raises(InputError):
                seal_to(public, b"secret", b"")
            with pytest.raises(IntegrityError):
                ReceivingKey.from_seed(private).open(b"\x01" + public + bytes(40), b"")
        else:
            assert mine.exchange(theirs) == shared
            key = ReceivingKey.from_seed(private)
            assert key.open(seal_to(key.public, b"secret", b"i"), b"i") == b"secret"
    assert zero > 10


def test_hmac_sha256() -> None:
    """256-bit keys: whole, as keys derive keys from contexts; cut to 128 bits, as tags of subjects."""
    seen = {"valid": 0, "invalid": 0}
    for group, case in cases("hmac_sha256_test.json"):
        if group["keySize"] != 256:
            continue
        key, message, tag = raw(case, "key", "msg", "tag")
        seen[case["result"]] += 1
        whole = hmac.digest(key, message, hashlib.sha256)
        (ours,) = subjects._macs(key, pa.chunked_array([pa.array([message], pa.binary())]))
        assert ours.tobytes() == whole[: subjects.TAG_BYTES]
        assert (whole[: len(tag)] == tag) == (case["result"] == "valid")
    assert min(seen.values()) > 20


def test_ed25519_for_statements_and_for_checkpoints() -> None:
    seen = {"valid": 0, "invalid": 0}
    for group, case in cases("ed25519_test.json"):
        key = keys.ed25519_public_from_pem(group["publicKeyPem"].encode())
        message, signature = raw(case, "msg", "sig")
        nacl_key = VerifyKey(key.public_bytes_raw())
        seen[case["result"]] += 1
        if case["result"] == "valid":
            keys.verify(key, signature, message)
            nacl_key.verify(message, signature)
        else:
            with pytest.raises(IntegrityError):
                keys.verify(key, signature, message)
            with pytest.raises((BadSignatureError, ValueError)):
                nacl_key.verify(message, signature)
    assert min(seen.values()) > 50


def test_ecdsa_p256() -> None:
    seen = {"valid": 0, "invalid": 0}
    for group, case in cases("ecdsa_secp256r1_sha256_test.json"):
        key = keys.p256_public_from_pem(group["publicKeyPem"].encode())
        message, signature = raw(case, "msg", "sig")
        seen[case["result"]] += 1
        if case["result"] == "valid":
            keys.verify(key, signature, message)
        else:
            with pytest.raises(IntegrityError):
                keys.verify(key, signature, message)
    assert min(seen.values()) > 100
