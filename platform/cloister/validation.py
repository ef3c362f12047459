"""What is wrong with a map that somebody wrote: one of pydantic's problems, in words for whoever wrote it.

Guarantees: it names a field and a reason, never a value.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Container
from typing import NamedTuple

from pydantic import ValidationError

_REASONS = {
    "extra_forbidden": "there is no such field",
    "missing": "it is missing",
    "union_tag_invalid": "it is of no kind that is known",  # pydantic quotes it
    "union_tag_not_found": "it does not say of which kind it is",
}


class Problem(NamedTuple):
    """Where, from the outermost field on; pydantic's name of its kind; and why."""

    location: tuple[str | int, ...]
    kind: str
    reason: str

    @property
    def place(self) -> str:
        """The field's full name, with dots."""
        return ".".join(map(str, self.location)) or "the whole"


def first_problem(error: ValidationError, *, silent: Container[str] = (), not_meant: str | None = None) -> Problem:
    """The first problem, a misspelt field before any other.

    `silent` are what pydantic names in a location that is no field, such as the chosen one of several models; problems
    of the alternative `not_meant` count only if there are no others.
    """
    found = error.errors(include_input=False, include_url=False, include_context=False)
    found = [each for each in found if not_meant not in each["loc"]] or found
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    misspelt = first["type"] == "extra_forbidden"
    *parents, name = first["loc"] or ("",)
    reason = _REASONS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if misspelt:
        absent = [each["loc"] for each in found if each["type"] == "missing"]
        missing = [str(field) for *above, field in absent if above == parents]
        close = difflib.get_close_matches(str(name), missing, n=1)
        reason += f"; did you mean {close[0]}?" if close else ""
    spoken = [part not in silent for part in parents] + [misspelt or name not in silent]
    return Problem(tuple(itertools.compress(first["loc"], spoken)), first["type"], reason)
