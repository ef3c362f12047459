"""Somebody tries to be somebody else, or to do what their role does not allow, over HTTP."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest

from authority_world import APP, CODE, ROLES, URL, Person, World, lease_body, receiver, training_spec
from cloister.authority import api
from cloister.authority.identity import ROLES as KNOWN_ROLES
from cloister.authority.identity import add_identity
from cloister.signing import keys, tokens
from cloister.signing.tokens import AUTHORITY_AUDIENCE

INFERENCE = tokens.INFERENCE_AUDIENCE


def newcomer(name: str = "nina", roles: list[str] | None = None, key: str | None = None) -> dict[str, Any]:
    return {"name": name, "roles": roles or ["engineer"], "public_key": key or Person(name, []).public}


# ---- the token endpoint ----


def test_a_replayed_assertion_is_refused(empty_world: World) -> None:
    assertion = empty_world.assertion("ed")
    assert empty_world.exchange(assertion).status_code == 200
    size, counts = len(empty_world.log()), empty_world.counts()
    for audience in (AUTHORITY_AUDIENCE, INFERENCE):
        again = empty_world.exchange(assertion, audience)
        assert again.status_code == 401
        assert "access_token" not in again.json()
    assert len(empty_world.log()) == size
    assert empty_world.counts() == counts


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
    counts = calm_world.counts()
    answer = calm_world.exchange(calm_world.assertion("ed", **changes))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert calm_world.counts() == counts


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
    assert empty_world.ask("operator", "GET", "/v1/identities").status_code == 200
    empty_world.clock.offset = tokens.MAX_LIFETIME_S + 1
    assert empty_world.refused(401, "operator", "GET", "/v1/identities") == "TokenExpiredError"


@pytest.mark.parametrize("claims", [{"roles": ["operator"]}, {"subject": "operator"}])
def test_a_token_of_ones_own_making_is_refused(calm_world: World, claims: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"issuer": URL, "subject": "ed", "audience": AUTHORITY_AUDIENCE, "roles": ["engineer"],
                             "lifetime_s": 60, "now": calm_world.clock()}  # fmt: skip
    key_id = calm_world.authority.identities.token_key_id
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
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", body) == "ConflictError"


def test_the_first_start_registers_its_operator_once_and_on_record(empty_world: World) -> None:
    first = empty_world.log()[0]
    assert (first.actor, first.action, first.resource) == ("authority", "identity:bootstrap", "Person/operator")
    with empty_world.still(entries=0):
        empty_world.authority.identities.bootstrap("mallory", Person("mallory", []).public)


def test_the_directory_shows_no_keys_and_no_workloads(world: World) -> None:
    world.submit()
    shown = world.get("operator", "/v1/identities")
    assert {person["name"] for person in shown} == ROLES.keys()
    assert all(person.keys() == {"name", "roles", "registered_by"} for person in shown)


# ---- every route ----

PATH_VALUES = {"name": "adult", "version": "1", "run": "RUN", "approval": "apr-1", "endpoint": "ep-1"}


def routes() -> list[tuple[str, str]]:
    """Every (method, path) of the OpenAPI document that is not public."""
    listed = [
        (method.upper(), re.sub(r"\{(\w+)\}", lambda match: PATH_VALUES[match[1]], path))
        for path, methods in APP.openapi()["paths"].items()
        for method in methods
        if path not in api.PUBLIC
    ]
    assert len(listed) >= 28
    return listed


def bodies(world: World, name: str, run: str) -> dict[tuple[str, str], dict[str, Any]]:
    """A body that is valid for each route that takes one, signed by `name` where it is signed."""
    request = {"approval": "apr-1", "model": "adult@1", "root_digest": "0" * 64, "provenance": "0" * 64, "expires": 1}
    signed = world.vote_body(name, request)
    endpoint = Person("new", [])
    return {
        ("POST", "/v1/identities"): newcomer(),
        ("POST", "/v1/datasets"): signed | {"sealed_keys": "AAAA"},
        ("PUT", "/v1/datasets/adult/budget"): {"epsilon": 1.0, "delta": 1e-6},
        ("POST", "/v1/plans"): {"spec": training_spec()},
        ("POST", "/v1/runs"): {"spec": training_spec(), "code_digest": CODE, "public_key": endpoint.public},
        ("POST", f"/v1/runs/{run}/leases"): lease_body(),
        ("POST", f"/v1/runs/{run}/blocks"): {"first": 0, "last": 1},
        ("POST", f"/v1/runs/{run}/progress"): {"steps_done": 0, "rows_per_s": 1.0},
        ("POST", f"/v1/runs/{run}/model"): {
            "manifest": "e30=", "model_sha256": "0" * 64, "blob": "models/x", "blob_sha256": "0" * 64,
            "holdout_accuracy": 0.5},
        ("POST", f"/v1/runs/{run}/failure"): {"error": {"kind": "InputError"}},
        ("POST", "/v1/models/adult/versions/1/export"): receiver(),
        ("POST", "/v1/approvals/apr-1/votes"): signed,
        ("POST", "/v1/endpoints"): world.deploy_body(endpoint),
        ("POST", "/v1/endpoints/ep-1/leases"): receiver(),
        ("POST", "/v1/endpoints/ep-1/quota"): {"subject": "carl", "wanted": 1},
    }  # fmt: skip


def test_no_route_answers_without_a_token(calm_world: World) -> None:
    counts = calm_world.counts()
    listed = routes()
    given = bodies(calm_world, "ed", "RUN")
    for method, path in [*listed, ("GET", "/v1/not-there"), ("GET", "/"), ("DELETE", "/v1/runs")]:
        for body in (None, given.get((method, path)), "garbage"):
            answer = calm_world.http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["kind"]) == (401, "AuthenticationError"), (method, path)
    assert calm_world.counts() == counts


def test_the_public_paths_are_the_ones_that_are_meant(calm_world: World) -> None:
    documented = {path for path in APP.openapi()["paths"] if path in api.PUBLIC}
    assert documented == {"/v1/health", "/v1/info", "/v1/checkpoint", "/v1/token"}
    assert calm_world.http.get("/v1/health").json() == {"status": "ok"}
    for path in api.PUBLIC - {"/v1/token"}:
        answer = calm_world.http.get(path)
        assert answer.status_code == 200
        assert "PRIVATE" not in answer.text


# Who may do what, beside their 403s: everything that is not listed here must be refused to everybody.
OPERATOR = {"GET /v1/identities", "POST /v1/identities", "GET /v1/datasets", "GET /v1/datasets/adult/versions/1",
            "GET /v1/datasets/adult/budget", "GET /v1/runs", "GET /v1/runs/RUN", "POST /v1/runs/RUN/stop",
            "GET /v1/models", "GET /v1/approvals", "POST /v1/endpoints", "GET /v1/endpoints", "GET /v1/log",
            "GET /v1/log/export", "GET /v1/models/adult/versions/1"}  # fmt: skip
READ_DATA = {"GET /v1/datasets", "GET /v1/datasets/adult/versions/1", "GET /v1/datasets/adult/budget",
             "GET /v1/runs", "GET /v1/runs/RUN"}  # fmt: skip
READ_MODELS = {"GET /v1/models", "GET /v1/models/adult/versions/1", "GET /v1/approvals"}
ALLOWED: dict[str, set[str]] = {
    "operator": OPERATOR,
    "olga": READ_DATA | {"GET /v1/datasets/adult/next", "PUT /v1/datasets/adult/budget", "POST /v1/datasets"},
    "otto": READ_DATA | {"POST /v1/datasets"},
    "ed": READ_DATA | READ_MODELS | {"POST /v1/plans", "POST /v1/runs", "POST /v1/runs/RUN/stop"},
    "eve": READ_DATA | READ_MODELS | {"POST /v1/plans", "POST /v1/runs"},
    "rita": READ_DATA | READ_MODELS | {"GET /v1/log", "GET /v1/log/export"},
    "carl": set(),
    "ada": READ_DATA | READ_MODELS | {"GET /v1/identities", "GET /v1/endpoints", "GET /v1/log", "GET /v1/log/export"},
    "own run": {"GET /v1/runs/RUN", "POST /v1/runs/RUN/leases", "POST /v1/runs/RUN/blocks",
                "POST /v1/runs/RUN/progress", "POST /v1/runs/RUN/model", "POST /v1/runs/RUN/failure"},
    "other run": set(),
    "endpoint": set(),
}  # fmt: skip


@pytest.mark.parametrize("who", ALLOWED)
def test_nobody_gets_further_than_their_role(world: World, who: str) -> None:
    """403 for what a role does not allow, 404 for what is not there; never 200, never 500."""
    run = world.submit()
    name = who
    if who == "own run":
        name = run
    elif who in ("other run", "endpoint"):
        name = "run-other" if who == "other run" else "ep-other"
        world.people[name] = Person(name, [who.split()[-1]])
        with world.authority.core.database.transaction() as connection:
            add_identity(connection, name, world.people[name].roles, world.people[name].public, "test", 0.0)
    given = bodies(world, name, run)
    for method, listed in routes():
        path = listed.replace("RUN", run)
        label = f"{method} {listed}"
        if label in ALLOWED[who]:
            continue
        before = world.content()
        answer = world.ask(name, method, path, given.get((method, path)))
        assert answer.status_code in (403, 404), (label, answer.status_code, answer.text)
        missing = any(part in path for part in ("/models/", "/approvals/", "/endpoints/"))
        assert answer.status_code == 403 or missing, (label, answer.text)
        assert world.content() == before, label


@pytest.mark.parametrize("who", [who for who in ALLOWED if ALLOWED[who] and who != "own run"])
def test_every_role_reads_what_it_is_meant_to(world: World, who: str) -> None:
    world.train()
    run = world.submit()
    for label in sorted(ALLOWED[who]):
        method, path = label.replace("RUN", run).split()
        if method == "GET":
            assert world.ask(who, method, path).status_code == 200, label


# ---- bodies ----


def test_a_body_over_the_limit_is_refused(calm_world: World) -> None:
    headers = {"Authorization": f"Bearer {calm_world.token('ed')}"}
    big = b"x" * (api.MAX_BODY_BYTES + 1)
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
        ("GET", "/v1/datasets/%22%5C%0A/next"),
        ("GET", "/v1/datasets/%ED%A0%80/next"),
        ("GET", "/v1/datasets/%F0%9F%94%91%E2%80%AE/next"),
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
    def fault(*_: Any) -> None:
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
