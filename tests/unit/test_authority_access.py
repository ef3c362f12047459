"""A role for a while: not by oneself, not for longer, not without a word on record."""

from __future__ import annotations

from typing import Any

import pytest

from authority_world import Person, World
from cloister.authority.access import MAX_DURATION_S
from cloister.authority.approvals import DEFAULT_LIFETIME_S, Required
from cloister.signing import tokens

HOUR_S = 3600


def wanted(role: str = "auditor", seconds: int = HOUR_S, reason: str = "the audit of October") -> dict[str, Any]:
    return {"role": role, "seconds": seconds, "reason": reason}


def asked(world: World, name: str = "ed", **what: Any) -> dict[str, Any]:
    """The open request."""
    approval = world.post(name, "/v1/access", wanted(**what))["approval"]
    return next(dict(each) for each in world.get("ada", "/v1/approvals") if each["approval"] == approval)


def granted(world: World, name: str = "ed", voter: str = "sofia", **what: Any) -> None:
    assert world.vote(voter, asked(world, name, **what)).status_code == 200


def reads_the_log(world: World, name: str = "ed") -> bool:
    return world.ask(name, "GET", "/v1/log").status_code == 200


def test_the_deciding_vote_grants_it_and_says_so(empty_world: World) -> None:
    request = asked(empty_world)
    assert request["details"] | {"owner": ""} == {
        "person": "ed", "role": "auditor", "seconds": HOUR_S, "reason": "the audit of October", "owner": "",
    }  # fmt: skip
    assert not reads_the_log(empty_world)
    with empty_world.recorded("sofia", "approval:vote"):
        assert empty_world.vote("sofia", request).json()["state"] == "used"
    said = empty_world.log()[-1].details
    assert (said["role"], said["person"], said["seconds"], said["kind"]) == ("auditor", "ed", HOUR_S, "access")
    assert reads_the_log(empty_world)  # with the token that was there before: the directory decides
    assert empty_world.get("ed", "/v1/me")["roles"] == ["auditor", "engineer"]
    shown = next(each for each in empty_world.get("operator", "/v1/identities") if each["name"] == "ed")
    assert (shown["roles"], [each["role"] for each in shown["elevated"]]) == (["engineer"], ["auditor"])


def test_it_ends_by_itself(empty_world: World) -> None:
    """For a token from before it was lent too, which lives on: the directory decides, and not the token."""
    empty_world.tokens.clear()  # the template's may be five minutes old
    empty_world.token("ed")
    granted(empty_world, seconds=300)
    empty_world.clock.offset = 200.0
    assert reads_the_log(empty_world)
    empty_world.clock.offset = 301.0
    assert empty_world.refused(403, "ed", "GET", "/v1/log") == "PermissionDeniedError"
    assert empty_world.get("ed", "/v1/me")["roles"] == ["engineer"]
    empty_world.tokens.clear()
    assert not reads_the_log(empty_world)


def test_a_token_with_a_lent_role_ends_with_it(empty_world: World) -> None:
    """What a replica believes is the token: it must not outlive the role that it names."""
    before = empty_world.exchange(empty_world.assertion("ed")).json()["expires_in"]
    granted(empty_world, role="consumer", seconds=120)
    answer = empty_world.exchange(empty_world.assertion("ed"), tokens.INFERENCE_AUDIENCE).json()
    assert before == tokens.MAX_LIFETIME_S
    assert answer["expires_in"] <= 120
    claims = tokens.verify(
        answer["access_token"], empty_world.authority.sessions.published_keys(),
        issuer=empty_world.authority.url, audience=tokens.INFERENCE_AUDIENCE, now=empty_world.clock(),
    )  # fmt: skip
    assert claims.roles == {"consumer", "engineer"}
    assert claims.expires_at <= empty_world.clock() + 120
    empty_world.clock.offset = 121.0
    assert empty_world.exchange(empty_world.assertion("ed")).json()["expires_in"] == tokens.MAX_LIFETIME_S


