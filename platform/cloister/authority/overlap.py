"""A version joins its ledger: at once, or when somebody has answered whether the same people are in another one.

Guarantees: where an owner has datasets in another ledger (another `population` in the schema, or another unit), the
first version of a dataset in its ledger joins only once a security officer has answered, signed, that nobody is in
both. Until then nothing is trained on it. Another dataset that came meanwhile makes it another question. Before a
dataset joins, every ledger that the log tells of is compared with its seal: who can write the database hides none.

Not guaranteed: that the answer is true, also of what is appended or sealed later under a name that has joined; nor
anything about rows that two owners have.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

from sqlalchemy import Connection, insert, select

from cloister.authority import ledger_seals
from cloister.authority.approvals import Approvals
from cloister.authority.core import Action
from cloister.authority.populations import (
    NAMED,
    elsewhere,
    future_ledger_of,
    ledger_of,
    members,
    population_of,
    unit_of,
)
from cloister.datasets.manifest import parse_reference
from cloister.errors import ApprovalMissingError, ConflictError, IntegrityError
from cloister.stores.tables import approvals, datasets, ledger_members, ledgers

KIND = "population"
_ROW = [datasets.c[name] for name in ("name", "version", "owner", "schema", "parents")]


class Overlap:
    """Lets versions join their ledgers, and asks where that needs an answer."""

    def __init__(self, requests: Approvals) -> None:
        self._requests = requests
        requests.on_granted[KIND] = _granted

    def register(self, act: Action, row: Any) -> dict[str, Any]:
        """Let a version that was just registered join its ledger, or ask. Says what was asked, and with which other
        datasets it shares, or would share, its budget. Where a ledger was edited it does not join: data can be
        sealed and erased all the same.
        """
        asked: dict[str, Any] = {"approval": None, "question": None}
        if _is_asked_about(act.connection, row):
            request = self._request(act, row)
            asked = {"approval": request.id, "question": request.details["question"]}
        else:
            with contextlib.suppress(IntegrityError):
                _join(act, [row], None)
        ledger = future_ledger_of(act.connection, row)
        together = members(act.connection, ledger) if ledger else []
        return asked | {"shared_with": [name for name in together if name != row.name]}

    def require(self, act: Action, row: Any) -> str:
        """The ledger of a version that has joined it. Otherwise it is asked again.

        Raises:
            ApprovalMissingError: nobody has answered; names the request.
            ConflictError: it was refused.
            IntegrityError: it was kept from joining, since a ledger was edited.
        """
        if _is_asked_about(act.connection, row):
            self._request(act, row)
        return joined(act.connection, row)

    def _request(self, act: Action, row: Any) -> Any:
        refused = _refused(act.connection, row)
        if refused is not None:
            return refused
        details = _details(act.connection, row)
        return self._requests.request(act, KIND, _subject(row), details, author=row.owner, owner=row.owner)


def joined(connection: Connection, row: Any) -> str:
    """As `Overlap.require`, for whoever does not own the version: nothing is asked."""
    ledger = ledger_of(connection, row)
    if ledger is not None:
        return ledger
    name, refused = f"{row.name}@{row.version}", _refused(connection, row)
    if refused is not None:
        raise ConflictError(
            f"{name} was refused a budget of its own: somebody is in {', '.join(refused.details['elsewhere'])} too",
            "seal the data with the `population` and the `unit` of one of these: then they share a budget",
        )
    asked = next((request for request in _requests(connection, row) if request.state == "open"), None)
    if asked is None:
        raise IntegrityError(f"{name} has joined no privacy ledger", "see: cloister fsck")
    raise ApprovalMissingError(
        f"{name} has no budget before somebody has answered: {asked.details['question']}",
        f"a security officer looks, and approves if nobody is: cloister approvals show {asked.id}",
    )


def _requests(connection: Connection, row: Any) -> list[Any]:
    """All that were made for a version's dataset and ledger, the newest first."""
    mine = (approvals.c.kind == KIND) & (approvals.c.subject == _subject(row))
    return list(connection.execute(select(approvals).where(mine).order_by(approvals.c.created.desc())).all())


