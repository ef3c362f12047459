"""Tokens: given to whom they should, dead when they should be, and on record without saying whose they are."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey
from sqlalchemy import select

from authority_world import ADDRESS, ROLES, URL, Person, World
from cloister.audit.checkpoint import parse_verifier_key
from cloister.audit.event import Event
from cloister.audit.verify import verify_log
from cloister.authority.federation import Federation, Issuer, RoleMapping
from cloister.authority.journal import LOG_ORIGIN
from cloister.authority.log import read_export
from cloister.authority.sessions import FAILURES_RECORDED_PER_S, REFRESH_LIFETIME_S
from cloister.errors import AuthenticationError
from cloister.signing import tokens
from cloister.signing.tokens import AUTHORITY_AUDIENCE, INFERENCE_AUDIENCE, JWT_TYPE, TOKEN_EXCHANGE
from cloister.stores.tables import refresh_tokens, revocations, token_keys

ISSUER, AUDIENCE = "https://login.test", "urn:our-cloister"


def status_of(world: World, token: str, path: str = "/v1/me") -> int:
    """What a request with this very token is answered with."""
    return int(world.http.get(path, headers={"Authorization": f"Bearer {token}"}).status_code)


def fresh(world: World, name: str, audience: str = AUTHORITY_AUDIENCE) -> str:
    """A token that nobody else has."""
    return str(world.exchange(world.assertion(name), audience).json()["access_token"])


def revoke(world: World, token: str) -> Any:
    return world.http.post("/v1/revoke", data={"token": token})


# ---- an issuer from outside: real tokens, and its key set in a file ----


class Login:
    """An OpenID Connect issuer that cannot be reached: its keys are in a file."""

    def __init__(self, folder: Path, kind: Any = "people", roles: RoleMapping | None = None) -> None:
        self.key = ECKey.generate_key("P-256", {"kid": "k1", "use": "sig", "alg": "ES256"})
        file = folder / "jwks.json"
        file.write_text(json.dumps({"keys": [self.key.as_dict(private=False)]}))
        self.federation = Federation([Issuer(issuer=ISSUER, audience=AUDIENCE, kind=kind, jwks_file=file, roles=roles)])

    def token(self, subject: str = "2517", **claims: Any) -> str:
        now = int(time.time())
        known = {"iss": ISSUER, "sub": subject, "aud": AUDIENCE, "client_id": "cli", "iat": now, "exp": now + 300}
        claims = {name: value(now) if callable(value) else value for name, value in claims.items()}
        return jwt.encode({"alg": "ES256", "typ": "at+jwt", "kid": "k1"}, known | claims, self.key, ["ES256"])


def after(seconds: int) -> Callable[[int], int]:
    """A time for `Login.token`, from when the token is made: parameters are made long before."""
    return lambda now: now + seconds


@pytest.fixture
def login(empty_world: World, tmp_path: Path) -> Login:
    """Who vouches for `frida`, an engineer who has no key here."""
    login = Login(tmp_path)
    empty_world.reopen(issuers=login.federation)
    known = {"name": "frida", "roles": ["engineer"], "issuer": ISSUER, "subject": "2517"}
    empty_world.post("operator", "/v1/identities", known)
    return login


def exchanged(world: World, token: str, audience: str = AUTHORITY_AUDIENCE) -> Any:
    form = {"grant_type": TOKEN_EXCHANGE, "subject_token": token, "subject_token_type": JWT_TYPE, "resource": audience}
    return world.http.post("/v1/token", data=form)


def refreshed(world: World, token: str, audience: str = AUTHORITY_AUDIENCE) -> Any:
    return world.http.post(
        "/v1/token", data={"grant_type": "refresh_token", "refresh_token": token, "resource": audience}
    )


def test_whom_an_issuer_vouches_for_gets_in_as_who_they_are_here(empty_world: World, login: Login) -> None:
    answer = exchanged(empty_world, login.token()).json()
    assert (answer["name"], answer["token_type"]) == ("frida", "Bearer")
    headers = {"Authorization": f"Bearer {answer['access_token']}"}
    assert empty_world.http.get("/v1/me", headers=headers).json() == {
        "name": "frida", "kind": "person", "roles": ["engineer"], "has_key": False, "node": None,
    }  # fmt: skip
    issued = empty_world.log()[-1]
    assert (issued.actor, issued.action, issued.rule) == ("frida", "token:issue", "outside-issuer")


@pytest.mark.parametrize(
    "claims",
    [{"sub": "2518"}, {"iss": "https://other.test"}, {"aud": "urn:elsewhere"}, {"exp": after(-60)},
     {"cnf": {"jkt": "x"}}, {"iat": after(600), "exp": after(900)}],
)  # fmt: skip
def test_whom_nobody_registered_or_who_has_another_token_gets_nothing(
    empty_world: World, login: Login, claims: dict[str, Any]
) -> None:
    before = empty_world.content()
    answer = exchanged(empty_world, login.token(**claims))
    assert (answer.status_code, answer.json().keys()) == (401, {"error", "hint", "kind"})
    assert empty_world.content() == before
    last = empty_world.log()[-1]
    assert (last.actor, last.action, last.outcome) == ("unknown", "token:issue", "denied")


def test_a_token_of_ours_is_no_token_of_an_issuer(empty_world: World, login: Login) -> None:
    assert exchanged(empty_world, fresh(empty_world, "operator")).status_code == 401
    assert status_of(empty_world, login.token()) == 401


def test_without_a_configured_issuer_nobody_vouches(empty_world: World, tmp_path: Path) -> None:
    assert exchanged(empty_world, Login(tmp_path).token()).status_code == 401


def test_who_comes_through_an_issuer_signs_with_their_key_but_does_not_log_in_with_it(
    empty_world: World, login: Login
) -> None:
    """Else who leaves the issuer's house would stay in ours."""
    frida = empty_world.people["frida"] = Person("frida", ["engineer"])
    headers = {"Authorization": f"Bearer {exchanged(empty_world, login.token()).json()['access_token']}"}
    answer = empty_world.http.put("/v1/identities/frida/key", json={"public_key": frida.public}, headers=headers)
    assert answer.status_code == 200
    assert empty_world.exchange(empty_world.assertion("frida")).status_code == 401
    assert exchanged(empty_world, login.token()).status_code == 200


