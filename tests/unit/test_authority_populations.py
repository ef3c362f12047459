"""One budget for the same people: datasets of an owner share a ledger, and a separate one takes somebody's answer."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from authority_world import CODE, Person, World, adult_schema, blocks_of_adult, lease_body, training_spec
from cloister.authority import ledger_seals as seals
from cloister.authority.key_use import LEDGER, ledger_context
from cloister.authority.ledger_seals import check
from cloister.authority.populations import NAMED
from cloister.client.seal import seal_dataset
from cloister.stores.tables import budgets, datasets, ledger_members, ledger_seals, ledgers, runs

UNIT = {"column": "occupation", "max_rows": 400}


def run_body(dataset: str, version: int = 1, **spec: Any) -> dict[str, Any]:
    changed = training_spec(dataset=f"{dataset}@{version}", **spec)
    return {"spec": changed, "code_digest": CODE, "public_key": Person("new", ["run"]).public}


def by_person() -> dict[str, Any]:
    """A schema's columns with the unit `occupation`, and the schema's `unit`."""
    columns = [
        column | ({"role": "unit"} if column["name"] == "occupation" else {})
        for column in adult_schema().to_dict()["columns"]
    ]
    return {"columns": columns, "unit": UNIT}


def test_the_same_rows_under_a_second_name_have_no_second_budget(world: World) -> None:
    answer = world.seal(name="again")
    assert answer["population"] == {"approval": None, "question": None, "shared_with": ["adult"]}
    assert world.ledger("again") == world.ledger("adult")
    world.set_budget(3.5)
    world.submit()
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", run_body("again")) == "BudgetError"
    shown = world.budget("again")
    assert (shown["datasets"], shown["population"], shown["joined"]) == (["adult", "again"], "default", True)
    assert [run["dataset"] for run in shown["runs"]] == ["adult@1"]


def test_the_log_names_no_owner_in_a_ledger(world: World) -> None:
    assert world.ledger().startswith(NAMED)
    assert not any(b"olga" in entry for entry in world.entries())


@pytest.mark.parametrize("separate", ["population", "unit"])
def test_a_separate_ledger_takes_an_officers_answer(world: World, separate: str) -> None:
    schema = {"population": "staff"} if separate == "population" else by_person()
    asked = world.seal(name="other", **schema)["population"]
    assert asked["shared_with"] == []
    assert "adult" in asked["question"]
    assert "two budgets" in asked["question"]
    for who, method, path, body in (
        ("olga", "PUT", "/v1/datasets/other/budget", {"epsilon": 3.0, "delta": 1e-4}),
        ("ed", "POST", "/v1/runs", run_body("other")),
    ):
        assert world.ask(who, method, path, body).status_code == 403, path
    assert not world.budget("other")["joined"]
    listed = {row["dataset"]: row["budget"]["joined"] for row in world.get("olga", "/v1/datasets")}
    assert listed == {"adult@1": True, "other@1": False}
    assert world.budget("other")["epsilon"] == 0.0
    answer = world.ask("olga", "PUT", "/v1/datasets/other/budget", {"epsilon": 3.0, "delta": 1e-4})
    request = world.missing(answer)
    assert (request["kind"], request["approval"]) == ("population", asked["approval"])
    for nobody in ("rita", "olga", "ed"):  # a reviewer, the owner who says so, an engineer
        assert world.vote(nobody, request).status_code == 403, nobody
    with world.recorded("sofia", "approval:vote"):
        assert world.vote("sofia", request).status_code == 200
    assert world.ledger("other") != world.ledger("adult")
    world.put("olga", "/v1/datasets/other/budget", {"epsilon": 3.0, "delta": 1e-4})
    before = world.budget()["epsilon_left"]
    assert world.budget("other")["epsilon_left"] == 3.0
    if separate == "population":
        world.agreed("rita", "ed", "POST", "/v1/runs", run_body("other"))
        assert world.budget("other")["epsilon_left"] < 0.01
    assert world.budget()["epsilon_left"] == before


def test_once_an_owner_has_two_ledgers_each_new_dataset_is_asked_about(world: World) -> None:
    """Or the rows of the second could be sealed again into the first."""
    world.seal(name="other", population="staff")
    answer = world.ask("olga", "PUT", "/v1/datasets/other/budget", {"epsilon": 3.0, "delta": 1e-4})
    assert world.vote("sofia", world.missing(answer)).status_code == 200
    asked = world.seal(name="third")["population"]
    assert asked["shared_with"] == ["adult"]
    assert "other" in asked["question"]
    with world.still("denied"):
        assert world.ask("ed", "POST", "/v1/runs", run_body("third")).status_code == 403


def test_an_answer_is_about_what_there_was_when_it_was_asked(world: World) -> None:
    world.seal(name="other", population="staff")
    world.seal(name="third", population="guests")
    requests = {
        name: world.missing(
            world.ask("olga", "PUT", f"/v1/datasets/{name}/budget", {"epsilon": 3.0, "delta": 1e-4})
        )
        for name in ("other", "third")
    }  # fmt: skip
    assert world.vote("sofia", requests["other"]).status_code == 200
    answer = world.vote("sofia", requests["third"])
    assert answer.json()["kind"] == "ConflictError", "it did not say that nobody is in `other` too"
    answer = world.ask("olga", "PUT", "/v1/datasets/third/budget", {"epsilon": 3.0, "delta": 1e-4})
    again = world.missing(answer)
    assert again["details"]["elsewhere"] == ["adult", "other"]
    assert world.vote("sofia", again).status_code == 200
    world.put("olga", "/v1/datasets/third/budget", {"epsilon": 3.0, "delta": 1e-4})


def test_a_refusal_stays_one(world: World) -> None:
    world.seal(name="other", population="staff")
    body = {"epsilon": 3.0, "delta": 1e-4}
    request = world.missing(world.ask("olga", "PUT", "/v1/datasets/other/budget", body))
    assert world.vote("sofia", request, decision="deny").status_code == 200
    assert world.refused(409, "olga", "PUT", "/v1/datasets/other/budget", body) == "ConflictError"
    assert not world.budget("other")["joined"]


def test_another_owner_is_not_asked(world: World) -> None:
    assert world.seal("otto", name="theirs")["population"] == {"approval": None, "question": None, "shared_with": []}
    assert world.ledger("theirs") != world.ledger()


def test_a_first_budget_above_the_ceiling_takes_approval(empty_world: World) -> None:
    empty_world.seal()
    path = "/v1/datasets/adult/budget"
    answer = empty_world.ask("olga", "PUT", path, {"epsilon": 10.5, "delta": 1e-4})
    assert answer.json()["error"] == "a first budget above epsilon 10 needs 1 approval and has 0"
    request = empty_world.missing(answer)
    assert (request["kind"], request["details"]["epsilon"]) == ("budget", [0.0, 10.5])
    assert empty_world.budget()["epsilon"] == 0.0
    empty_world.put("olga", path, {"epsilon": 10.0, "delta": 1e-4})
    empty_world.agreed("sofia", "olga", "PUT", path, {"epsilon": 10.5, "delta": 1e-4})  # as each that is raised
    assert empty_world.budget()["epsilon"] == 10.5


def test_who_writes_the_database_moves_no_dataset_and_no_run_to_another_ledger(world: World) -> None:
    world.seal(name="other", population="staff")
    request = world.missing(
        world.ask("olga", "PUT", "/v1/datasets/other/budget", {"epsilon": 9.0, "delta": 1e-4})
    )  # fmt: skip
    assert world.vote("sofia", request).status_code == 200
    world.put("olga", "/v1/datasets/other/budget", {"epsilon": 9.0, "delta": 1e-4})
    run = world.submit()
    world.attempt(run)
    mine, theirs = world.ledger(), world.ledger("other")
    edits: dict[str, list[Any]] = {
        "run moved": [update(runs).values(ledger=theirs)],
        "dataset moved": [update(ledger_members).where(ledger_members.c.dataset == "adult").values(ledger=theirs)],
        "dataset taken out": [delete(ledger_members).where(ledger_members.c.dataset == "adult")],
        "ledgers exchanged": [
            update(ledgers).where(ledgers.c.id == mine).values(population="x"),
            update(ledgers).where(ledgers.c.id == theirs).values(population="default"),
        ],
        "curve cleared": [update(runs).values(renyi_charged=["0x0.0p+0"] * len(_curve(world)))],
        "curve unknown": [update(runs).values(renyi_charged=None)],
    }
    core = world.authority.core
    for what, statements in edits.items():
        with core.database.transaction() as connection:
            for statement in statements:
                connection.execute(statement)
            problems = [check(connection, core.keys, name)[1] for name in (mine, theirs)]
            connection.rollback()
        assert "is not what was sealed: it was edited" in problems, what


def test_a_ledger_that_somebody_writes_into_the_database_is_not_adopted(world: World) -> None:
    """As if `again` were of before there were populations, with a budget of its own."""
    world.seal(name="again")
    with world.authority.core.database.transaction() as connection:
        for ledger in (NAMED + "forged", "again"):
            connection.execute(insert(ledgers).values(id=ledger, owner="olga", population=ledger, unit=""))
            connection.execute(update(ledger_members).where(ledger_members.c.dataset == "again").values(ledger=ledger))
            connection.execute(insert(budgets).values(ledger=ledger, epsilon=50.0, delta=1e-3))
            connection.execute(insert(ledger_seals).values(ledger=ledger, counter=0, seal=b""))
    world.reopen()
    answer = world.ask("ed", "POST", "/v1/runs", run_body("again"))
    assert world.vote("rita", world.missing(answer)).status_code == 200
    assert world.refused(422, "ed", "POST", "/v1/runs", run_body("again")) == "IntegrityError"


def _curve(world: World) -> list[str]:
    with world.authority.core.database.reading() as connection:
        return list(connection.execute(runs.select()).first().renyi_charged)  # type: ignore[union-attr]


# ---- somebody who writes the database, and has no key ----


def sql(world: World, *statements: Any) -> None:
    with world.authority.core.database.transaction() as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_run_is_leased_no_other_data_than_it_is_charged_for(world: World) -> None:
    world.seal("otto", name="theirs")
    world.seal(name="adult")  # adult@2
    for move in ({"dataset": "theirs"}, {"version": 2}, {"spec": training_spec(features=["age"])}):
        run = world.submit()
        world.attempt(run)
        before = world.authority.runs.show(world.caller("ed"), run)
        sql(world, update(runs).where(runs.c.id == run).values(**move))
        answer = world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body())
        assert answer.json().get("kind") == "IntegrityError", move
        undo = {"dataset": "adult", "version": 1, "spec": before["spec"]}
        sql(world, update(runs).where(runs.c.id == run).values(**undo))
        assert world.ask(run, "POST", f"/v1/runs/{run}/leases", lease_body()).status_code == 200


def test_a_ledger_that_was_deleted_or_hidden_leaves_no_room_for_another(world: World) -> None:
    world.train()
    hidden = update(ledgers).values(owner="nobody")
    for edits in ([hidden], [delete(ledgers), delete(ledger_members)]):
        with world.authority.core.database.reading() as connection:
            rows = [(table, connection.execute(table.select()).all()) for table in (ledgers, ledger_members)]
        sql(world, *edits)
        answer = world.seal(name=f"new{len(edits)}", population="staff")
        assert answer["population"]["approval"] is None
        world.seal(name="adult")  # all the same: erasing and appending go on
        for name in (f"new{len(edits)}", "adult"):
            budget = {"epsilon": 9.0, "delta": 1e-4}
            assert world.ask("olga", "PUT", f"/v1/datasets/{name}/budget", budget).json()["kind"] == "IntegrityError"
        sql(world, *(delete(table) for table, _ in rows))
        sql(world, *(insert(table).values(**row._mapping) for table, kept in rows for row in kept))
        for name in (f"new{len(edits)}", "adult"):  # nor once it is there again
            assert world.ask("ed", "POST", "/v1/runs", run_body(name, version=2)).status_code >= 400


def test_what_pays_for_a_version_is_on_record_and_is_not_read_from_its_schema(world: World) -> None:
    world.seal(name="adult", population="staff")
    budget = {"epsilon": 9.0, "delta": 1e-4}
    request = world.missing(world.ask("olga", "PUT", "/v1/datasets/adult/budget", budget))
    assert "adult as it was" in request["details"]["question"]
    assert world.vote("sofia", request).status_code == 200
    world.put("olga", "/v1/datasets/adult/budget", budget)
    schema = adult_schema(population="staff").to_dict()
    sql(world, update(datasets).where(datasets.c.version == 1).values(schema=schema))
    run = world.submit()  # on adult@1
    assert [each["run"] for each in world.get("olga", "/v1/datasets/adult/budget?version=1")["runs"]] == [run]
    assert world.budget()["runs"] == []


# ---- versions ----


def test_a_version_in_another_ledger_hides_none_and_waits_for_itself(world: World) -> None:
    world.submit()
    world.seal(name="adult", population="staff")  # adult@2 waits
    assert not world.budget()["joined"]
    assert len(world.get("olga", "/v1/datasets/adult/budget?version=1")["runs"]) == 1
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 12.0, "delta": 1e-4, "version": 1})
    world.submit()  # on adult@1
    world.seal(name="adult", population="guests")  # adult@3 waits for another answer
    requests = {
        version: world.missing(world.ask(
            "olga", "PUT", "/v1/datasets/adult/budget", {"epsilon": 3.0, "delta": 1e-4, "version": version}
        ))
        for version in (2, 3)
    }  # fmt: skip
    assert world.vote("sofia", requests[2]).status_code == 200
    world.put("olga", "/v1/datasets/adult/budget", {"epsilon": 3.0, "delta": 1e-4, "version": 2})
    world.seal(name="adult", population="staff")  # adult@4: its dataset has been answered about
    assert world.budget()["joined"]


def test_lineage_is_in_the_question(world: World) -> None:
    asked = seal_dataset(
        world.client("olga"), world.people["olga"].private, blocks_of_adult(),
        adult_schema(name="other", population="staff"), shards=3, holdout=0.2,
        receiving_key=world.authority.receiving_public, derived_from=("adult@1",),
    )["population"]  # fmt: skip
    assert asked["question"].startswith("other is made from adult. ")


def test_a_budgets_delta_is_below_one_row_of_each_version_that_it_pays_for(world: World) -> None:
    world.seal(name="again")
    sql(world, update(datasets).where(datasets.c.name == "again").values(rows=30_000))
    with world.still():
        assert world.refused(409, "ed", "POST", "/v1/runs", run_body("adult")) == "BudgetError"
    sql(world, update(datasets).where(datasets.c.name == "again").values(rows=300))
    body = {"epsilon": 9.0, "delta": 2e-3}
    world.agreed("sofia", "olga", "PUT", "/v1/datasets/adult/budget", body)
    sql(world, update(datasets).where(datasets.c.name == "again").values(rows=600))
    assert world.refused(400, "olga", "PUT", "/v1/datasets/adult/budget", body) == "InputError"


# ---- a state of before there were populations ----


@pytest.fixture
def older(empty_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A ledger as it was: by its dataset's name, without a curve or an order, and under a seal of then. With a run that
    is over and one that is half done.
    """
    world = empty_world
    with monkeypatch.context() as patch:
        patch.setattr("cloister.authority.overlap.NAMED", "")
        patch.setattr("cloister.authority.overlap.secrets.token_hex", lambda _length: "adult")
        world.seal()
    world.set_budget()
    world.train()
    half = world.submit()
    world.attempt(half)
    world.commit(half, 0, 5)
    with world.authority.core.of_itself("ledger:seal") as act:
        act.connection.execute(update(ledgers).values(population=None))
        act.connection.execute(update(budgets).values(order=None))
        act.connection.execute(update(runs).values(renyi_charged=None))
        ((number,),) = act.connection.execute(select(ledger_seals.c.counter)).all()
        digest = seals._digest_of_before(act.connection, "adult")
        (sealed,) = act.keys.wrap(LEDGER, [(digest, ledger_context("adult", number))])
        act.connection.execute(update(ledger_seals).values(seal=sealed))
    world.reopen()
    return world


