"""Models and rows that once let one row move a sum by more than its bound, or a device that computes rows otherwise
beside others pass: each was made for one place in the engines."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cloister.errors import InputError, IntegrityError
from cloister.privacy.blocks import Blocks, Places, places_of
from cloister.privacy.clipping import BookkeepingGradients, ClippedGradients, ClippingOptions
from cloister.privacy.engines import clipping_engine
from cloister.privacy.gradients import CANCELLED, Products
from cloister.privacy.grid import NORMS, SLACK, Grid
from cloister.privacy.mechanism import Mechanism
from cloister.privacy.opacus_engine import OpacusGradients
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.watching import Watch

torch.set_num_threads(1)
ENGINES = ("bookkeeping", "opacus")
KEY = bytes(range(32))
Function = Callable[[torch.Tensor], torch.Tensor]


def summed(engine: ClippedGradients, x: torch.Tensor, y: torch.Tensor, places: Places | None = None) -> torch.Tensor:
    blocks = Blocks(places_of(x, y, KEY) if places is None else places, engine.ranges(x, y))
    order = torch.from_numpy(blocks.order)
    return engine(x[order], y[order], blocks)


def moved(engine: ClippedGradients, bound: float, x: torch.Tensor, y: torch.Tensor, row: int) -> float:
    """By how much the sum changes when a row goes, in units of the bound."""
    others = torch.arange(len(x)) != row
    return float((summed(engine, x, y) - summed(engine, x[others], y[others])).norm()) / bound


class Kink(nn.Module):
    """A product whose sum MKL rounds by where the row begins, of a layer or a constant; a ReLU at that very bit."""

    def __init__(self, *, constant: bool) -> None:
        super().__init__()
        self.constant = constant
        self.first, self.spread, self.head = nn.Linear(8, 1, bias=False), nn.Linear(1, 8), nn.Linear(8, 2)
        if constant:
            self.first.requires_grad_(requires_grad=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(1, 8, generator=torch.Generator().manual_seed(1)))
            self.spread.weight.fill_(1.0)
            self.spread.bias.zero_()
            self.head.weight.copy_(torch.tensor([[100.0], [-100.0]]).expand(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.spread(self.product(x) + x[:, 9:])))  # type: ignore[no-any-return]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :8] @ self.first.weight.mT if self.constant else self.first(x[:, :8])  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("constant", [False, True])
def test_rows_that_round_by_where_they_begin(engine: str, constant: bool) -> None:
    rows = 2000
    model = Kink(constant=constant)
    x = torch.rand(rows, 10, generator=torch.Generator().manual_seed(2))
    room = torch.zeros(rows * 10 + 64)
    start = (-room.data_ptr() // 4) % 16
    by_place = []
    for offset in range(4):
        there = room[start + offset : start + offset + rows * 10].view(rows, 10).copy_(x)
        by_place.append(model.product(there).detach().flatten())
    least, most = torch.stack(by_place).min(0).values, torch.stack(by_place).max(0).values
    x[:, 9] = -least
    x = x[most > least][:600].contiguous()
    clipped = clipping_engine(engine, model, Grid.of(1.0, 600), ClippingOptions(microbatch_rows=16))
    labels = torch.zeros(len(x), dtype=torch.int64)
    assert max((moved(clipped, 1.0, x, labels, row) for row in range(min(4, len(x)))), default=0.0) <= 1 + SLACK


class TimeFirst(nn.Module):
    """Positions are summed up in an order that depends on how many rows there are; and nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.wide = nn.Linear(7, 1), nn.Linear(1, 2), nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 9, 8)
        first = self.layer(x[..., :7]).transpose(0, 1).contiguous()
        weighed = (x[..., 7].transpose(0, 1).contiguous().unsqueeze(2) * first).transpose(0, 1).contiguous().sum(1)
        return self.head(weighed) + self.wide(1e4 * x[:, :, :7].sum(1))  # type: ignore[no-any-return]


