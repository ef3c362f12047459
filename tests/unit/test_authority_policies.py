"""A site's own policies: nobody puts them in force alone, and none of them lifts what the shipped ones forbid."""

from __future__ import annotations

import ast
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from authority_world import CODE, Person, World, lease_body, training_spec
from cloister.authority import core as core_module
from cloister.authority.core import PLATFORM, Caller
from cloister.canonical import sha256_hex
from cloister.errors import CloisterError, InputError, PermissionDeniedError, UnavailableError
from cloister.stores.tables import policy_versions

CONSUMERS_SEE_MODELS = """
@id("our-consumers-see-models")
permit (principal in Role::"consumer", action == Action::"model:read", resource is Model);
"""
NO_LOG_FOR_REVIEWERS = """
@id("our-reviewers-do-not-read-the-log")
forbid (principal in Role::"reviewer", action == Action::"audit:read", resource);
"""
EVERYTHING = '@id("everybody-may-everything")\npermit (principal, action, resource);'


@pytest.fixture
def house(empty_world: World) -> World:
    """With a second security officer: what one proposes another approves."""
    empty_world.register("second-officer", ["security-officer"])
    return empty_world


def propose(world: World, text: str, reason: str = "as decided on Monday", name: str = "sofia") -> Any:
    return world.ask(name, "POST", "/v1/policy", {"text": text, "reason": reason})


def put_in_force(world: World, text: str) -> int:
    assert world.vote("second-officer", world.missing(propose(world, text))).status_code == 200
    answer = propose(world, text)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["version"])


def sees_models(world: World) -> bool:
    return world.ask("carl", "GET", "/v1/models").status_code == 200


def test_a_policy_is_proposed_approved_and_then_in_force(house: World) -> None:
    assert house.get("ada", "/v1/policy") == {"version": 0, "text": "", "digest": sha256_hex(b"")}
    with house.recorded("sofia", "policy:propose", "denied"):
        request = house.missing(propose(house, CONSUMERS_SEE_MODELS))
    assert request["details"] == {
        "version": 1, "text": CONSUMERS_SEE_MODELS, "text_digest": sha256_hex(CONSUMERS_SEE_MODELS.encode()),
        "reason": "as decided on Monday", "owner": "",
    }  # fmt: skip
    assert not sees_models(house)
    assert house.vote("second-officer", request).status_code == 200
    assert not sees_models(house)  # approved is not yet in force: who proposed it says when
    with house.recorded("sofia", "policy:propose"):
        assert propose(house, CONSUMERS_SEE_MODELS).json()["version"] == 1
    assert sees_models(house)
    last = house.log()[-1]
    assert (last.rule, last.details["version"]) == ("security-officers-watch-and-contain", 1)
    assert house.get("ada", "/v1/policy")["text"] == CONSUMERS_SEE_MODELS


def test_it_is_in_force_at_once_in_every_authority_over_the_state(house: World) -> None:
    second = house.another()
    carl, rita = house.caller("carl"), house.caller("rita")
    with pytest.raises(PermissionDeniedError):
        second.models.list(carl)
    assert house.get("rita", "/v1/log")
    put_in_force(house, CONSUMERS_SEE_MODELS + NO_LOG_FOR_REVIEWERS)
    assert second.models.list(carl) == []
    with (
        pytest.raises(PermissionDeniedError, match="our-reviewers-do-not-read-the-log"),
        second.core.reading(rita, "audit:read") as act,
    ):
        act.allow(PLATFORM)
    put_in_force(house, NO_LOG_FOR_REVIEWERS)  # it replaces the version before
    with pytest.raises(PermissionDeniedError):
        second.models.list(carl)
    second.close()


def test_a_change_that_is_not_committed_is_not_in_force(house: World, monkeypatch: pytest.MonkeyPatch) -> None:
    request = house.missing(propose(house, CONSUMERS_SEE_MODELS))
    assert house.vote("second-officer", request).status_code == 200

    def failing(*_: Any, **__: Any) -> None:
        raise UnavailableError("the disk is full")

    before = house.content()
    monkeypatch.setattr(house.authority.core.journal, "append", failing)
    assert propose(house, CONSUMERS_SEE_MODELS).status_code == 503
    monkeypatch.undo()
    assert house.content() == before
    assert not sees_models(house)


