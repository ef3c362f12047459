"""Somebody registers a dataset that is not what it says, or not theirs; or the authority dies halfway."""

from __future__ import annotations

import re
from typing import Any

import pytest

from authority_world import CODE, Person, World, adult_schema, receiver
from cloister.canonical import b64, canonical_json, unb64
from cloister.datasets.manifest import MANIFEST_PREDICATE, DatasetManifest
from cloister.errors import CloisterError, PermissionDeniedError
from cloister.privacy.spec import MIN_DELTA
from cloister.rounding import most_rows
from cloister.sealing import purposes
from cloister.sealing.envelope import new_key
from cloister.sealing.lease import seal_to
from cloister.signing import dsse

OTHER = {"name": "other"}


def manifest(name: str = "other", version: int = 1, shards: int = 2) -> dict[str, Any]:
    """A true manifest of a dataset whose files nobody wrote: registering reads no blob."""
    schema = adult_schema(name=name)
    files = [
        {"shard": shard, "sealed_in": version, "role": "holdout" if shard == "holdout" else "train", "part": part,
         "rows": 100, "columns": list(schema.stored_columns(part)),
         "path": f"datasets/{name}/{version}/{shard}.{part}", "bytes": 10, "sha256": "0" * 64}
        for shard in [f"train-{index:03d}" for index in range(shards)] + ["holdout"]
        for part in schema.parts()
    ]  # fmt: skip
    lineage = {"kind": "seal", "parents": [], "code": CODE, "rows_before": 0, "rows_after": 100 * (shards + 1)}
    return {"format": "cloister.dev/dataset/v2", "name": name, "version": version,
            "dataset_schema": schema.to_dict(), "files": files, "lineage": lineage}  # fmt: skip


def asked(kind: str, region: str = "eu") -> dict[str, Any]:
    return receiver() | {"kind": kind, "region": region}


def body(
    world: World, facts: dict[str, Any], *, signer: Person | None = None, keys: Any = None, **changes: Any
) -> dict[str, Any]:
    """What the owner's machine sends; `changes` name another signed digest, another `sealed_for` or `receiver`."""
    try:
        digest = DatasetManifest.model_validate(facts).digest
    except ValueError:
        digest = "sha256:" + "0" * 64
    if keys is None:
        keys = {f"{file['shard']}/{file['part']}": b64(new_key()) for file in facts["files"]
                if file["sealed_in"] == facts["version"]}  # fmt: skip
    plain = keys if isinstance(keys, bytes) else canonical_json(keys)
    subject = changes.get("signed_digest", digest.removeprefix("sha256:"))
    statement = dsse.statement(facts["name"], subject, changes.get("predicate", MANIFEST_PREDICATE), facts)
    sealed = seal_to(world.authority.receiving_public, plain, purposes.data_keys(changes.get("sealed_for", digest)))
    return {"envelope": dsse.sign(statement, (signer or world.people["olga"]).key), "sealed_keys": b64(sealed)}


def test_a_true_version_is_taken_whole_and_on_record(world: World) -> None:
    with world.recorded("olga", "dataset:seal"):
        assert world.post("olga", "/v1/datasets", body(world, manifest()))["dataset"] == "other@1"
    assert world.counts()["datasets"] == 2
    entry = world.log()[-1]
    assert (entry.resource, entry.details["rows"]) == ("Dataset/other@1", 200)


@pytest.mark.parametrize("version", [1, 3, 7])
def test_a_taken_or_skipped_version_is_a_conflict(calm_world: World, version: int) -> None:
    with calm_world.still():
        assert calm_world.refused(409, "olga", "POST", "/v1/datasets", body(calm_world, manifest("adult", version)))


def test_a_manifest_signed_with_another_key_is_refused(calm_world: World) -> None:
    for signer in (Person("olga", []), calm_world.people["otto"]):
        with calm_world.still():
            calm_world.refused(422, "olga", "POST", "/v1/datasets", body(calm_world, manifest(), signer=signer))


def test_an_edited_manifest_is_refused(calm_world: World) -> None:
    sent = body(calm_world, manifest())
    payload = unb64(sent["envelope"]["payload"])
    sent["envelope"]["payload"] = b64(payload.replace(b'"rows":100', b'"rows":900'))
    with calm_world.still():
        calm_world.refused(422, "olga", "POST", "/v1/datasets", sent)


def test_a_signed_digest_of_another_manifest_is_refused(calm_world: World) -> None:
    with calm_world.still():
        calm_world.refused(422, "olga", "POST", "/v1/datasets", body(calm_world, manifest(), signed_digest="1" * 64))


def test_a_signed_statement_of_another_kind_is_refused(calm_world: World) -> None:
    sent = body(calm_world, manifest(), predicate="https://cloister.dev/approval/v1")
    with calm_world.still():
        calm_world.refused(422, "olga", "POST", "/v1/datasets", sent)