def test_a_ledger_of_before_is_sealed_as_they_are_now_and_its_runs_go_on(older: World) -> None:
    assert older.log()[-1].details["ledger"].startswith("adult#")
    (half,) = (run["run"] for run in older.budget()["runs"] if run["state"] == "training")
    older.commit(half, 5, 10)
    lease = older.lease(half)
    older.post(half, f"/v1/runs/{half}/model", older.model_body(half, lease))
    shown = older.budget()
    assert (shown["rule"], shown["delta_of_each_rule"], shown["epsilon"]) == ("adding", 1e-4, 10.0)
    older.submit()
    assert older.budget()["rule"] == "adding", "it has runs without a curve"
    with older.authority.core.database.reading() as connection:
        assert check(connection, older.authority.core.keys, "adult")[1] == ""


def test_whoever_edits_an_older_ledger_is_found_out(older: World) -> None:
    core = older.authority.core
    for edit in (
        update(ledgers).values(owner="otto"),
        update(ledgers).values(unit="age"),
        update(budgets).values(order=2),
        update(runs).values(dataset="other"),
    ):
        with core.database.transaction() as connection:
            connection.execute(edit)
            assert check(connection, core.keys, "adult")[1] == "is not what was sealed: it was edited"
            connection.rollback()


def test_an_older_ledger_is_shared_by_its_name_and_keeps_its_unit(older: World) -> None:
    assert older.seal(name="again", population="adult")["population"] == {
        "approval": None, "question": None, "shared_with": ["adult"],
    }  # fmt: skip
    assert older.budget("again")["datasets"] == ["adult", "again"]
    assert older.seal(name="adult")["population"]["approval"] is None
    assert older.budget()["joined"]
    for changed in ({"name": "third"}, {"name": "adult", "population": "staff"}, by_person() | {"name": "adult"}):
        assert older.seal(**changed)["population"]["approval"], changed
