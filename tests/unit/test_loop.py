"""The loop releases nothing that was not committed, clipped and noised, and ranks agree."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.blocks import Blocks
from cloister.privacy.grid import SLACK
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.plan import PrivacyPlan
from cloister.training.architectures import build_model, seed_of
from cloister.training.export import to_onnx
from cloister.training.loop import make_optimizer, train

torch.set_num_threads(1)

PLAN = PrivacyPlan(
    epsilon=3.0, delta=1e-5, epsilon_certified=3.0, noise_multiplier=0.0, max_grad_norm=1.0,
    sample_rate=1.0, steps=12, rows=60,
)  # fmt: skip
ARCHITECTURE = {"architecture": "mlp", "hidden": [7]}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((60, 4), generator=generator)
    return x, (x[:, 0] > 0).long()


def alone(tensor: torch.Tensor) -> None:
    """A reduction over one rank."""


def run(model: nn.Module, plan: PrivacyPlan, x: torch.Tensor, y: torch.Tensor, **changes: object) -> None:
    arguments: dict[str, object] = {
        "run": "run-1", "attempt": 1, "rank": 0, "world_size": 1, "secret": fresh_secret(), "all_reduce": alone,
        "commit_block": lambda _first, _stop: None,
    }  # fmt: skip
    optimizer = make_optimizer(model, "sgd", 0.5)
    train(model, optimizer, x, y, plan, **(arguments | changes))  # type: ignore[arg-type]  # one map for brevity


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def in_threads(world_size: int, body: Callable[[int, Callable[[torch.Tensor], None]], None]) -> None:
    """Run `body` on each rank, with an all-reduce that really meets."""
    barrier = threading.Barrier(world_size, timeout=300)
    shared: list[torch.Tensor] = [torch.empty(0)] * world_size
    failures: list[BaseException] = []

    def reducer(rank: int) -> Callable[[torch.Tensor], None]:
        def all_reduce(tensor: torch.Tensor) -> None:
            shared[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(shared).sum(dim=0)
            barrier.wait()
            tensor.copy_(total)

        return all_reduce

    def guarded(rank: int) -> None:
        try:
            body(rank, reducer(rank))
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_without_noise_are_one_rank(ranks: int) -> None:
    x, y = data()
    single = build_model(ARCHITECTURE, 4, 2, seed=1)
    start = weights(single).clone()
    run(single, PLAN, x, y)
    models = [build_model(ARCHITECTURE, 4, 2, seed=1) for _ in range(ranks)]

    def body(rank: int, reduce: Callable[[torch.Tensor], None]) -> None:
        run(models[rank], PLAN, x[rank::ranks], y[rank::ranks], rank=rank, world_size=ranks, all_reduce=reduce)

    in_threads(ranks, body)
    assert all(torch.equal(weights(model), weights(models[0])) for model in models), "ranks must not drift apart"
    assert torch.allclose(weights(models[0]), weights(single), atol=1e-5)
    assert not torch.allclose(weights(single), start, atol=1e-2), "it must have learnt something"


def test_ranks_with_poisson_batches_and_noise_stay_identical() -> None:
    x, y = data()
    plan = replace(PLAN, sample_rate=0.05, noise_multiplier=1.0, steps=40)
    pair = [build_model(ARCHITECTURE, 4, 2, seed=1) for _ in range(2)]
    shards = [(x[:10], y[:10]), (x[10:], y[10:])]  # ten rows at 5%: most batches of rank 0 are empty
    in_threads(2, lambda rank, reduce: run(pair[rank], plan, *shards[rank], rank=rank, world_size=2, all_reduce=reduce))
    assert torch.equal(weights(pair[0]), weights(pair[1]))
    assert torch.isfinite(weights(pair[0])).all()


class Recorder:
    """An engine that contributes nothing, so that what is reduced is the noise alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: list[int] = []

    def ranges(self, _x: torch.Tensor, _y: torch.Tensor) -> int:
        return 1

    def __call__(self, x: torch.Tensor, _y: torch.Tensor, _blocks: Blocks | None = None) -> torch.Tensor:
        self.batches.append(len(x))
        return torch.zeros(self.size, dtype=torch.float64)

    def close(self) -> None:
        """Nothing was put on the model."""


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_noise_of_all_ranks_adds_up_to_sigma_times_the_bound(world_size: int) -> None:
    x, y = data()
    plan = replace(PLAN, noise_multiplier=1.5, max_grad_norm=0.4, steps=1)
    architecture = {"architecture": "mlp", "hidden": [4000]}
    released: list[torch.Tensor] = [torch.empty(0)] * world_size

    def body(rank: int, reduce: Callable[[torch.Tensor], None]) -> None:
        def recorded(tensor: torch.Tensor) -> None:
            released[rank] = tensor.clone()
            reduce(tensor)

        model = build_model(architecture, 4, 2)
        run(model, plan, x[:15], y[:15], rank=rank, world_size=world_size, all_reduce=recorded,
            secret=bytes([rank] * 32), clipped_gradients=Recorder(len(weights(model))))  # fmt: skip

    in_threads(world_size, body)
    total = torch.stack(released).sum(dim=0).numpy()
    assert abs(total.var() / (1.5 * 0.4 * (1 + SLACK)) ** 2 - 1) < 3.29 * math.sqrt(2 / len(total)), "within 99.9 %"
    assert abs(total.mean()) < 5 * 0.6 / math.sqrt(len(total))
    if world_size > 1:
        correlations = np.corrcoef(torch.stack(released).numpy()) - np.eye(world_size)
        assert np.abs(correlations).max() < 5 / math.sqrt(len(total))


