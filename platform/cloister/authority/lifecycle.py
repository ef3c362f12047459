"""How dataset versions end: by erasure, correction, retention, or the destruction of their keys.

Guarantees: one transaction ends the versions, deletes their data keys, puts the key they were wrapped under down for
destruction (`custody`), flags every model that learned from them, and keeps what a certificate will say. What follows
outside of the database is done again until it is done, whatever dies in between: the wrapping key's versions are
destroyed, deleted rows overwritten, blobs deleted. Only then is the certificate signed. A version that has ended gets
no plan, no run, no lease, no further step and no appendix.

One rule says what an ending destroys, whatever its kind: the keys of all files that no live version lists any more. So
nobody keeps keys that no command reaches, and what a certificate calls ended cannot be opened.

Retention: a file is due by the version that sealed it (`files_due`); what was sealed again keeps the date of what it
replaced. A version is due, whole, as soon as one of its files is.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from cloister.authority import resources
from cloister.authority.approvals import Approvals
from cloister.authority.core import Action, Caller, Core
from cloister.authority.costs import for_rows
from cloister.authority.custody import Custody
from cloister.authority.data import BATCH, day, files_by_version, latest, live_versions, load, require_live
from cloister.authority.key_use import dataset_key
from cloister.authority.maintenance import keyed_refs, manifest_row
from cloister.authority.shredding import Shredding
from cloister.datasets.erasure import (
    MAX_FILES,
    Blobs,
    Bound,
    EndedVersion,
    Erasure,
    GoneFile,
    Keys,
    Kind,
    Reason,
    Together,
    TrainedModel,
    advice,
)
from cloister.datasets.manifest import DatasetManifest, SealedFile, file_check, parse_reference
from cloister.errors import ConflictError, UnavailableError
from cloister.rounding import rounded_down
from cloister.stores.tables import data_keys, datasets, deletions, erasures, models, runs

_OPEN = ("submitted", "training")
_log = logging.getLogger("cloister.authority")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """Which versions end; `removed` says how many rows of each are in no later one, where that is known: of those for
    training, and of those that were held out. It is private: only bounds for about as many rows leave."""

    kind: Kind
    reason: Reason
    ended: Sequence[Any]
    replaced_by: str | None = None
    removed: Mapping[int, tuple[int, int]] = field(default_factory=dict)


class Lifecycle:
    """Ends versions."""

    def __init__(self, core: Core, approvals: Approvals, custody: Custody, shredding: Shredding) -> None:
        self._core = core
        self._approvals = approvals
        self._custody = custody
        self._shredding = shredding

    # ---- what ends versions ----

    def replace(
        self, act: Action, manifest: DatasetManifest | None, before: Sequence[Any], ends: AbstractSet[str],
        reason: Reason | None,
    ) -> str:  # fmt: skip
        """End the files `ends` in the action that registers `manifest` in their place, or without another version.

        `before` are the rows of the live versions, oldest first. All of these that list one of the files end. Returns
        the erasure's id.
        """
        kind: Kind = "rectify" if manifest and manifest.lineage.kind == "rectify" else "erase"
        listed = {row.version: DatasetManifest.parse(row.manifest) for row in before}
        ended = [row for row in before if any(file.ref in ends for file in listed[row.version].files)]
        return self._end(
            act, before[-1].name,
            _Ending(
                kind=kind, reason=reason or ("correction" if kind == "rectify" else "request"), ended=ended,
                replaced_by=f"{manifest.name}@{manifest.version}" if manifest else None,
                removed=_removed(manifest, listed, ends) if manifest and kind == "erase" else {},
            ),
        )  # fmt: skip

    def account_beforehand(self, caller: Caller, manifest: DatasetManifest, ends: AbstractSet[str]) -> None:
        """Account for the models that `replace` will flag. That takes a second each and is remembered: done before the
        action, it does not hold the database's write lock."""
        if manifest.lineage.kind == "rectify":
            return
        with self._core.database.reading() as connection:
            before = live_versions(connection, manifest.name)
            trained = _trained_on(connection, manifest.name, [row.version for row in before])
        if not trained:
            return
        removed = _removed(manifest, {row.version: DatasetManifest.parse(row.manifest) for row in before}, ends)
        with contextlib.suppress(UnavailableError):  # too many wait: then the action asks, before all of them
            for row in trained:
                rows = _together_of(row, removed)
                if any(rows):
                    for_rows(row, *rows, caller.name)

    def destroy_keys(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Destroy the keys of all files of a version, for good. Every live version that lists one of them ends, and
        files that only those list go with them.

        Raises:
            ApprovalMissingError: not enough others agreed; names the request.
            ConflictError: they are destroyed already.
        """
        with self._core.action(caller, "key:destroy") as act:
            row = load(act.connection, name, version)
            act.allow(resources.dataset(act.connection, row))
            there = _refs(row) & keyed_refs(act.connection, name)
            if not there:
                raise ConflictError(f"the keys of {name}@{version} are destroyed already", "nothing to do")
            ended = [each for each in live_versions(act.connection, name) if there & _refs(each)]
            names = [f"{name}@{each.version}" for each in ended]
            self._approvals.demand(
                act, "key-destruction", f"keys of {name}@{version}",
                {"dataset": f"{name}@{version}", "manifest": row.manifest_digest, "ends": names}, owner=row.owner,
                next_step=f"destroy them: cloister key destroy {name}@{version}",
            )  # fmt: skip
            erasure = self._end(act, name, _Ending(kind="key-destruction", reason="no-longer-needed", ended=ended))
        return self._shredding.finished(act, erasure) | {"dataset": f"{name}@{version}"}

    def expire(self, caller: Caller, name: str, version: int, *, early: bool) -> dict[str, Any]:
        """End a version by retention. Before it is due only if `early`, and with the approvals that destroying keys
        takes; then files that other live versions list stay.

        Raises:
            ApprovalMissingError: it is not due, and not enough others agreed; names the request.
            ConflictError: it has ended, or it is not due.
        """
        with self._core.action(caller, "dataset:expire") as act:
            row = load(act.connection, name, version)
            act.allow(resources.dataset(act.connection, row))
            require_live(act.connection, row)
            if row.due <= self._core.clock():
                erasure = self._end_due(act, name, version)
            elif not early:
                raise ConflictError(
                    f"{name}@{version} is kept until {day(row.due)}",
                    f"before that it takes approval: cloister data expire {name}@{version} --now",
                )
            else:
                self._approvals.demand(
                    act, "key-destruction", f"expiry of {name}@{version} before its time",
                    {"dataset": f"{name}@{version}", "manifest": row.manifest_digest, "due": day(row.due)},
                    owner=row.owner, next_step=f"expire it: cloister data expire {name}@{version} --now",
                )  # fmt: skip
                erasure = self._end(act, name, _Ending(kind="expire", reason="retention", ended=[row]))
        return self._shredding.finished(act, erasure)

    def expire_due(self) -> list[str]:
        """End whatever is due. The authority's own doing, on record as such. Returns the erasures' ids.

        What fails for one dataset is told to the operator's log, and keeps no other from ending.
        """
        now = self._core.clock()
        with self._core.database.reading() as connection:
            late = select(datasets.c.name).where(datasets.c.ended.is_(None), datasets.c.due <= now)
            keyed = select(data_keys.c.name).where(data_keys.c.name == datasets.c.name,
                                                   data_keys.c.version == datasets.c.version)  # fmt: skip
            left = select(datasets.c.name).where(datasets.c.files_due <= now, keyed.exists())
            names = sorted(set(connection.execute(late.union(left)).scalars()))
        done = []
        for name in names:
            try:
                with self._core.of_itself("dataset:expire") as act:
                    act.resource = resources.dataset(act.connection, latest(act.connection, name))
                    done.append(self._end_due(act, name))
                self._core.anchor(act)
            except Exception as error:  # noqa: BLE001  (the others are due too; the text may hold anything)
                _log.error("retention: %s of %s; it is tried again", type(error).__name__, name)
        return done

    def _end_due(self, act: Action, name: str, first: int = 0) -> str:
        """End the versions of `name` that are due: as many as one certificate has room for, the others the next time.

        `first` is one of them that must not wait.
        """
        now = self._core.clock()
        due = [row for row in live_versions(act.connection, name) if row.due <= now]
        due.sort(key=lambda row: row.version != first)
        files = list(accumulate(row.files for row in due))
        ended = [row for row, so_far in zip(due, files, strict=True) if row is due[0] or so_far <= MAX_FILES]
        return self._end(act, name, _Ending(kind="expire", reason="retention", ended=ended))

    # ---- ending, in one transaction ----

    def _end(self, act: Action, name: str, ending: _Ending) -> str:
        connection, erasure = act.connection, "ers-" + secrets.token_hex(6)
        numbers = [row.version for row in ending.ended]
        mine = (datasets.c.name == name) & datasets.c.version.in_(numbers)
        connection.execute(update(datasets).where(mine).values(ended=self._core.clock(), erasure=erasure))
        gone, blobs = _unlisted(connection, name)
        if len(gone) > MAX_FILES:
            raise ConflictError(
                f"{len(gone):,} files of {name} would end, and a certificate has room for {MAX_FILES:,}",
                f"end older versions first, one after the other: cloister data expire {name}@VERSION --now",
            )
        count = _delete_keys(connection, name, [file.ref for file in gone])
        self._custody.shred(act, name)
        learned = _learned_from(connection, name, numbers, gone)
        stopped = connection.execute(
            select(runs.c.id).where(runs.c.dataset == name, runs.c.version.in_(numbers), runs.c.state.in_(_OPEN))
        ).scalars()  # fmt: skip
        facts = Erasure(
            id=erasure, kind=ending.kind, reason=ending.reason, dataset=name, time=self._core.now_text(),
            unit=_unit_of(latest(connection, name)),
            ended=tuple(
                EndedVersion(
                    version=f"{name}@{row.version}", digest=row.manifest_digest.removeprefix("sha256:"),
                    rows=rounded_down(row.rows),
                )
                for row in ending.ended
            ),
            replaced_by=ending.replaced_by,
            files=tuple(GoneFile(file=file.ref, check=file_check(file.path, file.sha256)) for file in gone),
            keys=Keys(
                data_keys=count, wrapping_key=dataset_key(name),
                destroyed_below=int(act.details.get("key_versions_destroyed_below", 1)),
            ),
            blobs=Blobs(deleted=0, pending=len(blobs)),
            models=_flag(connection, name, erasure, learned, ending.removed),
            stopped_runs=tuple(stopped),
            together=_together(connection, name, learned),
            derived=_derived(connection, name, learned),
        )  # fmt: skip
        connection.execute(
            insert(erasures).values(
                id=erasure, dataset=name, facts=facts.model_dump(mode="json"), created=self._core.clock()
            )
        )
        if blobs:
            connection.execute(
                insert(deletions), [{"region": region, "path": path, "erasure": erasure} for region, path in blobs]
            )
        act.details.update(
            erasure=erasure, keys=count, ended=",".join(f"{name}@{number}" for number in numbers)[:512],
            models=len(facts.models),
        )  # fmt: skip
        return erasure


def _refs(row: Any) -> set[str]:
    return {file.ref for file in DatasetManifest.parse(row.manifest).files}


def _unlisted(connection: Connection, name: str) -> tuple[list[SealedFile], list[tuple[str, str]]]:
    """The files with a key that no live version lists, and the blobs (region, path) to delete with them.

    A key goes by its file's `ref`, a blob by its path: if two files had one, what stays would keep it.
    """
    keyed, kept, paths = keyed_refs(connection, name), set[str](), set[str]()
    for row in live_versions(connection, name):
        for file in DatasetManifest.parse(row.manifest).files:
            kept.add(file.ref)
            paths.add(file.path)
    left, found = keyed - kept, dict[str, SealedFile]()
    waiting = {(row.region, row.path) for row in connection.execute(select(deletions)).all()}
    blobs: dict[tuple[str, str], None] = {}
    for version in sorted({int(ref.partition("/")[0]) for ref in left}):
        sealed = manifest_row(connection, name, version)
        for file in DatasetManifest.parse(sealed.manifest).files:
            if file.ref in left:
                found[file.ref] = file
                place = (str(sealed.schema["region"]), file.path)
                if file.path not in paths and place not in waiting:
                    blobs[place] = None
    return [found[ref] for ref in sorted(found)], list(blobs)


def _removed(
    successor: DatasetManifest, before: Mapping[int, DatasetManifest], ends: AbstractSet[str]
) -> dict[int, tuple[int, int]]:
    """How many rows of each version, for training and held out, are in no later one: known where its shards that end
    are the ones replaced."""
    parent = before[max(before)]
    rows_now = {file.shard: file.rows for file in successor.files}
    lost = {
        (file.sealed_in, file.shard): file.rows - rows_now.get(file.shard, 0)
        for file in parent.files
        if file.ref in ends
    }
    holdout = {(file.sealed_in, file.shard) for file in parent.files if file.role == "holdout"}
    removed = {}
    for version, manifest in before.items():
        shards = {(file.sealed_in, file.shard) for file in manifest.files if file.ref in ends}
        if shards and shards <= lost.keys():
            held_out = sum(lost[shard] for shard in shards if shard in holdout)
            removed[version] = sum(lost[shard] for shard in shards) - held_out, held_out
    return removed


def _delete_keys(connection: Connection, name: str, refs: Sequence[str]) -> int:
    count = 0
    for version, listed in files_by_version(refs).items():
        for start in range(0, len(listed), BATCH):
            mine = (data_keys.c.name == name) & (data_keys.c.version == version)
            some = data_keys.c.file.in_(listed[start : start + BATCH])
            count += connection.execute(delete(data_keys).where(mine, some)).rowcount
    return count


def _learned_from(connection: Connection, name: str, ended: Sequence[int], gone: Sequence[SealedFile]) -> list[int]:
    """The versions that had the rows of what is gone, whenever they ended themselves; of live ones none has.

    A shard keeps its name when it is sealed again: so each is traced to where its rows were sealed first, and whatever
    lists one of the same origin had them.
    """
    first: dict[tuple[int, str], tuple[int, str]] = {}
    held: dict[int, dict[str, int]] = {}  # the shards of each version, and the version that each was sealed in
    live = set[int]()
    versions = connection.execute(select(datasets.c.version).where(datasets.c.name == name)).scalars().all()
    for version in sorted(versions):
        row = manifest_row(connection, name, version)
        held[version] = {file["shard"]: file["sealed_in"] for file in row.manifest["files"]}
        own = [number for parent, number in map(parse_reference, row.parents) if parent == name]
        for shard, sealed_in in held[version].items():
            if sealed_in == version:  # it is new here, or takes the place of the one that a parent has
                before = next((held[number][shard] for number in own if shard in held[number]), None)
                first[version, shard] = (version, shard) if before is None else first[before, shard]
        if row.ended is None:
            live.add(version)
    origins = {first[file.sealed_in, file.shard] for file in gone}
    found = {
        version
        for version, shards in held.items()
        if any(first[sealed_in, shard] in origins for shard, sealed_in in shards.items())
    }
    return sorted((found - live) | set(ended))


def _derived(connection: Connection, name: str, learned: Sequence[int]) -> tuple[str, ...]:
    """The live versions of other datasets that were made from one of these, directly or not."""
    c = datasets.c
    rows = connection.execute(select(c.name, c.version, c.parents, c.ended).where(c.name != name)).all()
    made, more = set[str](), {f"{name}@{version}" for version in learned}
    while more:
        made |= more
        more = {f"{row.name}@{row.version}" for row in rows if made.intersection(row.parents)} - made
    return tuple(sorted(each for row in rows if row.ended is None and (each := f"{row.name}@{row.version}") in made))


def _flag(
    connection: Connection,
    name: str,
    erasure: str,
    learned: Sequence[int],
    removed: Mapping[int, tuple[int, int]],
) -> tuple[TrainedModel, ...]:
    """Flag the runs on these versions and their models, and say how far what these tell is bounded."""
    for run in connection.execute(
        select(runs.c.id, runs.c.flags).where(runs.c.dataset == name, runs.c.version.in_(learned))
    ).all():
        connection.execute(update(runs).where(runs.c.id == run.id).values(flags=[*run.flags, erasure]))
    flagged = []
    for row in _trained_on(connection, name, learned):
        mine = (models.c.name == row.name) & (models.c.version == row.version)
        connection.execute(update(models).where(mine).values(flags=[*row.flags, erasure]))
        epsilon, delta = float(row.epsilon_charged), float(row.delta_charged)
        unit = Bound(rows=int(row.plan.get("rows_per_unit", 1)), epsilon=epsilon, delta=delta)
        by_row = row.schema.get("unit", "row") == "row"
        rows = _together_of(row, removed)
        subject = None
        if any(rows):
            epsilon, delta = for_rows(row, *rows)
            subject = Bound(rows=sum(rows), epsilon=epsilon, delta=delta)
        flagged.append(
            TrainedModel(
                model=f"{row.name}@{row.version}", run=row.run, production=row.stage == "production", unit=unit,
                subject=subject, advice="retrain" if by_row and subject is None else advice(unit, subject),
            )
        )  # fmt: skip
    return tuple(flagged)


def _trained_on(connection: Connection, name: str, versions: Sequence[int]) -> Sequence[Any]:
    """The models that were trained on these versions, with what is charged for them."""
    return connection.execute(
        select(
            models,
            runs.c.epsilon_charged,
            runs.c.delta_charged,
            runs.c.plan,
            runs.c.steps_committed,
            datasets.c.schema,
            runs.c.version.label("trained_on"),
        )
        .join(runs, runs.c.id == models.c.run)
        .join(datasets, (datasets.c.name == runs.c.dataset) & (datasets.c.version == runs.c.version))
        .where(runs.c.dataset == name, runs.c.version.in_(versions))
        .order_by(models.c.name, models.c.version)
    ).all()


def _together_of(model: Any, removed: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
    """For how many removed rows together a certificate bounds what a model tells: for training, and held out.

    Where a row is the unit, somebody may have had several, for all of which together less holds.
    """
    rows = removed.get(model.trained_on, (0, 0)) if model.schema.get("unit", "row") == "row" else (0, 0)
    return _rounded_up(rows[0]), _rounded_up(rows[1])


def _rounded_up(rows: int) -> int:
    """To a power of two, so that a certificate tells only about how many rows somebody had; 0 for 0."""
    return 1 << (rows - 1).bit_length() if rows else 0


def _together(connection: Connection, name: str, learned: Sequence[int]) -> Together:
    spent = connection.execute(
        select(func.count(), func.coalesce(func.sum(runs.c.epsilon_charged), 0.0),
               func.coalesce(func.sum(runs.c.delta_charged), 0.0))
        .where(runs.c.dataset == name, runs.c.version.in_(learned), runs.c.epsilon_charged > 0)
    ).one()  # fmt: skip
    return Together(runs=int(spent[0]), epsilon=float(spent[1]), delta=float(spent[2]))


def _unit_of(row: Any) -> str:
    unit = row.schema.get("unit", "row")
    return str(unit if isinstance(unit, str) else unit["column"])
