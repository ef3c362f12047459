"""What a dataset's privacy budget is, what of it is left, and holding a part of it for a run.

Guarantees: the sum over all runs of what they hold or have spent never exceeds the budget, since it is checked and
raised in one transaction. Sums only: who may spend is decided elsewhere.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from cloister.authority.costs import settle
from cloister.errors import BudgetError
from cloister.privacy.plan import PrivacyPlan
from cloister.stores.tables import budget_changes, budgets, runs


def charged_so_far(connection: Connection, name: str) -> tuple[float, float]:
    """Sum of (epsilon, delta) that runs hold or have spent: basic composition over runs."""
    total = select(
        func.coalesce(func.sum(runs.c.epsilon_charged), 0.0), func.coalesce(func.sum(runs.c.delta_charged), 0.0)
    )
    epsilon, delta = connection.execute(total.where(runs.c.dataset == name)).one()
    return float(epsilon), float(delta)


def has_budget(connection: Connection, name: str) -> bool:
    """Whether one was ever set, be it of nothing."""
    return connection.execute(select(budgets.c.dataset).where(budgets.c.dataset == name)).first() is not None


def budget_state(connection: Connection, name: str) -> dict[str, Any]:
    """Total, charged and left; all zero for a dataset without a budget, which therefore cannot be trained on."""
    row = connection.execute(select(budgets).where(budgets.c.dataset == name)).one_or_none()
    epsilon, delta = (row.epsilon, row.delta) if row else (0.0, 0.0)
    spent_epsilon, spent_delta = charged_so_far(connection, name)
    return {
        "dataset": name,
        "epsilon": epsilon,
        "delta": delta,
        "epsilon_charged": spent_epsilon,
        "delta_charged": spent_delta,
        "epsilon_left": max(0.0, epsilon - spent_epsilon),
        "delta_left": max(0.0, delta - spent_delta),
    }


def affordable(budget: dict[str, Any], epsilon: float, delta: float) -> bool:
    """Whether a budget, as `budget_state` tells it, pays for this much more."""
    # The tolerance is for sums of decimal fractions; it is relative to the total, so it cannot add up.
    return all(
        budget[f"{name}_charged"] + needed <= budget[name] * (1 + 1e-9)
        for name, needed in (("epsilon", epsilon), ("delta", delta))
    )


def reserve(connection: Connection, run: Any, steps: int) -> None:
    """Hold for a run what `steps` steps cost, over all of its attempts; it keeps what it holds if that is more.

    Raises:
        BudgetError: the dataset's budget does not pay for it, or these are more steps than were approved.
    """
    plan = PrivacyPlan.from_dict(run.plan)
    if steps > plan.steps + plan.redo_steps:
        raise BudgetError(
            f"{run.id} would come to {steps:,} steps, and at most {plan.steps + plan.redo_steps:,} were approved",
            "submit a new run, with more training.retries if need be",
        )
    epsilon, delta = settle(run.plan, steps)
    epsilon, delta = max(epsilon, run.epsilon_charged), max(delta, run.delta_charged)
    budget = budget_state(connection, run.dataset)
    if not affordable(budget, epsilon - run.epsilon_charged, delta - run.delta_charged):
        raise BudgetError(
            f"{run.id} would come to epsilon {epsilon:.4f}, delta {delta:g}, of which {run.epsilon_charged:.4f} and "
            f"{run.delta_charged:g} are charged already; {run.dataset} had epsilon {budget['epsilon_left']:.4f} left",
            f"ask the owner for more: cloister budget set {run.dataset}; then: cloister train resume {run.id}",
        )
    connection.execute(update(runs).where(runs.c.id == run.id).values(epsilon_charged=epsilon, delta_charged=delta))


def change_budget(
    connection: Connection, name: str, epsilon: float, delta: float, person: str, approval: str | None, now: float
) -> None:
    """Set a dataset's budget, and keep who did. Within `ledger_seals.changing`."""
    before = budget_state(connection, name)
    values = {"epsilon": epsilon, "delta": delta}
    changed = connection.execute(update(budgets).where(budgets.c.dataset == name).values(**values))
    if not changed.rowcount:
        connection.execute(insert(budgets).values(dataset=name, **values))
    mine = budget_changes.c.dataset == name
    last = connection.execute(select(func.coalesce(func.max(budget_changes.c.number), 0)).where(mine)).scalar_one()
    connection.execute(
        insert(budget_changes).values(
            dataset=name, number=last + 1, person=person, approval=approval, created=now, epsilon=epsilon, delta=delta,
            epsilon_before=before["epsilon"], delta_before=before["delta"],
        )
    )  # fmt: skip


def spending(connection: Connection, name: str) -> dict[str, Any]:
    """How a budget came to be what it is (`changes`), and what of it each run and each person has or holds."""
    changes = connection.execute(
        select(budget_changes).where(budget_changes.c.dataset == name).order_by(budget_changes.c.number)
    ).all()
    rows = connection.execute(select(runs).where(runs.c.dataset == name).order_by(runs.c.created, runs.c.id)).all()
    people: dict[str, dict[str, Any]] = {}
    for row in rows:
        person = people.setdefault(row.author, {"person": row.author, "runs": 0, "epsilon": 0.0, "delta": 0.0})
        person["runs"] += 1
        person["epsilon"] += row.epsilon_charged
        person["delta"] += row.delta_charged
    return {
        "changes": [
            {
                "time": row.created, "person": row.person, "epsilon": [row.epsilon_before, row.epsilon],
                "delta": [row.delta_before, row.delta], "approval": row.approval,
            }
            for row in changes
        ],
        "runs": [
            {
                "run": row.id, "dataset": f"{row.dataset}@{row.version}", "author": row.author, "state": row.state,
                "epsilon": row.epsilon_charged, "delta": row.delta_charged, "settled": row.settled,
                "steps": row.steps_committed, "attempts": row.attempt, "created": row.created,
                # Released with the model, of rows that are held out: they pay this where the others pay `epsilon`.
                "evaluation_epsilon": PrivacyPlan.from_dict(row.plan).evaluation_epsilon
                if row.state == "finished" else 0.0,
            }
            for row in rows
        ],
        "people": sorted(people.values(), key=lambda person: (-person["epsilon"], person["person"])),
    }  # fmt: skip
