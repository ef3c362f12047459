"""What one rank does between its lease and its last step. Plain Python and torch: Ray is nowhere in here.

Guarantees: rows are in clear only in this process, only while it works; a shard is used only if its bytes are those
of the signed manifest and it opens under its own key and name; only noisy sums, step counts and one noisy accuracy
leave; the model leaves sealed.

    1. lease     one-time key out, data keys back, sealed to it
    2. open      fetch, compare digests, decrypt this rank's shards, only the columns that are trained on
    3. rehearse  rank 0: open the holdout, export the untrained model: what would fail at the end fails before it costs
    4. train     DP-SGD; blocks of steps on record before their noise exists
    5. publish   rank 0: holdout accuracy with noise, ONNX, seal, upload, register
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cloister.canonical import b64, sha256_hex
from cloister.client.authority import AuthorityClient, TrainingLease
from cloister.client.verify import signed_manifest
from cloister.datasets.encoding import FeatureEncoder, stored_array
from cloister.datasets.manifest import SealedFile
from cloister.datasets.schema import DatasetSchema
from cloister.errors import ConflictError, IntegrityError, UnavailableError
from cloister.models.manifest import ModelManifest
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing.shard import open_table, shard_aad
from cloister.sealing.stream import seal
from cloister.stores.blobs import open_blobs
from cloister.training.architectures import build_model, seed_of
from cloister.training.export import evaluate, private_accuracy, to_onnx
from cloister.training.loop import make_optimizer, train

PROGRESS_INTERVAL_S = 0.5


class Group(Protocol):
    """The ranks of a run, as `torch.distributed` or a test provides them."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over all ranks, in place."""

    def agree(self, ok: bool) -> bool:
        """True on every rank if rank 0 says so; returns only when rank 0 has said it."""


def work(authority: AuthorityClient, run: str, code_digest: str, group: Group) -> dict[str, Any] | None:
    """Do this rank's part. Rank 0 returns what was registered.

    Raises:
        CloisterError: something is not as it was signed, planned or granted.
    """
    lease = authority.lease_shards(run, group.rank, code_digest)  # 1
    rows = _Rows(lease)
    x, y = rows.load("train")  # 2
    model = build_model(rows.spec.model.model_dump(mode="json"), rows.encoder.width, len(rows.labels), seed_of(run))
    holdout = None
    if group.rank == 0:  # 3
        holdout = rows.load("holdout")
        to_onnx(model, rows.encoder.width)
    train(  # 4
        model,
        make_optimizer(model, rows.spec.training.optimizer, rows.spec.training.learning_rate),
        x,
        y,
        PrivacyPlan.from_dict(lease.plan),
        run=run,
        attempt=1,
        rank=group.rank,
        world_size=group.world_size,
        secret=fresh_secret(),
        all_reduce=group.all_reduce,
        commit_block=_committer(authority, run, group),
        on_step=_reporter(authority, run, lease.plan) if group.rank == 0 else None,
    )
    return _publish(authority, run, lease, rows, model, *holdout) if holdout else None  # 5


def _committer(authority: AuthorityClient, run: str, group: Group) -> Callable[[int, int], None]:
    def commit(first: int, stop: int) -> None:
        refusal: Exception | None = None
        if group.rank == 0:
            try:
                authority.post(f"/v1/runs/{run}/blocks", {"first": first, "last": stop})
            except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must not wait for ever)
                refusal = error
        if not group.agree(refusal is None):
            raise refusal or ConflictError("the ledger did not take the next steps", "see what rank 0 reported")

    return commit


def _reporter(authority: AuthorityClient, run: str, plan: dict[str, Any]) -> Callable[[int], None]:
    """Tell people how far it is, in rows as planned (q·N a step): realised batch sizes are private."""
    started = last = time.monotonic()
    first_step: int | None = None

    def report(done: int) -> None:
        nonlocal last, first_step, started
        now = time.monotonic()
        if first_step is None:  # the first step also warms caches: it is not counted
            first_step, started = done, now
        elif now - last >= PROGRESS_INTERVAL_S or done == plan["steps"]:
            last = now
            rows_per_s = (done - first_step) * plan["sample_rate"] * plan["rows"] / (now - started)
            with suppress(UnavailableError):  # the run has paid for its steps: it does not die for a report
                authority.post(f"/v1/runs/{run}/progress", {"steps_done": done, "rows_per_s": rows_per_s})

    return report


