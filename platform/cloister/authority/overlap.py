"""A dataset joins its ledger: at once, or when somebody has answered whether the same people are in another one.

Guarantees: where an owner has datasets in another ledger (another `population` in the schema, or another unit), a
dataset joins its own only once a security officer has answered, signed, that nobody is in both. Until then nothing is
trained on it. Another dataset that came meanwhile makes it another question. Which datasets are in a ledger is under
its seal.

Not guaranteed: that the answer is true; nor anything about rows that two owners have.
"""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Connection, insert, select

from cloister.authority import ledger_seals
from cloister.authority.approvals import Approvals
from cloister.authority.core import Action
from cloister.authority.populations import NAMED, is_member, ledger_of, members, others, population_of, unit_column_of
from cloister.datasets.manifest import parse_reference
from cloister.errors import ApprovalMissingError, ConflictError, InputError
from cloister.stores.tables import datasets, ledger_members, ledgers

KIND = "population"


class Overlap:
    """Lets datasets join their ledgers, and asks where that needs an answer."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals
        approvals.on_granted[KIND] = _granted

    def register(self, act: Action, row: Any) -> dict[str, Any]:
        """Let the dataset of a version that was just registered join its ledger, or ask. Says what was asked, and with
        which other datasets it shares, or would share, its budget.

        Raises:
            InputError: it is made from a dataset in another ledger, so that the answer is known.
        """
        made_from = {parse_reference(parent)[0] for parent in row.parents} - {row.name}
        if both := sorted(made_from.intersection(_elsewhere(act.connection, row))):
            raise InputError(
                f"{row.name} is made from {', '.join(both)}, which has another population or unit",
                "give both schemas one `population` and one `unit`: the same rows have one budget",
            )
        asked: dict[str, Any] = {"approval": None, "question": None}
        if not is_member(act.connection, row):
            if others(act.connection, row):
                request = self._request(act, row)
                asked = {"approval": request.id, "question": request.details["question"]}
            else:
                _join(act, row, None)
        ledger = ledger_of(act.connection, row)
        together = members(act.connection, ledger) if ledger else []
        return asked | {"shared_with": [name for name in together if name != row.name]}

    def require(self, act: Action, row: Any) -> str:
        """The ledger of a version whose dataset has joined it.

        Raises:
            ApprovalMissingError: it has not; names the request.
            ConflictError: it was refused.
        """
        ledger = ledger_of(act.connection, row)
        if ledger is None or not is_member(act.connection, row):
            asked = self._request(act, row)
            if asked.state == "refused":
                elsewhere = ", ".join(asked.details["elsewhere"])
                raise ConflictError(
                    f"{row.name} was refused a budget of its own: somebody is in {elsewhere} too",
                    "seal it with the `population` and the `unit` of these: they share a budget then",
                )
            raise ApprovalMissingError(
                f"{row.name} has no budget before somebody has answered: {asked.details['question']}",
                f"a security officer looks, and approves if the answer is no: cloister approvals show {asked.id}",
            )
        return ledger

    def _request(self, act: Action, row: Any) -> Any:
        return self._approvals.request(
            act, KIND, f"population of {row.name}", _details(act.connection, row), author=row.owner, owner=row.owner
        )


def _details(connection: Connection, row: Any) -> dict[str, Any]:
    """What is asked, and would be signed. Another dataset in another ledger makes it another question."""
    elsewhere = _elsewhere(connection, row)
    named = [f"{row.name} as it was" if name == row.name else name for name in elsewhere]
    return {
        "dataset": row.name,
        "population": population_of(row),
        "unit": unit_column_of(row) or "row",
        "elsewhere": elsewhere,
        "question": f"is anybody whom {row.name} is about, now or by what is appended later, also in "
        f"{', '.join(named)}? They would have two budgets; approve only if nobody is.",
    }


def _elsewhere(connection: Connection, row: Any) -> list[str]:
    """The datasets in its owner's other ledgers."""
    return sorted({name for names in others(connection, row).values() for name in names})


def _granted(act: Action, request: Any) -> None:
    """Nobody is in two populations, somebody else says: the dataset joins its ledger.

    Raises:
        ConflictError: the question has become another one.
    """
    name = request.details["dataset"]
    query = select(datasets).where(datasets.c.name == name).order_by(datasets.c.version.desc()).limit(1)
    row = act.connection.execute(query).one()
    if is_member(act.connection, row):
        return
    if request.details != _details(act.connection, row) | {"owner": row.owner}:
        raise ConflictError(
            f"{row.owner} has sealed other data since this was asked", f"ask again: cloister budget set {name}"
        )
    _join(act, row, request.id)


def _join(act: Action, row: Any, approval: str | None) -> None:
    ledger = ledger_of(act.connection, row)
    new = ledger is None
    if ledger is None:
        ledger = NAMED + secrets.token_hex(6)
        act.connection.execute(
            insert(ledgers).values(id=ledger, owner=row.owner, population=population_of(row), unit=unit_column_of(row))
        )
    joins = insert(ledger_members).values(ledger=ledger, dataset=row.name, approval=approval)
    if new:
        act.connection.execute(joins)
        ledger_seals.begin(act, ledger)
    else:
        with ledger_seals.changing(act, ledger):
            act.connection.execute(joins)
