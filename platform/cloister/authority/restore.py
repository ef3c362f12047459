"""Restoring a backup: everything is checked in a copy beside the state, and only then put in its place.

Guarantees: a backup that is damaged, cut, another authority's, or of a newer Cloister changes nothing; one that is
older than what the key service remembers (the last key that left, the last checkpoint that a witness cosigned), or than
the state that is there, is refused, unless whoever restores it answers for the rollback, which is then the first entry
after it; the swap is whole or not at all, and SQLite's file of before is kept.

What a restored state forgets must not come back to life, so on every restore: all tokens and lent roles end, requests
for approval that were open are void, runs that had not ended end, charged for their whole plan; dataset versions and
models whose keys were destroyed since end as well. After a rollback each dataset has no budget left beyond what is
charged, until it is raised, which takes approval: what was spent since is not known any more.

Not guaranteed, after a rollback: that somebody who was shut out since is still shut out; the log says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from cloister.audit.checkpoint import parse_verifier_key
from cloister.audit.verify import verify_log
from cloister.authority import backup, ledger_seals, resources
from cloister.authority.backup import Header, Progress
from cloister.authority.core import PLATFORM, Action, Caller, Core
from cloister.authority.data import latest
from cloister.authority.journal import LOG_ORIGIN, Head
from cloister.authority.key_use import MODELS, dataset_key
from cloister.authority.ledger import budget_of, change_budget
from cloister.authority.log import read_export
from cloister.authority.maintenance import Parts, local_caller, manifest_row, recorded_blobs
from cloister.authority.populations import ledger_names, members
from cloister.errors import CloisterError, ConflictError, IntegrityError, NotFoundError, UnavailableError
from cloister.signing.run_end import ENDED
from cloister.stores import engines
from cloister.stores.blobs import Blobs, check_path
from cloister.stores.database import Database
from cloister.stores.dump import dump, load
from cloister.stores.keys import version_of
from cloister.stores.tables import (
    approvals,
    data_keys,
    datasets,
    elevations,
    identities,
    metadata,
    models,
    refresh_tokens,
    revocations,
    runs,
)

STAGED = "state.db.restoring"
LEAP = 1_000_000
"""Added to each identity's epoch, and to the number of the last revocation: more of either than there were since."""
_RUN_ERROR = {
    "error": "the authority's state was restored from a backup", "hint": "submit a new run", "kind": "ConflictError",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What is there now. `rolled_back_from` is the size of the log that is forgotten; None where nothing is."""

    backup: str
    log_size: int
    rolled_back_from: int | None
    ended: Sequence[str]
    """Dataset versions and models whose keys were destroyed since the backup."""
    runs_ended: int
    blobs_put: int
    blobs_lost: Sequence[str]
    """What is neither in the stores nor in the backup."""
    kept: Path | None
    """Where the state that was there before is kept."""


def restore(
    parts: Parts, folder: Path, who: tuple[str, bytes], *, database: Database | None = None,
    accept_rollback: bool = False, progress: Progress | None = None,
) -> Restored:  # fmt: skip
    """Put the backup in `folder` in the place of the state: `state.db`, or what `database` (PostgreSQL) is.

    `who` is the name and the private key (PEM) of an operator, as of the backup. No authority may run.

    1. decrypt into a database beside; 2. the log in it: whole, signed, as the header says; 3. not older than what is
    remembered, nor than what is there; 4. what must not come back to life, and the entry about all this; 5. blobs;
    6. the swap; 7. the anchor.

    Raises:
        ConflictError: an authority is connected to the database, or it holds something else.
        IntegrityError: the backup is damaged, another authority's, or older, and not `accept_rollback`.
        AuthenticationError, PermissionDeniedError: not an operator, as of the backup.
        UnavailableError: the disk or the database refused.
    """
    header = Header.read(folder)
    there = _there(parts, database)
    staged = parts.directory / STAGED
    _remove(staged)
    try:
        _decrypt(parts, folder, header, staged)  # 1
        state = Database(staged)  # up to date from here on
        try:
            core = parts.core(state)
            _check_log(parts, state, header)  # 2
            forgotten = _forgotten(parts, state, there)  # 3
            if forgotten and not accept_rollback:
                known = f"that one {forgotten[0]}" if forgotten[0] > header.log_size else "that one is unknown"
                raise IntegrityError(
                    f"this backup is older than the log that the key service remembers, or that is here: it has "
                    f"{header.log_size} entries, {known}",
                    "restore the newest; or answer for what is forgotten: cloister restore FOLDER --accept-rollback",
                )
            settled, head = _settle(parts, core, local_caller(state, *who), header, forgotten)  # 4
            put, lost = _put_blobs(parts, state, folder, progress)  # 5
            if database is not None:
                _into(database, state)  # 6
        finally:
            state.close()
        kept = None if database is not None else _swap(parts.directory, staged)
        parts.keys.remember(head.size, head.root.hex(), rollback=forgotten is not None)  # 7
    except OSError as error:
        raise UnavailableError(
            f"the backup cannot be restored: {error.strerror or type(error).__name__}", "check the disk; run it again"
        ) from error
    finally:
        _remove(staged)
    return Restored(
        backup=header.id, log_size=head.size, rolled_back_from=forgotten[0] if forgotten else None, blobs_put=put,
        blobs_lost=lost, kept=kept, **settled,
    )  # fmt: skip


def _there(parts: Parts, database: Database | None) -> tuple[int, str] | None:
    """Size and root of the log that is there now; None where there is none, or none that can be read.

    Raises:
        ConflictError: PostgreSQL holds something that is not this authority's.
    """
    file = parts.directory / "state.db"
    if database is None:
        if not file.exists():
            return None
        engine = engines.sqlite_engine(file, reading=True)
        try:
            with engine.begin() as connection:
                head = parts.journal.head(connection)
        except (CloisterError, DBAPIError):
            return None  # damaged: it is kept beside, and what the key service remembers still counts
        finally:
            engine.dispose()
    else:
        try:
            with database.reading() as connection:
                head = parts.journal.head(connection)
        except IntegrityError as error:
            raise ConflictError(
                f"the database holds what this restore would lose: {error}", "restore into an empty database"
            ) from error
    return (head.size, head.root.hex()) if head.size else None


# ---- 1, 2, 3: what the backup is ----


def _decrypt(parts: Parts, folder: Path, header: Header, staged: Path) -> None:
    engine = engines.sqlite_engine(staged, reading=False)
    try:
        with engine.begin() as connection:
            load(connection, backup.open_state(parts.keys, folder, header))
    except FileNotFoundError:
        raise NotFoundError(f"the backup in {folder} is not whole", "use another backup") from None
    except DBAPIError as error:
        raise UnavailableError(
            f"the backup cannot be decrypted beside the state: {engines.cause(error)}", "free the disk; run it again"
        ) from None
    finally:
        engine.dispose()


def _check_log(parts: Parts, state: Database, header: Header) -> None:
    exported, entries = read_export(state, parts.verifier_key)
    report = verify_log(entries, exported.checkpoints, parse_verifier_key(parts.verifier_key)[1], LOG_ORIGIN)
    with state.reading() as connection:
        parts.journal.head(connection)
    if (report.size, report.root_hex) != (header.log_size, header.log_root):
        raise IntegrityError("the log in the backup is not the one that its header names", "use another backup")


def _forgotten(parts: Parts, state: Database, there: tuple[int, str] | None) -> tuple[int, str] | None:
    """The longest log that is remembered or there, and that the state does not extend.

    Whoever made the backup anchored its log: a key service that remembers none has forgotten how much longer it became.
    """
    lost = []
    with state.reading() as connection:
        head = parts.journal.head(connection)
        remembered = parts.keys.remembered()
        if remembered is None:
            lost.append((head.size, head.root.hex()))
        for size, root in filter(None, (remembered, there)):
            if head.size < size or parts.journal.root_at(connection, size).hex() != root:
                lost.append((size, root))
    return max(lost, default=None)


# ---- 4: what must not come back to life ----


def _settle(
    parts: Parts, core: Core, caller: Caller, header: Header, forgotten: tuple[int, str] | None
) -> tuple[dict[str, Any], Head]:  # fmt: skip
    """The first action after the backup, with its entry. Returns what it ended, and the log with it."""
    now = parts.clock()
    said: dict[str, Any] = {"backup": header.id, "to_size": header.log_size, "to_root": header.log_root}
    if forgotten:
        said |= {"rollback": True, "from_size": forgotten[0], "from_root": forgotten[1]}
    with core.action(caller, "backup:restore", **said) as act:
        act.allow(PLATFORM)
        connection = act.connection
        ended = _end_noise(parts, connection, header.id, now)
        failed = connection.execute(
            update(runs).where(runs.c.state.not_in(ENDED))
            .values(state="failed", error=_RUN_ERROR, ended=now, world_size=0)
        ).rowcount  # fmt: skip
        connection.execute(update(approvals).where(approvals.c.state == "open").values(state="void"))
        _end_sessions(connection, now)
        act.details.update(ended=",".join(ended)[:512], runs_ended=failed)
    with core.database.reading() as connection:
        names = ledger_names(connection)
    for name in names:
        with core.of_itself("ledger:seal") as act:
            _close_ledger(core, act, name, freeze=caller.name if forgotten else None)
    with core.database.reading() as connection:
        return {"ended": ended, "runs_ended": failed}, parts.journal.head(connection)


def _end_noise(parts: Parts, connection: Connection, restored: str, now: float) -> list[str]:
    """End the versions and models whose keys were destroyed since, and drop what is left of these keys.

    What learned from such a version is flagged with the id of the backup `restored`, for the erasure is forgotten.

    Raises:
        IntegrityError: the key service is older than the backup, or another one.
    """
    oldest = {each.name: (each.oldest, each.newest) for each in parts.keys.states()}

    def is_noise(key: str, wrapped: bytes) -> bool:
        first, last = oldest.get(key, (1, 0))
        if version_of(wrapped) > last:
            raise IntegrityError(
                f"the key service does not have the version of the key {key} that the backup needs: it is older",
                "restore the newest state of the key service first",
            )
        return version_of(wrapped) < first

    ended = []
    for name in connection.execute(select(data_keys.c.name).distinct()).scalars().all():
        rows = connection.execute(select(data_keys).where(data_keys.c.name == name)).all()
        noise = {f"{row.version}/{row.file}": row for row in rows if is_noise(dataset_key(name), row.wrapped)}
        for row in noise.values():
            mine = (data_keys.c.name == name) & (data_keys.c.version == row.version) & (data_keys.c.file == row.file)
            connection.execute(delete(data_keys).where(mine))
        live = select(datasets.c.version).where(datasets.c.name == name, datasets.c.ended.is_(None))
        for version in connection.execute(live).scalars().all() if noise else ():
            files = manifest_row(connection, name, version).manifest["files"]
            if any(f"{file['sealed_in']}/{file['shard']}/{file['part']}" in noise for file in files):
                mine = (datasets.c.name == name) & (datasets.c.version == version)
                connection.execute(update(datasets).where(mine).values(ended=now))
                _flag_learned(connection, name, version, restored)
                ended.append(f"{name}@{version}")
    for model in connection.execute(select(models.c.name, models.c.version, models.c.model_key)).all():
        if is_noise(MODELS, model.model_key):
            mine = (models.c.name == model.name) & (models.c.version == model.version)
            connection.execute(update(models).where(mine).values(stage="refused"))
            ended.append(f"model {model.name}@{model.version}")
    return ended


def _flag_learned(connection: Connection, name: str, version: int, flag: str) -> None:
    for run in connection.execute(
        select(runs.c.id, runs.c.flags).where(runs.c.dataset == name, runs.c.version == version)
    ).all():
        flags = [*run.flags, flag]
        connection.execute(update(runs).where(runs.c.id == run.id).values(flags=flags))
        connection.execute(update(models).where(models.c.run == run.id).values(flags=flags))


def _end_sessions(connection: Connection, now: float) -> None:
    """All tokens and lent roles, of before and of what is forgotten: also for replicas that have heard of more."""
    connection.execute(delete(refresh_tokens))
    connection.execute(delete(elevations))
    connection.execute(update(identities).values(epoch=identities.c.epoch + LEAP))
    last = connection.execute(select(func.coalesce(func.max(revocations.c.sequence), 0))).scalar_one()
    everybody = connection.execute(select(identities.c.name, identities.c.epoch).order_by(identities.c.name)).all()
    connection.execute(
        insert(revocations),
        [
            {"sequence": last + LEAP + index, "name": row.name, "epoch": row.epoch, "token_id": None, "created": now}
            for index, row in enumerate(everybody)
        ],
    )


def _close_ledger(core: Core, act: Action, name: str, *, freeze: str | None) -> None:
    """No run of a ledger gives anything back any more: what it did since is not known.

    With `freeze`, the name of who answers for it, the ledger has nothing left either; to raise its budget takes
    approval. A ledger that is not as it was sealed stays so: nothing is trained on it, and `cloister fsck` names it.
    """
    connection = act.connection
    mine = (runs.c.ledger == name) & runs.c.settled.is_(False)
    if freeze is None and connection.execute(select(runs.c.id).where(mine)).first() is None:
        return
    names = members(connection, name)
    if not names:
        return  # it was edited: `cloister fsck` names it
    act.resource = resources.dataset(connection, latest(connection, names[0]))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(IntegrityError):
            stack.enter_context(ledger_seals.changing(act, name))
        connection.execute(update(runs).where(mine).values(settled=True))
        if freeze:
            budget = budget_of(connection, name)
            change_budget(connection, name, budget.charged()[0], budget.delta, freeze, None, core.clock())


# ---- 5: blobs ----


def _put_blobs(parts: Parts, state: Database, folder: Path, progress: Progress | None) -> tuple[int, list[str]]:
    """Put those that the stores do not have as they were sealed, once the backup's are known to be so."""
    with state.reading() as connection:
        needed = list(recorded_blobs(connection))
    there: dict[str, set[str]] = {}
    put, lost = 0, []
    for done, blob in enumerate(needed, start=1):
        store = parts.stores.for_region(blob.region)
        if blob.region not in there:
            there[blob.region] = {path for top in ("datasets", "models") for path in store.list(top)}
        found = blob.path in there[blob.region]
        if not found or not _is_whole(store, blob):
            try:
                data = (folder / backup.BLOBS_FOLDER / check_path(blob.path)).read_bytes()
            except FileNotFoundError:
                lost.append(blob.what)
                continue
            if hashlib.sha256(data).hexdigest() != blob.sha256:
                raise IntegrityError(
                    f"a file of the backup is not the one that was sealed: {blob.what}", "use another backup"
                )
            if found:
                store.remove(blob.path)
            store.put(blob.path, data)
            put += 1
        if progress:
            progress(done, len(needed))
    return put, lost


def _is_whole(store: Blobs, blob: Any) -> bool:
    hashed = hashlib.sha256()
    for chunk in store.chunks(blob.path):
        hashed.update(chunk)
    return hashed.hexdigest() == str(blob.sha256)


def restore_blobs(
    parts: Parts, state: Database, folder: Path, caller: Caller, *, progress: Progress | None = None
) -> tuple[int, Sequence[str]]:
    """Put back the sealed files that are missing or changed, and nothing else: how many, and what is in no backup.

    What they have to be is said by the state, which stays as it is; so the backup may be of any age.

    Raises:
        NotFoundError: there is no backup in `folder`.
        PermissionDeniedError: the caller may not restore.
        IntegrityError: the backup's copy of one is not what was sealed either.
    """
    header = Header.read(folder)
    with parts.core(state).action(caller, "backup:restore", backup=header.id, blobs_only=True) as act:
        act.allow(PLATFORM)
    return _put_blobs(parts, state, folder, progress)


# ---- 6: the swap ----


def _swap(directory: Path, staged: Path) -> Path | None:
    """Give `staged` the name `state.db`; what had it is kept in a folder beside. Returns that folder."""
    final = directory / "state.db"
    _fold_journal(staged)
    kept = None
    if final.exists():
        kept = directory / f"replaced-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(2).hex()}"
        kept.mkdir(mode=0o700)
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(final)) as old:
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # closing it then removes its journal
        # SQLite would read the journal of the old database into the new one.
        for journal in (final.with_name("state.db-wal"), final.with_name("state.db-shm")):
            if journal.exists():
                journal.rename(kept / journal.name)
        os.link(final, kept / final.name)
        backup.sync_tree(kept)
    backup.sync(staged)
    staged.replace(final)
    backup.sync(directory)
    return kept


