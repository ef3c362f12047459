# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""The second clipping engine, `engine: opacus`: gradients of single rows by Opacus. The first is tested against it.

Guarantees: the contract of `clipping`. Opacus makes the gradient of each row (`GradSampleModule`); norms and sums are
made of those numbers, so that no rounding comes between them. That takes memory for each row as for the model, and for
wide layers a hundred times as long as book-keeping. What Opacus leaves on parameters is private, and taken off after
each microbatch.

Not Opacus's ghost clipping: its norms of several positions come from float32 Gram matrices whose rounding lets a row
through with 300 times its bound where positions cancel (measured with 1.6.0), and its sum comes from a second backward
pass, which rounds otherwise than the first: a row whose gradients cancel on the way has had 3 times its bound.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.blocks import Blocks, ranges_for, spread
from cloister.privacy.clipping import ROUNDING_MARGIN, ClippingOptions, check_layers, engage, release, row_losses
from cloister.privacy.gradients import Rows, added_up
from cloister.privacy.grid import MOST_ROWS, Grid
from cloister.privacy.layers import trains
from cloister.privacy.microbatch import (
    Kind,
    align_rows,
    filled,
    fitting,
    kind_of,
    public_rows,
    require_kind,
    rounded_up,
    tried,
)
from cloister.privacy.products import require_whole_products

# What the gradients of one microbatch may take.
_GRADIENT_BYTES = 64e6
_FEWEST_ROWS = 4
# What torch says in every step where hooks see no gradient of the input: of the first layer there is none.
_NO_INPUT_GRADIENT = "Full backward hook is firing"
_SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class OpacusGradients:
    """Opacus around a classifier under cross-entropy. Memory is bounded by `options.microbatch_rows`."""

    def __init__(self, model: nn.Module, grid: Grid, options: ClippingOptions | None = None) -> None:
        """Put Opacus's hooks on the model, until `close`.

        Raises:
            InputError: a layer or an option that this engine does not have, or a model that has an engine.
        """
        options = options or ClippingOptions()
        if options.per_layer or options.compiled or options.autocast:
            raise InputError("Opacus's engine clips flat, in float32, and is not compiled", "use engine: bookkeeping")
        require_whole_products()
        check_layers(model, supported=_is_supported)
        from opacus import GradSampleModule  # only here: accounting and planning must not pay for it

        self._by_row = GradSampleModule(model, loss_reduction="sum")
        self._model, self._grid = model, grid
        self._bound = grid.bound * (1.0 - ROUNDING_MARGIN)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        fit = max(_FEWEST_ROWS, int(_GRADIENT_BYTES / (4 * sum(self._sizes))))
        self._rows = min(options.microbatch_rows or fit, MOST_ROWS)
        self._step = 0
        self._kind: Kind | None = None  # of rows that were tried
        self._hooks = align_rows(model)
        engage(model)
        self._closed = False

    def ranges(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> int:
        if self._kind is None:
            with tried(self._model):
                for name, layer in self._model.named_modules():
                    if trains(layer) and not layer.training:  # Opacus's hooks pass it over
                        raise InputError(f"layer '{name}' is kept out of training mode", "use engine: bookkeeping")
                self._rows, self._step = fitting(
                    self._gradients, lambda rows: self._public(x_ND, y_N, rows), self._rows, passed=self._passed_alone
                )
            self._kind = kind_of(x_ND, y_N)
        require_kind(self._kind, x_ND, y_N)
        return ranges_for(self._grid.rows_a_rank, self._rows)

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        total_P = torch.zeros(sum(self._sizes), dtype=torch.float64, device=x_BD.device)
        if not len(x_BD):
            return total_P
        ranges = self.ranges(x_BD, y_B)
        blocks = blocks or Blocks(spread(len(x_BD)), ranges)
        for start, stop in blocks.of_at_most(self._rows):
            whole = rounded_up(stop - start, self._step)
            self._add(total_P, *filled(x_BD[start:stop], y_B[start:stop], whole))
        return total_P

    def close(self) -> None:
        """Take the engine off the model: its hooks, and what Opacus leaves on layers and parameters."""
        if self._closed:  # there may be another engine by now
            return
        self._closed = True
        release(self._model)
        for hook in self._hooks:
            hook.remove()
        self._by_row.cleanup()
        for parameter in self._parameters:
            parameter.grad = None
        for layer in self._model.modules():
            for name in ("activations", "max_batch_len"):
                vars(layer).pop(name, None)

    def _add(self, total_P: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor) -> None:
        losses_B, squares_B, *gradients = self._gradients(x, y)
        norms_B = squares_B.sqrt()
        finite_B = torch.isfinite(losses_B) & torch.isfinite(norms_B)
        weights_B = mask_B * finite_B * (self._bound / norms_B.clamp_min(self._bound))
        if not bool(finite_B.all()):  # zero times infinity is no zero
            weights_B = torch.where(finite_B, weights_B, 0.0)
            gradients = [torch.where(finite_B[:, None], rows, 0.0) for rows in gradients]
        for part, rows in zip(torch.split(total_P, self._sizes), gradients, strict=True):
            self._grid.add(part, Rows(rows).weighted_sum(weights_B))

    def _gradients(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """The losses and squared norms, [B] each, and of each parameter the rows' gradients, [B, its elements]."""
        self._clear()
        losses_B = self._passed(x, y)
        found = [_by_row(parameter, len(x)) for parameter in self._parameters]
        self._clear()
        return [losses_B.detach(), added_up(Rows(rows).squares().value for rows in found), *found]

    def _passed(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses_B = row_losses(self._by_row(x), y)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NO_INPUT_GRADIENT)
            torch.autograd.backward(losses_B.sum())
        return losses_B

    def _passed_alone(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Without the gradients of rows, which follow from what is passed and are many."""
        self._by_row.disable_hooks()
        try:
            self._passed(x, y)
        finally:
            self._by_row.enable_hooks()
            self._clear()

    def _public(self, x_ND: torch.Tensor, y_N: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return public_rows(self._model, x_ND, y_N, rows)
        finally:
            self._clear()

    def _clear(self) -> None:
        self._by_row.zero_grad(set_to_none=True)


def _is_supported(layer: nn.Module) -> bool:
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:
        return False
    return type(layer) in _SUPPORTED and getattr(layer, "padding_idx", None) is None  # it counts the padding's gradient


def _by_row(parameter: torch.Tensor, rows: int) -> torch.Tensor:
    found: torch.Tensor | None = getattr(parameter, "grad_sample", None)
    if found is None:
        return torch.zeros(rows, parameter.numel(), device=parameter.device)
    if len(found) != rows:
        raise InputError("a layer is called on other rows than the batch's", "keep the batch the first dimension")
    return found.reshape(rows, -1).contiguous()
