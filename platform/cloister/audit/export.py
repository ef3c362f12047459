"""A whole log in one file that anybody can verify: a line of checkpoints, then one line for each entry.

Guarantees: reading and verifying hold one line at a time, however long the log; `verify_export` returns only if the
entries are exactly those under the checkpoints (`cloister.audit.verify`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from cloister.audit.checkpoint import parse_verifier_key
from cloister.audit.cosignature import WitnessKey
from cloister.audit.verify import LogReport, verify_log
from cloister.canonical import canonical_json
from cloister.errors import InputError, IntegrityError

FORMAT = "cloister.dev/log-export/v2"
MAX_HEADER_BYTES = 64 * 1024 * 1024
MAX_ENTRY_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Header:
    """The first line. `checkpoints` are notes, oldest first: those that witnesses cosigned, then the log's head."""

    verifier_key: str
    checkpoints: Sequence[str]

    def to_line(self) -> bytes:
        fields = {"format": FORMAT, "verifier_key": self.verifier_key, "checkpoints": list(self.checkpoints)}
        return canonical_json(fields) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Header:
        """Strict about shape; nothing is verified.

        Raises:
            InputError: not the first line of an export.
        """
        refused = InputError("this is not an export of a log", "make one: cloister audit export FILE")
        try:
            fields: Any = json.loads(line)
            header = cls(fields["verifier_key"], fields["checkpoints"])
            unchanged = header.to_line() == line
            parse_verifier_key(header.verifier_key)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, InputError):
            raise refused from None
        if not unchanged or not all(isinstance(note, str) for note in header.checkpoints):
            raise refused
        return header


def open_export(file: BinaryIO) -> tuple[Header, Iterator[bytes]]:
    """The header of an export, and its entries, read as they are asked for.

    Raises:
        InputError: not an export.
        IntegrityError: (from the entries) a line is too long, or the last is cut.
    """
    return Header.from_line(file.readline(MAX_HEADER_BYTES)), _entries(file)


def verify_export(
    header: Header, entries: Iterator[bytes], *, trusted: str | None = None, witnesses: Sequence[WitnessKey] = ()
) -> LogReport:
    """As `verify_log`. That `header.verifier_key` is the right one is for the caller to know."""
    origin, public = parse_verifier_key(header.verifier_key)
    return verify_log(entries, header.checkpoints, public, origin, trusted=trusted, witnesses=witnesses)


def _entries(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(MAX_ENTRY_BYTES + 1):
        if not line.endswith(b"\n"):
            raise IntegrityError("the export ends in the middle of an entry", "export the log again")
        yield line[:-1]
