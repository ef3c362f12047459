# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""Per-row gradient clipping: the sum over a batch of gradients of at most norm C each.

Guarantees, for a model that `check_layers` accepts and whose forward pass keeps rows apart:

    case                                     contribution of the row to the sum
    gradient norm below C                    the gradient
    gradient norm above C                    the gradient scaled to norm C (less a margin for float32 rounding)
    loss, input or gradient not finite       0; the other rows are as if it were absent
    empty batch                              the sum is zero, not an error

so that adding or removing one row moves the exact sum by at most C in the Euclidean norm. Norms and products are
float32, sums over microbatches float64; rounding was seen to add 1.6e-5 of C (3,000 equal rows), and the noise is
scaled for `SENSITIVITY_SLACK` more than C. bfloat16 ghost norms come out as low as 0.69 of the truth. The engine is
Opacus's ghost clipping (arXiv 2009.03106): norms from layer inputs and output gradients, then a second backward pass
of the weighted loss.

Not promised: to notice a custom `forward` that mixes rows. Layers that are known to do so are refused by name.

Shapes: B rows of a batch, D inputs, P trainable parameters, flattened in the order of `model.parameters()`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from cloister.errors import InputError

# Exact types, since a subclass may compute something else. Each one is tested against autograd, row by row.
SUPPORTED_LAYERS: frozenset[type[nn.Module]] = frozenset(
    {nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm}
)
_MIXING_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# Relative slack below C for float32 rounding of a row's norm and weight.
_ROUNDING_MARGIN = 4e-6
# What float32 sums of up to 1,024 rows may add to the effect of one row, relative to C: six times the most seen.
SENSITIVITY_SLACK = 1e-4
# What Opacus attaches to parameters; norms of single rows are private and must not travel with the model.
_PARAMETER_LEFTOVERS = frozenset({"grad_sample", "_norm_sample", "_forward_counter", "_current_grad_sample"})


class ClippedGradients(Protocol):
    """One clipping engine around one model. The contract is the table at the top of the module."""

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        """The sum [P], float64, of the clipped gradients of the rows; the model's own `.grad` fields are left empty."""
        ...


def check_layers(model: nn.Module) -> None:
    """Accept only layers whose per-row gradients the engine is known to compute.

    Raises:
        InputError: naming the layer.
    """
    for name, layer in model.named_modules():
        label = f"layer '{name}' ({type(layer).__name__})"
        if isinstance(layer, _MIXING_LAYERS):
            raise InputError(f"{label} mixes the rows of a batch, so no row's gradient can be clipped", "use GroupNorm")
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if not own:
            continue
        if type(layer) not in SUPPORTED_LAYERS:
            known = ", ".join(sorted(kind.__name__ for kind in SUPPORTED_LAYERS))
            raise InputError(f"{label} cannot be trained privately", f"freeze it, or build it from {known}")
        if any(parameter.dtype != torch.float32 for parameter in own):
            raise InputError(f"{label} is not float32", "train in float32: lower precision breaks clipping")
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    unique = [name for name, p in model.named_parameters() if p.requires_grad]
    if not unique:
        raise InputError("the model has no trainable parameter", "unfreeze a layer")
    if len(names) != len(unique):
        shared = next(name for name in names if name not in unique)
        raise InputError(f"parameter '{shared}' is shared between layers", "give every layer its own parameters")


class GhostClippedGradients:
    """Opacus's ghost clipping for a classifier under cross-entropy. Memory is bounded by `microbatch_rows`."""

    def __init__(self, model: nn.Module, max_grad_norm: float, microbatch_rows: int = 1024) -> None:
        if not 0.0 < max_grad_norm < float("inf"):
            raise ValueError("max_grad_norm is positive and finite")
        if microbatch_rows < 1:
            raise ValueError("a microbatch has at least one row")
        check_layers(model)
        # Imported here: accounting and planning must not pay for it.
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

        self._ghost = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=max_grad_norm * (1.0 - _ROUNDING_MARGIN)
        )
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._rows = microbatch_rows

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        sum_P = torch.zeros(sum(p.numel() for p in self._parameters), dtype=torch.float64, device=x_BD.device)
        for start in range(0, len(x_BD), self._rows):
            rows = slice(start, start + self._rows)
            sum_P += self._microbatch(x_BD[rows], y_B[rows]).double()
        return sum_P

    def close(self) -> None:
        """Take the engine off the model: its hooks, and the per-row norms that Opacus leaves on each parameter."""
        self._clear()
        self._ghost.cleanup()
        for parameter in self._parameters:
            for name in _PARAMETER_LEFTOVERS & vars(parameter).keys():
                delattr(parameter, name)
        for layer in self._model.modules():
            vars(layer).pop("activations", None)

    def _microbatch(self, x_BD: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        weights_B, losses_B = self._norm_pass(x_BD, y_B)
        finite_B = torch.isfinite(weights_B) & torch.isfinite(losses_B.detach())
        if not bool(finite_B.all()):
            # A zero weight would still multiply an infinity into a NaN: the row is taken out instead.
            if not bool(finite_B.any()):
                self._clear()
                return torch.zeros(sum(p.numel() for p in self._parameters), device=x_BD.device)
            return self._microbatch(x_BD[finite_B], y_B[finite_B])
        self._clear()
        self._ghost.disable_hooks()
        torch.autograd.backward((weights_B * losses_B).sum())
        flat_P = torch.cat([_gradient(p).reshape(-1) for p in self._parameters])
        self._clear()
        return flat_P

    def _norm_pass(self, x_BD: torch.Tensor, y_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._clear()
        self._ghost.enable_hooks()
        # Without this, torch warns in every step that Opacus's hooks see no gradient of the input (it still does so
        # for an embedding, whose input has none; nothing is wrong then).
        inputs = x_BD.detach().requires_grad_(x_BD.is_floating_point())
        losses_B = nn.functional.cross_entropy(self._ghost(inputs), y_B, reduction="none")
        torch.autograd.backward(losses_B.sum(), retain_graph=True)
        norms_B = self._ghost.get_norm_sample()
        weights_B = torch.where(torch.isfinite(norms_B), self._ghost.get_clipping_coef(), torch.nan)
        return weights_B, losses_B

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
