"""Policy: nothing is allowed that no rule permits, an error is a refusal, and a site cannot lift an invariant.

That each shipped rule says what is meant is compared with plain Python in tests/properties/test_policy_oracle.py.
"""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest

from cloister.errors import InputError, PermissionDeniedError
from cloister.policy import ROLES, Decision, Policy, Request
from cloister.policy.decide import MAX_SITE_CHARACTERS
from cloister.policy.rules import MAX_DEPTH, MAX_POLICY_CHARACTERS

SCHEMA = (resources.files("cloister.policy") / "schema.cedarschema").read_text()
DATASET = {"owner": "olga", "region": "eu", "purpose": "research", "class": "internal", "epsilon_left_millionths": 1}
RUN = {"author": "ed", "owner": "olga", "region": "eu", "purpose": "research", "class": "internal"}
NODE = {"node": "node-1", "node_region": "eu", "node_assurance": 0}
ANYTHING = '@id("anything") permit (principal, action, resource);'


def request(roles: str, action: str, named: str, principal: str = "pat", **more: Any) -> Request:
    resource_type, _, resource = named.partition("/")
    return Request(principal=principal, roles=frozenset(roles.split()), action=action, resource_type=resource_type,
                   resource=resource, **more)  # fmt: skip


def ask(*question: str, policy: Policy | None = None, **more: Any) -> Decision:
    return (policy or Policy.shipped()).decide(request(*question, **more))


def test_nothing_is_allowed_without_a_role() -> None:
    decision = ask("", "model:infer", "Model/m", attributes={"author": "ann", "stage": "production"})
    assert decision == Decision(allowed=False, rules=(), reason="no rule permits it")


def test_a_decision_names_its_rules() -> None:
    allowed = ask("consumer", "model:infer", "Model/m", attributes={"author": "ann", "stage": "production"})
    assert allowed.rules == ("consumers-ask-production-models",)
    refused = ask("reviewer", "approval:vote", "Approval/a",
                  attributes={"kind": "promotion", "author": "pat", "owner": ""})  # fmt: skip
    assert refused.rules == ("authors-never-vote-on-their-own-request",)
    assert refused.reason == "forbidden by authors-never-vote-on-their-own-request"


@pytest.mark.parametrize("missing", DATASET)
def test_a_missing_attribute_denies_instead_of_skipping_the_forbid(missing: str) -> None:
    whole = ask("engineer", "train:submit", "Dataset/d", attributes=DATASET)
    assert whole.allowed
    less = {name: value for name, value in DATASET.items() if name != missing}
    assert not ask("engineer", "train:submit", "Dataset/d", attributes=less).allowed


def test_a_lease_needs_a_node_in_the_region_over_mutual_tls() -> None:
    def lease(**context: Any) -> Decision:
        return ask("run", "run:lease", "Run/run-1", "run-1", kind="run", attributes=RUN, context=context)

    assert lease(**NODE).allowed
    assert lease().rules == ("data-is-opened-only-in-its-region", "workloads-act-only-from-a-node-over-mutual-tls")
    assert lease(**NODE | {"node_region": "us"}).rules == ("data-is-opened-only-in-its-region",)


def test_a_workloads_credential_is_good_for_that_kind_only() -> None:
    """A person to whom somebody gave the role `run`, or a run with an operator's role, is nobody."""
    for kind, roles in (
        ("person", "run"),
        ("service", "run"),
        ("node", "run"),
        ("endpoint", "run"),
        ("run", "run engineer"),
    ):
        question = request(roles, "run:work", "Run/run-1", "run-1", kind=kind, attributes=RUN, context=NODE)
        assert not Policy.shipped().decide(question).allowed, kind
    assert not ask("operator", "audit:read", "Platform/platform", kind="run").allowed
    assert not ask("consumer endpoint", "model:infer", "Model/m",
                   attributes={"author": "a", "stage": "production"}).allowed  # fmt: skip


def test_a_service_never_votes() -> None:
    attributes = {"kind": "promotion", "author": "ed", "owner": ""}
    assert ask("reviewer", "approval:vote", "Approval/a", attributes=attributes).allowed
    assert not ask("reviewer", "approval:vote", "Approval/a", attributes=attributes, kind="service").allowed


def test_a_caller_cannot_pass_names_in_the_context() -> None:
    forged = {"principal_name": "olga", "resource_name": "x"}
    assert not ask("data-owner", "dataset:seal", "Dataset/d", attributes=DATASET, context=forged).allowed


