"""What one rank does in one attempt, from its lease to its last step. Plain Python and torch: Ray is nowhere in here.

Guarantees: rows are in clear only in this process, only while it works; only noisy sums, step counts and one noisy
histogram leave; the model and its checkpoints leave sealed; what resumes from a checkpoint has the authority's word
that it is the run's newest, and draws new randomness: none is in it. What can refuse a spec, a model or a device does
so before there is a key: no rank asks for one until all ranks have tried. From then on a run is stopped by people,
crashes, the ledger, or bytes that are not those that were sealed; by tripwires, which see noise or noisy sums; and at
its end by a model that diverged, an ONNX file that computes otherwise than the model, or an audit that falsifies the
plan's epsilon.

    1. attempt   rank 0 opens the next one, which ends the one before; all learn from where it goes on
    2. try       on invented rows, all that is to be done (`trial.py`); if one rank cannot, none goes on
    3. lease     one-time key out, data keys back, sealed to it
    4. open      this rank's shards, however many ranks share them; rank 0 opens the holdout
    5. resume    if there is a checkpoint: fetch, compare digests, open, restore, on every rank
    6. train     DP-SGD; blocks of steps on record before their noise exists; a sealed checkpoint after each
    7. publish   rank 0: evaluation with noise, what canaries tell of the model, ONNX, seal, upload, register;
                 the checkpoints go

Canaries are invented rows of noise, drawn by a secret of the run (`audit.py`) that comes with the lease; rank 0 trains
on half of them, beside its own rows. Progress is told in whole blocks of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from cloister.canonical import b64, sha256_hex
from cloister.client.authority import Attempt, AuthorityClient, Checkpoint, TrainingLease
from cloister.errors import IntegrityError, UnavailableError
from cloister.models.manifest import ModelManifest
from cloister.privacy.evaluation import Counts
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.plan import BLOCK_STEPS, PrivacyPlan
from cloister.sealing.stream import seal
from cloister.stores.blobs import open_blobs
from cloister.training import checkpoint
from cloister.training.architectures import fixed_features
from cloister.training.audit import RunAudit
from cloister.training.export import to_onnx
from cloister.training.group import Group, from_rank_0, on_each_rank
from cloister.training.loop import make_optimizer, train
from cloister.training.rows import Rows
from cloister.training.trial import try_out


def open_attempt(authority: AuthorityClient, run: str, code_digest: str, group: Group) -> Attempt:
    """Begin the run's next attempt with this group; the same answer on every rank.  (1)

    Raises:
        CloisterError: the authority refuses, as it told rank 0.
    """
    said = from_rank_0(group, lambda: asdict(authority.open_attempt(run, group.world_size, code_digest)))
    return Attempt(**said | {"checkpoint": Checkpoint(**said["checkpoint"]) if said["checkpoint"] else None})


def work(
    authority: AuthorityClient, run: str, code_digest: str, group: Group, attempt: Attempt, *,
    block_steps: int = BLOCK_STEPS,
) -> dict[str, Any] | None:  # fmt: skip
    """Do this rank's part of `attempt`. Rank 0 returns what was registered.

    Raises:
        CloisterError: something is not as it was signed, planned or granted.
    """
    trial = on_each_rank(group, lambda: try_out(run, attempt, group))  # 2
    lease = authority.lease_shards(run, attempt.number, group.rank, code_digest)  # 3
    _require_same(lease, attempt)
    rows, plan, model = Rows(lease), PrivacyPlan.from_dict(lease.plan), trial.model
    opened = rows.load("train")  # 4
    opened = opened._replace(x=fixed_features(model, opened.x))
    at_the_end = trial.at_the_end
    if at_the_end:  # rank 0
        audit = RunAudit(
            at_the_end.attack, plan, model, rows.encoder.width, len(rows.labels), run=run, secret=lease.checkpoint_key
        )
        opened = audit.canaries.among(opened)
        holdout = rows.load("holdout")
    learner = trial.learner
    optimizer = make_optimizer(learner, rows.spec.training.optimizer, rows.spec.training.learning_rate)
    checkpoints = _Checkpoints(authority, run, attempt, lease, learner, optimizer)
    checkpoints.restore()  # 5
    train(  # 6
        learner,
        optimizer,
        opened.x,
        opened.y,
        plan,
        run=run,
        attempt=attempt.number,
        rank=group.rank,
        world_size=group.world_size,
        secret=fresh_secret(),
        all_reduce=group.all_reduce,
        commit_block=_committer(authority, run, attempt, group),
        shards=opened.shards,
        checkpoint=checkpoints.save if group.rank == 0 else None,
        on_step=_reporter(authority, run, attempt, plan, block_steps) if group.rank == 0 else None,
        resume_from=attempt.resume_from,
        block_steps=block_steps,
        clipped_gradients=trial.engine,
    )
    if not at_the_end:
        return None
    evaluation = plan.evaluation(*rows.manifest.evaluated(rows.spec.label))  # 7
    histogram = evaluation.released(at_the_end.evaluator(evaluation, fixed_features(model, holdout.x), holdout.y))
    return _publish(authority, run, attempt, lease, rows, model, histogram, audit)


def _require_same(lease: TrainingLease, attempt: Attempt) -> None:
    """What was tried came from rank 0; what is trained comes from the authority."""
    leased = lease.manifest, lease.owner_key, lease.spec, lease.plan
    if leased != (attempt.manifest, attempt.owner_key, attempt.spec, attempt.plan):
        raise IntegrityError("the lease is for something else than was tried", "submit the run again")


def _committer(
    authority: AuthorityClient, run: str, attempt: Attempt, group: Group
) -> Callable[[int, int], None]:  # fmt: skip
    def commit(first: int, stop: int) -> None:
        body = {"attempt": attempt.number, "first": first, "last": stop}
        from_rank_0(group, lambda: authority.post(f"/v1/runs/{run}/blocks", body))

    return commit


class _Checkpoints:
    """The run's sealed checkpoints, in the store of its data; the newest is on the authority's record."""

    def __init__(
        self, authority: AuthorityClient, run: str, attempt: Attempt, lease: TrainingLease, model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:  # fmt: skip
        self._authority, self._run, self._attempt, self._lease = authority, run, attempt, lease
        self._model, self._optimizer = model, optimizer
        self._blobs = open_blobs(lease.blobs)
        self._older = [attempt.checkpoint.blob] if attempt.checkpoint else []

    def restore(self) -> None:
        """Go back to where the attempt goes on from, if it is not the beginning.

        Raises:
            IntegrityError: the store holds something else than what was registered, or it does not fit.
        """
        kept = self._attempt.checkpoint
        if (kept.step if kept else 0) != self._attempt.resume_from:
            raise IntegrityError("the checkpoint is not where the attempt goes on from", "submit the run again")
        if kept is None:
            return
        sealed = self._blobs.get(kept.blob)
        if sha256_hex(sealed) != kept.sha256:
            raise IntegrityError("the checkpoint changed since it was registered", "submit the run again")
        checkpoint.restore(
            sealed, self._model, self._optimizer, kept.step,
            key=self._lease.checkpoint_key, context=self._context(kept.blob),
        )  # fmt: skip

    def save(self, step: int) -> None:
        """Seal, upload, register, and only then remove the one before: at every moment the registered one is there."""
        path = checkpoint.checkpoint_path(self._run, self._attempt.number, step)
        sealed = checkpoint.save(
            self._model, self._optimizer, step, key=self._lease.checkpoint_key, context=self._context(path)
        )
        # A store that is away costs steps if workers die before the next checkpoint; it does not cost the run.
        with suppress(UnavailableError):
            self._blobs.put(path, sealed)
            body = {"attempt": self._attempt.number, "step": step, "blob": path, "sha256": sha256_hex(sealed)}
            self._older.append(path)  # before the answer: it may be on record although none comes
            self._authority.post(f"/v1/runs/{self._run}/checkpoints", body)
            while len(self._older) > 1:
                self._blobs.remove(self._older[0])
                del self._older[0]

    def _context(self, path: str) -> dict[str, str]:
        """Its path names run, attempt and step: a checkpoint opens nowhere else."""
        return self._lease.checkpoint_context | {"blob": path}


def _reporter(
    authority: AuthorityClient, run: str, attempt: Attempt, plan: PrivacyPlan, block_steps: int
) -> Callable[[int], None]:  # fmt: skip
    """Tell people how far it is, at the end of each block, in rows as planned (q·N a step): realised batch sizes are
    private. From the times of single steps, or of a block in more than two digits, they could be told.
    """
    started = time.monotonic()

    def report(done: int) -> None:
        steps = done - attempt.resume_from
        if steps % block_steps and done != plan.steps:
            return
        rows_per_s = steps * plan.expected_batch_size / max(time.monotonic() - started, 1e-9)
        with suppress(UnavailableError):  # the run has paid for its steps: it does not die for a report
            body = {"attempt": attempt.number, "steps_done": done, "rows_per_s": float(f"{rows_per_s:.2g}")}
            authority.post(f"/v1/runs/{run}/progress", body)

    return report


def _publish(
    authority: AuthorityClient, run: str, attempt: Attempt, lease: TrainingLease, rows: Rows, model: torch.nn.Module,
    histogram: Counts, audit: RunAudit,
) -> dict[str, Any]:  # fmt: skip
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
    # Nothing is written twice: an attempt that died right here has left its own behind.
    path = f"models/{run}/model-{attempt.number}.onnx.sealed"
    blobs = open_blobs(lease.blobs)
    blobs.put(path, sealed)
    body = {
        "manifest": b64(manifest),
        "model_sha256": sha256_hex(onnx),
        "blob": path,
        "blob_sha256": sha256_hex(sealed),
        "evaluation": histogram.tolist(),
        "audit": audit.of(model),
    }
    registered = dict(authority.post(f"/v1/runs/{run}/model", body))
    with suppress(UnavailableError):  # checkpoints, and what attempts that died have left
        for left in set(blobs.list(f"models/{run}")) - {path}:
            blobs.remove(left)
    return registered
