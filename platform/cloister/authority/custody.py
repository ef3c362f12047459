"""Custody of the keys at rest: rotation of what wraps them, and destruction that old backups cannot undo.

Guarantees: after `rotate`, every key that was wrapped under the named key is wrapped under its new version, in the
transaction of the entry that says so, and no data was touched. `shred` does that with what is left of a dataset's data
keys, and puts the old versions down for destruction; `finish` destroys them once that is committed, again at every
start if need be. So a transaction that fails destroys nothing; one that commits destroys in the end, whatever dies in
between; and what was wrapped under the old versions, in whatever copy of the state, is noise.

Not guaranteed: destruction of copies that somebody made of the key service itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)

from cloister.authority.core import ITSELF, PLATFORM, Action, Caller, Core
from cloister.authority.key_use import LEDGER, MODELS, dataset_key, key_context, ledger_context, model_key_context
from cloister.errors import IntegrityError, NotFoundError
from cloister.stores.keys import version_of
from cloister.stores.tables import data_keys, key_destructions, ledger_seals, models, runs

BATCH = 1000  # rows a statement
DATASET = "dataset/"


class Custody:
    """What holds for wrapped keys in the state."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        """Every named key, with how many keys of the state are wrapped under it."""
        with self._core.reading(caller, "key:list") as act:
            act.allow(PLATFORM)
            counts = _counts(act.connection)
        return [
            {
                "name": state.name, "use": state.use, "oldest": state.oldest, "newest": state.newest,
                "created": state.created, "rotated": state.rotated,
                "keys": counts.get(state.name, 0) if state.use == "wrap" else None,
            }
            for state in self._core.key_states()
        ]  # fmt: skip

    def rotate(self, caller: Caller, name: str) -> dict[str, Any]:
        """Rotate a wrapping key, and wrap every key that is under it under the new version. No data is touched.

        Raises:
            NotFoundError, InputError: there is no such key, or it is not a wrapping key.
        """
        with self._core.action(caller, "key:rotate", key=name[:128]) as act:
            act.allow(PLATFORM)
            version = act.keys.rotate(name)
            count = self.rewrap(act, name)
            act.details.update(version=version, keys=count)
        return {"name": name, "version": version, "keys": count}

    def rewrap(self, act: Action, name: str) -> int:
        """Wrap every key of the state that is under the named key under its newest version. Returns how many."""
        if name == MODELS:
            return _rewrap_models(act)
        if name == LEDGER:
            return _rewrap_seals(act)
        return _rewrap_data_keys(act, name.removeprefix(DATASET)) if name.startswith(DATASET) else 0

    def shred(self, act: Action, dataset: str) -> int:
        """Make the rows of data keys that were deleted before, in this action, noise in every copy of the state.

        Call `finish` once the action has ended. Returns how many data keys of the dataset are left.
        """
        name = dataset_key(dataset)
        try:
            version = act.keys.rotate(name)
        except NotFoundError:  # it never wrapped a key
            return 0
        count = self.rewrap(act, name)
        for wrapped in act.connection.execute(select(data_keys.c.wrapped).where(data_keys.c.name == dataset)).scalars():
            if version_of(wrapped) < version:
                raise IntegrityError("a key is still wrapped under a version that is to be destroyed", "try it again")
        act.connection.execute(
            insert(key_destructions).values(name=name, below=version, created=self._core.clock(), destroyed=None)
        )
        act.details["key_versions_destroyed_below"] = version
        return count

    def finish(self) -> int:
        """Destroy the versions that committed actions have put down for it. Returns how many keys that concerned.

        Raises:
            KeyServiceError: the key service cannot be had; it is done at the next start, or the next time.
            InputError, NotFoundError: the key service is older than the state: it has not even made those versions.
        """
        with self._core.database.reading() as connection:
            pending = connection.execute(
                select(key_destructions.c.name, func.max(key_destructions.c.below).label("below"))
                .where(key_destructions.c.destroyed.is_(None))
                .group_by(key_destructions.c.name)
            ).all()  # fmt: skip
        for row in pending:
            self._core.destroy_versions(row.name, row.below)
            with self._core.database.transaction() as connection:
                done = (key_destructions.c.name == row.name) & (key_destructions.c.below <= row.below)
                done &= key_destructions.c.destroyed.is_(None)
                changed = connection.execute(
                    update(key_destructions).where(done).values(destroyed=self._core.clock())
                ).rowcount
                if changed:  # another authority may have been first
                    self._core.append(
                        connection, ITSELF, "key:shred", PLATFORM, "success", "itself", key=row.name, below=row.below
                    )
        return len(pending)


def _counts(connection: Connection) -> dict[str, int]:
    rows = connection.execute(select(data_keys.c.name, func.count()).group_by(data_keys.c.name)).all()
    tables = (runs, models, ledger_seals)
    counted = [connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables]
    return {dataset_key(name): count for name, count in rows} | {MODELS: sum(counted[:2]), LEDGER: counted[2]}


def _rewrap_data_keys(act: Action, dataset: str) -> int:
    keyed = (data_keys.c.version, data_keys.c.file)
    count = 0
    for rows in _pages(act.connection, (*keyed, data_keys.c.wrapped), keyed, data_keys.c.name == dataset):
        wrapped = [(row.wrapped, key_context(dataset, row.version, row.file)) for row in rows]
        again = act.keys.rewrap(dataset_key(dataset), wrapped)
        # Deleted and inserted, since databases take many rows in one statement only so.
        for version in {row.version for row in rows}:
            files = [row.file for row in rows if row.version == version]
            mine = and_(data_keys.c.name == dataset, data_keys.c.version == version, data_keys.c.file.in_(files))
            act.connection.execute(delete(data_keys).where(mine))
        values = [
            {"name": dataset, "version": row.version, "file": row.file, "wrapped": new}
            for row, new in zip(rows, again, strict=True)
        ]
        act.connection.execute(insert(data_keys).returning(data_keys.c.file), values)
        count += len(rows)
    return count


def _rewrap_seals(act: Action) -> int:
    rows = act.connection.execute(select(ledger_seals).where(ledger_seals.c.seal != b"")).all()
    wrapped = [(row.seal, ledger_context(row.ledger, row.counter)) for row in rows]
    for row, again in zip(rows, act.keys.rewrap(LEDGER, wrapped), strict=True):
        mine = ledger_seals.c.ledger == row.ledger
        act.connection.execute(update(ledger_seals).where(mine).values(seal=again))
    return len(rows)


def _rewrap_models(act: Action) -> int:
    count = 0
    places: Sequence[tuple[Table, tuple[Column[Any], ...], Column[Any]]] = (
        (runs, (runs.c.id,), runs.c.id), (models, (models.c.name, models.c.version), models.c.run),
    )  # fmt: skip
    for table, keyed, run in places:
        for rows in _pages(act.connection, (*keyed, run.label("run_id"), table.c.model_key), keyed):
            wrapped = [(row.model_key, model_key_context(row.run_id)) for row in rows]
            again = act.keys.rewrap(MODELS, wrapped)
            mine = and_(*(column == bindparam(f"at_{column.name}") for column in keyed))
            act.connection.execute(
                update(table).where(mine).values(model_key=bindparam("new")),
                [
                    {"new": new} | {f"at_{column.name}": row._mapping[column.name] for column in keyed}
                    for row, new in zip(rows, again, strict=True)
                ],
            )
            count += len(rows)
    return count


def _pages(
    connection: Connection, columns: Sequence[ColumnElement[Any]], keyed: Sequence[Column[Any]], *wanted: Any
) -> Iterator[Sequence[Any]]:
    """All rows in the order of `keyed`, `BATCH` at a time; those that were read may be changed meanwhile."""
    after: tuple[Any, ...] | None = None
    while True:
        query = select(*columns).where(*wanted).order_by(*keyed).limit(BATCH)
        if after is not None:
            query = query.where(tuple_(*keyed) > after)
        rows = connection.execute(query).all()
        if not rows:
            return
        yield rows
        after = tuple(rows[-1]._mapping[column.name] for column in keyed)