def test_a_block_is_committed_before_its_noise_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    add_to = GaussianNoise.add_to
    monkeypatch.setattr(GaussianNoise, "add_to", lambda *args: (events.append("noise"), add_to(*args))[1])
    x, y = data()
    run(build_model(ARCHITECTURE, 4, 2), PLAN, x, y, block_steps=5, resume_from=1,
        commit_block=lambda first, stop: events.append(f"{first}-{stop}"))  # fmt: skip
    assert events == ["1-6", *["noise"] * 5, "6-11", *["noise"] * 5, "11-12", "noise"]


def test_a_refused_commit_releases_nothing() -> None:
    x, y = data()
    model = build_model(ARCHITECTURE, 4, 2)
    before = weights(model).clone()
    reduced: list[torch.Tensor] = []

    def refuse(first: int, stop: int) -> None:
        raise InputError("the ledger refuses", "")

    with pytest.raises(InputError, match="ledger"):
        run(model, PLAN, x, y, commit_block=refuse, all_reduce=reduced.append)
    assert not reduced
    assert torch.equal(weights(model), before)


def test_a_second_attempt_draws_other_noise_even_with_the_same_secret() -> None:
    x, y = data()
    secret = fresh_secret()
    plan = replace(PLAN, noise_multiplier=1.0, steps=1)
    released: list[torch.Tensor] = []
    for attempt in (1, 1, 2):
        model = build_model(ARCHITECTURE, 4, 2)
        run(model, plan, x, y, secret=secret, attempt=attempt, clipped_gradients=Recorder(len(weights(model))),
            all_reduce=lambda tensor: released.append(tensor.clone()))  # fmt: skip
    assert torch.equal(released[0], released[1]), "the test itself: one name, one stream"
    assert not torch.equal(released[0], released[2])


def test_the_average_divides_by_the_public_size_and_empty_batches_are_steps() -> None:
    x, y = data()
    plan = replace(PLAN, sample_rate=0.02, noise_multiplier=0.0, steps=200)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    done: list[int] = []

    class Ones(Recorder):
        def __call__(self, x: torch.Tensor, y: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
            return super().__call__(x, y, blocks) + float(len(x))

    engine = Ones(1)

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    # A fixed secret: of one in forty, the first three batches are empty, and that weights then do not move is told.
    train(model, optimizer, x, y, plan, run="r", attempt=1, rank=0, world_size=1, secret=bytes(range(32)),
          all_reduce=alone, commit_block=lambda _first, _stop: None, on_step=done.append,
          clipped_gradients=engine)  # fmt: skip
    assert done == list(range(1, 201))
    assert 0 in engine.batches
    assert len(set(engine.batches)) > 2
    assert float(model.weight.detach()) == pytest.approx(-sum(engine.batches) / (0.02 * 60), rel=1e-4)


def test_a_nan_row_does_not_reach_the_weights() -> None:
    x, y = data()
    poisoned = x.clone()
    poisoned[3] = float("nan")
    model, reference = build_model(ARCHITECTURE, 4, 2), build_model(ARCHITECTURE, 4, 2)
    run(model, PLAN, poisoned, y)
    keep = torch.arange(60) != 3
    run(reference, PLAN, x[keep], y[keep])
    assert torch.allclose(weights(model), weights(reference), atol=1e-6)


def test_no_trace_of_single_rows_stays_on_the_model() -> None:
    x, y = data()
    model = build_model(ARCHITECTURE, 4, 2)
    before = [sorted(vars(layer)) for layer in model.modules()]
    run(model, PLAN, x, y)
    assert [sorted(vars(layer)) for layer in model.modules()] == before
    assert all(not vars(parameter) and parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in model.modules())
    assert len(to_onnx(model, 4)) > 0, "a trained model must export like a fresh one"


def test_more_rows_than_the_plan_declares_are_refused() -> None:
    x, y = data()
    with pytest.raises(InputError, match="other rows"):
        run(build_model(ARCHITECTURE, 4, 2), replace(PLAN, rows=59), x, y)


def test_initial_weights_are_equal_on_every_rank_and_leave_torchs_state_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first = build_model(ARCHITECTURE, 4, 2, seed_of("run-1"))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(first), weights(build_model(ARCHITECTURE, 4, 2, seed_of("run-1"))))
    assert not torch.equal(weights(first), weights(build_model(ARCHITECTURE, 4, 2, seed_of("run-2"))))


@pytest.mark.parametrize(
    "wrong",
    [{"architecture": "vit"}, {"architecture": "mlp"}, {"architecture": "mlp", "hidden": [0]},
     {"architecture": "mlp", "hidden": [4], "depth": 2}, {"architecture": "mlp", "hidden": [4], "activation": "x"}],
)  # fmt: skip
def test_an_unknown_architecture_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        build_model(wrong, 4, 2)