class _Rows:
    """The rows that one lease opens."""

    def __init__(self, lease: TrainingLease) -> None:
        self.manifest = signed_manifest(lease.manifest, lease.owner_key)
        self.spec = TrainingSpec.parse(lease.spec)
        self._schema = schema = DatasetSchema.from_mapping(self.manifest.dataset_schema)
        self.features = schema.feature_columns(self.spec.features)
        self.encoder = FeatureEncoder(self.features)
        self.labels = schema.column(self.spec.label).values or ()
        self._wanted = {column.name for column in self.features} | {self.spec.label}
        self._region = schema.region
        self._keys = lease.keys
        self._blobs = open_blobs(lease.blobs)

    def load(self, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [N, D] float32 and labels [N] int64 of this lease's shards of one role."""
        files = [file for file in self.manifest.files if file.role == role and file.ref in self._keys]
        shards: dict[str, dict[str, npt.NDArray[Any]]] = {}
        # Two at a time: one is hashed, or fetched, while the other is decrypted.
        with ThreadPoolExecutor(2) as threads:
            for file, columns in zip(files, threads.map(self._open, files), strict=True):
                shards.setdefault(file.shard, {}).update(columns)
        names = sorted(self._wanted)
        columns = {name: np.concatenate([shards[shard][name] for shard in sorted(shards)]) for name in names}
        inputs = torch.from_numpy(self.encoder.encode(columns))
        return inputs, torch.from_numpy(columns[self.spec.label].astype(np.int64))

    def _open(self, file: SealedFile) -> dict[str, npt.NDArray[Any]]:
        columns = [name for name in file.columns if name in self._wanted]
        if not columns:
            return {}
        sealed = self._blobs.get(file.path)
        if sha256_hex(sealed) != file.sha256:
            raise IntegrityError(
                f"shard {file.key_name} of {self.manifest.name}@{self.manifest.version} changed since it was sealed",
                f"check the dataset: cloister data verify {self.manifest.name}@{self.manifest.version}",
            )
        aad = shard_aad(self.manifest.name, file.sealed_in, file.part, file.shard, self._region)
        table = open_table(sealed, self._keys[file.ref], aad, columns)
        return {name: stored_array(table.column(name), self._schema.column(name)) for name in columns}


def _publish(
    authority: AuthorityClient,
    run: str,
    lease: TrainingLease,
    rows: _Rows,
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
) -> dict[str, Any]:
    accuracy = private_accuracy(
        evaluate(model, x, y),
        len(y),
        lease.evaluation_epsilon,
        rows_per_unit=PrivacyPlan.from_dict(lease.plan).rows_per_unit,
    )
    onnx = to_onnx(model, rows.encoder.width)
    manifest = ModelManifest(
        name=rows.spec.model_name,
        run=run,
        dataset=rows.spec.dataset,
        label=rows.spec.label,
        labels=rows.labels,
        features=tuple(column.model_dump(mode="json", by_alias=True, exclude_none=True) for column in rows.features),
        architecture=rows.spec.model.model_dump(mode="json"),
    ).to_bytes()
    assert lease.model_key is not None  # noqa: S101  (rank 0's lease has it)
    sealed = seal(lease.model_key, onnx, lease.seal_context)
    path = f"models/{run}/model.onnx.sealed"
    open_blobs(lease.blobs).put(path, sealed)
    body = {
        "manifest": b64(manifest),
        "model_sha256": sha256_hex(onnx),
        "blob": path,
        "blob_sha256": sha256_hex(sealed),
        "holdout_accuracy": accuracy,
    }
    return dict(authority.post(f"/v1/runs/{run}/model", body))
