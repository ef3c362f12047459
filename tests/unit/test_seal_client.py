"""Sealing on the owner's machine: block by block, all or nothing, and onto what is sealed already."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import clinic
from authority_world import World
from cloister.client import seal as sealing
from cloister.client.seal import append_to_dataset, newest_schema, seal_dataset
from cloister.client.source import open_source
from cloister.client.verify import verify_dataset
from cloister.datasets.ingest import read_blocks
from cloister.datasets.schema import DatasetSchema
from cloister.errors import ConflictError, InputError, IntegrityError, NotFoundError, UnavailableError
from cloister.stores.blobs import CHUNK_BYTES, FolderBlobs
from s3 import Endpoint

# Nothing here is about the database; what is runs on both.
pytestmark = pytest.mark.parametrize("world_server", ["sqlite"], indirect=True, scope="session")


def tables(data: bytes, schema: DatasetSchema, rows: int) -> Iterator[pa.Table]:
    """A file as a reader hands it out, in tables of so many rows."""
    for table in read_blocks(io.BytesIO(data), schema):
        for start in range(0, table.num_rows, rows):
            yield table.slice(start, rows)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about 40 rows of the clinic."""
    monkeypatch.setattr(sealing, "BLOCK_BYTES", 1500)


def seal(world: World, source: Any, *, shards: int = 2, holdout: float = 0.2, **changes: Any) -> dict[str, Any]:
    return seal_dataset(
        world.client("olga"), world.people["olga"].private, source, clinic.schema(**changes), shards=shards,
        holdout=holdout, receiving_key=world.authority.receiving_public,
    )  # fmt: skip


def append(world: World, source: Any, *, holdout: float = 0.2) -> dict[str, Any]:
    return append_to_dataset(
        world.client("olga"), world.people["olga"].private, source, clinic.schema(), shards=1, holdout=holdout,
        receiving_key=world.authority.receiving_public,
    )  # fmt: skip


def everything(world: World) -> tuple[Any, set[Path]]:
    """What a seal that fails must not change."""
    return world.content(), {path for path in (world.directory / "blobs").rglob("*") if path.is_file()}


# ---- block by block ----


@pytest.mark.usefixtures("small_blocks")
def test_a_long_file_becomes_many_shards_with_every_row_once(world: World) -> None:
    data = clinic.rows(people=110, each=2)
    shown = seal(world, tables(data, clinic.schema(), 10))
    listed = clinic.manifest(world, 1)
    assert listed.shards("train") == tuple(f"train-{number:03d}" for number in range(len(listed.shards("train"))))
    assert len(listed.shards("train")) >= 8
    assert len(listed.shards("holdout")) >= 3
    assert clinic.ages(world, 1) == sorted(list(range(110)) * 2)
    assert (shown["rows"], listed.lineage.rows_before, listed.lineage.rows_after) == (220, 0, 220)
    in_file_order = clinic.open_all(world, 1).column("age").to_pylist()
    assert in_file_order[:20] != sorted(in_file_order[:20])  # mixed within a block


@pytest.mark.usefixtures("small_blocks")
def test_a_rest_too_small_to_split_goes_with_the_block_before(world: World) -> None:
    data = clinic.rows(people=41, each=1)
    seal(world, tables(data, clinic.schema(), 40), shards=3, holdout=0.0, unit="row")
    assert clinic.manifest(world, 1).shards("train") == ("train-000", "train-001", "train-002")
    assert clinic.ages(world, 1) == list(range(41))


@pytest.mark.usefixtures("small_blocks")
def test_reading_never_runs_far_ahead_of_sealing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    produced, taken, ahead, partition = 0, 0, [], sealing.partition

    def counted(block: pa.Table, *arguments: Any) -> Any:
        nonlocal taken
        taken += block.num_rows
        time.sleep(0.01)
        ahead.append(produced - taken)
        return partition(block, *arguments)

    def source() -> Iterator[pa.Table]:
        nonlocal produced
        for _ in range(50):
            produced += 40
            yield from read_blocks(io.BytesIO(clinic.rows(people=40, each=1)), clinic.schema())

    monkeypatch.setattr(sealing, "partition", counted)
    seal(world, source(), shards=1, unit="row")
    assert taken == 2000
    assert max(ahead) <= 40 * (sealing.TABLES_AHEAD + 4)


