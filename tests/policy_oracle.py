"""The shipped rules a second time, in plain Python and from their intent, with requests at random to compare them on.

Nothing here is made from the Cedar text or its schema: a slip in one of the two shows as a difference.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from cloister.policy import Decision, Policy, Request

PEOPLES_ROLES = {"data-owner", "engineer", "reviewer", "operator", "auditor", "security-officer", "consumer"}

# action: (who can ask at all, what about)
SIGNATURES = {
    **dict.fromkeys(
        ("identity:list", "audit:read", "audit:export", "endpoint:list", "approval:list", "policy:read",
         "identity:register", "node:register", "endpoint:deploy", "policy:propose", "access:request",
         "token-key:rotate", "key:list", "key:rotate", "backup:create", "backup:restore", "state:check"),
        ({"person", "service"}, "Platform"),
    ),
    "node:certify": ({"node"}, "Platform"),
    **dict.fromkeys(
        ("identity:change", "identity:revoke", "identity:shred", "identity:key", "identity:me"),
        ({"person", "service"}, "Identity"),
    ),
    **dict.fromkeys(
        ("dataset:read", "dataset:seal", "dataset:open", "dataset:erase", "dataset:rectify", "dataset:expire",
         "budget:set", "key:destroy", "train:plan", "train:submit"),
        ({"person", "service"}, "Dataset"),
    ),
    "run:read": ({"person", "service", "run", "endpoint"}, "Run"),
    "run:stop": ({"person", "service"}, "Run"),
    **dict.fromkeys(("run:lease", "run:work"), ({"run", "endpoint"}, "Run")),
    **dict.fromkeys(("model:read", "model:promote", "model:export", "model:infer"), ({"person", "service"}, "Model")),
    "endpoint:stop": ({"person", "service"}, "Endpoint"),
    **dict.fromkeys(("endpoint:lease", "endpoint:work"), ({"run", "endpoint"}, "Endpoint")),
    "approval:vote": ({"person"}, "Approval"),
}  # fmt: skip
ATTRIBUTES: dict[str, dict[str, type]] = {
    "Platform": {},
    "Identity": {"name": str},
    "Dataset": {"owner": str, "region": str, "purpose": str, "class": str, "epsilon_left_millionths": int},
    "Run": {"author": str, "owner": str, "region": str, "purpose": str, "class": str},
    "Model": {"author": str, "stage": str},
    "Endpoint": {"model": str},
    "Approval": {"kind": str, "author": str, "owner": str},
}
CONTEXT: dict[str, type] = {"time": int, "node": str, "node_region": str, "node_assurance": int}

READING = {"identity:list", "audit:read", "audit:export", "endpoint:list", "approval:list", "policy:read",
           "key:list", "dataset:read", "run:read", "model:read"}  # fmt: skip

# A site whose own rules permit everything: what is still refused is refused by an invariant.
HOSTILE_SITE = '@id("anything-goes") permit (principal, action, resource);'


def allows(request: Request) -> bool:
    """Whether the shipped rules allow it."""
    return sensible(request) and permitted(request) and not forbidden(request)


def allows_beside_a_hostile_site(request: Request) -> bool:
    """Whether they allow it where the site permits everything that it can."""
    return sensible(request) and not forbidden(request)


def sensible(request: Request) -> bool:
    """Whether the question makes sense: an action that exists, asked by the right kind about the right thing."""
    if request.action not in SIGNATURES:
        return False
    kinds, resource_type = SIGNATURES[request.action]
    if request.kind not in kinds or request.resource_type != resource_type:
        return False
    if request.kind in ("person", "service") and not request.roles <= PEOPLES_ROLES:
        return False
    if request.kind in ("run", "endpoint") and not request.roles <= {request.kind}:
        return False
    if request.kind == "node" and request.roles:
        return False
    attributes = ATTRIBUTES[resource_type]
    if set(request.attributes) != set(attributes) or not all(
        _is(request.attributes[n], attributes[n]) for n in attributes
    ):
        return False
    for name, value in request.context.items():
        if name in ("principal_name", "resource_name"):
            continue  # replaced by the true ones, whatever they say
        if name not in CONTEXT or not _is(value, CONTEXT[name]):
            return False
    return _is(request.principal, str) and _is(request.resource, str)


def permitted(request: Request) -> bool:
    """Whether somebody in one of these roles is meant to do this."""
    me, roles, action = request.principal, request.roles, request.action
    about: Any = request.attributes
    if "operator" in roles and (
        action in READING
        or action in ("identity:register", "node:register", "token-key:rotate", "identity:change", "identity:revoke")
        or action == "key:rotate"
        or action in ("endpoint:deploy", "endpoint:stop", "run:stop", "access:request")
        or action in ("backup:create", "backup:restore", "state:check")
    ):
        return True
    if "auditor" in roles and action in READING:
        return True
    if "security-officer" in roles:
        if action in READING or action in ("identity:revoke", "identity:shred", "policy:propose", "key:rotate"):
            return True
        if action == "approval:vote" and about["kind"] in ("policy", "access", "budget", "key-destruction"):
            return True
    if "data-owner" in roles:
        if action in ("dataset:read", "run:read", "approval:list", "policy:read"):
            return True
        own = ("dataset:seal", "dataset:open", "dataset:erase", "dataset:rectify", "dataset:expire", "budget:set")
        if (action in own or action == "key:destroy") and about["owner"] == me:
            return True
        if action == "approval:vote" and about["kind"] == "training" and about["owner"] == me:
            return True
    if "engineer" in roles:
        if action in ("train:plan", "train:submit", "model:promote", "model:export", "access:request"):
            return True
        if action in ("dataset:read", "run:read", "model:read", "approval:list", "policy:read"):
            return True
        if action == "run:stop" and about["author"] == me:
            return True
    if "reviewer" in roles:
        if action in ("dataset:read", "run:read", "model:read", "approval:list", "policy:read"):
            return True
        if action in ("audit:read", "audit:export"):
            return True
        if action == "approval:vote" and about["kind"] in ("training", "promotion"):
            return True
    if "consumer" in roles and action == "model:infer" and about["stage"] == "production":
        return True
    if "run" in roles and action in ("run:read", "run:lease", "run:work") and request.resource == me:
        return True
    if "endpoint" in roles and action in ("endpoint:lease", "endpoint:work"):
        return True
    if request.kind == "node" and action == "node:certify":
        return True
    return action in ("identity:key", "identity:me", "identity:revoke") and about["name"] == me


def forbidden(request: Request) -> bool:
    """Whether an invariant is against it, whoever permits it."""
    me, action = request.principal, request.action
    about, context = request.attributes, request.context
    if action == "approval:vote" and about["author"] == me:
        return True
    if action == "identity:change" and about["name"] == me:
        return True
    if action == "identity:key" and about["name"] != me:
        return True
    if action in ("run:lease", "run:work", "endpoint:lease", "endpoint:work"):
        if request.resource != me:
            return True
        if "node" not in context:
            return True
    if action == "run:lease" and context.get("node_region") != about["region"]:
        return True
    opens = ("dataset:seal", "dataset:open", "dataset:erase", "dataset:rectify")
    if action in opens and about["region"] and context.get("node_region", about["region"]) != about["region"]:
        return True
    if action == "train:submit":
        if about["class"] not in ("public", "internal", "confidential"):
            return True
        if about["epsilon_left_millionths"] <= 0:  # type: ignore[operator]  # `sensible` has checked that
            return True
    return action == "model:export" and about["stage"] != "production"


def _is(value: object, wanted: type) -> bool:
    """A string that can be written as UTF-8, or a whole number of 64 bits; a bool is no number."""
    if type(value) is not wanted:
        return False
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, int) and -(2**63) <= value < 2**63


# ---- requests at random: mostly ones that make sense and hang on one condition, some that are odd in every way

_NAMES = ("ed", "olga", "run-1")
_ODD_NAMES = (
    "",
    'a"b',
    "a\\",
    "two\nlines",
    "nul\0",
    "ünï·☃",
    'x" || true || "',
    "\ud800",
    "Role",
    "{}",
    "'",
    "a" * 300,
)
_VALUES = {
    "class": ("public", "internal", "confidential", "restricted", "secret", ""),
    "stage": ("candidate", "production", "retired", ""),
    "kind": ("training", "promotion", "key-destruction", "budget", "policy", "access", "other"),
    "region": ("eu", "us", ""), "node_region": ("eu", "us"), "purpose": ("income-research", "ads"),
    "node": ("node-1", "node-2"), "model": ("adult@1", "adult@2"),
}  # fmt: skip
_NUMBERS = (-1, 0, 1, 3_000_000, 2**63 - 1, -(2**63))
_ODD_VALUES: tuple[Any, ...] = ("", "x", 0, 7, 2**63, -(2**63) - 1, True, False, 1.5, None, "\udfff", [], {}, "ed")
_ODD_ACTIONS = ("read", "model:approve", "platform:destroy", "", 'model:infer"', "*", "Model:Read")
_ODD_TYPES = ("Person", "Role", "Action", "", "No Such", "model", "Workload", "Model::Model")
_ODD_ROLES = ("boss", "", "Operator", "run", "endpoint", 'operator"', "consumer")
_ACTIONS = (
    *sorted(SIGNATURES), *("approval:vote",) * 8,
    *("train:submit", "run:read", "run:lease", "run:work", "endpoint:lease", "endpoint:work") * 2,
)  # fmt: skip  # those that hang on most conditions come more often


def random_request(source: random.Random) -> Request:
    """One request. The same state of `random` gives the same one."""
    odd = source.random
    action = source.choice(_ACTIONS)
    kinds, resource_type = SIGNATURES[action]
    kind: Any = source.choice(sorted(kinds) if odd() < 0.9 else ("person", "service", "node", "run", "endpoint", "god"))
    name: dict[str, Any] = {part: source.choice(_NAMES if odd() < 0.97 else _ODD_NAMES) for part in ("me", "it")}
    held = sorted(PEOPLES_ROLES) if kind in ("person", "service") else [kind] if kind in ("run", "endpoint") else []
    roles = set(source.sample(held, min(len(held), source.choice((0, 1, 1, 1, 2, 3)))))
    if odd() < 0.03:
        roles.add(source.choice(_ODD_ROLES))
    if odd() < 0.02:
        resource_type = source.choice((*ATTRIBUTES, *_ODD_TYPES))
    attributes = {
        part: _value(source, part, kind_of, name["me"]) for part, kind_of in ATTRIBUTES.get(resource_type, {}).items()
    }
    context: dict[str, Any] = {"time": source.randrange(2_000_000_000)} if odd() < 0.9 else {}
    for part in ("node", "node_region"):
        if odd() < 0.75:
            context[part] = _value(source, part, str, "")
    if odd() < 0.7:
        context["node_assurance"] = source.choice((0, 1, 2))
    for mapping in (attributes, context):
        if odd() < 0.04:
            mapping[source.choice((*mapping, "extra", "owner", "principal_name", "time"))] = source.choice(_ODD_VALUES)
        if mapping and odd() < 0.03:
            del mapping[source.choice(sorted(mapping))]
    if odd() < 0.02:
        action = source.choice(_ODD_ACTIONS)
    return Request(
        principal=name["me"], kind=kind, roles=frozenset(roles), action=action, resource_type=resource_type,
        resource=name["it"], attributes=attributes, context=context,
    )  # fmt: skip


def _value(source: random.Random, part: str, kind: type, me: str) -> Any:
    if kind is int:
        return source.choice(_NUMBERS)
    if part in _VALUES:
        return source.choice(_VALUES[part])
    return source.choice((me, *_NAMES))


def differences(shipped: Policy, count: int, seed: int) -> Iterator[tuple[Request, Decision, bool]]:
    """Requests on which Cedar and the oracle disagree: half of them asked of the shipped rules alone, half beside a
    site that permits everything."""
    hostile = shipped.with_site(HOSTILE_SITE)
    source = random.Random(seed)  # noqa: S311  # repeatable on purpose
    for number in range(count):
        request = random_request(source)
        policy, oracle = (shipped, allows) if number % 2 else (hostile, allows_beside_a_hostile_site)
        decision, expected = policy.decide(request), oracle(request)
        if decision.allowed != expected:
            yield request, decision, expected
