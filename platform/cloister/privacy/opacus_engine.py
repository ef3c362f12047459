# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""The second clipping engine, `engine: opacus`: Opacus's ghost clipping. The first is tested against it.

Guarantees: the contract of `clipping`. Norms come from layer inputs and output gradients (arXiv 2009.03106), then a
second backward pass of the weighted loss gives the sum: about 1.8 times the arithmetic of plain training. What Opacus
leaves on parameters (norms of single rows, which are private) is taken off at `close`.

Only linear layers of at most 65,536 inputs and outputs, each called once, on one position of each row: Opacus's norms
of several positions come from float32 Gram matrices whose rounding lets a row through with 300 times its bound where
its positions cancel (measured with 1.6.0), and longer ones from float32 sums that are off by up to a percent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.blocks import Blocks, ranges_for, spread
from cloister.privacy.clipping import (
    ROUNDING_MARGIN,
    ClippingOptions,
    check_layers,
    require_whole_products,
    row_losses,
    trains,
)
from cloister.privacy.grid import MOST_ROWS, Grid
from cloister.privacy.microbatch import align_rows, filled, fitting_step, public_rows, rounded_up, without

# Inputs or outputs of a layer. Opacus's norms, sums in float32, are off by 1e-4 for twice as many, by 1e-2 for 2**24.
_WIDEST = 2**16
_PARAMETER_LEFTOVERS = frozenset({"grad_sample", "_norm_sample", "_forward_counter", "_current_grad_sample"})


class GhostClippedGradients:
    """Opacus's ghost clipping for a classifier under cross-entropy. Memory is bounded by `options.microbatch_rows`."""

    def __init__(self, model: nn.Module, grid: Grid, options: ClippingOptions | None = None) -> None:
        """Put Opacus's hooks on the model, until `close`.

        Raises:
            InputError: a layer or an option that this engine does not have.
        """
        options = options or ClippingOptions()
        if options.per_layer or options.compiled or options.autocast:
            raise InputError("Opacus's engine clips flat, in float32, and is not compiled", "use engine: bookkeeping")
        require_whole_products()
        check_layers(model, supported=_is_supported)
        names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        unique = [name for name, p in model.named_parameters() if p.requires_grad]
        if len(names) != len(unique):
            shared = next(name for name in names if name not in unique)
            raise InputError(f"parameter '{shared}' is shared between layers", "use engine: bookkeeping")
        # Imported here: accounting and planning must not pay for it.
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

        self._ghost = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=grid.bound * (1.0 - ROUNDING_MARGIN)
        )
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._grid, self._rows = grid, min(options.microbatch_rows or MOST_ROWS, MOST_ROWS)
        self._step = 0
        self._called: set[str] = set()
        self._watches = align_rows(model) + [
            layer.register_forward_pre_hook(self._watch(name)) for name, layer in model.named_modules() if trains(layer)
        ]

    def ranges(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> int:
        if not self._step:
            self._step = fitting_step(self._norm_pass, lambda rows: self._public(x_ND, y_N, rows), self._rows)
            self._clear()
        return ranges_for(self._grid.rows_a_rank, self._rows)

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        total_P = torch.zeros(sum(p.numel() for p in self._parameters), dtype=torch.float64, device=x_BD.device)
        if not len(x_BD):
            return total_P
        blocks = blocks or Blocks(spread(len(x_BD)), self.ranges(x_BD, y_B))
        for start, stop in blocks.of_at_most(self._rows):
            whole = rounded_up(stop - start, self._step)
            self._grid.add(total_P, self._microbatch(*filled(x_BD[start:stop], y_B[start:stop], whole)))
        return total_P

    def close(self) -> None:
        """Take the engine off the model: its hooks, and the per-row norms that Opacus leaves on each parameter."""
        self._clear()
        for watch in self._watches:
            watch.remove()
        self._ghost.cleanup()
        for parameter in self._parameters:
            for name in _PARAMETER_LEFTOVERS & vars(parameter).keys():
                delattr(parameter, name)
        for layer in self._model.modules():
            vars(layer).pop("activations", None)

    def _public(self, x_ND: torch.Tensor, y_N: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._called.clear()
        return public_rows(self._model, x_ND, y_N, rows)

    def _microbatch(self, x_BD: torch.Tensor, y_B: torch.Tensor, mask_B: torch.Tensor) -> torch.Tensor:
        weights_B, losses_B = self._norm_pass(x_BD, y_B)
        bad_B = ~(torch.isfinite(weights_B) & torch.isfinite(losses_B.detach()))
        if bool(bad_B.any()):
            # A zero weight would still multiply an infinity into a NaN: another row takes its place, and has no weight.
            if bool(bad_B.all()):
                self._clear()
                return torch.zeros(sum(p.numel() for p in self._parameters), device=x_BD.device)
            return self._microbatch(*without(bad_B, x_BD, y_B, mask_B))
        self._clear()
        self._ghost.disable_hooks()
        torch.autograd.backward((weights_B * mask_B * losses_B).sum())
        flat_P = torch.cat([_gradient(p).reshape(-1) for p in self._parameters])
        self._clear()
        return flat_P

    def _norm_pass(self, x_BD: torch.Tensor, y_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._clear()
        self._called.clear()
        self._ghost.enable_hooks()
        # Without this, torch warns in every step that Opacus's hooks see no gradient of the input (it still does so
        # for an embedding, whose input has none; nothing is wrong then).
        inputs = x_BD.detach().requires_grad_(x_BD.is_floating_point())
        losses_B = row_losses(self._ghost(inputs), y_B)
        torch.autograd.backward(losses_B.sum(), retain_graph=True)
        norms_B = self._ghost.get_norm_sample()
        weights_B = torch.where(torch.isfinite(norms_B), self._ghost.get_clipping_coef(), torch.nan)
        return weights_B, losses_B

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def watch(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if name in self._called or inputs[0].dim() != 2:
                raise InputError(f"layer '{name}' is called on several positions of a row", "use engine: bookkeeping")
            self._called.add(name)

        return watch

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _is_supported(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and max(layer.in_features, layer.out_features) <= _WIDEST


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
