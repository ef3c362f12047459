# ruff: noqa: N806 - the letters after a tensor's name are its shape
"""The gradient of each row, by layer type: the book-keeping of Bu, Wang, Zha and Karypis (arXiv 2210.00038).

Guarantees: for one call of one supported layer, with its input a and the gradient g of the rows' summed loss with
respect to its output, `row_gradients` describes the gradient of every parameter for every row (`gradients`), without a
second backward pass.

Not promised: anything for layers outside of `RULES`; `clipping` refuses those by name.

Shapes: B rows, T positions of one row, D inputs, P outputs, G groups of a convolution, K elements of its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from cloister.privacy.gradients import Lookups, Products, RowGradients, Rows, products_of_rows

# What one piece of a convolution's patches may hold: it should fit the cache of a core.
_PATCH_BYTES = 2 * 1024 * 1024


@dataclass(slots=True)
class Use:
    """One call of a layer: its input, its output, and, once the backward pass is done, the output's gradient."""

    name: str
    layer: nn.Module
    a: torch.Tensor
    output: torch.Tensor
    version: int
    g: torch.Tensor | None = None
    parameter: str | None = None
    """Of what is no call, but a parameter that the layer uses itself: its name. Then input and output are its copies,
    one for each row (`broadcast`)."""


def row_gradients(use: Use) -> dict[str, RowGradients]:
    """The gradients of the layer's own trainable parameters, by their names."""
    assert use.g is not None  # noqa: S101  (set by the backward pass)
    if use.parameter is not None:
        shape = getattr(use.layer, use.parameter).shape
        return {use.parameter: Rows(use.g.float().reshape(len(use.g), *shape))}
    # As the layer computed: under autocast its input was rounded to the precision of its output.
    a = use.a.to(use.g.dtype) if use.a.is_floating_point() else use.a
    # One after the other in memory, or sums over positions go in an order that depends on how many rows there are.
    found = RULES[type(use.layer)](use.layer, a.contiguous(), use.g.contiguous())
    trainable = {name for name, parameter in use.layer.named_parameters(recurse=False) if parameter.requires_grad}
    return {name: rows for name, rows in found.items() if name in trainable}


def _linear(layer: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, RowGradients]:
    assert isinstance(layer, nn.Linear)  # noqa: S101
    a_BTD, g_BTP = a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    if g_BTP.shape[1] == 1:
        bias = Rows(g_BTP.squeeze(1).float())
        return {"weight": Products(a_BTD, g_BTP, layer.weight.shape, bias), "bias": bias}
    bias = Rows(g_BTP.sum(1, dtype=torch.float32))
    return {"weight": Products(a_BTD, g_BTP, layer.weight.shape), "bias": bias}


def _embedding(layer: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, RowGradients]:
    assert isinstance(layer, nn.Embedding)  # noqa: S101
    id_BT = a.reshape(len(a), -1)
    g_BTD = g.reshape(*id_BT.shape, -1)
    if layer.padding_idx is not None:
        g_BTD = g_BTD * (id_BT != layer.padding_idx).unsqueeze(2)
    return {"weight": Lookups(id_BT, g_BTD, layer.num_embeddings)}


def _convolution(layer: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, RowGradients]:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)  # noqa: S101
    if isinstance(layer, nn.Conv1d):  # the same in one dimension
        a, g = a.unsqueeze(2), g.unsqueeze(2)
    stride, dilation, kernel = ((1,) * (2 - len(v)) + v for v in (layer.stride, layer.dilation, layer.kernel_size))
    padded = functional.pad(a, layer._reversed_padding_repeated_twice).contiguous()
    inputs, outputs, patch = layer.in_channels // layer.groups, layer.out_channels // layer.groups, math.prod(kernel)
    height, width = g.shape[2:]
    s_B, s_C, s_H, s_W = padded.stride()
    g_BGPT = g.reshape(len(g), layer.groups, outputs, height * width)

    def patches(first: int, stop: int) -> torch.Tensor:
        """[B, G, D·K, T]: one copy, no im2col."""
        part = padded[first:stop]
        view = part.as_strided(
            (len(part), layer.groups, inputs, *kernel, height, width),
            (s_B, inputs * s_C, s_C, s_H * dilation[0], s_W * dilation[1], s_H * stride[0], s_W * stride[1]),
        )
        return view.reshape(len(part), layer.groups, inputs * patch, height * width)

    rows, positions = len(a), height * width
    weight: RowGradients
    if layer.groups == 1 and positions * (inputs * patch + outputs) <= inputs * patch * outputs:
        weight = Products(patches(0, rows).squeeze(1).mT, g_BGPT.squeeze(1).mT, layer.weight.shape)
    else:
        row_bytes = max(1, a.element_size() * layer.in_channels * patch * positions)
        piece = max(1, _PATCH_BYTES // row_bytes) if a.device.type == "cpu" else rows
        found = [
            products_of_rows(g_BGPT[i : i + piece], patches(i, min(i + piece, rows))) for i in range(0, rows, piece)
        ]
        weight = Rows(torch.cat(found).reshape(rows, *layer.weight.shape))
    return {"weight": weight, "bias": Rows(g.flatten(2).sum(2, dtype=torch.float32))}


def _normalised(a: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """What the layer multiplies its weight with."""
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(a.float(), layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return functional.group_norm(a.float(), layer.num_groups, eps=layer.eps)
    assert isinstance(layer, nn.RMSNorm)  # noqa: S101
    # Without an epsilon of its own the layer takes that of the precision that it computes in.
    eps = layer.eps if layer.eps is not None else torch.finfo(a.dtype).eps
    return functional.rms_norm(a.float(), list(layer.normalized_shape), eps=eps)


def _last_dimensions_norm(layer: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, RowGradients]:
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)  # noqa: S101
    shape = layer.normalized_shape
    return {
        "weight": Rows((g.float() * _normalised(a, layer)).reshape(len(g), -1, *shape).sum(1)),
        "bias": Rows(g.reshape(len(g), -1, *shape).sum(1, dtype=torch.float32)),
    }


def _group_norm(layer: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, RowGradients]:
    g_BPT, x_BPT = g.float().reshape(*g.shape[:2], -1), _normalised(a, layer).reshape(*g.shape[:2], -1)
    return {"weight": Rows((g_BPT * x_BPT).sum(2)), "bias": Rows(g_BPT.sum(2))}


# Exact types, since a subclass may compute something else. Each is tested against autograd, row by row.
RULES: dict[type[nn.Module], Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, RowGradients]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _last_dimensions_norm,
    nn.RMSNorm: _last_dimensions_norm,
    nn.GroupNorm: _group_norm,
}


def trains(layer: nn.Module) -> bool:
    """Whether it has a trainable parameter of its own."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def unsupported_option(layer: nn.Module) -> str | None:
    """What a layer of a known type does beyond its rule, or None."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    if isinstance(layer, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(layer, option):
                return option
    return None
