"""One entry of the log: who did what to what, when, from where, and how it ended.

Guarantees: one event has one encoding (RFC 8785 JSON), and `from_bytes` accepts nothing else; details are single
values with short text, so neither a row nor a file fits in. An event cannot be changed once made.

Does not guarantee: that its texts hold no secret. Whoever writes an event picks what to say: names, counts, digests.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from cloister.canonical import canonical_json
from cloister.errors import InputError, IntegrityError

FORMAT = "cloister.dev/event/v1"
MAX_TEXT = 512  # characters
MAX_DETAILS = 64
MAX_INTEGER = 2**53 - 1  # RFC 7493, section 2.2: what every JSON reader can hold

Outcome = Literal["success", "denied", "failure"]
Scalar = str | int | float | bool | None

_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z", re.ASCII)
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character: UTF-8 cannot hold it
_DETAIL_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def utc_text(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, the form that `Event.time` has: `2026-11-22T09:30:00.125Z`.

    Raises:
        InputError: a moment without a time zone.
    """
    if moment.tzinfo is None:
        raise InputError("this time has no time zone", "use datetime.now(UTC)")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`rule` names the policy or check that decided, `reason` says why in words; both may be empty."""

    time: str
    actor: str
    action: str
    resource: str
    outcome: Outcome
    reason: str = ""
    rule: str = ""
    source: str = ""
    details: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("actor", "action", "resource", "reason", "rule", "source"):
            if not _is_text(getattr(self, name)):
                raise InputError(f"the event's {name} is not text of at most {MAX_TEXT} characters", "shorten it")
        if not self.actor or not self.action or not self.resource:
            raise InputError("an event needs an actor, an action and a resource", "name all three")
        if self.outcome not in get_args(Outcome):
            raise InputError("an event's outcome is success, denied or failure", "pick one of the three")
        if not _is_time(self.time):
            raise InputError("an event's time is RFC 3339 in UTC with milliseconds", "make it with utc_text(moment)")
        if len(self.details) > MAX_DETAILS:
            raise InputError(f"an event has at most {MAX_DETAILS} details", "record a digest of the rest")
        for name, value in self.details.items():
            if not isinstance(name, str) or not _DETAIL_NAME.fullmatch(name):
                raise InputError("a detail's name is lower-case letters, digits and underscores", "rename it")
            if not _is_scalar(value):
                raise InputError(
                    f"the detail {name} is not a finite number, a truth value, nothing, or text of at most "
                    f"{MAX_TEXT} characters",
                    "record a digest or a count instead",
                )
        object.__setattr__(self, "details", dict(self.details))

    def to_bytes(self) -> bytes:
        """The log entry: canonical JSON."""
        return canonical_json({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Event:
        """The event in a log entry.

        Raises:
            IntegrityError: not the one encoding of an event of this format.
        """
        refused = IntegrityError("this is not an event of a known format", "verify the log before reading it")
        try:
            fields: Any = json.loads(data)
            if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
                raise refused
            event = cls(**fields)
            unchanged = event.to_bytes() == data
        except (InputError, TypeError, ValueError, AttributeError, RecursionError):
            raise refused from None
        if not unchanged:
            raise refused
        return event


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and not _SURROGATE.search(value)


def _is_scalar(value: object) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) <= MAX_INTEGER
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_text(value)


def _is_time(value: object) -> bool:
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True
