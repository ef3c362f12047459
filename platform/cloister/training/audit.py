# ruff: noqa: N803, N806, N815 - the letters after a tensor's name are its shape
"""What is audited in a run: the training loop itself on synthetic rows, and the trained model on canaries.

Guarantees: `audit_step` runs `loop.train` as it is, with its sampler, its clipping, its noise and its sum over ranks,
and looks only at what leaves it, the noisy sums. Its rows and the canaries are invented, so neither audit costs
privacy. The canaries come from a key that the authority made for the run: they are the same in every attempt, and
whoever submits the run, and names it by choosing its key, has no say in which of them are trained on.

The model under `audit_step` has one input for each canary, so that the gradients of different rows are orthogonal,
each far longer than the clipping norm, and one step shows as many independent attacks as there are inputs:

    steps with the plan's noise, every row in every batch     sensitivity over noise
    steps with next to no noise, at the plan's sample rate    who was in which batch

A canary is a row of random signs with a random label. What the model makes of such rows anyhow, a ridge regression
tells from rows of the same kind that were never trained on; a canary's score is how much better its label fits than
that. Without it canaries that were learnt and others can hardly be told apart.

Not promised: to find what only other layers or shapes would show. Clipping is tested layer by layer elsewhere.

Shapes: M canaries, R references, D inputs, C classes, S steps, N rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cloister.errors import IntegrityError
from cloister.privacy import accounting
from cloister.privacy.auditing import (
    CERTAINTY,
    CONFIDENCE,
    Guesses,
    MechanismAudit,
    StepObservations,
    guess,
    mechanism_audit,
)
from cloister.privacy.keystream import Keystream, derive_key, fresh_secret
from cloister.privacy.plan import PrivacyPlan
from cloister.training.architectures import fixed_features, trainable_part
from cloister.training.loop import PUBLIC_SHARD, train
from cloister.training.rows import Opened

# Half of them are trained on: half a percent of a table, or less, if it has 800 rows or more.
_CANARIES = (8, 200)
_ROWS_PER_CANARY = 100
_REFERENCES = 2048
_RIDGE = 1e-3

_INPUTS = 1024
_GRADIENT_SCALE = 16.0  # a gradient of about 11 C: still longer than C when clipping is off by ten
# With S steps the sensitivity over noise is known to 6.2·σ/√(S·inputs): to 4 %, but not beyond what takes seconds.
_STEPS_PER_VARIANCE = 24
_STEPS = (100, 500)
# Sampled rows that are counted: 3 % of relative error in the rate. Fewer where that takes too many steps.
_SAMPLED = 6_000
_EXPECTED_BATCH = 200
_MAX_ROWS = 4_000_000
_QUIET = 0.01  # noise multiplier at which each inclusion is seen for certain


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Rows that are nobody's, half of which are trained on."""

    x_MD: torch.Tensor
    y_M: torch.Tensor
    included_M: npt.NDArray[np.bool_]
    references_RD: torch.Tensor
    """Rows of the same kind that nobody trains on."""

    def through(self, features: Callable[[torch.Tensor], torch.Tensor]) -> Canaries:
        """The same as inputs of a model that learns on `features` of its rows."""
        return replace(self, x_MD=features(self.x_MD), references_RD=features(self.references_RD))

    def among(self, rows: Opened) -> Opened:
        """`rows`, and in a shard of their own the canaries that are trained on."""
        chosen = torch.from_numpy(self.included_M)
        x, y = torch.cat([rows.x, self.x_MD[chosen]]), torch.cat([rows.y, self.y_M[chosen]])
        return Opened(x, y, [*rows.shards, (PUBLIC_SHARD, int(chosen.sum()))])


def attack_steps(plan: PrivacyPlan, *, engine: str) -> MechanismAudit:
    """`audit_step`, before there are rows or keys.

    Raises:
        IntegrityError: the steps are less private than the plan says.
    """
    found = audit_step(plan, engine=engine)
    if found.falsified:
        raise IntegrityError(
            f"an attack on this worker's steps shows an epsilon of {found.epsilon_lower_bound:.3g} or batches"
            f" that are not Poisson's, where the plan says {plan.epsilon_certified:.3g}; nothing was trained",
            "do not train with this software, and report it",
        )
    return found


