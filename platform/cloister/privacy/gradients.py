# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""The gradients of one parameter for each row of a batch, in whatever form is cheapest.

Guarantees: a description knows two things of itself: the squared norm for each row, in float32 or float64 whatever the
precision of what it is made of, and the sum over rows under weights that are given later.

    Products    Σ_t g_t ⊗ a_t: the weight of a linear layer. Norms from T × T Gram matrices (Goodfellow, arXiv
                1510.01799; Li et al., arXiv 2110.05679) or from the gradients themselves, whichever multiplies less
    Lookups     Σ_t g_t at row id_t: an embedding. Norms from what each id gets, added up
    Rows        the gradients themselves: biases, normalisation, convolution
    Tied        the sum of several of these

Norms over several positions cancel where the positions do, and what is left of them may be rounding alone. So each
comes with its scale, what it would be if nothing cancelled. Below `CANCELLED` of it the norm is computed again, in
float64 (`in_double`). And it counts for at least a part of what its positions come to by themselves, Σ_t |g_t|·|a_t|:
a row that cancels more than that is clipped more than it need be, since sums are rounded by the parts (`grid`). Long
norms are summed up in short pieces.

Not promised: norms over several positions of inputs below 1e-19, whose squares vanish in float32, under gradients
beyond 1e13.

Shapes: B rows, T positions of one row, D inputs, P outputs, V words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from cloister.privacy.grid import MOST_ROWS, Block, Grid
from cloister.privacy.products import product

ALL = slice(None)
Slices = Callable[[int], list[slice]]
"""Of the rows of a microbatch, those that are summed up together, where at most so many are."""
# Of float32 products of vectors of thousands of elements, 1e-5 of the scale are rounding: 1e-4 of such a norm.
CANCELLED = 0.05
# The least floor where the sum's weights are good for 16 bits (`_exact_product`).
_HALVES_FLOOR = 0.077
# Elements of one product of vectors at once: beyond, sums in float32 lose more than `CANCELLED` allows for.
_PRODUCT_PIECE = 4096
# Single positions are filled up to a multiple: libraries prepare for each size, which takes memory.
_ROWS_OF_A_PRODUCT = 32
# Positions from which two products of half the size take less than one.
_WORTH_HALVING = 32
# Elements that are summed up at once: float32 sums of a million are off by a percent.
_PIECE = 1024
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Squares(NamedTuple):
    """Squared norms for each row, their scales, and what each counts for at least: [B] each."""

    value: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor | None = None


