"""The clipping engines by the names that a spec knows."""

from __future__ import annotations

from torch import nn

from cloister.errors import InputError
from cloister.privacy.clipping import BookkeepingGradients, ClippedGradients, ClippingOptions
from cloister.privacy.grid import Grid
from cloister.privacy.opacus_engine import OpacusGradients


def clipping_engine(
    name: str, model: nn.Module, grid: Grid, options: ClippingOptions | None = None
) -> ClippedGradients:
    """The engine `name` around `model`, until its `close`.

    Raises:
        InputError: no such engine, or a layer that it cannot train privately.
    """
    if name == "bookkeeping":
        return BookkeepingGradients(model, grid, options)
    if name == "opacus":
        return OpacusGradients(model, grid, options)
    raise InputError("there is no such engine", "use engine: bookkeeping, or opacus")
