# ruff: noqa: N803 - the letters after a tensor's name are its shape
"""What a plan is made of on one rank: the sampler, the clipping and the noise that its accountant reckons with.

Guarantees: who trains by a plan takes all three from here, so that the accountant and the loop cannot disagree. Each
shard is sampled under a key of its own, at the plan's rate: which ranks hold which shards, and how many there are,
changes nothing in what is sampled with which probability. Sums and noise are on the plan's grid (`grid`), and the noise
of all W ranks together is N(0, (σC)²), times 1 + SLACK for what rounding adds to the effect of a row.

A new attempt has a new number and a new secret. Not promised: bit-identical runs. That noise cannot be repeated is the
point.

Shapes: N rows on this rank, D inputs, B rows in a batch, P trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.blocks import Blocks, places_of
from cloister.privacy.clipping import ClippedGradients, ClippingOptions
from cloister.privacy.engines import clipping_engine
from cloister.privacy.grid import SLACK, Grid
from cloister.privacy.keystream import Keystream, derive_key
from cloister.privacy.noise import GaussianNoise
from cloister.privacy.plan import PrivacyPlan
from cloister.privacy.sampling import ShardedBatches


def grid_of(plan: PrivacyPlan, ranks: int, parameters: int) -> Grid:
    """The same on each rank. It has room for the batches of the largest table of the plan."""
    return Grid.of(plan.max_grad_norm, plan.largest_expected_batch, plan.noise_multiplier, ranks, parameters)


def noise_std(plan: PrivacyPlan) -> float:
    """Of the sum over all ranks."""
    return plan.noise_multiplier * plan.max_grad_norm * (1 + SLACK)


def sampler(
    plan: PrivacyPlan, shards: Sequence[tuple[str, int]], secret: bytes, *, run: str, attempt: int
) -> ShardedBatches:
    """The batches of an attempt, of shards of these names and numbers of rows."""

    def key(shard: str) -> bytes:
        return derive_key(secret, purpose=f"sampling/{shard}", run=run, attempt=attempt, rank=0)

    return ShardedBatches(shards, plan.sample_rate, key)


class TriedEngine:
    """The engine of a `Mechanism` that is yet to come, tried on this device: before there are rows to train on."""

    def __init__(
        self, plan: PrivacyPlan, model: nn.Module, x_ND: torch.Tensor, y_N: torch.Tensor, *, world_size: int,
        engine: str = "bookkeeping", options: ClippingOptions | None = None,
    ) -> None:  # fmt: skip
        """Of x_ND and y_N, shapes and types alone are read.

        Raises:
            InputError: a layer that cannot be trained privately, or a device that computes a row otherwise when others
                are beside it. Nothing is left on the model.
        """
        self._model, self._grid = model, _grid_for(plan, world_size, model)
        self._clipped = clipping_engine(engine, model, self._grid, options)
        try:
            self.ranges(x_ND, y_N)
        except BaseException:
            self.close()
            raise

    def require(self, model: nn.Module, grid: Grid) -> None:
        """See that it is for this model, and clips to what noise is made for.

        Raises:
            InputError: it is for another.
        """
        if model is not self._model or grid != self._grid:
            raise InputError("the engine was tried for another model or plan", "try one for this plan")

    def ranges(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> int:
        return self._clipped.ranges(x_ND, y_N)

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        return self._clipped(x_BD, y_B, blocks)

    def close(self) -> None:
        self._clipped.close()


def _grid_for(plan: PrivacyPlan, ranks: int, model: nn.Module) -> Grid:
    return grid_of(plan, ranks, sum(p.numel() for p in model.parameters() if p.requires_grad))


class Mechanism:
    """Of one rank in one attempt, over its rows."""

    def __init__(
        self, plan: PrivacyPlan, model: nn.Module, x_ND: torch.Tensor, y_N: torch.Tensor, *,
        shards: Sequence[tuple[str, int]], run: str, attempt: int, rank: int, world_size: int, secret: bytes,
        engine: str = "bookkeeping", options: ClippingOptions | None = None,
        clipped_gradients: ClippedGradients | None = None,
    ) -> None:  # fmt: skip
        """`shards` are the names and numbers of rows of the shards that x_ND consists of, in its order.
        `clipped_gradients` is an engine around the model, such as a `TriedEngine`, in place of one that is made and
        tried here; `close` closes it.

        Raises:
            InputError: two shards of one name, other numbers of rows, an engine that was tried for others, a layer that
                cannot be trained privately, or a device that computes a row otherwise when others are beside it.
        """
        self._grid = _grid_for(plan, world_size, model)
        self._rank_std = noise_std(plan) / math.sqrt(world_size)

        def key(purpose: str) -> bytes:
            return derive_key(secret, purpose=purpose, run=run, attempt=attempt, rank=0)

        self._batches = sampler(plan, shards, secret, run=run, attempt=attempt)
        if self._batches.rows != len(x_ND):
            raise InputError(
                "the shards have other numbers of rows than there are", "name each shard of x_ND, in order"
            )
        self._noise = GaussianNoise(secret, run=run, attempt=attempt, rank=rank)
        self._x_ND, self._y_N = x_ND, y_N
        self._places_N = places_of(x_ND, y_N, key("places"))
        self._seeds = Keystream(key("layers"))
        if isinstance(clipped_gradients, TriedEngine):
            clipped_gradients.require(model, self._grid)
        self._clipped = clipped_gradients or clipping_engine(engine, model, self._grid, options)
        try:
            self._ranges = self._clipped.ranges(x_ND, y_N)
        except BaseException:
            self._clipped.close()
            raise

    def sample(self) -> npt.NDArray[np.int64]:
        """The row numbers of the next batch, ascending; possibly none."""
        return self._batches.next_batch()

    def clipped_sum(self, rows_B: npt.NDArray[np.int64]) -> torch.Tensor:
        """The sum of their clipped gradients: [P], float64, whole units of the grid."""
        blocks = Blocks(self._places_N[rows_B], self._ranges)
        rows = torch.from_numpy(rows_B[blocks.order]).to(self._x_ND.device)
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            # Dropout draws from a secret of the attempt, not from a seed that somebody may know.
            torch.manual_seed(int(self._seeds.words(1)[0]))
            return self._clipped(self._x_ND[rows], self._y_N[rows], blocks)

    def add_noise(self, step: int, sum_P: torch.Tensor) -> None:
        """This rank's part of the noise, in place, in whole units.

        Raises:
            IntegrityError: this step, or a later one, has drawn already.
        """
        self._noise.add_to(step, sum_P, self._rank_std, self._grid.unit)

    def close(self) -> None:
        """Take the engine off the model."""
        self._clipped.close()
