"""Sealed datasets as they are on record: their versions, where each came from, and their privacy budgets.

Guarantees: a budget is never lowered below what is spent; a version that has ended is known as such to whoever looks.
Whoever does not own a dataset is told published numbers of rows and no other (`datasets.manifest`): neither the signed
manifest, which counts the rows of each file, nor how large a file is.
How versions come about is in `registration`, how they end in `lifecycle`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, select

from cloister.authority import ledger_seals, resources
from cloister.authority.approvals import Approvals
from cloister.authority.core import Action, Caller, Core
from cloister.authority.ledger import Budget, budget_of, change_budget, has_budget, spending
from cloister.authority.overlap import Overlap
from cloister.authority.populations import described, ledger_of, members, versions
from cloister.datasets.manifest import DatasetManifest
from cloister.datasets.schema import DatasetSchema, Unit
from cloister.errors import BudgetError, ConflictError, InputError, NotFoundError
from cloister.privacy.plan import require_small_delta
from cloister.privacy.spec import MIN_DELTA
from cloister.rounding import most_rows, rounded_down
from cloister.stores.blobs import Stores
from cloister.stores.tables import data_keys, datasets, models, runs

MOST_EPSILON = 100.0
LEAST_DELTA = 2 * MIN_DELTA  # each of the two rules that compose runs has half of it (`ledger`)
DELTA_BELOW = 1e-2
BATCH = 5_000  # databases take about 32,000 parameters in one statement
_SHORT = [column for column in datasets.c if column.name not in ("manifest", "envelope", "owner_key")]


class Datasets:
    """Registered dataset versions."""

    def __init__(self, core: Core, approvals: Approvals, overlap: Overlap, stores: Stores) -> None:
        self._core = core
        self._approvals = approvals
        self._overlap = overlap
        self._stores = stores

    def show(self, caller: Caller, name: str, version: int) -> dict[str, Any]:
        """Manifest, owner, state and budget of one version, and the lineage of the whole dataset.

        The signed manifest is for its owner: for all others there is no `envelope`, the manifest has no files, and
        `checks` is what files can be verified with.
        """
        with self._core.reading(caller, "dataset:read") as act:
            row = load(act.connection, name, version)
            act.allow(resources.dataset(act.connection, row))
            manifest, own = DatasetManifest.parse(row.manifest), row.owner == caller.name
            return _public(row) | {
                "digest": row.manifest_digest,
                "manifest": row.manifest if own else manifest.without_counts(),
                "envelope": row.envelope if own else None,
                "checks": None if own else [file.check() for file in manifest.files],
                "published": manifest.all_published.model_dump(),
                "owner_key": row.owner_key,
                "blobs": self._stores.for_region(row.schema["region"]).url,
                "budget": budget_shown(act.connection, row),
                "lineage": _lineage(act.connection, name),
            }

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        """Every version that the caller may see."""
        with self._core.reading(caller, "dataset:read") as act:
            rows = act.connection.execute(select(*_SHORT).order_by(datasets.c.name, datasets.c.version)).all()
            act.allow(resources.new_dataset("any", caller.name))
            known: dict[str | None, Budget] = {}
            shown = []
            for row in rows:
                ledger = ledger_of(act.connection, row)
                budget = known[ledger] = known.get(ledger) or budget_of(act.connection, ledger)
                if act.permits(resources.dataset(act.connection, row, budget=budget)):
                    shown.append(_public(row) | {"budget": budget.to_dict() | {"joined": ledger is not None}})
            return shown

    def set_budget(
        self, caller: Caller, name: str, epsilon: float, delta: float, version: int | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Set the total that all runs may spend on all datasets of one owner, population and unit. To raise it takes
        approval, and so does a first one above the site's ceiling.

        Raises:
            BudgetError: less than what is spent or held already.
            InputError: outside its range, or a delta that protects no row.
            ApprovalMissingError: not enough others agreed, or nobody has answered whether the dataset is about people
                in another ledger; names the request.
        """
        with self._core.action(caller, "budget:set", epsilon=epsilon, delta=delta) as act:
            last = _version(act.connection, name, version)
            if last is None:
                raise NotFoundError(f"there is no dataset {name}", "seal it first: cloister data seal")
            act.allow(resources.dataset(act.connection, last))
            ledger = self._overlap.require(act, last)
            _require_range(epsilon, delta)
            manifest = DatasetManifest.parse(load(act.connection, name, last.version).manifest)
            require_small_delta(delta, most_rows_of(act.connection, ledger, manifest))
            before, approval = budget_of(act.connection, ledger), None
            _require_enough(replace(before, epsilon=epsilon, delta=delta), name)
            # A budget of nothing is one too: what a rollback left of it.
            first = not has_budget(act.connection, ledger)
            if first:
                approve = epsilon > self._approvals.required.budget_from
            else:
                approve = epsilon > before.epsilon or delta > before.delta
            if approve:
                approval = self._approve(act, last, ledger, before, epsilon, delta)
            with ledger_seals.changing(act, ledger):
                change_budget(act.connection, ledger, epsilon, delta, caller.name, approval, self._core.clock())
            return budget_shown(act.connection, last)

    def _approve(
        self, act: Action, row: Any, ledger: str, before: Budget, epsilon: float, delta: float
    ) -> str | None:  # fmt: skip
        if not self._approvals.required.budget:
            return None
        details = {
            "dataset": row.name, "datasets": members(act.connection, ledger), "epsilon": [before.epsilon, epsilon],
            "delta": [before.delta, delta],
        }  # fmt: skip
        wanted = "more epsilon or delta than before"
        if not has_budget(act.connection, ledger):
            wanted = f"a first budget above epsilon {self._approvals.required.budget_from:g}"
        approval, _ = self._approvals.demand(
            act, "budget", f"budget of {row.name}", details, owner=row.owner, wanted=wanted,
            next_step=f"set it again: cloister budget set {row.name}",
        )  # fmt: skip
        return approval

    def budget(self, caller: Caller, name: str, version: int | None = None) -> dict[str, Any]:
        """The budget, who shares it, what is left of it, whom it protects, how it came to be, and who spent it."""
        with self._core.reading(caller, "dataset:read") as act:
            last = _version(act.connection, name, version)
            act.allow(resources.dataset(act.connection, last) if last else resources.new_dataset(name, ""))
            if last is None:
                raise NotFoundError(f"there is no dataset {name}", "list them: cloister data list")
            unit = unit_of(DatasetSchema.from_mapping(last.schema))
            ledger = ledger_of(act.connection, last)
            return budget_shown(act.connection, last) | {"unit": unit} | spending(act.connection, ledger)