def _refused(connection: Connection, row: Any) -> Any:
    """A refusal that still stands, or None: one does while all datasets that it was about are still elsewhere."""
    known = set(elsewhere(connection, row))
    for request in _requests(connection, row):
        if request.state == "refused" and known.issuperset(request.details["elsewhere"]):
            return request
    return None


def _is_asked_about(connection: Connection, row: Any) -> bool:
    """Whether a version has to wait for an answer: not if a version of its dataset is in that ledger already."""
    if ledger_of(connection, row) is not None or not elsewhere(connection, row):
        return False
    ledger = future_ledger_of(connection, row)
    return ledger is None or row.name not in members(connection, ledger)


def _subject(row: Any) -> str:
    return f"population {population_of(row)}, unit {unit_of(row) or 'row'}, of {row.name}"


def _details(connection: Connection, row: Any) -> dict[str, Any]:
    """What is asked, and would be signed. Another dataset in another ledger makes it another question."""
    known = elsewhere(connection, row)
    named = ", ".join(f"{row.name} as it was" if name == row.name else name for name in known)
    related = [f"{made} is made from {of}. " for made, of in _lineage(connection, row.owner) if row.name in (made, of)]
    return {
        "dataset": row.name,
        "version": row.version,
        "population": population_of(row),
        "unit": unit_of(row) or "row",
        "elsewhere": known,
        "question": f"{''.join(related)}Is anybody whom {row.name} is about also in {named}, or will be, in any "
        "version of either? They would have two budgets; approve only if nobody is.",
    }


def _lineage(connection: Connection, owner: str) -> list[tuple[str, str]]:
    """Which datasets of an owner are made from which others."""
    rows = connection.execute(select(datasets.c.name, datasets.c.parents).where(datasets.c.owner == owner)).all()
    pairs = {(row.name, parse_reference(parent)[0]) for row in rows for parent in row.parents}
    return sorted((made, of) for made, of in pairs if made != of)


def _granted(act: Action, request: Any) -> None:
    """Nobody is in two populations, somebody else says: the dataset joins, with all versions that wait for this.

    Raises:
        ConflictError: the question has become another one.
        IntegrityError: a ledger was edited.
    """
    name, version = request.details["dataset"], request.details["version"]
    rows = act.connection.execute(select(*_ROW).where(datasets.c.name == name).order_by(datasets.c.version)).all()
    asked = next(row for row in rows if row.version == version)
    if request.details != _details(act.connection, asked) | {"owner": asked.owner}:
        raise ConflictError(
            "other data was sealed since this was asked, or the question was answered",
            f"have {asked.owner} ask again: cloister budget set {name}@{version} …",
        )
    waiting = [row for row in rows if _subject(row) == _subject(asked) and ledger_of(act.connection, row) is None]
    _join(act, waiting, request.id)


def _join(act: Action, rows: list[Any], approval: str | None) -> None:
    """Let versions of one dataset join the ledger that they belong to.

    Raises:
        IntegrityError: that ledger is not as it was sealed; or, where none of the dataset is in it yet, any that the
            log tells of: it might be hidden.
    """
    ledger = future_ledger_of(act.connection, rows[0])
    new = ledger is None
    if ledger is None or rows[0].name not in members(act.connection, ledger):
        for known in sorted(act.ledger_log.last):
            ledger_seals.require_whole(act, known)
    if ledger is None:
        ledger = NAMED + secrets.token_hex(6)
        act.connection.execute(
            insert(ledgers).values(
                id=ledger, owner=rows[0].owner, population=population_of(rows[0]), unit=unit_of(rows[0])
            )
        )
    with contextlib.nullcontext() if new else ledger_seals.changing(act, ledger):
        for row in rows:
            joins = {"dataset": row.name, "version": row.version, "ledger": ledger, "approval": approval}
            act.connection.execute(insert(ledger_members).values(**joins))
    if new:
        ledger_seals.begin(act, ledger)