def test_groups_of_an_issuer_give_roles_and_take_them(empty_world: World, tmp_path: Path) -> None:
    login = Login(tmp_path, roles=RoleMapping(claim="groups", map={"ml": ["engineer"], "audit": ["auditor", "root"]}))
    empty_world.reopen(issuers=login.federation)
    assert exchanged(empty_world, login.token(groups=["nothing"])).status_code == 401
    first = exchanged(empty_world, login.token(groups=["ml", "audit"])).json()
    assert first["name"].startswith("u-")
    me = empty_world.http.get("/v1/me", headers={"Authorization": f"Bearer {first['access_token']}"}).json()
    assert me["roles"] == ["auditor", "engineer"]
    size = len(empty_world.log())
    second = exchanged(empty_world, login.token(groups=["ml"])).json()
    said = [(e.actor, e.action, e.rule, e.details.get("roles")) for e in empty_world.log()[size:]]
    assert said[0] == ("authority", "identity:change", "outside-issuer", "engineer")
    assert second["name"] == first["name"]
    assert (status_of(empty_world, first["access_token"]), status_of(empty_world, second["access_token"])) == (401, 200)
    assert refreshed(empty_world, first["refresh_token"]).status_code == 401


def test_who_lost_every_group_is_out_at_once(empty_world: World, tmp_path: Path) -> None:
    login = Login(tmp_path, roles=RoleMapping(claim="groups", map={"ml": ["engineer"]}))
    empty_world.reopen(issuers=login.federation)
    first = exchanged(empty_world, login.token(groups=["ml"])).json()
    assert exchanged(empty_world, login.token(groups=[])).status_code == 401
    assert status_of(empty_world, first["access_token"]) == 401
    assert refreshed(empty_world, first["refresh_token"]).status_code == 401


