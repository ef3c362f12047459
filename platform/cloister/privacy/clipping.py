# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""Per-row gradient clipping: the sum over a batch of gradients of at most norm C each, in one backward pass.

Guarantees, for a model that `check_layers` accepts and whose forward pass keeps rows apart:

    case                                     contribution of the row to the sum
    gradient norm below C                    the gradient
    gradient norm above C                    the gradient scaled to norm C (less a margin for float32 rounding)
    loss, input or gradient not finite       0; the other rows are as if it were absent
    padding (mask 0)                         0
    empty batch                              the sum is zero, not an error

so that adding or removing one row moves the sum by at most C·(1 + SLACK) in the Euclidean norm: `grid` proves it. Norms
are float32, whatever the model computes in: bfloat16 ghost norms come out as low as 0.69 of the truth. Rows are summed
in blocks (`blocks`), and blocks on a grid. With `per_layer`, each of L layers is clipped to C/√L instead: the same
bound on the whole.

No row is computed otherwise because others are beside it: `microbatch` sees to that, or nothing is trained. So rows are
of one shape, whichever are in a batch.

How (book-keeping, arXiv 2210.00038): hooks note each layer's input and output; one backward pass gives the outputs'
gradients and no weight's; from both, `layers` tells each row's norm, and, once norms have become weights, the weighted
sum. Work per row beyond plain training: the norms. Parameters that a module uses itself have a copy for each row
(`broadcast`).

Not promised: to notice a custom `forward` that mixes rows. `training.rehearsal` tries that on public rows; layers that
are known to do so are refused by name.

