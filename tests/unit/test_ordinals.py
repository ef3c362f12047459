"""Rows are numbered within their units, and a run that may use few rows of each uses those with the lowest numbers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clinic
from authority_world import CODE, Person, World, training_spec
from cloister.authority.costs import used_of_unit
from cloister.canonical import unb64
from cloister.cli import output
from cloister.cli.train import _noise
from cloister.client import seal as sealing
from cloister.datasets import ordinals
from cloister.datasets.manifest import DatasetManifest
from cloister.datasets.ordinals import Ordinals, number_units, ordinal_table, read_ordinals, within_units
from cloister.datasets.schema import ORDINAL, ORDINAL_COLUMN, DatasetSchema
from cloister.datasets.subjects import TAG_BYTES, Tags
from cloister.errors import InputError, IntegrityError
from cloister.privacy.plan import make_plan
from cloister.privacy.spec import TrainingSpec
from cloister.sealing.shard import open_table, seal_table
from cloister.training.rows import Rows

MOST, CAP, PATIENTS = 8, 3, 40
SCHEMA: dict[str, Any] = {
    "unit": {"column": "patient", "max_rows": MOST},
    "columns": [*clinic.SCHEMA["columns"],  # type: ignore[misc]  # a list
                {"name": "visit", "type": "integer", "class": "confidential", "bounds": [0, 9999]}],
}  # fmt: skip
NONE = np.empty(0, np.uint64), np.empty(0, np.int16)


def visits(numbers: dict[int, int], first: int = 0) -> bytes:
    """So many visits of each patient, by number; each has a number too, from `first` on, and patients take turns."""
    turns = [each for turn in range(MOST + 1) for each, many in numbers.items() if turn < many]
    lines = [f"{clinic.person(each)},{each},kiel,no,{first + visit}" for visit, each in enumerate(turns)]
    return "\n".join(["patient,age,city,ill,visit", *lines]).encode() + b"\n"


SOME = {number: number % MOST + 1 for number in range(PATIENTS)}


def spec(cap: int | None, **changes: Any) -> dict[str, Any]:
    """Features are the patient and the visit."""
    privacy = {"epsilon": 3.0, "delta": 1e-3} | ({} if cap is None else {"rows_per_unit": cap})
    return {
        "name": "clinic", "dataset": "clinic@1", "label": "ill", "features": ["age", "visit"], "privacy": privacy,
        "training": {"epochs": 2, "expected_batch_size": 16, "learning_rate": 0.1},
        "resources": {"workers": 2, "region": "eu"},
    } | changes  # fmt: skip


@pytest.fixture
def seen(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A clinic whose patients have 1 to 8 visits each, in several blocks."""
    monkeypatch.setattr(sealing, "BLOCK_BYTES", 2_000)
    clinic.seal(world, visits(SOME), shards=2, **SCHEMA)
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 9.0, "delta": 4e-3})
    return world


def numbered(world: World, version: int) -> dict[int, tuple[int, int]]:
    """Patient and ordinal of each visit of a version."""
    rows = clinic.open_all(world, version)
    names = ("visit", "age", ORDINAL_COLUMN)
    return {visit: (age, ordinal) for visit, age, ordinal in zip(*(rows[name].to_pylist() for name in names))}  # noqa: B905


def require_distinct(found: dict[int, tuple[int, int]]) -> None:
    """Each patient's visits have the numbers 0, 1, 2 and so on."""
    patients = Counter(age for age, _ in found.values())
    for patient, many in patients.items():
        assert sorted(ordinal for age, ordinal in found.values() if age == patient) == list(range(many))


# ---- numbers ----


def words(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, number, dtype=np.uint64)


def by_loop(units: np.ndarray, drawn: np.ndarray, units_before: np.ndarray, before: Ordinals) -> list[int]:
    """The same, one row after the other."""
    made = [0] * len(units)
    for unit in set(units.tolist()):
        after = max((int(each) + 1 for each, of in zip(before, units_before, strict=True) if of == unit), default=0)
        mine = sorted(np.flatnonzero(units == unit), key=lambda row: int(drawn[row]))
        for place, row in enumerate(mine):
            made[row] = after + place
    return made