def key_names() -> list[str]:
    return [f"{file['shard']}/{file['part']}" for file in manifest()["files"]]


GOOD = {name: b64(new_key()) for name in key_names()}
FIRST = key_names()[0]


@pytest.mark.parametrize(
    "keys",
    [
        {name: key for name, key in GOOD.items() if name != FIRST},
        GOOD | {"train-009/internal": b64(new_key())},
        dict.fromkeys(GOOD, b64(new_key())),
        GOOD | {FIRST: b64(b"short")},
        GOOD | {FIRST: "***"},
        GOOD | {FIRST: 7},
        GOOD | {FIRST: None},
        {},
        [1],
        b"not json",
        b'{"a": "b", "a": "c"}',
        canonical_json(GOOD)[:-1] + b',"%s":"%s"}' % (FIRST.encode(), b64(new_key()).encode()),
    ],
)
def test_keys_that_are_not_one_for_each_file_are_refused(calm_world: World, keys: Any) -> None:
    with calm_world.still():
        answer = calm_world.ask("olga", "POST", "/v1/datasets", body(calm_world, manifest(), keys=keys))
    assert answer.status_code in (400, 422)
    assert not any(key in answer.text for key in GOOD.values())


def test_keys_sealed_for_another_manifest_are_refused(calm_world: World) -> None:
    with calm_world.still():
        calm_world.refused(
            422, "olga", "POST", "/v1/datasets", body(calm_world, manifest(), sealed_for="sha256:" + "1" * 64)
        )
    stolen = body(calm_world, manifest())["sealed_keys"]
    with calm_world.still():
        sent = body(calm_world, manifest(version=1, shards=3)) | {"sealed_keys": stolen}
        calm_world.refused(422, "olga", "POST", "/v1/datasets", sent)


def test_nobody_seals_the_next_version_of_anothers_dataset(calm_world: World) -> None:
    with calm_world.still("denied"):
        sent = body(calm_world, manifest("adult", 2), signer=calm_world.people["otto"])
        calm_world.refused(403, "otto", "POST", "/v1/datasets", sent)
    with calm_world.still("denied"):
        calm_world.refused(403, "otto", "POST", "/v1/datasets/adult/sealing", asked("seal"))
    with calm_world.still("denied"):
        calm_world.refused(403, "otto", "POST", "/v1/datasets/adult/openings", receiver() | {"purpose": "erase"})
    with calm_world.still("denied"):
        calm_world.refused(403, "otto", "PUT", "/v1/datasets/adult/budget", {"epsilon": 50.0, "delta": 1e-3})


def contradictions() -> list[dict[str, Any]]:
    """Manifests that an owner may sign, but that would make a lease or a plan wrong."""
    wrong = []
    for change in (
        {"part": "public"},  # a file in a class without columns
        {"part": "index"},
        {"columns": ["race", "sex"]},  # restricted columns in a file of another class
        {"columns": ["age", "race"]},
        {"rows": 50},  # fewer rows than its sister files
        {"role": "holdout"},
        {"path": "models/run-1/model.onnx.sealed"},
        {"path": "datasets/adult/1/stolen"},
        {"path": "datasets/other/../adult/x"},
        {"path": "/etc/passwd"},
    ):
        facts = manifest()
        facts["files"][0] |= change
        wrong.append(facts)
    wrong.append(manifest() | {"files": manifest()["files"][1:]})
    wrong.append(manifest() | {"files": [*manifest()["files"], manifest()["files"][0]]})
    wrong.append(manifest() | {"files": [file | {"rows": 0} for file in manifest()["files"]]})
    wrong.append(manifest() | {"files": [file for file in manifest()["files"] if file["role"] == "holdout"]})
    wrong.append(manifest() | {"dataset_schema": adult_schema(name="third").to_dict()})
    wrong.append(manifest() | {"dataset_schema": {"name": "other"}})
    wrong.append(manifest() | {"name": "Other"})
    return wrong


@pytest.mark.parametrize("facts", contradictions())
def test_a_manifest_that_contradicts_itself_is_refused(calm_world: World, facts: dict[str, Any]) -> None:
    with calm_world.still():
        calm_world.refused(400, "olga", "POST", "/v1/datasets", body(calm_world, facts))


def test_a_deeply_nested_manifest_is_no_fault(calm_world: World) -> None:
    deep: dict[str, Any] = {}
    for _ in range(150):
        deep = {"a": deep}
    with calm_world.still():
        calm_world.refused(400, "olga", "POST", "/v1/datasets", body(calm_world, manifest() | {"dataset_schema": deep}))


