"""Parameters that people's own modules use themselves, broadcast over rows: positions, class tokens, scales.

Guarantees: in a forward pass each row has a copy of its own, so that the gradient of the copies is that of the rows. A
copy is as the parameter but for dimensions of size one, of which there are as many as let the model compute the same
with copies as without: that is tried, on two numbers of rows. Where it cannot be had, the parameter is refused by name.

Not promised: to notice a use that is not through the module's attribute, such as a list of parameters that the module
keeps beside. `training.rehearsal` compares with autograd.

Shapes: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from cloister.errors import InputError

_MOST_DIMENSIONS = 4  # in front of a parameter's own: of pictures, up to three
_TOLERANCE = 1e-4  # relative; libraries add a copy otherwise than what is broadcast


def uses_its_own(layer: nn.Module) -> bool:
    """Whether it is a module of people's own: what it does with its parameters is written in its `forward`."""
    kinds = [kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn.")]
    return all(kind in (nn.Module, nn.Sequential) for kind in kinds)


class Broadcast:
    """The trainable parameters of a model's own modules. Those that a layer has too are that layer's."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        elsewhere = {id(p) for layer in model.modules() if not uses_its_own(layer) for p in layer.parameters(False)}
        named = [
            (own, layer, name, parameter) for own, layer in model.named_modules() if uses_its_own(layer)
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in elsewhere
        ]  # fmt: skip
        self._parameters = [OwnParameter(*found) for found in {id(found[-1]): found for found in named}.values()]

    def fit(self, x: torch.Tensor, fewer: int) -> None:
        """Find the copies' shapes, with rows of random numbers, and with so many of them.

        Raises:
            InputError: a parameter is not broadcast over rows.
        """
        if not self._parameters:
            return
        with torch.no_grad():
            tried = [(rows, self._model(rows)) for rows in (x, x[:fewer])]
            for own in self._parameters:
                shapes = (shape for shape in own.shapes() if all(self._gives(own, shape, *each) for each in tried))
                own.shape = next(shapes, None)
                if own.shape is None:
                    raise InputError(
                        f"parameter '{own.full_name}' is not broadcast over rows, so it cannot be trained privately",
                        "freeze it, give it the shape of one row, [1, ...], or use nn.Linear",
                    )

    def copies(self, rows: int) -> list[tuple[OwnParameter, torch.Tensor]]:
        """Each parameter, and its copies for so many rows."""
        return [(own, own.copies(rows, own.shape).contiguous()) for own in self._parameters if own.shape is not None]

    def logits(self, x: torch.Tensor, copies: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the model gives, with copies in the parameters' places."""
        found: torch.Tensor = functional_call(self._model, copies, (x,)) if copies else self._model(x)
        return found

    def _gives(self, own: OwnParameter, shape: tuple[int, ...], x: torch.Tensor, expected: torch.Tensor) -> bool:
        try:
            found = self.logits(x, {own.full_name: own.copies(len(x), shape)})
        except Exception:  # noqa: BLE001 - the model's own, whatever it says to another shape
            return False
        close = _TOLERANCE * float(expected.abs().max())
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.0, atol=close, equal_nan=True)


@dataclass(slots=True)
class OwnParameter:
    """One of them, as `name` of the module `layer`, which is called `of` in the model."""

    of: str
    layer: nn.Module
    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...] | None = None
    """Of one row's copy."""

    @property
    def full_name(self) -> str:
        return f"{self.of}.{self.name}".removeprefix(".")

    def shapes(self) -> list[tuple[int, ...]]:
        """Which shapes a copy may have: without a first dimension of one, or with more dimensions in front."""
        shape = tuple(self.parameter.shape)
        fewer = [shape[1:]] if shape[:1] == (1,) else []
        return fewer + [(1,) * more + shape for more in range(_MOST_DIMENSIONS)]

    def copies(self, rows: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self.parameter.detach().reshape(1, *shape).expand(rows, *shape)
