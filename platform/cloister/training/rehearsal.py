# ruff: noqa: N803 - the letters after a tensor's name are its shape
"""A rehearsal on public rows, before an attempt has cost anything: does this model keep to what DP-SGD assumes of it?

Guarantees: it reads no private row, since its rows are random numbers of the same shape, so that what it tells costs no
privacy; the model, torch's global random state and the optimiser are left as they were. It refuses, by name,

    mixing       a forward pass in which one row's gradient depends on the other rows: batch statistics, a loss that is
                 divided by the number of rows at hand
    dead ends    a trainable parameter that no row's gradient reaches
    by-passes    a trainable parameter that is used outside of its layer, such as `x @ embedding.weight.T`, or an input
                 that is changed after its layer has seen it: clipping would miss that part of the gradient

Not promised: to find what random rows do not bring out.

Shapes: N rows, D inputs.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.clipping import BookkeepingGradients, ClippingOptions, row_losses
from cloister.privacy.grid import Grid
from cloister.privacy.microbatch import random_inputs

_ROWS = 6
_NO_CLIPPING = 1e30
_FINE = 2.0**-60  # the unit of sums that are not released
_TOLERANCE = 1e-3  # relative; float32 in batches of another size


def rehearse(model: nn.Module, x_ND: torch.Tensor) -> None:
    """Try `model` on random rows of the shape and type of `x_ND`, whose values are not read.

    Raises:
        InputError: the model mixes rows, or a parameter has no part in its output; names the parameter.
    """
    model = copy.deepcopy(model).eval()  # without dropout, or no two passes are alike
    x = random_inputs(model, x_ND, _ROWS)
    with torch.no_grad():
        logits = model(x)
    if logits.shape[0] != _ROWS:
        raise InputError("the model's output has another number of rows than its input", "keep the batch first")
    y = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(0)).to(
        x_ND.device
    )

    together = _summed(model, x, y, ClippingOptions(tried=False))
    apart = _summed(model, x, y, ClippingOptions(tried=False, microbatch_rows=1))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        plain = torch.autograd.grad(row_losses(model(x), y).sum(), [p for _, p in named], allow_unused=True)
    except RuntimeError as error:
        raise InputError("the model changes a tensor in place that a gradient needs", "write it anew") from error
    offset = 0
    for (name, parameter), gradient in zip(named, plain, strict=True):
        piece = slice(offset, offset + parameter.numel())
        offset += parameter.numel()
        if float((together[piece] - apart[piece]).norm()) > _TOLERANCE * float(apart.norm()):
            raise InputError(
                f"the gradient of parameter '{name}' for one row depends on the other rows of the batch",
                "compute each row by itself: no batch statistics, no division by the number of rows",
            )
        missed = (0.0 if gradient is None else gradient.flatten().double()) - together[piece]
        if float(missed.norm()) > _TOLERANCE * float(apart.norm()):
            raise InputError(
                f"a part of the gradient of parameter '{name}' does not come through its layer",
                "call the layer, and use nn.Linear with a tied weight for its transpose; change no input in place",
            )
        if not bool(together[piece].any()):
            raise InputError(f"no row's gradient reaches parameter '{name}'", "use it in the forward pass or freeze it")


def _summed(model: nn.Module, x_ND: torch.Tensor, y_N: torch.Tensor, options: ClippingOptions) -> torch.Tensor:
    clipped = BookkeepingGradients(model, Grid(_FINE, _NO_CLIPPING, _ROWS), options)
    try:
        return clipped(x_ND, y_N)
    finally:
        clipped.close()
