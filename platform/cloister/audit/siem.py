"""Events as collectors want them: RFC 5424 syslog, framed for TLS as RFC 5425 asks, and CEF.

Guarantees: one event is one message, whatever its texts hold: nothing in them ends a field, a line or a frame. Both
carry the entry's index, so that a message can be traced to its proof; syslog carries the whole entry too.

Does not guarantee: integrity. Who needs that verifies the log, or asks for a proof of the entry.
"""

from __future__ import annotations

import re

from cloister.audit.event import Event
from cloister.canonical import canonical_json

LOG_AUDIT = 13  # RFC 5424, section 6.2.1: facility "log audit"
_SEVERITY = {"success": 6, "failure": 4, "denied": 5}  # RFC 5424: Informational, Warning, Notice
# RFC 5612: the number for documentation, until Cloister has one of its own.
SD_ID = "cloister@32473"
_BOM = b"\xef\xbb\xbf"  # RFC 5424, section 6.4: a message in UTF-8 begins with it
_NOT_PRINTABLE = re.compile(r"[^\x21-\x7e]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CEF_SEVERITY = {"success": 3, "failure": 6, "denied": 8}  # CEF: 0-3 low, 4-6 medium, 7-8 high


def syslog(index: int, event: Event, hostname: str) -> bytes:
    """RFC 5424. The entry itself is the message; the facts that filters look at are structured data."""
    priority = LOG_AUDIT * 8 + _SEVERITY[event.outcome]
    facts = {
        "index": str(index), "actor": event.actor, "kind": event.actor_kind, "action": event.action,
        "resource": event.resource, "outcome": event.outcome, "rule": event.rule, "source": event.source,
        "correlation": event.correlation,
    }  # fmt: skip
    data = " ".join(f'{name}="{_parameter(text)}"' for name, text in facts.items() if text)
    head = f"<{priority}>1 {event.time} {_word(hostname, 255)} cloister - {_word(event.action, 32)} [{SD_ID} {data}] "
    return head.encode() + _BOM + event.to_bytes()


def frame(message: bytes) -> bytes:
    """RFC 5425, section 4.3: the length in octets, a space, the message."""
    return b"%d %s" % (len(message), message)


def cef(index: int, event: Event, version: str) -> str:
    """ArcSight Common Event Format, version 0; one line. `version` is that of the product."""
    header = ["CEF:0", "Cloister", "authority", version, event.action, event.action]
    extension = {
        "rt": str(event.to_ocsf()["time"]), "externalId": str(index), "suid": event.actor, "act": event.action,
        "outcome": event.outcome, "reason": event.reason, "request": event.resource, "shost": event.source,
        "cs1Label": "rule", "cs1": event.rule, "cs2Label": "correlation", "cs2": event.correlation,
        "cs3Label": "details", "cs3": canonical_json(dict(event.details)).decode() if event.details else "",
        "cs4Label": "actorKind", "cs4": event.actor_kind,
    }  # fmt: skip
    for label in [name for name in extension if name.endswith("Label")]:
        if not extension[label.removesuffix("Label")]:
            del extension[label]
    parts = [_cef_header(text) for text in header] + [str(_CEF_SEVERITY[event.outcome])]
    pairs = " ".join(f"{name}={_cef_value(text)}" for name, text in extension.items() if text)
    return "|".join(parts) + "|" + pairs


def _word(text: str, length: int) -> str:
    """A header field of RFC 5424: printable ASCII without spaces, not empty."""
    return _NOT_PRINTABLE.sub("_", text)[:length] or "-"


def _parameter(text: str) -> str:
    """RFC 5424, section 6.3.3. Control characters, which relays change at will, are shown as U+FFFD."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")
    return _CONTROL.sub("\ufffd", escaped)


def _cef_header(text: str) -> str:
    return _CONTROL.sub(" ", text.replace("\\", "\\\\").replace("|", "\\|"))


def _cef_value(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("=", "\\=").replace("\r", "\\r").replace("\n", "\\n")
    return _CONTROL.sub("\ufffd", escaped)
