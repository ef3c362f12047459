# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""The rows of a microbatch: filled up, aligned, and tried on this device.

Libraries compute one row, or three, by other kernels than sixteen, and round by where in memory it begins. Where a last
bit decides, such as at the kink of a ReLU, a row more in a batch would change the gradients of others. So each
microbatch has memory of its own, filled up with rows of no weight (`filled`) to a number that was tried on this device
(`fitting_step`): in each place and at each such number, a row is computed to the same bits. That helps to be so:
`align_rows`. Where it cannot be had, nothing is trained.

It is tried on random rows and with random weights (`tried`): which kernel computes a number does not depend on numbers,
but weights of zero hide what comes back through them. Dropout is off meanwhile. Its masks are drawn for each row by
itself, from a secret seed (`mechanism`): what a row more does to the masks of others, it does to none that is known.
What random rows do not show at the layers is looked for in each operation (`watching`). Where threads share tensors out
such that vectors end within one, a microbatch of half the rows is tried.

Not promised: to notice what random numbers hide, but in functions of single elements. A compiled microbatch is not
watched. All holds for the number of threads that there are at the start.

Shapes: N rows of a rank, B rows of a microbatch, D inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from cloister.errors import InputError
from cloister.privacy.watching import Watch, same

# Microbatches have a multiple of one of these rows. Below four, libraries multiply by other kernels; and where rows are
# no multiples of pairs of vectors, the last elements of a microbatch go through other functions.
_STEPS = (4, 8, 16, 32)
_MOST_MULTIPLES = 16  # or to try them takes long
_FILLS = 2  # so many are watched at least: where there are fewer, several times, with other rows
_FEWEST = 8  # rows, where a smaller microbatch is tried in place of one that does not fit
_DROPOUTS = (
    torch.dropout, functional.dropout, functional.alpha_dropout, functional.dropout1d, functional.dropout2d,
    functional.dropout3d, functional.feature_alpha_dropout,
)  # fmt: skip
_DROPOUT_OF_ATTENTION = 4  # the argument's place: query, key, value, mask, dropout


def random_inputs(model: nn.Module, x_ND: torch.Tensor, rows: int) -> torch.Tensor:
    """Random numbers, the same each time, for `model`: of the shape and type of x_ND, which is not read."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, *x_ND.shape[1:])
    if x_ND.is_floating_point():
        return torch.rand(shape, generator=generator, dtype=x_ND.dtype).to(x_ND.device)
    tables = [layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)]
    return torch.randint(0, min(tables, default=2), shape, generator=generator, dtype=x_ND.dtype).to(x_ND.device)


def public_rows(
    model: nn.Module, x_ND: torch.Tensor, y_N: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs, and labels of the shape and type of y_N, which is not read either.

    Inputs have both signs and many sizes: functions are computed otherwise beyond 1 or below 0. Where the model takes
    no such numbers, because it looks places up by them, they are in [0, 1).
    """
    generator = torch.Generator().manual_seed(0)
    x = random_inputs(model, x_ND, rows)
    with torch.no_grad():
        if x.is_floating_point():
            sizes = 2.0 ** torch.randint(-4, 4, (rows, *[1] * (x.dim() - 1)), generator=generator)
            signed = (torch.randn(x.shape, generator=generator) * sizes).to(x)
            try:
                classes, x = model(signed).shape[-1], signed
            except Exception:  # noqa: BLE001 - the model's own, whatever it says to such numbers
                classes = model(x).shape[-1]
        else:
            classes = model(x).shape[-1]
    y = torch.randint(0, classes, (rows, *y_N.shape[1:]), generator=generator)
    return x, y.to(y_N.device, y_N.dtype)