Shapes: B rows of a batch, D inputs, C classes, L layers, P trainable parameters, flattened in the order of
`model.parameters()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from cloister.errors import InputError, IntegrityError
from cloister.privacy.blocks import Blocks, ranges_for, spread
from cloister.privacy.broadcast import Broadcast, not_broadcast, uses_its_own
from cloister.privacy.gradients import RowGradients, Slices
from cloister.privacy.grid import MOST_ROWS, Grid
from cloister.privacy.layers import RULES, Use, trains, unsupported_option
from cloister.privacy.microbatch import (
    Kind,
    align_rows,
    filled,
    fitting,
    kind_of,
    public_rows,
    require_kind,
    rounded_up,
    tried,
    without,
)
from cloister.privacy.parameters import Parameters
from cloister.privacy.products import faster_layers, require_whole_products

_MIXING_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# Relative slack below C for float32 rounding of a row's norm and weight.
ROUNDING_MARGIN = 1e-6
# What inputs and outputs of the layers of one microbatch may take: it should stay in the last cache of a CPU, and on
# a GPU keep all of it busy. Measured with benchmarks/dp_step.py; twice as much or half costs up to a quarter. But each
# microbatch also adds to the whole sum: it should have more to work on than that, by this factor.
_TAPE_BYTES = {"cpu": 20e6, "cuda": 2e9}
_TAPE_PER_SUM = 16
_FEWEST_ROWS, _MOST_ROWS = 16, 512  # of a microbatch; with the fewest, its size is found
# How often rows that are not finite are replaced in a compiled graph. Once, if the model keeps rows apart and has no
# dropout.
_REPLACEMENTS = 3
_ENGAGED = "_has_clipping_engine"  # of a layer
# How PyTorch says that something is changed in place where gradients begin.
_IN_PLACE = "a leaf Variable that requires grad"


class ClippedGradients(Protocol):
    """One clipping engine around one model. The contract is the table at the top of the module."""

    def ranges(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> int:
        """Into how many ranges the rows of a batch are to be put. Of x_ND and y_N, shapes and types alone are read.

        The first call tries, on rows of random numbers, that this device computes a row alike whatever is beside it.
        All rows are of one shape and type, which is that of the first.

        Raises:
            InputError: it does not, or rows are of another.
        """
        ...

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        """The sum [P], float64, of the clipped gradients of the rows, which are in the order of `blocks`.

        Each element is a whole number of the grid's units. The model's own `.grad` fields are left empty.

        Raises:
            InputError: as `ranges`.
        """
        ...

    def close(self) -> None:
        """Take the engine off the model, which another may have then."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippingOptions:
    """How an engine works, not what it computes."""

    microbatch_rows: int | None = None
    """How many rows are worked on at once; by default, what fits the machine's caches best."""
    per_layer: bool = False
    compiled: bool = False
    """Through `torch.compile`: microbatches then have one fixed shape, the last padded and masked."""
    autocast: torch.dtype | None = None
    """The precision of the forward and backward pass; norms and sums stay float32."""
    tried: bool = True
    """Off only where nothing is released: a rehearsal finds out why a model computes a row otherwise beside others."""

    def __post_init__(self) -> None:
        if self.microbatch_rows is not None and self.microbatch_rows < 1:
            raise ValueError("a microbatch has at least one row")


def row_losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B]: cross-entropy of [B, C] logits with [B] labels, or the mean over T positions of [B, T, C] with [B, T]."""
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, y, reduction="none")
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape).mean(1)


def check_layers(model: nn.Module, supported: Callable[[nn.Module], bool] | None = None) -> None:
    """Accept only layers whose per-row gradients the engine is known to compute, and that no engine has hooks on.

    Raises:
        InputError: naming the layer.
    """
    for name, layer in model.named_modules():
        if _ENGAGED in vars(layer):  # each would see the other's passes
            raise InputError(
                f"layer '{name}' ({type(layer).__name__}) has a clipping engine already",
                "close that one first, and copy models before they have one",
            )
        label = f"layer '{name}' ({type(layer).__name__})"
        if isinstance(layer, _MIXING_LAYERS):
            raise InputError(f"{label} mixes the rows of a batch, so no row's gradient can be clipped", "use GroupNorm")
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if not own:
            continue
        if type(layer) not in RULES and not uses_its_own(layer):
            known = ", ".join(sorted(kind.__name__ for kind in RULES))
            raise InputError(f"{label} cannot be trained privately", f"freeze it, or build it from {known}")
        option = unsupported_option(layer)
        if option is not None:
            raise InputError(f"{label} cannot be trained privately with {option}", "leave that option out")
        if supported is not None and not supported(layer):
            raise InputError(f"{label} cannot be trained by this engine", "use engine: bookkeeping")
        if any(parameter.dtype != torch.float32 for parameter in own):
            raise InputError(f"{label} is not float32", "keep parameters in float32; autocast may lower the rest")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model has no trainable parameter", "unfreeze a layer")


def engage(model: nn.Module) -> None:
    """Mark the layers as those of a model that has an engine, until `release`."""
    for layer in model.modules():
        vars(layer)[_ENGAGED] = True


def release(model: nn.Module) -> None:
    for layer in model.modules():
        vars(layer).pop(_ENGAGED, None)


class BookkeepingGradients:
    """Book-keeping around `model`, under cross-entropy. Memory is bounded by `options.microbatch_rows`."""

    def __init__(
        self,
        model: nn.Module,
        grid: Grid,
        options: ClippingOptions | None = None,
        losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = row_losses,
    ) -> None:
        """Put hooks on the model, until `close`.

        Raises:
            InputError: a layer that cannot be trained privately, or has an engine; or products that are rounded.
        """
        self._options = options or ClippingOptions()
        self._grid = grid
        check_layers(model)
        require_whole_products()
        self._model, self._losses, self._own = model, losses, Broadcast(model)
        self._parameters = Parameters(model)
        groups = self._parameters.layers if self._options.per_layer else 1
        self._bound = grid.bound * (1.0 - ROUNDING_MARGIN) / groups**0.5
        self._tape: list[Use] = []
        self._noting = False
        self._kind: Kind | None = None  # of rows that were tried
        self._rows = self._step = 0  # of a microbatch, and of what it has a multiple
        self._block_rows = self._several = 0  # of a block, and of one of several positions
        self._waiting: list[torch.Tensor] = []
        self._probes: list[torch.Tensor] | None = None
        self._calls: list[Use] = []
        self._faster = [] if self._options.compiled or self._options.autocast else faster_layers(model)
        self._hooks = align_rows(model) + [
            layer.register_forward_hook(self._note(name))
            for name, layer in model.named_modules()
            if type(layer) in RULES and trains(layer)
        ]
        engage(model)
        self._closed = False
        if self._options.compiled:
            self._compiled_sums = torch.compile(self._sums_with_probes, fullgraph=True, dynamic=False)

    def ranges(self, x_ND: torch.Tensor, y_N: torch.Tensor) -> int:
        if self._kind is None:
            with tried(self._model, compiled=self._options.compiled):
                x, y = public_rows(self._model, x_ND, y_N, _FEWEST_ROWS)
                self._own.fit(x)
                try:
                    self._prepare(x, y)
                except InputError:
                    if not self._faster:
                        raise
                    while self._faster:  # others may compute rows alike
                        self._faster.pop().remove()
                    self._prepare(x, y)
            self._kind = kind_of(x_ND, y_N)
        require_kind(self._kind, x_ND, y_N)
        return ranges_for(self._grid.rows_a_rank, self._block_rows)

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        total_P = torch.zeros(sum(self._parameters.sizes), dtype=torch.float64, device=x_BD.device)
        if not len(x_BD):
            return total_P
        ranges = self.ranges(x_BD, y_B)
        blocks = blocks or Blocks(spread(len(x_BD)), ranges)
        add = self._add_compiled if self._options.compiled else self._add_eager
        parts = [
            part.view(shape)
            for part, shape in zip(torch.split(total_P, self._parameters.sizes), self._parameters.shapes, strict=True)
        ]
        # A compiled microbatch is summed as a whole: it is no larger than the smallest block, and is one.
        together = 0 if self._options.compiled else self._rows
        for microbatch in blocks.microbatches(together, self._block_rows):
            start, stop = microbatch[0][0], microbatch[-1][1]
            x, y, mask_B = filled(x_BD[start:stop], y_B[start:stop], rounded_up(stop - start, self._step))
            add(parts, x, y, mask_B, blocks.within(microbatch))
        return total_P

    def close(self) -> None:
        if self._closed:  # there may be another engine by now
            return
        self._closed = True
        release(self._model)
        for hook in (*self._faster, *self._hooks):
            hook.remove()
        self._tape.clear()

    def _prepare(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Choose how many rows a microbatch has, and see that they do not depend on each other: on rows like these.

        Raises:
            InputError: they do.
        """
        uses = self._passed(x, y)
        with torch.no_grad():
            gradients = self._parameters.gradients(uses)
        row_bytes = sum(t.numel() * t.element_size() for use in uses for t in (use.a, use.output)) / len(x)
        self._several = min((g.rows_at_once() for g in gradients if g is not None), default=MOST_ROWS)
        tape_bytes = max(
            _TAPE_BYTES.get(x.device.type, _TAPE_BYTES["cpu"]), _TAPE_PER_SUM * 4 * sum(self._parameters.sizes)
        )
        fit = 1 << max(0, int(tape_bytes / row_bytes).bit_length() - 1)
        most = self._several if self._options.compiled else _MOST_ROWS
        self._rows = min(self._options.microbatch_rows or max(_FEWEST_ROWS, fit), most)
        self._step = 1
        if self._options.tried:
            self._rows, self._step = fitting(
                self._computed, lambda rows: public_rows(self._model, x, y, rows), self._rows,
                passed=None if self._options.compiled else self._passed,
            )  # fmt: skip
        # Two blocks a microbatch at least, or many rows would be missing from it.
        self._block_rows = self._rows if self._options.compiled else min(max(1, self._rows // 2), MOST_ROWS)

    def _computed(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """What is computed of each row, as its gradient follows from it: [B, ...] each."""
        if self._options.compiled:
            return list(self._graph(x, y, torch.ones(len(x), device=x.device))[1:])
        ones_B = torch.ones(len(x), device=x.device)
        uses = self._passed(x, y)
        weighed = self._weigh(uses, torch.zeros_like(ones_B), ones_B)
        parts = [gradients.made_of() for gradients, _ in weighed.gradients if gradients is not None]
        return [weighed.squares, *(each for part in parts for each in part)]

    def _passed(self, x: torch.Tensor, y: torch.Tensor) -> list[Use]:
        losses_B, uses = self._forward(x, y, torch.ones(len(x), device=x.device))
        self._backward(losses_B, uses)
        return uses

    def _add_eager(
        self, parts: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor, blocks: Slices
    ) -> None:
        losses_B, uses = self._forward(x, y, mask_B)
        self._backward(losses_B, uses)
        with torch.no_grad():
            weighed = self._weigh(uses, losses_B, mask_B)
            if not bool(weighed.finite.all()):
                # Zero times infinity is no zero: what is not finite goes, and other rows have no part in it.
                for use in uses:
                    use.a, use.g = (_where(weighed.finite, t) for t in (use.a, use.g))
                weighed = self._weigh(uses, _where(weighed.finite, losses_B), mask_B * weighed.finite)
            for part, (gradients, weights_B) in zip(parts, weighed.gradients, strict=True):
                if gradients is not None:
                    gradients.add_weighted(weights_B, part, self._grid, blocks)

    def _backward(self, losses_B: torch.Tensor, uses: list[Use]) -> None:
        for use in uses:
            if use.output._version != use.version:
                raise _changed_in_place(use.name)
        found = torch.autograd.grad(losses_B.sum(), [use.output for use in uses], allow_unused=True)
        for use, g in zip(uses, found, strict=True):
            use.g = g if g is not None else torch.zeros_like(use.output)
            use.output = use.g  # the graph may go

    def _add_compiled(
        self, parts: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor, _blocks: Slices
    ) -> None:
        """Others take the places of bad rows."""
        for _ in range(_REPLACEMENTS):
            sums, losses_B, squares_BM = self._graph(x, y, mask_B)
            finite_B = torch.isfinite(losses_B) & torch.isfinite(squares_BM).all(1)
            if bool(finite_B.all()):
                for part, block in zip(parts, sums, strict=True):
                    self._grid.add(part, block)
                return
            if not bool(finite_B.any()):
                return
            x, y, mask_B = without(~finite_B, x, y, mask_B)
        raise IntegrityError("rows that are not finite spread to others", "keep rows apart in the model's forward pass")

    def _graph(
        self, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        if self._probes is None:
            with torch.no_grad():
                self._calls = self._forward(x, y, mask_B)[1]
            self._probes = [torch.zeros_like(use.output) for use in self._calls]
            for use in self._calls:
                use.a = use.output = self._probes[0]  # rows are not kept
        with torch.no_grad():  # from outside: no gradient of a parameter is asked for
            return self._compiled_sums(self._probes, x, y, mask_B)

    def _sums_with_probes(
        self, probes: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """As `_add_eager`, in one graph: the gradient of a zero that is added to an output is the output's."""

        def loss(probes: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, list[torch.Tensor]]]:
            losses_B, uses = self._forward(x, y, mask_B, probes)
            return losses_B.sum(), (losses_B, [use.a for use in uses])

        found, (losses_B, inputs) = torch.func.grad(loss, has_aux=True)(probes)
        calls = zip(self._calls, inputs, found, strict=True)
        uses = [Use(call.name, call.layer, a, a, 0, g, call.parameter) for call, a, g in calls]
        weighed = self._weigh(uses, losses_B, mask_B, in_graph=True)
        sums = [
            torch.zeros(shape, device=x.device) if gradients is None else gradients.weighted_sum(weights_B)
            for shape, (gradients, weights_B) in zip(self._parameters.shapes, weighed.gradients, strict=True)
        ]
        return sums, losses_B, weighed.squares

    def _forward(
        self, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor, probes: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[Use]]:
        self._tape, self._waiting = [], list(probes or [])
        compiling = probes is not None
        frozen: contextlib.AbstractContextManager[None] = (
            contextlib.nullcontext() if compiling else self._parameters.frozen()
        )
        self._noting = True
        with self._precision(x), frozen:
            copies: dict[str, torch.Tensor] = {}
            try:
                copies |= {
                    own.full_name: self._noted(own.of, own.layer, copy, copy, own.name)
                    for own, copy in self._own.copies(len(x))
                }
                losses_B = self._losses(self._own.logits(x, copies), y).float() * mask_B
            except RuntimeError as error:
                if _IN_PLACE in str(error) and self._tape:
                    raise _changed_in_place(self._tape[-1].name) from error
                if copies:  # of another number of rows than they were tried with
                    raise not_broadcast(next(iter(copies))) from error
                raise
            finally:
                self._noting = False
        uses, self._tape = self._tape, []
        for use in uses:
            if len(use.a) != len(x) or len(use.output) != len(x):
                raise InputError(
                    f"layer '{use.name}' is called on other rows than the batch's",
                    "keep the batch the first dimension; expand positions to [B, T]",
                )
        return losses_B, uses

    def _precision(self, x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
        if self._options.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, dtype=self._options.autocast)

    def _note(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if not self._noting:  # somebody else's pass
                return output
            if not inputs:
                raise InputError(f"layer '{name}' is called with its input by keyword", "pass it by position")
            return self._noted(name, layer, inputs[0].detach(), output)

        return hook

    def _noted(
        self, name: str, layer: nn.Module, a: torch.Tensor, output: torch.Tensor, parameter: str | None = None
    ) -> torch.Tensor:
        version = 0
        if self._waiting:
            output = output + self._waiting.pop(0)
        elif torch.is_grad_enabled():
            # No parameter asks for a gradient: autograd would compute each weight's. They begin here.
            output.requires_grad_()
            version = output._version
        self._tape.append(Use(name, layer, a, output, version, parameter=parameter))
        return output

    def _weigh(
        self, uses: list[Use], losses_B: torch.Tensor, mask_B: torch.Tensor, *, in_graph: bool = False
    ) -> _Weighed:
        gradients = self._parameters.gradients(uses)
        for each in gradients:
            if each is not None:
                each.in_blocks_of(self._several)
        whole = not self._options.per_layer
        squares = self._parameters.squared_norms(gradients, in_graph=in_graph)
        norms_LB = self._parameters.norms_of_layers(squares, whole=whole)
        finite_B = torch.isfinite(losses_B) & torch.isfinite(norms_LB).all(0)
        weights_LB = mask_B * (self._bound / norms_LB.clamp_min(self._bound))
        places = [0] * len(gradients) if whole else self._parameters.layer
        weighted = [(rows, weights_LB[place]) for rows, place in zip(gradients, places, strict=True)]
        return _Weighed(weighted, finite_B, torch.stack([value_B for _, value_B in squares], dim=1))


class _Weighed(NamedTuple):
    """Each parameter's gradients with the rows' weights [B]; which rows are finite [B]; each one's squared norms."""

    gradients: list[tuple[RowGradients | None, torch.Tensor]]
    finite: torch.Tensor
    squares: torch.Tensor


def _changed_in_place(name: str) -> InputError:
    return InputError(f"the output of layer '{name}' is changed in place", "use inplace=False after it")


def _where(keep_B: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None  # noqa: S101  (a use's gradient, after the backward pass)
    shape = (len(keep_B), *[1] * (values.dim() - 1))
    return torch.where(keep_B.view(shape), values, torch.zeros((), dtype=values.dtype, device=values.device))
