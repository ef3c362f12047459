"""What a model does wrong shows on public rows, before it costs anything; what a build does wrong, in three steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from architectures import FAMILIES
from cloister.errors import InputError, IntegrityError
from cloister.privacy.keystream import Keystream, fresh_secret
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.sampling import ShardedBatches
from cloister.training.loop import train
from cloister.training.rehearsal import rehearse
from cloister.training.tripwires import Tripwires, probe_sampler

torch.set_num_threads(1)

PLAN = PrivacyPlan(
    epsilon=3.0, delta=1e-5, epsilon_certified=3.0, noise_multiplier=1.0, max_grad_norm=1.0,
    sample_rate=0.5, steps=6, rows=400,
)  # fmt: skip


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3))


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((400, 6), generator=generator), torch.randint(0, 3, (400,), generator=generator)


def run(model: nn.Module, plan: PrivacyPlan = PLAN, optimizer: torch.optim.Optimizer | None = None, **changes: object) -> None:  # noqa: E501  # fmt: skip
    arguments: dict[str, object] = {
        "run": "r", "attempt": 1, "rank": 0, "world_size": 1, "secret": fresh_secret(),
        "all_reduce": lambda _tensor: None, "commit_block": lambda _first, _stop: None,
    }  # fmt: skip
    train(model, optimizer or torch.optim.SGD(model.parameters(), lr=0.1), *rows(), plan, **(arguments | changes))  # type: ignore[arg-type]  # one map for brevity


class CentredRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))  # type: ignore[no-any-return]


class DividedByTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) / len(x)  # type: ignore[no-any-return]


class DeadEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.forgotten = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.forgotten(x).detach()  # type: ignore[no-any-return]


class TiedByHand(nn.Module):
    """The embedding's weight is used twice, and its layer is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(6, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.words(x.abs().long() % 6).mean(1)) @ self.words.weight.T  # type: ignore[no-any-return]


class ChangedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.linear(x)
        x.mul_(2.0)
        return self.head(y)  # type: ignore[no-any-return]


