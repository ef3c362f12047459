"""Images, from a file through seal, private training and ONNX to an answer, without a cluster or an authority."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_pipeline import Live, Source

from cloister.canonical import sha256_hex, unb64
from cloister.client.authority import Attempt, TrainingLease
from cloister.client.inference import _tensor
from cloister.datasets.encoding import FeatureEncoder
from cloister.datasets.ingest import read_table
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest, Lineage, SealedFile
from cloister.datasets.partition import Numbering, partition
from cloister.datasets.schema import DatasetSchema
from cloister.datasets.subjects import SubjectKeys, protect
from cloister.errors import InputError
from cloister.models.release import checkpoint_seal_context, model_seal_context
from cloister.privacy import accounting
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing.envelope import new_key
from cloister.sealing.shard import open_table, seal_table, shard_aad
from cloister.sealing.stream import open_sealed
from cloister.serving.pipeline import Pipeline
from cloister.serving.quota import Quota
from cloister.serving.release import verify_release
from cloister.signing import dsse, keys
from cloister.signing.tokens import INFERENCE_AUDIENCE, TokenVerifier
from cloister.stores.blobs import FolderBlobs
from cloister.training.work import work
from serving_world import ISSUER, MODEL, NOW, RELEASE_KEY, FakeAuthority, TokenMaker, allow_all, signed_release

SIDE, PIXELS = 12, 144
SCHEMA = DatasetSchema.from_yaml_text("""
name: digits
purpose: research
region: eu
retention: P1Y
unit: row
columns:
  - {name: writer, type: text, class: restricted, role: identifier, keep_original: true}
  - {name: image, type: tensor, class: confidential, shape: [12, 12], dtype: uint8, bounds: [0, 255]}
  - {name: digit, type: category, class: confidential, role: label, values: ["0", "1", "2", "3"]}
""")
ARCHITECTURES = {
    "mlp": {"architecture": "mlp", "hidden": [16]},
    "scattering": {"architecture": "scattering", "image": [SIDE, SIDE]},
}
SPEC = {
    "name": MODEL, "dataset": "digits@1", "label": "digit",
    "privacy": {"epsilon": 8.0, "delta": 1e-5},
    "training": {"epochs": 20, "expected_batch_size": 100, "optimizer": "adam", "learning_rate": 0.02},
    "resources": {"workers": 1, "region": "eu"}, "purpose": "research",
}  # fmt: skip


def images(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Four shapes under noise: a bar on each side."""
    chance = np.random.default_rng(5)
    digits = chance.integers(0, 4, rows)
    pictures = chance.integers(0, 60, (rows, SIDE, SIDE))
    for digit, bar in enumerate((np.s_[:, :3, :], np.s_[:, -3:, :], np.s_[:, :, :3], np.s_[:, :, -3:])):
        pictures[bar] += 180 * (digits == digit)[:, None, None]
    return pictures.astype(np.uint8), digits


class Alone:
    """A group of one rank."""

    rank, world_size = 0, 1

    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def share(self, message: bytes) -> bytes:
        return message

    def gather(self, message: bytes) -> list[bytes]:
        return [message]


class Grant:
    """What a worker asks its authority for, out of one lease; remembers what it was told."""

    def __init__(self, lease: TrainingLease) -> None:
        self.lease = lease
        self.told: dict[str, Any] = {}

    def lease_shards(self, *_: object) -> TrainingLease:
        return self.lease

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.told[path.rpartition("/")[2]] = body
        return {}


