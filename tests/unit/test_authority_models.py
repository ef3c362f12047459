"""Somebody tries to bring a model into production, or out of the house, that nobody released."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import select

from authority_world import AUDIT, EPSILON, HISTOGRAM, Person, World, receiver
from cloister.canonical import b64, canonical_json, unb64
from cloister.models.release import APPROVAL_LIFETIME_S
from cloister.privacy import accounting
from cloister.sealing.stream import open_sealed
from cloister.signing import keys
from cloister.stores.tables import approvals


def register(world: World, run: str, body: dict[str, Any]) -> Any:
    return world.ask(run, "POST", f"/v1/runs/{run}/model", body)


def trained(world: World) -> tuple[str, dict[str, Any]]:
    """A run whose steps are all committed, and the body that registers its model."""
    run = world.submit()
    lease = world.lease(run)
    world.commit(run)
    return run, world.model_body(run, lease)


# ---- registering ----


def test_a_model_with_steps_left_is_not_registered(world: World) -> None:
    run = world.submit()
    lease = world.lease(run)
    for steps in (None, 9):
        if steps:
            world.commit(run, 0, steps)
        body = world.model_body(run, lease)
        with world.still():
            assert register(world, run, body).status_code == 409


def test_a_run_registers_one_model(world: World) -> None:
    run, body = trained(world)
    with world.recorded(run, "run:work"):
        assert register(world, run, body).json()["model"] == "adult@1"
    with world.still():
        assert register(world, run, body).status_code == 409


@pytest.mark.parametrize(
    "facts",
    [{"run": "run-other"}, {"dataset": "adult@2"}, {"dataset": "other@1"}, {"name": "income"}, {"name": "../x"},
     {"label": "sex"}],
)  # fmt: skip
def test_a_manifest_about_something_else_is_refused(world: World, facts: dict[str, Any]) -> None:
    run = world.submit()
    lease = world.lease(run)
    world.commit(run)
    body = world.model_body(run, lease, **facts)
    with world.still():
        assert register(world, run, body).status_code == 400


ELSEWHERE: list[Any] = [
    {"blob": "models/run-other/model.onnx.sealed"},
    {"blob": "datasets/adult/x"},
    {"blob": "models/RUN/../../keys/root.key"},
    {"blob": "/etc/passwd"},
    {"blob": "models/RUNx/y"},
    {"blob": ""},
    {"metrics": {"accuracy": 1.0}},
    {"holdout_accuracy": 0.5},
    {"evaluation": []},
    {"evaluation": "high"},
    {"evaluation": [[[3], [1]]]},
    {"evaluation": [[[3], [1]], [[1]]]},
    {"evaluation": [[[3, 0], [1, 0]], [[1, 0], [1, 0]]]},
    {"evaluation": [[[3], [1]], [[1], [0.5]]]},
    {"evaluation": [[[3], [1]], [[1], [True]]]},
    {"evaluation": [[[3], [1]], [[1], [2**53 + 1]]]},
    {"model_sha256": "0" * 63},
    {"model_sha256": "Z" * 64},
    {"model_sha256": "sha256:" + "0" * 64},
    {"blob_sha256": "x" * 64},
    {"manifest": "***"},
    {"manifest": b64(b"{}")},
    {"manifest": b64(b"\xff")},
    {"stage": "production"},
]


def test_a_registration_that_points_elsewhere_is_refused(world: World) -> None:
    run, body = trained(world)
    for changes in ELSEWHERE:
        before = world.content()
        changes = {name: value.replace("RUN", run) if name == "blob" else value for name, value in changes.items()}
        assert register(world, run, body | changes).status_code == 400
        assert world.content() == before


def changed(part: str, **changes: Any) -> dict[str, Any]:
    return AUDIT | {part: AUDIT[part] | changes}


NONSENSE: list[Any] = [
    None, {}, {"mechanism": AUDIT["mechanism"]}, AUDIT | {"verdict": "not falsified"},
    changed("one_run", guesses=201), changed("one_run", correct=101), changed("one_run", correct=-1),
    changed("mechanism", epsilon_lower_bound=-1.0), changed("mechanism", epsilon_lower_bound="low"),
    changed("mechanism", sample_rate_at_least=1.1), changed("mechanism", poisson=1),
    changed("mechanism", confidence=1.0), changed("mechanism", epsilon_theory=9.0),
]  # fmt: skip


def test_an_audit_that_makes_no_sense_is_refused(world: World) -> None:
    run, body = trained(world)
    for audit in NONSENSE:
        before = world.content()
        assert register(world, run, body | {"audit": audit}).status_code == 400
        assert world.content() == before
    assert register(world, run, {name: value for name, value in body.items() if name != "audit"}).status_code == 400


@pytest.mark.parametrize(
    "seen",
    [
        changed("mechanism", epsilon_lower_bound=EPSILON + 0.01),
        changed("mechanism", poisson=False),
        changed("one_run", canaries=2000, guesses=1000, correct=990),
    ],
    ids=["the steps", "the batches", "the model"],
)
def test_a_run_that_its_audits_falsify_gets_no_model(world: World, seen: dict[str, Any]) -> None:
    run, body = trained(world)
    with world.still():
        refused = register(world, run, body | {"audit": seen})
        assert refused.status_code == 422
        assert "falsify" in refused.json()["error"]
    assert world.get("ed", "/v1/models") == []


def test_the_provenance_tells_both_accountants_what_they_assume_and_both_audits(world: World) -> None:
    run = world.train()
    provenance = world.get("ed", "/v1/models/adult/versions/1")["provenance"]
    privacy = json.loads(unb64(provenance["payload"]))["predicate"]["privacy"]
    plan = world.get("ed", f"/v1/runs/{run}")["plan"]
    mechanism = plan["noise_multiplier"], plan["sample_rate"], plan["steps"], plan["delta"]
    assert privacy["accountants"] == accounting.accounts(*mechanism)
    assert accounting.certified(privacy["accountants"]) <= privacy["epsilon"] <= EPSILON
    assert privacy["epsilon_replacing"] == plan["epsilon_replacing"] > privacy["epsilon"]
    assert all(sentence.endswith(".") for sentence in privacy["assumptions"])
    told = privacy["audit"]
    assert told["verdict"] == "not falsified"
    assert told["mechanism"]["ratio"] == AUDIT["mechanism"]["epsilon_lower_bound"] / plan["epsilon_certified"]
    assert (told["one_run"]["correct"], told["one_run"]["epsilon_lower_bound"]) == (50, 0.0)
    assert told["one_run"]["epsilon_detectable"] > 3.0


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_count_is_a_number(world: World, value: str) -> None:
    run, body = trained(world)
    text = canonical_json(body).replace(b'"evaluation":[[[3]', b'"evaluation":[[[' + value.encode() + b"]")
    assert value.encode() in text
    before = world.content()
    assert world.ask(run, "POST", f"/v1/runs/{run}/model", content=text).status_code == 400
    assert world.content() == before


def test_the_model_key_opens_the_model_of_its_run_only(world: World) -> None:
    run = world.submit()
    lease = world.lease(run)
    assert lease.model_key is not None
    world.commit(run)
    assert register(world, run, world.model_body(run, lease, b"the model")).status_code == 200
    world.release()
    out = world.client("ed").export_model("adult", 1)
    assert out.model_key == lease.model_key
    assert open_sealed(out.model_key, out.model_onnx_sealed, out.seal_context) == b"the model"
    other = world.lease(world.submit())
    assert other.model_key not in (None, out.model_key)


# ---- approving ----


def promotions(world: World) -> list[str]:
    """The ids of all requests to release a model, whatever became of them."""
    with world.authority.core.database.reading() as connection:
        return list(connection.execute(select(approvals.c.id).where(approvals.c.kind == "promotion")).scalars())


def test_promotion_without_approval_is_refused_on_record_and_asks_once(world: World) -> None:
    world.train()
    for _ in range(3):
        with world.recorded("ed", "model:promote", "denied"):
            answer = world.promote()
        assert (answer.status_code, answer.json()["kind"]) == (403, "ApprovalMissingError")
    assert world.promote(name="eve").status_code == 403
    assert len(promotions(world)) == 1
    assert world.get("ed", "/v1/models")[0]["stage"] == "candidate"


def test_the_author_cannot_approve_even_as_a_reviewer(world: World) -> None:
    world.train(author="rob")
    request = world.approval()
    with world.still("denied"):
        assert world.vote("rob", request).status_code == 403
    for name in ("ed", "olga", "carl", "operator", "ada"):
        with world.still("denied"):
            assert world.vote(name, request).status_code == 403
    assert world.promote().status_code == 403


def test_a_vote_is_signed_with_the_voters_own_key(world: World) -> None:
    world.train()
    request = world.approval()
    for key in (world.people["rob"].key, keys.generate_ed25519()):
        with world.still():
            assert world.vote("rita", request, key=key).status_code == 422
    body = world.vote_body("rita", request)
    with world.still():  # somebody else hands in a good vote
        assert world.ask("rob", "POST", f"/v1/approvals/{request['approval']}/votes", body).status_code == 422


@pytest.mark.parametrize(
    "changes",
    [
        {"approval": "apr-00000000"},
        {"person": "rob"},
        {"kind": "training"},
        {"details": {}},
        {"expires": 1},
        {"expires": "later"},
        {"decision": "maybe"},
        {"decision": None},
        {"decision": ["approve"]},
    ],
)
def test_a_vote_about_something_else_is_refused(world: World, changes: dict[str, Any]) -> None:
    world.train()
    request = world.approval()
    with world.still():
        assert world.vote("rita", request, **changes).status_code in (400, 422)


@pytest.mark.parametrize(
    "other", [{"stage": "staging"}, {"model": "adult@2"}, {"provenance": "0" * 64}, {"owner": "olga"}, {"more": 1}]
)
def test_a_vote_for_another_stage_or_provenance_is_refused(world: World, other: dict[str, Any]) -> None:
    world.train()
    request = world.approval()
    with world.still():
        assert world.vote("rita", request, details=request["details"] | other).status_code == 422


def test_a_vote_for_another_model_is_refused(world: World) -> None:
    world.train()
    world.train(model=b"other")
    first, second = world.approval(1), world.approval(2)
    assert first["digest"] != second["digest"]
    stolen = world.vote_body("rita", first)
    with world.still():
        assert world.ask("rita", "POST", f"/v1/approvals/{second['approval']}/votes", stolen).status_code == 422
    assert world.vote("rita", first).status_code == 200
    assert world.promote(2).status_code == 403


def test_an_edited_vote_is_refused(world: World) -> None:
    world.train()
    request = world.approval()
    body = world.vote_body("rita", request, decision="deny")
    payload = unb64(body["envelope"]["payload"]).replace(b'"deny"', b'"approve"')
    body["envelope"]["payload"] = b64(payload)
    with world.still():
        assert world.ask("rita", "POST", f"/v1/approvals/{request['approval']}/votes", body).status_code == 422


def test_one_refusal_outweighs_every_approval(world: World) -> None:
    world.train()
    request = world.approval()
    assert world.vote("rita", request).status_code == 200
    assert world.vote("rob", request, decision="deny").status_code == 200
    with world.still("failure"):
        refused = world.promote()
        assert refused.status_code == 409
        assert "refused" in refused.json()["error"]
    assert world.get("ed", "/v1/models")[0]["stage"] == "refused"


def test_a_refusal_takes_a_model_out_of_production(world: World) -> None:
    world.train()
    request = world.approval()
    world.vote("rita", request)
    world.promote()
    assert world.vote("rob", request, decision="deny").status_code == 200
    assert world.get("ed", "/v1/models")[0]["stage"] == "refused"
    world.refused(403, "ed", "POST", "/v1/models/adult/versions/1/export", receiver())
    assert world.promote().status_code == 409


def test_a_decision_is_final(world: World) -> None:
    world.train()
    request = world.approval()
    with world.recorded("rita", "approval:vote"):
        assert world.vote("rita", request).status_code == 200
    with world.still():
        assert world.vote("rita", request, decision="deny").status_code == 409
    assert world.vote("rob", request, decision="deny").status_code == 200
    for name in ("rita", "rob"):
        with world.still():  # a refusal closes the request
            assert world.vote(name, request).status_code == 404


def test_an_expired_approval_counts_for_nothing(world: World) -> None:
    world.train()
    request = world.approval()
    assert world.vote("rita", request).status_code == 200
    world.clock.offset = APPROVAL_LIFETIME_S + 5
    models, ed = world.authority.models, world.caller("ed")
    with pytest.raises(Exception, match="0 of 1 approvals"):
        models.promote(ed, "adult", 1)
    assert len(promotions(world)) == 2
    assert models.list(ed)[0]["stage"] == "candidate"


def test_after_approval_a_model_goes_into_production_and_the_last_one_leaves(world: World) -> None:
    for version in (1, 2):
        world.train(model=b"v%d" % version)
        request = world.approval(version)
        world.vote("rita", request)
        with world.recorded("ed", "model:promote"):
            assert world.promote(version).json()["approvals"] == ["rita"]
    assert [(m["model"], m["stage"]) for m in world.get("ed", "/v1/models")] == [
        ("adult@1", "superseded"),
        ("adult@2", "production"),
    ]
    with world.still(entries=1):
        assert world.promote(2).status_code == 409


def test_a_superseded_model_can_come_back(world: World) -> None:
    for version in (1, 2):
        world.train(model=b"v%d" % version)
        world.vote("rita", world.approval(version))
        world.promote(version)
    assert world.promote(1).status_code == 200
    assert [m["stage"] for m in world.get("ed", "/v1/models")] == ["production", "superseded"]


# ---- letting out ----


def test_only_a_production_model_is_exported(world: World) -> None:
    world.train()
    path = "/v1/models/adult/versions/1/export"
    with world.still("denied"):
        assert world.refused(403, "ed", "POST", path, receiver())
    world.release()
    with world.still("success"):
        assert "sealed" in world.post("ed", path, receiver())
    for name in ("olga", "rita", "carl", "operator", "ada"):
        with world.still("denied"):
            assert world.refused(403, name, "POST", path, receiver())
    world.train()
    world.release(2)
    with world.still("denied"):  # superseded
        assert world.refused(403, "ed", "POST", path, receiver())
    with world.still():
        assert world.refused(400, "ed", "POST", "/v1/models/adult/versions/2/export", {"public_key": b64(bytes(32))})


def test_what_is_shown_of_a_model_has_no_key(world: World) -> None:
    world.train()
    world.release()
    shown = world.get("rita", "/v1/models/adult/versions/1")
    assert "sealed" not in shown
    assert not any("key" in name for name in shown)
    metrics = shown["metrics"]
    assert (metrics["histogram"], metrics["evaluation_epsilon"]) == (HISTOGRAM, 0.2)
    assert metrics["holdout_accuracy"] == metrics["accuracy"]["value"]
    assert world.budget()["runs"][0]["evaluation_epsilon"] == 0.2, "the ledger has what was told of held-out rows"


def test_two_people_with_one_key_cannot_be_made_into_two_votes(world: World) -> None:
    """The directory refuses the second registration, so one signature never counts for two."""
    body = {"name": "rita2", "roles": ["reviewer"], "public_key": world.people["rita"].public.replace("\n", "\r\n")}
    with world.still():
        world.refused(409, "operator", "POST", "/v1/identities", body)
    body["public_key"] = Person("rita2", []).public
    with world.recorded("operator", "identity:register"):
        world.post("operator", "/v1/identities", body)