@contextlib.contextmanager
def tried(model: nn.Module, *, compiled: bool = False) -> Iterator[None]:
    """Within the block, the model trains with random weights and without dropout; all it had is back afterwards.

    Weights that do not train stay: models may keep what follows from them. Where the model is `compiled`, only layers
    stop dropping; functions are in the graph.
    """
    generator = torch.Generator().manual_seed(0)
    modes = [(layer, layer.training) for layer in model.modules()]
    drops = {layer: layer.p for layer in model.modules() if isinstance(layer, nn.modules.dropout._DropoutNd)}
    weights = [(weight, weight.detach().clone()) for weight in model.parameters() if weight.requires_grad]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        with torch.no_grad():
            for weight, kept in weights:
                inputs = kept.numel() / max(1, len(kept)) if kept.dim() > 1 else 1.0
                weight.copy_(torch.randn(kept.shape, generator=generator) / math.sqrt(max(1.0, inputs)))
        model.train()
        for dropping in drops:
            dropping.p = 0.0
        with contextlib.nullcontext() if compiled else _WithoutDropout():
            yield
    finally:
        for dropping, share in drops.items():
            dropping.p = share
        for layer, training in modes:
            layer.training = training
        with torch.no_grad():
            for tensor, kept in (*weights, *buffers):
                tensor.copy_(kept)


