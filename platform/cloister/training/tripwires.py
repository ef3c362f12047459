# ruff: noqa: N803 - the letters after a tensor's name are its shape
"""Tripwires: what must be so in the first steps of an attempt if DP-SGD is what runs, and in each if streams are alive.

Guarantees: whether one trips tells nothing of rows. `Tripwires` reads nothing but what is released anyway, the noisy
sum and the weights (post-processing costs no privacy). `NoiseWatch` reads noise alone: sums are whole units, so that
what noise adds to one is that noise, to the last bit. Batches are private: `probe_sampler` looks at others, which are
never used. A check that trips on a sound run does so with a probability below 1e-11.

    noise       each parameter's part of the noisy sum is no shorter than its noise alone would be
    clipping    the noisy sum is no longer than clipped gradients of that many rows, and their noise, can be
    movement    after the last checked step each parameter has moved
    streams     no noise equals the one before; before there are rows, not all batches are alike

Not promised: to notice noise that is a little too small. The audit does (`privacy.auditing`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from cloister.errors import IntegrityError
from cloister.privacy.grid import SLACK
from cloister.privacy.keystream import fresh_secret
from cloister.privacy.mechanism import sampler
from cloister.privacy.plan import PrivacyPlan

STEPS = 3
_HINT = "do not use this build; report it"
# P[chi-square of n < n·(1 - x)] <= exp(-n·x²/4) (Laurent and Massart, Annals of Statistics 28, lemma 1): 1e-12 here.
_LOWER_TAIL = math.sqrt(4 * 27.7)
_UPPER_TAIL = 8.0  # standard deviations
_NOISE_PROBE = 16  # values of a step's noise that are compared with the step before's
_MIN_BITS = 64  # of surprise, before equal batches count as a fault
_MOST_DRAWS = 1000  # where batches are nearly always empty, more of them would take too long


class Tripwires:
    """Watches the first `STEPS` steps of one attempt."""

    def __init__(self, model: nn.Module, plan: PrivacyPlan, noise_std: float) -> None:
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._before = [parameter.detach().clone() for _, parameter in self._named]
        self._std = noise_std
        rows = plan.largest_expected_batch
        most_rows = rows + _UPPER_TAIL * math.sqrt(rows) + _UPPER_TAIL**2
        size = sum(parameter.numel() for _, parameter in self._named)
        self._longest = most_rows * plan.max_grad_norm * (1 + SLACK) + noise_std * (math.sqrt(size) + _UPPER_TAIL)
        self._seen = 0

    def see_sum(self, sum_P: torch.Tensor) -> None:
        """The noisy sum over all ranks.

        Raises:
            IntegrityError: it is too short for its noise, or too long for clipped gradients; names the parameter.
        """
        if self._seen >= STEPS:
            return
        if not float(sum_P.norm()) <= self._longest:
            raise IntegrityError("the sum of gradients is longer than clipping allows", _HINT)
        offset = 0
        for name, parameter in self._named:
            count = parameter.numel()
            part, offset = sum_P[offset : offset + count], offset + count
            shortest = self._std**2 * count * (1 - _LOWER_TAIL / math.sqrt(count))
            if float(part.square().sum()) < shortest:
                raise IntegrityError(f"the noise of parameter '{name}' is missing", _HINT)

    def see_weights(self) -> None:
        """The model after the optimiser's step.

        Raises:
            IntegrityError: a parameter has not moved in `STEPS` steps; names it.
        """
        self._seen += 1
        if self._seen != STEPS:
            return
        for (name, parameter), before in zip(self._named, self._before, strict=True):
            if torch.equal(parameter.detach(), before):
                raise IntegrityError(
                    f"parameter '{name}' does not move", "give it to the optimiser, raise learning_rate, or freeze it"
                )
        self._before = []


class NoiseWatch:
    """Notices a noise stream that stands still."""

    def __init__(self) -> None:
        self._noise: torch.Tensor | None = None

    @contextlib.contextmanager
    def watching(self, sum_P: torch.Tensor) -> Iterator[None]:
        """Around what adds noise to `sum_P` in place.

        Raises:
            IntegrityError: it is the noise of the step before.
        """
        before = sum_P[:_NOISE_PROBE].clone()
        yield
        noise = sum_P[:_NOISE_PROBE] - before
        repeated = self._noise is not None and torch.allclose(noise, self._noise, rtol=1e-3, atol=0.0)
        if repeated and bool((noise != 0).any()):
            raise IntegrityError("two steps in a row have the same noise: the stream stands still", _HINT)
        self._noise = noise


def probe_sampler(plan: PrivacyPlan) -> None:
    """Draw batches as a run of this plan draws them, from a table of as many rows, under a secret that is thrown away.

    Raises:
        IntegrityError: all of them are the same.
    """
    secret = fresh_secret()
    draws = _draws_to_tell(plan.sample_rate, plan.rows)
    batches = sampler(plan, [("probe", plan.rows)], secret, run="probe", attempt=1)
    first = batches.next_batch()
    if draws and all(np.array_equal(first, batches.next_batch()) for _ in range(draws)):
        raise IntegrityError("all batches are the same: the sampler stands still", _HINT)


def _draws_to_tell(q: float, rows: int) -> int:
    """How many batches more, before it is a fault that all equal the first; 0 if that says nothing.

    P[k batches more equal the first] = Σ p(batch)^(k+1) <= (Σ p(batch)²)^((k+1)/2), as the norms of p fall.
    """
    bits = rows * -math.log2(q * q + (1 - q) * (1 - q)) if 0 < q < 1 else 0.0
    if bits * _MOST_DRAWS < 2 * _MIN_BITS:
        return 0
    return max(1, math.ceil(2 * _MIN_BITS / bits) - 1)
