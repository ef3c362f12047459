from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import pytest

from cloister.audit.event import MAX_TEXT, ActorKind, Event, Outcome, utc_text
from cloister.canonical import canonical_json
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
    assert again.to_bytes() == canonical_json(event.to_ocsf())


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
        {"actor_kind": "alien"},
        {"correlation": "x" * (MAX_TEXT + 1)},
        {"source": None},
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
LOGIN = Event(**{**FIELDS, "action": "token:issue", "resource": "Platform/platform"}).to_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b" " + GOOD,
        GOOD + b"\n",
        GOOD.replace(b'"actor"', b'"actor2"'),
        GOOD.replace(b"event/v2", b"event/v3"),
        GOOD.replace(b'"1.9.0"', b'"1.8.0"'),
        GOOD.replace(b'"status":"Success"', b'"status":"Success","status":"Failure"'),
        GOOD.replace(b'"disposition_id":1', b'"disposition_id":26'),
        GOOD.replace(b'"disposition_id":1', b'"disposition_id":[]'),
        GOOD.replace(b'"activity_id":99', b'"activity_id":1'),
        GOOD.replace(b'"uid":"adult@1"', b'"uid":7'),
        GOOD.replace(b'"resources":[{', b'"resources":[{},{'),
        GOOD.replace(b'"time":1', b'"time":1.5e1'),
        GOOD.replace(b'"time":1', b'"time":99999999999999'),
        GOOD.replace(b'"time":1', b'"time":true,"x":1'),
        GOOD[:-1] + b',"unmapped":{"details":{}}}',
        GOOD[:-1] + b',"unmapped":{"details":{"x":1.0}}}',
        GOOD[:-1] + b',"unmapped":{"details":{"x":NaN}}}',
        GOOD[:-1] + b',"unmapped":{"details":[]}}',
        GOOD[:-1] + b',"unmapped":null}',
        GOOD[:-1] + b',"zzz":1}',
        LOGIN.replace(b'"unmapped":{', b'"unmapped":{"more":1,'),
        LOGIN.replace(b'"user":{', b'"user":{"name":"x",'),
    ],
)
def test_bytes_that_are_not_the_one_encoding_of_an_event_are_refused(data: bytes) -> None:
    assert data not in (GOOD, LOGIN)
    with pytest.raises(IntegrityError):
        Event.from_bytes(data)


