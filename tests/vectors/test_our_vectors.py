"""The byte formats of FORMAT.md, frozen: files and notes that exist must open for ever, broken ones never.

The stream and the lease are also read by a second implementation, written here from the specification alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.audit import checkpoint
from cloister.audit.verify import verify_log
from cloister.datasets.ingest import read_table
from cloister.datasets.manifest import DatasetManifest
from cloister.datasets.schema import DatasetSchema
from cloister.datasets.subjects import SubjectKeys, protect, pseudonym, subject_tag
from cloister.errors import InputError, IntegrityError
from cloister.sealing import envelope, shard, stream
from cloister.sealing.lease import ReceivingKey

EXPECTATIONS = {"success", "integrity failure"}


def vectors(name: str) -> list[Any]:
    content = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    return [pytest.param(vector, id=f"{name}: {vector['scenario']}") for vector in content["vectors"]]


def raw(vector: dict[str, Any], field: str) -> bytes:
    return bytes.fromhex(vector[field])


def judge(vector: dict[str, Any], action: Any, result: Any) -> None:
    assert vector["expect"] in EXPECTATIONS
    if vector["expect"] == "success":
        assert action() == result()
    else:
        with pytest.raises(IntegrityError):
            action()


@pytest.mark.parametrize("vector", vectors("envelope"))
def test_envelope(vector: dict[str, Any]) -> None:
    kek, wrapped, data = (raw(vector, field) for field in ("kek", "wrapped", "associated_data"))
    if "name" in vector:
        unwrap = lambda: envelope.unwrap_named(kek, wrapped, data, name=vector["name"])  # noqa: E731
    else:
        unwrap = lambda: envelope.unwrap_key(kek, wrapped, data)  # noqa: E731
    judge(vector, unwrap, lambda: raw(vector, "key"))


@pytest.mark.parametrize("vector", [vector for vector in vectors("stream") if "sealed" in vector.values[0]])
def test_stream(vector: dict[str, Any]) -> None:
    key, sealed = raw(vector, "key"), raw(vector, "sealed")
    judge(vector, lambda: stream.open_sealed(key, sealed, vector["context"]), lambda: raw(vector, "plaintext"))


@pytest.mark.parametrize("vector", [vector for vector in vectors("stream") if "header" in vector.values[0]])
def test_stream_of_several_chunks(vector: dict[str, Any]) -> None:
    size, header = vector["plaintext_bytes"], raw(vector, "header")
    plaintext = (bytes(range(251)) * (size // 251 + 1))[:size]
    sealed = stream_by_the_book(raw(vector, "key"), plaintext, vector["context"], header)
    assert hashlib.sha256(sealed).hexdigest() == vector["sealed_sha256"]
    assert stream.open_sealed(raw(vector, "key"), sealed, vector["context"]) == plaintext


@pytest.mark.parametrize("vector", vectors("lease"))
def test_lease(vector: dict[str, Any]) -> None:
    key = ReceivingKey.from_seed(raw(vector, "private"))
    assert key.public == raw(vector, "public")
    judge(vector, lambda: key.open(raw(vector, "sealed"), raw(vector, "info")), lambda: raw(vector, "plaintext"))
    if vector["expect"] == "success":
        assert hpke_by_the_book(raw(vector, "private"), raw(vector, "sealed"), raw(vector, "info")) == raw(
            vector, "plaintext"
        )


@pytest.mark.parametrize("vector", vectors("shard"))
def test_shard(vector: dict[str, Any]) -> None:
    aad = shard.shard_aad(**vector["shard"])
    judge(
        vector,
        lambda: in_json(shard.open_table(raw(vector, "sealed"), raw(vector, "key"), aad)),
        lambda: vector["table"],
    )


def in_json(table: pa.Table) -> dict[str, list[Any]]:
    return {
        name: [value.hex() if isinstance(value, bytes) else value for value in values]
        for name, values in table.to_pydict().items()
    }


def test_the_names_in_a_shards_aad_are_those_of_the_book() -> None:
    names = b'{"dataset":"adult","part":"confidential","region":"eu","shard":"train-000","version":1}'
    assert shard.shard_aad("adult", 1, "confidential", "train-000", "eu") == b"cloister.dev/shard/v2\x00" + names


@pytest.mark.parametrize("vector", vectors("subjects"))
def test_subjects(vector: dict[str, Any]) -> None:
    """Alone, as erasing asks, and in a table, as sealing does."""
    column = {"name": "who", "type": vector["type"], "class": "restricted", "role": "unit"}
    column |= {"text": {"role": "identifier"}, "integer": {"bounds": [-99, 99]}, "category": {"values": ["ward B"]}}[
        vector["type"]
    ]
    facts = {"name": "a", "purpose": "p", "region": "eu", "retention": "P1Y", "unit": {"column": "who", "max_rows": 2}}
    schema = DatasetSchema.from_mapping(facts | {"columns": [column]})
    keys = SubjectKeys(pseudonym=raw(vector, "pseudonym_key"), index=raw(vector, "index_key"))
    assert subject_tag(keys.index, schema.columns[0], vector["value"]).hex() == vector["tag"]
    table, tags = protect(read_table(f'who\n"{vector["value"]}"\n'.encode(), schema), schema, keys)
    assert tags is not None
    assert [tag.tobytes().hex() for tag in tags] == [vector["tag"]]
    if vector["pseudonym"]:
        assert table.to_pydict() == {"who": [vector["pseudonym"]]}
        assert pseudonym(keys.pseudonym, vector["value"].strip()) == vector["pseudonym"]


@pytest.mark.parametrize("vector", vectors("manifest"))
def test_manifest(vector: dict[str, Any]) -> None:
    if vector["expect"] == "success":
        manifest = DatasetManifest.parse(vector["manifest"])
        assert manifest.digest == vector["digest"]
        assert manifest.model_dump(mode="json")["dataset_schema"] == vector["manifest"]["dataset_schema"]
    else:
        assert vector["expect"] == "input refused"
        with pytest.raises(InputError):
            DatasetManifest.parse(vector["manifest"])


@pytest.mark.parametrize("vector", vectors("checkpoint"))
def test_checkpoint(vector: dict[str, Any]) -> None:
    _, public = checkpoint.parse_verifier_key(vector["verifier_key"])
    entries = [entry.encode() for entry in vector["entries"]]

    def check() -> tuple[int, str]:
        report = verify_log(entries, [vector["note"]], public, vector["origin"])
        return report.size, report.root_hex

    judge(vector, check, lambda: (vector["size"], vector["root"]))


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt, secret, "sha256")


def hkdf_expand(key: bytes, info: bytes, size: int) -> bytes:
    assert size <= 32
    return hmac.digest(key, info + b"\x01", "sha256")[:size]


def stream_by_the_book(key: bytes, plaintext: bytes, context: dict[str, str], header: bytes) -> bytes:
    """FORMAT.md, "Stream", with nothing of ours but the label."""
    subkey = hkdf_expand(hkdf_extract(header[9:41], key), b"cloister.dev/stream/v1", 32)
    aad = header + json.dumps(context, sort_keys=True, separators=(",", ":")).encode()
    chunks = [plaintext[start : start + 2**20] for start in range(0, len(plaintext), 2**20)] or [b""]
    sealed = header
    for index, chunk in enumerate(chunks):
        nonce = index.to_bytes(11, "big") + (b"\x01" if index == len(chunks) - 1 else b"\x00")
        sealed += AESGCM(subkey).encrypt(nonce, chunk, aad)
    return sealed


def hpke_by_the_book(private: bytes, sealed: bytes, info: bytes) -> bytes:
    """RFC 9180, base mode, suite (0x0020, 0x0001, 0x0002), sequence number 0, empty AAD."""
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x02"

    def extract(scope: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
        return hkdf_extract(salt, b"HPKE-v1" + scope + label + secret)

    def expand(scope: bytes, key: bytes, label: bytes, context: bytes, size: int) -> bytes:
        return hkdf_expand(key, size.to_bytes(2, "big") + b"HPKE-v1" + scope + label + context, size)

    encapsulated, ciphertext = sealed[1:33], sealed[33:]
    mine = X25519PrivateKey.from_private_bytes(private)
    shared = mine.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    context = encapsulated + mine.public_key().public_bytes_raw()
    secret = expand(kem, extract(kem, b"", b"eae_prk", shared), b"shared_secret", context, 32)
    full_info = b"cloister.dev/lease/v1\x00" + info
    schedule = b"\x00" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", full_info)
    final = extract(suite, secret, b"secret", b"")
    key, nonce = expand(suite, final, b"key", schedule, 32), expand(suite, final, b"base_nonce", schedule, 12)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")
