"""The models that a spec can name.

Guarantees: the same map, sizes and seed give bit-identical initial weights on every rank, without touching torch's
global random state; the seed is public (derived from the run's id), which costs no privacy, since initial weights
depend on no data. Each layer is one that `cloister.privacy.clipping` supports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from cloister.errors import InputError

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


def seed_of(run: str) -> int:
    """The public seed of a run's initial weights."""
    return int.from_bytes(hashlib.sha256(b"cloister/init/v1\x00" + run.encode()).digest()[:7], "big")


def build_model(architecture: Mapping[str, object], width: int, classes: int, seed: int = 0) -> nn.Module:
    """The model that maps [N, width] inputs to [N, classes] logits.

    Raises:
        InputError: no such architecture, or it does not understand a field.
    """
    fields = dict(architecture)
    if fields.pop("architecture", None) != "mlp":
        raise InputError("there is no such architecture", "use architecture: mlp")
    hidden, activation = fields.pop("hidden", ()), fields.pop("activation", "tanh")
    sizes = list(hidden) if isinstance(hidden, list | tuple) else []
    if fields or not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError("an mlp has `hidden`, a list of layer widths, and `activation`", "use hidden: [128]")
    if activation not in _ACTIVATIONS:
        raise InputError("there is no such activation", "use one of " + ", ".join(_ACTIVATIONS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in zip([width, *sizes], sizes, strict=False):
            layers += [nn.Linear(inputs, outputs), _ACTIVATIONS[str(activation)]()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))
