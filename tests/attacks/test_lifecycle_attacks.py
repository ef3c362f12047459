"""An owner, or somebody else, hands in a version that does not follow; or asks for keys that are not theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import clinic
from authority_world import NODE, World, lease_body, receiver
from cloister.canonical import b64
from cloister.client.grant import opened_keys
from cloister.errors import CloisterError
from cloister.sealing.lease import OneTimeKey

SHARD, OTHER = "train-000", "train-001"
Made = dict[str, Any]


@pytest.fixture(scope="module")
def ward(sealed_template: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for all that is refused: clinic@1, and clinic@2 that was appended to it. Nothing may change in it."""
    world = sealed_template.copy(tmp_path_factory.mktemp("ward") / "authority")
    clinic.seal(world)
    clinic.append(world, clinic.rows(100, 10))
    before = world.content()
    yield world
    assert world.content() == before
    world.close()


def ending(version: int, ends: list[str]) -> dict[str, Any]:
    return {"version": version, "ends": ends}


def refused(world: World, made: Made, ends: list[str] | None = None) -> str:
    before = world.content()
    answer = world.ask("olga", "POST", "/v1/datasets", clinic.signed(world, made, ends))
    assert answer.status_code in (400, 404, 409, 422), answer.text
    assert world.content() == before
    return str(answer.json()["error"])


# ---- appending


def drop_a_file(made: Made) -> None:
    clinic.dropped(made, SHARD)


def change_a_files(field: str, value: Any) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        for file in made["files"]:
            if file["shard"] == SHARD:
                file[field] = f"{value}/{file['part']}" if field == "path" else value

    return change


def claim_it_is_older(made: Made) -> None:
    clinic.added(made, "train-901", sealed_in=1)


def use_a_name_again(made: Made) -> None:
    for file in made["files"]:
        if file["shard"] == "train-900":
            file["shard"] = SHARD


def change_the_schema(made: Made) -> None:
    made["dataset_schema"]["retention"] = "P90Y"


def change_lineage(**facts: Any) -> Callable[[Made], None]:
    return lambda made: made["lineage"].update(facts)


def lie_where_another_does(made: Made) -> None:
    made["files"][-1]["path"] = next(file["path"] for file in made["files"] if file["shard"] == SHARD)


@pytest.mark.parametrize(
    "change",
    [
        drop_a_file, change_a_files("sha256", "0" * 64), change_a_files("rows", 900), change_a_files("role", "holdout"),
        change_a_files("path", "datasets/clinic/elsewhere"), change_a_files("sealed_in", 2), claim_it_is_older,
        change_the_schema, change_lineage(parents=["clinic@1"]), change_lineage(parents=["adult@1"]),
        change_lineage(parents=[]), change_lineage(rows_before=1), change_lineage(rows_after=1),
        change_lineage(kind="seal", parents=[]), change_lineage(kind="erase"), change_lineage(kind="rectify"),
    ],
)  # fmt: skip
def test_an_appendix_that_is_not_only_one_is_refused(ward: World, change: Callable[[Made], None]) -> None:
    made = clinic.following(ward, 2, "append")
    clinic.added(made)
    change(made)
    assert refused(ward, made)


def test_an_appendix_that_ends_something_or_reuses_a_name_is_refused(ward: World) -> None:
    made = clinic.following(ward, 2, "append")
    clinic.added(made)
    assert refused(ward, made, ["1/train-000/index"])
    use_a_name_again(made)
    with pytest.raises(CloisterError):
        clinic.DatasetManifest.parse(made)


def test_a_file_of_another_dataset_is_refused(ward: World) -> None:
    made = clinic.following(ward, 2, "append")
    clinic.added(made)
    foreign = ward.get("olga", "/v1/datasets/adult/versions/1")["manifest"]["files"][0]
    made["files"][-1]["path"] = foreign["path"]
    assert refused(ward, made)
    lie_where_another_does(made)
    with pytest.raises(CloisterError):
        clinic.DatasetManifest.parse(made)


# ---- erasing and correcting


def test_an_erasure_that_erases_nothing_is_refused(ward: World) -> None:
    kept = next(file["rows"] for file in clinic.facts(ward, 2)["files"] if file["shard"] == SHARD)
    for rows in (kept, kept + 5):
        made = clinic.following(ward, 2, "erase")
        assert refused(ward, made, clinic.resealed(made, SHARD, rows))
    assert refused(ward, clinic.following(ward, 2, "erase"), [])


