"""Every operation of a model, compared row by row while a device is tried.

Guarantees: in the passes that were watched, forward and backward, each operation that writes numbers gave every row the
same bits, in each place and at each number of rows. A difference that layers hide until it meets the kink of a ReLU is
seen where it begins.

Functions of single elements are certain. Libraries compute the last elements of a tensor, and of each thread's share of
it, by other code than whole vectors: of sigmoids, 4 in 100 then differ in the last bit. So a number is looked for that
the function computes otherwise there: the witness. A tensor that is full of it shows where that is.

Not promised: whole numbers, and results of which no dimension, or more than one, is a multiple of the rows. What
follows from them is watched in its turn. Nor what is computed outside of PyTorch. Of other functions than those of
single elements, such as sums and `glu`, random rows alone are compared.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# Of a function that differs in one number of a hundred, 2,048 miss it once in 10⁸ times.
_SAMPLES = 2048
_VECTORS = 32  # elements: of the widest vectors two, which functions take at once
_CLOSE = 1e-4  # relative: more than a function of single elements differs by


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit, but for numbers that are none."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


class Watch:
    """The operations of one pass, and of others that are compared with it."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []
        self._rows = 0
        self.alike = True
        """Whether all were, so far."""

    def learning(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """The first pass: of another number of rows than the next, to see which dimension of a result they are."""

        def see(place: int, call: _Call, results: list[torch.Tensor]) -> None:
            assert place == len(self._operations)  # noqa: S101
            self._operations.append(_Operation(call.function, rows, [result.shape for result in results]))

        return self._watching(see)

    def expecting(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """The pass that others are compared with."""

        def see(place: int, call: _Call, results: list[torch.Tensor]) -> None:
            self._operations[place].expect(call, results, rows)

        return self._watching(self._if_lined_up(see))

    def comparing(self, places: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """A pass of the rows of that one which were in these places."""

        def see(place: int, call: _Call, results: list[torch.Tensor]) -> None:
            self.alike = self._operations[place].is_alike(call, results, places)

        return self._watching(self._if_lined_up(see))

    @contextlib.contextmanager
    def _watching(self, see: _See) -> Iterator[None]:
        with _Mode(see) as mode:
            yield
        self.alike = self.alike and mode.count == len(self._operations)

    def _if_lined_up(self, see: _See) -> _See:
        """A model that does other things for other numbers of rows is not compared: it is not alike."""

        def checked(place: int, call: _Call, results: list[torch.Tensor]) -> None:
            self.alike = self.alike and place < len(self._operations)
            if self.alike:
                known = self._operations[place]
                self.alike = known.function is call.function and len(known.shapes) == len(results)
            if self.alike:
                see(place, call, results)

        return checked


class _Mode(TorchDispatchMode):
    """Shows all that is computed in this thread, and in those that compute gradients for it."""

    def __init__(self, see: _See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, traits = kwargs or {}, _traits(func)
        if traits.view:
            return func(*args, **kwargs)
        call = _Call(func, args, kwargs)
        found = func(*args, **kwargs)
        self._see(self.count, call, [] if traits.unset else [each for each in tree_leaves(found) if _has_numbers(each)])
        self.count += 1
        return found


class _Traits(NamedTuple):
    view: bool
    """It writes nothing."""
    unset: bool
    """Its result is whatever was there."""
    in_place: bool
    random: bool


@functools.cache
def _traits(function: Any) -> _Traits:
    return _Traits(
        view=any(each.alias_info and not each.alias_info.is_write for each in function._schema.returns),
        unset="empty" in function.overloadpacket.__name__,
        in_place=function._schema.is_mutable,
        random=torch.Tag.nondeterministic_seeded in function.tags,
    )


def _has_numbers(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        and value.layout == torch.strided
    )


class _Call:
    """A function, and what it is given."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self._leaves, self._spec = tree_flatten((args, kwargs))
        if _traits(function).in_place:  # it will be something else after the call
            self._leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        self._given = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]

    def witness(self, result: torch.Tensor) -> list[torch.Tensor] | None:
        """A number for each tensor that is given, of which the function makes another one beyond whole vectors.

        None where there is none, or where the function is not one of single elements.
        """
        if result.is_cuda or not result.numel() or _traits(self.function).random:
            return None
        count = result.numel()
        flat = torch.arange(_SAMPLES) * max(1, count // _SAMPLES) % count
        places = torch.unravel_index(flat, result.shape)
        sizes = 2.0 ** torch.linspace(-1.0, 1.0, _SAMPLES)
        try:
            numbers = [t.expand(result.shape)[places] if t.dim() else t.clone() for t in self._given]
            if not torch.allclose(self.on(numbers), result[places], rtol=_CLOSE, atol=0.0, equal_nan=True):
                return None
            numbers = [t.expand(result.shape)[places] if t.dim() else t.clone() for t in self._given]
            numbers = [(t * sizes).to(t.dtype) if t.dim() and t.is_floating_point() else t for t in numbers]
            ends = [t.clone().view(-1, _VECTORS)[:, :-1] if t.dim() else t.clone() for t in numbers]
            apart = [torch.stack([t, t], 1)[:, 0] if t.dim() else t.clone() for t in numbers]
            whole = self.on([t.clone() for t in numbers])
            differ = _differ(whole, self.on(apart))
            at_ends = _differ(whole.view(-1, _VECTORS)[:, :-1], self.on(ends))
        except Exception:  # noqa: BLE001 - whatever a function says to vectors in place of what it was given
            return None
        if bool(at_ends.any()):
            row, column = at_ends.nonzero()[0].tolist()
            place = row * _VECTORS + column
        elif bool(differ.any()):
            place = int(differ.nonzero()[0])
        else:
            return None
        return [t[place] if t.dim() else t for t in numbers]

    def pattern(self, witness: list[torch.Tensor]) -> torch.Tensor:
        """What the function makes of tensors that are full of it, and in memory as those that are given."""
        return self.on([_full_of(number, given) for number, given in zip(witness, self._given, strict=True)])

    def on(self, given: list[torch.Tensor]) -> torch.Tensor:
        """What the function makes of others."""
        others = iter(given)
        leaves = [next(others) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        found: torch.Tensor = self.function(*args, **kwargs)
        return found


_See = Callable[[int, _Call, list[torch.Tensor]], None]


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a != b) & ~(a.isnan() & b.isnan())


def _full_of(number: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    length = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    return number.expand(length).clone().as_strided(like.shape, like.stride())


class _Operation:
    """One operation of a pass."""

    def __init__(self, function: Any, learned_rows: int, shapes: list[torch.Size]) -> None:
        self.function, self.shapes = function, shapes
        self._learned_rows = learned_rows
        self._witness: list[torch.Tensor] | None = None
        self._sought = False
        self._expected: list[_Result | None] = []

    def expect(self, call: _Call, results: list[torch.Tensor], rows: int) -> None:
        dimensions = [
            _rows_in(result.shape, rows, shape, self._learned_rows)
            for result, shape in zip(results, self.shapes, strict=True)
        ]
        if len(results) == 1 and dimensions[0] is not None and not self._sought:
            self._witness, self._sought = call.witness(results[0]), True
        self._expected = [
            None if dimension is None else _Result.of(self._with_pattern(call, result), dimension, rows)
            for result, dimension in zip(results, dimensions, strict=True)
        ]

    def is_alike(self, call: _Call, results: list[torch.Tensor], places: torch.Tensor) -> bool:
        return all(
            expected is None or expected.is_alike(self._with_pattern(call, result), places)
            for expected, result in zip(self._expected, results, strict=True)
        )

    def _with_pattern(self, call: _Call, result: torch.Tensor) -> list[torch.Tensor]:
        return [result] if self._witness is None else [result, call.pattern(self._witness)]


@dataclass(slots=True)
class _Result:
    """What came of an operation, and of the witness."""

    values: list[torch.Tensor]
    dimension: int
    """Of the rows."""
    rows: int
    readings: list[int]
    """How often the rows may be there, one after the other: they may come before positions, or after them."""

    @classmethod
    def of(cls, values: list[torch.Tensor], dimension: int, rows: int) -> _Result:
        times = values[0].shape[dimension] // rows
        readings = [each for each in range(1, times + 1) if times % each == 0]
        return cls([each.clone() for each in values], dimension, rows, readings)

    def is_alike(self, found: list[torch.Tensor], places: torch.Tensor) -> bool:
        shape = list(self.values[0].shape)
        shape[self.dimension] = shape[self.dimension] // self.rows * len(places)
        if list(found[0].shape) != shape:
            return False
        self.readings = [
            times for times in self.readings
            if all(
                same(self._read(got, times, len(places)),
                     self._read(each, times, self.rows).index_select(self.dimension + 1, places))
                for got, each in zip(found, self.values, strict=True)
            )
        ]  # fmt: skip
        return bool(self.readings)

    def _read(self, values: torch.Tensor, times: int, rows: int) -> torch.Tensor:
        shape = values.shape
        within = shape[self.dimension] // (times * rows)
        return values.view(*shape[: self.dimension], times, rows, within, *shape[self.dimension + 1 :])


def _rows_in(shape: torch.Size, rows: int, learned: torch.Size, learned_rows: int) -> int | None:
    """The one dimension that is in proportion to the rows; None if there is none, or several are."""
    if len(shape) != len(learned):
        return None
    other = [place for place, (size, before) in enumerate(zip(shape, learned, strict=True)) if size != before]
    if len(other) != 1 or shape[other[0]] % rows or shape[other[0]] // rows * learned_rows != learned[other[0]]:
        return None
    return other[0]
