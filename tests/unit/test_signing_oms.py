"""Model signatures, ours against the reference implementation in both directions."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.canonical import b64, unb64
from cloister.errors import InputError, IntegrityError
from cloister.signing import dsse, keys, oms

KEY = keys.generate_p256()
# `sub/x` sorts before `sub.txt` by path and after it by character.
CONTENT = {"model.onnx": b"weights", "manifest.json": b"{}", "sub/x": b"1", "sub.txt": b"2", "sub/Y": b"3"}
FILES = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}


def write_model(folder: Path) -> Path:
    model = folder / "model"
    for name, data in CONTENT.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(data)
    (folder / "public.pem").write_bytes(keys.public_to_pem(KEY.public_key()))
    (folder / "private.pem").write_bytes(keys.private_to_pem(KEY))
    return model


def reference(*arguments: str | Path) -> int:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def test_the_reference_verifier_accepts_our_bundle_and_refuses_a_changed_byte(tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the reference implementation is not installed")
    model, bundle = write_model(tmp_path), tmp_path / "model.sig"
    bundle.write_bytes(oms.sign_model("income", FILES, KEY))
    verify = ("verify", "key", model, "--signature", bundle, "--public_key", tmp_path / "public.pem")
    assert reference(*verify) == 0
    (model / "sub/x").write_bytes(b"0")
    assert reference(*verify) != 0
    (model / "sub/x").write_bytes(b"1")
    assert reference(*verify) == 0
    (model / "extra").write_bytes(b"")
    assert reference(*verify) != 0


def test_we_accept_a_bundle_of_the_reference_signer(tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the reference implementation is not installed")
    model, bundle = write_model(tmp_path), tmp_path / "model.sig"
    assert reference("sign", "key", model, "--signature", bundle, "--private_key", tmp_path / "private.pem") == 0
    ours = oms.verify_model(oms.sign_model("income", FILES, KEY), FILES, KEY.public_key())
    assert oms.verify_model(bundle.read_bytes(), FILES, KEY.public_key()) == ours
    with pytest.raises(IntegrityError):
        oms.verify_model(bundle.read_bytes(), {**FILES, ".git/config": "00" * 32}, KEY.public_key())


def test_the_root_digest_goes_folder_by_folder() -> None:
    raw = {name: bytes.fromhex(digest) for name, digest in FILES.items()}
    order = ["manifest.json", "model.onnx", "sub/Y", "sub/x", "sub.txt"]
    assert oms.root_digest(raw) == hashlib.sha256(b"".join(raw[name] for name in order)).hexdigest()


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({**FILES, "model.onnx": "00" * 32}, "changed"),
        ({name: digest for name, digest in FILES.items() if name != "sub/x"}, "missing"),
        ({**FILES, "payload.py": "00" * 32}, "never signed"),
        ({("sub/z" if name == "sub/x" else name): digest for name, digest in FILES.items()}, "missing"),
    ],
)
def test_changed_missing_added_and_renamed_files_are_refused(files: dict[str, str], word: str) -> None:
    with pytest.raises(IntegrityError, match=word):
        oms.verify_model(oms.sign_model("income", FILES, KEY), files, KEY.public_key())


def test_another_key_is_refused_even_when_the_hint_is_forged() -> None:
    other = keys.generate_p256()
    bundle = oms.sign_model("income", FILES, other)
    with pytest.raises(IntegrityError):
        oms.verify_model(bundle, FILES, KEY.public_key())
    fields = json.loads(bundle)
    fields["verificationMaterial"]["publicKey"]["hint"] = keys.key_id_of(KEY.public_key())
    with pytest.raises(IntegrityError):
        oms.verify_model(json.dumps(fields).encode(), FILES, KEY.public_key())


def test_a_good_signature_that_names_another_key_is_refused() -> None:
    fields = json.loads(oms.sign_model("income", FILES, KEY))
    fields["verificationMaterial"]["publicKey"]["hint"] = keys.key_id_of(keys.generate_p256().public_key())
    with pytest.raises(IntegrityError):
        oms.verify_model(json.dumps(fields).encode(), FILES, KEY.public_key())


def test_a_statement_of_another_kind_signed_by_the_release_key_is_no_model_signature() -> None:
    fields = json.loads(oms.sign_model("income", FILES, KEY))
    predicate = json.loads(unb64(fields["dsseEnvelope"]["payload"]))["predicate"]
    root = oms.root_digest({name: bytes.fromhex(digest) for name, digest in FILES.items()})
    fields["dsseEnvelope"] = dsse.sign(dsse.statement("income", root, "https://cloister.dev/gate/v1", predicate), KEY)
    with pytest.raises(IntegrityError):
        oms.verify_model(json.dumps(fields).encode(), FILES, KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [
        {"serialization": {"method": "shards", "hash_type": "sha256"}},
        {"serialization": {"method": "files", "hash_type": "blake2b"}},
        {"resources": [{"name": name, "algorithm": "md5", "digest": digest} for name, digest in FILES.items()]},
        {"resources": [{"name": n, "algorithm": "sha256", "digest": d} for n, d in [*FILES.items()] * 2]},
        {"resources": None},
    ],
)
def test_a_signed_predicate_that_is_not_understood_is_refused(change: dict[str, object]) -> None:
    fields = json.loads(oms.sign_model("income", FILES, KEY))
    statement = json.loads(unb64(fields["dsseEnvelope"]["payload"]))
    root, predicate = statement["subject"][0]["digest"]["sha256"], {**statement["predicate"], **change}
    fields["dsseEnvelope"] = dsse.sign(dsse.statement("income", root, oms.PREDICATE_TYPE, predicate), KEY)
    with pytest.raises(IntegrityError):
        oms.verify_model(json.dumps(fields).encode(), FILES, KEY.public_key())


def test_a_signed_root_that_is_not_that_of_the_files_is_refused() -> None:
    fields = json.loads(oms.sign_model("income", FILES, KEY))
    predicate = json.loads(unb64(fields["dsseEnvelope"]["payload"]))["predicate"]
    fields["dsseEnvelope"] = dsse.sign(dsse.statement("income", "00" * 32, oms.PREDICATE_TYPE, predicate), KEY)
    with pytest.raises(IntegrityError):
        oms.verify_model(json.dumps(fields).encode(), FILES, KEY.public_key())


def test_flipped_bits_of_the_payload_are_refused() -> None:
    fields = json.loads(oms.sign_model("income", FILES, KEY))
    payload = bytearray(unb64(fields["dsseEnvelope"]["payload"]))
    for byte in range(0, len(payload), 3):
        payload[byte] ^= 1
        fields["dsseEnvelope"]["payload"] = b64(bytes(payload))
        with pytest.raises(IntegrityError):
            oms.verify_model(json.dumps(fields).encode(), FILES, KEY.public_key())
        payload[byte] ^= 1


@pytest.mark.parametrize(
    "bundle", [b"", b"{}", b"[]", b"null", b'{"mediaType":1,"mediaType":2}', b"[" * 100_000, b"\xff"]
)
def test_what_is_no_bundle_is_refused(bundle: bytes) -> None:
    with pytest.raises(IntegrityError):
        oms.verify_model(bundle, FILES, KEY.public_key())


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../x", "./x", "a//b", ".git/config", ".gitignore"])
def test_paths_that_leave_the_model_or_that_verifiers_pass_over_are_not_signed(name: str) -> None:
    with pytest.raises(InputError):
        oms.sign_model("income", {name: "00" * 32}, KEY)


def test_a_model_without_files_or_with_a_bad_digest_is_not_signed() -> None:
    for files in ({}, {"a": "00"}, {"a": "AB" * 32}):
        with pytest.raises(InputError):
            oms.sign_model("income", files, KEY)
