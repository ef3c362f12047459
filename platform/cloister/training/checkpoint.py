"""A sealed checkpoint: weights and the optimiser's state after some step, and nothing else (FORMAT.md).

Guarantees: what is in it is post-processing of noisy sums that are on record, so it costs no privacy; no randomness is
in it, neither of the sampler nor of the noise, so what resumes from it cannot repeat either; it opens only under the
run's own key and the path that it was made for, which names run, attempt and step; `restore` takes exactly what `save`
would write for this model, this optimiser and this step, or changes nothing. No pickle is read.

Does not guarantee: freshness. The authority's record says which checkpoint is the run's newest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from cloister.canonical import canonical_json
from cloister.errors import InputError, IntegrityError
from cloister.sealing.stream import open_sealed, seal

FORMAT = "cloister.dev/checkpoint/v1"
LENGTH_BYTES = 4
# What each optimiser keeps of a parameter once it has stepped: tensors like the parameter, but for the count of steps.
_STEP = "step"
_STATE: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", _STEP),
    torch.optim.SGD: ("momentum_buffer",),
}


def checkpoint_path(run: str, attempt: int, step: int) -> str:
    """Where the store keeps it."""
    return f"models/{run}/checkpoints/{attempt}-{step}.sealed"


def save(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, *, key: bytes, context: Mapping[str, str]
) -> bytes:
    """Seal what a resumed attempt needs after `step` steps, at least one.

    Raises:
        InputError: an optimiser, or a state of one, that this format does not know.
    """
    held = _weights(model)
    for name, parameter in _trained(model, optimizer).items():
        held |= {f"optimizer/{name}/{part}": value for part, value in optimizer.state[parameter].items()}
    layout = _layout(model, optimizer)
    if {name: _shape(value) for name, value in held.items()} != layout:
        raise InputError("the optimiser's state is not one that a checkpoint holds", "use adam, or sgd with momentum")
    content = b"".join(_to_bytes(held[name]) for name in layout)
    return seal(key, _header(layout, optimizer, step) + content, context)


def restore(
    sealed: bytes, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, *, key: bytes,
    context: Mapping[str, str],
) -> None:  # fmt: skip
    """Put a checkpoint after `step` steps into a model and an optimiser that were made anew.

    Raises:
        IntegrityError: another run, path or key, changed bytes, or another model, optimiser or step. Nothing changed.
    """
    layout = _layout(model, optimizer)
    header = _header(layout, optimizer, step)
    content = memoryview(open_sealed(key, sealed, context))
    # The header is known to the last byte, so nothing of what was stored is ever interpreted.
    if bytes(content[: len(header)]) != header or len(content) != len(header) + sum(map(_size, layout.values())):
        raise IntegrityError("the checkpoint is of another model, optimiser or step", "submit the run again")
    content = content[len(header) :]
    found = {}
    for name, shape in layout.items():
        found[name], content = _from_bytes(content[: _size(shape)], shape), content[_size(shape) :]
    with torch.no_grad():
        for name, value in _weights(model).items():
            value.copy_(found[name])
    for name, parameter in _trained(model, optimizer).items():
        optimizer.state[parameter] = {
            part: found[f"optimizer/{name}/{part}"].to(torch.device("cpu") if part == _STEP else parameter.device)
            for part in _STATE[type(optimizer)]
        }


_Shape = tuple[torch.dtype, tuple[int, ...]]


def _shape(value: torch.Tensor) -> _Shape:
    return value.dtype, tuple(value.shape)


def _size(shape: _Shape) -> int:
    return int(np.prod(shape[1], dtype=np.int64)) * shape[0].itemsize


def _layout(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, _Shape]:
    """Every tensor of a checkpoint, in the order in which they are written."""
    shapes = {name: _shape(value) for name, value in _weights(model).items()}
    for name, parameter in _trained(model, optimizer).items():
        for part in _STATE[type(optimizer)]:
            shapes[f"optimizer/{name}/{part}"] = (torch.float32, ()) if part == _STEP else _shape(parameter)
    return dict(sorted(shapes.items()))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers: they share the model's memory."""
    return {f"model/{name}": value for name, value in model.state_dict().items()}


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    if type(optimizer) not in _STATE:
        raise InputError("a checkpoint does not hold this optimiser's state", "use adam or sgd")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(each)]: each for group in optimizer.param_groups for each in group["params"]}


def _header(layout: Mapping[str, _Shape], optimizer: torch.optim.Optimizer, step: int) -> bytes:
    tensors: list[Any] = [
        [name, str(dtype).removeprefix("torch."), list(shape)] for name, (dtype, shape) in layout.items()
    ]
    facts = {"format": FORMAT, "optimizer": type(optimizer).__name__, "step": step, "tensors": tensors}
    encoded = canonical_json(facts)
    return len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded


def _to_bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _from_bytes(content: memoryview, shape: _Shape) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(shape[0]).reshape(shape[1])