def test_every_flipped_bit_of_an_entry_is_another_event_or_none() -> None:
    for bit in range(len(GOOD) * 8):
        changed = bytearray(GOOD)
        changed[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(IntegrityError):
            assert Event.from_bytes(bytes(changed)) != Event.from_bytes(GOOD)


ACTIONS = ("token:issue", "token:refresh", "session:end", "identity:register", "identity:roles", "identity:revoke",
           "access:grant", "access:expire", "train:submit", "dataset:read", "model:promote", "key:destroy",
           "authority:start", "run:work", "lease.grant", ":")  # fmt: skip
RESOURCES = ("Platform/platform", "Dataset/adult@1", "Identity/p-0123456789abcdef", "-", "a/b/c", "/", "x/")


KINDS = tuple(itertools.product(ACTIONS, RESOURCES, get_args(ActorKind), get_args(Outcome)))


def test_every_kind_of_event_comes_back_and_is_small() -> None:
    for action, resource, kind, outcome in KINDS:
        event = Event(
            time="1969-12-31T23:59:59.999Z", actor="p-0123456789abcdef", actor_kind=kind, action=action,
            resource=resource, outcome=outcome, reason="ApprovalMissingError", rule="engineers-train-and-release",
            source="a-0123456789abcdef", correlation="0123456789abcdef",
            details={"phase": "intent", "dataset": "adult@1", "epsilon": 3.5, "digest": "sha256:" + "0" * 64},
        )  # fmt: skip
        assert Event.from_bytes(event.to_bytes()) == event
        assert len(event.to_bytes()) < 1200, event


def test_an_unknown_source_is_called_so() -> None:
    assert Event(**FIELDS, source="") == Event(**FIELDS) == Event(**FIELDS, source="unknown")


# ---- OCSF 1.9.0, as read from its schema: what each class requires and knows, and which captions numbers have ----

BASE = {"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"}
KNOWN = BASE | {"activity_name", "actor", "src_endpoint", "status", "status_detail", "status_id", "unmapped"}
SECURITY_CONTROL = {"action_id", "authorizations", "disposition_id"}
REQUIRED = {3002: BASE | {"user"}, 3007: BASE | {"user"}, 6003: BASE | {"actor", "api", "src_endpoint"}}
ALLOWED = {
    3002: KNOWN | SECURITY_CONTROL | {"user", "service"},
    3007: KNOWN | SECURITY_CONTROL | {"user", "resources"},
    6003: KNOWN | SECURITY_CONTROL | {"api", "resources"},
}
ACTIVITIES = {3002: range(8), 3007: range(20), 6003: range(5)}
USER_TYPES = {0: "Unknown", 1: "User", 2: "Admin", 3: "System", 4: "Service"}
METADATA = {"correlation_uid", "event_code", "log_version", "product", "profiles", "version"}


def check_ocsf(event: dict[str, Any]) -> None:
    class_uid = event["class_uid"]
    assert REQUIRED[class_uid] <= event.keys() <= ALLOWED[class_uid]
    assert event["category_uid"] == class_uid // 1000
    assert event["type_uid"] == class_uid * 100 + event["activity_id"]
    assert event["activity_id"] in ACTIVITIES[class_uid] or (event["activity_id"] == 99 and event["activity_name"])
    assert ("activity_name" in event) == (event["activity_id"] == 99)
    assert (event["status_id"], event["status"]) in ((1, "Success"), (2, "Failure"))
    assert event["severity_id"] in (1, 2, 3)
    assert event["action_id"] in (0, 1, 2)
    assert event["disposition_id"] in (1, 26, 27)
    assert isinstance(event["time"], int)
    metadata = event["metadata"]
    assert {"product", "version"} <= metadata.keys() <= METADATA
    assert metadata["version"] == "1.9.0"
    assert metadata["product"].keys() <= {"name", "vendor_name"}
    assert "security_control" in metadata["profiles"]
    assert class_uid == 6003 or "host" in metadata["profiles"]  # where `actor` comes from in these classes
    assert event["actor"].keys() == {"user"}
    for user in filter(None, (event["actor"]["user"], event.get("user"))):
        assert {"uid"} <= user.keys() <= {"uid", "type", "type_id"}
        if "type_id" in user:
            assert USER_TYPES.get(user["type_id"], user["type"]) == user["type"]
            assert user["type_id"] in USER_TYPES or user["type_id"] == 99
    assert event["src_endpoint"].keys() == {"uid"}
    for resource in event.get("resources", []):
        assert {"uid"} <= resource.keys() <= {"uid", "type"}
    if class_uid == 3002:
        assert event["service"]["name"]  # at least one of service and dst_endpoint
    if class_uid == 6003:
        assert event["api"]["operation"]
    for authorization in event.get("authorizations", []):
        assert authorization.keys() == {"decision", "policy"}
        assert authorization["policy"]["uid"]


def test_every_event_is_valid_ocsf() -> None:
    for action, resource, kind, outcome in KINDS:
        plain = {"time": FIELDS["time"], "actor": "x", "actor_kind": kind, "action": action, "resource": resource}
        for more in ({}, {"rule": "r", "reason": "why", "correlation": "c", "details": {"x": 1}}):
            check_ocsf(json.loads(Event(**plain, outcome=outcome, **more).to_bytes()))


@pytest.mark.parametrize(
    ("action", "resource", "type_uid"),
    [
        ("token:issue", "Platform/platform", 300201),
        ("token:revoke", "Platform/platform", 300202),
        ("token:refresh", "Platform/platform", 300299),
        ("session:start", "Platform/platform", 300201),
        ("identity:register", "Identity/p-1", 300701),
        ("identity:revoke", "Identity/p-1", 300705),
        ("identity:list", "Platform/platform", 600302),
        ("access:grant", "Identity/p-1", 300716),
        ("access:request", "Approval/1", 600301),
        ("train:submit", "Dataset/adult", 600301),
        ("dataset:read", "Dataset/adult", 600302),
        ("model:promote", "Model/adult@1", 600303),
        ("key:destroy", "Dataset/adult", 600304),
        ("authority:start", "Platform/platform", 600399),
    ],
)
def test_events_are_in_the_class_that_collectors_look_into(action: str, resource: str, type_uid: int) -> None:
    event = Event(**{**FIELDS, "action": action, "resource": resource}).to_ocsf()
    assert event["type_uid"] == type_uid
    assert event["metadata"]["event_code"] == action
    assert event.get("activity_name") == (action.partition(":")[2] if type_uid % 100 == 99 else None)


def test_time_is_written_in_utc_with_milliseconds() -> None:
    moment = datetime(2026, 11, 22, 10, 30, 0, 125_999, tzinfo=timezone(timedelta(hours=1)))
    assert utc_text(moment) == "2026-11-22T09:30:00.125Z"
    assert utc_text(datetime(2026, 1, 2, tzinfo=UTC)) == "2026-01-02T00:00:00.000Z"
    with pytest.raises(InputError):
        utc_text(datetime(2026, 1, 2))
