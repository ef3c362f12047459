"""What a plan is made of: the sum of a rank's rows, and the noise that fits it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy import clipping
from cloister.privacy.grid import SLACK
from cloister.privacy.mechanism import Mechanism, TriedEngine, grid_of, noise_std
from cloister.privacy.plan import PrivacyPlan
from cloister.training.architectures import build_model

torch.set_num_threads(1)
ROWS = 20_000
PLAN = PrivacyPlan(
    epsilon=3.0, delta=1e-6, epsilon_certified=2.9, noise_multiplier=1.5, max_grad_norm=0.4, sample_rate=0.5, steps=10,
    rows=ROWS + 1,
)  # fmt: skip


def mechanism(x: torch.Tensor, y: torch.Tensor, model: nn.Module, plan: PrivacyPlan = PLAN) -> Mechanism:
    return Mechanism(
        plan, model, x, y, shards=[("train-000", len(x))], run="run-1", attempt=1, rank=0, world_size=1,
        secret=bytes(range(32)),
    )  # fmt: skip


def test_a_row_more_in_a_table_moves_the_sum_by_its_own_part() -> None:
    """All point the same way, each with another last bit, so that sums round as much as they can."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))
    x = (1 + torch.rand(ROWS + 1, 24) * 1e-3) * torch.rand(1, 24) * 20
    with torch.no_grad():
        y = model(x).argmin(1)  # all wrong

    def summed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        one = mechanism(x, y, model)
        try:
            return one.clipped_sum(np.arange(len(x)))
        finally:
            one.close()

    own = summed(x[:1], y[:1])
    without = summed(x[1:], y[1:])
    for place in (0, ROWS // 3, ROWS):
        order = torch.arange(1, ROWS + 1).tolist()
        order.insert(place, 0)
        moved = summed(x[order], y[order]) - without
        assert 0.5 * PLAN.max_grad_norm < float(moved.norm()) <= PLAN.max_grad_norm * (1 + SLACK)
        assert float((moved - own).norm()) <= 2e-4 * PLAN.max_grad_norm


def test_dropout_draws_from_a_secret_of_the_attempt() -> None:
    """From a known seed, a row more would be known to give others other masks."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2))
    x, y = torch.randn(50, 4), torch.randint(0, 2, (50,))
    one = mechanism(x, y, model)
    sums = []
    for _ in range(2):
        torch.manual_seed(1)
        sums.append(one.clipped_sum(np.arange(50)))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    one.close()
    assert not torch.equal(*sums)


def test_noise_has_the_slack_for_what_rounding_adds() -> None:
    model = build_model({"architecture": "mlp", "hidden": [8]}, 4, 2)
    one = mechanism(torch.randn(50, 4), torch.randint(0, 2, (50,)), model)
    noisy = torch.zeros(1_000_000, dtype=torch.float64)
    one.add_noise(0, noisy)
    assert abs(float(noisy.std()) / (1.5 * 0.4 * (1 + SLACK)) - 1) < 0.003
    assert noise_std(PLAN) == 1.5 * 0.4 * (1 + SLACK)
    units = noisy / grid_of(PLAN, 1, 1).unit
    assert torch.equal(units, units.round())


def test_an_engine_that_was_tried_before_is_not_tried_again_and_serves_its_own_plan_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_model({"architecture": "mlp", "hidden": [8]}, 4, 2)
    x, y = torch.randn(50, 4), torch.randint(0, 2, (50,))
    tries: list[int] = []
    fitting = clipping.fitting
    monkeypatch.setattr(clipping, "fitting", lambda *given, **named: (tries.append(1), fitting(*given, **named))[1])

    def mechanism_of(model: nn.Module, plan: PrivacyPlan, world_size: int = 2) -> Mechanism:
        return Mechanism(
            plan, model, x, y, shards=[("a", 50)], run="r", attempt=1, rank=0, world_size=world_size, secret=bytes(32),
            clipped_gradients=tried,
        )  # fmt: skip

    tried = TriedEngine(PLAN, model, torch.zeros(1, 4), y[:1], world_size=2)
    with pytest.raises(InputError, match="another model or plan"):
        mechanism_of(copy.deepcopy(model), PLAN)
    for other in ({"max_grad_norm": 0.1}, {"sample_rate": 0.1}):
        with pytest.raises(InputError, match="another model or plan"):
            mechanism_of(model, replace(PLAN, **other))  # type: ignore[arg-type]  # one map for brevity
    with pytest.raises(InputError, match="another model or plan"):
        mechanism_of(model, PLAN, world_size=1)
    one = mechanism_of(model, PLAN)
    assert float(one.clipped_sum(np.arange(50)).norm()) > 0
    assert len(tries) == 1
    one.close()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_rows_that_are_not_the_shards_are_refused() -> None:
    model = build_model({"architecture": "mlp", "hidden": [8]}, 4, 2)
    x, y = torch.randn(50, 4), torch.randint(0, 2, (50,))
    for shards in ([("a", 49)], [("a", 30), ("a", 20)]):
        with pytest.raises(InputError, match="shards"):
            Mechanism(
                replace(PLAN, rows=50), model, x, y, shards=shards, run="r", attempt=1, rank=0, world_size=1,
                secret=bytes(32),
            )  # fmt: skip