def test_a_workload_of_an_issuer_is_a_service_and_gets_no_session(empty_world: World, tmp_path: Path) -> None:
    mapping = RoleMapping(claim="sub", map={"system:serviceaccount:ml:scorer": ["consumer"]})
    login = Login(tmp_path, kind="workloads", roles=mapping)
    empty_world.reopen(issuers=login.federation)
    answer = exchanged(empty_world, login.token("system:serviceaccount:ml:scorer")).json()
    assert "refresh_token" not in answer
    me = empty_world.http.get("/v1/me", headers={"Authorization": f"Bearer {answer['access_token']}"}).json()
    assert (me["kind"], me["roles"]) == ("service", ["consumer"])


# ---- refreshing ----


def test_a_refresh_token_works_once_and_gives_the_next_one(empty_world: World, login: Login) -> None:
    first = exchanged(empty_world, login.token()).json()
    second = refreshed(empty_world, first["refresh_token"]).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert status_of(empty_world, second["access_token"]) == status_of(empty_world, first["access_token"]) == 200
    third = refreshed(empty_world, second["refresh_token"], INFERENCE_AUDIENCE)
    assert third.status_code == 200
    assert empty_world.log()[-1].rule == "refresh"


def test_a_refresh_token_that_is_used_twice_ends_every_token_on_record(empty_world: World, login: Login) -> None:
    """RFC 9700 section 4.14.2: who of the two is the thief cannot be told, so both are out."""
    first = exchanged(empty_world, login.token()).json()
    second = refreshed(empty_world, first["refresh_token"]).json()
    other = exchanged(empty_world, login.token()).json()
    size = len(empty_world.log())
    assert refreshed(empty_world, first["refresh_token"]).status_code == 401
    for token in (first, second, other):
        assert status_of(empty_world, token["access_token"]) == 401
        assert refreshed(empty_world, token["refresh_token"]).status_code == 401
    said = [(entry.actor, entry.action, entry.rule) for entry in empty_world.log()[size:]]
    assert said[0] == ("frida", "token:revoke", "reused-refresh-token")
    assert exchanged(empty_world, login.token()).status_code == 200  # the issuer says who it is


def test_a_session_ends_with_the_working_day(empty_world: World, login: Login) -> None:
    token = exchanged(empty_world, login.token()).json()["refresh_token"]
    for hours in range(1, 8):  # however often it is refreshed
        empty_world.clock.offset = hours * 3600.0
        token = refreshed(empty_world, token).json()["refresh_token"]
    empty_world.clock.offset = REFRESH_LIFETIME_S + 1
    assert refreshed(empty_world, token).status_code == 401


@pytest.mark.parametrize("token", ["", "x", "é", "\x00", "a.b.c", "x" * 100])
def test_what_is_no_refresh_token_gives_nothing(empty_world: World, login: Login, token: str) -> None:
    exchanged(empty_world, login.token())
    assert refreshed(empty_world, token).status_code in (400, 401)


def test_refresh_tokens_rest_as_digests_only(empty_world: World, login: Login) -> None:
    token = exchanged(empty_world, login.token()).json()["refresh_token"]
    with empty_world.authority.core.database.reading() as connection:
        assert token not in repr(connection.execute(select(refresh_tokens)).all())


def test_whoever_has_a_key_of_their_own_gets_no_session(empty_world: World) -> None:
    assert "refresh_token" not in empty_world.exchange(empty_world.assertion("ed")).json()


# ---- ending ----


def test_a_role_that_was_taken_away_is_gone_at_once(empty_world: World) -> None:
    token = fresh(empty_world, "ada")
    assert status_of(empty_world, token, "/v1/log") == 200
    with empty_world.recorded("operator", "identity:change"):
        answer = empty_world.ask("operator", "PUT", "/v1/identities/ada/roles", {"roles": ["consumer"]})
    assert answer.json() == {"name": "ada", "roles": ["consumer"]}
    assert status_of(empty_world, token, "/v1/me") == 401
    assert status_of(empty_world, fresh(empty_world, "ada"), "/v1/log") == 403


