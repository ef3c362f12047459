"""Cedar and the plain Python oracle agree on 20,000 random requests, and every part of every shipped rule matters."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterator
from importlib import resources
from typing import Any

import cedarpy

from cloister.policy import ROLES, WORKLOAD_ROLES, Policy
from policy_oracle import ATTRIBUTES, SIGNATURES, allows, differences, random_request, sensible

SCHEMA = (resources.files("cloister.policy") / "schema.cedarschema").read_text()
SEED = 20261122


def test_cedar_and_the_oracle_agree() -> None:
    assert list(itertools.islice(differences(Policy.shipped(), 20_000, SEED), 5)) == []


def test_the_requests_hang_in_the_balance() -> None:
    """Random requests that nearly all fail for one reason would prove nothing."""
    source = random.Random(SEED)  # noqa: S311  # repeatable on purpose
    requests = [random_request(source) for _ in range(20_000)]
    assert {request.action for request in requests if allows(request)} == set(SIGNATURES)
    assert {request.action for request in requests if sensible(request) and not allows(request)} == set(SIGNATURES) - {
        "node:certify"
    }
    assert {role for request in requests if allows(request) for role in request.roles} == {*ROLES, *WORKLOAD_ROLES}
    assert {request.resource_type for request in requests} > set(ATTRIBUTES)
    assert 0.1 < sum(map(allows, requests)) / len(requests) < 0.5


def mutants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every shipped rule left out; each of its conditions, its role and each of its actions left out."""
    shipped: dict[str, Any] = {name: dict(rule) for name, rule in Policy.shipped().rules.items()}
    for name, rule in shipped.items():
        yield f"{name}-removed", {other: shipped[other] for other in shipped if other != name}
        for number in range(len(rule["conditions"])):
            changed = copy.deepcopy(rule)
            del changed["conditions"][number]
            yield f"{name}-unconditional-{number}", shipped | {name: changed}
        if rule["principal"]["op"] == "in":
            yield f"{name}-for-everyone", shipped | {name: rule | {"principal": {"op": "All"}}}
        for action in rule["action"].get("entities", []):
            left = [other for other in rule["action"]["entities"] if other != action]
            changed = rule | {"action": {"op": "in", "entities": left}}
            yield f"{name}-without-{action['id']}", shipped | {name: changed}


def test_the_comparison_notices_every_rule_that_is_weaker() -> None:
    unnoticed, count = [], 0
    for name, rules in mutants():
        text = cedarpy.policies_from_json_str(
            json.dumps({"staticPolicies": rules, "templates": {}, "templateLinks": []})
        )
        mutant = Policy(text, SCHEMA)
        assert mutant.rules.keys() == rules.keys()
        count += 1
        if next(differences(mutant, 20_000, SEED), None) is None:
            unnoticed.append(name)
    assert unnoticed == []
    assert count > 100


def test_an_error_in_a_rule_denies_what_the_oracle_allows() -> None:
    """The same comparison, were errors skipped as Cedar does, would find no difference."""
    broken = Policy.shipped().with_site(
        '@id("overflows") forbid (principal, action, resource) when { context.time + 9223372036854775807 < 0 };'
    )
    request, decision, expected = next(differences(broken, 1000, SEED))
    assert expected
    assert not decision.allowed
    assert request.context["time"]
    assert decision.reason == "could not be evaluated: overflows"
