"""Every cryptographic primitive that Cloister imports is tested against vectors of others; no new one slips in.

Where no published vector fits how a library is called, two implementations are compared, and one with the standard.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from nacl import pwhash

SOURCE = Path(__file__).resolve().parents[2] / "platform" / "cloister"
# What is imported, by its last name, and the test that holds it against vectors.
COVERED = {
    "AESGCM": "test_wycheproof.test_aes_256_gcm",
    "HKDF": "test_wycheproof.test_hkdf_sha256",
    "hmac": "test_wycheproof.test_hmac_sha256",
    "X25519PrivateKey": "test_wycheproof.test_x25519_and_hpke_over_it",
    "X25519PublicKey": "test_wycheproof.test_x25519_and_hpke_over_it",
    "Ed25519PrivateKey": "test_wycheproof.test_ed25519_for_statements_and_for_checkpoints",
    "Ed25519PublicKey": "test_wycheproof.test_ed25519_for_statements_and_for_checkpoints",
    "SigningKey": "test_wycheproof.test_ed25519_for_statements_and_for_checkpoints",
    "VerifyKey": "test_wycheproof.test_ed25519_for_statements_and_for_checkpoints",
    "ec": "test_wycheproof.test_ecdsa_p256",
    "EllipticCurvePrivateKey": "test_wycheproof.test_ecdsa_p256",
    "RSAPrivateKey": "test_wycheproof_jose.test_signatures",  # only a key's type is looked at; joserfc verifies
    "Suite": "test_our_vectors.test_lease",  # HPKE, with a second implementation from RFC 9180
    "KEM": "test_our_vectors.test_lease",
    "KDF": "test_our_vectors.test_lease",
    "AEAD": "test_our_vectors.test_lease",
    "Cipher": "test_primitives.test_chacha20",
    "ChaCha20": "test_primitives.test_chacha20",
    "pwhash": "test_primitives.test_argon2id",
    "encryption": "test_our_vectors.test_shard",  # Parquet Modular Encryption
}
# Containers, encodings and errors: nothing to compute. SHA-256 is under all the others.
NOT_A_PRIMITIVE = {
    "x509", "serialization", "hashes", "SHA256", "ExtendedKeyUsageOID", "NameOID", "load_pem_private_key",
    "load_pem_public_key", "Encoding", "NoEncryption", "PrivateFormat", "PublicFormat", "CipherContext",
}  # fmt: skip


def imported() -> set[str]:
    """The last names of all that comes from cryptographic modules."""
    found: set[str] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                found |= {name.rpartition(".")[2] for name in names if _is_cryptographic(name)}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name.rpartition(".")[2] for name in names if _is_cryptographic(name)}
    return found


def _is_cryptographic(name: str) -> bool:
    top = name.partition(".")[0]
    ours = top in ("cryptography", "nacl", "hmac") and ".exceptions" not in name
    return ours or "parquet.encryption" in name


def test_every_primitive_in_use_has_vectors() -> None:
    found = imported()
    assert {"AESGCM", "HKDF", "hmac", "Suite", "pwhash", "encryption", "ChaCha20"} <= found, "the search works"
    assert found - COVERED.keys() - NOT_A_PRIMITIVE == set(), "give it vectors, and say here which test has them"
    for name in found & COVERED.keys():
        module, _, test = COVERED[name].partition(".")
        assert hasattr(importlib.import_module(module), test), f"{name}: there is no {COVERED[name]}"


# RFC 8439, appendix A.1: key (its last byte), nonce (its last byte), block, first 16 bytes of the keystream.
KEYSTREAMS = [
    (0, 0, 0, "76b8e0ada0f13d90405d6ae55386bd28"),
    (0, 0, 1, "9f07e7be5551387a98ba977c732d080d"),
    (1, 0, 1, "3aeb5224ecf849929b9d828db1ced4dd"),
    (0, 2, 0, "c2c64d378cd536374ae204b9ef933fcd"),
]


@pytest.mark.parametrize(("key", "nonce", "block", "expected"), KEYSTREAMS)
def test_chacha20(key: int, nonce: int, block: int, expected: str) -> None:
    """The library takes RFC 8439's counter and nonce as one value of 16 bytes, as `Keystream` gives it."""
    full_nonce = block.to_bytes(4, "little") + bytes(11) + bytes([nonce])
    stream = Cipher(ChaCha20(bytes(31) + bytes([key]), full_nonce), mode=None).encryptor()
    assert stream.update(bytes(16)).hex() == expected


def test_argon2id() -> None:
    """libsodium offers one lane and no secret, so RFC 9106's vector does not fit it: OpenSSL's is held against that
    vector, and libsodium's against OpenSSL's."""
    rfc_9106_section_5_3 = Argon2id(
        salt=b"\x02" * 16, length=32, iterations=3, lanes=4, memory_cost=32, ad=b"\x04" * 12, secret=b"\x03" * 8
    )
    expected = "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"
    assert rfc_9106_section_5_3.derive(b"\x01" * 32).hex() == expected
    for passphrase, salt, passes, kibibytes in (
        (b"correct horse battery staple", bytes(range(16)), 1, 8),
        (b"", bytes(16), 2, 64),
        ("Žofie Åström".encode(), b"\xff" * 16, 3, 1024),
    ):
        theirs = Argon2id(salt=salt, length=32, iterations=passes, lanes=1, memory_cost=kibibytes).derive(passphrase)
        ours = pwhash.argon2id.kdf(32, passphrase, salt, opslimit=passes, memlimit=kibibytes * 1024)
        assert ours == theirs
