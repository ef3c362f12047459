"""Versions follow one another, end, and leave a certificate; what is gone does not come back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

import clinic
from authority_world import CODE, World, lease_body, receiver, training_spec
from cloister.authority import accountant
from cloister.authority.costs import for_rows
from cloister.authority.key_use import key_context
from cloister.canonical import b64, unb64
from cloister.cli.lifecycle import _subjects
from cloister.client.erase import erase, verified_certificate
from cloister.datasets.erasure import sentences
from cloister.errors import ConflictError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.signing.keys import public_to_pem
from cloister.stores.tables import data_keys, datasets, erasures, runs


def test_appending_shares_what_is_there_and_seals_only_what_is_new(world: World) -> None:
    clinic.seal(world)
    before = clinic.key_rows(world)
    clinic.append(world, clinic.rows(100, 10))
    first, second = clinic.manifest(world, 1), clinic.manifest(world, 2)
    assert second.files[: len(first.files)] == first.files
    assert {file.sealed_in for file in second.files[len(first.files) :]} == {2}
    assert before.items() <= clinic.key_rows(world).items()
    assert clinic.ages(world, 2)[-20:] == sorted([*range(100, 110)] * 2)
    lineage = world.get("olga", "/v1/datasets/clinic/versions/2")["lineage"]
    assert [(each["kind"], each["parents"], each["rows"]) for each in lineage] == [
        ("seal", [], 60), ("append", ["clinic@1"], 80),
    ]  # fmt: skip


def test_an_erased_person_is_in_no_live_version_and_the_rest_is_untouched(world: World) -> None:
    clinic.seal(world)
    clinic.append(world, clinic.rows(100, 10))
    everybody, keys, files = clinic.ages(world, 2), clinic.key_rows(world), clinic.blob_files(world)
    done = clinic.erase_person(world, 7)
    assert (done["dataset"], done["rows"], done["subjects_found"]) == ("clinic@3", 2, 1)
    assert clinic.states(world) == {"clinic@1": "ended", "clinic@2": "ended", "clinic@3": "live"}
    assert clinic.ages(world, 3) == [age for age in everybody if age != 7]
    before, after = clinic.manifest(world, 2), clinic.manifest(world, 3)
    kept = {file.ref for file in before.files} & {file.ref for file in after.files}
    replaced = {file.ref for file in before.files} - kept
    assert {file.shard for file in before.files if file.ref in replaced} == {
        file.shard for file in after.files if file.sealed_in == 3
    }
    assert 0 < len(replaced) < len(before.files)
    assert clinic.key_rows(world).keys() == {file.ref for file in after.files}
    assert not set(clinic.key_rows(world).values()) & set(keys.values())  # wrapped anew: old backups are noise
    assert len(files - clinic.blob_files(world)) == len(replaced)


def test_the_certificate_says_what_is_gone_and_names_nobody(world: World) -> None:
    clinic.seal(world)
    ended = clinic.manifest(world, 1)
    done = clinic.erase_person(world, 7)
    facts = verified_certificate(done["certificate"], world.authority.release_public)
    replaced = {file.ref: file.check()["check"] for file in ended.files}
    assert {file.file: file.check for file in facts.files}.items() <= replaced.items()
    assert [(each.version, each.rows, each.removed) for each in facts.ended] == [("clinic@1", 60, None)]
    assert {(each.rows, each.sha256) for each in facts.files} == {(None, None)}, "with digests, counts can be tried"
    assert (facts.keys.data_keys, facts.blobs.deleted, facts.blobs.pending) == (len(facts.files), len(facts.files), 0)
    said = " ".join(sentences(facts))
    assert "clinic@2" in said
    assert "clinic@1" in said
    everything = json.dumps(done["certificate"]) + unb64(done["certificate"]["payload"]).decode() + said
    log = b"".join(world.entries()).decode()
    with world.authority.core.database.reading() as connection:
        facts_row = json.dumps([dict(r._mapping) for r in connection.execute(select(erasures)).all()], default=str)
    for text in (everything, log, facts_row):
        assert clinic.person(7) not in text
    assert world.get("ada", f"/v1/erasures/{facts.id}")["certificate"] == done["certificate"]


def test_an_edited_certificate_is_refused(world: World) -> None:
    clinic.seal(world)
    envelope = clinic.erase_person(world, 7)["certificate"]
    payload = unb64(envelope["payload"])
    for changed in (payload.replace(b'"rows":60', b'"rows":90'), payload[:-2] + b"}}"):
        with pytest.raises(IntegrityError):
            verified_certificate(envelope | {"payload": b64(changed)}, world.authority.release_public)
    other = world.authority.core._service.signer("other").public_key()
    with pytest.raises(IntegrityError):
        verified_certificate(envelope, public_to_pem(other))


def test_a_person_who_is_nowhere_changes_nothing(world: World) -> None:
    clinic.seal(world)
    before, files = world.content(), clinic.blob_files(world)
    with pytest.raises(NotFoundError, match="no live version"):
        clinic.erase_person(world, 999)
    assert (world.content(), clinic.blob_files(world)) == (before, files)


def test_a_person_in_an_older_version_alone_is_erased_without_a_new_one(world: World) -> None:
    clinic.seal(world)
    clinic.seal(world, clinic.rows(50, 60))
    done = clinic.erase_person(world, 7)
    assert done["dataset"] is None
    assert clinic.states(world) == {"clinic@1": "ended", "clinic@2": "live"}
    assert {ref[0] for ref in clinic.key_rows(world)} == {"2"}
    assert [each["removed"] for each in done["facts"]["ended"]] == [None]


def test_correcting_changes_those_values_and_nothing_else(world: World) -> None:
    clinic.seal(world)
    before = clinic.open_all(world, 1).sort_by("patient").to_pylist()
    done = clinic.rectify_person(world, 7, age="77", city="kiel")
    after = clinic.open_all(world, 2).sort_by("patient").to_pylist()
    assert done["facts"]["kind"] == "rectify"
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [(a["age"], b["age"], a["city"], b["city"]) for a, b in changed] == [(7, 77, 0, 1)] * 2
    assert all(a["patient"] == b["patient"] for a, b in changed)
    assert clinic.states(world) == {"clinic@1": "ended", "clinic@2": "live"}


def test_a_correction_that_the_schema_does_not_allow_is_refused(world: World) -> None:
    clinic.seal(world)
    before, files = world.content(), clinic.blob_files(world)
    for changes in ({"age": "500"}, {"city": "rome"}, {"age": "x"}, {"patient": "q"}, {"nope": "1"}, {}):
        with pytest.raises(InputError) as refused:
            clinic.rectify_person(world, 7, **changes)
        assert not any(value in str(refused.value) for value in changes.values() if len(value) > 1)
    assert (world.content(), clinic.blob_files(world)) == (before, files)


# ---- models


def run_on(world: World, version: int = 1) -> str:
    spec = {"dataset": f"clinic@{version}", "label": "ill", "name": "clinic"}
    return world.submit(**spec, training={"epochs": 2, "expected_batch_size": 16, "learning_rate": 0.01})


def trained_on(world: World, version: int = 1) -> str:
    """A candidate that learned from that version; its run."""
    run = run_on(world, version)
    lease = world.lease(run)
    world.commit(run, 0, int(lease.plan["steps"]))
    register(world, run, lease, version)
    return run


def register(world: World, run: str, lease: Any, version: int = 1) -> None:
    facts = {"name": "clinic", "dataset": f"clinic@{version}", "label": "ill", "labels": ("no", "yes")}
    world.post(run, f"/v1/runs/{run}/model", world.model_body(run, lease, **facts))


@pytest.fixture
def by_row(world: World) -> World:
    """The clinic with rows as the unit of privacy, and a budget."""
    clinic.seal(world, unit="row")
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 50.0, "delta": 1e-3})
    return world


def test_every_model_that_learned_from_it_is_flagged_and_its_bound_is_stated(by_row: World) -> None:
    world = by_row
    run = trained_on(world)
    open_run, leased = run_on(world), run_on(world)
    lease = world.lease(leased)
    world.commit(leased, 0, int(lease.plan["steps"]))
    world.attempt(open_run)
    done = clinic.erase_person(world, 7)
    (model,) = done["facts"]["models"]
    unit, subject = model["unit"], model["subject"]
    assert (model["model"], model["run"], unit["rows"], subject["rows"]) == ("clinic@1", run, 1, 2)
    assert subject["delta"] == unit["delta"]
    with world.authority.core.database.reading() as connection:
        found = connection.execute(select(runs).where(runs.c.id == run)).one()
    assert (subject["epsilon"], subject["delta"]) in [for_rows(found, 2 - held_out, held_out) for held_out in range(3)]
    assert set(done["facts"]["stopped_runs"]) == {open_run, leased}
    assert "clinic@1 has learned from them" in " ".join(
        sentences(verified_certificate(done["certificate"], world.authority.release_public))
    )
    erasure = done["erasure"]
    assert world.get("ed", "/v1/models/clinic/versions/1")["flags"] == [erasure]
    lineage = world.get("olga", "/v1/datasets/clinic/versions/1")["lineage"]
    assert lineage[0]["runs"][0]["flags"] == [erasure]
    # Nobody takes a key or a step any more, and what had been trained to its end is flagged when it is registered.
    for rank in (0, 1):
        answer = world.ask(open_run, "POST", f"/v1/runs/{open_run}/leases", lease_body(rank))
        assert (answer.status_code, answer.json()["kind"]) == (409, "ConflictError")
        assert "clinic@2 is live" in answer.json()["error"]
        assert erasure in answer.json()["hint"]
    block = {"attempt": 1, "first": 0, "last": 1}
    assert world.refused(409, open_run, "POST", f"/v1/runs/{open_run}/blocks", block) == "ConflictError"
    register(world, leased, lease)
    assert world.get("ed", "/v1/models/clinic/versions/2")["flags"] == [erasure]


def test_what_a_certificate_says_of_models_is_accounted_for_before_the_transaction(
    by_row: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on(by_row)
    turn, within = by_row.authority.core.database._turn, []
    original = accountant.shared._computed

    def watched(name: str, arguments: tuple[float, ...]) -> Any:
        within.append((name, turn.locked()))
        return original(name, arguments)

    monkeypatch.setattr(accountant.shared, "_remembered", {})
    monkeypatch.setattr(accountant.shared, "_computed", watched)
    clinic.erase_person(by_row, 6, 7, 8, 9)  # of their eight rows some were trained on
    assert within == [("prv_of_unit", False)]


def test_a_later_erasure_flags_what_learned_from_earlier_versions_of_the_shard(by_row: World) -> None:
    world = by_row
    trained_on(world)
    first = clinic.erase_person(world, 7)
    shards = {f["file"].split("/")[1] for f in first["facts"]["files"]}
    second = None
    for number in range(20, 30):  # somebody in a shard that was sealed again
        second = clinic.erase_person(world, number)
        if {f["file"].split("/")[1] for f in second["facts"]["files"]} & shards:
            break
    assert second is not None
    assert [each["model"] for each in second["facts"]["models"]] == ["clinic@1"]
    assert second["erasure"] in world.get("ed", "/v1/models/clinic/versions/1")["flags"]


def test_an_approval_given_before_the_flag_promotes_nothing(by_row: World) -> None:
    world = by_row
    trained_on(world)
    path = "/v1/models/clinic/versions/1/promotion"
    before = world.missing(world.ask("ed", "POST", path))
    assert world.vote("rita", before).status_code == 200
    erasure = clinic.erase_person(world, 7)["erasure"]
    after = world.missing(world.ask("ed", "POST", path))
    assert after["approval"] != before["approval"]
    assert after["details"]["flags"] == [erasure]
    assert world.vote("rita", after).status_code == 200
    assert world.ask("ed", "POST", path).status_code == 200


def test_what_learned_on_a_side_branch_is_flagged_though_it_had_ended(by_row: World) -> None:
    world = by_row
    clinic.append(world, clinic.rows(100, 10), unit="row")
    trained_on(world, 2)
    first = expired_early(world, 2)
    assert first["ended"] == ["clinic@2"]
    done = clinic.erase_person(world, 7)
    assert [each["version"] for each in done["facts"]["ended"]] == ["clinic@1"]
    assert [each["model"] for each in done["facts"]["models"]] == ["clinic@1"]
    assert done["facts"]["together"]["runs"] == 1
    assert world.get("ed", "/v1/models/clinic/versions/1")["flags"] == [first["erasure"], done["erasure"]]


def expired_early(world: World, version: int) -> dict[str, Any]:
    world.register("sam", ["security-officer"])
    path, early = f"/v1/datasets/clinic/versions/{version}/expiry", {"early": True}
    request = world.missing(world.ask("olga", "POST", path, early))
    for officer in ("sofia", "sam"):
        assert world.vote(officer, request).status_code == 200
    return dict(world.post("olga", path, early))


def test_a_model_learns_nothing_from_a_shard_that_has_only_the_name(by_row: World) -> None:
    world = by_row
    clinic.append(world, clinic.rows(100, 10), unit="row")  # train-002 and on, of which @3 has others
    trained_on(world, 2)
    expired_early(world, 2)
    clinic.append(world, clinic.rows(110, 10), unit="row")
    assert {file.shard for file in clinic.manifest(world, 2).files} == {
        f.shard for f in clinic.manifest(world, 3).files
    }
    assert clinic.erase_person(world, 115)["facts"]["models"] == []


def test_where_nobody_knows_how_many_rows_a_model_saw_no_bound_is_stated(world: World) -> None:
    more = "".join(f"{clinic.person(7)},7,kiel,no\n" for _ in range(20)).encode()
    clinic.seal(world, clinic.rows() + more, unit="row")  # 22 rows of one person
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 50.0, "delta": 1e-3})
    trained_on(world)
    clinic.seal(world, clinic.rows(each=1), unit="row")
    done = clinic.erase_person(world, 7)
    assert [(each["version"], each["removed"]) for each in done["facts"]["ended"]] == [
        ("clinic@1", None),
        ("clinic@2", None),
    ]
    (model,) = done["facts"]["models"]
    assert (model["subject"], model["advice"]) == (None, "retrain")
    assert "is not known" in " ".join(
        sentences(verified_certificate(done["certificate"], world.authority.release_public))
    )


def test_what_was_derived_from_it_is_named_while_it_lives(world: World) -> None:
    clinic.seal(world)
    clinic.seal(world, name="study", derived_from=("clinic@1",))
    clinic.seal(world, name="paper", derived_from=("study@1",))
    clinic.seal(world, name="other")
    done = clinic.erase_person(world, 7)
    assert done["facts"]["derived"] == ["paper@1", "study@1"]
    said = sentences(verified_certificate(done["certificate"], world.authority.release_public))
    assert any("study@1 was made from it" in each for each in said)
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(datasets).where(datasets.c.name == "study").values(due=0.0, files_due=0.0))
    world.authority.retention.once()
    with pytest.raises(ConflictError, match="ended"):  # or what comes of it could never be named
        clinic.seal(world, derived_from=("study@1",))
    clinic.seal(world)
    assert clinic.erase_person(world, 8)["facts"]["derived"] == ["paper@1"]


# ---- who is meant


def test_a_person_is_one_however_their_name_was_typed(world: World) -> None:
    composed, decomposed = "Zo\u00eb", "Zoe\u0308"
    extra = [f"{name},5,bonn,no\n" for name in [composed, decomposed] * 2]
    clinic.seal(world, clinic.rows() + "".join(extra).encode())
    with pytest.raises(InputError, match="a unit has 5 rows"):
        clinic.seal(world, clinic.rows() + "".join([*extra, extra[0]]).encode())
    assert erase(clinic.owner(world), "clinic", [decomposed])["rows"] == 4
    assert 5 not in [age for age in clinic.ages(world, 2) if age == 5][2:]  # only patient number 5 is left


def test_a_version_that_cannot_hold_somebody_keeps_nobody_from_being_erased(world: World) -> None:
    columns = clinic.SCHEMA["columns"]
    clinic.seal(world, clinic.rows())
    numbered = [{"name": "patient", "type": "integer", "class": "confidential", "bounds": [0, 99], "role": "unit"}]
    rows = "".join(f"{n},{n},kiel,no\n" for n in range(30) for _ in range(2))
    clinic.seal(world, f"patient,age,city,ill\n{rows}".encode(), columns=numbered + columns[1:])
    done = clinic.erase_person(world, 7)
    assert (done["dataset"], done["rows"], clinic.states(world)["clinic@1"]) == (None, 2, "ended")
    with pytest.raises(InputError, match="holds integers"):
        clinic.erase_person(world, 8)
    assert erase(clinic.owner(world), "clinic", ["9"])["rows"] == 2


def test_a_file_of_subjects_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "who.txt"
    path.write_bytes("\ufeffAda\r\nGrace\u2028Hopper\n\n Zo\u00eb \n".encode())
    assert [each.strip() for each in _subjects(None, path)] == ["Ada", "Grace\u2028Hopper", "Zo\u00eb"]


def test_rows_that_come_while_somebody_is_being_erased_are_not_passed_over(world: World) -> None:
    clinic.seal(world)
    clinic.seal(world, clinic.rows(50, 60))
    client = world.client("olga")
    post = client.post

    def racing(path: str, body: Any = None, **options: Any) -> Any:
        if path.endswith("/endings"):
            clinic.append(world, clinic.rows(7, 20))
        return post(path, body, **options)

    object.__setattr__(client, "post", racing)
    with pytest.raises(ConflictError, match="was not searched"):
        erase(replace(clinic.owner(world), client=client), "clinic", [clinic.person(7)])
    assert clinic.states(world) == {"clinic@1": "live", "clinic@2": "live", "clinic@3": "live"}
    assert clinic.erase_person(world, 7)["rows"] == 4


# ---- versions that have ended


def test_an_ended_version_is_no_ground_for_anything_new(by_row: World) -> None:
    world = by_row
    clinic.erase_person(world, 7)
    spec = training_spec(dataset="clinic@1", label="ill", name="clinic")
    code = {"code_digest": CODE, "public_key": world.people["carl"].public}
    for name, path, body in (
        ("ed", "/v1/plans", {"spec": spec}),
        ("ed", "/v1/runs", {"spec": spec} | code),
        ("olga", "/v1/datasets/clinic/versions/1/expiry", {"early": True}),
    ):
        assert world.refused(409, name, "POST", path, body) == "ConflictError"


# ---- what happens when something dies, and when an old backup comes back


def test_a_crash_after_the_commit_is_made_good(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.seal(world)
    files = clinic.blob_files(world)
    monkeypatch.setattr(world.authority.shredding, "settle", _die)
    done = clinic.erase_person(world, 7)
    assert done["certificate"] is None
    assert files < clinic.blob_files(world)
    world.reopen()
    world.authority.retention.once()
    certificate = world.get("ada", f"/v1/erasures/{done['erasure']}")["certificate"]
    facts = verified_certificate(certificate, world.authority.release_public)
    assert facts.blobs.pending == 0
    assert len(files - clinic.blob_files(world)) == facts.blobs.deleted > 0
    assert world.counts()["deletions"] == 0


def _die() -> None:
    raise UnavailableError("the key service is on fire")


def test_a_blob_that_cannot_be_deleted_is_said_and_deleted_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.seal(world)
    store = world.authority.stores.for_region("eu")
    monkeypatch.setattr(store, "remove", lambda _path: _die())
    facts = verified_certificate(clinic.erase_person(world, 7)["certificate"], world.authority.release_public)
    assert (facts.blobs.deleted, facts.blobs.pending) == (0, len(facts.files))
    assert world.counts()["deletions"] == len(facts.files)
    monkeypatch.undo()
    world.authority.retention.once()
    assert world.counts()["deletions"] == 0
    assert len(clinic.blob_files(world)) == len(clinic.manifest(world, 2).files)


def test_an_old_backup_does_not_bring_the_rows_back(world: World) -> None:
    clinic.seal(world)
    old_keys, sealed = clinic.key_rows(world), {path: path.read_bytes() for path in clinic.blob_files(world)}
    adult = world.get("olga", "/v1/datasets/adult/versions/1")["rows"]
    clinic.erase_person(world, 7)
    with world.authority.core.database.transaction() as connection:  # the state as it was: every wrapped key of before
        connection.execute(data_keys.delete().where(data_keys.c.name == "clinic"))
        connection.execute(data_keys.insert(), [
            {"name": "clinic", "version": int(ref.split("/", 1)[0]), "file": ref.split("/", 1)[1], "wrapped": wrapped}
            for ref, wrapped in old_keys.items()
        ])  # fmt: skip
        connection.execute(datasets.delete().where(datasets.c.name == "clinic", datasets.c.version == 2))
        mine = (datasets.c.name == "clinic") & (datasets.c.version == 1)
        connection.execute(datasets.update().where(mine).values(ended=None, erasure=None))
    for path, data in sealed.items():
        path.write_bytes(data)
    body = receiver() | {"purpose": "erase", "files": sorted(old_keys)}
    assert world.refused(422, "olga", "POST", "/v1/datasets/clinic/openings", body) == "IntegrityError"
    wrapped = [(wrapped, key_context("clinic", int(ref.split("/", 1)[0]), ref.split("/", 1)[1]))
               for ref, wrapped in old_keys.items()]  # fmt: skip
    for each in wrapped:
        with pytest.raises(IntegrityError):
            world.authority._key_service.unwrap("dataset/clinic", [each])
    assert world.get("olga", "/v1/datasets/adult/versions/1")["rows"] == adult
    world.lease(world.submit())  # other datasets open as before
