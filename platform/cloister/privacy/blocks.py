# ruff: noqa: N803 - the letters after a tensor's name are its shape
"""Which rows of a batch are added up together, so that a row more changes next to nothing.

A sum in floating point depends on its order. If rows were added up as they come, one row more would move all that come
after it, and every sum would round differently. So each row has a place of its own, a number that follows from the
row itself and from nothing else, and rows are put into blocks by their places: ranges of equal width, as many as the
plan's expected batch fills, each halved until no part of it has more rows than may be added up.

Guarantees: one row more or less, wherever it is in the table, leaves every block as it was but one: that one has a row
more, or is split into parts that have its rows and the one more between them. Equal rows have equal places; more of
them than a block holds are filled into blocks one after the other, of which the last alone changes.

Not promised: that blocks are full. Of rows in numbers that vary as Poisson's do, three in four places are.

Shapes: N rows, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from cloister.privacy.keystream import Keystream

_PLACE_BITS = 64  # of a place, within its range: so often can a range be halved
_ROWS_AT_ONCE = 2**14
Places = npt.NDArray[np.uint64]
Block = tuple[int, int]
"""First row and stop, in `Blocks.order`."""


def places_of(x_ND: torch.Tensor, y_N: torch.Tensor, key: bytes) -> Places:
    """The place of each row [N]: a universal hash of its bytes, under a key of the attempt."""
    columns = [_words(x_ND), _words(y_N)]
    stream = Keystream(key)
    factors = [stream.words(words.shape[1]) | np.uint64(1) for words in columns]
    places = np.zeros(len(x_ND), np.uint64)
    for words, own in zip(columns, factors, strict=True):
        for first in range(0, len(places), _ROWS_AT_ONCE):
            part = words[first : first + _ROWS_AT_ONCE].astype(np.uint64)
            places[first : first + _ROWS_AT_ONCE] += (part * own).sum(axis=1, dtype=np.uint64)
    # What a sum of products leaves in its high bits is not yet even: one round of a mixing function (splitmix64).
    places = (places ^ (places >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    places = (places ^ (places >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return places ^ (places >> np.uint64(31))


def _words(values: torch.Tensor) -> npt.NDArray[np.generic]:
    """The bits of each row, in words of up to four bytes: [N, W].

    Those of eight are halved: numbers that have few digits differ in the upper half alone, and a product with their
    difference would do so as well.
    """
    rows = values.detach().cpu().contiguous()
    if not len(rows):  # its strides may be anything
        return np.zeros((0, 1), dtype=np.uint8)
    rows = rows.flatten(1) if rows.dim() > 1 else rows.reshape(-1, 1)
    flat = rows.view(torch.uint8).numpy()
    return flat.view(f"<u{min(rows.element_size(), 4)}")


def spread(rows: int) -> Places:
    """Places for rows that have none of their own: evenly, in their order."""
    return np.arange(rows, dtype=np.uint64) * np.uint64((2**64 - 1) // max(rows, 1))


class Blocks:
    """The rows of one batch, by their places."""

    def __init__(self, places_B: Places, ranges: int) -> None:
        """`ranges`: how many of equal width there are, 1 … 2³¹."""
        self.order = np.argsort(places_B, kind="stable")
        # range and place within the range: the upper and the lower word of place · ranges
        places, half, many = places_B[self.order], np.uint64(32), np.uint64(ranges)
        carried = ((places & np.uint64(2**32 - 1)) * many) >> half
        self._range_B = ((places >> half) * many + carried) >> half
        self._within_B = places * many

    def of_at_most(self, rows: int) -> list[Block]:
        """The blocks of at most so many rows; none is empty."""
        starts = np.flatnonzero(np.diff(self._range_B, prepend=self._range_B[:1] - np.uint64(1))).tolist()
        found: list[Block] = []
        for start, stop in zip(starts, [*starts[1:], len(self.order)], strict=bool(starts)):
            self._halve(start, stop, 0, _PLACE_BITS, rows, found)
        return found

    def microbatches(self, rows: int, block_rows: int) -> list[list[Block]]:
        """Blocks of at most `block_rows`, as many together as come to no more than `rows`; one at least."""
        found: list[list[Block]] = []
        for block in self.of_at_most(block_rows):
            if found and block[1] - found[-1][0][0] <= rows:
                found[-1].append(block)
            else:
                found.append([block])
        return found

    def within(self, microbatch: list[Block]) -> Callable[[int], list[slice]]:
        """The blocks of at most so many rows, each a part of one of a microbatch's, relative to its start."""

        def parts(rows: int) -> list[slice]:
            found: list[Block] = []
            for start, stop in microbatch:
                self._halve(start, stop, 0, _PLACE_BITS, rows, found)
            first = microbatch[0][0]
            return [slice(start - first, stop - first) for start, stop in found]

        return parts

    def _halve(self, start: int, stop: int, low: int, bits: int, rows: int, found: list[Block]) -> None:
        """Split start … stop - 1, whose places are low … low + 2^bits - 1."""
        if start == stop:
            return
        if stop - start <= rows:
            found.append((start, stop))
        elif bits == 0:  # all at one place
            found.extend((first, min(first + rows, stop)) for first in range(start, stop, rows))
        else:
            middle = low + (1 << (bits - 1))
            split = start + int(np.searchsorted(self._within_B[start:stop], np.uint64(middle)))
            self._halve(start, split, low, bits - 1, rows, found)
            self._halve(split, stop, middle, bits - 1, rows, found)


def ranges_for(expected_rows: float, rows: int) -> int:
    """How many ranges a batch of so many expected rows takes, so that one seldom has more than `rows` of them."""
    fill = max(rows - 2.0 * math.sqrt(rows), rows / 4)
    return min(max(1, math.ceil(expected_rows / fill)), 2**31)
