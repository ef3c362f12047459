"""One budget for the same people: datasets of an owner share a ledger, and a separate one takes somebody's answer."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, insert, update

from authority_world import CODE, Person, World, adult_schema, training_spec
from cloister.authority.ledger_seals import check
from cloister.authority.populations import NAMED
from cloister.stores.tables import budgets, ledger_members, ledger_seals, ledgers, runs

UNIT = {"column": "occupation", "max_rows": 400}


def run_body(dataset: str, **spec: Any) -> dict[str, Any]:
    changed = training_spec(dataset=f"{dataset}@1", **spec)
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
    request = empty_world.missing(empty_world.ask("olga", "PUT", path, {"epsilon": 10.5, "delta": 1e-4}))
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
        "dataset added": [insert(ledger_members).values(ledger=theirs, dataset="adult")],
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
        for ledger in ("again", NAMED + "forged"):
            connection.execute(insert(ledgers).values(id=ledger, owner="olga", population=ledger, unit=""))
            connection.execute(insert(ledger_members).values(ledger=ledger, dataset="again"))
            connection.execute(insert(budgets).values(ledger=ledger, epsilon=50.0, delta=1e-3))
            connection.execute(insert(ledger_seals).values(ledger=ledger, counter=0, seal=b""))
    world.reopen()
    answer = world.ask("ed", "POST", "/v1/runs", run_body("again"))
    assert world.vote("rita", world.missing(answer)).status_code == 200
    assert world.refused(422, "ed", "POST", "/v1/runs", run_body("again")) == "IntegrityError"


def _curve(world: World) -> list[str]:
    with world.authority.core.database.reading() as connection:
        return list(connection.execute(runs.select()).first().renyi_charged)  # type: ignore[union-attr]
