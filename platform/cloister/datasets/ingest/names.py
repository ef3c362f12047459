"""The file's column names against the schema's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError


def check_names(found: Sequence[str], schema: DatasetSchema) -> None:
    """Refuse a file that lacks a column, or has one more or one twice.

    Raises:
        InputError: names what is missing by the schema's name. A name that the schema does not know could be a data
            value, in a file without a header: only its place is told.
    """
    wanted = [column.name for column in schema.columns]
    known = set(wanted)
    for name in wanted:
        if name not in found:
            close = difflib.get_close_matches(name, [other for other in found if other not in known], n=1)
            place = f"is it column {found.index(close[0]) + 1} of the file?" if close else ""
            hint = place or "add the column or take it out of the schema"
            raise InputError(f"column '{name}' is missing", hint)
    for position, name in enumerate(found, start=1):
        if name not in known:
            close = difflib.get_close_matches(name, wanted, n=1)
            hint = f"the closest column of the schema is '{close[0]}'" if close else "add it to the schema or drop it"
            raise InputError(f"column {position} of the file is not in the schema", hint)
    if len(found) != len(wanted):
        raise InputError("a column name occurs twice in the file", "keep one of them")
