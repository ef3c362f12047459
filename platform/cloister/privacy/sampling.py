"""Poisson sampling of rows, the sampling that the accountant assumes, at the cost of the rows that it draws.

Guarantees: in every step each row is included independently with probability q' = floor(q·2⁶⁴)/2⁶⁴, which is at most q
and less than 2⁻⁶⁴ below it, so the certified ε covers it; the batch size is whatever comes out, and an empty batch is a
real step that is returned like any other. Shards that are sampled independently make one sample of the whole data set
exactly (Bernoulli draws are independent). Nothing shuffles: shuffled batches that are reported as Poisson leak up to
four times more than stated (arXiv 2411.10614).

Up to a rate of 1/16 a step costs O(batch + 1): rows fall into blocks of M, and a block draws how many of its rows it
includes, then which (arXiv 2406.17298, Lemma 1). Above, one 64-bit word a row decides, exactly. The total variation
between the batches of a run and true Poisson batches is below steps · blocks · 2⁻¹²⁷ (in fact 2⁻¹⁸⁰). Proof:
    1. Given its number, a block's rows are uniform among the sets of that size: renaming the rows renames the uniform
       words, and whether a word is kept depends on which words are equal, which no renaming changes.
    2. So only the number, which should be Binomial(M, q'), can be off, and blocks and steps are independent: the
       distances add up. A block that reaches beyond the last row drops what lies there; the others stay independent.
    3. A uniform number of 192 bits is looked up among fewer than 2⁹ boundaries, each less than 2⁻¹⁹⁰ from the true
       cumulative probability; the tail that has no boundary is lighter than 2⁻¹⁹⁰.

Not promised: constant time. How long a step takes depends on the size of its batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cloister.errors import InputError
from cloister.privacy.keystream import Keystream

_WORD_BITS = 64
# A block's table of cumulative probabilities is this exact; a uniform number has as many bits, of which all but the
# first 64 are drawn only when these do not decide, which happens with probability below 2⁻⁵⁵.
_TABLE_BITS = 192
_REST_WORDS = (_TABLE_BITS - _WORD_BITS) // _WORD_BITS
# The arithmetic behind the table: M·q' ≤ 16, so what is lost to rounding grows to less than 2⁻⁴⁰⁰ (M < 2⁶³).
_FIXED_POINT_BITS = 512
_ROWS_PER_BLOCK = 8  # expected, at least, and fewer than twice as many
_MAX_BLOCKWISE_RATE = 1 / 16
_MAX_BLOCK_SHIFT = 62  # row numbers are int64
_DENSE_CHUNK = 2**16  # words at a time: half a megabyte, which stays in the cache


class PoissonSampler:
    """Draws the row numbers of one batch after the other out of `n` rows at rate `sample_rate`."""

    def __init__(self, n: int, sample_rate: float, key: bytes) -> None:
        if n < 0:
            raise ValueError("the number of rows is not negative")
        if not 0.0 < sample_rate <= 1.0:
            raise ValueError("the sample rate lies in (0, 1]")
        self._n = n
        # Scaling a float by a power of two is exact, so int() floors the true q·2⁶⁴.
        self._threshold = int(sample_rate * 2.0**_WORD_BITS)
        self._blockwise = sample_rate <= _MAX_BLOCKWISE_RATE
        self._stream = Keystream(key)
        if self._blockwise:
            # The least power of two that expects enough rows, unless one block holds all there are.
            enough = -(-_ROWS_PER_BLOCK * 2**_WORD_BITS // max(self._threshold, 1))
            self._shift = min((enough - 1).bit_length(), max(n - 1, 0).bit_length(), _MAX_BLOCK_SHIFT)
            self._blocks = -(-n >> self._shift)
            self._boundaries = binomial_boundaries(self._shift, self._threshold)
            self._first_words = np.array([b >> (_TABLE_BITS - _WORD_BITS) for b in self._boundaries], dtype=np.uint64)

    def next_batch(self) -> npt.NDArray[np.int64]:
        """Row numbers, ascending; possibly none."""
        return self._by_blocks() if self._blockwise else self._by_rows()

    def _by_rows(self) -> npt.NDArray[np.int64]:
        if self._threshold >= 2**_WORD_BITS:
            return np.arange(self._n, dtype=np.int64)
        batch = [np.empty(0, dtype=np.int64)]
        for first in range(0, self._n, _DENSE_CHUNK):
            words = self._stream.words(min(_DENSE_CHUNK, self._n - first))
            batch.append(np.flatnonzero(words < np.uint64(self._threshold)) + first)
        return np.concatenate(batch)

    def _by_blocks(self) -> npt.NDArray[np.int64]:
        counts = self._counts()
        rows = np.empty(0, dtype=np.int64)
        missing = counts
        # Rows that came up twice are drawn again, in rounds, until each block has its number of different ones.
        while missing.any():
            block = np.repeat(np.arange(self._blocks, dtype=np.int64), missing)
            within = self._stream.words(len(block)) & np.uint64((1 << self._shift) - 1)
            rows = np.sort(np.concatenate([rows, (block << self._shift) + within.astype(np.int64)]))
            rows = rows[np.diff(rows, prepend=-1) > 0]  # ten times as fast as np.unique
            missing = counts - np.bincount(rows >> self._shift, minlength=self._blocks)
        return rows[: np.searchsorted(rows, self._n)]

    def _counts(self) -> npt.NDArray[np.int64]:
        """How many rows each block includes: how many boundaries are at most a uniform number of 192 bits."""
        words = self._stream.words(self._blocks)
        counts = np.searchsorted(self._first_words, words, side="left")
        undecided = np.flatnonzero(counts < np.searchsorted(self._first_words, words, side="right"))
        for block in undecided.tolist():
            number = int(words[block])
            for word in self._stream.words(_REST_WORDS).tolist():
                number = number << _WORD_BITS | word
            counts[block] = bisect_right(self._boundaries, number)
        return counts.astype(np.int64, copy=False)


class ShardedBatches:
    """One Poisson sampler for each shard; their batches together, as rows of the whole."""

    def __init__(self, shards: Sequence[tuple[str, int]], sample_rate: float, key_of: Callable[[str], bytes]) -> None:
        names = [name for name, _ in shards]
        if len(set(names)) != len(names):
            raise InputError("two shards have one name, and would be sampled alike", "name each shard once")
        self._samplers = [PoissonSampler(rows, sample_rate, key_of(name)) for name, rows in shards]
        self._starts = np.cumsum([0, *(rows for _, rows in shards)])
        self.rows = int(self._starts[-1])

    def next_batch(self) -> npt.NDArray[np.int64]:
        """Row numbers, ascending; possibly none."""
        parts = [s.next_batch() + start for s, start in zip(self._samplers, self._starts, strict=False)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def binomial_boundaries(shift: int, threshold: int) -> list[int]:
    """P[K ≤ 0], P[K ≤ 1], … in units of 2⁻¹⁹² for K ~ Binomial(2^shift, threshold/2⁶⁴), while they are below one.

    With u uniform in 0 … 2¹⁹² - 1, the number of boundaries that are at most u is distributed as K.
    """
    size, rest = 1 << shift, 2**_WORD_BITS - threshold
    term = rest << (_FIXED_POINT_BITS - _WORD_BITS)
    for _ in range(shift):
        term = term * term >> _FIXED_POINT_BITS
    boundaries: list[int] = []
    cumulative, unit = 0, _FIXED_POINT_BITS - _TABLE_BITS
    for k in range(size):
        cumulative += term
        # Past twice the mean each term is about half of the one before, or less: what is left is below three units.
        ends = term >> unit == 0 and k << (_WORD_BITS - 1) > size * threshold
        if ends or cumulative >> unit >= 2**_TABLE_BITS:
            break
        boundaries.append(cumulative >> unit)
        term = term * (size - k) * threshold // ((k + 1) * rest)
    return boundaries