def test_nobody_puts_a_policy_in_force_alone(house: World) -> None:
    request = house.missing(propose(house, CONSUMERS_SEE_MODELS))
    for name in ("sofia", "operator", "rita", "olga", "ada", "ed", "carl"):
        with house.still("denied"):
            assert house.vote(name, request).status_code == 403
    assert propose(house, CONSUMERS_SEE_MODELS).status_code == 403
    assert not sees_models(house)


@pytest.mark.parametrize("name", ["operator", "rita", "olga", "ada", "ed", "carl"])
def test_only_security_officers_propose(calm_world: World, name: str) -> None:
    with calm_world.still("denied"):
        assert propose(calm_world, CONSUMERS_SEE_MODELS, name=name).json()["kind"] == "PermissionDeniedError"


def test_what_was_approved_is_the_text_to_the_letter(house: World) -> None:
    request = house.missing(propose(house, NO_LOG_FOR_REVIEWERS))
    assert house.vote("second-officer", request).status_code == 200
    for text in (EVERYTHING, NO_LOG_FOR_REVIEWERS + "\n", NO_LOG_FOR_REVIEWERS.replace("reviewer", "auditor")):
        assert propose(house, text).status_code == 403
    assert propose(house, NO_LOG_FOR_REVIEWERS).status_code == 403  # asking for another one voided it
    assert house.get("ada", "/v1/policy")["version"] == 0


def test_an_approved_text_is_put_in_force_once(house: World) -> None:
    assert put_in_force(house, NO_LOG_FOR_REVIEWERS) == 1
    assert propose(house, NO_LOG_FOR_REVIEWERS).status_code == 403  # as version 2: another approval
    assert house.get("ada", "/v1/policy")["version"] == 1


def test_an_empty_text_leaves_the_shipped_policies_alone(house: World) -> None:
    put_in_force(house, NO_LOG_FOR_REVIEWERS)
    assert house.refused(403, "rita", "GET", "/v1/log") == "PermissionDeniedError"
    assert put_in_force(house, "") == 2
    assert house.get("rita", "/v1/log")


@pytest.mark.parametrize(
    "text",
    [
        "no policy",
        "permit (principal, action, resource);",  # without a name
        '@id("authors-never-vote-on-their-own-request")\npermit (principal, action, resource);',
        '@id("x")\npermit (principal in Role::"root", action, resource);',
        '@id("x")\npermit (principal, action == Action::"no:such", resource);',
        '@id("x")\npermit (principal, action == Action::"run:read", resource is Run) when { resource.secret };',
        '@id("x")\npermit (principal == ?principal, action, resource);',
        '@id("x")\npermit (principal, action, resource) when { ' + "(" * 800 + "true" + ")" * 800 + " };",
        "// " + "x" * 70_000,
        "\ud800",
        "\x00",
    ],
)
def test_a_text_that_is_no_policy_is_not_even_put_to_the_vote(calm_world: World, text: str) -> None:
    content = calm_world.content()
    answer = calm_world.ask("sofia", "POST", "/v1/policy", content=json.dumps({"text": text, "reason": "r"}))
    assert answer.status_code == 400, answer.text
    assert calm_world.content() == content


def test_a_site_cannot_lift_what_the_shipped_policies_forbid(world: World) -> None:
    """With a permit for everybody to do everything."""
    world.register("second-officer", ["security-officer"])
    run = world.submit()
    put_in_force(world, EVERYTHING)
    assert world.get("carl", "/v1/identities")  # it is in force

    def refusal(name: str, method: str, path: str, body: Any = None) -> str:
        answer = world.ask(name, method, path, body)
        assert answer.status_code == 403, answer.text
        return str(answer.json()["error"])

    lease, other = f"/v1/runs/{run}/leases", world.submit()
    with world.over(None):
        assert "workloads-act-only-from-a-node-over-mutual-tls" in refusal(run, "POST", lease, lease_body())
    with world.over(world.register_node("node-us", "us")):
        assert "data-is-opened-only-in-its-region" in refusal(run, "POST", lease, lease_body())
    assert "workloads-act-only-for-themselves" in refusal(other, "POST", lease, lease_body())
    key = {"public_key": world.people["carl"].public}
    assert "nobody-changes-the-key-of-another" in refusal("operator", "PUT", "/v1/identities/ed/key", key)
    assert "nobody-changes-their-own-roles" in refusal(
        "carl", "PUT", "/v1/identities/carl/roles", {"roles": ["operator"]}
    )
    request = world.missing(world.ask("ed", "POST", "/v1/runs", run_body()))
    assert world.vote("ed", request).status_code == 403
    assert world.vote("carl", request).status_code == 200  # a site may say who votes, and not that authors do