@pytest.mark.parametrize("odd", [
    {"action": 'model:infer" || true'}, {"action": ""}, {"resource_type": "No Such"}, {"resource_type": "Role"},
    {"principal": "\ud800"}, {"resource": "\udfff"}, {"attributes": {"author": "\ud800", "stage": "production"}},
    {"attributes": {"author": object(), "stage": "production"}}, {"attributes": None}, {"roles": None},
    {"attributes": {"author": {"__entity": {"type": "Role", "id": "operator"}}, "stage": "production"}},
    {"attributes": {"author": "a", "stage": "production", "more": "b"}}, {"context": {"time": 2**63}},
    {"context": {"time": 1.5}}, {"context": {"more": "x"}}, {"kind": "god"}, {"kind": []},
    {"roles": frozenset({"boss"})}, {"principal": None}, {"resource": 7},
])  # fmt: skip
def test_an_odd_request_is_refused_and_nothing_is_raised(odd: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "principal": "pat", "roles": frozenset({"consumer"}), "action": "model:infer", "resource_type": "Model",
        "resource": "m", "attributes": {"author": "ann", "stage": "production"},
    }  # fmt: skip
    assert Policy.shipped().decide(Request(**good)).allowed
    decision = Policy.shipped().decide(Request(**good | odd))
    assert decision == Decision(allowed=False, rules=(), reason="the request does not fit the policy schema")


@pytest.mark.parametrize(
    "name", ['p"\\', 'm"::"', "two\nlines", "nul\0", "ünï·☃", "", "{}", 'x" }; permit (principal,']
)
def test_a_strange_name_is_a_name_and_no_code(name: str) -> None:
    own = {"attributes": {**DATASET, "owner": name}}
    assert ask("data-owner", "dataset:seal", f"Dataset/{name}", name, **own).allowed
    assert not ask("data-owner", "dataset:seal", f"Dataset/{name}", name + "x", **own).allowed


def test_refusal_says_who_what_and_why() -> None:
    with pytest.raises(PermissionDeniedError, match=r"pat .consumer. may not audit:read .*no rule") as refused:
        Policy.shipped().require(request("consumer", "audit:read", "Platform/platform"))
    assert refused.value.hint.endswith("cloister policy explain --action audit:read --resource Platform/platform")


def test_a_decision_is_the_same_in_every_thread() -> None:
    question = request("engineer", "train:submit", "Dataset/d", attributes=DATASET)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        decisions = set(pool.map(Policy.shipped().decide, [question] * 400))
    assert {decision.rules for decision in decisions} == {("engineers-train-and-release",)}


# ---- a site's own policies


def test_a_site_adds_beside_and_leaves_the_shipped_policies_as_they_are() -> None:
    text = """@id("night-closes-training") forbid (principal, action == Action::"train:submit", resource)
              when { context.time > 1000 };"""
    site = Policy.shipped().with_site(text)
    assert ask("engineer", "train:submit", "Dataset/d", attributes=DATASET, context={"time": 1000}, policy=site).allowed
    refused = ask("engineer", "train:submit", "Dataset/d", attributes=DATASET, context={"time": 1001}, policy=site)
    assert refused.rules == ("night-closes-training",)
    assert ask("engineer", "train:submit", "Dataset/d", attributes=DATASET, context={"time": 1001}).allowed
    assert list(site.rules) == [*Policy.shipped().rules, "night-closes-training"]
    assert list(Policy.shipped().with_site("// nothing yet\n").rules) == list(Policy.shipped().rules)


def test_a_site_that_permits_everything_lifts_no_invariant() -> None:
    site = Policy.shipped().with_site(ANYTHING)
    assert ask("", "audit:read", "Platform/platform", policy=site).rules == ("anything",)
    refused = ask("engineer", "train:submit", "Dataset/d", attributes={**DATASET, "class": "restricted"}, policy=site)
    assert refused.rules == ("restricted-data-is-never-trained-on",)


def test_an_error_in_a_sites_rule_denies_and_is_named() -> None:
    site = Policy.shipped().with_site(
        '@id("overflows") forbid (principal, action, resource) when { context.time * 9223372036854775807 < 0 };'
    )
    assert ask("auditor", "audit:read", "Platform/platform", context={"time": 1}, policy=site).allowed
    refused = ask("auditor", "audit:read", "Platform/platform", context={"time": 2}, policy=site)
    assert refused == Decision(allowed=False, rules=(), reason="could not be evaluated: overflows")


