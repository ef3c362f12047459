"""Parameters that people's own modules use themselves, broadcast over rows: positions, class tokens, scales.

Guarantees: in a forward pass each row has a copy of its own, so that the gradient of the copies is that of the rows. A
copy is as the parameter but for dimensions of size one. There are as many of them as let each row be what it is alone,
with its own copy as the parameter, where all copies are different: that is tried, on several numbers of rows. Where it
cannot be had, the parameter is refused by name.

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

    def fit(self, x: torch.Tensor) -> None:
        """Find the copies' shapes, with rows of random numbers, and with fewer of them.

        Raises:
            InputError: a parameter is not broadcast over rows.
        """
        with torch.no_grad():
            for own in self._parameters:
                alone = _another_for_each_row(own, len(x))
                expected = [self.logits(x[i : i + 1].clone(), {own.full_name: alone[i]}) for i in range(len(x))]
                fewer = (len(x), len(x) // 2 + 1, 2, 1)
                own.shape = next(
                    (
                        shape for shape in own.shapes()
                        if all(self._gives(x[:rows], own, alone, shape, torch.cat(expected[:rows])) for rows in fewer)
                    ),
                    None,
                )  # fmt: skip
                if own.shape is None:
                    raise not_broadcast(own.full_name)

    def copies(self, rows: int) -> list[tuple[OwnParameter, torch.Tensor]]:
        """Each parameter, and its copies for so many rows."""
        return [(own, own.copies(rows, own.shape).contiguous()) for own in self._parameters if own.shape is not None]

    def logits(self, x: torch.Tensor, copies: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the model gives, with copies in the parameters' places."""
        found: torch.Tensor = functional_call(self._model, copies, (x,)) if copies else self._model(x)
        return found

    def _gives(
        self, x: torch.Tensor, own: OwnParameter, alone: torch.Tensor, shape: tuple[int, ...], expected: torch.Tensor
    ) -> bool:
        """Whether with copies of this shape, each of them another one, each row is as it is alone with its own."""
        try:
            found = self.logits(x.clone(), {own.full_name: alone[: len(x)].reshape(len(x), *shape)})
        except Exception:  # noqa: BLE001 - the model's own, whatever it says to another shape
            return False
        if found.shape != expected.shape:
            return False
        close = _TOLERANCE * float(expected[torch.isfinite(expected)].abs().max())
        return torch.allclose(found, expected, rtol=0.0, atol=close, equal_nan=True)


def not_broadcast(name: str) -> InputError:
    return InputError(
        f"parameter '{name}' is not broadcast over rows, so it cannot be trained privately",
        "freeze it, use nn.Linear, or give it the shape of one row, [1, ...], and slice it behind that dimension",
    )


def _another_for_each_row(own: OwnParameter, rows: int) -> torch.Tensor:
    """[B, *parameter]: where copies had a part in other rows, it would show."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn((rows, *own.parameter.shape), generator=generator)
    return numbers.to(own.parameter.device) * own.parameter.abs().mean().clamp_min(0.1)


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
