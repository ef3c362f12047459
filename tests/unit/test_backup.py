"""Backups: what comes back, what must not come back, and what is refused. On SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update

from authority_world import ROLES, World, adult_schema, blocks_of_adult, training_spec
from cloister.authority import backup
from cloister.authority.maintenance import Parts
from cloister.authority.restore import Restored, restore, restore_blobs
from cloister.authority.service import Authority
from cloister.authority.witness import FileWitness, Witnessing
from cloister.client.seal import seal_dataset
from cloister.errors import (
    AuthenticationError,
    CloisterError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from cloister.stores.blobs import Stores
from cloister.stores.database import Database
from cloister.stores.keys import EmbeddedKeys
from cloister.stores.tables import data_keys, identities, log_entries, metadata, refresh_tokens
from databases import Place
from postgres import Server

FORGETFUL = {"identities", "revocations", "elevations", "refresh_tokens", "approvals", "log_checkpoints"}


def parts_of(world: World, directory: Path | None = None) -> Parts:
    here = directory or world.directory
    return Parts.of(here, EmbeddedKeys(here / "keys"), Stores({}, here / "blobs"), clock=world.clock)


def back_up(world: World, folder: Path, **options: Any) -> backup.Header:
    return backup.create(world.authority.core, world.authority.stores, world.caller("operator"), folder, **options)


def who(world: World, name: str = "operator") -> tuple[str, bytes]:
    return name, world.people[name].private


def lose(world: World) -> None:
    """The disk with the state is gone."""
    world.authority.close()
    if world.place.server:
        with world.place.raw() as connection:
            metadata.drop_all(connection)
            connection.execute(text("DROP TABLE alembic_version"))
    else:
        world.place.file.unlink()


def bring_back(world: World, folder: Path, name: str = "operator", **options: Any) -> Restored:
    """Restore over what there is of the world's state, with its authority stopped."""
    world.authority.close()
    if world.place.server:  # which takes a moment to see that a connection is gone
        world.place.server.end_connections(world.place.name)
    database = Database(**world.place.options) if world.place.server else None
    try:
        return restore(parts_of(world), folder, who(world, name), database=database, **options)
    finally:
        if database is not None:
            database.close()


def reopened(world: World) -> World:
    """The world after a restore: nobody's token of before is worth anything."""
    world.authority.close()
    world.authority = world.another()
    world.tokens.clear()
    return world


def state_of(world: World) -> dict[str, list[Any]]:
    return {name: rows for name, rows in world.content().items() if name not in FORGETFUL}


@contextmanager
def untouched(world: World) -> Iterator[None]:
    """A refused restore leaves the state, the anchor and the folder as they were."""
    world.authority.close()
    before, files = world.content(), sorted(path.name for path in world.directory.iterdir())
    anchor = (world.directory / "keys" / "anchor.json").read_bytes()
    world.authority.core.database.close()
    yield
    assert world.content() == before
    world.authority.core.database.close()
    assert sorted(path.name for path in world.directory.iterdir() if not path.name.startswith("state.db-")) == [
        name for name in files if not name.startswith("state.db-")
    ]
    assert (world.directory / "keys" / "anchor.json").read_bytes() == anchor


def keys_open(world: World, name: str = "adult") -> int:
    """How many data keys of a dataset open."""
    from cloister.authority.key_use import dataset_key, key_context

    with world.authority.core.database.reading() as connection:
        rows = connection.execute(select(data_keys).where(data_keys.c.name == name)).all()
    service = EmbeddedKeys(world.directory / "keys")
    return len(
        service.unwrap(dataset_key(name), [(row.wrapped, key_context(name, row.version, row.file)) for row in rows])
    )


def seal_second(world: World, name: str = "second") -> None:
    seal_dataset(
        world.client("otto"), world.people["otto"].private, blocks_of_adult(), adult_schema(name=name), shards=2,
        holdout=0.2, receiving_key=world.authority.receiving_public,
    )  # fmt: skip