def test_sums_over_positions_of_a_model_that_has_time_first() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(10)
    clipped = BookkeepingGradients(TimeFirst(), Grid.of(1.0, 128))
    x = torch.zeros(100, 9, 8)
    x[..., 7] = torch.randn(100, 9, generator=generator) * 3e9
    x[:, -1, 7] = -x[:, :-1, 7].double().sum(1).float()
    x, y = x.flatten(1), torch.randint(0, 2, (100,), generator=generator)
    for rows in (16, 32, 64, 96):
        assert max(moved(clipped, 1.0, x[: rows + 1], y[: rows + 1], row) for row in range(2)) <= 1 + SLACK


class Largest(nn.Module):
    """In training it divides by the largest number of the batch: one row decides, and rehearsals do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x / x.abs().max()
        return self.head(torch.relu(self.body(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_follows_the_largest_of_its_rows_is_refused(engine: str) -> None:
    for rows in (64, None):
        with pytest.raises(InputError, match="would show in all"):
            clipping_engine(engine, Largest(), Grid.of(1.0, 64), ClippingOptions(microbatch_rows=rows)).ranges(
                torch.randn(9, 4), torch.zeros(9, dtype=torch.int64)
            )


class Mixes(torch.autograd.Function):
    """A backward pass in which rows have a part in others, and not by operations that can be watched."""

    @staticmethod
    def forward(_ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, *found: torch.Tensor) -> torch.Tensor:
        values = found[0].numpy()
        return torch.from_numpy(values + 0.5 * values.mean(0, keepdims=True))


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(Mixes.apply(self.first(x)))  # type: ignore[no-any-return]


class Drowned(Backwards):
    """The same, beside gradients that are longer by far."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e-6 * super().forward(x) + self.wide(x)  # type: ignore[no-any-return]


class Negative(nn.Module):
    """Beside others, numbers below zero come out otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        third = (torch.arange(len(x)) == 3).unsqueeze(1)
        return self.head(torch.where((x < 0) & third, x * (1 + 2e-7), x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", [Backwards, Drowned, Negative])
@pytest.mark.parametrize("silent", [False, True])
def test_a_device_is_tried_with_all_that_weights_and_rows_may_be(
    engine: str, model: type[nn.Module], silent: bool
) -> None:
    """Whatever the weights are at the start: with a last layer of zeros, nothing comes back."""
    built = model()
    if silent:
        nn.init.zeros_(built.head.weight)  # type: ignore[arg-type]
    before = {name: weight.clone() for name, weight in built.state_dict().items()}
    x, y = torch.rand(40, 8), torch.randint(0, 3, (40,))
    for bound in (0.1, 10.0):  # all rows are clipped, and none
        clipped = clipping_engine(engine, built, Grid.of(bound, 64))
        with pytest.raises(InputError, match="computes a row otherwise"):
            clipped.ranges(x, y)
        clipped.close()
    assert all(torch.equal(before[name], weight) for name, weight in built.state_dict().items())


class Centred(nn.Module):
    """Rows are apart but in training."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x - x.mean(0) if self.training else x)  # type: ignore[no-any-return]


class Rooted(Backwards):
    """A weight that does not train has to be positive."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(Mixes.apply(self.first(x)) * self.scale.sqrt())  # type: ignore[no-any-return]


class Infinite(nn.Module):
    """Of nothing but numbers that are none, nothing is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * math.inf  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_is_tried_as_it_trains(engine: str) -> None:
    x, y = torch.rand(40, 8), torch.randint(0, 3, (40,))
    for model, told in ((Centred, "otherwise"), (Rooted, "otherwise"), (Infinite, "are not finite")):
        clipped = clipping_engine(engine, model(), Grid.of(1.0, 64))
        with pytest.raises(InputError, match=told):
            clipped.ranges(x, y)