def test_a_crash_between_two_writes_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: Any) -> list[bytes]:
        raise OSError("the machine is on fire")

    sent = body(world, manifest())
    monkeypatch.setattr(world.authority._key_service, "wrap", dying)
    register = world.authority.registration.register
    with world.still(), pytest.raises(OSError, match="on fire"):
        register(world.caller("olga"), sent["envelope"], unb64(sent["sealed_keys"]), [], None)
    assert world.log()[-1].reason == "OSError"
    monkeypatch.undo()
    world.post("olga", "/v1/datasets", sent)


def test_an_action_that_asks_no_policy_does_nothing(calm_world: World) -> None:
    with calm_world.still("denied"), pytest.raises(PermissionDeniedError), \
            calm_world.authority.core.action(calm_world.caller("olga"), "dataset:seal") as act:  # fmt: skip
        act.connection.exec_driver_sql("DELETE FROM budgets")


def test_a_refused_seal_leaves_no_blob(calm_world: World) -> None:
    blobs = calm_world.authority.stores.for_region("eu")
    before = sorted(blobs.root.rglob("*"))
    with pytest.raises(CloisterError):
        calm_world.seal("otto")
    assert sorted(blobs.root.rglob("*")) == before


def test_the_authority_keeps_no_data_key_in_clear(world: World) -> None:
    keys = {name: new_key() for name in key_names()}
    sent = body(world, manifest(), keys={name: b64(key) for name, key in keys.items()})
    world.post("olga", "/v1/datasets", sent)
    files = b"".join(file.read_bytes() for file in world.directory.rglob("*") if file.is_file())
    for key in keys.values():
        assert key not in files
        assert b64(key).encode() not in files


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ((0.0, 1e-5), "epsilon 0 is not above 0"),
        ((-1.0, 1e-5), "epsilon -1 is not above 0"),
        ((101.0, 1e-5), "epsilon 101 is above the most that a budget has, 100"),
        ((1e9, 1e-5), "epsilon 1e+09 is above the most that a budget has, 100"),
        ((1.0, 0.0), "delta 0 is below the least that a budget has, 2e-10"),
        ((1.0, 5e-324), "below the least that a budget has, 2e-10"),  # half of it is nothing at all
        ((1.0, 1.9e-10), "delta 1.9e-10 is below the least"),
        ((1.0, 0.5), "delta 0.5 is not below 0.01"),
    ],
)
def test_a_budget_outside_its_range_is_refused(calm_world: World, budget: tuple[float, float], said: str) -> None:
    with calm_world.still():
        sent = dict(zip(("epsilon", "delta"), budget, strict=True))
        answer = calm_world.ask("olga", "PUT", "/v1/datasets/adult/budget", sent)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_budget_has_the_least_delta_of_which_a_run_can_use_half(world: World) -> None:
    world.set_budget(1.0, 2e-10)
    assert world.budget()["delta_of_each_rule"] == MIN_DELTA


def test_a_budgets_delta_protects_each_row(world: World) -> None:
    """With delta 1/rows a run may publish a row outright, and is (0, delta)-private."""
    (listed,) = world.get("olga", "/v1/datasets")
    limit = 1 / listed["rows"]
    answer = world.ask("olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 3.0, "delta": limit})
    assert answer.status_code == 400
    assert "row outright" in answer.json()["error"]
    most = most_rows(320) + most_rows(80)  # of any table that publishes so many rows
    answer = world.ask("olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 3.0, "delta": 1 / most})
    assert answer.status_code == 400
    world.set_budget(3.0, 0.99 / most)


def test_a_budget_beyond_all_reason_does_not_even_reach_policy(calm_world: World) -> None:
    with calm_world.still(entries=0):
        calm_world.refused(400, "olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 1e308, "delta": 1e-5})


def test_a_budget_is_not_lowered_below_what_is_held(world: World) -> None:
    world.submit()
    with world.still():
        assert world.refused(
            409, "olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 2.9, "delta": 1e-4}
        ) == "BudgetError"  # fmt: skip
    world.set_budget(3.0, 2e-5)
    assert world.budget()["epsilon_left"] == 0


def test_with_a_smaller_delta_more_epsilon_is_spent_and_it_is_told_how_much(world: World) -> None:
    world.submit()
    path, delta = "/v1/datasets/adult/budget", 1.5e-5  # half of which does not hold the run's 1e-5
    with world.still():
        answer = world.ask("olga", "PUT", path, {"epsilon": 3.0, "delta": delta})
    assert "at delta 1.5e-05, runs have spent or hold epsilon " in answer.json()["error"]
    (enough,) = re.findall(r"choose at least --epsilon ([0-9]+\.[0-9]{2})$", answer.json()["hint"])
    assert float(enough) > 3.0
    with world.still():
        assert world.refused(409, "olga", "PUT", path, {"epsilon": float(enough) - 0.01, "delta": delta})
    world.set_budget(float(enough), delta)
    assert 0 <= world.budget()["epsilon_left"] < 0.01