def test_a_backup_brings_everything_back(world: World, tmp_path: Path) -> None:
    world.train()
    with world.recorded("operator", "backup:create"):
        header = back_up(world, tmp_path / "backup")
    before, entries = state_of(world), world.entries()
    files = [path for path in (tmp_path / "backup" / "blobs").rglob("*") if path.is_file()]
    assert (header.log_size, header.blobs) == (len(entries), len(files))
    shutil.rmtree(world.directory / "blobs")
    restored = bring_back(world, tmp_path / "backup")
    assert (restored.rolled_back_from, restored.blobs_lost, restored.ended) == (None, [], [])
    assert restored.blobs_put == header.blobs
    reopened(world)
    assert state_of(world) == before
    assert world.entries()[: len(entries)] == entries
    assert [entry.action for entry in world.log()[len(entries) :]] == ["backup:restore"]
    assert keys_open(world) > 0


def test_it_holds_its_own_record_and_is_whole_or_not_there(world: World, tmp_path: Path) -> None:
    header = back_up(world, tmp_path / "backup")
    assert world.log()[-1].details["backup"] == header.id
    assert header.log_size == len(world.log())
    assert world.authority.core.keys.remembered() == (header.log_size, header.log_root)
    with pytest.raises(ConflictError):
        back_up(world, tmp_path / "backup")
    (blob,) = list((world.directory / "blobs").rglob("train-000.confidential*"))
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="train-000"):
        back_up(world, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir() if "other" in path.name] == []
    assert [(entry.outcome, entry.action) for entry in world.log()[-1:]] == [("failure", "backup:create")]


