"""A row more changes one block, and the sum by no more than the noise is scaled for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from architectures import FAMILIES
from cloister.errors import InputError
from cloister.privacy import grid as grid_module
from cloister.privacy import products
from cloister.privacy.blocks import Blocks, Places, places_of, ranges_for, spread
from cloister.privacy.clipping import BookkeepingGradients, ClippingOptions
from cloister.privacy.engines import clipping_engine
from cloister.privacy.gradients import Products, Rows
from cloister.privacy.grid import MOST_ROWS, SLACK, Block, Grid
from cloister.privacy.microbatch import tried

torch.set_num_threads(1)
KEY = bytes(range(32))


def random_places(rows: int, seed: int = 0) -> Places:
    return np.random.default_rng(seed).integers(0, 2**64, rows, dtype=np.uint64)


def members(places: Places, ranges: int, rows: int) -> set[tuple[int, ...]]:
    blocks = Blocks(places, ranges)
    return {tuple(np.sort(places[blocks.order[a:b]]).tolist()) for a, b in blocks.of_at_most(rows)}


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("alike", [0, 40])
def test_a_row_more_changes_one_block_or_splits_it(rows: int, alike: int) -> None:
    """Also where so many of the places' bits are alike."""
    places = random_places(500) >> np.uint64(alike)
    for ranges in (1, 7, ranges_for(500, rows)):
        before = members(places, ranges, rows)
        assert sorted(p for block in before for p in block) == sorted(places.tolist())
        assert max(map(len, before)) <= rows
        for new in random_places(60, seed=1) >> np.uint64(alike):
            gone = before - (after := members(np.append(places, new), ranges, rows))
            come = after - before
            assert len(gone) <= 1
            assert len(come) <= 2
            assert sorted(p for block in come for p in block) == sorted([*(p for block in gone for p in block), new])


def test_small_blocks_lie_within_large_ones() -> None:
    blocks = Blocks(random_places(900), 3)
    for rows in (128, 300, 10_000):
        microbatches = blocks.microbatches(rows, 128)
        assert [block for each in microbatches for block in each] == blocks.of_at_most(128)
        for each in microbatches:
            start, stop = each[0][0], each[-1][1]
            assert stop - start <= rows
            for size in (8, 128):
                parts = [(start + part.start, start + part.stop) for part in blocks.within(each)(size)]
                assert parts == [block for block in blocks.of_at_most(size) if start <= block[0] < stop]
    assert len(blocks.microbatches(10_000, 128)) == 1


def test_equal_rows_fill_blocks_one_after_the_other() -> None:
    same = np.full(23, 5, np.uint64)
    assert Blocks(same, 4).of_at_most(8) == [(0, 8), (8, 16), (16, 23)]
    assert Blocks(np.zeros(0, np.uint64), 4).of_at_most(8) == []


def test_a_place_follows_from_the_row_alone() -> None:
    x, y = torch.randn(300, 7), torch.randint(0, 3, (300,))
    places = places_of(x, y, KEY)
    order = torch.randperm(300)
    assert np.array_equal(places_of(x[order], y[order], KEY), places[order.numpy()])
    assert len(np.unique(places)) == 300
    assert not np.array_equal(places_of(x, y, bytes(32)), places)
    changed = x.clone()
    changed[3, 6] = math.nextafter(float(x[3, 6]), 9.0)
    changed = torch.where(changed == x, torch.nextafter(x, x + 1), changed)
    assert not np.intersect1d(places_of(changed, y, KEY), places).size
    assert np.abs(np.bincount((places >> np.uint64(61)).astype(np.int64), minlength=8) - 37.5).max() < 25
    for kind in (torch.int64, torch.uint8, torch.float64, torch.bfloat16):
        assert len(np.unique(places_of((x * 1000).to(kind).abs(), y, KEY))) > 290
    signs = torch.randint(0, 2, (300, 40)).double() * 2 - 1  # which differ in their first bit alone
    assert len(np.unique(places_of(signs, y, KEY))) == 300


def test_blocks_are_filled_well_enough() -> None:
    filled = [len(Blocks(random_places(n, n), ranges_for(2048, 256)).of_at_most(256)) for n in (1950, 2048, 2150)]
    assert max(filled) <= 13, "of 2,048 rows, which fill eight"


