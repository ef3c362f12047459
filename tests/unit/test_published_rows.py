"""Somebody counts rows before and after: of two versions, of a plan, of whatever the authority answers."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import clinic
from authority_world import World, training_spec
from cloister.canonical import b64, digest, unb64
from cloister.client.seal import newest_schema
from cloister.client.verify import verify_dataset
from cloister.datasets.manifest import DatasetManifest
from cloister.errors import InputError, IntegrityError, PermissionDeniedError
from cloister.privacy.plan import PrivacyPlan, make_plan
from cloister.rounding import most_rows, rounded_down
from cloister.training.loop import _require_rows
from cloister.training.tripwires import Tripwires

OTHERS = ("ed", "rita", "ada", "sofia", "otto", "operator")
ROWS = 1_283


def people(first: int = 0, count: int = ROWS) -> bytes:
    lines = (f"{clinic.person(n)},{n % 100},kiel,{'yes' if n % 3 else 'no'}" for n in range(first, first + count))
    return "\n".join(["patient,age,city,ill", *lines]).encode() + b"\n"


@pytest.fixture
def ward(world: World) -> World:
    """clinic@1, of which no exact number of rows is a published one; rows are the unit."""
    clinic.seal(world, people(), unit="row")
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/clinic/budget", {"epsilon": 50.0, "delta": 1e-4})
    return world


def counts(world: World, version: int) -> set[int]:
    """Every exact number of rows of a version."""
    made = clinic.manifest(world, version)
    return {made.all_rows, made.rows("train"), made.rows("holdout"), *(file.rows for file in made.files)}


def published(world: World, version: int, who: str = "ed") -> tuple[int, int]:
    shown = world.get(who, f"/v1/datasets/clinic/versions/{version}")["published"]
    return shown["train"], shown["holdout"]


def spec(version: int) -> dict[str, Any]:
    training = {"epochs": 2, "expected_batch_size": 16, "learning_rate": 0.01}
    return training_spec(dataset=f"clinic@{version}", label="ill", name="clinic", training=training)


# ---- the numbers ----


@pytest.mark.parametrize(
    ("rows", "told", "most"),
    [(0, 0, 0), (9, 9, 9), (10, 10, 10), (99, 99, 99), (100, 100, 109), (105, 100, 109), (999, 990, 999),
     (1_000, 1_000, 1_099), (26_049, 26_000, 26_999), (10**12 + 1, 10**12, 11 * 10**11 - 1)],
)  # fmt: skip
def test_rows_are_rounded_down_to_two_digits(rows: int, told: int, most: int) -> None:
    assert (rounded_down(rows), most_rows(rows), most_rows(told), rounded_down(most)) == (told, most, most, told)
    assert rounded_down(most + 1) > told


def test_an_erasure_and_a_correction_keep_what_was_published_and_an_appendix_rounds_anew(ward: World) -> None:
    first = published(ward, 1)
    made = clinic.manifest(ward, 1)
    assert first == (rounded_down(made.rows("train")), rounded_down(made.rows("holdout")))
    listed = ward.get("ed", "/v1/datasets")[-1]["rows"]
    clinic.erase_person(ward, *range(100))
    assert clinic.manifest(ward, 2).all_rows == ROWS - 100
    clinic.rectify_person(ward, 200, age="77")
    assert published(ward, 2) == published(ward, 3) == first
    assert [each["rows"] for each in ward.get("ed", "/v1/datasets") if each["dataset"][:6] == "clinic"] == [listed] * 3
    clinic.append(ward, people(2_000, 300), unit="row")
    now = clinic.manifest(ward, 4)
    assert now.published is None
    assert published(ward, 4) == (rounded_down(now.rows("train")), rounded_down(now.rows("holdout"))) != first


def test_versions_that_differ_by_one_erased_row_have_equal_plans(ward: World) -> None:
    before = ward.post("ed", "/v1/plans", {"spec": spec(1)})
    clinic.erase_person(ward, 7)
    after = ward.post("ed", "/v1/plans", {"spec": spec(2)})
    assert before.pop("spec") != after.pop("spec")
    assert before == after
    plan = PrivacyPlan.from_dict(after["plan"])
    assert (plan.rows, plan.sample_rate) == (published(ward, 1)[0], 16 / published(ward, 1)[0])


def test_a_manifest_of_before_there_were_published_numbers_has_those_of_its_rows(ward: World) -> None:
    facts = clinic.facts(ward, 1)
    assert "published" not in facts
    old = DatasetManifest.parse(facts)
    assert old.digest == digest("cloister.dev/dataset/v2", facts)
    assert old.published_rows("train") == rounded_down(old.rows("train"))


# ---- forged numbers ----


@pytest.mark.parametrize("kind", ["erase", "rectify"])
@pytest.mark.parametrize("forged", [None, (0, -10), (10, 0), (-100, 0)])
def test_numbers_that_an_erasure_changes_are_refused(ward: World, kind: str, forged: tuple[int, int] | None) -> None:
    clinic.erase_person(ward, *range(100))
    made = clinic.following(ward, 2, kind)
    shard = next(file for file in made["files"] if file["shard"] == "train-001")
    ends = clinic.resealed(made, "train-001", shard["rows"] - (kind == "erase"))
    kept = made.pop("published")
    if forged is not None:
        made["published"] = {"train": kept["train"] + forged[0], "holdout": kept["holdout"] + forged[1]}
    before = ward.content()
    answer = ward.ask("olga", "POST", "/v1/datasets", clinic.signed(ward, made, ends))
    assert (answer.status_code, "published" in answer.json()["error"]) == (400, True)
    assert ward.content() == before
    made["published"] = kept
    assert ward.ask("olga", "POST", "/v1/datasets", clinic.signed(ward, made, ends)).status_code == 200


def test_numbers_that_an_appendix_brings_along_are_refused(ward: World) -> None:
    made = clinic.following(ward, 1, "append")
    clinic.added(made)
    for wrong in ({"train": 2_000, "holdout": 250}, {"train": 1_000, "holdout": 250}):
        before = ward.content()
        answer = ward.ask("olga", "POST", "/v1/datasets", clinic.signed(ward, made | {"published": wrong}))
        assert (answer.status_code, "published" in answer.json()["error"]) == (400, True)
        assert ward.content() == before
    assert ward.ask("olga", "POST", "/v1/datasets", clinic.signed(ward, made)).status_code == 200


# ---- who is told ----


def numbers(answer: Any) -> Iterator[int]:
    """Every whole number in an answer, in its sentences and in what is signed in it."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, list):
        for each in answer:
            yield from numbers(each)
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        yield int(answer)
    elif isinstance(answer, str):
        yield from (int(found.replace(",", "")) for found in re.findall(r"\b\d[\d,]*\b", answer))
        try:
            yield from numbers(json.loads(unb64(answer)))
        except (InputError, ValueError):
            return


