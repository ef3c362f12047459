from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from cloister.audit.event import MAX_TEXT, Event, utc_text
from cloister.errors import InputError, IntegrityError

FIELDS: dict[str, Any] = {
    "time": "2026-11-22T09:30:00.125Z",
    "actor": "ada@example.org",
    "action": "lease.grant",
    "resource": "adult@1",
    "outcome": "success",
}
DETAILS = {"epsilon": 3.5, "steps": 100, "first": True, "note": "é", "none": None}


def test_an_event_comes_back_from_its_bytes() -> None:
    event = Event(**FIELDS, reason="approved", rule="permit-train", source="127.0.0.1", details=DETAILS)
    again = Event.from_bytes(event.to_bytes())
    assert again == event
    assert again.to_bytes() == event.to_bytes()
    assert json.loads(event.to_bytes())["format"] == "cloister.dev/event/v1"


def test_a_whole_number_of_epsilon_is_still_one_encoding() -> None:
    event = Event(**FIELDS, details={"epsilon": 3.0})
    assert Event.from_bytes(event.to_bytes()) == event


def test_an_event_does_not_change() -> None:
    details: dict[str, Any] = {"a": 1}
    event = Event(**FIELDS, details=details)
    details["a"] = 2
    assert event.details == {"a": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.actor = "eve"  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize(
    "change",
    [
        {"time": "2026-11-22T09:30:00Z"},
        {"time": "2026-11-22T09:30:00.125+00:00"},
        {"time": "2026-13-22T09:30:00.125Z"},
        {"time": "2026-02-30T09:30:00.125Z"},
        {"time": "2026-11-22T09:30:00.125Z\n"},
        {"time": None},
        {"actor": ""},
        {"action": ""},
        {"resource": ""},
        {"resource": "x" * (MAX_TEXT + 1)},
        {"reason": None},
        {"reason": "\ud800"},
        {"outcome": "maybe"},
        {"outcome": []},
        {"details": {"x": b"bytes"}},
        {"details": {"x": ["row"]}},
        {"details": {"x": {"row": 1}}},
        {"details": {"x": float("nan")}},
        {"details": {"x": float("inf")}},
        {"details": {"x": 2**53}},
        {"details": {"x": "x" * (MAX_TEXT + 1)}},
        {"details": {"X": 1}},
        {"details": {"": 1}},
        {"details": {1: 1}},
        {"details": {f"d{index}": index for index in range(65)}},
    ],
)
def test_an_event_that_could_carry_data_or_confuse_a_reader_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Event(**{**FIELDS, **change})


GOOD = Event(**FIELDS).to_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b" " + GOOD,
        GOOD.replace(b'"actor"', b'"actor2"'),
        GOOD.replace(b"event/v1", b"event/v2"),
        GOOD.replace(b'"outcome":"success"', b'"outcome":"success","outcome":"denied"'),
        GOOD.replace(b'"details":{}', b'"details":[]'),
        GOOD.replace(b'"details":{}', b'"details":null'),
        GOOD.replace(b'"details":{}', b'"details":{"x":1.0}'),
        GOOD.replace(b'"details":{}', b'"details":{"x":NaN}'),
        GOOD[:-1] + b',"more":1}',
    ],
)
def test_bytes_that_are_not_the_one_encoding_of_an_event_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Event.from_bytes(data)


def test_time_is_written_in_utc_with_milliseconds() -> None:
    moment = datetime(2026, 11, 22, 10, 30, 0, 125_999, tzinfo=timezone(timedelta(hours=1)))
    assert utc_text(moment) == "2026-11-22T09:30:00.125Z"
    assert utc_text(datetime(2026, 1, 2, tzinfo=UTC)) == "2026-01-02T00:00:00.000Z"
    with pytest.raises(InputError):
        utc_text(datetime(2026, 1, 2))
