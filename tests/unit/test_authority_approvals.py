"""Somebody tries to do alone what takes several, or to have something else approved than what was shown."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import insert, select, update

from authority_world import CODE, Person, World, training_spec
from cloister.authority.approvals import DEFAULT_LIFETIME_S, LIFETIME_S, Required
from cloister.canonical import b64, sha256_hex, unb64
from cloister.errors import ConflictError, IntegrityError
from cloister.models.release import approval_digest, approval_predicate
from cloister.signing import dsse
from cloister.stores.tables import approvals, identities, votes

BUDGET = "/v1/datasets/adult/budget"


def training(code: str = CODE, **spec: Any) -> dict[str, Any]:
    return {"spec": training_spec(**spec), "code_digest": code, "public_key": Person("new", []).public}


def asked(world: World, body: dict[str, Any] | None = None, author: str = "ed") -> dict[str, Any]:
    """The request for approval of a run."""
    return world.missing(world.ask(author, "POST", "/v1/runs", body or training()))


def state(world: World, request: dict[str, Any]) -> str:
    with world.authority.core.database.reading() as connection:
        query = select(approvals.c.state).where(approvals.c.id == request["approval"])
        return str(connection.execute(query).scalar_one())


def submitted(world: World, author: str = "ed", **changes: Any) -> int:
    return int(world.ask(author, "POST", "/v1/runs", training(**changes)).status_code)


# ---- what is asked ----


def test_a_request_shows_exactly_what_is_approved(world: World) -> None:
    request = asked(world)
    assert request["details"].keys() == {
        "dataset", "manifest", "spec", "code", "epsilon", "epsilon_at_most", "delta", "rows_per_unit", "purpose",
        "owner",
    }  # fmt: skip
    shown = request["details"]
    assert (shown["code"], shown["epsilon"], shown["purpose"]) == (CODE, 3.0, "income-research")
    assert request["digest"] == approval_digest(shown)
    assert (request["required"], request["approved"], request["state"]) == (1, 0, "open")
    assert request["expires"] - world.clock() == pytest.approx(LIFETIME_S["training"], abs=60)


def test_asking_again_is_the_same_request(world: World) -> None:
    assert asked(world)["approval"] == asked(world)["approval"] != asked(world, author="eve")["approval"]


def test_data_that_is_not_sensitive_needs_no_approval(world: World) -> None:
    world.reopen(required=Required(training_classes=("restricted",)))
    assert submitted(world) == 200


def test_the_columns_decide_how_sensitive_a_run_is(world: World) -> None:
    plan = world.post("ed", "/v1/plans", {"spec": training_spec()})
    assert plan["approvals"] == 1
    world.reopen(required=Required(training=3))
    assert world.post("ed", "/v1/plans", {"spec": training_spec()})["approvals"] == 3


@pytest.mark.parametrize(
    "required", [{"promotion": 0}, {"policy": 0}, {"access": 0}, {"key_destruction": 0}, {"training": -1}, {"x": 1}]
)
def test_what_never_goes_without_cannot_be_configured_away(required: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(required))):
        Required.model_validate(required)


# ---- who votes ----


@pytest.mark.parametrize("name", ["ed", "eve", "otto", "carl", "ada", "operator", "sofia"])
def test_only_reviewers_and_the_owner_vote_on_training(world: World, name: str) -> None:
    request = asked(world)
    with world.still("denied"):
        assert world.vote(name, request).status_code == 403


@pytest.mark.parametrize("name", ["rita", "olga"])
def test_a_reviewer_or_the_owner_of_the_data_is_enough(world: World, name: str) -> None:
    request = asked(world)
    with world.recorded(name, "approval:vote"):
        assert world.vote(name, request).json()["approved"] == 1
    assert submitted(world) == 200
    assert state(world, request) == "used"


def test_a_service_has_no_vote(world: World) -> None:
    world.register("bot", ["reviewer"], kind="service")
    request = asked(world)
    with world.still("denied"):
        assert world.vote("bot", request).status_code == 403


def test_the_author_never_counts_not_even_with_the_role(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.reopen(required=Required(training=2))
    request = asked(world, author="rob")
    with world.still("denied"):
        answer = world.vote("rob", request)
    assert (answer.status_code, answer.json()["error"]) == (403, "you asked for this, so others decide")
    assert answer.json()["hint"] == "ask a reviewer, or olga (not you)"
    assert world.vote("rita", request).json()["approved"] == 1
    # Even if such a vote were in the table.
    with world.authority.core.database.transaction() as connection:
        connection.execute(
            insert(votes).values(
                approval=request["approval"], person="rob", key_id="x", decision="approve", created=0.0,
                envelope=world.vote_body("rob", request)["envelope"],
            )
        )  # fmt: skip
    assert world.missing(world.ask("rob", "POST", "/v1/runs", training()))["approved"] == 1
    monkeypatch.setattr(world.authority.approvals, "_may_still", lambda *_: None)  # nor if policy let it pass
    assert world.missing(world.ask("rob", "POST", "/v1/runs", training()))["approved"] == 1


def test_n_of_m_are_n_people_with_n_keys(world: World) -> None:
    world.reopen(required=Required(training=3))
    request = asked(world)
    for number, name in enumerate(("rita", "rob"), 1):
        assert world.vote(name, request).json()["approved"] == number
        assert submitted(world) == 403
    with world.still():
        assert world.vote("rita", request).status_code == 409
    assert world.vote("olga", request).json()["approved"] == 3
    assert submitted(world) == 200


def test_one_key_is_one_voice_whoever_holds_it_later(world: World) -> None:
    """Rita votes, gives her key away, and takes another: its new holder does not make a second voice of it."""
    world.reopen(required=Required(training=2))
    request = asked(world)
    old = world.people["rita"]
    assert world.vote("rita", request).status_code == 200
    new = Person("rita", ["reviewer"])
    assert world.replace_key("rita", new).status_code == 200
    heir = Person("heir", ["reviewer"], old.key)
    world.people["heir"] = heir
    world.post("operator", "/v1/identities", {"name": "heir", "roles": ["reviewer"], "public_key": heir.public})
    with world.still():
        assert world.vote("heir", request).status_code == 409
    assert submitted(world) == 403


# ---- what counts ----


def test_a_voter_who_lost_the_role_does_not_count_any_more(world: World) -> None:
    request = asked(world)
    assert world.vote("rita", request).json()["approved"] == 1
    answer = world.ask("operator", "PUT", "/v1/identities/rita/roles", {"roles": ["auditor"]})
    assert answer.status_code == 200
    assert world.missing(world.ask("ed", "POST", "/v1/runs", training()))["approved"] == 0
    assert world.vote("rob", request).json()["approved"] == 1
    assert submitted(world) == 200


def test_a_voter_who_was_shut_out_does_not_count_any_more(world: World) -> None:
    request = asked(world)
    assert world.vote("rita", request).status_code == 200
    world.post("sofia", "/v1/identities/rita/revocation")
    assert submitted(world) == 403


def test_a_vote_by_a_key_that_was_replaced_does_not_count_any_more(world: World) -> None:
    request = asked(world)
    assert world.vote("rita", request).status_code == 200
    new = Person("rita", ["reviewer"])
    assert world.replace_key("rita", new).status_code == 200
    assert world.missing(world.ask("ed", "POST", "/v1/runs", training()))["approved"] == 0


@pytest.mark.parametrize("column", ["person", "envelope", "decision"])
def test_a_vote_that_was_changed_in_the_database_does_not_count(world: World, column: str) -> None:
    """Whoever can write the database still has no reviewer's key."""
    world.reopen(required=Required(training=2))
    request = asked(world)
    assert world.vote("rita", request).status_code == 200
    with world.authority.core.database.transaction() as connection:
        row = connection.execute(select(votes)).one()
        changed: Any = "rob"
        if column == "envelope":
            payload = unb64(row.envelope["payload"]).replace(b'"rita"', b'"rob"')
            changed = row.envelope | {"payload": b64(payload)}
        if column == "decision":
            changed = "deny"
        connection.execute(update(votes).values(**{column: changed}))
    shown = world.get("ada", "/v1/approvals")[-1]
    assert shown["approved"] == 0
    assert submitted(world) in (403, 409)


