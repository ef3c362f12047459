"""People in the log: random names instead of their own, and one table that says whose they are.

Guarantees: an entry names a person, and the address they called from, by pseudonyms that say nothing about them;
deleting a person's rows (`shred`) leaves their entries whole, verifiable and nobody's, in every copy of the log.
Not guaranteed: that nobody guesses who it was from what was done and when.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable

from sqlalchemy import Connection, delete, insert, select

from cloister.stores.tables import pseudonyms

LOCAL = "local"
STRANGER = "unknown"  # whom addresses belong to that nobody has logged in from


def pseudonym_of(connection: Connection, person: str, value: str | None = None) -> str:
    """What the log calls `person`, or the address `value` of theirs. Made when first needed."""
    value = person if value is None else value
    mine = (pseudonyms.c.person == person) & (pseudonyms.c.value == value)
    known = connection.execute(select(pseudonyms.c.pseudonym).where(mine)).scalar_one_or_none()
    if known is not None:
        return str(known)
    made = ("p-" if value == person else "a-") + secrets.token_hex(8)
    connection.execute(insert(pseudonyms).values(pseudonym=made, person=person, value=value))
    return made


def source_of(connection: Connection, person: str, source: str) -> str:
    """A pseudonym where `source` is an address, since that says who somebody is; `local` stays, and nothing else."""
    try:
        ipaddress.ip_address(source)
    except ValueError:
        return LOCAL if source == LOCAL else STRANGER
    return pseudonym_of(connection, person, source)


def values_of(connection: Connection, names: Iterable[str]) -> dict[str, str]:
    """Pseudonym to what it stands for, of those that are not shredded."""
    rows = connection.execute(select(pseudonyms).where(pseudonyms.c.pseudonym.in_(list(names))))
    return {row.pseudonym: row.value for row in rows}


def shred(connection: Connection, person: str) -> int:
    """Forget who the pseudonyms of a person stand for, for good. Returns how many there were."""
    return connection.execute(delete(pseudonyms).where(pseudonyms.c.person == person)).rowcount