class RowGradients(Protocol):
    """The gradients of one parameter for each row of a batch."""

    def squares(self) -> Squares:
        """The squared norms."""

    def in_double(self, rows: torch.Tensor) -> RowGradients:
        """The same of some rows, to compute with in float64. `rows`: which, [B] bool."""

    def rows_at_once(self) -> int:
        """How many rows a block has at most, for the floor that its norms have."""

    def in_blocks_of(self, rows: int) -> None:
        """Let blocks of several positions have no more than so many rows: before norms are asked for."""

    def weighted_sum(self, weights_B: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        """The sum over these rows, each times its weight, float32, in the shape of the parameter, and not kept."""

    def add_weighted(self, weights_B: torch.Tensor, total: torch.Tensor, grid: Grid, blocks: Slices) -> None:
        """Add all rows, each times its weight, to a float64 total: exactly, once their blocks are on the grid."""

    def instantiate(self) -> torch.Tensor:
        """The gradients themselves, [B, *parameter]."""

    def made_of(self) -> list[torch.Tensor]:
        """What norms and sums are computed from, once norms have been asked for: [B, ...] each."""


class _InBlocks:
    """`add_weighted` of what is summed up block by block."""

    def rows_at_once(self) -> int:
        return MOST_ROWS

    def in_blocks_of(self, rows: int) -> None:
        """Of single positions: no matter."""

    def weighted_sum(self, weights_B: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        raise NotImplementedError

    def add_weighted(self, weights_B: torch.Tensor, total: torch.Tensor, grid: Grid, blocks: Slices) -> None:
        for rows in blocks(self.rows_at_once()):
            grid.add(total, self.weighted_sum(weights_B, rows))


class Rows(_InBlocks):
    """Gradients that are small, or that are needed anyway."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._norms_B: torch.Tensor | None = None

    def norms(self) -> torch.Tensor:
        if self._norms_B is None:
            self._norms_B = _norms(self._flat())
        return self._norms_B

    def squares(self) -> Squares:
        squares_B = self.norms().square()
        return Squares(squares_B, squares_B)

    def in_double(self, rows: torch.Tensor) -> Rows:
        return Rows(self._rows[rows].double())

    def weighted_sum(self, weights_B: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        return (weights_B[rows] @ self._flat()[rows]).reshape(self._rows.shape[1:])

    def instantiate(self) -> torch.Tensor:
        return self._rows

    def _flat(self) -> torch.Tensor:
        """[B, elements]: one of a parameter that is a number."""
        return self._rows.flatten(1) if self._rows.dim() > 1 else self._rows.unsqueeze(1)

    def made_of(self) -> list[torch.Tensor]:
        return [self._rows]


class Products(_InBlocks):
    """Σ_t g_t ⊗ a_t of the rows of a_BTD and g_BTP, for a parameter of P × D elements in the shape `shape`."""

    def __init__(
        self, a_BTD: torch.Tensor, g_BTP: torch.Tensor, shape: torch.Size, g_rows: Rows | None = None
    ) -> None:  # fmt: skip
        """`g_rows` are g of a single position, where their squares are needed elsewhere too."""
        self.a_BTD, self.g_BTP = a_BTD, g_BTP
        self._shape, self._g_rows = shape, g_rows or Rows(g_BTP)
        self._block = Block.of(a_BTD.shape[1])
        inputs, outputs = a_BTD.shape[2], g_BTP.shape[2]
        self._instantiated = a_BTD.shape[1] > 1 and a_BTD.shape[1] * (inputs + outputs) > inputs * outputs
        self._kept: Rows | None = None

    def rows_at_once(self) -> int:
        return MOST_ROWS if self._instantiated else self._block.rows

    def in_blocks_of(self, rows: int) -> None:
        if self._block.positions > 1:
            self._block = Block.of(self.a_BTD.shape[1], rows)

    def squares(self) -> Squares:
        if self.a_BTD.shape[1] == 1:  # norms first: a square alone may be too small for float32
            squares_B = (_norms(self.a_BTD.flatten(1)) * self._g_rows.norms()).square()
            return Squares(squares_B, squares_B)
        if self._instantiated:
            self._kept = Rows(self.instantiate())  # the weighted sum comes from the same numbers, and is cheap then
            return self._kept.squares()
        found = _squares_of_products(self.a_BTD, self.g_BTP)
        floor = max(self._block.floor, _HALVES_FLOOR) if _in_halves(self.a_BTD) else self._block.floor
        apart_B = (_norms_of_positions(self.a_BTD) * _norms_of_positions(self.g_BTP)).sum(1)
        return Squares(found.value, found.scale, (floor * apart_B).square())

    def in_double(self, rows: torch.Tensor) -> Products:
        return Products(self.a_BTD[rows].double(), self.g_BTP[rows].double(), self._shape)

    def weighted_sum(self, weights_B: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        if self._kept is not None:
            return self._kept.weighted_sum(weights_B, rows)
        weights = weights_B[rows, None, None]
        missing = 0 if rows == ALL or self.a_BTD.shape[1] > 1 else -len(weights) % _ROWS_OF_A_PRODUCT
        a, g = (_filled_up(each, rows, missing) for each in (self.a_BTD, self.g_BTP))
        weights = functional.pad(weights, (0, 0, 0, 0, 0, missing))
        # The smaller one in float32, times its row's weight; then g as [P, N] and a as [N, D], with N = B·T.
        a, g = (a.float() * weights, g) if a.shape[2] < g.shape[2] else (a, g.float() * weights)
        step = self._block.positions
        parts = [
            _exact_product(g[:, first : first + step].flatten(0, 1).mT, a[:, first : first + step].flatten(0, 1))
            for first in range(0, a.shape[1], step)
        ]
        return functools.reduce(torch.Tensor.add_, parts).reshape(self._shape)

    def instantiate(self) -> torch.Tensor:
        outputs, inputs = self.g_BTP.shape[2], self.a_BTD.shape[2]
        whole = _product(_aligned(self.g_BTP).mT, _aligned(self.a_BTD))
        return whole[:, :outputs, :inputs].reshape(-1, *self._shape)

    def made_of(self) -> list[torch.Tensor]:
        return [self.a_BTD, self.g_BTP] if self._kept is None else self._kept.made_of()


class Lookups:
    """g_BTD, each added to the row id_BT of a parameter [V, D]."""

    def __init__(self, id_BT: torch.Tensor, g_BTD: torch.Tensor, words: int) -> None:
        self.id_BT, self.g_BTD = id_BT, g_BTD
        self._words = words
        self._added_BTD: torch.Tensor | None = None

    def squares(self) -> Squares:
        squares_B = _norms(self.added().flatten(1)).square()
        return Squares(squares_B, squares_B)

    def added(self) -> torch.Tensor:
        """[B, T, D]: what each id gets in a row, at the first position that has it; zeros elsewhere.

        Norms and sums are both made of these numbers: where they cancel, rounding is part of the gradient.
        """
        if self._added_BTD is None:
            rows, positions = self.id_BT.shape
            first_BT = (self.id_BT.unsqueeze(2) == self.id_BT.unsqueeze(1)).to(torch.uint8).argmax(2)
            place_BT = first_BT + positions * torch.arange(rows, device=first_BT.device).unsqueeze(1)
            g_ND = _at_least_single(self.g_BTD).flatten(0, 1)
            added_ND = g_ND.new_zeros(g_ND.shape).index_add_(0, place_BT.flatten(), g_ND)
            self._added_BTD = added_ND.view(rows, positions, -1)
        return self._added_BTD

    def in_double(self, rows: torch.Tensor) -> Lookups:
        found = Lookups(self.id_BT[rows], self.g_BTD[rows], self._words)
        found._added_BTD = self.added()[rows].double()
        return found

    def rows_at_once(self) -> int:
        return MOST_ROWS

    def in_blocks_of(self, rows: int) -> None:
        """Each row is put on the grid by itself."""

    def weighted_sum(self, weights_B: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        sum_VD = weights_B.new_zeros((self._words, self.g_BTD.shape[2]))
        weighted_BTD = self.added()[rows] * weights_B[rows, None, None]
        return sum_VD.index_add_(0, self.id_BT[rows].flatten(), weighted_BTD.flatten(0, 1))

    def add_weighted(self, weights_B: torch.Tensor, total: torch.Tensor, grid: Grid, blocks: Slices) -> None:  # noqa: ARG002
        # One number for each id of a row, as for its norm; most of the words have none.
        weighted_BTD = grid.round(self.added() * weights_B[:, None, None])
        total.index_add_(0, self.id_BT.flatten(), weighted_BTD.double().flatten(0, 1), alpha=grid.unit)

    def instantiate(self) -> torch.Tensor:
        rows, inputs = self.g_BTD.shape[0], self.g_BTD.shape[2]
        added_BTD = self.added()
        rows_BVD = added_BTD.new_zeros((rows, self._words, inputs))
        return rows_BVD.scatter_add(1, self.id_BT.unsqueeze(2).expand_as(added_BTD), added_BTD)

    def made_of(self) -> list[torch.Tensor]:
        return [self.added()]


class Tied:
    """The sum of several gradients of one parameter: a layer called twice, or a weight that two layers share."""

    def __init__(self, parts: list[RowGradients]) -> None:
        self._parts = parts
        self._kept: Rows | None = None

    def squares(self) -> Squares:
        if len(self._parts) == 2:
            for lookups, products in (self._parts, self._parts[::-1]):
                if isinstance(lookups, Lookups) and isinstance(products, Products):
                    one, other = lookups.squares(), products.squares()
                    both_B = one.value + other.value + 2 * _inner(lookups, products)
                    # The products are summed apart from the lookups, under weights that follow from both.
                    least_B = other.least if other.least is not None else other.value * Block.of(1).floor ** 2
                    return Squares(both_B, one.scale + other.scale, least_B)
        self._kept = Rows(self.instantiate())
        return self._kept.squares()

    def in_double(self, rows: torch.Tensor) -> Tied:
        return Tied([part.in_double(rows) for part in self._parts])

    def rows_at_once(self) -> int:
        return min(part.rows_at_once() for part in self._parts)

    def in_blocks_of(self, rows: int) -> None:
        for part in self._parts:
            part.in_blocks_of(rows)

    def weighted_sum(self, weights_B: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        if self._kept is not None:
            return self._kept.weighted_sum(weights_B, rows)
        return added_up(part.weighted_sum(weights_B, rows) for part in self._parts)

    def add_weighted(self, weights_B: torch.Tensor, total: torch.Tensor, grid: Grid, blocks: Slices) -> None:
        for part in [self._kept] if self._kept is not None else self._parts:
            part.add_weighted(weights_B, total, grid, blocks)

    def instantiate(self) -> torch.Tensor:
        return added_up(part.instantiate() for part in self._parts)

    def made_of(self) -> list[torch.Tensor]:
        parts: Sequence[RowGradients] = self._parts if self._kept is None else [self._kept]
        return [each for part in parts for each in part.made_of()]


def added_up(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Their sum, one after the other: `torch.sum` adds up in an order that depends on how many rows there are."""
    return functools.reduce(torch.add, parts)


def _norms(x_BP: torch.Tensor) -> torch.Tensor:
    """[B], in float32, or in float64 for float64. What squares too small for that may come to is added."""
    x_BP = _at_least_single(x_BP)
    whole = x_BP.shape[1] // _PIECE * _PIECE
    norms_B: torch.Tensor = torch.linalg.vector_norm(x_BP[:, whole:], dim=1)
    if whole:
        pieces_BN = torch.linalg.vector_norm(x_BP[:, :whole].reshape(len(x_BP), -1, _PIECE), dim=2)
        norms_B = (norms_B.square() + pieces_BN.square().sum(1)).sqrt()
    return norms_B + math.sqrt(x_BP.shape[1] * torch.finfo(x_BP.dtype).tiny)


def _norms_of_positions(x_BTP: torch.Tensor) -> torch.Tensor:
    """[B, T]."""
    return _norms(x_BTP.flatten(0, 1)).view(x_BTP.shape[:2])


def _at_least_single(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _squares_of_products(a_BTD: torch.Tensor, g_BTP: torch.Tensor) -> Squares:
    """Σ_s,t <a_s, a_t> · <g_s, g_t>. It is symmetric: the first half of the positions with the second counts twice, and
    each half is the same again."""
    rows, positions = a_BTD.shape[:2]
    plain = a_BTD.is_cuda or not (a_BTD.is_contiguous() and g_BTP.is_contiguous())
    if plain or positions % 2 or positions < _WORTH_HALVING:
        return _of_gram(products_of_rows(a_BTD, a_BTD) * products_of_rows(g_BTP, g_BTP))
    half = positions // 2
    across_BTT = products_of_rows(a_BTD[:, :half], a_BTD[:, half:]) * products_of_rows(g_BTP[:, :half], g_BTP[:, half:])
    within = _squares_of_products(a_BTD.view(2 * rows, half, -1), g_BTP.view(2 * rows, half, -1))
    across, (value_B, scale_B) = _of_gram(across_BTT), (each.view(rows, 2).sum(1) for each in within[:2])
    return Squares(value_B + 2 * across.value, scale_B + 2 * across.scale)


def _of_gram(products_BTT: torch.Tensor) -> Squares:
    return Squares(products_BTT.sum((1, 2)), torch.linalg.vector_norm(products_BTT, ord=1, dim=(1, 2)))


def _inner(lookups: Lookups, products: Products) -> torch.Tensor:
    """Of both gradients of a [V, D] weight the inner product, a row: Σ_s,t products.g_t[id_s] · <a_t, added_s>."""
    id_BTS = lookups.id_BT.unsqueeze(1).expand(-1, products.g_BTP.shape[1], -1)
    picked_BTS = _at_least_single(products.g_BTP).gather(2, id_BTS)
    return (picked_BTS * products_of_rows(products.a_BTD, lookups.added())).sum((1, 2))


def products_of_rows(a_BSD: torch.Tensor, b_BTD: torch.Tensor) -> torch.Tensor:
    """[B, S, T]: of each of a's with each of b's."""
    pieces = (torch.split(_aligned(each), _PRODUCT_PIECE, dim=2) for each in (a_BSD, b_BTD))
    return functools.reduce(torch.Tensor.add_, (_product(a, b.mT) for a, b in zip(*pieces, strict=True)))


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """With zeros up to a multiple of 16 bytes: MKL rounds by where a matrix begins, so others would matter."""
    if t.is_cuda or not (t.shape[-1] % 4 or any(places % 4 for places in t.stride() if places != 1)):
        return t
    return functional.pad(t.contiguous(), (0, -t.shape[-1] % 4))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of batches of matrices, in float32 or float64: half precision would round norms down by a third."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in _LOW_PRECISION and a.dim() == 3:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return _at_least_single(a) @ _at_least_single(b)


def _filled_up(t: torch.Tensor, rows: slice, missing: int) -> torch.Tensor:
    """These rows, and so many more that have no weight: the next ones, or zeros."""
    if not missing:
        return t[rows]
    if rows.stop + missing <= len(t):
        return t[rows.start : rows.stop + missing]
    return functional.pad(t[rows], (0, 0, 0, 0, 0, missing))


def _in_halves(a: torch.Tensor) -> bool:
    return a.is_cuda and a.dtype in _LOW_PRECISION


def _exact_product(g_PN: torch.Tensor, a_ND: torch.Tensor) -> torch.Tensor:
    """g_PN @ a_ND in float32: the one that is weighted is float32, and not rounded to the precision of the other.

    Rounded, a row's part in the sum would be longer than its norm says. Split into a high and a low half it is exact to
    16 bits in bfloat16, and both halves run on tensor cores.
    """
    if _in_halves(g_PN) or _in_halves(a_ND):
        (g_high, g_low), (a_high, a_low) = _halves(g_PN, a_ND.dtype), _halves(a_ND, g_PN.dtype)
        return torch.mm(g_high, a_high, out_dtype=torch.float32) + torch.mm(g_low, a_low, out_dtype=torch.float32)
    return product(_at_least_single(g_PN), _at_least_single(a_ND))


def _halves(t: torch.Tensor, low_precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix as two of low precision whose sum it is; one of low precision, which goes with both, twice."""
    if t.dtype in _LOW_PRECISION:
        return t, t
    high = t.to(low_precision)
    return high, (t - high.float()).to(low_precision)