def budget_shown(connection: Connection, row: Any) -> dict[str, Any]:
    """The budget that pays for a version of a dataset, and who shares it."""
    shown = budget_of(connection, ledger_of(connection, row)).to_dict()
    return {"dataset": row.name} | shown | described(connection, row)


def most_rows_of(connection: Connection, ledger: str, manifest: DatasetManifest) -> int:
    """The most rows, by published numbers, of any version that a ledger pays for: the manifest's, and all that are live
    or were trained on.
    """
    trained = select(runs.c.dataset, runs.c.version).where(runs.c.ledger == ledger).distinct()
    used = {(row.dataset, row.version) for row in connection.execute(trained)}
    paid = [row for row in versions(connection, ledger) if row.ended is None or (row.name, row.version) in used]
    own = manifest.most_rows("train") + manifest.most_rows("holdout")
    return max([own, *(most_rows(row.rows) for row in paid)])


def _require_range(epsilon: float, delta: float) -> None:
    """Refuse a budget that no run could spend, or that would promise nothing.

    Raises:
        InputError: it is one; names the number that is wrong.
    """
    if epsilon <= 0:
        raise InputError(f"epsilon {epsilon:g} is not above 0", f"choose one above 0, at most {MOST_EPSILON:g}")
    if epsilon > MOST_EPSILON:
        raise InputError(
            f"epsilon {epsilon:g} is above the most that a budget has, {MOST_EPSILON:g}",
            f"choose --epsilon {MOST_EPSILON:g} or less",
        )
    if delta < LEAST_DELTA:
        raise InputError(
            f"delta {delta:g} is below the least that a budget has, {LEAST_DELTA:g}",
            f"runs need half of it, and have at least {MIN_DELTA:g}: choose --delta {LEAST_DELTA:g} or more",
        )
    if delta >= DELTA_BELOW:
        raise InputError(f"delta {delta:g} is not below {DELTA_BELOW:g}", "choose one below that, and below 1/rows")


def _require_enough(budget: Budget, name: str) -> None:
    """Refuse a budget that is below what is spent or held.

    Raises:
        BudgetError: it is; names what would do.
    """
    if budget.holds():
        return
    least, _ = budget.charged()
    shared = f"already, of {name} and what shares its budget"
    if budget.spent.curve is None and budget.spent.delta > budget.delta:
        raise BudgetError(
            f"runs have spent or hold delta {budget.spent.delta:g} {shared}", "choose a --delta that is no smaller"
        )
    # What sums of decimal fractions are off by does not count (`ledger`), or 3 would be told as 3.01.
    enough = math.ceil(round(100 * least, 7)) / 100 if math.isfinite(least) else math.inf
    raise BudgetError(
        f"at delta {budget.delta:g}, runs have spent or hold epsilon {least:.3f} {shared}",
        f"choose at least --epsilon {enough:.2f}" if enough <= MOST_EPSILON else "choose a larger --delta",
    )


def _version(connection: Connection, name: str, version: int | None) -> Any:
    """A version's row, or the newest one's, or None; without the long parts."""
    if version is None:
        return latest(connection, name)
    mine = (datasets.c.name == name) & (datasets.c.version == version)
    return connection.execute(select(*_SHORT).where(mine)).one_or_none()


