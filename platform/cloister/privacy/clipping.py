# ruff: noqa: N803, N806 - the letters after a tensor's name are its shape
"""Per-row gradient clipping: the sum over a batch of gradients of at most norm C each, in one backward pass.

Guarantees, for a model that `check_layers` accepts and whose forward pass keeps rows apart:

    case                                     contribution of the row to the sum
    gradient norm below C                    the gradient
    gradient norm above C                    the gradient scaled to norm C (less a margin for float32 rounding)
    loss, input or gradient not finite       0; the other rows are as if it were absent
    padding (mask 0)                         0
    empty batch                              the sum is zero, not an error

so that adding or removing one row moves the exact sum by at most C in the Euclidean norm. Norms are float32, whatever
the model computes in: bfloat16 ghost norms come out as low as 0.69 of the truth. Sums over microbatches are float64;
what rounding adds to a row's effect, the noise is scaled for: see `sensitivity_slack`. So that no row is computed by
other kernels because of the others, microbatches are filled up with rows of no weight, to a multiple of `_ROWS_ALIKE`
or to `microbatch_rows`, and rows are aligned (`align_rows`). Not promised: that every kernel of every library rounds
a row alike wherever it stands in a batch; linear layers of PyTorch on CPUs do, as far as was tried.
With `per_layer`, each of L layers is clipped to C/√L instead: the same bound on the whole.

How (book-keeping, arXiv 2210.00038): hooks note each layer's input and output; one backward pass gives the outputs'
gradients and no weight's; from both, `layers` tells each row's norm, and, once norms have become weights, the weighted
sum. Work per row beyond plain training: the norms.

Not promised: to notice a custom `forward` that mixes rows. `training.rehearsal` tries that on public rows; layers that
are known to do so are refused by name.

Shapes: B rows of a batch, D inputs, C classes, L layers, P trainable parameters, flattened in the order of
`model.parameters()`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cloister.errors import InputError, IntegrityError
from cloister.privacy.layers import CANCELLED, RULES, RowGradients, Tied, Use, row_gradients, unsupported_option

_MIXING_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# Relative slack below C for float32 rounding of a row's norm and weight.
ROUNDING_MARGIN = 1e-6
# What inputs and outputs of the layers of one microbatch may take: it should stay in the last cache of a CPU, and on
# a GPU keep all of it busy. Measured with benchmarks/dp_step.py; twice as much or half costs up to a quarter. But each
# microbatch also adds to the whole sum: it should have more to work on than that, by this factor. Beyond 512 rows small
# models gain 4 % and take a fifth more memory.
_TAPE_BYTES = {"cpu": 20e6, "cuda": 2e9}
_TAPE_PER_SUM = 16
_MICROBATCH_ROWS = (16, 512)
# Libraries compute one row, or three, by other kernels than sixteen. Where a last bit decides, such as at the kink of a
# ReLU, a row more in the batch would change the gradients of others: so there are as many as this, or a multiple.
_ROWS_ALIKE = 16
# How often rows that are not finite are replaced. Once, if the model keeps rows apart.
_REPLACEMENTS = 3
_FLOAT32_ROWS = 1024
# How PyTorch says that something is changed in place where gradients begin.
_IN_PLACE = "a leaf Variable that requires grad"


def sensitivity_slack(expected_batch_size: float) -> float:
    """What float32 may add to the effect of one row on the sum, relative to C: at least three times what was seen.

    One row more shifts all the others in their microbatches, whose sums then round differently: with nearly equal rows
    by up to 1.3e-4 for 1,024 of them and 4.5e-4 for 10,000.
    """
    return 5e-4 * max(1.0, math.sqrt(expected_batch_size / _FLOAT32_ROWS))


class ClippedGradients(Protocol):
    """One clipping engine around one model. The contract is the table at the top of the module."""

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        """The sum [P], float64, of the clipped gradients of the rows. The model's own `.grad` fields are left empty."""
        ...

    def close(self) -> None:
        """Take the engine off the model."""
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

    def __post_init__(self) -> None:
        if self.microbatch_rows is not None and self.microbatch_rows < 1:
            raise ValueError("a microbatch has at least one row")


