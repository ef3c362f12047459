"""A small true world for the serving tests: real keys, a real signed release, a real ONNX model; only the authority's
network is replaced by an object. The model says `yes` where `age` is high, `no` where it is low.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cloister.canonical import sha256_hex
from cloister.datasets.encoding import FeatureEncoder
from cloister.datasets.schema import Column
from cloister.models.manifest import MANIFEST_FILE, MODEL_FILE, ModelManifest
from cloister.models.release import (
    APPROVAL_PREDICATE,
    APPROVERS_PREDICATE,
    PROVENANCE_PREDICATE,
    model_seal_context,
    provenance_digest,
)
from cloister.sealing.stream import seal
from cloister.serving.endpoint import Endpoint
from cloister.serving.release import Release
from cloister.serving.replica import Backing
from cloister.signing import certificates, dsse, keys, oms, tokens

NOW = 1_800_000_000.0
ISSUER = "https://127.0.0.1:8443"
MODEL = "income"
FEATURES: tuple[dict[str, object], ...] = (
    {"name": "age", "type": "integer", "class": "internal", "bounds": [0, 100]},
    {"name": "job", "type": "category", "class": "internal", "values": ["clerk", "smith"]},
    {"name": "hours", "type": "number", "class": "internal", "bounds": [0, 80]},
)
GOOD_COLUMNS: dict[str, list[object]] = {"age": [90, 5], "job": ["clerk", "smith"], "hours": [40.5, 10]}


@dataclass
class Person:
    """Somebody with a key of their own."""

    name: str
    key: Any = field(default_factory=keys.generate_ed25519)

    @property
    def entry(self) -> dict[str, Any]:
        public = keys.public_to_pem(self.key.public_key()).decode()
        return {"person": self.name, "roles": ["reviewer"], "public_key": public}


RELEASE_KEY = keys.generate_p256()
ANA, BEN, CY = Person("ana"), Person("ben"), Person("cy")  # ana is the author


def onnx_model(width: int, classes: int = 2) -> bytes:
    """softmax(features · W): class 1 grows with the first input."""
    weights = np.zeros((width, classes), dtype=np.float32)
    weights[0] = [-3.0, 3.0, *([0.0] * (classes - 2))]
    bias = np.array([1.5, -1.5, *([0.0] * (classes - 2))], dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["features", "W", "b"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        ],
        "mlp",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(weights, "W"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.ModelProto.SerializeToString(model)


def manifest(**changes: Any) -> bytes:
    facts: dict[str, Any] = {
        "name": MODEL, "run": "run-1", "dataset": "adult@1", "label": "income", "labels": ["no", "yes"],
        "features": FEATURES, "architecture": {"architecture": "mlp"},
    }  # fmt: skip
    return ModelManifest.model_validate(facts | changes).to_bytes()


def statement(predicate_type: str, root: str, predicate: dict[str, Any], key: Any = None) -> dict[str, Any]:
    return dsse.sign(dsse.statement(MODEL, root, predicate_type, predicate), key or RELEASE_KEY)


def directory(root: str, approvers: Sequence[Person], author: Person = ANA, key: Any = None) -> dict[str, Any]:
    predicate = {"author": author.entry, "approvers": [person.entry for person in approvers]}
    return statement(APPROVERS_PREDICATE, root, predicate, key)


def provenance(root: str) -> dict[str, Any]:
    return statement(PROVENANCE_PREDICATE, root, {"author": ANA.name, "run": "run-1"})


def approval(root: str, signer: Person, *, about: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """`about` changes what is approved, `changes` the rest of the statement."""
    details = {"model": f"{MODEL}@1", "stage": "production", "provenance": provenance_digest(provenance(root))}
    said = {"approval": "apr-1", "kind": "promotion", "person": signer.name, "decision": "approve",
            "expires": int(NOW) + 3600, "details": details | dict(about or {})}  # fmt: skip
    return statement(APPROVAL_PREDICATE, root, said | changes, signer.key)


def root_of(model_onnx: bytes, manifest_bytes: bytes) -> str:
    raw = {MODEL_FILE: bytes.fromhex(sha256_hex(model_onnx)), MANIFEST_FILE: bytes.fromhex(sha256_hex(manifest_bytes))}
    return oms.root_digest(raw)


def signed_release(
    model_onnx: bytes | None = None, manifest_bytes: bytes | None = None, approvers: Sequence[Person] = (BEN, CY)
) -> Release:
    """A release in which every step holds, for two required approvals."""
    manifest_bytes = manifest_bytes or manifest()
    width = FeatureEncoder([Column.model_validate(column) for column in FEATURES]).width
    model_onnx = model_onnx or onnx_model(width)
    root = root_of(model_onnx, manifest_bytes)
    files = {MODEL_FILE: sha256_hex(model_onnx), MANIFEST_FILE: sha256_hex(manifest_bytes)}
    return Release(
        model_onnx=model_onnx,
        manifest=manifest_bytes,
        bundle=oms.sign_model(MODEL, files, RELEASE_KEY),
        provenance=provenance(root),
        directory=directory(root, approvers),
        approvals=[approval(root, person) for person in approvers],
    )


@dataclass(frozen=True)
class Lease:
    model: str
    model_onnx_sealed: bytes
    model_key: bytes
    seal_context: dict[str, str]
    manifest: bytes
    bundle: bytes
    provenance: Mapping[str, Any]
    directory: Mapping[str, Any]
    approvals: Sequence[Mapping[str, Any]]


class FakeAuthority:
    """Grants what it is told to: `budget` rows per subject until `window_ends`."""

    def __init__(self, release: Release | None = None, budget: int = 10_000, window_ends: float = NOW + 60) -> None:
        self.release = release or signed_release()
        self.budget = budget
        self.window_ends = window_ends
        self.used: dict[str, int] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.token_keys: dict[str, str] = {}
        self.revoked: list[dict[str, Any]] = []
        self.site = ""
        self.serving = True

    def lease_model(self, endpoint_id: str) -> Lease:  # noqa: ARG002
        key, context = os.urandom(32), model_seal_context("run-1")
        release = self.release
        return Lease(
            f"{MODEL}@1",
            seal(key, release.model_onnx, context), key, context, release.manifest, release.bundle,
            release.provenance, release.directory, release.approvals,
        )  # fmt: skip

    def take_quota_block(self, endpoint_id: str, subject: str, wanted: int) -> tuple[int, float]:
        self.asked.append((endpoint_id, subject, wanted))
        granted = min(wanted, self.budget - self.used.get(subject, 0))
        self.used[subject] = self.used.get(subject, 0) + granted
        return granted, self.window_ends

    def changes(self, endpoint_id: str, after: int, policy_version: int) -> dict[str, Any]:  # noqa: ARG002
        version = int(bool(self.site))
        return {
            "sequence": len(self.revoked),
            "revoked": self.revoked[after:],
            "policy": None if version == policy_version else {"version": version, "text": self.site},
            "token_keys": self.token_keys,
            "serving": self.serving,
        }


def changed(release: Release, **changes: Any) -> Release:
    return replace(release, **changes)


class TokenMaker:
    """The authority's token key; `keys` as it publishes it."""

    def __init__(self) -> None:
        key = keys.generate_ed25519()
        self.private = keys.private_to_pem(key)
        self.public = keys.public_to_pem(key.public_key())
        self.keys = {"k1": self.public.decode()}

    def token(self, subject: str = "dora", roles: Sequence[str] = ("consumer",), now: float = NOW, **extra: Any) -> str:
        arguments: dict[str, Any] = {"issuer": ISSUER, "audience": tokens.INFERENCE_AUDIENCE, "lifetime_s": 300}
        return tokens.issue(self.private, subject=subject, roles=roles, now=now, key_id="k1", **(arguments | extra))


