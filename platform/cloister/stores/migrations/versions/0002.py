"""Attempts, checkpoints and signed ends of runs; changes of budgets; seals over ledgers."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NEW: tuple[sa.Column[Any], ...] = (
    sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("world_size", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("resume_from", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("position", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("checkpoint", sa.JSON(), nullable=True),
    sa.Column("settled", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("run_end", sa.JSON(), nullable=True),
)


def upgrade() -> None:
    with op.batch_alter_table("runs") as runs:
        for column in _NEW:
            runs.add_column(column)
    # Whatever had begun was its first attempt; whatever had ended was settled then. No attempt is open: workers of
    # before speak another protocol.
    op.execute("UPDATE runs SET attempt = 1 WHERE id IN (SELECT run FROM leases)")
    op.execute("UPDATE runs SET position = steps_committed")
    op.execute("UPDATE runs SET settled = (1 = 1) WHERE state IN ('finished', 'failed', 'stopped')")
    with op.batch_alter_table("runs") as runs:
        for column in _NEW:
            if not column.nullable:
                runs.alter_column(column.name, server_default=None)
    with op.batch_alter_table("leases") as leases:
        leases.drop_constraint(op.f("pk_leases"), type_="primary")
        leases.add_column(sa.Column("attempt", sa.Integer(), nullable=False, server_default="1"))
        leases.create_primary_key(op.f("pk_leases"), ["run", "attempt", "rank"])
    with op.batch_alter_table("leases") as leases:
        leases.alter_column("attempt", server_default=None)
    op.create_table(
        "budget_changes",
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("person", sa.String(), nullable=False),
        sa.Column("epsilon_before", sa.Float(), nullable=False),
        sa.Column("epsilon", sa.Float(), nullable=False),
        sa.Column("delta_before", sa.Float(), nullable=False),
        sa.Column("delta", sa.Float(), nullable=False),
        sa.Column("approval", sa.String(), nullable=True),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("dataset", "number", name=op.f("pk_budget_changes")),
    )
    op.create_table(
        "ledger_seals",
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("counter", sa.Integer(), nullable=False),
        sa.Column("seal", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("dataset", name=op.f("pk_ledger_seals")),
    )
    # To be sealed by the authority, which has the keys: see `cloister.authority.ledger_seals.adopt`.
    names = op.get_bind().execute(sa.text("SELECT DISTINCT name FROM datasets")).scalars().all()
    seals = sa.table("ledger_seals", sa.column("dataset"), sa.column("counter"), sa.column("seal", sa.LargeBinary()))
    op.bulk_insert(seals, [{"dataset": name, "counter": 0, "seal": b""} for name in names])
