"""What `fsck` finds and repairs: each kind of damage by its name, and nothing where nothing is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update

from authority_world import World
from cloister.authority import fsck
from cloister.authority.fsck import Report
from cloister.authority.key_use import dataset_key
from cloister.authority.maintenance import Parts
from cloister.errors import PermissionDeniedError
from cloister.process import since_boot
from cloister.stores.blobs import Stores
from cloister.stores.keys import EmbeddedKeys
from cloister.stores.tables import data_keys, datasets, deletions, erasures, log_entries, models

HOURS_S = 2 * 3600
DAY_S = 24 * 3600


def parts_of(world: World) -> Parts:
    here = world.directory
    return Parts.of(here, EmbeddedKeys(here / "keys"), Stores({}, here / "blobs"), clock=world.clock)


def look(world: World, **options: Any) -> Report:
    return fsck.check(parts_of(world), world.authority.core.database, world.caller("operator"), **options)


def mend(world: World, report: Report) -> None:
    fsck.repair(parts_of(world), world.authority.core.database, world.caller("operator"), report)


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """So long after now, by the clock that nobody sets."""
    boot, now = since_boot()
    monkeypatch.setattr(fsck, "since_boot", lambda: (boot, now + seconds))


def blob(world: World, name: str = "train-000.confidential") -> Path:
    return next((world.directory / "blobs").rglob(f"{name}*"))


def change(world: World, statement: Any) -> None:
    with world.place.raw() as connection:
        connection.execute(statement)


@pytest.fixture(scope="session")
def trained_template(sealed_template: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = sealed_template.copy(tmp_path_factory.mktemp("trained") / "authority")
    world.train()
    world.authority.close()
    return world


@pytest.fixture
def trained(trained_template: World, tmp_path: Path) -> Any:
    world = trained_template.copy(tmp_path / "authority")
    yield world
    world.close()


def test_nothing_is_wrong_where_nothing_is(trained: World) -> None:
    with trained.recorded("operator", "state:check"):
        report = look(trained)
    assert report.findings == []
    assert report.clean
    assert report.checked["log entries"] > 20
    assert report.checked["data keys"] == report.checked["files"] - 1 > 3
    assert (report.checked["models"], report.checked["model keys"], report.checked["dataset versions"]) == (1, 2, 1)


def test_only_operators_look(trained: World) -> None:
    for name in ("olga", "ada", "sofia", "ed"):
        with pytest.raises(PermissionDeniedError):
            fsck.check(parts_of(trained), trained.authority.core.database, trained.caller(name))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)


def move_key(world: World) -> None:
    """The wrapped key of one file in the row of another."""
    with world.place.raw() as connection:
        one, other = connection.execute(select(data_keys).order_by(data_keys.c.file).limit(2)).all()
        mine = data_keys.c.file == one.file
        connection.execute(update(data_keys).where(mine).values(wrapped=other.wrapped))


def edit_manifest(world: World) -> None:
    with world.place.raw() as connection:
        manifest = connection.execute(select(datasets.c.manifest)).scalar_one()
        manifest["files"][0]["rows"] += 1
        connection.execute(update(datasets).values(manifest=manifest))


def destroy_versions(world: World) -> None:
    service = EmbeddedKeys(world.directory / "keys")
    service.destroy_below(dataset_key("adult"), service.rotate(dataset_key("adult")))


DAMAGE: dict[str, tuple[Callable[[World], Any], str]] = {
    "a changed file": (lambda world: flip(blob(world)), "train-000/confidential .*not the one that was sealed"),
    "a missing file": (lambda world: blob(world).unlink(), "train-000/confidential .*missing"),
    "a changed model": (lambda world: flip(blob(world, "*.onnx.sealed")), "model adult@1 .*not the one"),
    "a moved key": (move_key, "key does not open"),
    "a destroyed key": (destroy_versions, "destroyed"),
    "a missing key": (
        lambda world: change(world, delete(data_keys).where(data_keys.c.file == "train-000/confidential")),
        "adult@1 .*keys of 1 files are gone, such as 1/train-000/confidential",
    ),
    "a key of no version": (
        lambda world: change(
            world, insert(data_keys).values(name="adult", version=1, file="train-999/public", wrapped=bytes(65))
        ),
        "belongs to no version",
    ),
    "an edited manifest": (edit_manifest, "adult@1 .*manifest"),
    "another owner's key": (
        lambda world: change(world, update(datasets).values(owner_key=world.people["otto"].public)), "adult@1",
    ),
    "an edited model": (lambda world: change(world, update(models).values(manifest=b"{}")), "model adult@1"),
    "another digest": (lambda world: change(world, update(models).values(root_digest="0" * 64)), "model adult@1"),
    "a model's key": (lambda world: change(world, update(models).values(model_key=bytes(65))), "model adult@1"),
    "a cut log": (
        lambda world: change(world, text("DELETE FROM log_entries WHERE \"index\" = 3")), "log",
    ),
    "a changed log": (
        lambda world: change(world, update(log_entries).where(log_entries.c["index"] == 3).values(entry=b"{}")), "log",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_repair_does_not_hide_it(damage: str, trained: World) -> None:
    harm, said = DAMAGE[damage]
    harm(trained)
    report = look(trained)
    found = [f"{finding.subject} {finding.problem}" for finding in report.findings if finding.kind == "broken"]
    import re

    assert any(re.search(said, line) for line in found), found
    assert not report.clean
    if "log" not in damage:
        mend(trained, report)
        assert not look(trained).clean


def test_an_older_state_is_named(trained: World) -> None:
    service = EmbeddedKeys(trained.directory / "keys")
    service.remember(10_000, "00" * 32)
    (finding,) = look(trained).findings
    assert (finding.kind, finding.subject) == ("broken", "log")
    assert "older" in finding.problem


def test_quick_reads_no_file(trained: World) -> None:
    flip(blob(trained))
    assert look(trained, quick=True).clean
    blob(trained).unlink()
    assert not look(trained, quick=True).clean


def test_what_is_left_over_is_removed_once_it_has_lain_for_an_hour(
    trained: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = trained.directory / "blobs"
    (store / "datasets/adult/0123").mkdir()
    left = [store / "datasets/adult/0123/train-000.public.parquet", store / "models/.half.0123456789abcdef",
            trained.directory / ".settings.json.0123456789abcdef"]  # fmt: skip
    for file in left:
        file.write_bytes(b"ciphertext")
    for file in left[:2]:
        os.utime(file, (0, 0))  # its own time says nothing
    report = look(trained)
    assert report.clean, "a seal may be under way"
    assert "look again in an hour" in report.findings[-1].problem
    report = look(trained, young=True)
    assert sorted(finding.kind for finding in report.findings) == ["repairable", "repairable"]
    assert look(trained).clean, "it was seen just now"
    later(monkeypatch, HOURS_S)
    young = left[0].with_name("train-001.public.parquet")
    young.write_bytes(b"still coming")  # in the same folder: a seal that takes long
    report = look(trained)
    assert {path for _, path in report.orphans} == {"models/.half.0123456789abcdef"}
    later(monkeypatch, 2 * HOURS_S)
    files = {path for path in store.rglob("*") if path.is_file()}
    size = len(trained.log())
    mend(trained, look(trained))
    assert {path for path in store.rglob("*") if path.is_file()} == files - {*left, young}
    assert not left[2].exists()
    said = [(entry.actor, entry.details.get("phase"), entry.details.get("orphans")) for entry in trained.log()[size:]]
    assert said[1:] == [("operator", "intent", 3), ("operator", "outcome", 3)]
    assert look(trained).findings == []


def test_no_step_of_the_clock_makes_an_upload_left_over(trained: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained.directory / "blobs/datasets/adult/0123"
    folder.mkdir()
    for number, step in enumerate((0, DAY_S, -DAY_S, DAY_S, 0)):
        trained.clock.offset = step
        for file in (
            folder / f"train-{number:03}.public.parquet",
            trained.directory / ".settings.json.0123456789abcdef",
        ):
            file.write_bytes(b"still coming")
            os.utime(file, (trained.clock(),) * 2)
        for _ in range(2):
            report = look(trained)
            assert (report.clean, report.orphans, report.temporaries) == (True, [], []), step
            trained.clock.offset = 0.0
        later(monkeypatch, HOURS_S * number)  # each time something came meanwhile


def test_after_a_boot_nothing_has_been_seen_yet(trained: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained.directory / "blobs/models/left").write_bytes(b"ciphertext")
    assert look(trained).clean
    monkeypatch.setattr(fsck, "since_boot", lambda: ("another boot", 1e9))
    assert look(trained).clean
    (trained.directory / fsck.SEEN_FILE).write_text("{")
    assert look(trained).clean
    monkeypatch.setattr(fsck, "since_boot", lambda: ("another boot", 1e9 + HOURS_S))
    assert not look(trained).clean


def test_what_an_erasure_left_to_do_is_done(world: World) -> None:
    answer = world.ask("olga", "POST", "/v1/datasets/adult/versions/1/key-destruction", {})
    world.register("sergei", ["security-officer"])
    for officer in ("sofia", "sergei"):
        world.vote(officer, world.missing(answer))
    kept = blob(world).read_bytes()
    path = blob(world).relative_to(world.directory / "blobs").as_posix()
    world.post("olga", "/v1/datasets/adult/versions/1/key-destruction", {})
    assert look(world).findings == []
    # As if it had died on the way: a file is not deleted, nothing is signed.
    with world.place.raw() as connection:
        erasure = connection.execute(select(erasures.c.id)).scalar_one()
        connection.execute(insert(deletions).values(region="eu", path=path, erasure=erasure))
        connection.execute(text("UPDATE erasures SET certificate = NULL"))
    (world.directory / "blobs" / path).write_bytes(kept)
    report = look(world)
    assert {finding.kind for finding in report.findings} == {"repairable"}
    mend(world, report)
    assert look(world).findings == []
    assert not (world.directory / "blobs" / path).exists()


def test_a_key_that_is_back_after_an_erasure_is_named(world: World) -> None:
    with world.place.raw() as connection:
        (row, *_) = connection.execute(select(data_keys)).all()
    answer = world.ask("olga", "POST", "/v1/datasets/adult/versions/1/key-destruction", {})
    world.register("sergei", ["security-officer"])
    for officer in ("sofia", "sergei"):
        world.vote(officer, world.missing(answer))
    world.post("olga", "/v1/datasets/adult/versions/1/key-destruction", {})
    change(world, insert(data_keys).values(**row._mapping))
    found = [finding.problem for finding in look(world).findings]
    assert any("says are gone" in problem for problem in found)
    assert any("destroyed" in problem for problem in found)
