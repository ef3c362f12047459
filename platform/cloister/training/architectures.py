# ruff: noqa: N803 - the letters after a tensor's name are its shape
"""The models that a spec can name.

Guarantees: the same map, sizes and seed give bit-identical initial weights on every rank, without touching torch's
global random state; the seed is public (derived from the run's id), which costs no privacy, since initial weights
depend on no data. Each trainable layer is one that `cloister.privacy.clipping` supports.

    mlp         layers of `hidden` widths over all inputs
    scattering  the same, or a linear classifier, over fixed features of pictures (`cloister.training.scattering`)

What is fixed is computed once, before training, by `fixed_features`, and training sees `trainable_part` alone: private
training repeats the rest many times. The model that is evaluated and exported is the whole.

Shapes: N rows, D inputs, F fixed features.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping

import torch
from torch import nn

from cloister.errors import InputError
from cloister.privacy.rowwise import RowWise
from cloister.training.scattering import MIN_SIDE, Scattering

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
_ROWS_AT_ONCE, _FEWEST_ROWS = 64, 8
_NUMBERS_AT_ONCE = 64 * 784  # pictures whose intermediate channels fit into a cache


def seed_of(run: str) -> int:
    """The public seed of a run's initial weights."""
    return int.from_bytes(hashlib.sha256(b"cloister/init/v1\x00" + run.encode()).digest()[:7], "big")


def build_model(architecture: Mapping[str, object], width: int, classes: int, seed: int = 0) -> nn.Module:
    """The model that maps [N, width] inputs to [N, classes] logits.

    Raises:
        InputError: no such architecture, or it does not understand a field.
    """
    fields = dict(architecture)
    kind, hidden, activation = (fields.pop(name, None) for name in ("architecture", "hidden", "activation"))
    if kind not in ("mlp", "scattering"):
        raise InputError("there is no such architecture", "use architecture: mlp, or scattering for pictures")
    features = _scattering(fields.pop("image", None), width) if kind == "scattering" else None
    sizes = list(hidden) if isinstance(hidden, list | tuple) else []
    if fields or not (sizes or features) or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"{kind} takes `hidden`, a list of layer widths, and `activation`", "use hidden: [128]")
    if activation is not None and activation not in _ACTIVATIONS:
        raise InputError("there is no such activation", "use one of " + ", ".join(_ACTIVATIONS))
    between = _ACTIVATIONS[str(activation or "tanh")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = _layers([features.outputs if features else width, *sizes, classes], between)
    return OnFixedFeatures(features, head) if features else head


class OnFixedFeatures(nn.Module):
    """`head(features(x))`, where `features` has no parameter and no state."""

    def __init__(self, features: Scattering, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head
        self._of_each_row: RowWise | None = None
        """`features`, tried on a device."""

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(x_ND))
        return logits

    def fixed(self, x_ND: torch.Tensor) -> torch.Tensor:
        """`features(x)`: see `fixed_features`."""
        if self._of_each_row is None:  # once: to try a device with large pictures takes long
            rows = max(_FEWEST_ROWS, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // x_ND.shape[1]))
            self._of_each_row = RowWise(self.features, self.features, x_ND[:1], rows)
        return self._of_each_row(x_ND)


def trainable_part(model: nn.Module) -> nn.Module:
    """The part of `model` that learns: it takes `fixed_features(model, x)` where the whole takes `x`."""
    return model.head if isinstance(model, OnFixedFeatures) else model


def fixed_features(model: nn.Module, x_ND: torch.Tensor) -> torch.Tensor:
    """[N, F]: what `trainable_part(model)` takes, to the same bits whatever rows are beside one; `x_ND` itself where
    nothing is fixed.

    Raises:
        InputError: this device computes a row otherwise beside others.
    """
    return model.fixed(x_ND) if isinstance(model, OnFixedFeatures) else x_ND


def _scattering(image: object, width: int) -> Scattering:
    sides = list(image) if isinstance(image, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and side >= MIN_SIDE for side in sides):
        raise InputError(
            f"scattering takes `image`, its height and width of at least {MIN_SIDE} pixels", "use image: [28, 28]"
        )
    if sides[0] * sides[1] != width:
        raise InputError(
            f"an image of {sides[0]} x {sides[1]} is not the {width} inputs of the data", "correct `image`"
        )
    return Scattering(*sides)


def _layers(sizes: list[int], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])
