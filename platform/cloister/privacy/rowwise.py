# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""What a model gives of each row, to the same bits whatever rows are beside it.

As in training (`microbatch`), a row's own result could otherwise change with the rows before it: where a histogram's
cell or a feature hangs on a last bit, one row more would then move several.

Shapes: N rows, D inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from cloister.privacy.microbatch import align_rows, filled, fitting, public_rows, rounded_up, tried


class RowWise:
    """`function` of `model`, [N, D] to [N, ...], without gradients and dropout; tried on this device at once."""

    def __init__(
        self, model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], like_ND: torch.Tensor, rows: int
    ) -> None:
        """Of `like_ND` only shape and type are read; at most `rows` are computed at once.

        Raises:
            InputError: this device computes a row otherwise beside others.
        """
        self._model, self._function = model, function
        labels_N = torch.zeros(1, dtype=torch.int64, device=like_ND.device)
        with tried(model), self._ready():
            self._rows, self._step = fitting(
                lambda x, _: [function(x)], lambda count: public_rows(model, like_ND, labels_N, count), rows,
                passed=lambda x, _: function(x),
            )  # fmt: skip

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, ...]: one microbatch after the other."""
        with self._ready():
            found = [self._of(x_ND[start : start + self._rows]) for start in range(0, len(x_ND), self._rows)]
            if not found:
                return self._of(torch.zeros((1, *x_ND.shape[1:]), dtype=x_ND.dtype, device=x_ND.device))[:0]
            return torch.cat(found)

    def _of(self, x_BD: torch.Tensor) -> torch.Tensor:
        x, _, _ = filled(x_BD, x_BD, rounded_up(len(x_BD), self._step))
        return self._function(x)[: len(x_BD)]

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """Within the block the model has aligned rows, no dropout and no gradients."""
        training = [(layer, layer.training) for layer in self._model.modules()]
        hooks = align_rows(self._model)
        self._model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, was in training:
                layer.training = was
