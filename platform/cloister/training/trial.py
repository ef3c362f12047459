# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""What is tried before an attempt asks for its keys: all that can refuse a spec, a model or a device.

Guarantees: no row of the data is in here, nor a key: what is tried follows from the run's spec, plan and signed
manifest, and rows are invented from the schema. So whether a run is refused, and by which words, tells nothing of
anybody and costs no epsilon. Each rank tries what it is about to do, on its own device.

    1. build      model, optimiser and encoder, as spec and schema have them
    2. rehearse   the model keeps rows apart, and every parameter has a part in it (`rehearsal`)
    3. export     rank 0, in an attempt without a checkpoint: what would fail at the end fails before it costs; the
                  evaluation too (`evaluation`)
    4. engine     this device computes a row alike whatever is beside it; what trains later is this very engine
    5. steps      batches differ; the first steps of the loop, with the plan's noise, trip no wire (`tripwires`)
    6. attack     rank 0: the steps of the plan are as private as it says (`audit`)

Not promised: to find what invented rows do not bring out.

Shapes: N rows, D inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cloister.client.authority import Attempt
from cloister.datasets.schema import Column
from cloister.privacy.auditing import MechanismAudit
from cloister.privacy.blocks import Blocks
from cloister.privacy.clipping import ClippedGradients
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.mechanism import TriedEngine
from cloister.privacy.plan import PrivacyPlan
from cloister.training.architectures import build_model, fixed_features, seed_of, trainable_part
from cloister.training.audit import attack_steps
from cloister.training.evaluation import Evaluator
from cloister.training.export import to_onnx
from cloister.training.group import Group
from cloister.training.loop import make_optimizer, train
from cloister.training.rehearsal import rehearse
from cloister.training.rows import Declared
from cloister.training.tripwires import STEPS, probe_sampler

# Of the invented table: half of them are in a batch. Fewer where rows are long.
_MOST_ROWS, _FEWEST_ROWS = 256, 16
_NUMBERS = 2**24


class AtTheEnd(NamedTuple):
    """What rank 0 alone has, for the end of the attempt."""

    evaluator: Evaluator
    attack: MechanismAudit


class Trial(NamedTuple):
    """What an attempt trains with, as it was before training."""

    model: nn.Module
    learner: nn.Module
    """The part of `model` that trains."""
    engine: ClippedGradients
    """Around `learner`, until somebody closes it."""
    at_the_end: AtTheEnd | None
    """Rank 0's."""


def try_out(run: str, attempt: Attempt, group: Group) -> Trial:
    """Try on this rank what `attempt` is to do.

    Raises:
        CloisterError: it would fail, or would be less private than planned.
    """
    declared, plan = Declared(attempt.manifest, attempt.owner_key, attempt.spec), PrivacyPlan.from_dict(attempt.plan)
    spec, width, classes = declared.spec, declared.encoder.width, len(declared.labels)
    model = build_model(spec.model.model_dump(mode="json"), width, classes, seed_of(run))  # 1
    learner = trainable_part(model)
    random = np.random.default_rng(0)
    rows = min(_MOST_ROWS, max(_FEWEST_ROWS, _NUMBERS // width))
    table = {column.name: invented(column, rows, random) for column in declared.features}
    x_ND = fixed_features(model, torch.from_numpy(declared.encoder.encode(table)))
    y_N = torch.from_numpy(random.integers(0, classes, rows))
    rehearse(learner, x_ND)  # 2
    if group.rank == 0 and attempt.checkpoint is None:
        to_onnx(model, width)  # 3
    # Before there is an engine: its layers may compute otherwise, and it is gone when the model is evaluated.
    evaluator = Evaluator(learner, x_ND) if group.rank == 0 else None
    engine = TriedEngine(  # 4
        plan, learner, x_ND, y_N, world_size=group.world_size, engine=spec.privacy.engine
    )
    try:
        probe_sampler(plan)  # 5
        optimizer = make_optimizer(learner, spec.training.optimizer, spec.training.learning_rate)
        take_steps(learner, optimizer, engine, x_ND, y_N, plan)
        at_the_end = AtTheEnd(evaluator, attack_steps(plan, engine=spec.privacy.engine)) if evaluator else None  # 6
    except BaseException:
        engine.close()
        raise
    return Trial(model, learner, engine, at_the_end)


def invented(column: Column, rows: int, random: np.random.Generator) -> npt.NDArray[np.generic]:
    """Random values that a schema allows, as they are stored: [N], or [N, T] of a tensor."""
    if column.values is not None:
        return random.integers(0, len(column.values), rows)
    assert column.bounds is not None  # noqa: S101 - what is no category, and no text, has bounds
    low, high = column.bounds
    shape: Sequence[int] = (rows,)
    dtype = np.dtype("int32" if column.type == "integer" else "float64")  # a float32 may be rounded out of the bounds
    if column.dtype is not None:
        dtype = np.dtype(column.dtype)
        shape = (rows, column.tensor_bytes // dtype.itemsize)
    if dtype.kind != "f":
        return random.integers(int(low), int(high), shape, endpoint=True).astype(dtype)
    return np.clip(low + random.random(shape) * (high - low), low, high).astype(dtype)


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, engine: ClippedGradients, x_ND: torch.Tensor, y_N: torch.Tensor,
    plan: PrivacyPlan,
) -> None:  # fmt: skip
    """Take the first steps of `plan` on invented rows, and put the model's weights back. `optimizer` is used up.

    Half of the rows are in each batch, or most would be empty; the sum is divided as the plan says, and its noise is
    the plan's.

    Raises:
        IntegrityError: a tripwire.
        UnavailableError: there is no noise for this device.
    """
    table = max(2, round(2 * plan.expected_batch_size))
    some = replace(plan, sample_rate=0.5, rows=table, steps=STEPS)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        train(
            model,
            optimizer,
            x_ND[:table],
            y_N[:table],
            some,
            run="trial",
            attempt=1,
            rank=0,
            world_size=1,
            secret=fresh_secret(),
            all_reduce=lambda _sum: None,
            commit_block=lambda _first, _stop: None,
            clipped_gradients=_Lent(engine),
        )
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name])


class _Lent:
    """An engine that stays on its model when a loop closes it, whatever the plan of that loop."""

    def __init__(self, engine: ClippedGradients) -> None:
        self._engine = engine

    def ranges(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> int:
        return self._engine.ranges(x_ND, y_N)

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        return self._engine(x_BD, y_B, blocks)

    def close(self) -> None:
        """It is still to train."""