def seal(folder: Path, architecture: str) -> tuple[TrainingLease, set[str]]:
    """A sealed version of the images, and the lease of one rank that trains on it."""
    pictures, digits = images(1200)
    sink = io.BytesIO()
    held = pa.array([picture.tobytes() for picture in pictures], pa.binary(PIXELS))
    writers = [f"writer {row % 150}" for row in range(1200)]
    pq.write_table(pa.table({"digit": digits.astype(str).tolist(), "image": held, "writer": writers}), sink)
    table, tags = protect(
        read_table(sink.getvalue(), SCHEMA), SCHEMA, SubjectKeys(pseudonym=bytes(range(32)), index=bytes(range(32, 64)))
    )
    blobs, owner = FolderBlobs.make(folder), keys.generate_ed25519()
    order = np.random.default_rng(1).permutation(1200)
    files, data_keys = [], {}
    for part in partition(table, tags, SCHEMA, 2, 0.25, order, Numbering()):
        key = new_key()
        aad = shard_aad("digits", 1, part.part, part.shard, "eu")
        sealed, path = seal_table(part.table, key, aad), f"datasets/digits/{part.shard}.{part.part}"
        blobs.put(path, sealed)
        file = SealedFile(shard=part.shard, sealed_in=1, role=part.role, part=part.part, rows=part.table.num_rows,
                          columns=tuple(part.table.column_names), path=path, bytes=len(sealed),
                          sha256=sha256_hex(sealed))  # fmt: skip
        files.append(file)
        if part.part == "confidential":
            data_keys[file.ref] = key
    lineage = Lineage(kind="seal", code="sha256:" + "0" * 64, rows_before=0, rows_after=1200)
    manifest = DatasetManifest(
        name="digits", version=1, dataset_schema=SCHEMA.to_dict(), files=tuple(files), lineage=lineage
    )
    digest = manifest.digest.removeprefix("sha256:")
    statement = dsse.statement("digits", digest, MANIFEST_PREDICATE, manifest.model_dump(mode="json"))
    rows = manifest.rows("train")
    epsilon = accounting.epsilon(1.0, 100 / rows, 60, 1e-5)
    plan = PrivacyPlan(
        epsilon=epsilon, delta=1e-5, epsilon_certified=epsilon, noise_multiplier=1.0, max_grad_norm=1.0,
        sample_rate=100 / rows, steps=60, rows=rows, evaluation_epsilon=1.0,
    )  # fmt: skip
    lease = TrainingLease(
        spec=SPEC | {"model": ARCHITECTURES[architecture]},
        keys=data_keys, model_key=new_key(), checkpoint_key=new_key(), manifest=dsse.sign(statement, owner),
        owner_key=keys.public_to_pem(owner.public_key()).decode(), plan=plan.to_dict(), blobs=blobs.url,
        seal_context=model_seal_context("run-1"), checkpoint_context=checkpoint_seal_context("run-1"),
    )  # fmt: skip
    return lease, {file.part for file in files}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grant, bytes]:
    folder = tmp_path_factory.mktemp("blobs")
    lease, parts = seal(folder, request.param)
    assert parts == {"restricted", "confidential", "index"}
    grant = Grant(lease)
    first = Attempt(
        number=1, resume_from=0, checkpoint=None, manifest=lease.manifest, owner_key=lease.owner_key, spec=lease.spec,
        plan=lease.plan,
    )  # fmt: skip
    work(grant, "run-1", "sha256:" + "0" * 64, Alone(), first)  # type: ignore[arg-type]  # what it uses of a client
    assert lease.model_key is not None
    model = FolderBlobs.from_url(lease.blobs).get(grant.told["model"]["blob"])
    return grant, open_sealed(lease.model_key, model, lease.seal_context)