def run_body() -> dict[str, Any]:
    return {"spec": training_spec(name="mine"), "code_digest": CODE, "public_key": Person("new", []).public}


def test_a_site_may_forbid_what_the_shipped_policies_permit(house: World) -> None:
    put_in_force(house, NO_LOG_FOR_REVIEWERS)
    with house.still("denied"):
        answer = house.ask("rita", "GET", "/v1/log")
    assert "our-reviewers-do-not-read-the-log" in answer.json()["error"]
    assert house.get("ada", "/v1/log")


@pytest.mark.parametrize("text", ["no policy", '@id("x")\npermit (principal, action == Action::"no:such", resource);'])
def test_a_version_in_the_database_that_is_no_policy_denies_everything(house: World, text: str) -> None:
    with house.authority.core.database.transaction() as connection:
        connection.execute(
            insert(policy_versions).values(version=1, text=text, digest="", author="mallory", created=0.0)
        )
    for name, path in (("operator", "/v1/identities"), ("ada", "/v1/log"), ("sofia", "/v1/policy")):
        assert house.ask(name, "GET", path).status_code == 400
    with pytest.raises(InputError):
        house.authority.models.list(house.caller("ed"))


# ---- why ----


def explained(world: World, name: str, **question: Any) -> dict[str, Any]:
    return dict(world.post(name, "/v1/policy/explain", question))


def test_explain_names_the_rule_and_what_is_missing(world: World) -> None:
    run = world.submit()
    asked = {"action": "run:stop", "resource_type": "Run", "resource": run}
    mine = explained(world, "ed", **asked)
    assert (mine["allowed"], mine["rules"]) == (True, ["authors-stop-their-own-runs"])
    others = explained(world, "eve", **asked)
    assert (others["allowed"], others["principal"], others["roles"]) == (False, "eve", ["engineer"])
    finding = next(each for each in others["findings"] if each["rule"] == "authors-stop-their-own-runs")
    assert "resource.author is ed" in finding["reasons"][0]
    reader = explained(world, "ada", **asked)
    assert "needs the role operator" in str(reader["findings"])


def test_explain_tells_a_workload_that_it_needs_a_node(world: World) -> None:
    run = world.submit()
    said = explained(world, "ada", principal=run, action="run:lease", resource_type="Run", resource=run)
    assert (said["allowed"], said["roles"]) == (False, ["run"])
    assert "workloads-act-only-from-a-node-over-mutual-tls" in [each["rule"] for each in said["findings"]]
    assert "context.node is missing" in str(said["findings"])


def test_explain_agrees_with_what_happens(world: World) -> None:
    for name in ("olga", "otto", "ed", "carl"):
        said = explained(world, name, action="budget:set", resource_type="Dataset", resource="adult@1")
        answer = world.ask(name, "PUT", "/v1/datasets/adult/budget", {"epsilon": 9.0, "delta": 1e-5})
        assert said["allowed"] == (answer.status_code == 200), name


def test_explain_goes_by_the_sites_policies_too(house: World) -> None:
    put_in_force(house, NO_LOG_FOR_REVIEWERS)
    said = explained(house, "rita", action="audit:read", resource_type="Platform", resource="platform")
    assert (said["allowed"], said["rules"]) == (False, ["our-reviewers-do-not-read-the-log"])


def test_about_others_only_who_may_list_them_asks(calm_world: World) -> None:
    question = {"principal": "operator", "action": "audit:read", "resource_type": "Platform", "resource": "platform"}
    for name in ("carl", "ed", "rita", "olga"):
        assert calm_world.refused(403, name, "POST", "/v1/policy/explain", question) == "PermissionDeniedError"
    for name in ("ada", "sofia", "operator"):
        assert explained(calm_world, name, **question)["allowed"] is True


def test_who_may_not_see_a_thing_learns_no_fact_about_it(world: World) -> None:
    run = world.submit()
    said = explained(world, "carl", action="run:read", resource_type="Run", resource=run)
    assert said["allowed"] is False
    for fact in ("olga", "income-research", '"eu"', "resource."):
        assert fact not in str(said)


