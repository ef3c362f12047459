"""Which ledger pays for a dataset: that of its owner, its population and its unit of privacy.

All datasets of an owner spend from one ledger, so that the same rows under a second name have no second budget, unless
a schema names another `population` or another unit. How a dataset joins its ledger is in `overlap`. Look-ups only.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select

from cloister.stores.tables import ledger_members, ledgers

DEFAULT = "default"
"""The population of schemas that name none."""
NAMED = "ledger/"
"""What the names of ledgers begin with, but for those of before there were populations. No dataset is named so."""


def ledger_of(connection: Connection, row: Any) -> str | None:
    """The ledger that pays for a version of a dataset; None before there is one."""
    if _has_joined(connection, row.name, row.name):  # of before there were populations
        return str(row.name)
    mine = (
        (ledgers.c.owner == row.owner)
        & (ledgers.c.population == population_of(row))
        & (ledgers.c.unit == unit_column_of(row))
    )
    return connection.execute(select(ledgers.c.id).where(mine)).scalar_one_or_none()


def is_member(connection: Connection, row: Any) -> bool:
    """Whether a version's dataset may spend from its ledger."""
    ledger = ledger_of(connection, row)
    return ledger is not None and _has_joined(connection, ledger, row.name)


def members(connection: Connection, ledger: str) -> list[str]:
    """The datasets that spend from a ledger."""
    mine = ledger_members.c.ledger == ledger
    query = select(ledger_members.c.dataset).where(mine).order_by(ledger_members.c.dataset)
    return list(connection.execute(query).scalars())


def ledger_names(connection: Connection) -> list[str]:
    """Of every ledger."""
    return list(connection.execute(select(ledgers.c.id).order_by(ledgers.c.id)).scalars())


def others(connection: Connection, row: Any) -> dict[str, list[str]]:
    """The other ledgers of a dataset's owner, and who spends from them."""
    mine = ledger_of(connection, row)
    found = connection.execute(select(ledgers.c.id).where(ledgers.c.owner == row.owner).order_by(ledgers.c.id))
    return {each: members(connection, each) for each in found.scalars() if each != mine}


def described(connection: Connection, row: Any) -> dict[str, Any]:
    """What people are told of a dataset's ledger."""
    ledger = ledger_of(connection, row)
    return {
        "population": None if ledger == row.name else population_of(row),
        "datasets": members(connection, ledger) if ledger else [],
        "joined": is_member(connection, row),
    }


def _has_joined(connection: Connection, ledger: str, dataset: str) -> bool:
    mine = (ledger_members.c.ledger == ledger) & (ledger_members.c.dataset == dataset)
    return connection.execute(select(ledger_members.c.dataset).where(mine)).first() is not None


def population_of(row: Any) -> str:
    return str(row.schema.get("population", DEFAULT))


def unit_column_of(row: Any) -> str:
    unit = row.schema.get("unit", "row")
    return str(unit["column"]) if isinstance(unit, dict) else ""
