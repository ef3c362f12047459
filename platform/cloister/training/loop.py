# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""DP-SGD on one rank, in plain torch: sample, clip, add noise, sum over ranks, step.

Guarantees, for each of `plan.steps` steps, if every rank of the run calls `train` with the same plan:

    1. commit   `commit_block(first, stop)` returned before any noise of steps first … stop - 1 was drawn
    2. sample   each of this rank's rows is in the batch independently with probability q; empty batches are steps
    3. clip     each row adds a gradient of norm at most C to the sum; a row that is not finite adds nothing
    4. noise    this rank adds N(0, (σC)²/W) from its own stream, so that the sum over W ranks carries N(0, (σC)²)
    5. reduce   only the noisy sum leaves this rank
    6. average  by the public q·N, never by a realised batch size
    7. step     the optimiser sees the noisy average only: its state is post-processing and costs no privacy

A rank's noise alone protects its rows less than the plan says: the plan holds for what the sum releases, and the
ranks of one run trust each other. `all_reduce` must therefore not be observable from outside the cluster.

A resumed attempt has a new `attempt` number and a new secret, starts from a checkpoint at `resume_from`, and commits
the redone steps again. Not promised: bit-identical runs. That noise cannot be repeated is the point.

Shapes: N rows on this rank, D inputs, B rows in a batch, P trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.clipping import SENSITIVITY_SLACK, ClippedGradients, GhostClippedGradients
from cloister.privacy.keystream import derive_key
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.sampling import PoissonSampler

BLOCK_STEPS = 50


class CommitBlock(Protocol):
    """Put steps `first … stop - 1` on record. Called on every rank; must not return before the record is durable."""

    def __call__(self, first: int, stop: int, /) -> None: ...


def make_optimizer(model: nn.Module, name: str, learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser that a spec names.

    Raises:
        InputError: no such optimiser.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    raise InputError("there is no such optimiser", "use adam or sgd")


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_ND: torch.Tensor,
    y_N: torch.Tensor,
    plan: PrivacyPlan,
    *,
    run: str,
    attempt: int,
    rank: int,
    world_size: int,
    secret: bytes,
    all_reduce: Callable[[torch.Tensor], None],
    commit_block: CommitBlock,
    on_step: Callable[[int], None] | None = None,
    resume_from: int = 0,
    block_steps: int = BLOCK_STEPS,
    clipped_gradients: ClippedGradients | None = None,
) -> None:
    """Train `model` in place from step `resume_from` to `plan.steps`.

    `secret` comes from `fresh_secret()` in this process and is never stored. `all_reduce` sums a tensor over the
    ranks in place. `on_step(done)` is called after each step with the number of steps that are done; `done` is a
    point to checkpoint model and optimiser. All ranks start from the same weights (`build_model` sees to that).

    Raises:
        InputError: more rows than the plan declares, or a layer that cannot be trained privately.
    """
    if not 0 <= rank < world_size or not 0 <= resume_from <= plan.steps or block_steps < 1:
        raise ValueError("rank, resume_from or block_steps is out of range")
    if len(x_ND) != len(y_N) or len(x_ND) > plan.rows:
        raise InputError("this rank holds other rows than the plan declares", "make the plan for this data set again")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = None if clipped_gradients is not None else GhostClippedGradients(model, plan.max_grad_norm)
    clipped = clipped_gradients or engine
    assert clipped is not None  # noqa: S101 - one of the two was made
    key_for = partial(derive_key, secret, run=run, attempt=attempt, rank=rank)
    sampler = PoissonSampler(len(x_ND), plan.sample_rate, key_for(purpose="sampling"))
    noise = GaussianNoise(key_for(purpose="noise"))
    noise_std = plan.noise_multiplier * plan.max_grad_norm * (1 + SENSITIVITY_SLACK) / math.sqrt(world_size)

    model.train()
    try:
        for step in range(resume_from, plan.steps):
            if (step - resume_from) % block_steps == 0:
                commit_block(step, min(step + block_steps, plan.steps))  # 1
            rows_B = torch.from_numpy(sampler.next_batch()).to(x_ND.device)  # 2
            sum_P = clipped(x_ND[rows_B], y_N[rows_B])  # 3
            sum_P += noise.sample(sum_P.shape, noise_std).to(sum_P.device)  # 4
            all_reduce(sum_P)  # 5
            _set_gradients(parameters, sum_P / plan.expected_batch_size)  # 6
            optimizer.step()  # 7
            if on_step is not None:
                on_step(step + 1)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        if engine is not None:
            engine.close()


def _set_gradients(parameters: list[nn.Parameter], flat_P: torch.Tensor) -> None:
    offset = 0
    for parameter in parameters:
        piece = flat_P[offset : offset + parameter.numel()]
        parameter.grad = piece.reshape(parameter.shape).to(parameter.dtype)
        offset += parameter.numel()