class ByHeart(nn.Module):
    """It keeps a parameter in a list too, and uses that one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)
        self.kept = [self.scale]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * self.kept[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sound_model_passes_and_is_left_as_it_was(name: str) -> None:
    torch.manual_seed(2)
    case = FAMILIES[name](torch.Generator().manual_seed(1), 4)
    before = [parameter.clone() for parameter in case.model.parameters()]
    state = torch.get_rng_state()
    rehearse(case.model, torch.full_like(case.x, 10**6))  # the values are not read
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))
    assert case.model.training
    assert not any(layer._forward_hooks for layer in case.model.modules())


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (CentredRows, "'linear.weight' for one row depends on the other rows"),
        (DividedByTheBatch, "'linear.weight' for one row depends on the other rows"),
        (TiedByHand, "of parameter 'words.weight' does not come through its layer"),
        (ByHeart, "of parameter 'scale' does not come through its layer"),
        (ChangedInput, "changes a tensor in place"),
        (DeadEnd, "no row's gradient reaches parameter 'forgotten.weight'"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused_by_name(model: type[nn.Module], told: str) -> None:
    with pytest.raises(InputError) as refusal:
        rehearse(model(), rows()[0])
    assert told in refusal.value.message


def test_an_optimiser_that_forgets_a_parameter_trips_in_the_third_step() -> None:
    model, done = mlp(), []
    with pytest.raises(IntegrityError, match=r"'2\.bias' does not move"):
        run(model, optimizer=torch.optim.SGD(list(model.parameters())[:-1], lr=0.1), on_step=done.append)
    assert len(done) == 2


def test_noise_that_does_not_arrive_trips_and_names_the_parameter() -> None:
    def quiet(tensor: torch.Tensor) -> None:
        tensor[:180] *= 0.01  # the first weight

    # Few rows, or their gradients would be longer than the noise.
    plan = replace(PLAN, sample_rate=0.001)
    with pytest.raises(IntegrityError, match=r"noise of parameter '0\.weight' is missing"):
        run(mlp(), plan, all_reduce=quiet)


def test_gradients_that_are_not_clipped_trip() -> None:
    class Unclipped:
        def ranges(self, _x: torch.Tensor, _y: torch.Tensor) -> int:
            return 1

        def __call__(self, x: torch.Tensor, _y: torch.Tensor, _blocks: object = None) -> torch.Tensor:
            return torch.full((303,), 5.0, dtype=torch.float64) * len(x)

        def close(self) -> None:
            """Nothing was put on the model."""

    with pytest.raises(IntegrityError, match="longer than clipping allows"):
        run(mlp(), clipped_gradients=Unclipped())


def test_a_sum_that_is_no_number_trips() -> None:
    tripwires = Tripwires(mlp(), PLAN, 1.0)
    with pytest.raises(IntegrityError, match="longer than"):
        tripwires.see_sum(torch.full((303,), float("nan"), dtype=torch.float64))


def test_a_sound_run_does_not_trip() -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        run(mlp(), replace(PLAN, steps=4, sample_rate=(0.01, 0.5, 0.99)[seed % 3]))


def test_a_sampler_that_stands_still_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardedBatches, "next_batch", lambda _self: np.arange(7))
    for rate in (0.5, 0.03, 1e-3):
        with pytest.raises(IntegrityError, match="sampler stands still"):
            probe_sampler(replace(PLAN, sample_rate=rate))


def test_a_key_stream_that_stands_still_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Keystream.words

    def again(self: Keystream, count: int) -> np.ndarray:
        self._draw = 0
        return words(self, count)

    monkeypatch.setattr(Keystream, "words", again)
    with pytest.raises(IntegrityError, match="sampler stands still"):
        probe_sampler(PLAN)


@pytest.mark.parametrize("rate", [1e-7, 1e-4, 0.01, 0.5, 0.999, 1.0])
def test_equal_batches_are_no_fault_where_they_are_to_be_expected(rate: float) -> None:
    for _ in range(20):
        probe_sampler(replace(PLAN, sample_rate=rate))


def test_a_private_batch_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an attempt may equal the one before: nobody is told."""
    monkeypatch.setattr(ShardedBatches, "next_batch", lambda _self: np.arange(7))
    run(mlp())


def test_a_noise_stream_that_stands_still_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(_self: object, _step: int, sum_p: torch.Tensor, std: float, _unit: float) -> None:
        sum_p += std * torch.randn(len(sum_p), generator=torch.Generator().manual_seed(1), dtype=sum_p.dtype)

    monkeypatch.setattr(GaussianNoise, "add_to", frozen)
    with pytest.raises(IntegrityError, match="same noise: the stream stands still"):
        run(mlp())


def test_what_would_sample_or_stop_by_rules_of_its_own_is_refused() -> None:
    x, y = rows()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    arguments = {
        "run": "r", "attempt": 1, "rank": 0, "world_size": 1, "secret": fresh_secret(),
        "all_reduce": lambda _tensor: None, "commit_block": lambda _first, _stop: None,
    }  # fmt: skip
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="rows come as tensors"):
        train(model, optimizer, loader, y, PLAN, **arguments)  # type: ignore[arg-type]  # that is what is refused
    with pytest.raises(InputError, match="not a privacy plan"):
        train(model, optimizer, x, y, {"steps": 3}, **arguments)  # type: ignore[arg-type]  # that is what is refused
    with pytest.raises(InputError, match="handed something back"):
        run(mlp(), on_step=lambda done: done > 2)
    with pytest.raises(InputError, match="two shards have one name"):
        run(mlp(), shards=[("a", 200), ("a", 200)])
    with pytest.raises(InputError, match="other numbers of rows"):
        run(mlp(), shards=[("a", 200), ("b", 199)])