def test_a_correction_that_loses_or_adds_rows_is_refused(ward: World) -> None:
    made = clinic.following(ward, 2, "rectify")
    assert refused(ward, made, clinic.resealed(made, SHARD, 1))
    made = clinic.following(ward, 2, "rectify")
    assert refused(ward, made, clinic.dropped(made, SHARD))


def test_an_erasure_that_keeps_keys_of_what_it_replaces_is_refused(ward: World) -> None:
    made = clinic.following(ward, 2, "erase")
    ends = clinic.resealed(made, SHARD, 1)
    assert "ends" not in refused(ward, made, ends[:-1])
    assert refused(ward, made, [])
    assert refused(ward, made)


def test_an_erasure_that_ends_what_stays_or_is_not_there_is_refused(ward: World) -> None:
    listed = clinic.facts(ward, 2)["files"]
    staying = [f"{file['sealed_in']}/{OTHER}/{file['part']}" for file in listed if file["shard"] == OTHER]
    for extra in (staying, staying[:1], ["7/train-000/index"], ["1/train-777/index"], ["1/train-000/secret"]):
        made = clinic.following(ward, 2, "erase")
        assert refused(ward, made, clinic.resealed(made, SHARD, 1) + extra)


def test_an_erasure_that_changes_other_shards_is_refused(ward: World) -> None:
    made = clinic.following(ward, 2, "erase")
    ends = clinic.resealed(made, SHARD, 1)
    clinic.added(made)
    assert refused(ward, made, ends)
    made = clinic.following(ward, 2, "erase")
    ends = clinic.resealed(made, SHARD, 1)
    change_a_files("sha256", "1" * 64)(made)
    next(file for file in made["files"] if file["shard"] == OTHER)["sha256"] = "2" * 64
    assert refused(ward, made, ends)
    made = clinic.following(ward, 2, "erase")
    ends = clinic.resealed(made, SHARD, 1)
    change_a_files("role", "holdout")(made)
    assert refused(ward, made, ends)


def test_a_shard_is_replaced_whole(ward: World) -> None:
    made = clinic.following(ward, 2, "rectify")
    (before,) = [dict(file) for file in made["files"] if (file["shard"], file["part"]) == (SHARD, "internal")]
    ends = clinic.resealed(made, SHARD, before["rows"])
    for file in made["files"]:
        if (file["shard"], file["part"]) == (SHARD, "internal"):
            file |= before
    assert refused(ward, made, [ref for ref in ends if not ref.endswith("internal")])


def test_nothing_new_lies_where_something_old_does(ward: World) -> None:
    made = clinic.following(ward, 2, "erase")
    paths = {file["part"]: file["path"] for file in made["files"] if file["shard"] == SHARD}
    ends = clinic.resealed(made, SHARD, 1)
    for file in made["files"]:
        file["path"] = paths[file["part"]] if file["shard"] == SHARD else file["path"]
    assert refused(ward, made, ends)


def test_nothing_that_is_sealed_anew_lies_where_something_does(ward: World) -> None:
    made = clinic.following(ward, 1, "seal")
    made["version"], made["lineage"]["parents"], made["lineage"]["rows_before"] = 3, [], 0
    for file in made["files"]:
        file["sealed_in"] = 3
    assert "lies where" in refused(ward, made)


def test_nothing_lies_where_something_was_that_ended(world: World) -> None:
    clinic.seal(world)
    before = {file.ref: file.path for file in clinic.manifest(world, 1).files}
    clinic.erase_person(world, 7)
    gone = before.keys() - {file.ref for file in clinic.manifest(world, 2).files}
    made = clinic.following(world, 2, "append")
    clinic.added(made)
    made["files"][-1]["path"] = before[sorted(gone)[0]]
    assert "lies where" in refused(world, made)


def test_an_appendix_without_anything_and_a_seal_with_a_parent_of_its_name_are_refused(ward: World) -> None:
    assert refused(ward, clinic.following(ward, 2, "append"))
    made = clinic.following(ward, 2, "seal")
    made["lineage"]["rows_before"] = 0
    for file in made["files"]:
        file |= {"sealed_in": 3, "path": file["path"] + ".3"}
    assert refused(ward, made)


def test_an_ending_without_a_version_leaves_the_newest_one_alone(ward: World) -> None:
    before = ward.content()
    newest = [file.ref for file in clinic.manifest(ward, 2).files]
    for ends in (newest, newest[:1], [], ["9/train-000/index"]):
        status = ward.ask("olga", "POST", "/v1/datasets/clinic/endings", ending(3, ends)).status_code
        assert status in (400, 409)
    assert ward.content() == before


