"""Why a request is denied: which rules forbid it, and what each rule that could permit it lacks.

Built on the policies' JSON form: every scope and every conjunct of every condition is asked of Cedar by itself, all in
one call, so that an explanation cannot disagree with the decision. It shows the attributes of the resource and of the
context, which are names, classes and numbers, never data values, keys or tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cedarpy

from cloister.policy.decide import KINDS, Decision, Policy, Request, cedar_question
from cloister.policy.rules import prepare

MAX_FINDINGS = 5
MAX_SHOWN = 120
_NODE = "call over mutual TLS, from a registered node"
_HINTS = {"context.node": _NODE, "context.node_region": _NODE, "context.node_assurance": _NODE}
# Cedar writes `(resource.owner) == (context.principal_name)`.
_BRACKETED = re.compile(r"(?<!\w)\((\w+\.\w+)\)")
_PREAMBLE = re.compile(r"\A(failed to (parse entities from|build request):\s*)(:\s*)?")
_ANY: Mapping[str, str] = {"op": "All"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule. `reasons` say what a `permit` lacks, or what made a `forbid` apply, each in a line."""

    rule: str
    effect: Literal["permit", "forbid"]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`findings` are the rules that forbid, then those that nearly permit, nearest first; empty when it is allowed.

    `problem` says why the request does not fit the schema, and is empty when it does.
    """

    decision: Decision
    findings: tuple[Finding, ...]
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain maps and lists, as the authority answers: `allowed`, `rules`, `reason`, `problem`, `findings`."""
        return {**asdict(self.decision), "problem": self.problem, "findings": [asdict(one) for one in self.findings]}


def explain(policy: Policy, request: Request) -> Explanation:
    """Decide, and say why. Never raises, however odd the request."""
    decision = policy.decide(request)
    if decision.allowed:
        return Explanation(decision=decision, findings=())
    problem = _problem(policy, request)
    if problem:
        return Explanation(decision=decision, findings=(), problem=problem)
    rules = [_Rule(name, policy.rules[name]) for name in policy.rules]
    asked = _Asked(policy, request, [check for rule in rules for check in rule.checks().items()])
    blocking: list[Finding] = []
    nearly: list[tuple[bool, int, Finding]] = []
    for rule in rules:
        if not asked.covers(rule):
            continue
        if rule.name in decision.rules or asked.fails(rule):
            blocking.append(Finding(rule=rule.name, effect=rule.effect, reasons=tuple(asked.made_it(rule))))
        elif rule.effect == "permit" and (rule.role is None or rule.role in KINDS[request.kind].roles):
            role_missing, reasons = asked.lacks(rule)
            if reasons:
                nearly.append((role_missing, len(reasons), Finding(rule=rule.name, effect="permit", reasons=reasons)))
    nearly.sort(key=lambda one: one[:2])
    return Explanation(decision=decision, findings=tuple([*blocking, *(one for *_, one in nearly)][:MAX_FINDINGS]))


class _Rule:
    """A policy taken apart: its scope, and the conjuncts of its conditions."""

    def __init__(self, name: str, policy: Mapping[str, Any]) -> None:
        self.name = name
        self.effect = policy["effect"]
        self.scope = {part: policy[part] for part in ("principal", "action", "resource")}
        self.conditions = [(one["kind"], list(_conjuncts(one["body"]))) for one in policy["conditions"]]
        entity = self.scope["principal"].get("entity", {})
        self.role = entity.get("id") if entity.get("type") == "Role" else None

    def checks(self) -> dict[str, Any]:
        """Every part as a policy of its own, by a name that cannot be the name of another's part."""
        parts = {f"{self.name}/{part}": _policy({part: scope}) for part, scope in self.scope.items()}
        for number, (_, bodies) in enumerate(self.conditions):
            for place, body in enumerate(bodies):
                parts[f"{self.name}/{number}/{place}"] = _policy({}, body)
        return parts


