"""Counts of rows as they are published: rounded down to two digits.

Neighbouring tables differ by one unit, so an exact count is private. A rounded one changes when the count crosses a
multiple of its last digit, and not otherwise.

Guarantees: `rounded_down(n) <= n <= most_rows(n) < 1.1·n + 1`, and the two are the same for all counts that are
published alike. Not promised: that a published count is differentially private. It is declared public; below 100 it is
the exact one.
"""

from __future__ import annotations

_DIGITS = 2


def rounded_down(rows: int) -> int:
    """The published number of so many rows, at least 0: 9 for 9, 26,000 for 26,049."""
    return rows - rows % _unit(rows)


def most_rows(rows: int) -> int:
    """The largest number that is published as `rows` is: 9 for 9, 26,999 for 26,000 and for 26,049."""
    return rounded_down(rows) + _unit(rows) - 1


def _unit(rows: int) -> int:
    return int(10 ** max(0, len(str(rows)) - _DIGITS))