def everything(world: World, who: str, run: str, erasure: str) -> Iterator[tuple[str, Any]]:
    """All that somebody may read of the clinic, and what they are refused with."""
    paths = [
        "/v1/datasets", "/v1/datasets/clinic/versions/1", "/v1/datasets/clinic/versions/2",
        "/v1/datasets/clinic/budget", f"/v1/erasures/{erasure}", "/v1/runs", f"/v1/runs/{run}", "/v1/models",
        "/v1/models/clinic/versions/1", "/v1/approvals", "/v1/log", "/v1/log/export", "/v1/policy",
    ]  # fmt: skip
    for path in paths:
        answer = world.ask(who, "GET", path)
        yield path, answer.json() if "json" in answer.headers["content-type"] else answer.text
    greedy = {"epochs": 2, "expected_batch_size": 1_200, "learning_rate": 0.01}
    for asked in (spec(2), spec(2) | {"training": greedy}, spec(2) | {"privacy": {"epsilon": 3.0, "delta": 5e-3}}):
        yield "plan", world.ask(who, "POST", "/v1/plans", {"spec": asked}).json()


def test_nobody_but_the_owner_is_told_an_exact_number(ward: World) -> None:
    run = ward.submit(**{each: spec(1)[each] for each in ("dataset", "label", "name", "training")})
    lease = ward.lease(run)
    ward.commit(run, 0, int(lease.plan["steps"]))
    facts = {"name": "clinic", "dataset": "clinic@1", "label": "ill", "labels": ("no", "yes")}
    ward.post(run, f"/v1/runs/{run}/model", ward.model_body(run, lease, **facts))
    exact = counts(ward, 1)
    erasure = clinic.erase_person(ward, 7)["erasure"]
    exact |= counts(ward, 2)
    assert not exact & {rounded_down(each) for each in exact}
    seen = set[int]()
    for who in OTHERS:
        for path, answer in everything(ward, who, run, erasure):
            found = set(numbers(answer))
            seen |= found
            assert not found & exact, (who, path)
    assert {*published(ward, 1)} <= seen, "the published ones are told"
    # The same search finds them in what their owner is told.
    own = clinic.manifest(ward, 1)
    assert {own.all_rows, *(file.rows for file in own.files)} <= set(
        numbers(ward.get("olga", "/v1/datasets/clinic/versions/1"))
    )
    ends = {file["sha256"] for file in clinic.facts(ward, 2)["files"]}
    told = json.dumps([ward.get(who, "/v1/datasets/clinic/versions/2") for who in OTHERS])
    assert not any(each in told for each in ends), "with the digests of files, counts can be tried"