def test_the_shorter_of_two_lent_roles_bounds_the_token(empty_world: World) -> None:
    granted(empty_world, seconds=400)
    granted(empty_world, role="reviewer", seconds=100)
    assert empty_world.exchange(empty_world.assertion("ed")).json()["expires_in"] <= 100
    empty_world.clock.offset = 200.0
    empty_world.tokens.clear()
    assert empty_world.get("ed", "/v1/me")["roles"] == ["auditor", "engineer"]


def test_nobody_lends_a_role_to_themselves(empty_world: World) -> None:
    empty_world.register("boss", ["operator", "security-officer"])
    request = asked(empty_world, "boss")
    with empty_world.still("denied"):
        assert empty_world.vote("boss", request).status_code == 403
    for name in ("operator", "rita", "olga", "ed", "ada", "carl"):
        with empty_world.still("denied"):
            assert empty_world.vote(name, request).status_code == 403
    assert empty_world.get("boss", "/v1/me")["roles"] == ["operator", "security-officer"]


def test_a_lent_office_does_not_lend_itself_on_to_who_asked(empty_world: World) -> None:
    """Eve gets the office for an hour: she sees what an officer sees, and lends nothing to herself or to anybody."""
    granted(empty_world, "eve", role="security-officer")
    assert reads_the_log(empty_world, "eve")
    for request in (asked(empty_world, "eve", role="operator"), asked(empty_world, "ed")):
        with empty_world.still("denied"):
            assert empty_world.vote("eve", request).status_code == 403
    assert not reads_the_log(empty_world)


def test_a_second_identity_that_the_author_registered_has_no_vote(empty_world: World) -> None:
    """The operator is the author, and has made an officer."""
    empty_world.register("puppet", ["security-officer"])
    request = asked(empty_world, "operator", role="auditor")
    with empty_world.still("denied"):
        assert empty_world.vote("puppet", request).status_code == 403


def test_a_vote_of_somebody_whose_office_has_ended_does_not_count(empty_world: World) -> None:
    empty_world.reopen(required=Required(access=2))
    for name in ("second-officer", "third-officer"):
        empty_world.register(name, ["security-officer"])
    request = asked(empty_world)
    assert empty_world.vote("third-officer", request).json()["approved"] == 1
    roles = {"roles": ["auditor"]}
    assert empty_world.ask("operator", "PUT", "/v1/identities/third-officer/roles", roles).status_code == 200
    assert empty_world.vote("sofia", request).json()["approved"] == 1  # the third's has lapsed
    assert not reads_the_log(empty_world)
    assert empty_world.vote("second-officer", request).json()["approved"] == 2
    assert reads_the_log(empty_world)


def test_two_votes_where_two_are_needed(empty_world: World) -> None:
    empty_world.reopen(required=Required(access=2))
    empty_world.register("second-officer", ["security-officer"])
    request = asked(empty_world)
    assert empty_world.vote("sofia", request).json()["state"] == "open"
    assert not reads_the_log(empty_world)
    assert empty_world.vote("second-officer", request).json()["state"] == "used"
    assert reads_the_log(empty_world)


def test_a_refused_request_gives_nothing(empty_world: World) -> None:
    request = asked(empty_world)
    assert empty_world.vote("sofia", request, decision="deny").json()["state"] == "refused"
    assert not reads_the_log(empty_world)
    with empty_world.still():
        assert empty_world.vote("sofia", request).status_code == 404


def test_a_request_that_nobody_decided_lapses(empty_world: World) -> None:
    request = asked(empty_world)
    empty_world.clock.offset = DEFAULT_LIFETIME_S + 1.0
    empty_world.tokens.clear()
    with empty_world.still():
        assert empty_world.vote("sofia", request).status_code == 404
    assert not reads_the_log(empty_world)


