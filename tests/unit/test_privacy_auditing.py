"""The audits find what is wrong with a mechanism, come close to what is right, and seldom cry wolf."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cloister.privacy import accounting, sampling
from cloister.privacy.auditing import (
    AuditReport,
    StepObservations,
    guess,
    mechanism_audit,
    one_run_audit,
)
from cloister.privacy.clipping import BookkeepingGradients
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.sampling import PoissonSampler
from cloister.training import audit, loop
from cloister.training.architectures import build_model
from cloister.training.audit import audit_model, audit_step, draw_canaries, observe_steps
from cloister.training.loop import make_optimizer, train
from cloister.training.rows import Opened

torch.set_num_threads(1)

# Statistics below use fixed secrets, so they either always pass or never do.
SECRET = bytes(range(32))
PLAN = PrivacyPlan(
    epsilon=3.0, delta=1e-5, epsilon_certified=accounting.epsilon(1.0, 0.02, 400, 1e-5), noise_multiplier=1.0,
    max_grad_norm=1.0, sample_rate=0.02, steps=400, rows=20_000,
)  # fmt: skip


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_real_step_is_not_falsified_and_the_attack_comes_close_to_the_theory(engine: str) -> None:
    found = audit_step(PLAN, engine=engine, secret=SECRET)
    assert not found.falsified
    assert 0.85 <= found.ratio <= 1.0
    assert found.noise_multiplier_at_most >= 1.0
    assert found.sample_rate_at_least <= 0.02


def falsified(monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(loop, "Tripwires", NoTripwires)
    return audit_step(PLAN, secret=SECRET).falsified


class NoTripwires:
    """The loop's own checks are out of the way: the audit is to find it by itself."""

    def __init__(self, *_: object) -> None:
        """Watches nothing."""

    def see_sum(self, _sum: torch.Tensor) -> None:
        """Watches nothing."""

    def see_weights(self) -> None:
        """Watches nothing."""


def times(factor: float) -> Callable[..., None]:
    add_to = GaussianNoise.add_to
    return lambda self, step, sum_p, std, unit: add_to(self, step, sum_p, std * factor, unit)