def row_losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B]: cross-entropy of [B, C] logits with [B] labels, or the mean over T positions of [B, T, C] with [B, T]."""
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, y, reduction="none")
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape).mean(1)


def check_layers(model: nn.Module, supported: Callable[[nn.Module], bool] | None = None) -> None:
    """Accept only layers whose per-row gradients the engine is known to compute.

    Raises:
        InputError: naming the layer.
    """
    for name, layer in model.named_modules():
        label = f"layer '{name}' ({type(layer).__name__})"
        if isinstance(layer, _MIXING_LAYERS):
            raise InputError(f"{label} mixes the rows of a batch, so no row's gradient can be clipped", "use GroupNorm")
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if not own:
            continue
        if type(layer) not in RULES:
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


class BookkeepingGradients:
    """Book-keeping around `model`, under cross-entropy. Memory is bounded by `options.microbatch_rows`."""

    def __init__(
        self,
        model: nn.Module,
        max_grad_norm: float,
        options: ClippingOptions | None = None,
        losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = row_losses,
    ) -> None:
        """Put hooks on the model, until `close`.

        Raises:
            InputError: a layer that cannot be trained privately, or products that are rounded.
        """
        self._options = options or ClippingOptions()
        if not 0.0 < max_grad_norm < float("inf"):
            raise ValueError("max_grad_norm is positive and finite")
        self._rows = self._options.microbatch_rows
        check_layers(model)
        require_whole_products()
        self._model, self._losses = model, losses
        self._parameters = _Parameters(model)
        groups = self._parameters.layers if self._options.per_layer else 1
        self._bound = max_grad_norm * (1.0 - ROUNDING_MARGIN) / groups**0.5
        self._tape: list[Use] = []
        self._sums: _Sums | None = None
        self._waiting: list[torch.Tensor] = []
        self._probes: list[torch.Tensor] | None = None
        self._calls: list[Use] = []
        self._hooks = align_rows(model) + [
            layer.register_forward_hook(self._note(name)) for name, layer in model.named_modules() if trains(layer)
        ]
        self._microbatch: Callable[..., tuple[torch.Tensor, _Add]] = self._eager
        if self._options.compiled:
            self._compiled_sums = torch.compile(self._sums_with_probes, fullgraph=True, dynamic=False)
            self._microbatch = self._compiled

    def __call__(self, x_BD: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        sums = self._sums = self._sums or _Sums(self._parameters.shapes, x_BD.device)
        if not len(x_BD):
            return sums.take()
        rows = self._rows = self._rows or self._fitting(x_BD, y_B)
        for start in range(0, len(x_BD), rows):
            x, y = x_BD[start : start + rows], y_B[start : start + rows]
            x, y, mask_B = filled(x, y, rows if self._options.compiled else min(rows, rows_alike(len(x))))
            self._add_finite(sums, x, y, mask_B)
            sums.count(len(x))
        return sums.take()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._tape.clear()

    def _fitting(self, x: torch.Tensor, y: torch.Tensor) -> int:
        """How many rows a microbatch should have, by what the first few take; a power of two."""
        fewest, most = _MICROBATCH_ROWS
        x, y = x[:fewest], y[:fewest]
        with torch.no_grad():
            uses = self._forward(x, y, torch.ones(len(x), device=x.device))[1]
        row_bytes = sum(t.numel() * t.element_size() for use in uses for t in (use.a, use.output)) / len(x)
        sum_bytes = 4 * sum(shape.numel() for shape in self._parameters.shapes)
        tape_bytes = max(_TAPE_BYTES.get(x.device.type, _TAPE_BYTES["cpu"]), _TAPE_PER_SUM * sum_bytes)
        fitting = int(tape_bytes / row_bytes)
        return max(fewest, min(most, 1 << max(0, fitting.bit_length() - 1)))

    def _add_finite(self, sums: _Sums, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor) -> None:
        """Add the rows that are finite: zero times infinity would be no zero, so others take the places of the rest."""
        for _ in range(_REPLACEMENTS):
            finite_B, add = self._microbatch(x, y, mask_B)
            if bool(finite_B.all()):
                add(sums.parts)
                return
            if not bool(finite_B.any()):
                return
            x, y, mask_B = without(~finite_B, x, y, mask_B)
        raise IntegrityError("whether a row's gradient is finite depends on the others", "compute each row by itself")

    def _eager(self, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor) -> tuple[torch.Tensor, _Add]:
        losses_B, uses = self._forward(x, y, mask_B)
        for use in uses:
            if use.output._version != use.version:
                raise _changed_in_place(use.name)
        found = torch.autograd.grad(losses_B.sum(), [use.output for use in uses], allow_unused=True)
        for use, g in zip(uses, found, strict=True):
            use.g = g if g is not None else torch.zeros_like(use.output)
            use.output = use.g  # the graph may go
        with torch.no_grad():
            weighed = self._weigh(uses, losses_B.detach(), mask_B, in_graph=False)

        def add(parts: list[torch.Tensor]) -> None:
            for part, (gradients, weights_B) in zip(parts, weighed.gradients, strict=True):
                if gradients is not None:
                    gradients.add_weighted_sum(weights_B, part)

        return weighed.finite, torch.no_grad()(add)

    def _compiled(self, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor) -> tuple[torch.Tensor, _Add]:
        if self._probes is None:
            with torch.no_grad():
                self._calls = self._forward(x, y, mask_B)[1]
            self._probes = [torch.zeros_like(use.output) for use in self._calls]
            for use in self._calls:
                use.a = use.output = self._probes[0]  # rows are not kept
        with torch.no_grad():  # from outside: no gradient of a parameter is asked for
            sums, finite_B, cancelled = self._compiled_sums(self._probes, x, y, mask_B)
        if bool(cancelled):
            return self._eager(x, y, mask_B)
        return finite_B, lambda parts: torch._foreach_add_(parts, sums)

    def _sums_with_probes(
        self, probes: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """As `_eager`, in one graph: the gradient of a zero that is added to an output is the output's."""

        def loss(probes: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, list[torch.Tensor]]]:
            losses_B, uses = self._forward(x, y, mask_B, probes)
            return losses_B.sum(), (losses_B, [use.a for use in uses])

        found, (losses_B, inputs) = torch.func.grad(loss, has_aux=True)(probes)
        calls = zip(self._calls, inputs, found, strict=True)
        uses = [Use(call.name, call.layer, a, a, 0, g) for call, a, g in calls]
        weighed = self._weigh(uses, losses_B, mask_B, in_graph=True)
        sums = [
            torch.zeros(shape, device=x.device) if gradients is None else gradients.weighted_sum(weights_B)
            for shape, (gradients, weights_B) in zip(self._parameters.shapes, weighed.gradients, strict=True)
        ]
        return sums, weighed.finite, weighed.cancelled

    def _forward(
        self, x: torch.Tensor, y: torch.Tensor, mask_B: torch.Tensor, probes: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[Use]]:
        self._tape, self._waiting = [], list(probes or [])
        compiling = probes is not None
        frozen: contextlib.AbstractContextManager[None] = (
            contextlib.nullcontext() if compiling else self._parameters.frozen()
        )
        with self._precision(x), frozen:
            try:
                losses_B = self._losses(self._model(x), y).float() * mask_B
            except RuntimeError as error:
                if _IN_PLACE in str(error) and self._tape:
                    raise _changed_in_place(self._tape[-1].name) from error
                raise
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
            if not inputs:
                raise InputError(f"layer '{name}' is called with its input by keyword", "pass it by position")
            version = 0
            if self._waiting:
                output = output + self._waiting.pop(0)
            elif torch.is_grad_enabled():
                # No parameter asks for a gradient: autograd would compute each weight's. They begin here.
                output.requires_grad_()
                version = output._version
            self._tape.append(Use(name, layer, inputs[0].detach(), output, version))
            return output

        return hook

    def _weigh(self, uses: list[Use], losses_B: torch.Tensor, mask_B: torch.Tensor, *, in_graph: bool) -> _Weighed:
        gradients = self._parameters.gradients(uses)
        squares_LB, cancelled = self._parameters.squared_norms(gradients, in_graph=in_graph)
        norms_LB = (squares_LB if self._options.per_layer else squares_LB.sum(0, keepdim=True)).sqrt()
        finite_B = torch.isfinite(losses_B) & torch.isfinite(norms_LB).all(0)
        weights_LB = mask_B * (self._bound / norms_LB.clamp_min(self._bound))
        places = self._parameters.layer if self._options.per_layer else [0] * len(gradients)
        weighted = [(rows, weights_LB[place]) for rows, place in zip(gradients, places, strict=True)]
        return _Weighed(weighted, finite_B, cancelled)