def test_only_operators_make_them(world: World, tmp_path: Path) -> None:
    for name in set(ROLES) - {"operator"}:
        with pytest.raises(PermissionDeniedError):
            backup.create(world.authority.core, world.authority.stores, world.caller(name), tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_a_backup_tells_nothing_without_the_key_service(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    told = b"".join(path.read_bytes() for path in (tmp_path / "backup").rglob("*") if path.is_file())
    for needle in (b'"olga"', b"data-owner", b"adult@", b"income", b"education", b"Private", b"PUBLIC KEY"):
        assert needle not in told
    shutil.rmtree(world.directory / "keys")
    with pytest.raises(NotFoundError):
        parts_of(world)


@pytest.mark.parametrize("there", ["sqlite", pytest.param("postgres", marks=pytest.mark.story)])
def test_the_same_backup_goes_into_either_database(
    world: World, there: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On another machine, which has the key service and nothing else."""
    back_up(world, tmp_path / "backup")
    server: Server | None = request.getfixturevalue("postgres_server") if there == "postgres" else None
    directory = tmp_path / "other"
    directory.mkdir()
    shutil.copytree(world.directory / "keys", directory / "keys")
    place = Place.new(directory / "state.db", server)
    database = place.open() if server else None
    restored = restore(parts_of(world, directory), tmp_path / "backup", who(world), database=database)
    assert restored.kept is None
    other = World(directory, world, place)
    other.tokens.clear()
    assert state_of(other) == state_of(world)
    assert keys_open(other) == keys_open(world) > 0
    other.close()


def test_an_older_state_is_refused_and_with_the_operators_word_recorded(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    run = world.submit()
    world.lease(run)  # keys leave: from now on the backup is an old one
    size = world.authority.core.keys.remembered()[0]  # type: ignore[index]
    with untouched(world), pytest.raises(IntegrityError, match="older"):
        bring_back(world, tmp_path / "backup")
    lose(world)
    with pytest.raises(IntegrityError, match="older"):
        bring_back(world, tmp_path / "backup")
    restored = bring_back(world, tmp_path / "backup", accept_rollback=True)
    assert restored.rolled_back_from == size
    reopened(world)
    *_, entry, sealed = world.log()
    assert (entry.actor, entry.action, entry.details["rollback"]) == ("operator", "backup:restore", True)
    assert (entry.details["from_size"], entry.details["to_size"]) == (size, len(world.log()) - 2)
    assert (sealed.actor, sealed.action, sealed.resource) == ("authority", "ledger:seal", "Dataset/adult@1")
    assert world.authority.core.keys.remembered()[0] == len(world.log())  # type: ignore[index]
    # What was spent since is not known: nothing is left, until somebody else agrees to more.
    assert world.budget()["epsilon_left"] == 0
    answer = world.ask("olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 1.0, "delta": 1e-5})
    assert answer.json()["kind"] == "ApprovalMissingError"
    world.set_budget(1.0, 1e-5)
    assert world.budget()["epsilon_left"] == 1.0


def test_a_key_service_that_has_forgotten_the_log_cannot_vouch_for_a_backup(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    world.lease(world.submit())
    lose(world)
    (world.directory / "keys" / "anchor.json").unlink()
    with pytest.raises(IntegrityError, match="older"):
        bring_back(world, tmp_path / "backup")
    assert bring_back(world, tmp_path / "backup", accept_rollback=True).rolled_back_from is not None
    reopened(world)
    assert world.budget()["epsilon_left"] == 0


def test_a_rollback_behind_the_authoritys_back_is_refused_at_its_start(world: World, tmp_path: Path) -> None:
    """Without `restore`: the file was put there by hand."""
    if world.place.server:
        pytest.skip("SQLite only: a database on a server is no file that somebody could put back by hand")
    old = world.place.copy(tmp_path / "old.db")
    world.lease(world.submit())
    world.authority.close()
    shutil.copyfile(old.file, world.place.file)
    with pytest.raises(IntegrityError, match="older"):
        world.another()


def test_what_a_witness_has_cosigned_is_not_forgotten_unsaid(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    world.register("new", ["consumer"])  # no key has left since
    witness = FileWitness(tmp_path / "witness", log_verifier_key=world.authority.log.verifier_key)
    (report,) = Witnessing(world.authority.core, [witness]).cosign_now()
    assert report.error is None
    lose(world)  # so that only the key service knows
    with pytest.raises(IntegrityError, match="older"):
        bring_back(world, tmp_path / "backup")
    bring_back(world, tmp_path / "backup", accept_rollback=True)
    reopened(world)
    (report,) = Witnessing(world.authority.core, [witness]).cosign_now()
    assert isinstance(report.error, IntegrityError)  # the witness is not told what to forget


def test_a_revocation_is_not_forgotten_unsaid(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    world.post("operator", "/v1/identities/carl/revocation")
    lose(world)
    with pytest.raises(IntegrityError, match="older"):
        bring_back(world, tmp_path / "backup")
    if not world.place.server:
        assert not world.place.file.exists()


def test_no_token_lives_through_a_restore(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    before = world.token("olga")
    lose(world)
    restored = bring_back(world, tmp_path / "backup")
    assert restored.rolled_back_from is None
    world.authority = world.another()
    answer = world.http.get("/v1/me", headers={"Authorization": f"Bearer {before}"})
    assert answer.status_code == 401
    world.tokens.clear()
    assert world.ask("olga", "GET", "/v1/datasets").status_code == 200
    with world.authority.core.database.reading() as connection:
        assert connection.execute(select(refresh_tokens)).first() is None
        assert min(connection.execute(select(identities.c.epoch)).scalars()) >= 1_000_000


def test_runs_of_before_end_with_their_whole_charge(world: World, tmp_path: Path) -> None:
    run = world.submit()
    world.lease(run)
    world.commit(run, 0, 3)
    back_up(world, tmp_path / "backup")
    ended = world.end_body(run)
    lose(world)
    restored = bring_back(world, tmp_path / "backup")
    assert (restored.rolled_back_from, restored.runs_ended) == (None, 1)
    reopened(world)
    shown = world.get("ed", f"/v1/runs/{run}")
    assert shown["state"] == "failed"
    assert shown["epsilon_charged"] == shown["epsilon_planned"]
    block = {"attempt": 1, "first": 3, "last": 4}
    assert world.ask(run, "POST", f"/v1/runs/{run}/blocks", block).status_code == 409
    # Nor does its own word give anything back: nobody knows what it did since.
    world.post(run, f"/v1/runs/{run}/end", ended)
    assert world.budget()["epsilon_added"] == shown["epsilon_planned"]
    assert world.refused(409, "ed", "POST", f"/v1/runs/{run}/resume") == "ConflictError"


def test_a_backup_of_before_a_block_of_steps_is_an_old_one(world: World, tmp_path: Path) -> None:
    """Its ledger does not know of steps whose noise may have been released since."""
    run = world.submit()
    world.lease(run)
    back_up(world, tmp_path / "backup")
    world.commit(run, 0, 3)
    lose(world)
    with pytest.raises(IntegrityError, match="older"):
        bring_back(world, tmp_path / "backup")
    bring_back(world, tmp_path / "backup", accept_rollback=True)
    reopened(world)
    assert world.budget()["epsilon_left"] == 0


def test_erased_rows_do_not_come_back_and_other_datasets_do(world: World, tmp_path: Path) -> None:
    seal_second(world)
    world.train()
    back_up(world, tmp_path / "backup")
    there = keys_open(world)
    answer = world.ask("olga", "POST", "/v1/datasets/adult/versions/1/key-destruction", {})
    for officer in ("sofia", "sergei"):
        if officer not in world.people:
            world.register(officer, ["security-officer"])
        world.vote(officer, world.missing(answer))
    destroyed = world.post("olga", "/v1/datasets/adult/versions/1/key-destruction", {})
    assert destroyed["keys_destroyed"] == there > 0
    restored = bring_back(world, tmp_path / "backup", accept_rollback=True)
    assert restored.ended == ["adult@1"]
    reopened(world)
    assert keys_open(world, "adult") == 0
    assert keys_open(world, "second") > 0
    assert [model["flags"] for model in world.get("ed", "/v1/models")] == [[restored.backup]]
    shown = {each["dataset"]: each["state"] for each in world.get("olga", "/v1/datasets")}
    assert (shown["adult@1"], shown["second@1"]) == ("ended", "live")
    answer = world.ask("ed", "POST", "/v1/plans", {"spec": training_spec()})
    assert (answer.status_code, "after the backup" in answer.json()["hint"]) == (409, True)
    # The wrapped keys in the backup itself are noise, too: nothing but the key service's old copy would help.
    old = tmp_path / "by-hand.db"
    load_by_hand(world, tmp_path / "backup", old)
    place = Place({"place": old})
    with place.open().reading() as connection:
        rows = connection.execute(select(data_keys).where(data_keys.c.name == "adult")).all()
    place.close()
    assert len(rows) == there
    from cloister.authority.key_use import dataset_key, key_context

    service = EmbeddedKeys(world.directory / "keys")
    for row in rows:
        with pytest.raises(IntegrityError):
            service.unwrap(dataset_key("adult"), [(row.wrapped, key_context("adult", row.version, row.file))])


def load_by_hand(world: World, folder: Path, file: Path) -> None:
    """As somebody would who has a backup, and the key service as it is now."""
    from cloister.stores import engines
    from cloister.stores.dump import load

    engine = engines.sqlite_engine(file, reading=False)
    with engine.begin() as connection:
        load(connection, backup.open_state(parts_of(world).keys, folder, backup.Header.read(folder)))
    engine.dispose()


# ---- what is refused ----


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path, at: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def change(folder: Path, **facts: Any) -> None:
    header = json.loads((folder / "backup.json").read_bytes()) | facts
    (folder / "backup.json").write_text(json.dumps(header))


DAMAGE = {
    "no header": lambda folder: (folder / "backup.json").unlink(),
    "a cut header": lambda folder: cut(folder / "backup.json"),
    "another format": lambda folder: change(folder, format="cloister.dev/backup/v9"),
    "an unknown fact": lambda folder: change(folder, more=1),
    "another time": lambda folder: change(folder, created="2020-01-01T00:00:00.000Z"),
    "another size": lambda folder: change(folder, log_size=10_000),
    "another root": lambda folder: change(folder, log_root="00" * 32),
    "another id": lambda folder: change(folder, id="bak-000000000000"),
    "another key": lambda folder: change(folder, wrapped_key="AAAA"),
    "no state": lambda folder: (folder / "state.sealed").unlink(),
    "a cut state": lambda folder: cut(folder / "state.sealed"),
    "a changed state": lambda folder: flip(folder / "state.sealed"),
    "an extended state": lambda folder: (folder / "state.sealed").open("ab").write(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_backup_changes_nothing(damage: str, calm_backup: tuple[World, Path], tmp_path: Path) -> None:
    world, whole = calm_backup
    folder = tmp_path / "backup"
    shutil.copytree(whole, folder)
    DAMAGE[damage](folder)
    with pytest.raises((IntegrityError, NotFoundError)):
        bring_back(world, folder, accept_rollback=True)


@pytest.fixture(scope="module")
def calm_backup(sealed_template: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Path]]:
    """A world with a backup, for tests in which all is refused."""
    world = sealed_template.copy(tmp_path_factory.mktemp("calm-backup") / "authority")
    folder = tmp_path_factory.mktemp("calm") / "backup"
    back_up(world, folder)
    with untouched(world):
        yield world, folder
    world.close()


def test_a_changed_blob_in_a_backup_is_refused(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    shutil.rmtree(world.directory / "blobs")
    blob = next((tmp_path / "backup" / "blobs").rglob("train-001*"))
    flip(blob)
    with pytest.raises(IntegrityError, match="train-001"):
        bring_back(world, tmp_path / "backup")


def test_a_changed_blob_is_put_back_as_it_was_sealed(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    blob = next((world.directory / "blobs").rglob("train-001.confidential*"))
    good = blob.read_bytes()
    flip(blob)
    assert bring_back(world, tmp_path / "backup").blobs_put == 1
    assert blob.read_bytes() == good


def test_sealed_files_alone_come_back_from_a_backup_of_any_age(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup")
    world.lease(world.submit())
    budget = world.budget()
    changed, missing = sorted((world.directory / "blobs").rglob("train-00*.confidential*"))[:2]
    good = changed.read_bytes(), missing.read_bytes()
    flip(changed)
    missing.unlink()
    core = world.authority.core
    with pytest.raises(PermissionDeniedError):
        restore_blobs(parts_of(world), core.database, tmp_path / "backup", world.caller("ed"))
    assert restore_blobs(parts_of(world), core.database, tmp_path / "backup", world.caller("operator")) == (2, [])
    assert (changed.read_bytes(), missing.read_bytes()) == good
    assert world.budget() == budget
    assert (world.log()[-1].action, world.log()[-1].details["blobs_only"]) == ("backup:restore", True)


def test_a_blob_that_is_nowhere_is_named_and_the_rest_comes_back(world: World, tmp_path: Path) -> None:
    back_up(world, tmp_path / "backup", with_blobs=False)
    assert not (tmp_path / "backup" / "blobs").exists()
    next((world.directory / "blobs").rglob("train-001.confidential*")).unlink()
    restored = bring_back(world, tmp_path / "backup")
    assert [name for name in restored.blobs_lost if "train-001" in name] == restored.blobs_lost != []
    assert restored.blobs_put == 0


def test_only_an_operator_of_that_time_restores(calm_backup: tuple[World, Path]) -> None:
    world, folder = calm_backup
    for name in ("olga", "sofia", "ada"):
        with pytest.raises(PermissionDeniedError):
            bring_back(world, folder, name)
    with pytest.raises(AuthenticationError):
        restore(parts_of(world), folder, ("operator", world.people["olga"].private))


def test_a_state_that_is_there_is_not_replaced_unasked_and_kept(world: World, tmp_path: Path) -> None:
    """Though no key has left since."""
    back_up(world, tmp_path / "backup")
    world.register("new", ["consumer"])
    size = len(world.log())
    with untouched(world), pytest.raises(IntegrityError, match="older"):
        bring_back(world, tmp_path / "backup")
    restored = bring_back(world, tmp_path / "backup", accept_rollback=True)
    assert restored.rolled_back_from == size
    if not world.place.server:
        assert restored.kept is not None
        place = Place({"place": restored.kept / "state.db"})
        with place.open().reading() as connection:
            assert connection.execute(select(identities).where(identities.c.name == "new")).one()
        place.close()


def test_a_damaged_state_does_not_stop_a_restore(world: World, tmp_path: Path) -> None:
    if world.place.server:
        pytest.skip("SQLite only: PostgreSQL looks after its files itself, and nobody here damages them")
    back_up(world, tmp_path / "backup")
    world.authority.close()
    size = world.place.file.stat().st_size
    world.place.file.write_bytes(os.urandom(size))
    restored = bring_back(world, tmp_path / "backup")
    assert restored.rolled_back_from is None
    assert (restored.kept / "state.db").stat().st_size == size  # type: ignore[operator]
    reopened(world)
    assert keys_open(world) > 0


def test_another_authoritys_backup_is_refused(calm_backup: tuple[World, Path], tmp_path: Path) -> None:
    world, folder = calm_backup
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", url="https://127.0.0.1:1")
    with pytest.raises(CloisterError):
        restore(parts_of(world, tmp_path / "other"), folder, who(world), accept_rollback=True)
    other.close()


def test_a_key_service_from_before_the_backup_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.directory / "keys", tmp_path / "old-keys")
    EmbeddedKeys(world.directory / "keys").rotate("dataset/adult")
    world.authority.custody.rotate(world.caller("operator"), "dataset/adult")
    back_up(world, tmp_path / "backup")
    shutil.rmtree(world.directory / "keys")
    shutil.copytree(tmp_path / "old-keys", world.directory / "keys")
    with pytest.raises(CloisterError):
        bring_back(world, tmp_path / "backup", accept_rollback=True)


def test_postgresql_is_not_replaced_under_a_running_authority(world: World, tmp_path: Path) -> None:
    if not world.place.server:
        pytest.skip("PostgreSQL only: over a file there is one authority, which `cloister restore` looks for")
    back_up(world, tmp_path / "backup")
    world.get("ada", "/v1/approvals")
    database = Database(**world.place.options)
    before = world.content()
    with pytest.raises(ConflictError, match="connected"):
        restore(parts_of(world), tmp_path / "backup", who(world), database=database, accept_rollback=True)
    database.close()
    assert world.content() == before


def test_a_database_that_holds_nonsense_is_not_backed_up(world: World, tmp_path: Path) -> None:
    with world.place.raw() as connection:
        connection.execute(update(data_keys).values(wrapped=b"\x00"))
    back_up(world, tmp_path / "backup")  # noise is kept as it is: fsck says so
    world.authority.close()
    with pytest.raises((IntegrityError, UnavailableError)):
        bring_back(world, tmp_path / "backup")


def test_a_log_that_was_changed_before_the_backup_is_not_restored(world: World, tmp_path: Path) -> None:
    with world.place.raw() as connection:
        entry = connection.execute(select(log_entries.c.entry).where(log_entries.c["index"] == 5)).scalar_one()
        changed = bytes(entry).replace(b"Success", b"Failure")
        connection.execute(update(log_entries).where(log_entries.c["index"] == 5).values(entry=changed))
    back_up(world, tmp_path / "backup")
    lose(world)
    with pytest.raises(IntegrityError, match="do not match"):
        bring_back(world, tmp_path / "backup", accept_rollback=True)
