"""What a dataset's privacy budget is, and what of it is left. Sums only: who may spend is decided elsewhere."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select

from cloister.stores.tables import budgets, runs


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