# ---- of another owner


def test_nobody_touches_the_dataset_of_another(ward: World) -> None:
    made = clinic.following(ward, 2, "append")
    clinic.added(made)
    erasing = clinic.following(ward, 2, "erase")
    ends = clinic.resealed(erasing, SHARD, 1)
    for path, body in (
        ("", clinic.signed(ward, made, signer="otto")),
        ("", clinic.signed(ward, erasing, ends, signer="otto")),
        ("/clinic/openings", receiver() | {"purpose": "erase"}),
        ("/clinic/openings", receiver() | {"purpose": "rectify", "files": ends}),
        ("/clinic/sealing", receiver() | {"kind": "append", "region": "eu"}),
        ("/clinic/endings", ending(3, ends)),
        ("/clinic/versions/1/expiry", {"early": True}),
    ):
        for name in ("otto", "ed", "operator", "sofia"):
            with ward.still("denied"):
                assert ward.refused(403, name, "POST", "/v1/datasets" + path, body) == "PermissionDeniedError"


def test_what_another_owner_signed_does_not_count(ward: World) -> None:
    made = clinic.following(ward, 2, "append")
    clinic.added(made)
    assert ward.refused(422, "olga", "POST", "/v1/datasets", clinic.signed(ward, made, signer="otto"))


def test_who_asked_for_a_name_first_has_no_keys_of_who_takes_it(world: World) -> None:
    def keys_of(name: str) -> Any:
        one_time = OneTimeKey.generate()
        body = {"public_key": b64(one_time.public), "kind": "seal", "region": "eu"}
        answer = world.post(name, "/v1/datasets/clinic/sealing", body)
        return opened_keys(one_time, answer["sealed"], "clinic", answer["version"])[0]

    early, own = keys_of("otto"), keys_of("olga")
    clinic.seal(world)
    later = keys_of("olga")
    assert (own.index, own.pseudonym) == (later.index, later.pseudonym)
    assert len({early.index, early.pseudonym, own.index, own.pseudonym}) == 4


# ---- again, at once, too often, too much


def test_what_was_registered_once_is_not_taken_again(world: World) -> None:
    clinic.seal(world)
    made = clinic.following(world, 1, "append")
    clinic.added(made)
    sent = clinic.signed(world, made)
    world.post("olga", "/v1/datasets", sent)
    with world.still():
        assert world.refused(409, "olga", "POST", "/v1/datasets", sent) == "ConflictError"
    made = clinic.following(world, 1, "append")  # of the version before, under the next number
    made["version"] = 3
    clinic.added(made)
    with world.still():
        assert world.refused(409, "olga", "POST", "/v1/datasets", clinic.signed(world, made)) == "ConflictError"


def test_a_version_that_ended_is_not_built_upon_or_opened(world: World) -> None:
    clinic.seal(world)
    made = clinic.following(world, 1, "append")
    clinic.added(made)
    gone = [file.ref for file in clinic.manifest(world, 1).files]
    clinic.erase_person(world, 7)
    made["version"] = 3
    for file in made["files"]:
        file["sealed_in"] = 3 if file["shard"] == "train-900" else 1
    assert world.ask("olga", "POST", "/v1/datasets", clinic.signed(world, made)).status_code == 409
    body = receiver() | {"purpose": "erase", "files": gone}
    assert world.refused(400, "olga", "POST", "/v1/datasets/clinic/openings", body) == "InputError"


def test_of_an_older_version_whole_shards_end_and_of_none_that_is_live_nothing_follows(world: World) -> None:
    clinic.seal(world)
    clinic.seal(world)
    shard = [file.ref for file in clinic.manifest(world, 1).files if file.shard == SHARD]
    with world.still():
        body = ending(3, shard[:1])
        assert world.refused(400, "olga", "POST", "/v1/datasets/clinic/endings", body) == "InputError"
    world.post("olga", "/v1/datasets/clinic/endings", ending(3, shard))
    made = clinic.following(world, 2, "append")
    clinic.added(made)
    clinic.later(world, 366 * 6)
    world.authority.retention.once()
    assert set(clinic.states(world).values()) == {"ended"}
    with world.still():
        assert world.refused(404, "olga", "POST", "/v1/datasets", clinic.signed(world, made)) == "NotFoundError"