class Watchful(nn.Module):
    """Keeps count, keeps what follows from a weight that does not train, and refuses what it does not like."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.frozen = nn.Linear(8, 3), nn.Linear(8, 8)
        self.frozen.requires_grad_(requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x < 0).any()):
            raise ValueError("below 0")
        self.count += 1
        self.kept = self.frozen.weight.sum(0) if self.kept is None else self.kept
        dropped = functional.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, dropout_p=0.5 * self.training)
        return self.head(functional.dropout(dropped.squeeze(1), 0.5, self.training) + self.kept)  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_is_after_it_was_tried_as_it_was(engine: str) -> None:
    model = Watchful()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    clipping_engine(engine, model, Grid.of(1.0, 64)).ranges(torch.rand(40, 8), torch.randint(0, 3, (40,)))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert model.kept is not None
    assert torch.equal(model.kept, model.frozen.weight.sum(0))


def test_a_device_that_is_refused_leaves_the_model_without_hooks() -> None:
    plan = PrivacyPlan(
        epsilon=3.0, delta=1e-6, epsilon_certified=2.9, noise_multiplier=1.5, max_grad_norm=1.0, sample_rate=0.5,
        steps=10, rows=40,
    )  # fmt: skip
    for engine in ENGINES:
        model = Backwards()
        for _ in range(2):
            with pytest.raises(InputError, match="computes a row otherwise"):
                Mechanism(
                    plan, model, torch.rand(40, 8), torch.randint(0, 3, (40,)), shards=[("a", 40)], run="r", attempt=1,
                    rank=0, world_size=1, secret=bytes(32), engine=engine,
                )  # fmt: skip
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
        pickle.dumps(copy.deepcopy(model))


def test_passes_of_others_are_not_noted() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    clipped = BookkeepingGradients(model, Grid.of(1.0, 64))
    clipped(torch.rand(40, 8), torch.randint(0, 3, (40,)))
    with torch.no_grad():
        model(torch.rand(1000, 8))
    assert clipped._tape == []


@pytest.mark.parametrize("width", [5, 9])
def test_functions_that_compute_the_last_elements_otherwise(width: int) -> None:
    """A sigmoid between layers, whose vectors the rows of a microbatch have to fill up."""
    model = nn.Sequential(nn.Linear(8, width), nn.Sigmoid(), nn.Linear(width, 2))
    clipped = BookkeepingGradients(model, Grid.of(1.0, 64), ClippingOptions(microbatch_rows=16))
    clipped.ranges(torch.rand(40, 8), torch.randint(0, 2, (40,)))
    assert clipped._step * width % 32 == 0


def test_norms_of_many_parameters_do_not_depend_on_how_many_rows_there_are() -> None:
    """The order in which `torch.sum` adds up seven squares or more does."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    clipped = OpacusGradients(model, Grid.of(1.0, 64))
    x, y = torch.rand(256, 8), torch.randint(0, 8, (256,))
    squares = clipped._gradients(x, y)[1]
    assert all(torch.equal(clipped._gradients(x[:rows], y[:rows])[1], squares[:rows]) for rows in range(4, 256, 4))


