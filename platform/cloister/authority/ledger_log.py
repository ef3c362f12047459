"""Which changes of which ledgers the log tells of.

Guarantees: a ledger that was put back, with its seal of then, is older than the log says; and if it is changed again
all the same, two entries have one number, which stays in the log for good. What was read once is not read again: the
log only grows, and whoever shortens it is found by its checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from sqlalchemy import Connection, select

from cloister.audit.event import Event
from cloister.stores.tables import log_entries

DETAIL = "ledger"
"""The detail of an entry that says which ledger it changed: its name, `#`, and the number of the change."""
_MARK = b'"ledger":"'


class LedgerLog:
    """The number of the last change of each ledger, and the ledgers whose changes are not 1, 2, 3 and so on."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.forked: set[str] = set()
        self._read = 0
        self._lock = threading.Lock()

    def catch_up(self, connection: Connection) -> None:
        """Read what the log has got since."""
        with self._lock:
            newer = select(log_entries.c.entry).where(log_entries.c.index >= self._read)
            for entry in connection.execute(newer.order_by(log_entries.c.index)).scalars():
                self.note(bytes(entry))
                self._read += 1

    def disagrees(self, name: str, number: int) -> str:
        """What is wrong with a ledger whose last change has this number; empty if nothing is."""
        if name in self.forked:
            return "was put back and changed again"
        last = self.last.get(name, 0)
        return "" if number == last else f"is the one after change {number}, and the log tells of {last}"

    def note(self, entry: bytes) -> None:
        """Add what an entry of the log says about a ledger."""
        if _MARK not in entry:
            return
        name, _, number = str(Event.from_bytes(entry).details.get(DETAIL, "")).partition("#")
        if number.isdecimal():
            self.tell(name, int(number))

    def tell(self, name: str, number: int) -> None:
        """The next entry about this ledger is of the change of this number."""
        last = self.last.get(name, 0)
        if number != last + 1:
            self.forked.add(name)
        self.last[name] = max(last, number)

    def noting(self, entries: Iterable[bytes]) -> Iterable[bytes]:
        """The same entries, each noted."""
        for entry in entries:
            self.note(entry)
            yield entry