def test_who_was_shut_out_is_out_at_once_and_for_good(empty_world: World, login: Login) -> None:
    ours, theirs = fresh(empty_world, "ed"), exchanged(empty_world, login.token()).json()
    for name in ("ed", "frida"):
        with empty_world.recorded("sofia", "identity:revoke"):
            empty_world.post("sofia", f"/v1/identities/{name}/revocation")
    assert status_of(empty_world, ours) == status_of(empty_world, theirs["access_token"]) == 401
    assert empty_world.exchange(empty_world.assertion("ed")).status_code == 401
    assert exchanged(empty_world, login.token()).status_code == 401
    assert refreshed(empty_world, theirs["refresh_token"]).status_code == 401
    shown = {each["name"]: each["disabled"] for each in empty_world.get("operator", "/v1/identities")}
    assert (shown["ed"], shown["frida"], shown["eve"]) == (True, True, False)


def test_a_new_key_ends_the_tokens_and_the_assertions_of_the_old_one(empty_world: World) -> None:
    token, old, new = fresh(empty_world, "ed"), empty_world.people["ed"], Person("ed", ["engineer"])
    with empty_world.recorded("ed", "identity:key"):
        answer = empty_world.replace_key("ed", new)
    assert answer.status_code == 200
    assert status_of(empty_world, token) == 401
    assert empty_world.exchange(empty_world.assertion("ed", key=old.private)).status_code == 401
    assert empty_world.exchange(empty_world.assertion("ed", key=new.private)).status_code == 200
    empty_world.tokens.clear()
    empty_world.people["ed"] = new
    for key in (empty_world.people["eve"].public, "no key"):
        assert empty_world.ask("ed", "PUT", "/v1/identities/ed/key", {"public_key": key}).status_code in (400, 422)


def test_the_last_operator_cannot_be_taken_away(empty_world: World) -> None:
    with empty_world.still(entries=2):
        for name in ("sofia", "operator"):
            assert empty_world.refused(409, name, "POST", "/v1/identities/operator/revocation") == "ConflictError"
    with empty_world.still("denied"):
        answer = empty_world.ask("operator", "PUT", "/v1/identities/operator/roles", {"roles": ["auditor"]})
        assert "nobody-changes-their-own-roles" in answer.json()["error"]
    empty_world.register("second", ["operator"])
    empty_world.post("sofia", "/v1/identities/operator/revocation")
    with empty_world.still():
        assert empty_world.refused(409, "sofia", "POST", "/v1/identities/second/revocation") == "ConflictError"
    assert empty_world.get("second", "/v1/identities")


def test_a_revoked_token_is_dead_and_its_owner_is_not(empty_world: World) -> None:
    """RFC 7009 section 2: whoever has a token may end it."""
    one, other = fresh(empty_world, "ed"), fresh(empty_world, "ed")
    for_inference = fresh(empty_world, "ed", INFERENCE_AUDIENCE)
    with empty_world.recorded("ed", "token:revoke"):
        answer = revoke(empty_world, one)
    assert (answer.status_code, answer.json()) == (200, {})
    assert (status_of(empty_world, one), status_of(empty_world, other)) == (401, 200)
    with empty_world.recorded("ed", "token:revoke"):
        assert revoke(empty_world, for_inference).status_code == 200
    with empty_world.authority.core.database.reading() as connection:
        dead = connection.execute(select(revocations.c.token_id)).scalars().all()
    assert len([token_id for token_id in dead if token_id]) == 2


