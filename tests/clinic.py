"""A small table about people, several rows each, sealed in a world: what erasing and correcting are tested on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from authority_world import World
from cloister.canonical import b64, canonical_json
from cloister.client.erase import Owner, erase, rectify
from cloister.client.grant import opened_keys
from cloister.client.seal import append_to_dataset, seal_dataset
from cloister.datasets.ingest import read_blocks
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest
from cloister.datasets.schema import DatasetSchema
from cloister.sealing import purposes
from cloister.sealing.envelope import new_key
from cloister.sealing.lease import OneTimeKey, seal_to
from cloister.sealing.shard import open_table, shard_aad
from cloister.signing import dsse
from cloister.stores.tables import data_keys, datasets

PEOPLE, ROWS_EACH = 30, 2
SCHEMA = {
    "name": "clinic", "purpose": "income-research", "region": "eu", "retention": "P5Y",
    "unit": {"column": "patient", "max_rows": 4},
    "columns": [
        {"name": "patient", "type": "text", "class": "confidential", "role": "identifier", "keep_original": True},
        {"name": "age", "type": "integer", "class": "confidential", "bounds": [0, 120]},
        {"name": "city", "type": "category", "class": "internal", "values": ["bonn", "kiel"]},
        {"name": "ill", "type": "category", "class": "confidential", "values": ["no", "yes"], "role": "label"},
    ],
}  # fmt: skip


def schema(**changes: Any) -> DatasetSchema:
    return DatasetSchema.from_mapping(SCHEMA | changes)


def person(number: int) -> str:
    return f"patient number {number}"


def rows(first: int = 0, people: int = PEOPLE, each: int = ROWS_EACH) -> bytes:
    """A person's age is their number."""
    lines = [f"{person(n)},{n},{'bonn' if n % 2 else 'kiel'},{'yes' if n % 3 else 'no'}"
             for n in range(first, first + people) for _ in range(each)]  # fmt: skip
    return "\n".join(["patient,age,city,ill", *lines]).encode() + b"\n"