@pytest.mark.parametrize(
    ("question", "status"),
    [
        ({"action": "run:read", "resource_type": "Run", "resource": "run-none"}, 404),
        ({"action": "run:read", "resource_type": "Secret", "resource": "x"}, 400),
        ({"action": "x", "resource_type": "Dataset", "resource": "adult@" + "9" * 100}, 200),
        ({"action": "no:such", "resource_type": "Dataset", "resource": "adult"}, 200),
        ({"principal": "nobody", "action": "run:read", "resource_type": "Platform", "resource": "x"}, 404),
        ({"action": "", "resource_type": "Platform", "resource": "x"}, 400),
        ({"action": "é\x00", "resource_type": "Platform", "resource": "x"}, 200),
    ],
)
def test_an_odd_question_is_no_fault(calm_world: World, question: dict[str, Any], status: int) -> None:
    answer = calm_world.ask("ada", "POST", "/v1/policy/explain", question)
    assert answer.status_code == status, answer.text
    assert status != 200 or answer.json()["allowed"] is False


# ---- the shape of every action ----


def asked_in_the_code() -> set[str]:
    """The actions that the authority's code asks policy about."""
    found: set[str] = set()
    for file in sorted(Path(core_module.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) > 1:
                known = {"action", "reading", "unlogged", "outside", "allow"}
                if node.func.attr in known and isinstance(node.args[1], ast.Constant):
                    found.add(str(node.args[1].value))
    return found


def test_policy_knows_every_action_that_is_asked_about() -> None:
    """What the schema does not know is denied to everybody, which no test of a refusal would notice."""
    schema = resources.files("cloister.policy").joinpath("schema.cedarschema").read_text()
    asked = asked_in_the_code()
    assert len(asked) > 30
    missing = sorted(name for name in asked if f'"{name}"' not in schema)
    assert not missing, f"the policy schema has no action {', '.join(missing)}"


# ---- what is outside of the database ----

OPERATOR = Caller(name="operator", roles=frozenset({"operator"}))


def said(world: World) -> list[tuple[str, Any, str, str]]:
    return [
        (e.actor, e.details.get("phase"), e.outcome, e.reason) for e in world.log() if e.action == "token-key:rotate"
    ]


def test_an_effect_outside_is_announced_before_and_accounted_for_after(empty_world: World) -> None:
    with empty_world.authority.core.outside(OPERATOR, "token-key:rotate", PLATFORM, key="k"):
        assert said(empty_world) == [("operator", "intent", "success", "")]  # on record already, and for good
    assert said(empty_world) == [("operator", "intent", "success", ""), ("operator", "outcome", "success", "")]
    first, second = empty_world.log()[-2:]
    assert first.correlation == second.correlation != ""
    assert first.rule == second.rule == "operators-run-the-platform"


def test_an_effect_outside_that_failed_is_accounted_for_as_failed(empty_world: World) -> None:
    with (
        pytest.raises(OSError, match="fire"),
        empty_world.authority.core.outside(OPERATOR, "token-key:rotate", PLATFORM),
    ):
        raise OSError("the machine is on fire")
    assert said(empty_world)[-1] == ("operator", "outcome", "failure", "OSError")
    assert "fire" not in str(empty_world.entries()[-1])
    with empty_world.authority.core.outside(OPERATOR, "token-key:rotate", PLATFORM):
        pass
    assert len({e.correlation for e in empty_world.log() if e.action == "token-key:rotate"}) == 2


def test_what_policy_refuses_has_no_effect_outside(empty_world: World) -> None:
    ed = Caller(name="ed", roles=frozenset({"engineer"}))
    with pytest.raises(PermissionDeniedError), empty_world.authority.core.outside(ed, "token-key:rotate", PLATFORM):
        pytest.fail("the effect happened")
    assert said(empty_world) == [("ed", "intent", "denied", "PermissionDeniedError")]


def test_without_a_record_there_is_no_effect_outside(empty_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise UnavailableError("the disk is full")

    monkeypatch.setattr(empty_world.authority.core.journal, "append", failing)
    with pytest.raises(CloisterError), empty_world.authority.core.outside(OPERATOR, "token-key:rotate", PLATFORM):
        pytest.fail("the effect happened")


def test_a_key_that_could_not_be_stored_signs_nothing(empty_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError("no space")

    known = empty_world.authority.sessions.published_keys()
    monkeypatch.setattr(empty_world.authority.core.keys, "store_secret", failing)
    headers = {"Authorization": f"Bearer {empty_world.token('operator')}"}
    assert empty_world.http.post("/v1/token-keys", json={}, headers=headers).status_code == 500
    assert empty_world.authority.sessions.published_keys() == known
    assert [phase for _, phase, *_ in said(empty_world)] == ["intent", "outcome"]
    assert empty_world.exchange(empty_world.assertion("ed")).status_code == 200
