"""What every part of the authority shares: identity of the caller, policy, and the log in the same transaction.

Guarantees: no change of budget, custody or release, no key and no plan leaves without a policy decision and a log entry
that commit in the same transaction as the effect; a refusal is recorded too; each entry leaves a signed checkpoint over
the new tree. Showing public facts asks policy, but leaves no entry.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nacl.signing import SigningKey
from sqlalchemy import Connection, insert, select

from cloister.audit.checkpoint import Checkpoint
from cloister.audit.checkpoint import sign as sign_checkpoint
from cloister.audit.event import Event, Outcome, utc_text
from cloister.audit.merkle import CompactTree
from cloister.errors import AuthenticationError, IntegrityError, PermissionDeniedError
from cloister.policy import Policy, Request
from cloister.stores.database import Database, log_checkpoints, log_entries
from cloister.stores.keys import KeyService

LOG_ORIGIN = "cloister.dev/log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who is asking, as the access token proved it, and from which address."""

    name: str
    roles: frozenset[str]
    source: str = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What is asked about, with the attributes that policy needs."""

    type: str
    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)


PLATFORM = Resource(type="Platform", name="platform")


class Core:
    """State, keys, policy, clock and log."""

    def __init__(
        self,
        *,
        database: Database,
        keys: KeyService,
        policy: Policy,
        log_key: SigningKey,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.database = database
        self.keys = keys
        self.policy = policy
        self.clock = clock
        self._log_key = log_key

    @contextlib.contextmanager
    def action(self, caller: Caller, action: str, **details: Any) -> Iterator[Action]:
        """Run one action as a transaction. Inside: `allow(resource)` first, then the effect.

        A block that ends without `allow` is a bug and commits nothing. A refusal or a failure undoes the effect
        and is recorded by itself.
        """
        act = Action(self, caller, action, dict(details))
        try:
            with self.database.transaction() as connection:
                act.connection = connection
                yield act
                act.require_allowed()
                self.append(connection, act.event(act.outcome))
        except Exception as error:
            outcome: Outcome = "denied" if isinstance(error, PermissionDeniedError | AuthenticationError) else "failure"
            self.record(act.event(outcome, reason=type(error).__name__))
            raise

    @contextlib.contextmanager
    def unlogged(self, caller: Caller, action: str) -> Iterator[Action]:
        """Like `action`, for showing facts that are no secret and for progress reports: only a refusal is recorded."""
        act = Action(self, caller, action, {})
        try:
            with self.database.transaction() as connection:
                act.connection = connection
                yield act
                act.require_allowed()
        except PermissionDeniedError as error:
            self.record(act.event("denied", reason=type(error).__name__))
            raise

    def record(self, entry: Event) -> None:
        """Append one entry in a transaction of its own."""
        with self.database.transaction() as connection:
            self.append(connection, entry)

    def append(self, connection: Connection, entry: Event) -> None:
        """Append one entry in the transaction of its effect, and sign the new tree."""
        row = connection.execute(select(log_checkpoints).order_by(log_checkpoints.c.size.desc()).limit(1)).one_or_none()
        tree = CompactTree.from_hex(row.size, row.tree) if row else CompactTree()
        data = entry.to_bytes()
        connection.execute(insert(log_entries).values(index=tree.size, entry=data))
        tree.append(data)
        note = sign_checkpoint(
            Checkpoint(origin=LOG_ORIGIN, size=tree.size, root=tree.root()), self._log_key, LOG_ORIGIN
        )
        connection.execute(insert(log_checkpoints).values(size=tree.size, tree=tree.to_hex(), note=note))

    def anchor(self) -> None:
        """Have the key service remember the log as it is now: called before keys leave, so that spending sticks."""
        with self.database.transaction() as connection:
            row = connection.execute(
                select(log_checkpoints).order_by(log_checkpoints.c.size.desc()).limit(1)
            ).one_or_none()
        if row is not None:
            self.keys.remember(row.size, CompactTree.from_hex(row.size, row.tree).root().hex())

    def require_anchored(self) -> None:
        """Refuse a database that is older than what the key service remembers: its ledger would be too.

        Raises:
            IntegrityError: an old backup was restored, or the log is another one.
        """
        kept = self.keys.remembered()
        if kept is None:
            return
        with self.database.transaction() as connection:
            row = connection.execute(select(log_checkpoints).where(log_checkpoints.c.size == kept[0])).one_or_none()
        if row is None or CompactTree.from_hex(row.size, row.tree).root().hex() != kept[1]:
            raise IntegrityError(
                "the state is not the one that keys were last given out under: an old backup, or another log",
                "restore the newest state.db; budgets spent since the backup would be forgotten",
            )

    def now_text(self) -> str:
        return utc_text(datetime.fromtimestamp(self.clock(), UTC))


class Action:
    """One action in progress. `connection` is its transaction."""

    connection: Connection

    def __init__(self, core: Core, caller: Caller, action: str, details: dict[str, Any]) -> None:
        self._core = core
        self._caller = caller
        self._action = action
        self._resource = "-"
        self.details = details
        self.rule: str | None = None
        self.outcome: Outcome = "success"

    def allow(self, resource: Resource) -> None:
        """Ask policy whether the caller may do this to `resource`.

        Raises:
            PermissionDeniedError: it may not.
        """
        self._resource = f"{resource.type}/{resource.name}"
        decision = self._core.policy.require(
            Request(
                principal=self._caller.name,
                roles=self._caller.roles,
                action=self._action,
                resource_type=resource.type,
                resource=resource.name,
                attributes=resource.attributes,
            )
        )
        self.rule = ",".join(decision.rules)

    def require_allowed(self) -> None:
        """A block that never asked policy is a fault, and must not commit.

        Raises:
            PermissionDeniedError: `allow` was not called.
        """
        if self.rule is None:
            raise PermissionDeniedError(f"{self._action} asked no policy", "report this: it is a fault in Cloister")

    def event(self, outcome: Outcome, *, reason: str = "") -> Event:
        return Event(
            time=self._core.now_text(),
            actor=self._caller.name,
            action=self._action,
            resource=self._resource,
            outcome=outcome,
            reason=reason,
            rule=self.rule or "",
            source=self._caller.source,
            details=self.details,
        )