def test_no_lease_is_granted_after_an_erasure_that_it_races(world: World) -> None:
    clinic.seal(world, unit="row")
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 90.0, "delta": 2e-3})
    spec = {"dataset": "clinic@1", "label": "ill"}
    training = {"epochs": 2, "expected_batch_size": 16, "learning_rate": 0.01}
    started = [world.submit(name=f"race-{number}", training=training, **spec) for number in range(6)]
    answers: dict[tuple[str, int], int] = {}
    go = threading.Barrier(len(started) + 1)

    def lease(run: str) -> None:
        go.wait()
        for rank in (0, 1):
            answer = world.http.post(
                f"/v1/runs/{run}/leases", json=lease_body(rank), headers={"Authorization": f"Bearer {tokens[run]}"}
            )
            answers[run, rank] = answer.status_code

    tokens = {run: world.token(run) for run in started}
    for run in started:
        world.attempt(run)
    threads = [threading.Thread(target=lease, args=(run,)) for run in started]
    for thread in threads:
        thread.start()
    go.wait()
    clinic.erase_person(world, 7)
    for thread in threads:
        thread.join()
    assert set(answers.values()) <= {200, 409}
    log = world.log()
    erased = next(i for i, entry in enumerate(log) if (entry.action, entry.outcome) == ("dataset:erase", "success"))
    granted = [i for i, entry in enumerate(log) if (entry.action, entry.outcome) == ("run:lease", "success")]
    assert len(granted) == list(answers.values()).count(200)
    assert all(index < erased for index in granted)
    for run in started:
        assert world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body(1)).status_code == 409


def test_registering_and_asking_for_keys_is_limited_for_each_caller(world: World) -> None:
    world.reopen(seals_per_minute=3)
    ask = receiver() | {"kind": "seal", "region": "eu"}
    for _ in range(3):
        assert world.ask("olga", "POST", "/v1/datasets/adult/sealing", ask).status_code == 200
    for path in ("", "/adult/sealing", "/adult/openings", "/adult/endings"):
        answer = world.ask("olga", "POST", "/v1/datasets" + path, {})
        assert (answer.status_code, answer.json()["kind"]) == (429, "QuotaExceededError")
        assert 1 <= int(answer.headers["Retry-After"]) <= 61
    assert world.ask("otto", "POST", "/v1/datasets/other/sealing", ask).status_code == 200
    assert world.get("olga", "/v1/datasets")


def test_a_manifest_beyond_the_bound_is_refused_before_it_is_read(ward: World) -> None:
    headers = {"Authorization": f"Bearer {ward.token('olga')}", "Content-Length": str(100 * 1024 * 1024 + 1)}
    assert ward.http.request("POST", "/v1/datasets", content=b"{}", headers=headers).status_code == 413


# ---- region


def test_a_lease_from_a_node_of_another_region_is_refused(world: World) -> None:
    run = world.submit()
    with world.over(world.register_node("node-us", "us")), world.still("denied"):
        assert world.refused(403, run, "POST", f"/v1/runs/{run}/leases", lease_body()) == "PermissionDeniedError"
    assert world.lease(run).keys


def test_an_owner_on_a_node_of_another_region_gets_no_keys(world: World) -> None:
    clinic.seal(world)
    requests = [("openings", receiver() | {"purpose": "erase"}),
                ("sealing", receiver() | {"kind": "append", "region": "eu"})]  # fmt: skip
    abroad = world.register_node("node-us", "us")
    for path, body in requests:
        with world.over(abroad), world.still("denied"):
            assert world.refused(403, "olga", "POST", f"/v1/datasets/clinic/{path}", body) == "PermissionDeniedError"
        with world.over(world.certificate_of(NODE)):
            world.post("olga", f"/v1/datasets/clinic/{path}", body)


def test_a_region_without_a_store_is_refused(world: World, tmp_path: Any) -> None:
    store = tmp_path / "eu"
    store.mkdir()
    world.reopen(blobs={"eu": store.as_uri()})
    ask = receiver() | {"kind": "seal", "region": "us"}
    with world.still():
        assert world.refused(400, "olga", "POST", "/v1/datasets/clinic/sealing", ask) == "InputError"
    with pytest.raises(CloisterError, match="no blob store for the region 'us'"):
        clinic.seal(world, region="us")
    clinic.seal(world)
    made = clinic.facts(world, 1) | {"version": 2}
    made["dataset_schema"]["region"] = "us"
    for file in made["files"]:
        file |= {"sealed_in": 2, "path": file["path"] + ".2"}
    assert world.refused(400, "olga", "POST", "/v1/datasets", clinic.signed(world, made)) == "InputError"
    assert world.refused(400, "olga", "POST", "/v1/datasets/clinic/sealing", ask | {"kind": "append"}) == "InputError"
