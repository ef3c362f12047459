# ruff: noqa: N806 - the letters after a tensor's name are its shape
"""The trainable parameters of a model, their gradients for each row, and what these come to together.

Shapes: B rows, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from cloister.privacy.gradients import CANCELLED, RowGradients, Tied, added_up
from cloister.privacy.layers import Use, row_gradients


class Parameters:
    """The trainable parameters in the order of the flat vector, and which layer each belongs to; tied ones once."""

    def __init__(self, model: nn.Module) -> None:
        self._all = [parameter for parameter in model.parameters() if parameter.requires_grad]
        places = {id(parameter): place for place, parameter in enumerate(self._all)}
        self._place: dict[tuple[str, str], int] = {}
        layer_of: dict[int, int] = {}
        count = 0
        for name, layer in model.named_modules():
            own = [(n, places[id(p)]) for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
            known = [layer_of[place] for _, place in own if place in layer_of]
            number = known[0] if known else count  # a tied weight is clipped with the layer that has it first
            count += bool(own) and not known
            for n, place in own:
                self._place[name, n] = place
                layer_of.setdefault(place, number)
        self.layer = [layer_of[place] for place in range(len(self._all))]
        self.layers = count
        self.shapes = [parameter.shape for parameter in self._all]
        self.sizes = [parameter.numel() for parameter in self._all]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block no parameter asks for a gradient."""
        for parameter in self._all:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._all:
                parameter.requires_grad_(True)

    def gradients(self, uses: list[Use]) -> list[RowGradients | None]:
        """What is known of each parameter; None of one that had no part in the forward pass."""
        parts: list[list[RowGradients]] = [[] for _ in self._all]
        for use in uses:
            for name, rows in row_gradients(use).items():
                parts[self._place[use.name, name]].append(rows)
        return [None if not found else found[0] if len(found) == 1 else Tied(found) for found in parts]

    def squared_norms(self, gradients: list[RowGradients | None], *, in_graph: bool) -> list[tuple[int, torch.Tensor]]:
        """Of each parameter that had a part in the forward pass, its layer's number and [B].

        In a graph, which cannot compute some rows anew, those that cancel count for as much as they may.
        """
        known = [(rows, layer) for rows, layer in zip(gradients, self.layer, strict=True) if rows is not None]
        found = [rows.squares() for rows, _ in known]
        values = [squares.value for squares in found]
        for place, (squares, (rows, _)) in enumerate(zip(found, known, strict=True)):
            if squares.scale is squares.value:
                continue
            if in_graph:
                values[place] = torch.maximum(squares.value, CANCELLED * squares.scale)
            elif bool((cancelled_B := squares.value < CANCELLED * squares.scale).any()):
                values[place][cancelled_B] = rows.in_double(cancelled_B).squares().value.to(squares.value.dtype)
            if squares.least is not None:
                values[place] = torch.maximum(values[place], squares.least)
        return [(layer, value_B) for value_B, (_, layer) in zip(values, known, strict=True)]

    def norms_of_layers(self, squares: list[tuple[int, torch.Tensor]], *, whole: bool) -> torch.Tensor:
        """[L, B], or [1, B] of all layers together."""
        none_B = torch.zeros_like(squares[0][1])  # a layer may have had no part in the forward pass
        groups = [
            [value_B for layer, value_B in squares if whole or layer == number]
            for number in range(1 if whole else self.layers)
        ]
        return torch.stack([added_up([none_B, *group]) for group in groups]).sqrt()
