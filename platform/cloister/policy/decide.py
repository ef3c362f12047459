"""`decide(request) -> Decision` over prepared Cedar handles: parsing in every call would cost milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import cedarpy

from cloister.errors import InputError, PermissionDeniedError
from cloister.policy.rules import parse_rules, prepare

Kind = Literal["person", "service", "node", "run", "endpoint"]
Value = str | int | bool

ROLES = ("data-owner", "engineer", "reviewer", "operator", "auditor", "security-officer", "consumer")
WORKLOAD_ROLES = frozenset({"run", "endpoint"})
MAX_SITE_CHARACTERS = 65_536


class KindOfCaller(NamedTuple):
    """Its Cedar type, and the roles that it may hold."""

    type: str
    roles: frozenset[str]


KINDS: Mapping[str, KindOfCaller] = {
    "person": KindOfCaller("Person", frozenset(ROLES)),
    "service": KindOfCaller("Service", frozenset(ROLES)),
    "node": KindOfCaller("Node", frozenset()),
    "run": KindOfCaller("Workload", frozenset({"run"})),
    "endpoint": KindOfCaller("Workload", frozenset({"endpoint"})),
}
_NO_FIT = "the request does not fit the policy schema"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question. `attributes` are the resource's, exactly as the schema declares them for `resource_type`.

    `context` holds `time` (Unix seconds, 0 where it is left out) and, for a caller over mutual TLS, `node`,
    `node_region` and `node_assurance`. The names of both sides are added to it here.
    """

    principal: str
    kind: Kind = "person"
    roles: frozenset[str]
    action: str
    resource_type: str
    resource: str
    attributes: Mapping[str, Value] = field(default_factory=dict)
    context: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`rules` are the ids of the policies that decided; empty when nothing permitted, or the question was no good."""

    allowed: bool
    rules: tuple[str, ...]
    reason: str


class Policy:
    """A validated set of policies, immutable and safe to share between threads."""

    def __init__(self, policies: str, schema: str) -> None:
        """Parse and validate.

        Raises:
            InputError: as `parse_rules`, or the schema is no good.
        """
        try:
            handle = cedarpy.Schema.from_str(schema)
        except ValueError as error:
            raise InputError("the policy schema does not parse", "check it with the Cedar tools") from error
        self._set(handle, parse_rules(policies, handle))

    def _set(self, schema: cedarpy.Schema, rules: dict[str, Any]) -> None:
        self.schema = schema
        self.rules: Mapping[str, Any] = MappingProxyType(rules)  # @id: the policy in Cedar's JSON form
        self.prepared = prepare(rules)

    @classmethod
    def shipped(cls) -> Policy:
        """The policies that come with Cloister."""
        return _shipped()

    def with_site(self, text: str) -> Policy:
        """These policies and a site's own beside them. An empty text adds nothing.

        Raises:
            InputError: as the constructor; or an `@id` that is taken, or a text over `MAX_SITE_CHARACTERS`.
        """
        if len(text) > MAX_SITE_CHARACTERS:
            raise InputError(f"policies of a site have at most {MAX_SITE_CHARACTERS} characters", "write fewer rules")
        own = parse_rules(text, self.schema)
        taken = sorted(own.keys() & self.rules.keys())
        if taken:
            raise InputError(f"the id {taken[0]} is taken by another policy", "give each policy an @id of its own")
        both = object.__new__(type(self))
        both._set(self.schema, {**self.rules, **own})
        return both

    def decide(self, request: Request) -> Decision:
        """Allow only if a policy permits, none forbids and none errors. Never raises, however odd the request."""
        try:
            question, entities = cedar_question(request)
            answer = cedarpy.is_authorized(question, self.prepared, entities, self.schema)
        except (ValueError, TypeError):
            return Decision(allowed=False, rules=(), reason=_NO_FIT)
        diagnostics = answer.diagnostics
        rules = tuple(sorted(diagnostics.reasons))
        if answer.decision == cedarpy.Decision.NoDecision:
            return Decision(allowed=False, rules=(), reason=_NO_FIT)
        if diagnostics.errors:
            failed = sorted(rule for rule in self.rules if any(f"`{rule}`" in text for text in diagnostics.errors))
            return Decision(allowed=False, rules=(), reason="could not be evaluated: " + ", ".join(failed))
        if answer.decision == cedarpy.Decision.Allow:
            return Decision(allowed=True, rules=rules, reason="permitted by " + ", ".join(rules))
        reason = "forbidden by " + ", ".join(rules) if rules else "no rule permits it"
        return Decision(allowed=False, rules=rules, reason=reason)

    def require(self, request: Request) -> Decision:
        """`decide`, or PermissionDeniedError with the rule's name in the message."""
        decision = self.decide(request)
        if not decision.allowed:
            roles = ", ".join(sorted(request.roles)) or "no role"
            raise PermissionDeniedError(
                f"{request.principal} ({roles}) may not {request.action} on {request.resource}: {decision.reason}",
                f"see what is missing: cloister policy explain --action {request.action} "
                f"--resource {request.resource_type}/{request.resource}",
            )
        return decision


def cedar_question(request: Request) -> tuple[dict[str, Any], str]:
    """The request and its entities as Cedar takes them.

    Raises:
        ValueError: a kind of caller that does not exist, or a role that this kind cannot hold.
        TypeError: a value that JSON has no form for.
    """
    kind = KINDS.get(request.kind)
    if kind is None or not request.roles <= kind.roles:
        raise ValueError("a role that this kind of caller cannot hold")
    principal = {"type": kind.type, "id": request.principal}
    resource = {"type": request.resource_type, "id": request.resource}
    entities = [
        {"uid": principal, "attrs": {}, "parents": [{"type": "Role", "id": role} for role in request.roles]},
        {"uid": resource, "attrs": dict(request.attributes), "parents": []},
    ]
    # The names come last: no context that a caller passes replaces them.
    names = {"principal_name": request.principal, "resource_name": request.resource}
    question = {
        "principal": principal,
        "action": {"type": "Action", "id": request.action},
        "resource": resource,
        "context": {"time": 0, **request.context, **names},
    }
    return question, json.dumps(entities)


@lru_cache(maxsize=1)
def _shipped() -> Policy:
    folder = resources.files("cloister.policy")
    return Policy((folder / "policies.cedar").read_text(), (folder / "schema.cedarschema").read_text())
