"""Alembic's entry: migrates the connection that `cloister.stores.migrations.upgrade` hands over."""

from __future__ import annotations

from alembic import context

from cloister.stores.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
