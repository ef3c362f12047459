# ruff: noqa: N803, N806 - the letters after an array's name are its shape
"""Which rows of a unit come first: each row has a number of its own within its unit, so that a run may use few of each.

Guarantees: rows of one unit have different ordinals, 0, 1, 2 and so on, over all shards and versions; those of one call
in an order that the caller's random numbers say. A row's ordinal depends on its own unit's rows and random numbers
alone, so to use only ordinals below c makes of a unit that is added or removed a change of at most c rows.
Not guaranteed: an even choice over several calls. What is appended comes after what was there, which stays as it is.

Units are told apart as in `subjects.check_units`: two that are taken for one share the numbers of one.

Shapes: N rows that are numbered, M rows that have numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister.datasets.schema import ORDINAL_COLUMN
from cloister.datasets.subjects import Tags, unit_numbers
from cloister.errors import InputError

Ordinals = npt.NDArray[np.int16]
"""One number a row: [N]. A schema allows a unit no more rows than fit."""
Words = npt.NDArray[np.uint64]
SLICE_ROWS = 4_000_000
"""Of about 45 bytes each, while rows are numbered."""


def number_units(
    new: Sequence[tuple[int, Callable[[], Tags]]], known: Sequence[tuple[int, Callable[[], tuple[Tags, Ordinals]]]],
    draw: Callable[[int], Words],
) -> list[Ordinals]:  # fmt: skip
    """The ordinals of the rows of `new` shards; `known` shards have theirs. Each comes with its number of rows.

    `draw` gives so many random words, which decide the order and must come from a CSPRNG. Tags are asked for once for
    each slice of `SLICE_ROWS` rows; two bytes a row, of the answer, are in memory.
    """
    found = [np.zeros(rows, np.int16) for rows, _ in new]
    slices = max(1, -(-sum(rows for rows, _ in (*new, *known)) // SLICE_ROWS))
    for part in range(slices):
        masks, units = [], [np.empty(0, np.uint64)]
        for _, tags_of in new:
            numbers = unit_numbers(tags_of())
            masks.append(numbers % slices == part)
            units.append(numbers[masks[-1]])
        units_M, ordinals_M = [np.empty(0, np.uint64)], [np.empty(0, np.int16)]
        for _, opened in known:
            tags, ordinals = opened()
            numbers = unit_numbers(tags)
            mask = numbers % slices == part
            units_M.append(numbers[mask])
            ordinals_M.append(ordinals[mask])
        units_N = np.concatenate(units)
        numbered = within_units(units_N, draw(len(units_N)), np.concatenate(units_M), np.concatenate(ordinals_M))
        start = 0
        for ordinals, mask in zip(found, masks, strict=True):
            stop = start + int(mask.sum())
            ordinals[mask] = numbered[start:stop]
            start = stop
    return found


def within_units(units_N: Words, words_N: Words, units_M: Words, ordinals_M: Ordinals) -> Ordinals:
    """Number rows of the units `units_N` in the order of `words_N`, after those of their units that have numbers."""
    order_N = np.lexsort((words_N, units_N))
    sorted_N = units_N[order_N]
    begins = np.flatnonzero(np.concatenate((np.ones(min(1, len(sorted_N)), bool), sorted_N[1:] != sorted_N[:-1])))
    places_N = np.arange(len(sorted_N)) - np.repeat(begins, np.diff(np.append(begins, len(sorted_N))))
    order_M = np.lexsort((ordinals_M, units_M))
    if len(order_M):
        last_N = order_M[np.maximum(np.searchsorted(units_M[order_M], sorted_N, side="right") - 1, 0)]
        places_N += np.where(units_M[last_N] == sorted_N, ordinals_M[last_N].astype(np.int64) + 1, 0)
    numbered = np.empty(len(units_N), np.int16)
    numbered[order_N] = places_N
    return numbered


def ordinal_table(ordinals: Ordinals) -> pa.Table:
    """The sealed form of a shard's ordinals, in the order of its rows."""
    return pa.table({ORDINAL_COLUMN: pa.array(ordinals, pa.int16())})


def read_ordinals(table: pa.Table) -> Ordinals:
    """The inverse of `ordinal_table`: ordinals [N].

    Raises:
        InputError: not a file of ordinals.
    """
    known = (table.schema.names, table.schema.types) == ([ORDINAL_COLUMN], [pa.int16()])
    if not known or table.column(0).null_count or (table.column(0).to_numpy() < 0).any():
        raise InputError("these are not the ordinals of rows", "run `cloister data verify`")
    return np.asarray(table.column(0).to_numpy(), dtype=np.int16)