class _Asked:
    """What Cedar says of every part of every rule for one request."""

    def __init__(self, policy: Policy, request: Request, checks: list[tuple[str, Any]]) -> None:
        question, entities = cedar_question(request)
        answer = cedarpy.is_authorized(question, prepare(dict(checks)), entities, policy.schema)
        self._values = {
            **{f"resource.{name}": value for name, value in request.attributes.items()},
            **{f"context.{name}": value for name, value in question["context"].items()},
        }
        self._true = set(answer.diagnostics.reasons)
        errors = answer.diagnostics.errors
        self._errors = {name for name, _ in checks if any(f"`{name}`" in error for error in errors)}

    def covers(self, rule: _Rule) -> bool:
        """Whether the rule is about this action on this resource, and about callers of this type."""
        other_type = rule.role is None and f"{rule.name}/principal" not in self._true
        return {f"{rule.name}/action", f"{rule.name}/resource"} <= self._true and not other_type

    def fails(self, rule: _Rule) -> bool:
        """Whether Cedar, going from left to right, meets an error in the rule: that denies, whatever its effect."""
        if f"{rule.name}/principal" not in self._true:
            return False
        for kind, parts in self._conditions(rule):
            stop = next((name for name, _ in parts if name not in self._true), None)
            if stop in self._errors:
                return True
            if (stop is None) != (kind == "when"):
                return False
        return False

    def lacks(self, rule: _Rule) -> tuple[bool, tuple[str, ...]]:
        """Whether the role is missing, and everything that a `permit` lacks."""
        role_missing = f"{rule.name}/principal" not in self._true
        reasons = [f"needs the role {rule.role}"] if role_missing else []
        for kind, parts in self._conditions(rule):
            false = self._not_true(parts)
            chosen = false if kind == "when" else [] if false else parts
            reasons += [self._sentence(name, body) for name, body in chosen]
        return role_missing, tuple(reasons)

    def made_it(self, rule: _Rule) -> list[str]:
        """What made a `forbid` apply: the conditions that hold, and those of its `unless` that do not."""
        chosen = [
            part
            for kind, parts in self._conditions(rule)
            for part in (self._not_true(parts) if kind == "unless" else parts)
        ]
        return [self._sentence(name, body) for name, body in chosen] or ["it has no condition"]

    def _conditions(self, rule: _Rule) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
        for number, (kind, bodies) in enumerate(rule.conditions):
            yield kind, [(f"{rule.name}/{number}/{place}", body) for place, body in enumerate(bodies)]

    def _not_true(self, parts: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """The false conjuncts; those that could not be evaluated only where no false one before them explains it."""
        false = [part for part in parts if part[0] not in self._true | self._errors]
        return false or [part for part in parts if part[0] in self._errors]

    def _sentence(self, name: str, body: Any) -> str:
        role = _role_test(body)
        if role and name not in self._true:
            return f"needs the role {role}"
        says = "holds" if name in self._true else "does not hold"
        says = "could not be evaluated" if name in self._errors else says
        facts = ", ".join(self._fact(path) for path in dict.fromkeys(_paths(body)))
        return f"{_text(body)} {says}" + (f": {facts}" if facts else "")

    def _fact(self, path: str) -> str:
        if path not in self._values:
            return f"{path} is missing" + (f" ({_HINTS[path]})" if path in _HINTS else "")
        value = self._values[path]
        plain = isinstance(value, str) and value != "" and value.isprintable()
        return f"{path} is {_short(str(value) if plain else json.dumps(value))}"


def _problem(policy: Policy, request: Request) -> str:
    """Why the request does not fit the schema, in Cedar's words, or "" when it does."""
    try:
        kind = KINDS.get(request.kind)
        if kind is None:
            return f"there is no such kind of caller; kinds: {', '.join(KINDS)}"
        strange = sorted(request.roles - kind.roles)
        if strange:
            return f"a {request.kind} cannot hold the role {_short(strange[0])}"
        question, entities = cedar_question(request)
        for known in ("[]", entities):  # first the question itself, then the attributes
            answer = cedarpy.is_authorized(question, policy.prepared, known, policy.schema)
            if answer.decision == cedarpy.Decision.NoDecision:
                said = " ".join(answer.diagnostics.errors).replace(entities, "")
                return _short(" ".join(_PREAMBLE.sub("", said).split()), 300)
    except (ValueError, TypeError):
        return "a name or a value in it cannot be written as text"
    return ""


def _conjuncts(body: Any) -> Iterator[Any]:
    if isinstance(body, dict) and "&&" in body:
        yield from _conjuncts(body["&&"]["left"])
        yield from _conjuncts(body["&&"]["right"])
    else:
        yield body


def _policy(scope: Mapping[str, Any], condition: Any = None) -> dict[str, Any]:
    conditions = [] if condition is None else [{"kind": "when", "body": condition}]
    parts = {part: scope.get(part, _ANY) for part in ("principal", "action", "resource")}
    return {"effect": "permit", **parts, "conditions": conditions}


def _text(body: Any) -> str:
    """The condition as Cedar writes it."""
    policy = {"staticPolicies": {"c": _policy({}, body)}, "templates": {}, "templateLinks": []}
    written = cedarpy.policies_from_json_str(json.dumps(policy))
    _, _, after = written.partition("when {")
    return _short(_BRACKETED.sub(r"\1", after.rpartition("}")[0].strip()))


def _paths(body: Any) -> Iterator[str]:
    """`resource.owner`, `context.node`…: the attributes that a condition reads, in its order."""
    if isinstance(body, list):
        for part in body:
            yield from _paths(part)
    elif isinstance(body, dict):
        for operator, inside in body.items():
            if operator in (".", "has") and isinstance(inside, dict) and "Var" in inside.get("left", {}):
                yield f"{inside['left']['Var']}.{inside['attr']}"
            else:
                yield from _paths(inside)


def _role_test(body: Any) -> str:
    """The role of `principal in Role::"…"`, or ""."""
    test = body.get("in", {}) if isinstance(body, dict) else {}
    entity = test.get("right", {}).get("Value", {}) if test.get("left") == {"Var": "principal"} else {}
    named = entity.get("__entity", {}) if isinstance(entity, dict) else {}
    return str(named.get("id", "")) if named.get("type") == "Role" else ""


def _short(text: str, characters: int = MAX_SHOWN) -> str:
    text = text if text.isprintable() else json.dumps(text)
    return text if len(text) <= characters else text[: characters - 1] + "…"