def write_endpoint(path: Path, maker: TokenMaker, *, port: int = 0, **config: Any) -> Path:
    """An endpoint directory with a certificate for loopback; the CA is `ca.crt` in it."""
    path.mkdir(mode=0o700)
    ca_key, leaf_key = certificates.new_private_key(), certificates.new_private_key()
    ca = certificates.new_ca(ca_key, "test CA")
    leaf = certificates.issue(ca_key, ca, certificates.signing_request(leaf_key, "endpoint"), hosts=("127.0.0.1",))
    facts = {"endpoint": "ep-1", "model": MODEL, "authority_url": ISSUER, "authority_ca": "ca.crt", "port": port}
    trust = {
        "release_key": keys.public_to_pem(RELEASE_KEY.public_key()).decode(), "required_approvals": 2,
        "token_issuer": ISSUER, "token_keys": maker.keys,
    }  # fmt: skip
    files = {
        "endpoint.json": json.dumps(facts | config).encode(),
        "trust.json": json.dumps(trust).encode(),
        "endpoint.key": keys.private_to_pem(keys.generate_ed25519()),
        "tls.crt": leaf,
        "tls.key": leaf_key,
        "ca.crt": ca,
    }
    for name, data in files.items():
        (path / name).write_bytes(data)
        (path / name).chmod(0o600)
    return path


def allow_all(*_: object) -> None:
    """An authorizer for tests that are about something else."""


def connect_to_fake(endpoint: Endpoint) -> Backing:
    """For replicas in other processes: the release and its key come from a file beside the endpoint directory."""
    release = pickle.loads((endpoint.directory.parent / "release").read_bytes())  # noqa: S301  our own file
    authority = FakeAuthority(release, budget=10**9)
    authority.token_keys = endpoint.trust.token_keys
    return Backing(authority=authority, authorizer=lambda _model, _reference, _site: allow_all, clock=lambda: NOW)


def body(columns: Mapping[str, Sequence[object]] = GOOD_COLUMNS, **extra: Any) -> dict[str, Any]:
    kinds = {"age": "INT64", "job": "BYTES", "hours": "FP64"}
    inputs = [
        {"name": name, "shape": [len(values)], "datatype": kinds.get(name, "BYTES"), "data": list(values)}
        for name, values in columns.items()
    ]
    return {"inputs": inputs, **extra}