class _Weighed(NamedTuple):
    """Each parameter's gradients with the weights of the rows [B]; which rows are finite [B]; and, of a graph, whether
    it takes float64 to tell the norm of a row, which a graph cannot do for some rows only."""

    gradients: list[tuple[RowGradients | None, torch.Tensor]]
    finite: torch.Tensor
    cancelled: torch.Tensor


_Add = Callable[[list[torch.Tensor]], None]


class _Sums:
    """The running sum, one flat vector: float32 for up to `_FLOAT32_ROWS` rows, float64 beyond."""

    def __init__(self, shapes: list[torch.Size], device: torch.device) -> None:
        self._near = torch.zeros(sum(shape.numel() for shape in shapes), device=device)
        pieces = torch.split(self._near, [shape.numel() for shape in shapes])
        self.parts = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        self._far: torch.Tensor | None = None
        self._rows = 0

    def count(self, rows: int) -> None:
        """This many more rows have been added to `parts`."""
        self._rows += rows
        if self._rows + rows > _FLOAT32_ROWS:
            self._carry()

    def take(self) -> torch.Tensor:
        """The sum, in float64; the next one starts at zero."""
        if self._rows or self._far is None:
            self._carry()
        assert self._far is not None  # noqa: S101  (what `_carry` is for)
        total, self._far = self._far, None
        return total

    def _carry(self) -> None:
        self._far = self._near.double() if self._far is None else self._far.add_(self._near)
        self._near.zero_()
        self._rows = 0