def test_a_file_on_disk_is_sealed_and_leaves_no_trace_in_clear(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    (tmp_path / "clinic.csv").write_bytes(clinic.rows())
    with open_source(tmp_path / "clinic.csv") as source:
        seal(world, source.read_blocks(clinic.schema()))
        assert source.position == source.size
    stored = b"".join(path.read_bytes() for path in (world.directory / "blobs").rglob("*") if path.is_file())
    assert b"patient number" not in stored
    assert list(scratch.iterdir()) == []


# ---- all or nothing ----


def broken(at: int) -> Iterator[pa.Table]:
    """Good rows, and then a row that does not fit the schema."""
    data = clinic.rows(people=100, each=1)
    bad = data.replace(b",%d," % at, b",999,", 1)
    yield from tables(bad, clinic.schema(), 10)


@pytest.mark.usefixtures("small_blocks")
def test_a_fault_in_the_last_row_leaves_nothing(world: World) -> None:
    def source() -> Iterator[pa.Table]:
        yield from tables(clinic.rows(people=100, each=1), clinic.schema(), 10)
        raise InputError("column 'age', row 101: outside the declared bounds", "bounds: 0 to 120")

    before = everything(world)
    with pytest.raises(InputError, match="row 101"):
        seal(world, source())
    assert everything(world) == before
    with pytest.raises(InputError, match="row 100"):
        seal(world, broken(99))
    assert everything(world) == before


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("failing", [1, 7])
def test_a_store_that_fails_on_the_way_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before, put, calls = everything(world), FolderBlobs.put, []

    def full(self: FolderBlobs, path: str, data: bytes) -> None:
        calls.append(path)
        if len(calls) >= failing:
            raise UnavailableError("the blob store did not take it: No space left on device", "free disk space")
        put(self, path, data)

    monkeypatch.setattr(FolderBlobs, "put", full)
    with pytest.raises(UnavailableError, match="No space"):
        seal(world, tables(clinic.rows(people=100), clinic.schema(), 10))
    assert everything(world) == before
    monkeypatch.undo()
    assert seal(world, tables(clinic.rows(), clinic.schema(), 10))["dataset"] == "clinic@1"


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupt_leaves_nothing(world: World) -> None:
    def source() -> Iterator[pa.Table]:
        yield from tables(clinic.rows(people=100), clinic.schema(), 10)
        raise KeyboardInterrupt

    before = everything(world)
    with pytest.raises(KeyboardInterrupt):
        seal(world, source())
    assert everything(world) == before


def test_data_of_a_region_without_a_store_is_refused(world: World, tmp_path: Path) -> None:
    world.reopen(blobs={"us": (tmp_path / "us").as_uri()})
    before = world.content()
    with pytest.raises(InputError, match="no blob store for the region 'eu', only for us") as refused:
        clinic.seal(world)
    assert "authority.blobs.eu" in refused.value.hint
    assert world.content() == before
    assert clinic.seal(world, region="us")["dataset"] == "clinic@1"
    assert list((tmp_path / "us" / "datasets" / "clinic").iterdir())


# ---- onto what is sealed ----


@pytest.mark.usefixtures("small_blocks")
def test_appended_rows_are_new_shards_and_nothing_else_changes(world: World) -> None:
    seal(world, tables(clinic.rows(), clinic.schema(), 10))
    first, kept = clinic.manifest(world, 1), {path: path.read_bytes() for path in clinic.blob_files(world)}
    assert newest_schema(world.client("olga"), "clinic") == clinic.schema()
    shown = append(world, tables(clinic.rows(first=50, people=30, each=1), clinic.schema(), 10))
    second = clinic.manifest(world, 2)
    assert second.files[: len(first.files)] == first.files
    assert not set(first.shards("train")) & {file.shard for file in second.files if file.sealed_in == 2}
    assert second.lineage.parents == ("clinic@1",)
    assert (second.lineage.kind, second.lineage.rows_before, second.lineage.rows_after) == ("append", 60, 90)
    assert (shown["new_rows"], shown["rows"]) == (30, 90)
    assert {path: path.read_bytes() for path in kept} == kept
    assert clinic.ages(world, 2) == sorted([*range(30), *range(30), *range(50, 80)])
    assert clinic.ages(world, 1) == sorted([*range(30), *range(30)])


def test_a_unit_may_not_get_more_rows_by_appending(world: World) -> None:
    clinic.seal(world, clinic.rows(each=3))
    before = everything(world)
    with pytest.raises(InputError, match="a unit has 5 rows, and the schema allows 4"):
        clinic.append(world, clinic.rows(people=10, each=2))
    assert everything(world) == before
    assert clinic.append(world, clinic.rows(people=10, each=1))["rows"] == 100


def test_a_unit_is_never_both_in_training_and_in_the_holdout(world: World) -> None:
    clinic.seal(world)
    before = everything(world)
    with pytest.raises(InputError, match="both in training and in the holdout"):
        append(world, tables(clinic.rows(people=10, each=1), clinic.schema(), 10), holdout=0.5)
    assert everything(world) == before
    clinic.append(world, clinic.rows(each=1))
    held = {role: people_of(world, 2, role) for role in ("train", "holdout")}
    assert held["train"]
    assert held["holdout"]
    assert not held["train"] & held["holdout"]


def people_of(world: World, version: int, role: str) -> set[str]:
    """The pseudonyms in the shards of one role."""
    listed = clinic.manifest(world, version)
    kept = {file.shard for file in listed.files if file.role == role}
    rows, found = clinic.open_all(world, version), set()
    start = 0
    for shard in sorted({file.shard for file in listed.files}):
        count = next(file.rows for file in listed.files if file.shard == shard)
        if shard in kept:
            found |= set(rows.column("patient").slice(start, count).to_pylist())
        start += count
    return found


def test_appending_under_another_schema_is_refused(world: World) -> None:
    clinic.seal(world)
    before = everything(world)
    other = clinic.schema(purpose="another one")
    with pytest.raises(InputError, match="another schema"):
        append_to_dataset(
            world.client("olga"), world.people["olga"].private, tables(clinic.rows(), other, 10), other, shards=1,
            holdout=0.2, receiving_key=world.authority.receiving_public,
        )  # fmt: skip
    assert everything(world) == before
    with pytest.raises(NotFoundError):
        newest_schema(world.client("olga"), "nothing")


def test_a_parent_whose_index_changed_is_not_built_upon(world: World) -> None:
    clinic.seal(world)
    index = next(path for path in clinic.blob_files(world) if "index" in path.name)
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.chmod(0o600)
    index.write_bytes(data)
    before = everything(world)
    with pytest.raises(IntegrityError, match="changed since it was sealed"):
        clinic.append(world, clinic.rows(people=5, each=1))
    assert everything(world) == before


def test_two_who_append_at_once_do_not_lose_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.seal(world)
    register = sealing.register

    def after_somebody_else(*arguments: Any) -> Any:
        monkeypatch.setattr(sealing, "register", register)
        clinic.append(world, clinic.rows(first=60, people=9, each=1))
        return register(*arguments)

    monkeypatch.setattr(sealing, "register", after_somebody_else)
    with pytest.raises(ConflictError):
        append(world, tables(clinic.rows(first=40, people=5, each=1), clinic.schema(), 5))
    assert clinic.manifest(world, 2).all_rows == 69
    listed = {file.path for version in (1, 2) for file in clinic.manifest(world, version).files}
    assert {str(path.relative_to(world.directory / "blobs")) for path in clinic.blob_files(world)} == listed


def test_what_a_dataset_is_derived_from_is_on_record_and_checked_before_the_upload(world: World) -> None:
    def unread() -> Iterator[pa.Table]:
        raise AssertionError("read before the parents were checked")
        yield

    def derive(parent: str, source: Any) -> dict[str, Any]:
        return seal_dataset(
            world.client("olga"), world.people["olga"].private, source, clinic.schema(), shards=1, holdout=0.2,
            receiving_key=world.authority.receiving_public, derived_from=(parent,),
        )  # fmt: skip

    before = everything(world)
    for parent, error in (("clinic@1", InputError), ("adult@9", NotFoundError), ("adult", InputError)):
        with pytest.raises(error):
            derive(parent, unread())
    assert everything(world) == before
    derive("adult@1", tables(clinic.rows(), clinic.schema(), 10))
    lineage = clinic.manifest(world, 1).lineage
    assert (lineage.kind, lineage.parents, lineage.rows_before, lineage.rows_after) == ("seal", ("adult@1",), 0, 60)
    assert lineage.code.startswith("sha256:")


# ---- people ----


def test_pseudonyms_join_within_a_dataset_and_never_across(world: World) -> None:
    clinic.seal(world)
    clinic.append(world, clinic.rows(each=1))
    rows = clinic.open_all(world, 2)
    by_age: dict[int, set[str]] = {}
    for patient, age in zip(rows.column("patient").to_pylist(), rows.column("age").to_pylist(), strict=True):
        by_age.setdefault(age, set()).add(patient)
    assert {len(each) for each in by_age.values()} == {1}  # one pseudonym a person, over both versions
    assert len(set.union(*by_age.values())) == clinic.PEOPLE
    assert set(rows.column("patient.original").to_pylist()) == {clinic.person(n) for n in range(clinic.PEOPLE)}
    originals = [file.part for file in clinic.manifest(world, 1).files if "patient.original" in file.columns]
    assert set(originals) == {"restricted"}


# ---- verifying, and a bucket ----


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "remove"])
def test_a_file_that_is_not_as_it_was_sealed_is_found(world: World, change: str) -> None:
    clinic.seal(world)
    client = world.client("olga")
    assert verify_dataset(client, "clinic", 1)["files"] == len(clinic.manifest(world, 1).files)
    file = sorted(clinic.blob_files(world))[-1]
    data = file.read_bytes()
    file.chmod(0o600)
    if change == "remove":
        file.unlink()
    else:
        more = {"flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "cut": data[:-1], "grow": data + os.urandom(9)}
        file.write_bytes(more[change])
    with pytest.raises(NotFoundError if change == "remove" else IntegrityError):
        verify_dataset(client, "clinic", 1)


def test_a_version_that_has_ended_is_called_so(world: World) -> None:
    clinic.seal(world)
    done = clinic.erase_person(world, 7)
    with pytest.raises(ConflictError, match="ended") as refused:
        verify_dataset(world.client("olga"), "clinic", 1)
    assert done["erasure"] in refused.value.hint


def test_two_seals_of_one_owner_wait_for_each_other(world: World) -> None:
    with ThreadPoolExecutor(1) as pool:
        with world.authority.uploads.turn("olga"):
            sealing = pool.submit(clinic.seal, world)
            with pytest.raises(TimeoutError):
                sealing.result(0.3)
        assert sealing.result(120)["dataset"] == "clinic@1"


def test_a_store_that_never_stops_sending_is_not_followed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.seal(world)
    sent = 0

    def endless(self: FolderBlobs, path: str) -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(CHUNK_BYTES)

    monkeypatch.setattr(FolderBlobs, "chunks", endless)
    with pytest.raises(IntegrityError):
        verify_dataset(world.client("olga"), "clinic", 1)
    assert sent <= len(clinic.manifest(world, 1).files)


def test_a_dataset_lives_in_a_bucket(world: World, s3: Endpoint) -> None:
    world.reopen(blobs={"eu": s3.url()})
    clinic.seal(world)
    clinic.append(world, clinic.rows(first=40, people=5, each=1))
    assert verify_dataset(world.client("olga"), "clinic", 2)["bytes"] > 0
    assert clinic.ages(world, 2) == sorted([*range(30), *range(30), *range(40, 45)])
    store = world.authority.stores.for_region("eu")
    listed = {file.path for file in clinic.manifest(world, 2).files}
    assert set(store.list("datasets")) == listed
    assert not clinic.blob_files(world)
    before = set(store.list("datasets"))
    with pytest.raises(InputError):
        seal(world, broken(99))
    assert set(store.list("datasets")) == before


@pytest.mark.usefixtures("world_server")
def test_the_order_of_rows_is_a_permutation_that_changes() -> None:
    first, second = sealing._secret_permutation(1000), sealing._secret_permutation(1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, second)
