"""How the tables came to be: one file in `versions/` for each change of `cloister.stores.tables`, applied by Alembic.

Guarantees: an upgrade is whole or nothing, since it runs in the caller's transaction; a database of a newer Cloister or
of somebody else is refused untouched. There is no way back: the log in it only grows.
"""

from __future__ import annotations

from sqlalchemy import Column, Connection, MetaData, String, Table, inspect, select

from cloister.errors import UnavailableError

HEAD = "0003"  # the newest in `versions/`, kept here so that a database that is up to date needs no Alembic

_version = Table("alembic_version", MetaData(), Column("version_num", String(32), nullable=False))


def revision(connection: Connection) -> str | None:
    """The migration that the database is at, or None where it is empty.

    Raises:
        UnavailableError: it has tables, but they are not Cloister's.
    """
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    found = connection.execute(select(_version)).scalars().all() if _version.name in tables else []
    if len(found) != 1:
        raise UnavailableError("the state database holds something else", "give Cloister a database of its own")
    return str(found[0])


def upgrade(connection: Connection, to: str = "head") -> None:
    """Bring the tables up to date, or to the revision `to`, within the connection's transaction.

    Raises:
        UnavailableError: the database is newer than this Cloister, or not its own.
    """
    from alembic import command  # slow to import, and needed once in a database's life
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "cloister.stores:migrations")
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    current = revision(connection)
    if not {current, to} <= {None, "head", *known}:
        raise UnavailableError(
            "the state database is of a newer Cloister", "upgrade Cloister; an older one must not write to it"
        )
    command.upgrade(config, to)
