"""What is due ends by itself, whole, whatever ails others; and the keys that no live version needs go with it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

import clinic
from authority_world import World, receiver
from cloister.authority import lifecycle
from cloister.client.erase import verified_certificate
from cloister.errors import ConflictError, UnavailableError
from cloister.stores.tables import datasets


def day_of(world: World, version: int) -> float:
    return float(world.get("olga", f"/v1/datasets/clinic/versions/{version}")["due"])


def test_what_is_due_ends_by_itself_with_all_that_no_live_version_lists(world: World) -> None:
    clinic.seal(world)
    clinic.later(world, 400)
    clinic.append(world, clinic.rows(100, 10))
    clinic.seal(world, clinic.rows(50, 60))  # what is to be kept longer
    kept = {file.ref for file in clinic.manifest(world, 3).files}
    assert day_of(world, 1) == day_of(world, 2) < day_of(world, 3)  # with the first of its files
    assert world.authority.retention.once() == []
    clinic.later(world, 5 * 366 - 400)
    (erasure,) = world.authority.retention.once()
    assert world.authority.retention.once() == []
    assert clinic.states(world) == {"clinic@1": "ended", "clinic@2": "ended", "clinic@3": "live"}
    assert clinic.key_rows(world).keys() == kept
    facts = verified_certificate(world.get("ada", f"/v1/erasures/{erasure}")["certificate"],
                                 world.authority.release_public)  # fmt: skip
    assert (facts.kind, facts.reason, {file.file[0] for file in facts.files}) == ("expire", "retention", {"1", "2"})
    entry = next(each for each in world.log() if each.action == "dataset:expire")
    assert (entry.actor, entry.rule, entry.details["erasure"]) == ("authority", "itself", erasure)
    clinic.later(world, 400)
    assert len(world.authority.retention.once()) == 1
    assert clinic.key_rows(world) == {}
    assert clinic.blob_files(world) == set()


def test_a_dataset_that_cannot_end_keeps_no_other_from_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    clinic.seal(world)
    clinic.seal(world, owner="otto", name="ward")
    with world.authority.core.database.transaction() as connection:
        connection.execute(update(datasets).where(datasets.c.name != "adult").values(due=0.0, files_due=0.0))
        connection.execute(update(datasets).where(datasets.c.name == "clinic").values(manifest={"files": "spoiled"}))
    (erasure,) = world.authority.retention.once()
    assert (clinic.states(world), clinic.states(world, "ward")) == ({"clinic@1": "live"}, {"ward@1": "ended"})
    assert world.get("otto", f"/v1/erasures/{erasure}")["certificate"]
    assert [each.getMessage() for each in caplog.records if "clinic" in each.getMessage()]


def test_what_an_erasure_left_is_done_whatever_ails_retention(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.seal(world)
    with monkeypatch.context() as patched:
        patched.setattr(world.authority.shredding, "settle", _die)
        erasure = clinic.erase_person(world, 7)["erasure"]
    monkeypatch.setattr(world.authority.lifecycle, "expire_due", _die)
    with pytest.raises(UnavailableError):
        world.authority.retention.once()
    assert world.get("ada", f"/v1/erasures/{erasure}")["certificate"]


def test_more_files_than_one_certificate_has_room_for_end_one_version_after_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic.seal(world)
    clinic.seal(world)
    monkeypatch.setattr(lifecycle, "MAX_FILES", len(clinic.manifest(world, 1).files) + 1)
    before, files = world.content(), clinic.blob_files(world)
    with pytest.raises(ConflictError, match="has room for"):
        clinic.erase_person(world, 7)
    assert (world.content(), clinic.blob_files(world)) == (before, files)
    clinic.later(world, 366 * 6)
    assert (len(world.authority.retention.once()), clinic.states(world)["clinic@2"]) == (1, "live")
    assert len(world.authority.retention.once()) == 1
    assert (clinic.key_rows(world), clinic.blob_files(world)) == ({}, set())


def under_one_path(world: World) -> None:
    """A state from before that was refused: the second version's files lie where the first's do."""
    clinic.seal(world)
    clinic.seal(world)
    made, first = clinic.facts(world, 2), {file.key_name: file.path for file in clinic.manifest(world, 1).files}
    for file in made["files"]:
        file["path"] = first[f"{file['shard']}/{file['part']}"]
    with world.authority.core.database.transaction() as connection:
        mine = (datasets.c.name == "clinic") & (datasets.c.version == 2)
        connection.execute(update(datasets).where(mine).values(manifest=made))


def test_a_file_is_deleted_once_and_its_key_goes_whatever_lies_under_its_path(world: World) -> None:
    under_one_path(world)
    first = {file.ref: world.directory / "blobs" / file.path for file in clinic.manifest(world, 1).files}
    done = world.post("olga", "/v1/datasets/clinic/endings", {"version": 3, "ends": sorted(first), "reason": "request"})
    facts = verified_certificate(done["certificate"], world.authority.release_public)
    assert (facts.keys.data_keys, facts.blobs.deleted) == (len(first), 0)
    assert {ref[0] for ref in clinic.key_rows(world)} == {"2"}
    assert all(path.exists() for path in first.values())  # the live version has them


def test_two_versions_under_one_path_are_due_together(world: World) -> None:
    under_one_path(world)
    clinic.later(world, 366 * 6)
    assert len(world.authority.retention.once()) == 1
    assert clinic.key_rows(world) == {}
    assert world.counts()["deletions"] == 0


def test_sealing_again_makes_rows_no_younger(world: World) -> None:
    clinic.seal(world)
    clinic.later(world, 400)
    clinic.rectify_person(world, 7, age="77")
    clinic.erase_person(world, 8)
    assert day_of(world, 3) == day_of(world, 2) == day_of(world, 1)
    assert len({day for (day,) in files_due(world)}) == 1


def files_due(world: World) -> list[Any]:
    with world.authority.core.database.reading() as connection:
        return list(connection.execute(select(datasets.c.files_due).where(datasets.c.name == "clinic")).all())


def test_before_its_time_a_version_expires_with_two_approvals_only(world: World) -> None:
    world.register("sam", ["security-officer"])
    clinic.seal(world)
    clinic.append(world, clinic.rows(100, 10))
    path, early = "/v1/datasets/clinic/versions/1/expiry", {"early": True}
    assert world.refused(409, "olga", "POST", path, {}) == "ConflictError"
    request = world.missing(world.ask("olga", "POST", path, early))
    assert request["required"] == 2
    for officer in ("sofia", "sam"):
        assert world.refused(403, "olga", "POST", path, early) == "ApprovalMissingError"
        assert world.vote(officer, request).status_code == 200
    keys = clinic.key_rows(world).keys()
    done = world.post("olga", path, early)
    assert (done["ended"], done["keys_destroyed"]) == (["clinic@1"], 0)  # the next one lists its files
    assert clinic.key_rows(world).keys() == keys
    assert clinic.states(world) == {"clinic@1": "ended", "clinic@2": "live"}


def test_after_its_time_a_version_expires_at_its_owners_word(world: World) -> None:
    clinic.seal(world)
    clinic.later(world, 5 * 366)
    done = world.post("olga", "/v1/datasets/clinic/versions/1/expiry", {})
    assert (done["ended"], clinic.key_rows(world)) == (["clinic@1"], {})


def test_destroying_keys_ends_every_version_that_lists_the_files(world: World) -> None:
    world.register("sam", ["security-officer"])
    clinic.seal(world)
    clinic.append(world, clinic.rows(100, 10))
    path = "/v1/datasets/clinic/versions/1/key-destruction"
    request = world.missing(world.ask("olga", "POST", path))
    assert request["details"]["ends"] == ["clinic@1", "clinic@2"]
    for officer in ("sofia", "sam"):
        assert world.vote(officer, request).status_code == 200
    done = world.post("olga", path)
    facts = verified_certificate(done["certificate"], world.authority.release_public)
    assert (facts.kind, facts.keys.data_keys) == ("key-destruction", done["keys_destroyed"])
    assert clinic.key_rows(world) == {}  # of what was appended too: no command would reach it
    assert clinic.blob_files(world) == set()
    assert set(clinic.states(world).values()) == {"ended"}
    body = receiver() | {"purpose": "erase", "files": ["2/train-003/index"]}
    for name, status in (("olga", 404), ("otto", 403), ("ed", 403)):
        assert world.ask(name, "POST", "/v1/datasets/clinic/openings", body).status_code == status


def _die() -> None:
    raise UnavailableError("the key service is on fire")