def test_to_end_a_token_twice_or_a_dead_one_does_nothing(empty_world: World) -> None:
    """Else who has one dead token could fill the log with it."""
    one, other = fresh(empty_world, "ed"), fresh(empty_world, "eve")
    revoke(empty_world, one)
    empty_world.ask("operator", "PUT", "/v1/identities/eve/roles", {"roles": ["engineer", "reviewer"]})
    with empty_world.still(entries=0):
        for token in (one, other, "", "x", "a.b.c", "é", "x" * 4000, empty_world.assertion("ed")):
            assert revoke(empty_world, token).status_code in (200, 400)
    stranger = tokens.issue(
        empty_world.people["ed"].private, issuer=URL, subject="carl", audience=AUTHORITY_AUDIENCE, roles=[],
        lifetime_s=60, now=time.time(), key_id=next(iter(empty_world.authority.sessions.published_keys())),
    )  # fmt: skip
    with empty_world.still(entries=0):  # nobody ends another's token by writing one that looks like it
        assert revoke(empty_world, stranger).status_code == 200


def test_to_end_a_refresh_token_ends_what_came_of_it(empty_world: World, login: Login) -> None:
    first, other = exchanged(empty_world, login.token()).json(), exchanged(empty_world, login.token()).json()
    second = refreshed(empty_world, first["refresh_token"]).json()
    assert status_of(empty_world, second["access_token"]) == 200
    with empty_world.recorded("frida", "token:revoke"):
        assert revoke(empty_world, second["refresh_token"]).status_code == 200
    for ended in (first, second):
        assert status_of(empty_world, ended["access_token"]) == 401
    assert status_of(empty_world, other["access_token"]) == 200
    assert refreshed(empty_world, second["refresh_token"]).status_code == 401
    assert refreshed(empty_world, other["refresh_token"]).status_code == 200


def test_old_revocations_are_cleared_and_their_numbers_go_on(empty_world: World) -> None:
    for hours in range(4):
        empty_world.clock.offset = hours * 3600.0
        empty_world.tokens.clear()
        revoke(empty_world, fresh(empty_world, "ed"))
    with empty_world.authority.core.database.reading() as connection:
        sequences = connection.execute(select(revocations.c.sequence).order_by(revocations.c.sequence)).scalars().all()
    assert len(sequences) <= 2
    assert sequences[-1] >= 4


# ---- the keys that sign ----


def test_a_new_token_key_lets_the_old_ones_tokens_live_out_their_time(empty_world: World) -> None:
    old = fresh(empty_world, "ed")
    with empty_world.still(entries=1, outcome="denied"):
        empty_world.refused(403, "sofia", "POST", "/v1/token-keys", {})
    new_id = empty_world.post("operator", "/v1/token-keys", {})["key_id"]
    new = fresh(empty_world, "ed")
    assert status_of(empty_world, old) == status_of(empty_world, new) == 200
    published = {key["kid"]: key for key in empty_world.http.get("/v1/jwks.json").json()["keys"]}
    assert len(published) == 2
    assert published[new_id].keys() == {"kty", "crv", "x", "kid", "use", "alg"}  # and no private part
    assert (published[new_id]["alg"], published[new_id]["use"]) == ("Ed25519", "sig")
    empty_world.clock.offset = tokens.MAX_LIFETIME_S + 1.0
    assert [key["kid"] for key in empty_world.http.get("/v1/jwks.json").json()["keys"]] == [new_id]
    said = [(e.action, e.details.get("phase"), e.outcome) for e in empty_world.log() if e.action == "token-key:rotate"]
    assert said[-3:] == [
        ("token-key:rotate", "intent", "success"),
        ("token-key:rotate", "outcome", "success"),
        ("token-key:rotate", None, "success"),
    ]


