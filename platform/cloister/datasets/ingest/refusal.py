"""Refusing a row: the place is told, never the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from cloister.errors import InputError


@dataclass(slots=True)
class Place:
    """How many data rows of the file came before the block at hand; -1 as long as the header is still to come."""

    rows: int = 0


def refuse_row(place: Place, row: int, column: str | None, problem: str, hint: str) -> NoReturn:
    """Refuse the block's row `row`, counted from 0.

    Raises:
        InputError: always; rows are told counted over the whole file, from 1, the header not counted.
    """
    where = "" if column is None else f"column '{column}', "
    number = place.rows + row + 1
    raise InputError(f"{where}{f'row {number}' if number else 'the header'}: {problem}", hint)


def refuse_any(wrong: Any, place: Place, column: str, problem: str, hint: str) -> None:
    """Refuse the first row of the block that is marked, if one is.

    Raises:
        InputError: names it.
    """
    marks = np.asarray(wrong)
    if marks.any():
        refuse_row(place, int(marks.argmax()), column, problem, hint)