def test_the_floor_of_a_block_keeps_its_rounding_within_the_slack() -> None:
    for positions in (1, 2, 3, 16, 49, 64, 197, 256, 1024, 5000, 10**5, 10**7):
        for block in (Block.of(positions), Block.of(positions, 1), Block.of(positions, 4)):
            n = block.rows * block.positions + -(-positions // block.positions)
            gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
            assert math.sqrt(2) * gamma * (2 * block.rows + 1) / block.floor <= grid_module.SUMS * (1 + 1e-12)
            most = 0.99 if positions == 1 else 0.6 / math.sqrt(positions)
            assert 0 < block.floor <= most or positions > 5000
    assert Block.of(1).rows == MOST_ROWS
    assert grid_module.NORMS + grid_module.SUMS + 1.5 * math.sqrt(1e10) * 2.0**-32 <= SLACK


def test_a_grid_holds_whatever_a_batch_comes_to() -> None:
    for bound in (1e-6, 0.3, 1.0, 1e6):
        for rows in (1, 1000, 1e9):
            grid = Grid.of(bound, rows, 2.0, 4)
            assert math.frexp(grid.unit)[0] == 0.5, "a power of two"
            assert (rows + 40 * math.sqrt(rows) + 80) * bound < 2**52 * grid.unit
            assert grid.unit <= bound * max(2.0**-31, (rows + 40 * math.sqrt(rows) + 2000) * 2.0**-51)
            assert grid.rows_a_rank == rows / 4
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm"):
            Grid.of(bound, 10)
    for bound in (1e-40, 9e-7, 2e6):
        with pytest.raises(InputError, match="out of range"):
            Grid.of(bound, 10)
    assert 1.5 * math.sqrt(1e9) * Grid.of(0.3, 1e6, parameters=10**9).unit <= 0.3 * 2**-12
    with pytest.raises(InputError, match="batches are too large for so many parameters"):
        Grid.of(1.0, 1e9, parameters=10**8)


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_sums_are_whole_units_and_the_same_in_whatever_order_rows_come(engine: str) -> None:
    case = FAMILIES["mlp"](torch.Generator().manual_seed(3), 700)
    grid = Grid.of(0.3, 700)
    clipped = clipping_engine(engine, case.model, grid)
    places, ranges = places_of(case.x, case.y, KEY), clipped.ranges(case.x, case.y)

    def summed(rows: torch.Tensor) -> torch.Tensor:
        blocks = Blocks(places[rows.numpy()], ranges)
        order = rows[torch.from_numpy(blocks.order)]
        return clipped(case.x[order], case.y[order], blocks)

    whole = summed(torch.arange(700))
    assert torch.equal(whole / grid.unit, (whole / grid.unit).round())
    for _ in range(3):
        assert torch.equal(summed(torch.randperm(700)), whole)
    one = summed(torch.arange(1, 700))
    assert 0.1 <= float((whole - one).norm()) / 0.3 <= 1 + SLACK


def adversarial(
    engine: str, rows: int, model: nn.Module, x: torch.Tensor, y: torch.Tensor, options: ClippingOptions | None = None
) -> Callable[[int], float]:
    """Returns: by how much the sum over all rows but one differs, in units of the bound, beyond that row's own part."""
    grid = Grid.of(1.0, rows)
    clipped = clipping_engine(engine, model, grid, options)
    places, ranges = places_of(x, y, KEY), clipped.ranges(x, y)

    def summed(chosen: np.ndarray) -> torch.Tensor:
        blocks = Blocks(places[chosen], ranges)
        order = torch.from_numpy(chosen[blocks.order])
        return clipped(x[order], y[order], blocks)

    everything = np.arange(rows)
    whole = summed(everything)

    def beyond(row: int) -> float:
        own = summed(np.array([row]))
        moved = whole - summed(np.delete(everything, row))
        assert float(moved.norm()) <= 1 + SLACK
        return float((moved - own).norm())

    return beyond


@pytest.mark.parametrize(
    ("engine", "rows", "options"),
    [
        ("bookkeeping", 102_400, None), ("opacus", 102_400, None),
        ("bookkeeping", 10_240, ClippingOptions(compiled=True)),
    ],
)  # fmt: skip
def test_one_row_of_many_thousands_moves_the_sum_by_its_own_part(
    engine: str, rows: int, options: ClippingOptions | None
) -> None:
    """All point the same way, each with another last bit, so that sums round as much as they can."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))
    x = (1 + torch.rand(rows, 24) * 1e-3) * torch.rand(1, 24) * 20
    with torch.no_grad():
        y = model(x).argmin(1)  # all wrong
    beyond = adversarial(engine, rows, model, x, y, options)
    worst = max(beyond(row) for row in (0, 1, 777, rows // 2, rows - 2, rows - 1))
    assert worst <= 2e-4, "where blocks by order would have changed all the blocks behind the row"


def test_a_compiled_microbatch_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sum is put on the grid as a whole."""
    x, y, seen = torch.randn(300, 4), torch.randint(0, 2, (300,)), []
    options = ClippingOptions(compiled=True, tried=False, microbatch_rows=32)
    clipped = BookkeepingGradients(nn.Linear(4, 2), Grid.of(1.0, 300), options)
    monkeypatch.setattr(clipped, "_add_compiled", lambda *given: seen.append(int(given[3].sum())))
    blocks = Blocks(random_places(300), clipped.ranges(x, y))
    clipped(x, y, blocks)
    assert seen == [stop - start for start, stop in blocks.of_at_most(32)]


def test_one_row_of_many_with_positions_moves_the_sum_by_its_own_part() -> None:
    case = FAMILIES["tokens"](torch.Generator().manual_seed(3), 3000)
    torch.manual_seed(0)
    beyond = adversarial("bookkeeping", 3000, case.model, case.x, case.y)
    assert max(beyond(row) for row in (0, 1500, 2999)) <= 1e-4


def test_blocks_of_several_positions_are_small_and_summed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[int] = []
    model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 64), nn.Flatten(), nn.Linear(64 * 16, 2))
    x, y = torch.randint(0, 9, (128, 16)), torch.randint(0, 2, (128,))
    clipped = BookkeepingGradients(model, Grid.of(1.0, 128), ClippingOptions(microbatch_rows=64))
    clipped.ranges(x, y)
    weighted_sum = Products.weighted_sum

    def seen(self: object, weights: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        summed.append(len(weights[rows]))
        return weighted_sum(self, weights, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Products, "weighted_sum", seen)
    clipped(x, y)
    assert Block.of(16).rows == 16
    assert sorted(summed)[-3:] != sorted(summed)[:3], "the last layer's blocks are whole microbatches"
    assert min(summed) <= 16 < max(summed)


@pytest.mark.parametrize("worth", [0.0, math.inf])
def test_a_block_has_one_sum_wherever_it_is_in_a_microbatch(worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either library, and whatever the rows around it are."""
    monkeypatch.setattr(products, "_WORTH", worth)
    generator = torch.Generator().manual_seed(0)
    for positions, inputs, outputs in itertools.product((1, 5, 16), (1, 3, 8, 64), (1, 2, 10, 64)):
        for rows in (1, 8, 43, 187):
            own = [torch.randn(rows, positions, each, generator=generator) for each in (inputs, outputs)]
            weights = torch.rand(rows, generator=generator)
            sums = []
            for first in (0, 1, 3, 13, 213):
                a, g = (torch.randn(400, positions, each, generator=generator) for each in (inputs, outputs))
                all_weights = torch.rand(400, generator=generator)
                here = slice(first, first + rows)
                a[here], g[here], all_weights[here] = *own, weights
                products_ = Products(a, g, torch.Size([outputs, inputs]))
                sums.append(torch.cat([
                    products_.weighted_sum(all_weights, here).flatten(),
                    Rows(g.flatten(1)).weighted_sum(all_weights, here),
                ]))  # fmt: skip
            assert all(torch.equal(each, sums[0]) for each in sums)


class Lopsided(nn.Module):
    """A row's output depends on how many rows are beside it, in its last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (1 + 2e-7 * (len(x) % 32 == 16))  # type: ignore[no-any-return]


class Placed(Lopsided):
    """Or on where it stands."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (1 + 2e-7 * (torch.arange(len(x)) == 3))[:, None]  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_device_that_computes_a_row_otherwise_beside_others_is_refused(engine: str) -> None:
    x, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    with pytest.raises(InputError, match="computes a row otherwise"):
        clipping_engine(engine, Placed(), Grid.of(1.0, 50)).ranges(x, y)
    if engine == "bookkeeping":
        lopsided = BookkeepingGradients(Lopsided(), Grid.of(1.0, 50), ClippingOptions(microbatch_rows=64))
        lopsided.ranges(x, y)
        assert lopsided._step == 32, "microbatches have such numbers of rows only at which all is alike"


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_models_with_dropout_are_tried_without_it_and_trained_with_it(engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    x, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    clipped = clipping_engine(engine, model, Grid.of(1.0, 50))
    clipped.ranges(x, y)
    assert all(layer.training for layer in model.modules())
    with tried(model), ThreadPoolExecutor(1) as another:  # what is off here is on there
        assert float(functional.dropout(torch.ones(99), 0.5).sum()) == 99.0
        assert float(another.submit(functional.dropout, torch.ones(99), 0.5).result().sum()) != 99.0
    assert not torch.equal(clipped(x, y), clipped(x, y)), "each time with masks of its own"


def test_rows_without_places_are_spread() -> None:
    assert len(spread(0)) == 0
    assert (np.diff(spread(1000)) > 0).all()