@pytest.mark.parametrize("factor", [0.5, 1 / math.sqrt(2)])  # the latter: ranks share the variance twice
def test_too_little_noise_is_found(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(GaussianNoise, "add_to", times(factor))
    assert falsified(monkeypatch)


def test_gradients_that_are_longer_than_promised_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = BookkeepingGradients.__call__
    monkeypatch.setattr(BookkeepingGradients, "__call__", lambda self, *batch: 1.3 * clip(self, *batch))
    assert falsified(monkeypatch)


def test_noise_that_comes_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add_to = GaussianNoise.add_to

    def repeated(self: GaussianNoise, step: int, *sum_and_noise: Any) -> None:
        fresh = GaussianNoise(self._secret, run=self._run, attempt=self._attempt, rank=self._rank)
        add_to(fresh, step % 2, *sum_and_noise)

    monkeypatch.setattr(GaussianNoise, "add_to", repeated)
    assert falsified(monkeypatch)


def test_a_higher_sample_rate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PoissonSampler", lambda n, rate, key: PoissonSampler(n, min(1.0, rate * 1.5), key))
    assert falsified(monkeypatch)


def test_batches_of_one_size_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffled:
        def __init__(self, n: int, rate: float, key: bytes) -> None:
            self.n, self.size, self.random = n, max(1, round(n * rate)), np.random.default_rng(list(key))

        def next_batch(self) -> np.ndarray:
            return np.sort(self.random.choice(self.n, self.size, replace=False))

    monkeypatch.setattr(sampling, "PoissonSampler", Shuffled)
    assert falsified(monkeypatch)


def test_the_bound_of_the_mechanism_holds_where_the_claim_does() -> None:
    """Gaussians of exactly the stated noise: no more than the promised share of audits may falsify it."""
    random = np.random.default_rng(7)
    wrong = 0
    for _ in range(60):
        seen = StepObservations(
            absent=random.normal(size=20_000), present=1 + random.normal(size=20_000),
            noise_SF=random.normal(size=(40, 512)), sampled_SM=random.binomial(20, 0.02, size=(30, 1000)),
            rows_M=np.full(1000, 20),
        )  # fmt: skip
        found = mechanism_audit(
            seen, noise_multiplier=1.0, sample_rate=0.02, epsilon_theory=1.0, epsilon_of=lambda s, q: q / 0.02 / s
        )
        wrong += found.falsified
    assert wrong <= 5


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_a_one_run_bound_exceeds_the_truth_as_seldom_as_promised(epsilon: float) -> None:
    random = np.random.default_rng(3)
    bounds = []
    for _ in range(500):
        included = random.random(400) < 0.5
        answers = included ^ (random.random(400) > 1 / (1 + math.exp(-epsilon)))  # randomized response
        scores = answers + 1e-6 * random.random(400)
        bounds.append(one_run_audit(guess(scores, included), epsilon=epsilon, delta=0.0).epsilon_lower_bound)
    assert sum(bound > epsilon for bound in bounds) <= 0.05 * 500 + 2 * math.sqrt(500 * 0.05)
    assert np.median(bounds) >= 0.5 * epsilon, "and says something"


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite score"):
        guess(np.array([1.0, math.nan, 0.0, 2.0]), np.array([True, False, True, False]))


def trained(noise_multiplier: float) -> tuple[torch.nn.Module, audit.Canaries]:
    canaries = draw_canaries(64, 4, 200, run="run-audit", secret=SECRET)
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand((600, 64), generator=generator), torch.randint(0, 4, (600,), generator=generator)
    x, y, shards = canaries.among(Opened(x, y, [("0", 600)]))
    model = build_model({"architecture": "mlp", "hidden": [64]}, 64, 4, seed=1)
    plan = replace(PLAN, noise_multiplier=noise_multiplier, rows=600, sample_rate=0.1, steps=400)
    train(model, make_optimizer(model, "adam", 0.01), x, y, plan, run="r", attempt=1, rank=0, world_size=1,
          secret=SECRET, shards=shards, all_reduce=lambda _: None, commit_block=lambda _first, _stop: None)  # fmt: skip
    return model, canaries


def test_a_model_that_was_trained_without_noise_is_falsified_and_one_with_noise_is_not() -> None:
    model, canaries = trained(noise_multiplier=0.0)
    made = audit_model(model, canaries)
    bare = one_run_audit(made, epsilon=1.0, delta=1e-5)
    assert bare.epsilon_lower_bound > 1.0
    assert bare.falsified
    model, canaries = trained(noise_multiplier=4.0)
    noisy = one_run_audit(audit_model(model, canaries), epsilon=3.0, delta=1e-5)
    assert noisy.epsilon_lower_bound <= 1.0
    mechanism = audit_step(PLAN, secret=SECRET)
    stated = AuditReport(epsilon=1.0, mechanism=mechanism, one_run=bare)
    assert stated.verdict == "falsified"
    report = AuditReport(epsilon=3.0, mechanism=mechanism, one_run=noisy).to_dict()
    assert report["verdict"] == "not falsified"
    assert "does not prove" in report["meaning"]


def test_canaries_are_the_same_in_every_attempt_and_no_choice_of_whoever_names_the_run() -> None:
    drawn = [
        draw_canaries(10, 3, 200, run=run, secret=secret)
        for run, secret in (("a", SECRET), ("a", SECRET), ("b", SECRET), ("a", bytes(32)))
    ]
    one, again, other, elsewhere = drawn
    assert not np.array_equal(one.included_M, elsewhere.included_M)
    assert torch.equal(one.x_MD, again.x_MD)
    assert np.array_equal(one.included_M, again.included_M)
    assert not torch.equal(one.x_MD, other.x_MD)
    assert 60 <= one.included_M.sum() <= 140
    assert set(one.x_MD.unique().tolist()) == {-1.0, 1.0}


def test_what_is_observed_are_steps_of_the_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[PrivacyPlan] = []
    real = audit.train
    monkeypatch.setattr(audit, "train", lambda *a, **k: (calls.append(a[4]), real(*a, **k))[1])
    observe_steps(PLAN, engine="bookkeeping", world_size=2, secret=SECRET, name="audit")
    assert {plan.sample_rate for plan in calls} == {1.0, PLAN.sample_rate}
    assert len(calls) == 4
