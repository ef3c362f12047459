"""No row moves the sum by more than C, and the sum is the one that autograd computes row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.clipping import SUPPORTED_LAYERS, GhostClippedGradients

# torch warns that an embedding's input has no gradient, which is so.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
torch.set_num_threads(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
        nn.LayerNorm(24), nn.Linear(24, 3),
    )  # fmt: skip


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(60, 3))


def batch(kind: str, rows: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((rows, 12), generator=generator) * 3
    if kind == "embedding":
        x = torch.randint(0, 7, (rows, 12), generator=generator)
    return x, torch.randint(0, 3, (rows,), generator=generator)


MODELS = {"mlp": mlp, "convolutional": convolutional, "embedding": embedding}


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]()


def oracle(model: nn.Module, x: torch.Tensor, y: torch.Tensor, bound: float) -> torch.Tensor:
    """Plain autograd in float64, one row at a time."""
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        total += flat * min(1.0, bound / float(flat.norm()))
    model.float()
    return total


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("bound", [0.05, 1.0, 1e4])
@pytest.mark.parametrize("microbatch_rows", [5, 1024])
def test_the_sum_is_that_of_autograd_row_by_row(kind: str, bound: float, microbatch_rows: int) -> None:
    x, y = batch(kind)
    expected = oracle(built(kind), x, y, bound)
    got = GhostClippedGradients(built(kind), bound, microbatch_rows)(x, y).double()
    assert float((got - expected).norm() / expected.norm()) <= 1e-5


def test_the_oracle_covers_every_supported_layer() -> None:
    tested = {type(layer) for kind in MODELS for layer in built(kind).modules()}
    assert tested >= SUPPORTED_LAYERS


@pytest.mark.parametrize("kind", MODELS)
def test_no_row_contributes_more_than_the_bound(kind: str) -> None:
    x, y = batch(kind, 64)
    for bound in (1e-3, 0.1, 1.0):
        clipped = GhostClippedGradients(built(kind), bound)
        for i in range(len(x)):
            assert float(clipped(x[i : i + 1], y[i : i + 1]).double().norm()) <= bound


def test_removing_a_row_moves_the_sum_by_at_most_the_bound() -> None:
    x, y = batch("mlp", 64)
    clipped = GhostClippedGradients(built("mlp"), 0.1)
    whole = clipped(x, y).double()
    for i in range(8):
        rest = torch.arange(64) != i
        # Rounding of a float32 sum of 64 rows comes on top.
        assert float((whole - clipped(x[rest], y[rest]).double()).norm()) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("microbatch_rows", [4, 1024])
def test_a_row_that_is_not_finite_has_no_weight_and_spoils_no_other(poison: float, microbatch_rows: int) -> None:
    x, y = batch("mlp")
    clipped = GhostClippedGradients(built("mlp"), 1.0, microbatch_rows)
    good = torch.ones(len(x), dtype=torch.bool)
    good[[0, 7, 8]] = False
    expected = clipped(x[good], y[good])
    poisoned = x.clone()
    poisoned[~good] = poison
    got = clipped(poisoned, y)
    assert torch.isfinite(got).all()
    if poison != 3e38:  # large but finite: allowed to count, clipped
        assert float((got - expected).norm() / expected.norm()) <= 1e-6


def test_a_batch_of_nothing_but_bad_rows_and_an_empty_batch_give_zero() -> None:
    x, y = batch("mlp")
    clipped = GhostClippedGradients(built("mlp"), 1.0)
    assert clipped(torch.full_like(x, float("nan")), y).abs().max() == 0.0
    assert clipped(x[:0], y[:0]).abs().max() == 0.0


def test_nothing_is_left_over_for_the_next_batch() -> None:
    x, y = batch("mlp")
    model = built("mlp")
    clipped = GhostClippedGradients(model, 1.0)
    first = clipped(x, y)
    clipped(torch.full_like(x, float("nan")), y)
    clipped(x[:3], y[:3])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(clipped(x, y), first)


def test_frozen_layers_are_left_alone() -> None:
    x, y = batch("mlp")
    model = built("mlp")
    for parameter in model[0].parameters():  # type: ignore[index]  # it is a Sequential
        parameter.requires_grad_(False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert GhostClippedGradients(model, 1.0)(x, y).shape == (trainable,)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(12))


class OwnLinear(nn.Linear):
    pass


def tied() -> nn.Module:
    layer, other = nn.Linear(12, 12), nn.Linear(12, 12)
    other.weight = layer.weight
    return nn.Sequential(layer, other)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4)), "'1' (BatchNorm1d) mixes the rows"),
        (nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, affine=False)), "'1' (BatchNorm1d) mixes the rows"),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), "'0' (Bilinear) cannot be trained"),
        (nn.Sequential(nn.LSTM(2, 2)), "'0' (LSTM) cannot be trained"),
        (nn.Sequential(OwnParameter()), "'0' (OwnParameter) cannot be trained"),
        (nn.Sequential(OwnLinear(12, 3)), "'0' (OwnLinear) cannot be trained"),
        (nn.Sequential(nn.Linear(12, 3).to(torch.bfloat16)), "'0' (Linear) is not float32"),
        (tied(), "is shared between layers"),
        (nn.Sequential(nn.ReLU()), "no trainable parameter"),
    ],
)
def test_a_layer_without_a_known_per_row_gradient_is_refused_by_name(model: nn.Module, told: str) -> None:
    with pytest.raises(InputError) as refusal:
        GhostClippedGradients(model, 1.0)
    assert told in refusal.value.message
    assert refusal.value.hint