def test_images_are_sealed_trained_on_and_scored(trained: tuple[Grant, bytes]) -> None:
    grant, onnx = trained
    right, wrong = (sum(sum(sides[side]) for sides in grant.told["model"]["evaluation"]) for side in (0, 1))
    assert right > 1.5 * wrong, "the bars are easy to tell apart"
    assert grant.told["model"]["model_sha256"] == sha256_hex(onnx)
    release = signed_release(onnx, unb64(grant.told["model"]["manifest"]))
    maker = TokenMaker()
    verified = verify_release(
        release, name=MODEL, release_key_pem=keys.public_to_pem(RELEASE_KEY.public_key()), required_approvals=2, now=NOW
    )
    pipeline = Pipeline(
        verified, verifier=TokenVerifier({"k1": maker.public}, issuer=ISSUER, audience=INFERENCE_AUDIENCE),
        liveness=Live(), authorize=allow_all, decimals=2, clock=lambda: NOW,
        quota=Quota(Source(FakeAuthority(release)), block_size=100, clock=lambda: NOW),
    )  # fmt: skip
    (described,) = pipeline.metadata()["inputs"]
    assert described == {"name": "image", "datatype": "UINT8", "shape": [-1, SIDE, SIDE]}
    pictures, digits = images(40)

    def ask(shape: list[int], data: Any, datatype: str = "UINT8") -> list[str]:
        claims = pipeline.admit(f"Bearer {maker.token()}", MODEL)
        body = {"inputs": [{"name": "image", "shape": shape, "datatype": datatype, "data": data}]}
        answer = asyncio.run(pipeline.infer(claims, json.dumps(body).encode()))
        return list(answer["outputs"][0]["data"])

    flat = ask([40, PIXELS], pictures.reshape(-1).tolist())
    assert np.mean(np.array(flat) == digits.astype(str)) > 0.6
    assert ask([40, SIDE, SIDE], pictures.tolist()) == flat
    assert ask([40, PIXELS], pictures.reshape(40, PIXELS).tolist(), "FP32") == flat
    with pytest.raises(InputError, match="outside the declared bounds"):
        ask([1, PIXELS], [256] * PIXELS, "INT64")


def test_nothing_that_left_the_worker_names_anybody(trained: tuple[Grant, bytes]) -> None:
    grant, onnx = trained
    told = json.dumps(grant.told).encode() + unb64(grant.told["model"]["manifest"]) + onnx
    assert b"writer" not in told


def test_a_lease_opens_no_class_that_is_not_trained_on(trained: tuple[Grant, bytes]) -> None:
    grant, _ = trained
    assert {ref.rpartition("/")[2] for ref in grant.lease.keys} == {"confidential"}
    blobs = FolderBlobs.from_url(grant.lease.blobs)
    table = open_table(
        blobs.get("datasets/digits/train-000.confidential"), grant.lease.keys["1/train-000/confidential"],
        shard_aad("digits", 1, "confidential", "train-000", "eu"),
    )  # fmt: skip
    assert table.column_names == ["image", "digit"]
    assert table.schema.field("image").type == pa.binary(PIXELS), "tensors are stored as they are, not as lists"


@pytest.mark.parametrize(
    ("values", "shape", "datatype"),
    [
        (np.zeros((2, 8, 8), np.uint8), [2, 8, 8], "INT64"),
        (np.zeros((2, 64), np.float32), [2, 64], "FP64"),
        ([[0] * 64, [1] * 64], [2, 64], "INT64"),
        ([np.zeros(64), np.ones(64)], [2, 64], "FP64"),
        (np.arange(3), [3], "INT64"),
        (["a", "b"], [2], "BYTES"),
        ([1, 2.5], [2], "FP64"),
    ],
)
def test_the_client_sends_arrays_and_nested_lists_as_tensors(values: Any, shape: list[int], datatype: str) -> None:
    sent = _tensor("image", values)
    assert (sent["shape"], sent["datatype"]) == (shape, datatype)
    assert np.array_equal(np.reshape(sent["data"], shape), np.array(values))
    json.dumps(sent)


@pytest.mark.parametrize(
    "values", [[[1, 2], [1]], [[1, float("nan")]], np.array(7), np.array([[1j]]), [["a"]], [[None]], [], [[True]]]
)
def test_the_client_refuses_what_is_no_tensor(values: Any) -> None:
    with pytest.raises(InputError, match="column `image`"):
        _tensor("image", values)


def test_the_example_with_pictures_is_whole() -> None:
    folder = Path(__file__).resolve().parents[2] / "jobs" / "examples" / "mnist"
    schema = DatasetSchema.from_yaml_text((folder / "schema.yaml").read_text())
    spec = TrainingSpec.from_yaml_text((folder / "train.yaml").read_text())
    assert (spec.dataset, spec.purpose, spec.resources.region) == ("mnist@1", schema.purpose, schema.region)
    assert schema.label_column().name == spec.label
    assert FeatureEncoder(schema.feature_columns(spec.features)).width == 784