def test_a_request_that_was_raised_in_the_database_does_not_count(world: World) -> None:
    """The voters signed what they were shown: other details under their votes are not approved."""
    request = asked(world)
    assert world.vote("rita", request).status_code == 200
    more = request["details"] | {"epsilon": 9.0}
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(approvals).values(details=more, digest=approval_digest(more)))
        row = connection.execute(select(approvals)).one()
        assert world.authority.approvals.votes(connection, row) == ([], [])


def test_enough_good_votes_count_even_if_there_are_bad_ones(world: World) -> None:
    request = asked(world)
    for name in ("rita", "rob"):
        assert world.vote(name, request).status_code == 200
    world.post("sofia", "/v1/identities/rita/revocation")
    assert submitted(world) == 200


# ---- what ends it ----


def test_another_subject_voids_what_was_approved(world: World) -> None:
    other = "sha256:" + "beef" * 16
    first = asked(world)
    assert world.vote("rita", first).status_code == 200
    second = asked(world, training(other))  # the same training, with other code
    assert second["approval"] != first["approval"]
    assert (state(world, first), second["approved"]) == ("void", 0)
    with world.still():
        assert world.vote("rob", first).status_code == 404
    third = asked(world)  # and the first code anew: what was void stays void
    assert third["approval"] not in (first["approval"], second["approval"])
    assert submitted(world) == 403