class _Parameters:
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

    def squared_norms(
        self, gradients: list[RowGradients | None], *, in_graph: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, B], and, `in_graph`, whether there is one to be computed again without it."""
        known = [(rows, layer) for rows, layer in zip(gradients, self.layer, strict=True) if rows is not None]
        found = [rows.squares() for rows, _ in known]
        values_PB = torch.stack([squares.value for squares in found])
        cancelled = torch.zeros((), dtype=torch.bool, device=values_PB.device)
        if any(squares.scale is not squares.value for squares in found):
            scales_PB = torch.stack([squares.scale for squares in found])
            cancelled_PB = values_PB < CANCELLED * scales_PB
            cancelled = cancelled_PB.any()
            if not in_graph and bool(cancelled):
                for (rows, _), value_B, cancelled_B in zip(known, values_PB, cancelled_PB, strict=True):
                    if bool(cancelled_B.any()):
                        value_B[cancelled_B] = rows.in_double(cancelled_B).squares().value.to(value_B.dtype)
            floors_P1 = torch.tensor([[squares.floor] for squares in found], device=values_PB.device)
            values_PB = torch.maximum(values_PB, floors_P1 * scales_PB)
        places = torch.tensor([layer for _, layer in known], device=values_PB.device)
        squares_LB = values_PB.new_zeros((self.layers, values_PB.shape[1])).index_add(0, places, values_PB)
        return squares_LB, cancelled


def trains(layer: nn.Module) -> bool:
    """Whether it has a trainable parameter of its own."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _changed_in_place(name: str) -> InputError:
    return InputError(f"the output of layer '{name}' is changed in place", "use inplace=False after it")


def rows_alike(rows: int) -> int:
    """`rows`, rounded up to a multiple of `_ROWS_ALIKE`."""
    return -(-rows // _ROWS_ALIKE) * _ROWS_ALIKE


def filled(x: torch.Tensor, y: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and y with copies of their first row, up to so many rows, and a mask [B] that is 0 for the copies."""
    missing = rows - len(x)
    mask_B = torch.ones(rows, device=x.device)
    if missing:
        mask_B[len(x) :] = 0.0
        x, y = (torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for t in (x, y))
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
        x = inputs[0]
        if x.is_cuda or not x.shape[-1] % 4:
            return inputs
        return (nn.functional.pad(x, (0, -x.shape[-1] % 4))[..., : x.shape[-1]], *inputs[1:])

    return [layer.register_forward_pre_hook(aligned) for layer in model.modules() if isinstance(layer, nn.Linear)]


def require_whole_products() -> None:
    """Refuse settings with which float32 products have the precision of bfloat16 or TF32, and norms with them."""
    mkldnn: Any = torch.backends.mkldnn
    parts = (torch.backends, mkldnn, mkldnn.matmul, torch.backends.cuda.matmul)
    if not {each.fp32_precision for each in parts} <= {"none", "ieee"}:
        raise InputError("float32 products are rounded, and so would norms be",
                         'set torch.set_float32_matmul_precision("highest")')  # fmt: skip
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        if os.environ.get(name, "STRICT").upper() != "STRICT":
            raise InputError("float32 products may be rounded, and so would norms be", f"unset {name}")
