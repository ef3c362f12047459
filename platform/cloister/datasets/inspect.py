"""Looks at the first rows of a file and proposes a schema.

Guarantees: a report holds column names, types, counts and the names of recognisers, and no cell; bounds and category
values are never taken from the rows, but left for the owner to state, since they are published with the schema. A
name that looks like a value, as in a file without a header, is replaced by the column's position. What is not known
to be harmless is proposed as `confidential` or `restricted`.

Not promised: that all personal data is found, or that the proposal fits the rows that were not looked at. Classes
are the judgement of the person who signs the data set.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from cloister.datasets.ingest.sample import ColumnSample, Sample, read_sample
from cloister.datasets.recognise import DATE, LEAST_SHARE, recognise
from cloister.datasets.schema import MAX_INTEGER, SensitivityClass

SAMPLE_ROWS = 10_000

FREE_TEXT = "free text"
DATE_OF_BIRTH = "date of birth"
NAME_HINT = "name of a person or a place (by the column's name)"

_MOST_CATEGORIES = 100
_INTEGER = re.compile(r"-?\d{1,18}")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")
_SCIENTIFIC = re.compile(r"[-+]?[\d.,']+[eE][-+]?\d+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
# Whole words of a column's name, after splitting at capitals, digits and punctuation.
_BORN = {"dob", "birth", "birthdate", "birthday", "born", "geburtsdatum", "naissance", "nacimiento", "geboortedatum"}
_PERSON = {"surname", "firstname", "lastname", "fullname", "forename", "nachname", "vorname", "prenom", "apellido",
           "address", "street", "strasse", "adresse", "zip", "postcode", "postal", "plz"}  # fmt: skip
_PERSON_PAIRS = {("first", "name"), ("last", "name"), ("full", "name"), ("given", "name"), ("family", "name"),
                 ("patient", "name"), ("customer", "name")}  # fmt: skip
_KEY = {"id", "identifier", "uuid", "guid", "ssn", "mrn", "nhs", "bsn", "nir", "pesel", "account", "iban", "passport"}


@dataclass(frozen=True, slots=True)
class ColumnReport:
    """What is proposed for one column, and why."""

    position: int
    """From 1."""
    name: str
    """As the schema would name it; `column_<position>` where the file's name is not shown or none."""
    renamed: bool
    """Whether the file names it otherwise."""
    type: str
    sensitivity: SensitivityClass
    role: str | None
    findings: dict[str, int]
    """Names of recognisers, and how many cells of the sample each found."""
    state: str
    """What only the owner can state: "bounds", "values", "shape and bounds", or nothing."""
    note: str
    repeats: bool
    """Whether a cell occurs more than once."""
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    kind: str
    rows: int
    whole: bool
    headed: bool
    """False where the names look like values, and are not shown."""
    columns: tuple[ColumnReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plain map that `--json` shows."""
        columns = [
            {"column": each.name, "position": each.position, "renamed": each.renamed, "type": each.type,
             "class": each.sensitivity, "role": each.role, "findings": each.findings, "state": each.state,
             "note": each.note}
            for each in self.columns
        ]  # fmt: skip
        return {"kind": self.kind, "rows": self.rows, "whole": self.whole, "headed": self.headed, "columns": columns}


def inspect(stream: BinaryIO, max_rows: int = SAMPLE_ROWS) -> Report:
    """Propose a schema from the first rows.

    Raises:
        InputError: nothing that can be sealed, or damaged within its first rows.
    """
    sample = read_sample(stream, max_rows)
    headed = not any(_is_value(column.name, column) for column in sample.columns)
    names = _names(sample, headed)
    columns = tuple(
        _propose(at, name, column, sample, headed)
        for at, (name, column) in enumerate(zip(names, sample.columns, strict=True), start=1)
    )
    return Report(sample.kind, sample.rows, sample.whole, headed, columns)


def _names(sample: Sample, headed: bool) -> list[str]:
    names: list[str] = []
    for position, column in enumerate(sample.columns, start=1):
        name = column.name
        if not _NAME.fullmatch(name):
            name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-")[:100]
        if not headed or not _NAME.fullmatch(name) or name in names:
            name = f"column_{position}"
        names.append(name)
    return names


def _is_value(name: str, column: ColumnSample) -> bool:
    """Whether a column's name could be a cell: it reads as one, or it is one."""
    text = name.strip()
    if not any(letter.isalpha() for letter in text) or _SCIENTIFIC.fullmatch(text) or len(text) > 128:
        return True
    return text in column.cells or bool(recognise({text: 1}))


def _propose(position: int, name: str, column: ColumnSample, sample: Sample, headed: bool) -> ColumnReport:
    cells, filled = column.cells, sum(column.cells.values())
    words = _words(column.name) if headed else ()
    findings = recognise(cells) if column.form in ("text", "integer", "number") else {}
    # Short numbers are dates, telephone numbers or national ids only where the file holds them as text.
    dated = findings.pop(DATE, 0)
    if column.form == "time":
        dated = filled
    if dated and _BORN & set(words):
        findings[DATE_OF_BIRTH] = dated
    elif dated:
        findings[DATE] = dated
    if set(words) & _PERSON or set(pairwise(words)) & _PERSON_PAIRS or words == ("name",):
        findings[NAME_HINT] = filled
    kind, sensitivity, role, note = _kind(column, findings, words, filled, bool(dated))
    if kind == "text" and role is None and not dated and _is_prose(cells, filled):
        findings[FREE_TEXT] = filled
    missing = sample.rows - filled
    if missing and column.form not in ("tensor", "other"):
        note = f"{note + '; ' if note else ''}{missing:,} empty cells, which sealing refuses in all but text"
    state = {"integer": "bounds", "number": "bounds", "category": "values", "tensor": "bounds"}.get(kind, "")
    return ColumnReport(
        position=position,
        name=name,
        renamed=name != column.name,
        type=kind,
        sensitivity=sensitivity,
        role=role,
        findings=dict(sorted(findings.items())),
        state=state,
        note=note,
        repeats=len(cells) < filled,
        shape=column.shape,
        dtype=column.dtype,
    )


def _kind(
    column: ColumnSample, findings: dict[str, int], words: tuple[str, ...], filled: int, dated: bool
) -> tuple[str, SensitivityClass, str | None, str]:
    """Type, class, role and note."""
    cells = column.cells
    if column.form == "tensor":
        return "tensor", "confidential", None, "check shape and dtype"
    if column.form == "other":
        return (
            "text",
            "restricted",
            None,
            "no plain values: can be sealed as a tensor only, with shape and dtype",
        )
    if dated:
        return "text", "restricted", None, "not usable as text in training: derive a number, such as the age in years"
    direct = {name: count for name, count in findings.items() if name != DATE}
    if direct:
        whole = max(direct.values()) >= LEAST_SHARE * filled and not _is_prose(cells, filled)
        return "text", "restricted", "identifier" if whole and NAME_HINT not in direct else None, ""
    numbers = all(_NUMBER.fullmatch(text) for text in cells)
    integers = numbers and all(_INTEGER.fullmatch(text) for text in cells)
    padded = integers and any(len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0") for text in cells)
    unique = len(cells) == filled
    if filled and (set(words) & _KEY or (words and words[-1] == "no")) and (not numbers or integers):
        return "text", "restricted", "identifier", ""
    if not filled:
        return "text", "restricted", None, "empty in all rows that were looked at"
    if padded:
        return "text", "restricted", "identifier", "numbers with leading zeros: a code, not a quantity"
    if integers and all(abs(int(text)) <= MAX_INTEGER for text in cells):
        return (
            "integer",
            "confidential",
            None,
            "a code rather than a quantity is a category" if len(cells) <= 10 else "",
        )
    if numbers and column.form != "boolean":
        return "number", "confidential", None, ""
    if column.form == "boolean" or (len(cells) <= _MOST_CATEGORIES and len(cells) <= max(10, filled // 10)):
        return "category", "confidential", None, ""
    if unique and filled >= 10 and not any(" " in text for text in cells):
        return "text", "restricted", "identifier", "every cell is another one"
    return "text", "restricted", None, ""


def _is_prose(cells: dict[str, int], filled: int) -> bool:
    return filled > 0 and sum(count for text, count in cells.items() if text.count(" ") >= 3) >= filled / 4


def _words(name: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def draft(report: Report, source: str) -> str:
    """`schema.yaml` for the owner to complete. Until then `cloister data seal` refuses it and names what is missing."""
    span = "all" if report.whole else "the first"
    lines = [
        f"# A draft, proposed from {span} {report.rows:,} rows of {re.sub('[^ -~]', '?', source)}.",
        "# It is a proposal and not a finding: a person has to judge it.",
        "# Complete every empty field. Bounds and values are published with the data set: state them from what is",
        "# publicly known about it, and do not look them up in the rows. Classes: public, internal, confidential,",
        "# restricted; training never reads restricted columns.",
        "name:       # lower-case letters, digits and dashes",
        "purpose:    # what the data may be used for",
        "region:     # where its blobs and workers may be, such as eu",
        "retention:  # an ISO 8601 duration, such as P5Y",
        *_unit(report),
        "columns:",
    ]
    for column in report.columns:
        lines += _column(column)
    return "\n".join(lines) + "\n"


def _unit(report: Report) -> list[str]:
    owner = next((each for each in report.columns if each.role == "identifier" and each.repeats), None)
    if owner is None:
        return ["unit: row   # or {column: …, max_rows: …}, where one person owns several rows"]
    return [
        f"# {owner.name} occurs more than once: if it names a person, protect persons instead of rows. State how many",
        "# rows one person may have.",
        f"unit: {{column: {owner.name}, max_rows: }}",
    ]


def _column(column: ColumnReport) -> list[str]:
    lines = [f"  - name: {column.name}"]
    if column.renamed:
        lines[0] += f"   # column {column.position} of the file has to be renamed to this"
    lines += [f"    type: {column.type}", f"    class: {column.sensitivity}"]
    if column.findings:
        lines[-1] += "   # found: " + ", ".join(f"{name} ({count:,})" for name, count in column.findings.items())
    if column.role:
        lines.append(f"    role: {column.role}   # sealed as a keyed pseudonym")
    if column.type == "tensor":
        lines += [f"    shape: [{', '.join(map(str, column.shape))}]", f"    dtype: {column.dtype}"]
    if column.state == "bounds":
        lines.append("    bounds: []   # state [lowest, highest]")
    if column.state == "values":
        lines.append("    values: []   # state every value that a cell may have")
    if column.note:
        lines.append(f"    # {column.note}")
    return lines