@pytest.mark.parametrize(("text", "says"), [
    ("permit (principal, action, resource);", "number 1 has no good @id"),
    (ANYTHING + "@id permit (principal, action, resource);", "number 2 has no good @id"),
    ('@id("two\\nlines") permit (principal, action, resource);', "number 1 has no good @id"),
    ('@id("a,b") permit (principal, action, resource);', "number 1 has no good @id"),
    (ANYTHING + ANYTHING, "two policies have the id anything"),
    ('@id("runs-train") permit (principal, action, resource);', "runs-train is taken"),
    ('@id("a") permit (principal, action, resource)', "do not parse: unexpected end"),
    ('@id("a")\n@id("b") permit (principal, action, resource);', "duplicate annotation"),
    ('// "\n@id("a) permit (principal, action, resource);', "line 2: a string has no end"),
    ("\ud800", "does not show"),
    ("\0", "does not show"),
    ('@id("a") // a note\rpermit (principal, action, resource);', "line 1: a character that does not show"),
    (ANYTHING + '\n\n@id("b")\npermit (principal in Role::"boss", action, resource);', r"b \(line 3\).*boss"),
    ('@id("a") permit (principal, action == Action::"no:such", resource);', r"policy a .*no:such"),
    ('@id("a") permit (principal, action, resource) when { resource.secret == 1 };', "secret"),
    ('@id("a") permit (principal, action, resource) when { context.node == "n" };', "node"),
    ('@id("a") permit (principal == ?principal, action, resource);', "slot"),
    (" " * (MAX_SITE_CHARACTERS + 1), "at most"),
])  # fmt: skip
def test_a_sites_bad_text_is_not_loaded_and_the_fault_is_named(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Policy.shipped().with_site(text)


DEEP = {
    "brackets": lambda n: "(" * n + "true" + ")" * n,
    "lists": lambda n: "[" * n + "true" + "]" * n + " == 1",
    "records": lambda n: "{a:" * n + "1" + "}" * n + " == 1",
    "after a stray bracket": lambda n: ")" * n + "(" * n,
    "after an open quote": lambda n: '"\\' + "(" * n,
    "open quotes": lambda n: '"\\' * n,
    "after a comment": lambda n: '// "\n' + "(" * n + '1 // "\n' + ")" * n,
    "after a comment that ends early": lambda n: '// "\r' + "(" * n + "1" + ")" * n + '// "\r',
    "sums": lambda n: "1" + "+1" * n + " == 1",
    "attributes": lambda n: "context" + ".a" * n + " == 1",
    "has": lambda n: "context has a" + ".a" * n,
    "has, with comments": lambda n: "context has a" + "//\n.a" * n,
    "ands": lambda n: "true && " * n + "true",
    "ifs": lambda n: "if true then " * n + "true" + " else false" * n,
    "nots": lambda n: "!" * n + "true",
}
PARSE = """
import sys
from cloister.errors import InputError
from cloister.policy import Policy
for text in sys.stdin.read().split("@@"):
    try:
        Policy.shipped().with_site(text)
        print("loaded")
    except InputError:
        print("refused")
"""


def test_a_deep_text_is_refused_and_does_not_end_the_process() -> None:
    """Cedar's parser overflows the stack on most of these."""
    texts = [
        f'@id("a") permit (principal, action, resource) when {{ {make(n)} }};'
        for make in DEEP.values()
        for n in (300, 2000, 12_800, 30_000)
    ]
    done = subprocess.run([sys.executable, "-c", PARSE], input="@@".join(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * len(texts)


def test_what_people_write_is_within_the_limits() -> None:
    fits = '@id("a") permit (principal, action, resource) when { ' + " || ".join(["context.time == 1"] * 50) + " };"
    Policy.shipped().with_site(fits)
    deep = "(" * (MAX_DEPTH - 2) + "true" + ")" * (MAX_DEPTH - 2)
    Policy.shipped().with_site('@id("a") permit (principal, action, resource) when { ' + deep + " };")
    comment = "// ((( [[[ {{{ " + '"' * 9 + "x" * MAX_POLICY_CHARACTERS + "\n"
    text = '@id("b") permit (principal, action, resource) when { resource like "' + "(" * 100 + '" };'
    with pytest.raises(InputError, match="does not fit the schema"):  # and not: too deep
        Policy.shipped().with_site(comment + text)


def test_policies_that_do_not_fit_the_schema_are_not_loaded() -> None:
    with pytest.raises(InputError):
        Policy('@id("a") permit (principal, action == Action::"no:such", resource);', "entity Person;")
    with pytest.raises(InputError, match="schema does not parse"):
        Policy("", "entity")


def test_the_schema_knows_every_role_and_no_other() -> None:
    for role in ROLES:
        Policy(f'@id("a") permit (principal in Role::"{role}", action, resource);', SCHEMA)
        assert ask(role, "identity:revoke", "Identity/pat", attributes={"name": "pat"}).allowed
    with pytest.raises(InputError):
        Policy('@id("a") permit (principal in Role::"owner", action, resource);', SCHEMA)
