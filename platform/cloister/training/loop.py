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

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.clipping import ClippedGradients, ClippingOptions
from cloister.privacy.mechanism import Mechanism, noise_std
from cloister.privacy.plan import BLOCK_STEPS, PrivacyPlan
from cloister.training.tripwires import NoiseWatch, Tripwires

PUBLIC_SHARD = "public/canaries"
"""The name of a shard whose rows are invented: they are sampled and clipped as all others, and the plan does not count
them. No shard of a sealed table has a name with a slash."""


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
    shards: Sequence[tuple[str, int]] | None = None,
    checkpoint: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    resume_from: int = 0,
    block_steps: int = BLOCK_STEPS,
    engine: str = "bookkeeping",
    options: ClippingOptions | None = None,
    clipped_gradients: ClippedGradients | None = None,
) -> None:
    """Train `model` in place from step `resume_from` to `plan.steps`.

    `secret` comes from `fresh_secret()` in this process and is never stored. `all_reduce` sums a tensor over the
    ranks in place. `shards` are the names and numbers of rows of the shards that x_ND consists of, in its order.
    `checkpoint(done)` is called after the last step of each block: the point to keep model and optimiser.
    `on_step(done)` is called after each step. `clipped_gradients` is an engine around the model, tried before, in place
    of `engine` and `options`; it is closed, once training has begun. All ranks start from the same weights
    (`build_model` sees to that).

    Raises:
        InputError: rows that are not tensors, more rows than the plan declares, a layer that cannot be trained
            privately, a step that hands something back.
        IntegrityError: a tripwire: noise is missing or repeated, weights do not move.
    """
    _require_rows(x_ND, y_N, plan, public=sum(rows for name, rows in shards or () if name == PUBLIC_SHARD))
    if not 0 <= rank < world_size or not 0 <= resume_from <= plan.steps or block_steps < 1:
        raise ValueError("rank, resume_from or block_steps is out of range")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mechanism = Mechanism(
        plan, model, x_ND, y_N, shards=shards or [(f"rank-{rank}", len(x_ND))], run=run, attempt=attempt, rank=rank,
        world_size=world_size, secret=secret, engine=engine, options=options, clipped_gradients=clipped_gradients,
    )  # fmt: skip
    try:
        tripwires, noise = Tripwires(model, plan, noise_std(plan)), NoiseWatch()
        model.train()
        for step in range(resume_from, plan.steps):
            block_end = min(step - (step - resume_from) % block_steps + block_steps, plan.steps)
            if (step - resume_from) % block_steps == 0:
                commit_block(step, block_end)  # 1
            rows_B = mechanism.sample()  # 2
            sum_P = mechanism.clipped_sum(rows_B)  # 3
            with noise.watching(sum_P):
                mechanism.add_noise(step, sum_P)  # 4
            all_reduce(sum_P)  # 5
            tripwires.see_sum(sum_P)
            set_gradients(parameters, sum_P, plan.expected_batch_size)  # 6
            optimizer.step()  # 7
            tripwires.see_weights()
            if on_step is not None and on_step(step + 1) is not None:
                raise InputError("a step's observer handed something back", "the number of steps is the plan's")
            if checkpoint is not None and step + 1 == block_end:
                checkpoint(step + 1)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        mechanism.close()


def _require_rows(x_ND: torch.Tensor, y_N: torch.Tensor, plan: PrivacyPlan, public: int) -> None:
    if type(plan) is not PrivacyPlan:
        raise InputError("the plan is not a privacy plan", "make it with make_plan")
    if not (isinstance(x_ND, torch.Tensor) and isinstance(y_N, torch.Tensor)):
        raise InputError("rows come as tensors, all of this rank's at once", "loaders sample by rules of their own")
    if len(x_ND) != len(y_N) or len(x_ND) > plan.most_rows + public:
        raise InputError("this rank holds other rows than the plan declares", "make the plan for this data set again")


def set_gradients(parameters: list[nn.Parameter], sum_P: torch.Tensor, denominator: float) -> None:
    """Give each parameter its piece of the average, in one pass over the sum."""
    average_P = torch.empty(len(sum_P), dtype=torch.float32, device=sum_P.device)
    torch.div(sum_P, denominator, out=average_P)
    pieces = torch.split(average_P, [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view(parameter.shape)
