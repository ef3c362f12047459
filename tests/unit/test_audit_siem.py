"""Syslog and CEF messages that a receiver cuts where we meant, whatever an event's texts hold."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.audit import siem
from cloister.audit.event import Event

NASTY = 'a"b\\c]d|e=f\ng\rh\x00i\u2028j\x7fk é😀'
PLAIN: dict[str, Any] = {
    "time": "2026-11-22T09:30:00.125Z", "actor": "p-1", "actor_kind": "person", "action": "train:submit",
    "resource": "Dataset/adult", "outcome": "success",
}  # fmt: skip
TEXTS = ("actor", "action", "resource", "reason", "rule", "source", "correlation")
WORST = PLAIN | dict.fromkeys(TEXTS, NASTY) | {"details": {"note": NASTY}}


def test_a_plain_message_reads_as_rfc_5424_has_it() -> None:
    message = siem.syslog(7, Event(**PLAIN, rule="r"), "authority.example").decode()
    assert message.startswith(
        '<110>1 2026-11-22T09:30:00.125Z authority.example cloister - train:submit [cloister@32473 index="7" '
        'actor="p-1" kind="person" action="train:submit" resource="Dataset/adult" outcome="success" rule="r" '
        'source="unknown"] \ufeff{'
    )
    assert siem.syslog(7, Event(**PLAIN | {"outcome": "denied"}), "x").startswith(b"<109>1 ")
    assert siem.syslog(7, Event(**PLAIN | {"outcome": "failure"}), "x").startswith(b"<108>1 ")


def parse_syslog(message: bytes) -> tuple[list[str], dict[str, str], bytes]:
    """A receiver, from RFC 5424, section 6: header fields, parameters, message."""
    *header, rest = message.decode().split(" ", 6)
    assert rest.startswith(f"[{siem.SD_ID} ")
    place, parameters = len(siem.SD_ID) + 1, {}
    while rest[place] == " ":
        name, place = rest[place + 1 :].split("=", 1)[0], rest.index('="', place) + 2
        value = ""
        while rest[place] != '"':
            assert rest[place] != "]"
            if rest[place] == "\\":
                place += 1
                assert rest[place] in '"\\]'
            value, place = value + rest[place], place + 1
        parameters[name], place = value, place + 1
    assert rest[place : place + 3] == "] \ufeff"
    return header, parameters, rest[place + 3 :].encode()


def test_nothing_in_an_event_ends_a_field_or_a_line_of_syslog() -> None:
    event = Event(**WORST)
    message = siem.syslog(7, event, "host with spaces\n")
    header, parameters, entry = parse_syslog(message)
    assert entry == event.to_bytes()
    assert header[2] == "host_with_spaces_"
    assert re.fullmatch(r"[\x21-\x7e]{1,32}", header[5])
    shown = re.sub(r"[\x00-\x1f\x7f\u2028]", "\ufffd", NASTY)
    assert parameters["actor"] == parameters["rule"] == parameters["resource"] == shown
    assert b"\n" not in message
    assert siem.frame(message) == str(len(message)).encode() + b" " + message


def parse_cef(line: str) -> tuple[list[str], dict[str, str]]:
    """A receiver: seven fields between bars, then name=value pairs."""
    fields = re.split(r"(?<!\\)(?:\\\\)*\|", line, maxsplit=7)
    assert len(fields) == 8
    pairs = re.findall(r"(\w+)=((?:\\.|[^\\=])*?)(?= \w+=|$)", fields[7])
    plain = {"\\\\": "\\", "\\=": "=", "\\n": "\n", "\\r": "\r"}
    return fields[:7], {name: re.sub(r"\\.", lambda one: plain[one[0]], value) for name, value in pairs}


def test_a_plain_cef_line() -> None:
    header, extension = parse_cef(siem.cef(7, Event(**PLAIN, rule="r", details={"steps": 3}), "2"))
    assert header == ["CEF:0", "Cloister", "authority", "2", "train:submit", "train:submit", "3"]
    assert extension == {
        "rt": "1795339800125", "externalId": "7", "suid": "p-1", "act": "train:submit", "outcome": "success",
        "request": "Dataset/adult", "shost": "unknown", "cs1Label": "rule", "cs1": "r", "cs3Label": "details",
        "cs3": '{"steps":3}', "cs4Label": "actorKind", "cs4": "person",
    }  # fmt: skip


def test_nothing_in_an_event_ends_a_field_or_a_line_of_cef() -> None:
    line = siem.cef(7, Event(**WORST), "2")
    assert not re.search(r"[\x00-\x1f\x7f\u2028]", line)
    header, extension = parse_cef(line)
    assert header[4] == 'a"b\\\\c]d\\|e=f g h i j k é😀'
    shown = re.sub(r"[\x00\x7f\u2028]", "\ufffd", NASTY)
    assert extension["suid"] == extension["cs1"] == extension["request"] == shown


@given(st.text(min_size=1, max_size=40), st.text(max_size=40))
def test_any_text_stays_within_its_field(actor: str, rule: str) -> None:
    event = Event(**PLAIN | {"actor": actor, "rule": rule})
    _, parameters, entry = parse_syslog(siem.syslog(0, event, "h"))
    assert entry == event.to_bytes()
    assert parameters.keys() >= {"index", "actor", "source"}
    header, extension = parse_cef(siem.cef(0, event, "2"))
    assert header[6] == "3"
    assert {"rt", "externalId", "suid", "act", "shost"} <= extension.keys() <= {
        "rt", "externalId", "suid", "act", "outcome", "request", "shost", "cs1Label", "cs1", "cs4Label", "cs4",
    }  # fmt: skip


@pytest.mark.parametrize("outcome", ["success", "denied", "failure"])
def test_severities_order_outcomes(outcome: str) -> None:
    assert parse_cef(siem.cef(0, Event(**PLAIN | {"outcome": outcome}), "2"))[0][6] == {
        "success": "3", "failure": "6", "denied": "8"}[outcome]  # fmt: skip
