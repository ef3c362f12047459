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
from cloister.stores.tables import budgets, ledger_members, ledger_seals, ledgers, runs

UNSEALED = 0
"""The number of a ledger of before there were seals."""
_LABEL, _LABEL_OF_BEFORE = b"cloister.dev/ledger/v2\x00", b"cloister.dev/ledger/v1\x00"
_OF_RUN = [
    runs.c[name]
    for name in ("id", "dataset", "version", "steps_committed", "position", "epsilon_charged", "delta_charged",
                 "renyi_charged", "settled")
]  # fmt: skip
_OF_HELD = [runs.c[name] for name in ("id", "plan", "spec", "attributes", "code_digest")]


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
    number, sealed, problem = _opened(connection, keys, name)
    if not problem and sealed not in (digest_of(connection, name), _digest_of_before(connection, name)):
        problem = "is not what was sealed: it was edited"
    return number, problem


def _opened(connection: Connection, keys: KeyService | KeyUse, name: str) -> tuple[int, bytes, str]:
    row = connection.execute(select(ledger_seals).where(ledger_seals.c.ledger == name)).one_or_none()
    if row is None or row.counter == UNSEALED:
        return UNSEALED, b"", "has no seal"
    try:
        (sealed,) = keys.unwrap(LEDGER, [(row.seal, ledger_context(name, row.counter))])
    except IntegrityError:
        return row.counter, b"", "has a seal that is not its own"
    return row.counter, sealed, ""


def digest_of(connection: Connection, name: str) -> bytes:
    """SHA-256 over a ledger, numbers exactly (as hexadecimal floats)."""
    budget = connection.execute(select(budgets).where(budgets.c.ledger == name)).one_or_none()
    known = connection.execute(select(ledgers).where(ledgers.c.id == name)).one_or_none()
    rows = connection.execute(select(*_OF_RUN).where(runs.c.ledger == name)).all()
    held = connection.execute(select(*_OF_HELD).where(runs.c.ledger == name, runs.c.settled.is_(False))).all()
    joined = connection.execute(
        select(ledger_members.c.dataset, ledger_members.c.version).where(ledger_members.c.ledger == name)
    ).all()
    ledger = {
        "ledger": name,
        "of": [known.owner, known.population, known.unit] if known else None,
        "datasets": sorted([row.dataset, row.version] for row in joined),
        "budget": [budget.epsilon.hex(), budget.delta.hex(), budget.order] if budget else None,
        "runs": {
            row.id: [
                row.dataset, row.version, row.steps_committed, row.position, row.epsilon_charged.hex(),
                row.delta_charged.hex(), row.renyi_charged, row.settled,
            ]
            for row in rows
        },
        "held": {row.id: [row.plan, row.spec, row.attributes, row.code_digest] for row in held},
    }  # fmt: skip
    return hashlib.sha256(_LABEL + canonical_json(ledger)).digest()


def _digest_of_before(connection: Connection, name: str) -> bytes:
    """Of a dataset's own ledger, as it was sealed before there were populations and filters. `adopt` seals it anew."""
    budget = connection.execute(select(budgets).where(budgets.c.ledger == name)).one_or_none()
    rows = connection.execute(select(*_OF_RUN).where(runs.c.dataset == name)).all()
    held = connection.execute(select(*_OF_HELD).where(runs.c.dataset == name, runs.c.settled.is_(False))).all()
    ledger = {
        "dataset": name,
        "budget": [budget.epsilon.hex(), budget.delta.hex()] if budget else None,
        "runs": sorted(
            [row.id, row.steps_committed, row.position, row.epsilon_charged.hex(), row.delta_charged.hex(), row.settled]
            for row in rows
        ),
        "plans": {row.id: row.plan for row in held},
    }
    return hashlib.sha256(_LABEL_OF_BEFORE + canonical_json(ledger)).digest()


def adopt(core: Core) -> None:
    """Seal the ledgers of a state of before there were seals, or as they are sealed now. Each leaves an entry. None
    that was sealed once is taken for one that was not; nor is any once there are populations, since whoever can write
    the database could make one.
    """
    with core.database.reading() as connection:
        names = [name for name in connection.execute(select(ledger_seals.c.ledger)).scalars() if _is_older(name)]
    for name in names:
        with core.of_itself("ledger:seal") as act:
            logged = act.ledger_log.last
            number, sealed, problem = _opened(act.connection, act.keys, name)
            first = number == UNSEALED and name not in logged and all(map(_is_older, logged))
            again = not problem and sealed == _digest_of_before(act.connection, name)
            if first or (again and not act.ledger_log.disagrees(name, number)):
                act.resource = resources.dataset(act.connection, data.latest(act.connection, name))
                _seal(act, name, number + 1)


def _is_older(name: str) -> bool:
    """Whether a ledger is of before there were populations, by its name."""
    return not name.startswith(NAMED)


def _seal(act: Action, name: str, number: int) -> None:
    (sealed,) = act.keys.wrap(LEDGER, [(digest_of(act.connection, name), ledger_context(name, number))])
    mine = (ledger_seals.c.ledger == name) & (ledger_seals.c.counter == number - 1)
    act.connection.execute(update(ledger_seals).where(mine).values(counter=number, seal=sealed))
    act.details[DETAIL] = f"{name}#{number}"
