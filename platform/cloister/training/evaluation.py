# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""How a model does on rows that were held out: an exact histogram, which never leaves the worker by itself.

Guarantees: which cell a row is in does not depend on the rows beside it, or one more would move several
(`cloister.privacy.rowwise`): the noise of `cloister.privacy.evaluation` reckons with one.

Shapes: N rows, D inputs, K labels, B bins of confidence.
"""

from __future__ import annotations

import torch
from torch import nn

from cloister.privacy.evaluation import Counts, Evaluation
from cloister.privacy.rowwise import RowWise

_ROWS_AT_ONCE = 64


class Evaluator:
    """What `model` says of each row. Made before training: this device is tried at once."""

    def __init__(self, model: nn.Module, like_ND: torch.Tensor) -> None:
        """Of `like_ND` only shape and type are read.

        Raises:
            InputError: this device computes a row otherwise beside others.
        """
        self._probabilities = RowWise(model, lambda x: torch.softmax(model(x), 1), like_ND, _ROWS_AT_ONCE)

    def __call__(self, evaluation: Evaluation, x_ND: torch.Tensor, y_N: torch.Tensor) -> Counts:
        """The exact histogram, [K, 2, B] int64: private."""
        confidence_N, said_N = self._probabilities(x_ND).max(dim=1)
        return evaluation.counted(y_N.numpy(), (said_N == y_N).numpy(), confidence_N.numpy())
