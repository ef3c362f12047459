"""Things as policy sees them: from the authority's own records, never from a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sqlalchemy import Connection, Table, select

from cloister.authority.core import PLATFORM, Resource
from cloister.authority.ledger import Budget, budget_of
from cloister.authority.populations import ledger_of
from cloister.datasets.schema import CLASSES
from cloister.errors import InputError, NotFoundError
from cloister.stores.tables import approvals, datasets, endpoints, identities, models, runs


def highest_class(classes: Iterable[str]) -> str:
    """The most sensitive of these; `public` of none."""
    return max(classes, key=CLASSES.index, default=CLASSES[0])


def dataset(
    connection: Connection, row: Any, classes: Iterable[str] | None = None, *, budget: Budget | None = None
) -> Resource:
    """A version of a dataset; `classes` are those of the columns that are asked for, all of them by default. `budget`
    is its budget, where that is known already.
    """
    schema = row.schema
    used = (column["class"] for column in schema["columns"]) if classes is None else classes
    left = (budget or budget_of(connection, ledger_of(connection, row))).epsilon_left
    return Resource(
        type="Dataset",
        name=f"{row.name}@{row.version}",
        attributes={
            "owner": row.owner, "region": schema["region"], "purpose": schema["purpose"], "class": highest_class(used),
            "epsilon_left_millionths": math.floor(left * 1_000_000),
        },
    )  # fmt: skip


def new_dataset(name: str, owner: str, region: str = "", purpose: str = "") -> Resource:
    """One that does not exist yet belongs to whoever seals its first version."""
    attributes: dict[str, str | int | bool] = {
        "owner": owner, "region": region, "purpose": purpose, "class": "public", "epsilon_left_millionths": 0,
    }  # fmt: skip
    return Resource(type="Dataset", name=name, attributes=attributes)


def run(row: Any) -> Resource:
    return Resource(type="Run", name=row.id, attributes={"author": row.author, **row.attributes})


def any_run(author: str) -> Resource:
    """All runs together, for listing them."""
    attributes = {"author": author, "owner": "", "region": "", "purpose": "", "class": "public"}
    return Resource(type="Run", name="any", attributes=attributes)


def model(row: Any) -> Resource:
    return Resource(type="Model", name=f"{row.name}@{row.version}",
                    attributes={"author": row.author, "stage": row.stage})  # fmt: skip


ANY_MODEL = Resource(type="Model", name="any", attributes={"author": "", "stage": "candidate"})


def endpoint(row: Any) -> Resource:
    return Resource(type="Endpoint", name=row.id, attributes={"model": row.model})


def identity(row: Any) -> Resource:
    return Resource(type="Identity", name=row.name, attributes={"name": row.name}, person=row.kind == "person")


def approval(row: Any) -> Resource:
    attributes = {"kind": row.kind, "author": row.author, "owner": row.details["owner"]}
    return Resource(type="Approval", name=row.id, attributes=attributes)


def resource_named(connection: Connection, kind: str, name: str) -> Resource:
    """What a person names as `Type/name`, with the attributes that are on record.

    Raises:
        NotFoundError: there is none.
        InputError: no such type.
    """
    base, _, version = name.partition("@")
    versioned: dict[str, tuple[Table, Callable[[Any], Resource]]] = {
        "Dataset": (datasets, partial(dataset, connection)),
        "Model": (models, model),
    }
    plain: dict[str, tuple[Table, str, Callable[[Any], Resource]]] = {
        "Run": (runs, "id", run),
        "Endpoint": (endpoints, "id", endpoint),
        "Approval": (approvals, "id", approval),
        "Identity": (identities, "name", identity),
    }
    if kind == "Platform":
        return PLATFORM
    if kind in versioned:
        table, make = versioned[kind]
        query = select(table).where(table.c.name == base).order_by(table.c.version.desc()).limit(1)
        row = connection.execute(
            query.where(table.c.version == int(version)) if version.isdecimal() and len(version) < 10 else query
        ).one_or_none()
    elif kind in plain:
        table, column, make = plain[kind]
        row = connection.execute(select(table).where(table.c[column] == name)).one_or_none()
    else:
        raise InputError("there is no such type of resource", "Platform, " + ", ".join([*versioned, *plain]))
    if row is None:
        raise NotFoundError(f"there is no {kind} of that name", f"write it as {kind}/NAME")
    return make(row)
