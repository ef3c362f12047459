"""What is tried on invented rows, before there is a key: it finds what would fail, and leaves everything as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cloister.datasets.encoding import FeatureEncoder
from cloister.datasets.schema import DatasetSchema
from cloister.errors import IntegrityError
from cloister.privacy.mechanism import TriedEngine
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.plan import PrivacyPlan
from cloister.training.loop import make_optimizer
from cloister.training.trial import invented, take_steps

torch.set_num_threads(1)

PLAN = PrivacyPlan(
    epsilon=3.0, delta=1e-5, epsilon_certified=3.0, noise_multiplier=1.0, max_grad_norm=1.0,
    sample_rate=0.05, steps=60, rows=2000,
)  # fmt: skip
SCHEMA = """
name: all-kinds
purpose: research
region: eu
retention: P1Y
columns:
  - {name: colour, type: category, class: internal, values: [red, green, blue]}
  - {name: age, type: integer, class: internal, bounds: [-3, 90], encoding: {bins: [0, 18, 65]}}
  - {name: most, type: integer, class: internal, bounds: [-2147483647, 2147483647]}
  - {name: share, type: number, class: internal, bounds: [0.1, 0.3]}
  - {name: income, type: number, class: internal, bounds: [1, 1.0e+30], encoding: {scale: log}}
  - {name: uint8, type: tensor, class: internal, shape: [2, 3], dtype: uint8, bounds: [3, 255]}
  - {name: int8, type: tensor, class: internal, shape: [4], dtype: int8, bounds: [-128, 127]}
  - {name: int32, type: tensor, class: internal, shape: [4], dtype: int32, bounds: [-2147483648, 2147483647]}
  - {name: float16, type: tensor, class: internal, shape: [4], dtype: float16, bounds: [-0.1, 0.3]}
  - {name: float64, type: tensor, class: internal, shape: [4], dtype: float64, bounds: [-1.0e+300, 1.0e+300]}
  - {name: answer, type: category, class: internal, role: label, values: [left, right]}
"""


def test_invented_rows_are_such_as_a_schema_allows_and_differ() -> None:
    columns = DatasetSchema.from_yaml_text(SCHEMA)
    encoder = FeatureEncoder(columns.feature_columns(None))
    random = np.random.default_rng(1)
    table = {column.name: invented(column, 300, random) for column in encoder.columns}
    x = encoder.encode(table)
    assert x.shape == (300, encoder.width)
    assert (x.max(0) > x.min(0)).all(), "no input is the same in each row"
    assert set(table["colour"].tolist()) == {0, 1, 2}
    assert len(np.unique(table["uint8"])) > 100


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_steps_on_invented_rows_leave_weights_and_the_engine_as_they_were(engine: str) -> None:
    learner = model()
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    x, y = torch.rand(256, 6), torch.randint(0, 3, (256,))
    tried = TriedEngine(PLAN, learner, x, y, world_size=2, engine=engine)
    learner.train()
    expected = tried(x, y)
    take_steps(learner, make_optimizer(learner, "adam", 0.1), tried, x, y, PLAN)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in learner.parameters())
    learner.train()
    assert torch.equal(tried(x, y), expected)
    tried.close()


def test_tripwires_trip_on_invented_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = model()
    x, y = torch.rand(256, 6), torch.randint(0, 3, (256,))

    def steps(plan: PrivacyPlan, rate: float = 0.1) -> None:
        tried = TriedEngine(plan, learner, x, y, world_size=1)
        try:
            take_steps(learner, make_optimizer(learner, "sgd", rate), tried, x, y, plan)
        finally:
            tried.close()

    steps(PLAN)
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    with pytest.raises(IntegrityError, match="does not move"):
        steps(PLAN, rate=1e-30)
    add_to = GaussianNoise.add_to
    monkeypatch.setattr(
        GaussianNoise, "add_to", lambda self, step, sum_p, std, unit: add_to(self, step, sum_p, 0.01 * std, unit)
    )
    with pytest.raises(IntegrityError, match="noise of parameter"):
        steps(replace(PLAN, noise_multiplier=1000.0))
    monkeypatch.setattr(GaussianNoise, "add_to", lambda _self, _step, sum_p, std, _unit: sum_p.add_(std))
    with pytest.raises(IntegrityError, match="same noise"):
        steps(PLAN)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