def test_a_compromised_token_key_takes_all_its_tokens_along(empty_world: World) -> None:
    old = fresh(empty_world, "ed")
    assert status_of(empty_world, old) == 200  # and is remembered as good
    with empty_world.authority.core.database.reading() as connection:
        row = connection.execute(select(token_keys)).one()
    stolen = empty_world.authority.core.keys.secret(row.secret)
    empty_world.post("operator", "/v1/token-keys", {"compromised": True})
    empty_world.tokens.clear()
    forged = tokens.issue(
        stolen, issuer=URL, subject="operator", audience=AUTHORITY_AUDIENCE, roles=["operator"], lifetime_s=300,
        now=time.time(), key_id=row.key_id,
    )  # fmt: skip
    assert status_of(empty_world, old) == status_of(empty_world, forged) == 401
    assert status_of(empty_world, fresh(empty_world, "ed")) == 200
    assert row.key_id not in empty_world.get("operator", "/v1/info")["token_public_keys"]


def test_another_authority_over_the_same_state_knows_at_once(empty_world: World) -> None:
    second = empty_world.another()
    token = fresh(empty_world, "ed")
    assert second.sessions.authenticate(f"Bearer {token}", "local").name == "ed"
    revoke(empty_world, token)
    with pytest.raises(AuthenticationError):
        second.sessions.authenticate(f"Bearer {token}", "local")
    empty_world.post("operator", "/v1/token-keys", {})
    token = fresh(empty_world, "ed")
    assert second.sessions.authenticate(f"Bearer {token}", "local").name == "ed"
    second.close()


def test_the_metadata_says_what_there_is(empty_world: World) -> None:
    """RFC 8414."""
    said = empty_world.http.get("/.well-known/oauth-authorization-server").json()
    assert said["issuer"] == URL
    for name in ("token_endpoint", "revocation_endpoint", "jwks_uri"):
        path = said[name].removeprefix(URL)
        method = "GET" if name == "jwks_uri" else "POST"
        assert empty_world.http.request(method, path).status_code in (200, 400), name
    assert said["tls_client_certificate_bound_access_tokens"] is True
    for grant in said["grant_types_supported"]:
        form = {"grant_type": grant, "resource": AUTHORITY_AUDIENCE, "client_assertion_type": tokens.CLIENT_ASSERTION,
                "subject_token_type": JWT_TYPE}  # fmt: skip
        assert empty_world.http.post("/v1/token", data=form).status_code == 401, grant  # known, but nothing is proven


def test_a_client_may_send_its_assertion_as_a_credential(empty_world: World) -> None:
    """RFC 7523 section 2.2, `private_key_jwt`."""
    form = {"grant_type": "client_credentials", "client_assertion_type": tokens.CLIENT_ASSERTION,
            "client_assertion": empty_world.assertion("carl"), "resource": AUTHORITY_AUDIENCE}  # fmt: skip
    assert status_of(empty_world, empty_world.http.post("/v1/token", data=form).json()["access_token"]) == 200
    form |= {"client_assertion": empty_world.assertion("carl"), "client_assertion_type": "urn:other"}
    assert empty_world.http.post("/v1/token", data=form).status_code == 400


# ---- over mutual TLS ----


def test_a_token_that_was_asked_for_over_a_certificate_works_only_over_it(empty_world: World) -> None:
    """RFC 8705 section 3."""
    mine, other = empty_world.certificate_of("node-eu"), empty_world.certificate_of("node-eu")
    with empty_world.over(mine):
        token = fresh(empty_world, "carl")
        assert status_of(empty_world, token) == 200
    for certificate in (None, other):
        with empty_world.over(certificate):
            assert status_of(empty_world, token) == 401
    with empty_world.over(mine):  # one that was not bound may be used anywhere
        assert status_of(empty_world, empty_world.token("ed")) == 200


# ---- on record ----


def test_a_failed_login_is_on_record_without_saying_who_and_not_without_end(empty_world: World) -> None:
    now = time.time()  # which stands still
    empty_world.authority.core.clock = lambda: now
    size = len(empty_world.log())
    for _ in range(3 * FAILURES_RECORDED_PER_S):
        assert empty_world.exchange(empty_world.assertion("ed", audience="https://elsewhere")).status_code == 401
    said = empty_world.log()[size:]
    assert len(said) == FAILURES_RECORDED_PER_S
    assert {(e.actor, e.actor_kind, e.action, e.outcome, e.source) for e in said} == {
        ("unknown", "unknown", "token:issue", "denied", ADDRESS)
    }
    assert {tuple(sorted(e.details)) for e in said} == {("error", "grant")}
    now += 1
    empty_world.exchange(empty_world.assertion("ed", audience="https://elsewhere"))
    assert len(empty_world.log()) == size + FAILURES_RECORDED_PER_S + 1