def seal(
    world: World, data: bytes = b"", *, shards: int = 3, owner: str = "olga", derived_from: tuple[str, ...] = (),
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    return seal_dataset(
        world.client(owner), world.people[owner].private, read_blocks(io.BytesIO(data or rows()), schema(**changes)),
        schema(**changes), shards=shards, holdout=0.2, receiving_key=world.authority.receiving_public,
        derived_from=derived_from,
    )  # fmt: skip


def append(world: World, data: bytes, *, owner: str = "olga", **changes: Any) -> dict[str, Any]:
    return append_to_dataset(
        world.client(owner), world.people[owner].private, read_blocks(io.BytesIO(data), schema(**changes)),
        schema(**changes), shards=1, holdout=0.2, receiving_key=world.authority.receiving_public,
    )  # fmt: skip


def owner(world: World, name: str = "olga") -> Owner:
    return Owner(
        client=world.client(name), private_key_pem=world.people[name].private,
        receiving_key=world.authority.receiving_public, release_key=world.authority.release_public,
    )  # fmt: skip


def erase_person(world: World, *numbers: int, name: str = "olga") -> dict[str, Any]:
    return erase(owner(world, name), "clinic", [person(number) for number in numbers])


def rectify_person(world: World, number: int, **changes: str) -> dict[str, Any]:
    return rectify(owner(world), "clinic", person(number), changes)


def manifest(world: World, version: int) -> DatasetManifest:
    return DatasetManifest.parse(world.get("olga", f"/v1/datasets/clinic/versions/{version}")["manifest"])


def states(world: World, name: str = "clinic") -> dict[str, str]:
    return {each["dataset"]: each["state"] for each in world.get("olga", "/v1/datasets")
            if each["dataset"].startswith(f"{name}@")}  # fmt: skip


def open_all(world: World, version: int) -> pa.Table:
    """Every row of a live version, by the keys that its owner may ask for."""
    listed, tables = manifest(world, version), []
    one_time = OneTimeKey.generate()
    body = {"public_key": b64(one_time.public), "purpose": "erase", "files": [file.ref for file in listed.files]}
    answer = world.post("olga", "/v1/datasets/clinic/openings", body)
    _, keys = opened_keys(one_time, answer["sealed"], "clinic", answer["version"])
    store = world.authority.stores.for_region("eu")
    for shard in sorted({file.shard for file in listed.files}):
        parts = [
            open_table(store.get(file.path), keys[file.ref],
                       shard_aad("clinic", file.sealed_in, file.part, file.shard, "eu"))
            for file in listed.files if file.shard == shard
        ]  # fmt: skip
        tables.append(pa.table({name: part.column(name) for part in parts for name in part.column_names}))
    return pa.concat_tables(tables)


def ages(world: World, version: int) -> list[int]:
    return sorted(int(age) for age in np.asarray(open_all(world, version).column("age")))


def key_rows(world: World) -> dict[str, bytes]:
    """The wrapped data keys of the clinic that are in the state, by their file's `ref`."""
    with world.authority.core.database.reading() as connection:
        found = connection.execute(data_keys.select().where(data_keys.c.name == "clinic")).all()
    return {f"{row.version}/{row.file}": bytes(row.wrapped) for row in found}


def blob_files(world: World) -> set[Path]:
    return {path for path in (world.directory / "blobs" / "datasets" / "clinic").rglob("*") if path.is_file()}


def later(world: World, days: int) -> None:
    """So many days pass for the clinic; for the tokens of those who ask, none."""
    c, past = datasets.c, 3600.0 * 24 * days
    moved = {"created": c.created - past, "files_due": c.files_due - past, "due": c.due - past}
    with world.authority.core.database.transaction() as connection:
        connection.execute(datasets.update().where(c.name == "clinic").values(**moved))


def facts(world: World, version: int) -> dict[str, Any]:
    """The manifest of a version as a map, for making another one of it."""
    return manifest(world, version).model_dump(mode="json")


def following(world: World, version: int, kind: str) -> dict[str, Any]:
    """The manifest of the version after it, with the same files so far."""
    made = facts(world, version)
    made["version"] = version + 1
    made["lineage"] |= {"kind": kind, "parents": [f"clinic@{version}"], "rows_before": made["lineage"]["rows_after"]}
    made.pop("published", None)
    if kind in ("erase", "rectify"):
        made["published"] = manifest(world, version).all_published.model_dump()
    return made


def resealed(made: dict[str, Any], shard: str, rows: int) -> list[str]:
    """Put files of the new version in the place of a shard's, with so many rows; the files that end with that."""
    old = [file for file in made["files"] if file["shard"] == shard]
    for file in made["files"]:
        if file["shard"] == shard:
            made["lineage"]["rows_after"] += (rows - file["rows"]) if file["part"] == "index" else 0
            file["path"] = f"datasets/clinic/again/{shard}.{file['part']}.{made['version']}"
    ended = [f"{file['sealed_in']}/{shard}/{file['part']}" for file in old]
    for file in old:
        file |= {"sealed_in": made["version"], "rows": rows}
    return ended


def dropped(made: dict[str, Any], shard: str) -> list[str]:
    """Take a shard out; the files that end with that."""
    gone = [file for file in made["files"] if file["shard"] == shard]
    made["files"] = [file for file in made["files"] if file["shard"] != shard]
    made["lineage"]["rows_after"] -= gone[0]["rows"]
    return [f"{file['sealed_in']}/{shard}/{file['part']}" for file in gone]


def added(made: dict[str, Any], shard: str = "train-900", rows: int = 10, **changes: Any) -> None:
    """Add a shard that the new version has sealed."""
    kind = {
        file["part"]: file | {"shard": shard, "sealed_in": made["version"], "rows": rows, "role": "train",
                              "path": f"datasets/clinic/new/{shard}.{file['part']}.{made['version']}"} | changes
        for file in made["files"]
    }  # fmt: skip
    made["files"] += list(kind.values())
    made["lineage"]["rows_after"] += rows


def signed(world: World, made: dict[str, Any], ends: list[str] | None = None, *, signer: str = "olga") -> Any:
    """The request that registers a manifest which somebody made up, with keys for files that nobody wrote."""
    parsed = DatasetManifest.model_validate(made)
    keys = {file.key_name: b64(new_key()) for file in parsed.files if file.sealed_in == parsed.version}
    statement = dsse.statement(made["name"], parsed.digest.removeprefix("sha256:"), MANIFEST_PREDICATE, made)
    sealed = seal_to(world.authority.receiving_public, canonical_json(keys), purposes.data_keys(parsed.digest))
    body = {"envelope": dsse.sign(statement, world.people[signer].key), "sealed_keys": b64(sealed)}
    return body | ({} if ends is None else {"ends": ends})