def test_only_its_owner_appends_and_others_are_told_so(ward: World) -> None:
    for who in OTHERS:
        with pytest.raises(PermissionDeniedError, match="only its owner"):
            newest_schema(ward.client(who), "clinic")
    assert newest_schema(ward.client("olga"), "clinic").name == "clinic"


def test_whoever_may_not_count_rows_can_verify_files(ward: World) -> None:
    for who in ("ed", "ada", "olga"):
        assert verify_dataset(ward.client(who), "clinic", 1)["files"] == len(clinic.manifest(ward, 1).files)
    for file, edit in itertools.product(sorted(clinic.blob_files(ward))[:2], (lambda d: d[:-1], lambda d: d + b"x")):
        whole = file.read_bytes()
        file.chmod(0o600)
        file.write_bytes(edit(whole))
        with pytest.raises(IntegrityError, match="changed since it was sealed"):
            verify_dataset(ward.client("ed"), "clinic", 1)
        file.write_bytes(whole)


# ---- what is bounded by them ----

FIELDS = {"epsilon": 3.0, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 1}


def test_delta_is_below_one_in_as_many_rows_as_any_table_with_that_number_has() -> None:
    kept = FIELDS | {"expected_batch_size": 100, "rows": 1_000}
    with pytest.raises(InputError, match="row outright"):
        make_plan(**(kept | {"delta": 1 / 1_099}))  # type: ignore[arg-type]  # ints and floats
    make_plan(**(kept | {"delta": 0.999 / 1_099}))  # type: ignore[arg-type]


def test_the_largest_table_of_a_plan_trains_and_no_larger_one_does() -> None:
    plan = make_plan(**FIELDS, expected_batch_size=100, rows=1_000)  # type: ignore[arg-type]
    for rows in (1, 900, 1_099):
        _require_rows(torch.zeros(rows, 2), torch.zeros(rows), plan, public=0)
    with pytest.raises(InputError, match="other rows"):
        _require_rows(torch.zeros(1_100, 2), torch.zeros(1_100), plan, public=0)


def test_a_sum_over_the_largest_table_is_not_too_long() -> None:
    plan = make_plan(**(FIELDS | {"delta": 1e-6, "expected_batch_size": 50_000, "rows": 100_000}))  # type: ignore[arg-type]
    model = torch.nn.Linear(1, 1, bias=False)
    # All gradients of the largest table's batches point one way; the noise is next to nothing.
    batch = plan.sample_rate * most_rows(plan.rows)
    assert batch > plan.expected_batch_size + 8 * plan.expected_batch_size**0.5 + 64
    Tripwires(model, plan, 1e-3).see_sum(torch.tensor([batch * plan.max_grad_norm], dtype=torch.float64))
    with pytest.raises(IntegrityError, match="longer than clipping"):
        Tripwires(model, plan, 1e-3).see_sum(torch.tensor([2 * batch * plan.max_grad_norm], dtype=torch.float64))


def test_the_search_for_numbers_sees_what_is_signed_and_what_is_said() -> None:
    assert 1_283 in set(numbers({"payload": b64(json.dumps({"rows": [1_283]}).encode())}))
    assert 1_283 in set(numbers("choose a number below 1,283"))
