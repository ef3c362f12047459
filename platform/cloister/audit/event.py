"""One entry of the log: who did what to what, when, from where, under which rule, and how it ended. An OCSF 1.9 event.

Guarantees: one event has one encoding (RFC 8785 JSON), and `from_bytes` accepts nothing else; the encoding is a valid
OCSF 1.9.0 event, so that collectors read the log as it is; details are single values with short text, so neither a row
nor a file fits in. An event cannot be changed once made.

Does not guarantee: that its texts hold no secret and no personal name. Whoever writes an event picks what to say:
pseudonyms, names of things, counts, digests.

Which class (https://schema.ocsf.io/1.9.0): `token:*` and `session:*` are Authentication, what is done to an identity is
User Management (it takes the place of Account Change and User Access Management since 1.9), all else is API Activity.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from cloister.canonical import canonical_json
from cloister.errors import InputError, IntegrityError

FORMAT = "cloister.dev/event/v2"
OCSF_VERSION = "1.9.0"
MAX_TEXT = 512  # characters
MAX_DETAILS = 64
MAX_INTEGER = 2**53 - 1  # RFC 7493, section 2.2: what every JSON reader can hold

Outcome = Literal["success", "denied", "failure"]
ActorKind = Literal["person", "service", "node", "run", "endpoint", "authority", "unknown"]
Scalar = str | int | float | bool | None

_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z", re.ASCII)
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character: UTF-8 cannot hold it
_DETAIL_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TEXTS = ("actor", "action", "resource", "reason", "rule", "source", "correlation")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

# The numbers and captions of OCSF 1.9.0.
AUTHENTICATION, USER_MANAGEMENT, API_ACTIVITY = 3002, 3007, 6003
OTHER = 99
_SUCCESS, _FAILURE = {"status": "Success", "status_id": 1}, {"status": "Failure", "status_id": 2}
_OUTCOMES: dict[str, dict[str, Any]] = {
    "success": _SUCCESS | {"severity_id": 1, "action_id": 1, "disposition_id": 1},  # Informational; Allowed
    "denied": _FAILURE | {"severity_id": 3, "action_id": 2, "disposition_id": 26},  # Medium; Denied, Unauthorized
    "failure": _FAILURE | {"severity_id": 2, "action_id": 0, "disposition_id": 27},  # Low; Unknown, Error
}
_DISPOSITIONS = {fields["disposition_id"]: outcome for outcome, fields in _OUTCOMES.items()}
_USER_TYPES: dict[str, tuple[str, int]] = {
    "unknown": ("Unknown", 0), "person": ("User", 1), "authority": ("System", 3), "service": ("Service", 4),
    "node": ("node", OTHER), "run": ("run", OTHER), "endpoint": ("endpoint", OTHER),
}  # fmt: skip
_KINDS = {caption: kind for kind, (caption, _) in _USER_TYPES.items()}
_SOMEBODY = "Identity"  # the type of a resource that is a person, a service or a workload


def _activities(numbers: Mapping[int, str]) -> dict[str, int]:
    return {verb: number for number, verbs in numbers.items() for verb in verbs.split()}


_ACTIVITIES = {
    AUTHENTICATION: _activities({1: "issue exchange start", 2: "revoke end logout"}),  # Logon, Logoff
    # Create, Update, Delete, Enable, Disable, Assign Roles, Remove Roles
    USER_MANAGEMENT: _activities(
        {1: "register create bootstrap enrol", 2: "update set rotate", 3: "delete remove shred erase", 4: "enable",
         5: "disable revoke", 16: "grant elevate", 17: "withdraw expire"}
    ),
    # Create, Read, Update, Delete
    API_ACTIVITY: _activities(
        {1: "create register bootstrap seal submit deploy request issue", 2: "read list show search export plan verify",
         3: "update set rotate renew promote retire approve deny vote grant work", 4: "delete destroy erase shred"}
    ),
}  # fmt: skip


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
    """`rule` names the policy or check that decided, `reason` says why in words; both may be empty.

    `resource` reads `Type/name`. `correlation` is the same in the intent and the outcome of one effect, and empty where
    there is only one entry. An empty `source` becomes "unknown".
    """

    time: str
    actor: str
    actor_kind: ActorKind = "unknown"
    action: str
    resource: str
    outcome: Outcome
    reason: str = ""
    rule: str = ""
    source: str = "unknown"
    correlation: str = ""
    details: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TEXTS:
            if not _is_text(getattr(self, name)):
                raise InputError(f"the event's {name} is not text of at most {MAX_TEXT} characters", "shorten it")
        if not self.actor or not self.action or not self.resource:
            raise InputError("an event needs an actor, an action and a resource", "name all three")
        if self.outcome not in get_args(Outcome):
            raise InputError("an event's outcome is success, denied or failure", "pick one of the three")
        if self.actor_kind not in get_args(ActorKind):
            raise InputError("an event's actor is of no known kind", f"pick one of {', '.join(get_args(ActorKind))}")
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
        object.__setattr__(self, "source", self.source or "unknown")

    def to_ocsf(self) -> dict[str, Any]:
        """The event as OCSF 1.9.0 has it; no attribute that the schema does not know, details under `unmapped`."""
        kind, _, name = self.resource.partition("/")
        resource = {"type": kind, "uid": name} if "/" in self.resource else {"uid": self.resource}
        class_uid = _class_of(self.action, kind)
        verb = self.action.rpartition(":")[2] or self.action
        activity = _ACTIVITIES[class_uid].get(verb, OTHER)
        caption, type_id = _USER_TYPES[self.actor_kind]
        actor = {"type": caption, "type_id": type_id, "uid": self.actor}
        metadata: dict[str, Any] = {
            "event_code": self.action,
            "log_version": FORMAT,
            "product": {"name": "Cloister", "vendor_name": "Cloister"},
            "profiles": ["security_control"] if class_uid == API_ACTIVITY else ["host", "security_control"],
            "version": OCSF_VERSION,
        }
        event: dict[str, Any] = {
            "activity_id": activity,
            "actor": {"user": actor},
            "category_uid": class_uid // 1000,
            "class_uid": class_uid,
            "metadata": metadata,
            "resources": [resource],
            "src_endpoint": {"uid": self.source},
            "time": (datetime.fromisoformat(self.time) - _EPOCH) // _MILLISECOND,
            "type_uid": class_uid * 100 + activity,
            **_OUTCOMES[self.outcome],
        }
        if activity == OTHER:
            event["activity_name"] = verb
        if class_uid == API_ACTIVITY:
            event["api"] = {"operation": self.action, "service": {"name": "authority"}}
        elif class_uid == AUTHENTICATION:
            event |= {"user": actor, "service": {"name": "authority"}}
            event["unmapped"] = {"resource": event.pop("resources")[0]}  # Authentication has no resources
        else:
            event["user"] = {"uid": name}
        if self.correlation:
            metadata["correlation_uid"] = self.correlation
        if self.reason:
            event["status_detail"] = self.reason
        if self.rule:
            decision = "deny" if self.outcome == "denied" else "allow"
            event["authorizations"] = [{"decision": decision, "policy": {"uid": self.rule}}]
        if self.details:
            event.setdefault("unmapped", {})["details"] = dict(self.details)
        return event

    def to_bytes(self) -> bytes:
        """The log entry: canonical JSON of the OCSF event, in one line."""
        return canonical_json(self.to_ocsf())

    @classmethod
    def from_bytes(cls, data: bytes) -> Event:
        """The event in a log entry.

        Raises:
            IntegrityError: not the one encoding of an event of this format.
        """
        refused = IntegrityError("this is not an event of a known format", "verify the log before reading it")
        try:
            event = _from_ocsf(json.loads(data))
            unchanged = event.to_bytes() == data
        except (InputError, TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError):
            raise refused from None
        if not unchanged:
            raise refused
        return event


def _from_ocsf(ocsf: Any) -> Event:
    """The event that `ocsf` may be the encoding of: `from_bytes` compares."""
    unmapped = ocsf.get("unmapped", {})
    resource = ocsf["resources"][0] if "resources" in ocsf else unmapped["resource"]
    actor, metadata = ocsf["actor"]["user"], ocsf["metadata"]
    authorizations = ocsf.get("authorizations")
    return Event(
        time=utc_text(_EPOCH + ocsf["time"] * _MILLISECOND),
        actor=actor["uid"],
        actor_kind=_KINDS[actor["type"]],  # type: ignore[arg-type]  # the table is made of the kinds
        action=metadata["event_code"],
        resource=f"{resource['type']}/{resource['uid']}" if "type" in resource else resource["uid"],
        outcome=_DISPOSITIONS[ocsf["disposition_id"]],  # type: ignore[arg-type]  # the table is made of the outcomes
        reason=ocsf.get("status_detail", ""),
        rule=authorizations[0]["policy"]["uid"] if authorizations else "",
        source=ocsf["src_endpoint"]["uid"],
        correlation=metadata.get("correlation_uid", ""),
        details=unmapped.get("details", {}),
    )


def _class_of(action: str, resource_type: str) -> int:
    family = action.partition(":")[0]
    if family in ("token", "session"):
        return AUTHENTICATION
    if family in ("identity", "access") and resource_type == _SOMEBODY:
        return USER_MANAGEMENT
    return API_ACTIVITY


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