def test_an_approval_is_for_one_run(world: World) -> None:
    request = asked(world)
    assert world.vote("rita", request).status_code == 200
    assert submitted(world) == 200
    again = asked(world)
    assert (state(world, request), again["approved"]) == ("used", 0)
    assert again["approval"] != request["approval"]
    with world.still():
        assert world.vote("rob", request).status_code == 404


def test_an_approval_is_for_its_author(world: World) -> None:
    assert world.vote("rita", asked(world)).status_code == 200
    assert submitted(world, "eve") == 403
    assert submitted(world, "ed") == 200


def test_an_approval_expires(world: World) -> None:
    request = asked(world)
    assert world.vote("rita", request).status_code == 200
    world.clock.offset = LIFETIME_S["training"] + 1.0
    world.tokens.clear()
    assert world.get("ada", "/v1/approvals") == []
    with world.still():
        assert world.vote("rob", request).status_code == 404
    later = asked(world)
    assert (later["approved"], later["approval"] != request["approval"]) == (0, True)


def test_a_failed_action_does_not_use_the_approval_up(world: World) -> None:
    body = training() | {"public_key": world.people["rita"].public}  # taken: refused after it was approved
    request = asked(world, body)
    assert world.vote("rob", request).status_code == 200
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", body) == "ConflictError"
    assert state(world, request) == "open"
    assert submitted(world) == 200


def test_a_refusal_outweighs_and_is_final_for_this_subject(world: World) -> None:
    world.reopen(required=Required(training=1))
    request = asked(world)
    assert world.vote("rita", request).status_code == 200
    assert world.vote("olga", request, decision="deny").json()["state"] == "refused"
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", training()) == "ConflictError"
    assert submitted(world, name="another") == 403  # another subject may be asked for


# ---- what is signed ----


@pytest.mark.parametrize(
    "changes",
    [{"approval": "apr-00000000"}, {"kind": "promotion"}, {"person": "rob"}, {"expires": 1}, {"details": {}},
     {"decision": "maybe"}, {"decision": True}],
)  # fmt: skip
def test_a_signature_over_something_else_is_no_vote(world: World, changes: dict[str, Any]) -> None:
    request = asked(world)
    with world.still():
        assert world.vote("rita", request, **changes).status_code in (400, 422)


def test_what_is_signed_is_the_digest_that_was_shown(world: World) -> None:
    request = asked(world)
    other = request | {"digest": sha256_hex(b"another")}
    with world.still():
        assert world.vote("rita", other).status_code == 422


def test_an_approver_does_not_sign_for_more_than_is_shown(world: World) -> None:
    """A false authority cannot show one thing and have another one's digest signed."""
    request = asked(world)
    assert approval_predicate(request, "rita", "approve")["details"] == request["details"]
    with pytest.raises(IntegrityError):
        approval_predicate(request | {"details": request["details"] | {"epsilon": 1.0}}, "rita", "approve")


