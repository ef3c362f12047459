"""Seals over ledgers: clearing a ledger loses the data.

Guarantees: each ledger has one seal (over its datasets and its budget; of each run what it has committed and is
charged, and the plan of those that are not settled). The key service makes it, in the transaction of each change, so
whoever can write the database and nothing else cannot make one; a change to a ledger whose seal does not fit is
refused, so it is never made good by accident. A lease for training data asks for the seal: where the ledger is
cleared, edited or gone, no key leaves. Each change has a number, which is in its log entry and bound to the seal: so a
ledger that was put back with its seal of then is older than the log says (`ledger_log`), and is refused as well.

Not guaranteed: anything against who has the key service too; nor that a whole database that was put back, its log too,
is noticed here: that is what the key service's memory of the log is for (`Core.require_anchored`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

from sqlalchemy import Connection, insert, select, update

from cloister.authority import data, resources
from cloister.authority.core import Action, Core
from cloister.authority.key_use import LEDGER, KeyUse, ledger_context
from cloister.authority.ledger_log import DETAIL
from cloister.authority.populations import NAMED, members
from cloister.canonical import canonical_json
from cloister.errors import IntegrityError
from cloister.stores.keys import KeyService
from cloister.stores.tables import budgets, ledger_seals, ledgers, runs

UNSEALED = 0
"""The number of a ledger of before there were seals."""
_LABEL = b"cloister.dev/ledger/v1\x00"


def begin(act: Action, name: str) -> None:
    """Seal a ledger that comes into being with this action."""
    act.connection.execute(insert(ledger_seals).values(ledger=name, counter=UNSEALED, seal=b""))
    _seal(act, name, UNSEALED + 1)


def require_whole(act: Action, name: str) -> int:
    """The number of the last change of a ledger that is as it was sealed.

    Raises:
        IntegrityError: it was cleared, edited or put back, its seal is another's, or there is none.
    """
    number, problem = check(act.connection, act.keys, name)
    problem = problem or act.ledger_log.disagrees(name, number)
    if problem:
        of = ", ".join(members(act.connection, name)) or name
        raise IntegrityError(f"the ledger of {of} {problem}", "see: cloister fsck; then restore the newest backup")
    return number


@contextlib.contextmanager
def changing(act: Action, name: str) -> Iterator[None]:
    """Within the block the ledger may change; it is sealed anew after it.

    Raises:
        IntegrityError: as `require_whole`; then nothing may change.
    """
    number = require_whole(act, name)
    yield
    _seal(act, name, number + 1)


def check(connection: Connection, keys: KeyService | KeyUse, name: str) -> tuple[int, str]:
    """The number of the last change of a ledger, and what is wrong with it; empty if nothing is."""
    row = connection.execute(select(ledger_seals).where(ledger_seals.c.ledger == name)).one_or_none()
    if row is None or row.counter == UNSEALED:
        return UNSEALED, "has no seal"
    try:
        (sealed,) = keys.unwrap(LEDGER, [(row.seal, ledger_context(name, row.counter))])
    except IntegrityError:
        return row.counter, "has a seal that is not its own"
    return row.counter, "" if sealed == digest_of(connection, name) else "is not what was sealed: it was edited"


def digest_of(connection: Connection, name: str) -> bytes:
    """SHA-256 over a ledger, numbers exactly (as hexadecimal floats). Of one of before there were populations and
    filters, what was sealed then: `dataset` was the ledger's name.
    """
    budget = connection.execute(select(budgets).where(budgets.c.ledger == name)).one_or_none()
    c = runs.c
    spent = connection.execute(
        select(
            c.id, c.steps_committed, c.position, c.epsilon_charged, c.delta_charged, c.settled, c.renyi_charged
        ).where(c.ledger == name)
    ).all()  # fmt: skip
    plans = connection.execute(select(c.id, c.plan).where(c.ledger == name, c.settled.is_(False))).all()
    known = connection.execute(select(ledgers).where(ledgers.c.id == name)).one_or_none()
    ledger = {
        "dataset": name,
        "budget": [budget.epsilon.hex(), budget.delta.hex()] if budget else None,
        "runs": sorted(
            [row.id, row.steps_committed, row.position, row.epsilon_charged.hex(), row.delta_charged.hex(), row.settled]
            for row in spent
        ),
        "plans": {row.id: row.plan for row in plans},
    }
    if budget and budget.order is not None:
        ledger["order"] = budget.order
    if curves := {row.id: row.renyi_charged for row in spent if row.renyi_charged is not None}:
        ledger["renyi"] = curves  # each number as hexadecimal already
    if (datasets := members(connection, name)) != [name]:
        ledger["datasets"] = datasets
    if known is not None and known.population is not None:
        ledger |= {"owner": known.owner, "population": known.population, "unit": known.unit}
    return hashlib.sha256(_LABEL + canonical_json(ledger)).digest()


def adopt(core: Core) -> None:
    """Seal the ledgers of a state of before there were seals. Each leaves an entry; none that was sealed once is, nor
    any once there are populations: whoever can write the database could make one.
    """
    with core.database.reading() as connection:
        waiting = connection.execute(
            select(ledger_seals.c.ledger).where(ledger_seals.c.counter == UNSEALED)
        ).scalars().all()  # fmt: skip
        core.ledger_log.catch_up(connection)
    if any(name.startswith(NAMED) for name in core.ledger_log.last):
        return
    for name in waiting:
        if name not in core.ledger_log.last and not name.startswith(NAMED):
            with core.of_itself("ledger:seal") as act:
                if check(act.connection, act.keys, name)[0] == UNSEALED:  # or another authority was first
                    act.resource = resources.dataset(act.connection, data.latest(act.connection, name))
                    _seal(act, name, UNSEALED + 1)


def _seal(act: Action, name: str, number: int) -> None:
    (sealed,) = act.keys.wrap(LEDGER, [(digest_of(act.connection, name), ledger_context(name, number))])
    mine = (ledger_seals.c.ledger == name) & (ledger_seals.c.counter == number - 1)
    act.connection.execute(update(ledger_seals).where(mine).values(counter=number, seal=sealed))
    act.details[DETAIL] = f"{name}#{number}"