def unit_of(schema: DatasetSchema) -> dict[str, Any]:
    """Whose privacy epsilon is about: `column` is null where it is each row's."""
    column = schema.unit.column if isinstance(schema.unit, Unit) else None
    return {"column": column, "max_rows": schema.rows_per_unit}


def keys_of(connection: Connection, name: str, refs: Iterable[str]) -> list[Any]:
    """The rows of the data keys that are still there, of the files `refs` (`SealedFile.ref`)."""
    found: list[Any] = []
    for sealed_in, files in files_by_version(refs).items():
        mine = (data_keys.c.name == name) & (data_keys.c.version == sealed_in)
        for start in range(0, len(files), BATCH):
            some = data_keys.c.file.in_(files[start : start + BATCH])
            found += connection.execute(select(data_keys).where(mine, some)).all()
    return found


def files_by_version(refs: Iterable[str]) -> dict[int, list[str]]:
    """The names of data keys (`shard/part`) by the version that the files were sealed in."""
    files: dict[int, list[str]] = {}
    for ref in refs:
        version, _, file = ref.partition("/")
        files.setdefault(int(version), []).append(file)
    return files


def latest(connection: Connection, name: str) -> Any:
    """The newest version's row, or None; without the long parts: manifest, envelope and key."""
    query = select(*_SHORT).where(datasets.c.name == name).order_by(datasets.c.version.desc()).limit(1)
    return connection.execute(query).one_or_none()


def live_versions(connection: Connection, name: str) -> list[Any]:
    """The rows of the versions that have not ended, oldest first."""
    mine = (datasets.c.name == name) & datasets.c.ended.is_(None)
    return list(connection.execute(select(datasets).where(mine).order_by(datasets.c.version)).all())


def load(connection: Connection, name: str, version: int) -> Any:
    """One version's row.

    Raises:
        NotFoundError: there is none.
    """
    row = connection.execute(
        select(datasets).where(datasets.c.name == name, datasets.c.version == version)
    ).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no dataset {name}@{version}", "list them: cloister data list")
    return row


def brief(connection: Connection, name: str, version: int) -> Any:
    """One version's row, which is there, without the long parts: manifest, envelope and key."""
    mine = (datasets.c.name == name) & (datasets.c.version == version)
    return connection.execute(select(*_SHORT).where(mine)).one()


def require_live(connection: Connection, row: Any) -> None:
    """Refuse a version that has ended.

    Raises:
        ConflictError: it has; names the version in its place, and the certificate.
    """
    if row.ended is None:
        return
    query = select(datasets.c.version).where(datasets.c.name == row.name, datasets.c.ended.is_(None))
    newer = connection.execute(query.order_by(datasets.c.version.desc()).limit(1)).scalar_one_or_none()
    instead = f"; {row.name}@{newer} is live" if newer else ""
    why = f"what is gone, and why: cloister data certificate {row.erasure}"
    if row.erasure is None:  # the state was restored from a backup that does not know of it
        why = "its keys were destroyed after the backup that the state was restored from"
    raise ConflictError(f"{row.name}@{row.version} ended on {day(row.ended)}{instead}", why)


def day(time_s: float) -> str:
    """The UTC day of a Unix time, as ISO 8601."""
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()


def _public(row: Any) -> dict[str, Any]:
    return {
        "dataset": f"{row.name}@{row.version}",
        "owner": row.owner,
        "kind": row.kind,
        "rows": rounded_down(row.rows),  # versions of before there were published numbers have the exact one
        "files": row.files,
        "state": "live" if row.ended is None else "ended",
        "ended": row.ended,
        "erasure": row.erasure,
        "due": row.due,
        "created": row.created,
    }


def _lineage(connection: Connection, name: str) -> list[dict[str, Any]]:
    """Every version of a dataset, oldest first: what it was made from, and what came of it."""
    c = datasets.c
    versions = connection.execute(
        select(c.version, c.kind, c.parents, c.rows, c.created, c.due, c.ended, c.erasure)
        .where(c.name == name).order_by(c.version)
    ).all()  # fmt: skip
    trained = connection.execute(
        select(runs.c.version, runs.c.id, runs.c.state, models.c.name, models.c.version.label("model"), models.c.stage,
               models.c.flags)
        .outerjoin(models, models.c.run == runs.c.id).where(runs.c.dataset == name).order_by(runs.c.created)
    ).all()  # fmt: skip
    return [
        {
            "dataset": f"{name}@{row.version}", "kind": row.kind, "parents": row.parents,
            "rows": rounded_down(row.rows), "created": row.created, "due": row.due,
            "state": "live" if row.ended is None else "ended", "ended": row.ended, "erasure": row.erasure,
            "runs": [
                {
                    "run": run.id, "state": run.state, "model": f"{run.name}@{run.model}" if run.name else None,
                    "stage": run.stage, "flags": run.flags or [],
                }
                for run in trained if run.version == row.version
            ],
        }
        for row in versions
    ]  # fmt: skip