def test_a_signature_of_another_kind_of_statement_is_no_vote(world: World) -> None:
    request = asked(world)
    payload = dsse.strict_json(unb64(world.vote_body("rita", request)["envelope"]["payload"]))
    statement = dsse.statement(
        request["subject"], request["digest"], "https://cloister.dev/other/v1", payload["predicate"]
    )
    body = {"envelope": dsse.sign(statement, world.people["rita"].key)}
    with world.still():
        path = f"/v1/approvals/{request['approval']}/votes"
        assert world.ask("rita", "POST", path, body).status_code == 422


def test_who_has_no_key_has_no_vote(world: World) -> None:
    request = asked(world)
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(identities).where(identities.c.name == "rita").values(public_key=None))
    with world.still("denied"):
        assert world.vote("rita", request).status_code == 401


def test_a_vote_on_nothing_is_not_found(world: World) -> None:
    request = asked(world) | {"approval": "apr-00000000"}
    assert world.vote("rita", request).status_code == 404


# ---- the other kinds ----


def test_a_budget_is_raised_by_two_and_lowered_by_one(world: World) -> None:
    with world.recorded("olga", "budget:set"):
        world.ask("olga", "PUT", BUDGET, {"epsilon": 5.0, "delta": 1e-4})
    for epsilon, delta in ((6.0, 1e-4), (5.0, 2e-4), (4.0, 2e-4)):
        answer = world.ask("olga", "PUT", BUDGET, {"epsilon": epsilon, "delta": delta})
        assert answer.json()["error"] == "more epsilon or delta than before needs 1 approval and has 0"
        assert answer.json()["hint"].startswith("a security officer (not you) runs: cloister approve apr-")
        request = world.missing(answer)
        assert request["details"]["epsilon"] == [5.0, epsilon]
        for name in ("olga", "rita", "operator", "ed"):
            assert world.vote(name, request).status_code == 403
        assert world.budget()["epsilon"] == 5.0
    assert world.vote("sofia", request).status_code == 200
    assert world.ask("olga", "PUT", BUDGET, {"epsilon": 4.0, "delta": 3e-4}).status_code == 403  # not what was approved
    request = world.missing(world.ask("olga", "PUT", BUDGET, {"epsilon": 8.0, "delta": 1e-4}))
    assert world.vote("sofia", request).status_code == 200
    with world.recorded("olga", "budget:set"):
        assert world.ask("olga", "PUT", BUDGET, {"epsilon": 8.0, "delta": 1e-4}).status_code == 200
    assert world.budget()["epsilon"] == 8.0
    with world.recorded("olga", "budget:set"):  # down and up again takes another approval
        world.ask("olga", "PUT", BUDGET, {"epsilon": 5.0, "delta": 1e-4})
    assert world.ask("olga", "PUT", BUDGET, {"epsilon": 8.0, "delta": 1e-4}).status_code == 403


def test_keys_are_destroyed_by_three_and_for_good(world: World) -> None:
    world.register("second-officer", ["security-officer"])
    run = world.submit()
    path = "/v1/datasets/adult/versions/1/key-destruction"
    for name in ("otto", "operator", "sofia", "ed"):
        with world.still("denied"):
            assert world.refused(403, name, "POST", path) == "PermissionDeniedError"
    request = world.missing(world.ask("olga", "POST", path))
    assert (request["kind"], request["required"]) == ("key-destruction", 2)
    assert world.vote("sofia", request).status_code == 200
    assert world.ask("olga", "POST", path).status_code == 403
    assert world.counts()["data_keys"] > 0
    assert world.vote("second-officer", request).status_code == 200
    assert world.post("olga", path)["keys_destroyed"] > 0
    done = [(entry.actor, entry.action) for entry in world.log()[-4:]]
    assert done == [("olga", "key:destroy"), *(("authority", each) for each in (
        "key:shred", "dataset:delete-blobs", "dataset:certify"))]  # fmt: skip
    assert world.counts()["data_keys"] == 0
    with world.still():
        assert world.refused(409, "olga", "POST", path) == "ConflictError"
    with pytest.raises(ConflictError, match="adult@1 ended"):
        world.lease(run)


def test_a_request_for_a_day_lives_a_day(world: World) -> None:
    request = world.missing(world.ask("olga", "PUT", BUDGET, {"epsilon": 20.0, "delta": 1e-4}))
    assert request["expires"] - world.clock() == pytest.approx(DEFAULT_LIFETIME_S, abs=60)