@settings(max_examples=60, deadline=None)
@given(
    new=st.lists(st.integers(0, 9), max_size=40), known=st.lists(st.integers(0, 12), max_size=40),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_of_a_unit_are_numbered_in_a_drawn_order_after_those_that_are_there(
    new: list[int], known: list[int], seed: int
) -> None:
    units, before = np.array(new, np.uint64), np.array(known, np.uint64)
    there = within_units(before, words(len(known), seed + 1), *NONE)
    drawn = words(len(new), seed)
    made = within_units(units, drawn, before, there)
    assert made.tolist() == by_loop(units, drawn, before, there)
    both = sorted(zip([*new, *known], [*made.tolist(), *there.tolist()], strict=True))
    assert both == [(unit, place) for unit, many in sorted(Counter([*new, *known]).items()) for place in range(many)]


@pytest.mark.parametrize("unit", range(12))
def test_a_unit_more_or_less_changes_no_others_numbers(unit: int) -> None:
    """Whatever random numbers its own rows got: those of others are the same, so are their ordinals."""
    units = np.random.default_rng(5).integers(0, 12, 400).astype(np.uint64)
    drawn, before = words(400), units[:100]
    there = within_units(before, words(100, 7), *NONE)
    everybody = within_units(units, drawn, before, there)
    others, earlier = units != unit, before != unit
    without = within_units(units[others], drawn[others], before[earlier], there[earlier])
    assert np.array_equal(everybody[others], without)
    for cap in (1, 3, 1000):
        gone = set(np.flatnonzero(everybody < cap)) - set(np.flatnonzero(others)[without < cap])
        assert len(gone) <= min(cap, int((units == unit).sum()))


def test_which_row_comes_first_is_chance() -> None:
    units = np.repeat(np.arange(4000, dtype=np.uint64), 4)
    first = within_units(units, sealing._secret_words(len(units)), *NONE).reshape(-1, 4)
    counts = (first == 0).sum(0)
    assert (abs(counts - 1000) < 6 * (4000 * 0.25 * 0.75) ** 0.5).all(), "each row of four comes first as often"


@pytest.mark.parametrize("slice_rows", [7, 50, 10_000])
def test_slices_number_all_rows_of_all_shards_once(monkeypatch: pytest.MonkeyPatch, slice_rows: int) -> None:
    monkeypatch.setattr(ordinals, "SLICE_ROWS", slice_rows)
    random = np.random.default_rng(3)

    def tags(rows: int) -> Tags:
        return np.array([bytes([each * 7]) * TAG_BYTES for each in random.integers(0, 30, rows)], f"V{TAG_BYTES}")

    shards, old = [tags(rows) for rows in (40, 0, 1, 80)], [tags(60)]
    (there,) = number_units([(60, lambda: old[0])], [], words)
    made = number_units(
        [(len(each), lambda each=each: each) for each in shards], [(60, lambda: (old[0], there))], words
    )  # type: ignore[misc]  # a default is how a lambda keeps its own shard
    assert [len(each) for each in made] == [40, 0, 1, 80]
    both = Counter(
        (tag.tobytes(), int(ordinal))
        for shard, numbers in zip([*shards, *old], [*made, there], strict=True)
        for tag, ordinal in zip(shard, numbers, strict=True)
    )
    assert set(both.values()) == {1}
    people = Counter(tag for tag, _ in both)
    assert set(both) == {(tag, place) for tag, many in people.items() for place in range(many)}


def test_ordinals_are_sealed_and_read_back_row_by_row() -> None:
    numbers = np.array([2, 0, 9_999, 1], np.int16)
    table = ordinal_table(numbers)
    sealed = open_table(seal_table(table, bytes(32), b"a"), bytes(32), b"a")
    assert read_ordinals(sealed).tolist() == numbers.tolist()
    gaps = pa.table({ORDINAL_COLUMN: pa.array([1, None], pa.int16())})
    negative = ordinal_table(np.array([0, -1], np.int16))
    for wrong in (sealed.rename_columns(["ordinal"]), pa.table({ORDINAL_COLUMN: [1]}), pa.table({}), gaps, negative):
        with pytest.raises(InputError, match="not the ordinals"):
            read_ordinals(wrong)


def test_no_column_of_a_schema_is_named_as_the_ordinals() -> None:
    own = {"name": ORDINAL_COLUMN, "type": "integer", "class": "internal", "bounds": [0, 9]}
    with pytest.raises(InputError, match=r"schema is not valid: columns\.5\.name"):
        clinic.schema(columns=[*SCHEMA["columns"], own])
    allowed = own | {"name": "ordinal"}
    parts = clinic.schema(columns=[*SCHEMA["columns"], allowed]).parts(numbered=True)
    assert parts == ("internal", "confidential", "restricted", "index", ORDINAL)
    assert ORDINAL not in clinic.schema(unit="row").parts(numbered=True)


# ---- what a run uses ----


def used(world: World, run: str) -> dict[str, Counter[float]]:
    """How many rows of each patient the ranks use, by role; a patient's number is scaled, which keeps it apart."""
    rows: dict[str, list[float]] = {"train": [], "holdout": []}
    for rank in range(2):
        lease = world.lease(run, rank)
        for role in ("train", "holdout")[: 2 if rank == 0 else 1]:
            opened = Rows(lease).load(role)
            assert len(opened.x) == len(opened.y) == sum(many for _, many in opened.shards)
            rows[role] += opened.x[:, 0].tolist()
    return {role: Counter(each) for role, each in rows.items()}


def test_a_run_uses_no_more_rows_of_a_unit_than_its_cap_over_all_shards_ranks_and_roles(seen: World) -> None:
    capped, whole = used(seen, seen.submit(**spec(CAP))), used(seen, seen.submit(**spec(None)))
    assert not capped["train"].keys() & capped["holdout"].keys()
    assert capped["train"]
    assert capped["holdout"]
    for role in ("train", "holdout"):
        assert max(whole[role].values()) > CAP
        assert capped[role] == {patient: min(CAP, many) for patient, many in whole[role].items()}
    assert sorted((whole["train"] + whole["holdout"]).values()) == sorted(SOME.values()), "without a cap, all rows"
    listed = clinic.manifest(seen, 1)
    assert sum(whole["train"].values()) == listed.rows("train")


def test_the_ordinals_are_opened_only_where_rows_are_left_out(seen: World) -> None:
    for cap, opened in ((None, False), (MOST, False), (CAP, True)):
        keys = seen.lease(seen.submit(**spec(cap))).keys
        assert any(ref.endswith(f"/{ORDINAL}") for ref in keys) == opened
        assert not any(ref.endswith("/index") for ref in keys)


def test_a_lease_that_lacks_ordinals_or_has_another_plan_trains_on_no_row_too_many(seen: World) -> None:
    lease = seen.lease(seen.submit(**spec(CAP)))
    some = {ref: key for ref, key in lease.keys.items() if not ref.endswith(f"/{ORDINAL}")}
    with pytest.raises(IntegrityError, match="no ordinals"):
        Rows(replace(lease, keys=some)).load("train")
    fewer = Rows(replace(lease, plan=lease.plan | {"rows_per_unit": 1})).load("train")
    assert max(Counter(fewer.x[:, 0].tolist()).values()) == 1, "the plan's noise decides"


# ---- versions ----


def test_what_is_appended_gets_numbers_that_its_units_do_not_have(seen: World) -> None:
    before = numbered(seen, 1)
    require_distinct(before)
    more = {number: 1 + number % 2 for number in range(PATIENTS) if SOME[number] <= MOST - 2} | {90: 5}
    clinic.append(seen, visits(more, first=5000), **SCHEMA)
    after = numbered(seen, 2)
    require_distinct(after)
    assert before.items() <= after.items(), "who is there keeps theirs"
    assert len(after) == len(before) + sum(more.values())


def test_erasing_and_correcting_change_no_other_number(seen: World) -> None:
    before = numbered(seen, 1)
    clinic.rectify_person(seen, 15, city="bonn")
    assert numbered(seen, 2) == before
    clinic.erase_person(seen, 7)
    erased = numbered(seen, 3)
    assert erased == {visit: each for visit, each in before.items() if each[0] != 7}
    clinic.append(seen, visits({7: 4, 8: 1 if SOME[8] < MOST else 0}, first=6000), **SCHEMA)
    require_distinct(numbered(seen, 4))


def test_a_version_has_all_ordinals_or_none(seen: World) -> None:
    made = clinic.following(seen, 1, "append")
    clinic.added(made)
    made["files"] = [file for file in made["files"] if (file["shard"], file["part"]) != ("train-900", ORDINAL)]
    answer = seen.ask("olga", "POST", "/v1/datasets", clinic.signed(seen, made))
    assert (answer.status_code, answer.json()["error"]) == (400, "the files of a shard do not fit together")
    assert clinic.states(seen) == {"clinic@1": "live"}
    made = clinic.following(seen, 1, "append")
    clinic.added(made)
    assert seen.ask("olga", "POST", "/v1/datasets", clinic.signed(seen, made)).status_code == 200


@pytest.fixture
def old(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A clinic that was sealed before rows were numbered."""
    with monkeypatch.context() as patch:
        patch.setattr(sealing, "_ordinals", lambda *_: iter(()))
        clinic.seal(world, visits(SOME), shards=2, **SCHEMA)
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 9.0, "delta": 4e-3})
    return world


def test_of_what_was_sealed_before_there_were_ordinals_all_rows_are_used(old: World) -> None:
    clinic.append(old, visits({90: 3}, first=5000), **SCHEMA)
    clinic.rectify_person(old, 15, city="bonn")
    clinic.erase_person(old, 7)
    listed = clinic.manifest(old, 4)
    assert not listed.numbered
    assert DatasetManifest.parse(listed.model_dump(mode="json")) == listed
    answer = old.ask("ed", "POST", "/v1/plans", {"spec": training_spec(**spec(CAP, dataset="clinic@4"))})
    assert answer.status_code == 400
    assert "clinic@4 was sealed without ordinals" in answer.json()["error"]
    assert "seal it again" in answer.json()["hint"]
    for cap in (None, MOST):
        found = used(old, old.submit(**spec(cap, dataset="clinic@4")))
        assert sum((found["train"] + found["holdout"]).values()) == listed.all_rows


# ---- what is planned, approved and told ----


@pytest.mark.parametrize(
    ("unit", "cap", "said"),
    [
        (SCHEMA["unit"], MOST + 1, "privacy.rows_per_unit is 9, and a unit of clinic@1 has at most 8 rows"),
        ("row", 2, "privacy.rows_per_unit is 2, and the unit of clinic@1 is a row"),
        (SCHEMA["unit"], 0, "privacy.rows_per_unit"),
        (SCHEMA["unit"], -1, "privacy.rows_per_unit"),
        (SCHEMA["unit"], 2.5, "privacy.rows_per_unit"),
    ],
)
def test_a_cap_that_no_unit_has_is_refused_by_name(unit: Any, cap: Any, said: str) -> None:
    schema = clinic.schema(**SCHEMA | {"unit": unit})
    manifest = manifest_of(schema)
    with pytest.raises(InputError) as refused:
        used_of_unit(TrainingSpec.parse(training_spec(**spec(cap))), manifest)
    assert said in refused.value.message
    assert refused.value.hint


def manifest_of(schema: DatasetSchema) -> DatasetManifest:
    files = [
        {"shard": "train-000", "sealed_in": 1, "role": "train", "part": part, "rows": 500, "path": f"{part}",
         "columns": schema.stored_columns(part), "bytes": 1, "sha256": "0" * 64}
        for part in schema.parts(numbered=True)
    ]  # fmt: skip
    lineage = {"kind": "seal", "code": CODE, "rows_before": 0, "rows_after": 500}
    return DatasetManifest.parse({"name": "clinic", "version": 1, "dataset_schema": schema.to_dict(), "files": files,
                                  "lineage": lineage})  # fmt: skip


def test_a_cap_that_changes_nothing_is_taken() -> None:
    by_row, by_patient = manifest_of(clinic.schema(**SCHEMA | {"unit": "row"})), manifest_of(clinic.schema(**SCHEMA))
    assert used_of_unit(TrainingSpec.parse(training_spec(**spec(1))), by_row) == 1
    for cap, most in ((None, MOST), (MOST, MOST), (1, 1)):
        assert used_of_unit(TrainingSpec.parse(training_spec(**spec(cap))), by_patient) == most


def test_the_noise_falls_about_in_proportion_to_the_rows_that_are_used() -> None:
    plans = [
        make_plan(epsilon=3.0, delta=1e-5, max_grad_norm=1.0, epochs=20, expected_batch_size=1024, rows=26_049,
                  rows_per_unit=rows)
        for rows in (32, 8)
    ]  # fmt: skip
    ratio = plans[0].noise_multiplier / plans[1].noise_multiplier
    assert 3.2 < ratio < 4.8
    noise = [plan.evaluation(("no", "yes"), 6000).noise_of_accuracy for plan in plans]
    assert 3.5 < noise[0] / noise[1] < 4.5 or noise[0] == 1.0


def test_a_plan_says_how_many_rows_it_uses_and_so_do_approval_and_provenance(seen: World) -> None:
    plans = [seen.post("ed", "/v1/plans", {"spec": training_spec(**spec(cap))}) for cap in (CAP, None)]
    assert [shown["plan"]["rows_per_unit"] for shown in plans] == [CAP, MOST]
    assert plans[0]["plan"]["noise_multiplier"] < 0.6 * plans[1]["plan"]["noise_multiplier"]
    assert plans[0]["evaluation_noise"] < plans[1]["evaluation_noise"] or plans[1]["evaluation_noise"] == 1.0
    unit = plans[0]["unit"]
    assert output.unit(unit, CAP) == "one patient, of whose rows at most 3 of 8 are used"
    assert output.unit(unit, MOST) == output.unit(unit) == "one patient with at most 8 rows"
    told = {"unit": unit, "plan": {"rows_per_unit": 2}, "evaluation_noise": 0.031}
    assert _noise(told) == "3.1 points, or 12.4 if each patient has 8 rows"
    assert _noise(told | {"plan": {"rows_per_unit": MOST}}) == "3.1 points"
    workload = Person("new", ["run"])
    body = {"spec": training_spec(**spec(CAP)), "code_digest": CODE, "public_key": workload.public}
    request = seen.missing(seen.ask("ed", "POST", "/v1/runs", body))
    assert request["details"]["rows_per_unit"] == CAP
    assert request["details"]["spec"]["privacy"]["rows_per_unit"] == CAP
    assert seen.vote("rita", request).status_code == 200
    run = seen.post("ed", "/v1/runs", body)["run"]
    workload.name, seen.people[run] = run, workload
    lease = seen.lease(run)
    seen.commit(run, 0, lease.plan["steps"])
    facts: dict[str, Any] = {
        "name": "clinic", "dataset": "clinic@1", "label": "ill", "labels": ("no", "yes"),
        "features": ({"name": "age", "type": "integer", "class": "confidential", "bounds": [0, 120]},),
    }  # fmt: skip
    seen.post(run, f"/v1/runs/{run}/model", seen.model_body(run, lease, b"small", **facts))
    provenance = seen.get("ed", "/v1/models/clinic/versions/1")["provenance"]
    privacy = json.loads(unb64(provenance["payload"]))["predicate"]["privacy"]
    assert privacy["plan"]["rows_per_unit"] == CAP
    assert "one unit, of which at most 3 of its rows are used, is in the data" in privacy["assumptions"][0]
    erased = clinic.erase_person(seen, 15)
    (model,) = erased["facts"]["models"]
    assert (model["unit"]["rows"], model["unit"]["epsilon"]) == (CAP, privacy["epsilon"])
    assert model["subject"] is None


def test_a_run_is_refused_before_it_is_charged(seen: World) -> None:
    before = seen.budget("clinic")
    body = {"spec": training_spec(**spec(MOST + 1)), "code_digest": CODE, "public_key": Person("new", ["run"]).public}
    assert seen.refused(400, "ed", "POST", "/v1/runs", body) == InputError.__name__
    assert seen.budget("clinic") == before