class _WithoutDropout(TorchFunctionMode):
    """In this thread, functions that drop numbers give them back, and attention drops none."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:_DROPOUT_OF_ATTENTION], *((0.0,) if len(args) > _DROPOUT_OF_ATTENTION else ()),
                    *args[_DROPOUT_OF_ATTENTION + 1 :])  # fmt: skip
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return func(*args, **kwargs)


def fitting(
    computed: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]],
    public: Callable[[int], tuple[torch.Tensor, torch.Tensor]], rows: int, *,
    passed: Callable[[torch.Tensor, torch.Tensor], object] | None,
) -> tuple[int, int]:  # fmt: skip
    """How many rows a microbatch has at most, and of what number it has a multiple: filled up by others of no weight.

    What is `computed` of each row, [B, ...] each, has the same bits in each place of a microbatch, and at each
    multiple. So has what each operation makes of it when rows are `passed` forward and back. Where that is None, all is
    one graph: a microbatch always has the same number of rows. `public` makes rows to try this with.

    Raises:
        InputError: it has not, or nothing is seen of it.
    """
    if passed is None:
        most = rounded_up(rows, _STEPS[-1])  # the surest: a graph is made once
        if _is_alike(computed, public, most, [most] * 4):
            return rows, most
        raise _another_row_shows()
    for step in _STEPS:
        if rows > _MOST_MULTIPLES * step:
            continue
        most = rounded_up(rows, step)
        fills = list(range(step, most + 1, step))
        if _is_alike(computed, public, most, fills) and _is_alike_when_watched(passed, public, most, fills):
            return rows, step
    if rows >= 2 * _FEWEST:
        # Kernels go by size, and threads share large tensors out: vectors end where a share does.
        return fitting(computed, public, rows // 2, passed=passed)
    raise _another_row_shows()


def _another_row_shows() -> InputError:
    return InputError(
        "this device computes a row otherwise when others are beside it, so that one row would show in all",
        "let hidden layers be 8, or 12 or more, wide; keep rows apart; drop numbers by nn.Dropout alone",
    )


def _is_alike(
    computed: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]],
    public: Callable[[int], tuple[torch.Tensor, torch.Tensor]], most: int, fills: Sequence[int],
) -> bool:  # fmt: skip
    """Whether rows are computed alike in other places, in microbatches of so many, and always beside others."""
    x, y = public(2 * most)
    halves = [[each.detach().clone() for each in computed(x[i : i + most], y[i : i + most])] for i in (0, most)]
    expected = [torch.cat(each) for each in zip(*halves, strict=True)]
    finite_B = torch.stack([torch.isfinite(each.reshape(len(each), -1)).all(1) for each in expected]).all(0)
    if 2 * int(finite_B.sum()) < len(x):
        raise InputError(
            "with random weights and rows the model's gradients are not finite: this device cannot be tried",
            "let the model give finite numbers for weights around 0, and inputs of up to 50",
        )
    for some in _elsewhere(len(x), fills, x.device):
        found = zip(computed(x[some], y[some]), expected, strict=True)
        if not all(same(got.detach(), each[some]) for got, each in found):
            return False
    return True


def _is_alike_when_watched(
    passed: Callable[[torch.Tensor, torch.Tensor], object], public: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    most: int, fills: Sequence[int],
) -> bool:  # fmt: skip
    """The same of each operation; several times, with other rows, where there are few fills."""
    draws = -(-_FILLS // len(fills))
    x, y = public((draws + 1) * most)
    watch = Watch()
    with watch.learning(2 * most):
        passed(x[: 2 * most], y[: 2 * most])
    for draw in range(draws):
        own_x, own_y = (t[draw * most : (draw + 1) * most] for t in (x, y))
        with watch.expecting(most):
            passed(own_x, own_y)
        for some in _elsewhere(most, fills, x.device, draw):
            some_x, some_y = own_x[some], own_y[some]
            with watch.comparing(some):
                passed(some_x, some_y)
            if not watch.alike:
                return False
    return True


def _elsewhere(rows: int, fills: Sequence[int], device: torch.device, draw: int = 0) -> Iterator[torch.Tensor]:
    """For each fill, the numbers of so many of the rows, in random order: none of them is in its own place."""
    generator = torch.Generator().manual_seed(1 + draw)
    for fill in fills:
        order = torch.randperm(rows, generator=generator)
        some = torch.empty_like(order)
        some[order] = order.roll(1)  # one cycle
        yield some[:fill].to(device)


Kind = tuple[object, ...]
"""What rows have in common with those that were tried: shape and type of inputs and labels, and the device."""


def kind_of(x_ND: torch.Tensor, y_N: torch.Tensor) -> Kind:
    return tuple(x_ND.shape[1:]), x_ND.dtype, x_ND.device, tuple(y_N.shape[1:]), y_N.dtype


def require_kind(kind: Kind, x_ND: torch.Tensor, y_N: torch.Tensor) -> None:
    """Refuse rows of another kind than `kind`. They are not tried in their turn: where a batch is as long as its
    longest row, that row changes the numbers of all.

    Raises:
        InputError: they are.
    """
    if kind_of(x_ND, y_N) != kind:
        raise InputError(
            "these rows have another shape or type than those that were tried, or are on another device",
            "give all rows one length, whichever are in a batch; or close this engine, and make another",
        )


def rounded_up(rows: int, step: int) -> int:
    return -(-rows // step) * step


def filled(x: torch.Tensor, y: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of x and y, and of their first row up to so many rows, and a mask [B] that is 0 for those.

    Always copies: where in memory a part of a batch begins, depends on how many rows are before it.
    """
    mask_B = torch.ones(rows, device=x.device)
    mask_B[len(x) :] = 0.0
    x, y = (torch.cat([t, t[:1].expand(rows - len(t), *t.shape[1:])]) for t in (x, y))
    return x, y, mask_B


def without(
    bad_B: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and mask with copies of another row, of no weight, in the places of bad ones."""
    good = int((~bad_B).nonzero()[0])
    place_B = torch.arange(len(x), device=x.device).masked_fill(bad_B, good)
    return x[place_B], y[place_B], mask_B.masked_fill(bad_B, 0.0)


def align_rows(model: nn.Module) -> list[RemovableHandle]:
    """Hooks that let the rows of each linear layer's input begin at multiples of 16 bytes.

    MKL rounds by that in layers of few outputs: a row more in front would change all that come after it.
    """

    def aligned(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not inputs:
            return inputs
        x = inputs[0]
        if x.is_cuda or not any(places % 4 for places in (x.shape[-1], *x.stride()[:-1])):
            return inputs
        return (nn.functional.pad(x.contiguous(), (0, -x.shape[-1] % 4))[..., : x.shape[-1]], *inputs[1:])

    return [layer.register_forward_pre_hook(aligned) for layer in model.modules() if isinstance(layer, nn.Linear)]