class RunAudit:
    """Both audits of one run, by the rank that registers its model: of the steps, which `attack_steps` has made, and of
    the model, whose training rows are to be those of `canaries.among(rows)`.
    """

    def __init__(
        self, steps: MechanismAudit, plan: PrivacyPlan, model: nn.Module, width: int, classes: int, *, run: str,
        secret: bytes,
    ) -> None:  # fmt: skip
        """`secret` is one of the run's, the same in every attempt."""
        self._steps = steps
        drawn = draw_canaries(width, classes, canaries_for(plan.rows), run=run, secret=secret)
        self.canaries = drawn.through(lambda x: fixed_features(model, x))

    def of(self, model: nn.Module) -> dict[str, Any]:
        """What was seen, for the authority; what it means is for the authority to say."""
        guesses = audit_model(trainable_part(model), self.canaries)
        return {"mechanism": self._steps.to_dict(), "one_run": guesses._asdict()}


def canaries_for(rows: int) -> int:
    """How many canaries a table with so many rows gets."""
    fewest, most = _CANARIES
    return min(max(rows // _ROWS_PER_CANARY, fewest), most)


def draw_canaries(width: int, classes: int, count: int, *, run: str, secret: bytes) -> Canaries:
    """The canaries of a run, for a model of `width` inputs."""
    stream = Keystream(derive_key(secret, purpose="canaries", run=run, attempt=0, rank=0))
    signs = torch.from_numpy((stream.words((count + _REFERENCES) * width) >> np.uint64(63)).astype(np.float32))
    x = (2 * signs - 1).reshape(count + _REFERENCES, width)
    return Canaries(
        x_MD=x[:count],
        y_M=torch.from_numpy((stream.words(count) % np.uint64(classes)).astype(np.int64)),
        included_M=stream.words(count) >> np.uint64(63) == 1,
        references_RD=x[count:],
    )


def canary_scores(model: nn.Module, canaries: Canaries) -> npt.NDArray[np.float64]:
    """How much better each canary's label fits than it would for a row of its kind: [M]."""
    model.eval()
    with torch.no_grad():
        logits_RC = model(canaries.references_RD).double()
        logits_MC = model(canaries.x_MD).double()
    # Kernel ridge regression: as many unknowns as references, however wide the rows are.
    known_RD, asked_MD = (x.flatten(1).double() for x in (canaries.references_RD, canaries.x_MD))
    kernel_RR = known_RD @ known_RD.T / known_RD.shape[1] + 1  # the one is the constant term
    kernel_RR.diagonal().add_(_RIDGE * len(known_RD))
    mean_C = logits_RC.mean(dim=0)
    weights_RC = torch.linalg.solve(kernel_RR, logits_RC - mean_C)
    expected_MC = (asked_MD @ known_RD.T / known_RD.shape[1] + 1) @ weights_RC + mean_C
    surprise_MC = logits_MC - expected_MC
    own_M = surprise_MC.gather(1, canaries.y_M[:, None]).squeeze(1)
    scores_M: npt.NDArray[np.float64] = (own_M - surprise_MC.mean(dim=1)).numpy()
    return scores_M


def audit_model(model: nn.Module, canaries: Canaries) -> Guesses:
    """Guess from a model which canaries it was trained on."""
    return guess(canary_scores(model, canaries), canaries.included_M)


def audit_step(
    plan: PrivacyPlan, *, engine: str = "bookkeeping", world_size: int = 2, secret: bytes | None = None
) -> MechanismAudit:
    """Attack the steps of `plan`, as `world_size` ranks take them together.

    Of a hundred audits of what is as private as stated, one or two say falsified at 95 %, by chance: then a second
    one, with other randomness and at `CERTAINTY`, is what counts.

    Raises:
        IntegrityError: a tripwire of the loop, before there was anything to audit.
    """
    secret = secret or fresh_secret()

    def epsilon_of(noise_multiplier: float, sample_rate: float) -> float:
        return accounting.epsilon(noise_multiplier, sample_rate, plan.steps, plan.delta, plan.rows_per_unit)

    def attack(name: str, confidence: float) -> MechanismAudit:
        return mechanism_audit(
            observe_steps(plan, engine=engine, world_size=world_size, secret=secret, name=name),
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            epsilon_theory=plan.epsilon_certified,
            epsilon_of=epsilon_of,
            confidence=confidence,
        )

    first = attack("audit", CONFIDENCE)
    return attack("audit-again", CERTAINTY) if first.falsified else first


def observe_steps(plan: PrivacyPlan, *, engine: str, world_size: int, secret: bytes, name: str) -> StepObservations:
    """What leaves the loop, in units of the clipping norm."""
    ids = torch.arange(_INPUTS)
    members = ids[ids // 2 % 2 == 0]  # of both labels
    steps = round(min(max(_STEPS_PER_VARIANCE * plan.noise_multiplier**2, _STEPS[0]), _STEPS[1]))
    loud = replace(plan, sample_rate=1.0, steps=steps, rows=len(members))
    signal_SM, noise_SF = _released(loud, members, engine, world_size, secret, f"{name}/noise")
    is_member = torch.isin(ids, members)

    rows = min(math.ceil(_EXPECTED_BATCH / plan.sample_rate), _MAX_ROWS)
    quiet = replace(
        plan,
        noise_multiplier=_QUIET,
        rows=rows,
        steps=min(math.ceil(_SAMPLED / (rows * plan.sample_rate)), _STEPS[1]),
    )
    hits_SM, _ = _released(quiet, torch.arange(rows) % _INPUTS, engine, world_size, secret, f"{name}/sampling")
    seen = hits_SM > 0.5
    one = hits_SM[seen].median() if bool(seen.any()) else torch.tensor(1.0)
    return StepObservations(
        absent=torch.cat([signal_SM[:, ~is_member].flatten(), noise_SF.flatten()]).numpy(),
        present=signal_SM[:, is_member].flatten().numpy(),
        noise_SF=noise_SF.numpy(),
        sampled_SM=(hits_SM / one).round().clamp_min(0).long().numpy(),
        rows_M=np.bincount(np.arange(rows) % _INPUTS, minlength=_INPUTS),
    )


def _released(
    plan: PrivacyPlan, ids_N: torch.Tensor, engine: str, world_size: int, secret: bytes, run: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on rows of the given inputs; what was released, along each input's gradient and beside it: [S, M] each."""
    released: list[torch.Tensor] = []
    meeting = _Meeting(world_size)

    def rank_part(rank: int) -> None:
        layer = nn.Linear(_INPUTS, 2, bias=False)
        nn.init.zeros_(layer.weight)
        one_hot = nn.Embedding(_INPUTS, _INPUTS, _weight=_GRADIENT_SCALE * plan.max_grad_norm * torch.eye(_INPUTS))
        model = nn.Sequential(one_hot.requires_grad_(False), layer)
        mine_N = ids_N[rank::world_size]

        def all_reduce(sum_P: torch.Tensor) -> None:
            meeting.all_reduce(rank, sum_P)
            if rank == 0:
                released.append(sum_P.clone())

        train(
            model,
            # Weights have to move, or the loop rightly stops; so little that the gradients stay as they are.
            torch.optim.SGD(layer.parameters(), lr=1e-9),
            mine_N,
            mine_N % 2,
            plan,
            run=run,
            attempt=1,
            rank=rank,
            world_size=world_size,
            secret=secret,
            all_reduce=all_reduce,
            commit_block=lambda _first, _stop: None,
            engine=engine,
        )

    meeting.run(rank_part)
    # The gradient of a row of input i and label 0 is (-, +) in column i, of label 1 it is (+, -); (+, +) is free.
    both_S2M = torch.stack(released).reshape(len(released), 2, _INPUTS) / (math.sqrt(2) * plan.max_grad_norm)
    sign_M = 1 - 2 * (torch.arange(_INPUTS) % 2)
    return (both_S2M[:, 1] - both_S2M[:, 0]) * sign_M, both_S2M[:, 0] + both_S2M[:, 1]


class _Meeting:
    """Ranks as threads of this process, and a sum over them in which all wait for each other."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size)
        self._parts: list[torch.Tensor] = [torch.empty(0)] * world_size

    def run(self, rank_part: Callable[[int], None]) -> None:
        """Raises what a rank raised."""
        failures: list[Exception] = []

        def guarded(rank: int) -> None:
            try:
                rank_part(rank)
            except Exception as error:  # noqa: BLE001 - the others must not wait for ever; raised below
                failures.append(error)
                self._barrier.abort()

        with ThreadPoolExecutor(len(self._parts)) as pool:
            list(pool.map(guarded, range(len(self._parts))))
        if failures:
            raise failures[0]

    def all_reduce(self, rank: int, sum_P: torch.Tensor) -> None:
        self._parts[rank] = sum_P.clone()
        self._barrier.wait()
        total_P = torch.stack(self._parts).sum(dim=0)
        self._barrier.wait()
        sum_P.copy_(total_P)