class Gate(torch.autograd.Function):
    """Gives back what comes back to it where a function of other numbers is above a kink, and computes that then."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, model: Hiding, x: torch.Tensor) -> torch.Tensor:
        ctx.model = model
        ctx.save_for_backward(x)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *found: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return found[0] * (ctx.model.above(*ctx.saved_tensors) > 0), None, None


class Hiding(nn.Module):
    """A function of a part of the input, at whose last bit in one column a ReLU has its kink, or what comes back has.

    Rows of random numbers show nothing of it at the layers.
    """

    def __init__(self, function: Function, width: int, column: int = -1, *, back: bool = False) -> None:
        super().__init__()
        self.function, self.width, self.column, self.back = function, width, column % width, back
        self.spread, self.head = nn.Linear(1, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.spread.weight.fill_(1.0)
            self.spread.bias.zero_()
            self.head.weight.copy_(torch.tensor([[100.0], [-100.0]]).expand(2, 8))

    def above(self, x: torch.Tensor) -> torch.Tensor:
        found = self.function(x[:, : self.width].contiguous())
        return found[:, self.column : self.column + 1] - x[:, self.width :]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.back:
            return self.head(Gate.apply(self.spread(x[:, :1]), self, x))  # type: ignore[no-any-return]
        return self.head(torch.relu(self.spread(self.above(x))))  # type: ignore[no-any-return]

    def most_moved(self, clipped: ClippedGradients, sizes: Iterable[int]) -> float:
        """By one of the first rows of a batch of several sizes, all at the kink and of two classes in turn."""
        numbers = torch.randn(2**14, generator=torch.Generator().manual_seed(1))
        whole, last = self.function(numbers), self.function(torch.stack([numbers, numbers], 1)[:, 0])
        place = int((whole > last).nonzero()[0])
        row = torch.cat([numbers[place].expand(self.width), last[place : place + 1]])
        most = 0.0
        for rows in sizes:
            x, y, places = row.repeat(rows, 1), torch.arange(rows) % 2, np.arange(rows, dtype=np.uint64)
            together = summed(clipped, x, y, places)
            for gone in range(2):
                others = np.arange(rows) != gone
                apart = summed(clipped, x[others], y[others], places[others])
                most = max(most, float((together - apart).norm()))
        return most


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("function", "width"), [(torch.sigmoid, 9), (functional.silu, 9), (functional.silu, 12)])
def test_functions_whose_last_bits_layers_hide(engine: str, back: bool, function: Function, width: int) -> None:
    model = Hiding(function, width, back=back)
    clipped = clipping_engine(engine, model, Grid.of(1.0, 64), ClippingOptions(microbatch_rows=16))
    assert model.most_moved(clipped, range(5, 18)) <= 1 + SLACK


def test_a_function_is_tried_with_a_number_that_no_row_has() -> None:
    """Of single numbers 4 in 100 show a sigmoid's last elements: here none of them is in a row."""
    numbers = torch.randn(2**10, generator=torch.Generator().manual_seed(1))
    alike = torch.sigmoid(numbers) == torch.sigmoid(torch.stack([numbers, numbers], 1)[:, 0])
    x, watch = numbers[alike][: 32 * 9].view(32, 9), Watch()
    some = torch.arange(16).roll(3)
    for watched, rows in (
        (watch.learning(32), x), (watch.expecting(16), x[:16]), (watch.comparing(some), x[:16][some].contiguous()),
    ):  # fmt: skip
        assert watch.alike
        with watched:
            torch.sigmoid(rows)
    assert not watch.alike


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("engine", ENGINES)
def test_functions_whose_last_bits_are_where_a_thread_ends(engine: str) -> None:
    rows, width = 160, 500
    share = -(-rows * width // 3)
    model = Hiding(functional.silu, width, (share - 1) % width)
    clipped = clipping_engine(engine, model, Grid.of(1.0, rows), ClippingOptions(microbatch_rows=rows))
    assert model.most_moved(clipped, [rows]) <= 1 + SLACK


@pytest.mark.usefixtures("three_threads")
def test_a_microbatch_in_which_threads_end_within_vectors_is_smaller() -> None:
    model = nn.Sequential(nn.Linear(8, 500), nn.SiLU(), nn.Linear(500, 2))
    clipped = BookkeepingGradients(model, Grid.of(1.0, 256), ClippingOptions(microbatch_rows=256))
    x, y = torch.rand(300, 8), torch.randint(0, 2, (300,))
    assert 0 < moved(clipped, 1.0, x, y, 0) <= 1 + SLACK
    assert 8 <= clipped._rows < 256


class BatchSecond(nn.Module):
    """Positions come before rows, and both together in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2).requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(self.first(x.unflatten(1, (5, 8)))).transpose(0, 1)
        return self.head(self.attention(hidden, hidden, hidden)[0].mean(0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [4, 40])
def test_a_model_whose_rows_come_second_is_tried(engine: str, rows: int) -> None:
    clipped = clipping_engine(engine, BatchSecond(), Grid.of(1.0, 64), ClippingOptions(microbatch_rows=rows))
    x, y = torch.rand(50, 40), torch.randint(0, 2, (50,))
    assert 0 < moved(clipped, 1.0, x, y, 0) <= 1 + SLACK


class Columns(nn.Module):
    """Looks a column of numbers up."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(3, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x[:, 0].long().unsqueeze(1)).squeeze(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_takes_no_negative_numbers_is_tried_with_others(engine: str) -> None:
    x, y = torch.randint(0, 3, (40, 2)).float(), torch.randint(0, 2, (40,))
    clipped = clipping_engine(engine, Columns(), Grid.of(1.0, 40))
    assert 0 < moved(clipped, 1.0, x, y, 0) <= 1 + SLACK


class Antisymmetric(nn.Module):
    """Of a weight that is both embedding and head: what a row gives to one, it takes from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.words.weight
        square = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        self.register_buffer("between", (square - square.T) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.head(self.words(x) @ self.between)
        own = 1e6 * found.gather(2, x.unsqueeze(2)).sum(1)
        return torch.cat([own, torch.zeros_like(own)], 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("positions", [1, 5])
def test_a_tied_weight_whose_parts_cancel(engine: str, positions: int) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 8, (100, positions), generator=generator)
    y = torch.randint(0, 2, (100,), generator=generator)
    for bound in (1e-5, 1.0):
        clipped = clipping_engine(engine, Antisymmetric(), Grid.of(bound, 100))
        assert max(moved(clipped, bound, x, y, row) for row in range(6)) <= 1 + SLACK
        clipped.close()


def test_norms_of_positions_with_a_million_inputs() -> None:
    inputs = 2**20
    for first, second in itertools.product((0.1, 1 / 3, 0.7, 0.9, 1.3), repeat=2):
        a = torch.empty(1, 2, inputs)
        a[0, 0], a[0, 1] = first, second
        left = 0.63 * float(a[0, 0, 0] / a[0, 1, 0])
        g = torch.tensor([[[1.0] * 4, [-left] * 4]])
        found = Products(a, g, torch.Size([4, inputs])).squares()
        if float(found.value) < CANCELLED * float(found.scale):
            continue  # and is computed in float64
        true = sum(
            float(a[0, s, 0]) * float(a[0, t, 0]) * inputs * float(g[0, s].double() @ g[0, t].double())
            for s in range(2)
            for t in range(2)
        )
        assert math.sqrt(true / float(found.value)) <= 1 + NORMS / 4


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_cancel_on_their_way_back(engine: str) -> None:
    """A pass of other losses would round them otherwise."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 8))
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.fill_(3.0)
            model[2].weight[:] = torch.rand(4) * 10
            model[2].bias.copy_(torch.randn(8))
        clipped = clipping_engine(engine, model, Grid.of(0.01, 64))
        for size in (1e6, 1e10):
            x = torch.full((8, 4), size)
            for row in range(8):
                assert float(summed(clipped, x[row : row + 1], torch.tensor([row])).norm()) <= 0.01 * (1 + SLACK)


def test_a_row_that_is_not_finite_leaves_the_bits_of_others() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(128, 128), nn.Linear(128, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(x.view(-1, 64, 128)).sum(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    clipped = BookkeepingGradients(Positions(), Grid.of(1e-3, 256))
    x, y = torch.rand(57, 64 * 128), torch.randint(0, 3, (57,))
    x[56, 0] = math.nan
    places = np.append(np.arange(56), 60).astype(np.uint64)  # all in one microbatch, but the last in a block of its own
    assert torch.equal(summed(clipped, x, y, places), summed(clipped, x[:56], y[:56], places[:56]))


def test_a_compiled_model_in_which_rows_that_are_not_finite_spread_ends() -> None:
    class Spreads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bad = ~torch.isfinite(x.sum(1)) | (torch.arange(len(x)) == 1)
            return self.head(torch.where(bad.unsqueeze(1), math.nan, x))  # type: ignore[no-any-return]

    options = ClippingOptions(compiled=True, tried=False, microbatch_rows=8)
    clipped = BookkeepingGradients(Spreads(), Grid.of(1.0, 8), options)
    with pytest.raises(IntegrityError, match="spread to others"):
        clipped(torch.rand(8, 4), torch.zeros(8, dtype=torch.int64))
