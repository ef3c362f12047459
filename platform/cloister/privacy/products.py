# ruff: noqa: N803 - the letters after a tensor's name are its shape
"""Products of large float32 matrices on CPUs.

PyTorch takes MKL for them, which is half as fast as oneDNN on processors that are not Intel's (benchmarks/results), and
oneDNN is there too. No public function leads to it; this is the one that compiled models call for linear layers. Where
a build of PyTorch does not have it, all is as PyTorch does it.

Shapes: B rows, N numbers that are summed up, D inputs, P outputs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cloister.errors import InputError

_ONEDNN: Callable[..., torch.Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Below, it does not pay for what oneDNN prepares for each shape: multiplications of a product, and of one row's part.
_WORTH = 1e7
_WORTH_A_ROW = 5e4


def product(g_PN: torch.Tensor, a_ND: torch.Tensor) -> torch.Tensor:
    """g_PN @ a_ND."""
    if _ONEDNN is None or g_PN.is_cuda or g_PN.numel() * a_ND.shape[1] < _WORTH or g_PN.dtype != torch.float32:
        return g_PN @ a_ND
    if len(g_PN) <= a_ND.shape[1]:
        return _ONEDNN(g_PN, a_ND.mT, None, "none", [], "")
    return _ONEDNN(a_ND.mT, g_PN, None, "none", [], "").mT  # it wants the narrower one first


def require_whole_products() -> None:
    """Refuse settings with which float32 products have the precision of bfloat16 or TF32, and norms with them."""
    mkldnn: Any = torch.backends.mkldnn
    parts = (torch.backends, mkldnn, mkldnn.matmul, torch.backends.cuda.matmul)
    if not {each.fp32_precision for each in parts} <= {"none", "ieee"}:
        raise InputError("float32 products are rounded, and so would norms be",
                         'set torch.set_float32_matmul_precision("highest")')  # fmt: skip
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        if os.environ.get(name, "STRICT").upper() != "STRICT":
            raise InputError("float32 products may be rounded, and so would norms be", f"unset {name}")


@dataclass(frozen=True, slots=True)
class Faster:
    """A linear layer that computes by oneDNN, until `remove`."""

    layer: nn.Linear

    def remove(self) -> None:
        vars(self.layer).pop("forward", None)


def faster_layers(model: nn.Module) -> list[Faster]:
    """Let the large linear layers of `model` compute by oneDNN while their weights are frozen.

    Which ones is a matter of the layer, not of how many rows there are: those may not be computed by other kernels.
    """
    found = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    for layer in found:
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    return [Faster(layer) for layer in found]


def _forward(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    x, weight, bias = input, layer.weight, layer.bias
    if (
        _ONEDNN is None or x.is_cuda or not len(x) or x[0].numel() * layer.out_features < _WORTH_A_ROW
        or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu")
        or any(parameter is not None and parameter.requires_grad for parameter in (weight, bias))
    ):  # fmt: skip
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


class _Linear(torch.autograd.Function):
    """With frozen weights: what comes back is the gradient of the input alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert _ONEDNN is not None  # noqa: S101
        ctx.save_for_backward(weight)
        return _ONEDNN(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *found: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        assert _ONEDNN is not None  # noqa: S101
        (weight,) = ctx.saved_tensors
        return _ONEDNN(found[0].contiguous(), weight.mT, None, "none", [], ""), None, None