def _fold_journal(staged: Path) -> None:
    """Bring all of `staged` into one file. SQLite does so at the last close, but says nothing if it fails.

    Raises:
        UnavailableError: the disk refused.
    """
    try:
        with contextlib.closing(sqlite3.connect(staged)) as database:
            mode = database.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
            whole = database.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error:
        mode = whole = ""
    if (mode, whole) != ("delete", "ok") or staged.with_name(f"{staged.name}-wal").exists():
        raise UnavailableError("the restored state could not be written whole", "check the disk; run it again")


def _into(database: Database, state: Database) -> None:
    """Replace what PostgreSQL holds by `state`, in one transaction."""
    database.close()  # our own connections, or they would be taken for an authority's
    with database.transaction() as connection, state.reading() as source:
        _require_alone(connection)
        metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
        load(connection, dump(source))


def _require_alone(connection: Connection) -> None:
    others = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'cloister' AND pid <> pg_backend_pid()"
    )
    for _ in range(10):  # connections that were closed a moment ago take the server a moment
        if not connection.execute(others).scalar_one():
            return
        time.sleep(0.1)
    raise ConflictError("an authority is connected to the database", "stop every one of them first: cloister down")


def _remove(staged: Path) -> None:
    for end in ("", "-wal", "-shm", "-journal"):
        staged.with_name(staged.name + end).unlink(missing_ok=True)
