"""Ledgers of populations, which several datasets may share; Rényi divergences of runs."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _unit(schema: dict[str, Any]) -> str:
    unit = schema.get("unit", "row")
    return str(unit["column"]) if isinstance(unit, dict) else ""


def upgrade() -> None:
    for table in ("budgets", "budget_changes", "ledger_seals"):
        with op.batch_alter_table(table) as batch:
            batch.alter_column("dataset", new_column_name="ledger")
    with op.batch_alter_table("budgets") as batch:
        batch.add_column(sa.Column("order", sa.Integer(), nullable=True))
    op.create_table(
        "ledger_members",
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ledger", sa.String(), nullable=False),
        sa.Column("approval", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("dataset", "version", name=op.f("pk_ledger_members")),
    )
    op.create_index(op.f("ix_ledger_members_ledger"), "ledger_members", ["ledger"], unique=False)
    op.create_table(
        "ledgers",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("population", sa.String(), nullable=True),
        sa.Column("unit", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledgers")),
        sa.UniqueConstraint("owner", "population", "unit", name=op.f("uq_ledgers_owner_population_unit")),
    )
    op.create_index(op.f("ix_ledgers_owner"), "ledgers", ["owner"], unique=False)
    # Each dataset keeps the ledger that it has: by its own name, and for itself.
    versions = sa.table(
        "datasets", sa.column("name"), sa.column("version"), sa.column("owner"), sa.column("schema", sa.JSON())
    )
    newest = {row.name: row for row in op.get_bind().execute(sa.select(versions).order_by(versions.c.version))}
    ledgers = sa.table("ledgers", sa.column("id"), sa.column("owner"), sa.column("population"), sa.column("unit"))
    op.bulk_insert(
        ledgers,
        [
            {"id": row.name, "owner": row.owner, "population": None, "unit": _unit(row.schema)}
            for row in newest.values()
        ],
    )
    op.execute("INSERT INTO ledger_members (dataset, version, ledger) SELECT name, version, name FROM datasets")
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("ledger", sa.String(), nullable=False, server_default=""))
        runs.add_column(sa.Column("renyi_charged", sa.JSON(), nullable=True))
    op.execute("UPDATE runs SET ledger = dataset")
    with op.batch_alter_table("runs") as runs:
        runs.alter_column("ledger", server_default=None)
        runs.create_index(op.f("ix_runs_ledger"), ["ledger"], unique=False)
