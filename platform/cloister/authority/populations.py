"""Which ledger pays for a version of a dataset: that of its owner, its population and its unit of privacy.

All datasets of an owner spend from one ledger, so that the same rows under a second name have no second budget, unless
a schema names another `population` or another unit. How a version joins its ledger is in `overlap`: what is on record,
and under the ledger's seal, says which one pays, and no schema any more. Look-ups only.

A dataset of before there were populations has a ledger of its own, by its own name. Its further versions stay in it
while they have the unit of then and name no population. Another dataset of that owner joins it by `population: NAME`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select

from cloister.stores.tables import datasets, ledger_members, ledgers

DEFAULT = "default"
"""The population of schemas that name none."""
NAMED = "ledger/"
"""What the names of ledgers begin with, but for those of before there were populations. No dataset is named so."""


def ledger_of(connection: Connection, row: Any) -> str | None:
    """The ledger that pays for a version of a dataset; None before it has joined one."""
    mine = (ledger_members.c.dataset == row.name) & (ledger_members.c.version == row.version)
    return connection.execute(select(ledger_members.c.ledger).where(mine)).scalar_one_or_none()


def future_ledger_of(connection: Connection, row: Any) -> str | None:
    """The ledger that a version belongs to, by its schema; None if that does not exist yet."""
    population, unit = row.schema.get("population"), unit_of(row)
    mine = (ledgers.c.owner == row.owner) & (ledgers.c.unit == unit)
    older = mine & ledgers.c.population.is_(None) & (ledgers.c.id == (population or row.name))
    named = mine & (ledgers.c.population == population_of(row))
    for query in (older, named):
        found = connection.execute(select(ledgers.c.id).where(query)).scalar_one_or_none()
        if found is not None:
            return str(found)
    return None


def members(connection: Connection, ledger: str) -> list[str]:
    """The datasets of which a version spends from a ledger."""
    mine = ledger_members.c.ledger == ledger
    query = select(ledger_members.c.dataset).where(mine).distinct().order_by(ledger_members.c.dataset)
    return list(connection.execute(query).scalars())


def versions(connection: Connection, ledger: str) -> list[Any]:
    """The rows, without the long parts, of all versions that spend from a ledger."""
    c = datasets.c
    mine = (ledger_members.c.dataset == c.name) & (ledger_members.c.version == c.version)
    query = select(c.name, c.version, c.rows, c.ended).join(ledger_members, mine)
    return list(connection.execute(query.where(ledger_members.c.ledger == ledger).order_by(c.name, c.version)).all())


def ledger_names(connection: Connection) -> list[str]:
    """Of every ledger."""
    return list(connection.execute(select(ledgers.c.id).order_by(ledgers.c.id)).scalars())


def elsewhere(connection: Connection, row: Any) -> list[str]:
    """The datasets in the other ledgers of a version's owner."""
    mine = future_ledger_of(connection, row) or ""
    query = (
        select(ledger_members.c.dataset)
        .join(ledgers, ledgers.c.id == ledger_members.c.ledger)
        .where((ledgers.c.owner == row.owner) & (ledgers.c.id != mine))
    )
    return list(connection.execute(query.distinct().order_by(ledger_members.c.dataset)).scalars())


def described(connection: Connection, row: Any) -> dict[str, Any]:
    """What people are told of a version's ledger."""
    ledger = ledger_of(connection, row)
    return {
        "population": population_of(row),
        "datasets": members(connection, ledger) if ledger else [],
        "joined": ledger is not None,
    }


def population_of(row: Any) -> str:
    """The population that a version's schema names."""
    return str(row.schema.get("population") or DEFAULT)


def unit_of(row: Any) -> str:
    """The column of its unit; empty where that is a row."""
    unit = row.schema.get("unit", "row")
    return str(unit["column"]) if isinstance(unit, dict) else ""