def test_an_approval_lends_once(empty_world: World) -> None:
    request = asked(empty_world)
    assert empty_world.vote("sofia", request).status_code == 200
    with empty_world.still():
        assert empty_world.vote("sofia", request).status_code == 404
    empty_world.clock.offset = HOUR_S + 1.0
    empty_world.tokens.clear()
    assert not reads_the_log(empty_world)
    assert asked(empty_world)["approval"] != request["approval"]


def test_who_was_shut_out_meanwhile_is_lent_nothing(empty_world: World) -> None:
    request = asked(empty_world)
    empty_world.post("sofia", "/v1/identities/ed/revocation")
    with empty_world.still():
        assert empty_world.vote("sofia", request).status_code == 404
    assert empty_world.counts()["elevations"] == 0


def test_who_is_shut_out_loses_a_lent_role_too(empty_world: World) -> None:
    granted(empty_world)
    token = empty_world.token("ed")
    empty_world.post("sofia", "/v1/identities/ed/revocation")
    assert empty_world.http.get("/v1/log", headers={"Authorization": f"Bearer {token}"}).status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (wanted(role="root"), 400),
        (wanted(role="run"), 400),
        (wanted(role="engineer"), 409),
        (wanted(seconds=59), 400),
        (wanted(seconds=MAX_DURATION_S + 1), 400),
        (wanted(seconds=10**9), 400),
        (wanted(reason=" "), 400),
        (wanted(reason=""), 400),
        (wanted(reason="x" * 301), 400),
        (wanted() | {"person": "carl"}, 400),
    ],
)
def test_what_cannot_be_asked_for(calm_world: World, body: dict[str, Any], status: int) -> None:
    content = calm_world.content()
    answer = calm_world.ask("ed", "POST", "/v1/access", body)
    assert answer.status_code == status, answer.text
    assert calm_world.content() == content


@pytest.mark.parametrize("name", ["carl", "rita", "olga", "ada"])
def test_only_operators_and_engineers_ask(calm_world: World, name: str) -> None:
    with calm_world.still("denied"):
        assert calm_world.refused(403, name, "POST", "/v1/access", wanted(role="engineer")) == "PermissionDeniedError"


def test_a_changed_wish_voids_the_request_before_it(empty_world: World) -> None:
    first = asked(empty_world, seconds=600)
    second = asked(empty_world, seconds=MAX_DURATION_S)
    assert first["approval"] != second["approval"]
    with empty_world.still():
        assert empty_world.vote("sofia", first).status_code == 404
    body = empty_world.vote_body("sofia", first)  # nor can the short one's vote be used for the long one
    with empty_world.still():
        path = f"/v1/approvals/{second['approval']}/votes"
        assert empty_world.ask("sofia", "POST", path, body).status_code == 422


def test_a_service_may_ask_and_has_no_vote(empty_world: World) -> None:
    empty_world.register("deployer", ["operator"], kind="service")
    empty_world.register("guard", ["security-officer"], kind="service")
    request = asked(empty_world, "deployer")
    with empty_world.still("denied"):
        assert empty_world.vote("guard", request).status_code == 403
    assert empty_world.vote("sofia", request).status_code == 200
    assert reads_the_log(empty_world, "deployer")


def test_a_lent_role_is_no_role_to_be_operator_by(empty_world: World) -> None:
    """The last operator cannot go because somebody is one for an hour, who makes no access that outlives the hour."""
    granted(empty_world, role="operator")
    with empty_world.still():
        assert empty_world.refused(409, "ed", "POST", "/v1/identities/operator/revocation") == "ConflictError"
    newcomer = Person("nina", [])
    body = {"name": "nina", "roles": ["consumer"], "public_key": newcomer.public}
    with empty_world.still("denied"):
        assert empty_world.ask("ed", "POST", "/v1/identities", body).status_code == 403
    assert empty_world.ask("ed", "GET", "/v1/identities").status_code == 200
