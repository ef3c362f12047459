"""Why was I denied: the explanation names the rule, the role and the attribute, and agrees with the decision."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cloister.policy import Policy, Request
from cloister.policy.explain import MAX_FINDINGS, Explanation, Finding, explain
from policy_oracle import random_request, sensible

DATASET = {"owner": "olga", "region": "eu", "purpose": "research", "class": "internal", "epsilon_left_millionths": 1}
RUN = {"author": "pat", "owner": "olga", "region": "eu", "purpose": "research", "class": "internal"}


def why(roles: str, action: str, named: str, principal: str = "ed", policy: Policy | None = None,
        **more: Any) -> Explanation:  # fmt: skip
    resource_type, _, resource = named.partition("/")
    return explain(policy or Policy.shipped(), Request(principal=principal, roles=frozenset(roles.split()),
                   action=action, resource_type=resource_type, resource=resource, **more))  # fmt: skip


def test_what_is_allowed_needs_no_explanation() -> None:
    explanation = why("auditor", "audit:read", "Platform/platform")
    assert explanation.decision.rules == ("auditors-read-everything-and-change-nothing",)
    assert (explanation.findings, explanation.problem) == ((), "")


def test_a_missing_role_is_named_for_every_rule_that_would_permit() -> None:
    found = why("consumer", "audit:export", "Platform/platform").findings
    assert {finding.reasons for finding in found} == {
        (f"needs the role {role}",) for role in ("operator", "auditor", "security-officer", "reviewer")
    }


def test_a_failed_condition_is_shown_with_the_values_on_both_sides() -> None:
    found = why("data-owner", "dataset:seal", "Dataset/adult", attributes=DATASET).findings
    assert found == (
        Finding(
            rule="owners-seal-budget-and-shred-their-own-data",
            effect="permit",
            reasons=(
                "resource.owner == context.principal_name does not hold: "
                "resource.owner is olga, context.principal_name is ed",
            ),
        ),
    )


def test_the_nearest_rule_comes_first() -> None:
    found = why("engineer", "run:stop", "Run/run-1", attributes=RUN).findings
    assert [finding.rule for finding in found] == ["authors-stop-their-own-runs", "operators-run-the-platform"]
    assert "resource.author is pat" in found[0].reasons[0]
    found = why(
        "", "approval:vote", "Approval/a", attributes={"kind": "promotion", "author": "x", "owner": "olga"}
    ).findings
    assert [finding.rule for finding in found] == [
        "reviewers-vote-on-training-and-promotion",  # only the role is missing
        "security-officers-vote-on-power",
        "owners-vote-on-training-on-their-own-data",
    ]
    assert [len(finding.reasons) for finding in found] == [1, 2, 3]


def test_every_rule_that_forbids_is_shown_with_the_condition_that_made_it() -> None:
    attributes = {**DATASET, "class": "restricted", "epsilon_left_millionths": -5}
    found = why("engineer", "train:submit", "Dataset/adult", attributes=attributes).findings
    assert [(finding.effect, finding.rule) for finding in found] == [
        ("forbid", "restricted-data-is-never-trained-on"),
        ("forbid", "a-spent-budget-trains-nothing"),
    ]
    assert found[0].reasons[0].endswith("does not hold: resource.class is restricted")
    assert found[1].reasons[0].endswith("holds: resource.epsilon_left_millionths is -5")


def test_what_forbids_and_what_does_not_permit_are_both_shown() -> None:
    found = why("auditor", "train:submit", "Dataset/adult", attributes={**DATASET, "class": "restricted"}).findings
    assert [(finding.effect, finding.reasons[0].partition(":")[0]) for finding in found] == [
        ("forbid", '["public", "internal", "confidential"].contains(resource.class) does not hold'),
        ("permit", "needs the role engineer"),
    ]


def test_a_missing_node_comes_with_what_to_do() -> None:
    found = why("run", "run:lease", "Run/run-1", "run-1", kind="run", attributes=RUN).findings
    assert found[0].reasons == (
        "context has node does not hold: context.node is missing (call over mutual TLS, from a registered node)",
    )
    assert "context.node_region is missing" in found[1].reasons[0]
    other = {"node": "node-1", "node_region": "us", "node_assurance": 0}
    found = why("run", "run:lease", "Run/run-1", "run-1", kind="run", attributes=RUN, context=other).findings
    assert found[0].reasons == (
        "context.node_region == resource.region does not hold: context.node_region is us, resource.region is eu",
    )


@pytest.mark.parametrize(("question", "more", "problem"), [
    (("auditor", "model:read", "Model/m"), {"attributes": {"author": "ann"}}, "attribute `stage`"),
    (("auditor", "model:read", "Model/m"), {"attributes": {"author": "ann", "stage": 1}}, "attribute `stage`"),
    (("auditor", "model:peek", "Model/m"), {}, "model:peek"),
    (("auditor", "model:read", "Platform/platform"), {}, "resource type `Platform` is not valid"),
    (("boss", "audit:read", "Platform/platform"), {}, "a person cannot hold the role boss"),
    (("run", "audit:read", "Platform/platform"), {}, "a person cannot hold the role run"),
    (("", "audit:read", "Platform/platform"), {"kind": "god"}, "kinds: person, service"),
    (("auditor", "audit:read", "Platform/platform"), {"context": {"mood": "good"}}, "mood"),
    (("auditor", "audit:read", "Platform/platform", "\ud800"), {}, "cannot be written"),
])  # fmt: skip
def test_a_request_that_does_not_fit_says_where(question: tuple[str, ...], more: dict[str, Any], problem: str) -> None:
    explanation = why(*question, **more)
    assert not explanation.decision.allowed
    assert problem in explanation.problem
    assert "\n" not in explanation.problem
    assert explanation.findings == ()


SITE = """
@id("only-strong-nodes") forbid (principal, action == Action::"model:infer", resource)
unless { context has node_assurance && context.node_assurance >= 1 };
@id("friends") permit (principal == Person::"fred", action == Action::"model:infer", resource);
@id("either") permit (principal, action == Action::"model:infer", resource is Model)
when { principal in Role::"auditor" } unless { resource.author == "x\\n\\"y" || resource.stage like "ret*" };
@id("this-model") permit (principal in Role::"consumer", action == Action::"model:infer", resource == Model::"other");
@id("long") forbid (principal, action == Action::"model:infer", resource) when { context.time == 7 }
when { context.time + 9223372036854775807 < 0 };
"""


def test_a_sites_rules_are_explained_as_the_shipped_ones() -> None:
    site = Policy.shipped().with_site(SITE)
    found = why("consumer", "model:infer", "Model/m", policy=site, context={"node_assurance": 0},
                attributes={"author": 'x\n"y', "stage": ""}).findings  # fmt: skip
    assert {finding.rule: finding.reasons for finding in found} == {
        "only-strong-nodes": ("context.node_assurance >= 1 does not hold: context.node_assurance is 0",),
        "consumers-ask-production-models": ('resource.stage == "production" does not hold: resource.stage is ""',),
        "either": (
            "needs the role auditor",
            '(resource.author == "x\\n\\"y") || (resource.stage like "ret*") holds: '
            'resource.author is "x\\n\\"y", resource.stage is ""',
        ),
    }


def test_a_rule_that_cannot_be_evaluated_is_named_first() -> None:
    site = Policy.shipped().with_site(SITE)
    explanation = why("consumer", "model:infer", "Model/m", policy=site, context={"node_assurance": 1, "time": 7},
                      attributes={"author": "a", "stage": "production"})  # fmt: skip
    assert explanation.decision.reason == "could not be evaluated: long"
    assert explanation.findings[0].rule == "long"
    assert explanation.findings[0].reasons[1].endswith("could not be evaluated: context.time is 7")


def test_long_values_are_cut_and_control_characters_never_reach_a_terminal() -> None:
    found = why(
        "data-owner", "dataset:seal", "Dataset/d", attributes={**DATASET, "owner": "\x1b[2J" + "x" * 5000}
    ).findings
    assert "\x1b" not in found[0].reasons[0]
    assert len(found[0].reasons[0]) < 400


def test_an_explanation_agrees_with_the_decision_on_everything() -> None:
    """And finds a reason for every refusal that makes sense, since at least one rule could permit every action."""
    policy = Policy.shipped()
    source = random.Random(5)  # noqa: S311  # repeatable on purpose
    for _ in range(1500):
        request = random_request(source)
        explanation = explain(policy, request)
        assert explanation.decision == policy.decide(request)
        if explanation.decision.allowed:
            assert not explanation.findings
            continue
        assert bool(explanation.problem) == (not sensible(request))
        assert len(explanation.findings) <= MAX_FINDINGS
        assert all(finding.reasons for finding in explanation.findings)
        forbids = [finding.rule for finding in explanation.findings if finding.effect == "forbid"]
        assert sorted(forbids) == sorted(explanation.decision.rules)
        if not explanation.findings and not explanation.problem:
            assert request.kind in ("run", "endpoint"), request  # no role that these can hold would help
        if not explanation.decision.rules and explanation.findings:
            held_back = {finding.rule for finding in explanation.findings}
            assert all(policy.rules[rule]["effect"] == "permit" for rule in held_back)


def test_an_explanation_travels_as_plain_json() -> None:
    shown = why("data-owner", "dataset:seal", "Dataset/adult", attributes=DATASET).to_dict()
    assert set(shown) == {"allowed", "rules", "reason", "problem", "findings"}
    assert set(shown["findings"][0]) == {"rule", "effect", "reasons"}