def test_the_log_names_nobody_and_no_address(world: World) -> None:
    """After a whole story: not in the entries, nor in an export; whoever may read it is shown the names."""
    world.train()
    world.release()
    endpoint = world.deploy()
    world.post(endpoint, f"/v1/endpoints/{endpoint}/quota", {"subject": "carl", "wanted": 1})
    world.post("ed", "/v1/access", {"role": "auditor", "seconds": 600, "reason": "Rita is ill"})
    world.set_budget(20.0)
    world.register("quentin-the-longest", ["engineer"])
    world.ask("operator", "PUT", "/v1/identities/quentin-the-longest/roles", {"roles": ["reviewer"]})
    world.post("sofia", "/v1/identities/quentin-the-longest/revocation")
    world.refused(403, "carl", "GET", "/v1/identities")
    world.exchange(world.assertion("ed", audience="https://elsewhere"))
    revoke(world, world.token("otto"))
    entries = world.entries()
    for name in {*ROLES, "quentin-the-longest"} - {"operator"}:  # which is also the name of a role
        assert not [entry for entry in entries if re.search(rf"(?<![\w-]){name}(?![\w-])".encode(), entry)], name
    assert not [entry for entry in entries for text in (ADDRESS, "127.0.0.1", "testclient") if text.encode() in entry]
    assert not [entry for entry in entries if b" ill" in entry]  # nor what people write
    for event in map(Event.from_bytes, entries):
        assert event.actor_kind != "person" or re.fullmatch(r"p-[0-9a-f]{16}", event.actor)
        assert event.source == "local" or re.fullmatch(r"a-[0-9a-f]{16}", event.source)
    exported = world.ask("ada", "GET", "/v1/log/export").content
    assert b"quentin" not in exported
    shown = json.dumps(world.get("ada", "/v1/log?limit=1000"))
    for name in ("quentin-the-longest", "carl", ADDRESS):
        assert name in shown


def test_a_forgotten_person_leaves_a_whole_log_without_a_name(world: World) -> None:
    world.train()
    size = len(world.entries())
    with world.still():
        assert world.refused(409, "sofia", "POST", "/v1/identities/ed/shredding") == "ConflictError"
    world.post("sofia", "/v1/identities/ed/revocation")
    before = world.entries()
    assert '"ed"' in json.dumps(world.get("ada", "/v1/log?limit=1000"))
    assert world.post("sofia", "/v1/identities/ed/shredding") == {"name": "ed", "forgotten": True}
    assert world.entries()[: len(before)] == before
    shown = json.dumps(world.get("ada", "/v1/log?limit=1000"))
    assert '"ed"' not in shown
    assert "Identity/ed" not in shown
    assert '"rita"' in shown
    assert world.get("ada", "/v1/log?actor=ed") == []
    header, entries = read_export(world.authority.core.database, world.authority.log.verifier_key)
    report = verify_log(entries, header.checkpoints, parse_verifier_key(header.verifier_key)[1], LOG_ORIGIN)
    assert report.size == len(world.entries()) > size


def test_nobody_forgets_a_machine_or_somebody_who_still_works(empty_world: World) -> None:
    empty_world.register("scorer", ["consumer"], kind="service")
    for name, status in (("scorer", 400), ("node-eu", 400), ("eve", 409), ("nobody", 404)):
        empty_world.refused(status, "sofia", "POST", f"/v1/identities/{name}/shredding")
    assert empty_world.refused(403, "operator", "POST", "/v1/identities/eve/shredding") == "PermissionDeniedError"
