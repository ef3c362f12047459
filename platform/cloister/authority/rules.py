"""The policies in force: the shipped ones, and the newest version of the site's own.

Guarantees: which version is in force is read in the transaction of every decision, so a change holds at once in every
authority over the same database; a version that does not parse denies everything.
"""

from __future__ import annotations

import threading

from sqlalchemy import Connection, select

from cloister.policy import Policy
from cloister.stores.tables import policy_versions


class Rules:
    """Remembers the version that it parsed last, since parsing takes milliseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parsed: tuple[int, Policy] = (0, Policy.shipped())

    def version(self, connection: Connection) -> int:
        """The number of the site's newest version; 0 when the site has none."""
        newest = select(policy_versions.c.version).order_by(policy_versions.c.version.desc()).limit(1)
        return int(connection.execute(newest).scalar_one_or_none() or 0)

    def text(self, connection: Connection, version: int) -> str:
        """The site's own policies of that version; empty for 0."""
        query = select(policy_versions.c.text).where(policy_versions.c.version == version)
        return str(connection.execute(query).scalar_one_or_none() or "")

    def current(self, connection: Connection) -> Policy:
        """The policies to decide by in this transaction.

        Raises:
            InputError: what the database holds is not a policy.
        """
        version = self.version(connection)
        known, policy = self._parsed
        if version != known:
            text = self.text(connection, version)
            policy = Policy.shipped().with_site(text)
            with self._lock:
                self._parsed = (version, policy)
        return policy
