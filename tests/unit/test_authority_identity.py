"""Somebody tries to be somebody else, or to do what their role does not allow, over HTTP."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from authority_world import CODE, NODE, ROLES, URL, Person, World, training_spec
from cloister.authority import gate
from cloister.policy.decide import ROLES as KNOWN_ROLES
from cloister.signing import keys, tokens
from cloister.signing.tokens import AUTHORITY_AUDIENCE

INFERENCE = tokens.INFERENCE_AUDIENCE


def newcomer(name: str = "nina", roles: list[str] | None = None, key: str | None = None) -> dict[str, Any]:
    return {"name": name, "roles": roles or ["engineer"], "public_key": key or Person(name, []).public}


def refused_logins(world: World, size: int) -> int:
    """How many entries the log has beyond `size`: each is a refused login, of nobody in particular."""
    entries = world.log()[size:]
    assert {(e.actor, e.actor_kind, e.action, e.outcome) for e in entries} <= {
        ("unknown", "unknown", "token:issue", "denied")
    }
    return len(entries)


# ---- the token endpoint ----


def test_a_replayed_assertion_is_refused(empty_world: World) -> None:
    assertion = empty_world.assertion("ed")
    assert empty_world.exchange(assertion).status_code == 200
    size, content = len(empty_world.log()), empty_world.content()
    for audience in (AUTHORITY_AUDIENCE, INFERENCE):
        again = empty_world.exchange(assertion, audience)
        assert again.status_code == 401
        assert "access_token" not in again.json()
    assert refused_logins(empty_world, size) == 2
    assert empty_world.content() == content


def test_a_replay_is_refused_for_as_long_as_the_assertion_would_hold(empty_world: World) -> None:
    assertion = empty_world.assertion("ed")
    assert empty_world.exchange(assertion).status_code == 200
    for later in (tokens.ASSERTION_LIFETIME_S - 2, tokens.ASSERTION_LIFETIME_S + 1):
        empty_world.clock.offset = later
        assert empty_world.exchange(empty_world.assertion("eve")).status_code == 200  # clears what has expired
        assert empty_world.exchange(assertion).status_code == 401


@pytest.mark.parametrize(
    "changes",
    [
        {"key": keys.private_to_pem(keys.generate_ed25519())},
        {"now": 1_000_000_000.0},
        {"now": 4_000_000_000.0},
        {"audience": "https://elsewhere:8443"},
        {"subject": "nobody"},
        {"subject": "eve"},
        {"subject": "Ed"},
        {"subject": "ed' OR '1'='1"},
        {"subject": "e\x00d"},
        {"subject": "x" * 256},
    ],
)
def test_a_false_assertion_gets_no_token(calm_world: World, changes: dict[str, Any]) -> None:
    size, content = len(calm_world.log()), calm_world.content()
    answer = calm_world.exchange(calm_world.assertion("ed", **changes))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert refused_logins(calm_world, size) <= 1  # strangers cannot fill the log: so many a second, and no more
    assert calm_world.content() == content


def test_half_a_character_in_a_name_is_no_fault(calm_world: World) -> None:
    head, _, signature = calm_world.assertion("ed").split(".")
    payload = base64.urlsafe_b64encode(b'{"sub": "e\\ud800d"}').rstrip(b"=").decode()
    assert calm_world.exchange(f"{head}.{payload}.{signature}").status_code == 401


@pytest.mark.parametrize("assertion", ["", "x", "a.b.c", "é" * 10, "x" * 5000, "e30.e30.e30"])
def test_what_is_no_assertion_gets_no_token(calm_world: World, assertion: str) -> None:
    assert calm_world.exchange(assertion).status_code in (400, 401)


def test_an_unknown_audience_and_another_grant_are_refused(calm_world: World) -> None:
    assert calm_world.exchange(calm_world.assertion("ed"), "urn:cloister:root").status_code == 400
    form = {"grant_type": "password", "assertion": calm_world.assertion("ed"), "resource": INFERENCE}
    assert calm_world.http.post("/v1/token", data=form).status_code == 400
    assert calm_world.http.post("/v1/token", json=form).status_code == 400


def test_a_token_for_inference_is_no_token_for_the_authority(calm_world: World) -> None:
    token = calm_world.token("operator", INFERENCE)
    answer = calm_world.http.get("/v1/identities", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401


def test_an_assertion_is_no_access_token(calm_world: World) -> None:
    assertion = calm_world.assertion("operator", audience=AUTHORITY_AUDIENCE)
    assert calm_world.http.get("/v1/runs", headers={"Authorization": f"Bearer {assertion}"}).status_code == 401


def test_an_expired_access_token_is_refused(empty_world: World) -> None:
    empty_world.tokens.clear()  # the template's may be five minutes old, when another is fetched
    assert empty_world.ask("operator", "GET", "/v1/identities").status_code == 200
    empty_world.clock.offset = tokens.MAX_LIFETIME_S + 1
    assert empty_world.refused(401, "operator", "GET", "/v1/identities") == "TokenExpiredError"


@pytest.mark.parametrize("claims", [{"roles": ["operator"]}, {"subject": "operator"}])
def test_a_token_of_ones_own_making_is_refused(calm_world: World, claims: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"issuer": URL, "subject": "ed", "audience": AUTHORITY_AUDIENCE, "roles": ["engineer"],
                             "lifetime_s": 60, "now": calm_world.clock()}  # fmt: skip
    (key_id,) = calm_world.authority.sessions.published_keys()
    token = tokens.issue(calm_world.people["ed"].private, key_id=key_id, **(facts | claims))
    answer = calm_world.http.get("/v1/identities", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic b3BlcmF0b3I6", "Bearer a.b.c", "Bearer \xe9"])
def test_a_malformed_authorization_header_is_refused(calm_world: World, header: str) -> None:
    answer = calm_world.http.get("/v1/runs", headers={"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401


# ---- registering ----


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (newcomer("ed"), 409),
        (newcomer(roles=["root"]), 400),
        (newcomer(roles=["engineer", "run"]), 400),
        (newcomer(roles=["endpoint"]), 400),
        (newcomer("authority"), 400),
        (newcomer("run-0123456789"), 400),
        (newcomer("ep-0123456789"), 400),
        (newcomer("Nina"), 400),
        (newcomer("nina\n"), 400),
        (newcomer("../nina"), 400),
        (newcomer("n" * 64), 400),
        (newcomer(key="-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"), 400),
        (newcomer(key=keys.public_to_pem(keys.generate_p256().public_key()).decode()), 400),
        (newcomer() | {"roles": []}, 400),
        (newcomer() | {"admin": True}, 400),
        (newcomer() | {"roles": ["\ud800"]}, 400),
    ],
)
def test_a_false_registration_makes_nobody(calm_world: World, body: dict[str, Any], status: int) -> None:
    counts = calm_world.counts()["identities"]
    # Not through `json=`: half a character has to arrive as it is.
    answer = calm_world.ask("operator", "POST", "/v1/identities", content=json.dumps(body))
    assert answer.status_code == status, answer.text
    assert calm_world.counts()["identities"] == counts


def test_one_key_is_one_person_however_it_is_written(calm_world: World) -> None:
    key = calm_world.people["ed"].public
    with calm_world.still(entries=4):
        for text in (key, key.replace("\n", "\r\n"), "\n" + key + "\n\n", "comment\n" + key):
            assert calm_world.refused(409, "operator", "POST", "/v1/identities", newcomer(key=text)) == "ConflictError"


def test_a_person_cannot_take_the_name_of_a_workload(world: World) -> None:
    run = world.submit()
    with world.still():
        world.refused(400, "operator", "POST", "/v1/identities", newcomer(run))


def test_a_workload_cannot_take_the_key_of_a_person(world: World) -> None:
    body = {"spec": training_spec(), "code_digest": CODE, "public_key": world.people["rita"].public}
    assert world.vote("rob", world.missing(world.ask("ed", "POST", "/v1/runs", body))).status_code == 200
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", body) == "ConflictError"


def test_the_first_start_registers_its_operator_once_and_on_record(empty_world: World) -> None:
    first = empty_world.log()[0]
    assert (first.actor, first.action, first.resource) == ("authority", "identity:bootstrap", "Identity/operator")
    with empty_world.still(entries=0):
        empty_world.authority.identities.bootstrap("mallory", Person("mallory", []).public)


def test_the_directory_shows_no_keys_and_no_workloads(world: World) -> None:
    world.submit()
    shown = world.get("operator", "/v1/identities")
    assert {person["name"] for person in shown} == {*ROLES, NODE}
    assert all(
        person.keys()
        == {"name", "kind", "roles", "issuer", "subject", "attributes", "disabled", "registered_by", "elevated"}
        for person in shown
    )


# ---- bodies ----


def test_a_body_over_the_limit_is_refused(calm_world: World) -> None:
    headers = {"Authorization": f"Bearer {calm_world.token('ed')}"}
    big = b"x" * (gate.MAX_BODY_BYTES + 1)
    assert calm_world.http.post("/v1/plans", content=big, headers=headers).status_code == 413
    assert calm_world.http.post("/v1/token", content=big).status_code == 413
    for length in ("9" * 5000, "-1", "1e3", "²"):
        lied = headers | {"Content-Length": length.encode("latin-1")}
        assert calm_world.http.post("/v1/plans", content=b"{}", headers=lied).status_code == 413
    chunked = calm_world.http.post("/v1/plans", content=iter([b"{}"]), headers=headers)
    assert chunked.status_code == 413
    both = headers | {"Content-Length": "2", "Transfer-Encoding": "chunked"}
    assert calm_world.http.post("/v1/plans", content=b"{}", headers=both).status_code == 413


@pytest.mark.parametrize(
    "content",
    [
        b"{SECRET", b"\xff\xfe", b'"SECRET"', b'{"spec": "SECRET"}', b'{"spec": {"dataset": "SECRET"}}', b"[]",
        b'{"spec":' + b'{"a":' * 3000 + b"1" + b"}" * 3001, b'{"spec": {"privacy": {"epsilon": NaN}}}',
        b'{"spec": {"dataset": ' + b"9" * 5000 + b"}}", b'{"spec": {"dataset": "\\ud800"}}',
    ],
)  # fmt: skip
def test_garbage_is_refused_without_showing_it(calm_world: World, content: bytes) -> None:
    with calm_world.still(entries=0):
        answer = calm_world.ask("ed", "POST", "/v1/plans", content=content)
    assert answer.status_code == 400
    assert "SECRET" not in answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/datasets/adult/versions/99999999999999999999"),
        ("GET", "/v1/datasets/adult/versions/0"),
        ("GET", "/v1/datasets/adult/versions/-1"),
        ("GET", "/v1/models/adult/versions/1e3"),
        ("GET", "/v1/datasets/" + "a" * 64 + "/budget"),
        ("GET", "/v1/datasets/%00/budget"),
        ("GET", "/v1/datasets/%22%5C%0A/budget"),
        ("GET", "/v1/datasets/%ED%A0%80/budget"),
        ("GET", "/v1/erasures/%F0%9F%94%91%E2%80%AE"),
        ("GET", "/v1/runs/run'%20OR%20'1'='1"),
        ("GET", "/v1/log?limit=" + "9" * 400),
        ("GET", "/v1/log?limit=-5&actor=%00&action=%25"),
        ("DELETE", "/v1/runs"),
    ],
)
def test_odd_paths_are_no_faults(calm_world: World, method: str, path: str) -> None:
    for name in ("operator", "olga"):
        before = calm_world.content()
        assert calm_world.ask(name, method, path).status_code in (200, 400, 403, 404, 405)
        assert calm_world.content() == before


def test_an_unexpected_fault_shows_and_logs_only_its_type(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise KeyError("SECRET")

    monkeypatch.setattr("cloister.authority.endpoints.add_identity", fault)
    world.train()
    world.release()
    before = world.content()
    headers = {"Authorization": f"Bearer {world.token('operator')}"}
    answer = world.http.post("/v1/endpoints", json=world.deploy_body(Person("x", [])), headers=headers)
    assert (answer.status_code, answer.json()["kind"]) == (500, "CloisterError")
    assert "SECRET" not in answer.text + caplog.text
    assert "KeyError" in caplog.text
    assert world.content() == before
    last = world.log()[-1]
    assert (last.actor, last.action, last.outcome, last.reason) == (
        "operator",
        "endpoint:deploy",
        "failure",
        "KeyError",
    )


def test_every_role_of_the_policy_can_be_given() -> None:
    assert {role for roles in ROLES.values() for role in roles} == set(KNOWN_ROLES)


def test_a_stranger_may_not_send_much(calm_world: World) -> None:
    form = {"grant_type": "x", "assertion": "y" * 20_000, "resource": "z"}
    assert calm_world.http.post("/v1/token", data=form).status_code == 413
