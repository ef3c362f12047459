"""What every part of the authority shares: identity of the caller, policy, and the log in the same transaction.

Guarantees: no change of state and no key leaves without a policy decision and a log entry that commit in the same
transaction as the effect; a refusal is recorded too; each transaction leaves a signed checkpoint over the new tree.
What happens outside of the database is recorded before (intent) and after (outcome). Showing public facts asks
policy, but leaves no entry. The log names people by pseudonyms.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import Connection

from cloister.audit.event import ActorKind, Event, Outcome, utc_text
from cloister.authority.journal import Head, Journal
from cloister.authority.key_use import KeyUse
from cloister.authority.ledger_log import DETAIL as LEDGER_DETAIL
from cloister.authority.ledger_log import LedgerLog
from cloister.authority.pseudonyms import pseudonym_of, source_of
from cloister.authority.rules import Rules
from cloister.errors import (
    ApprovalMissingError,
    AuthenticationError,
    CloisterError,
    IntegrityError,
    KeyServiceError,
    PermissionDeniedError,
    UnavailableError,
)
from cloister.policy import Request
from cloister.policy.decide import Kind
from cloister.stores.database import Database
from cloister.stores.keys import KeyService, KeyState, Secrets


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The machine that a caller spoke from, as its certificate proved it."""

    name: str
    region: str
    assurance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who is asking, as the access token proved it; from which address, and over whose mutual TLS if any."""

    name: str
    roles: frozenset[str]
    kind: ActorKind = "person"
    source: str = "local"
    node: Node | None = None
    session: str = ""
    """The id of the token that was shown."""
    lent: frozenset[str] = frozenset()
    """Those of `roles` that they have for a while only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What is asked about, with the attributes that policy needs. `person`: its name is somebody's."""

    type: str
    name: str
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)
    person: bool = False


# What a lent role is no good for: it would outlive itself, or lend itself again.
LASTING = frozenset({
    "identity:register", "identity:change", "identity:shred", "node:register", "policy:propose", "token-key:rotate",
    "key:rotate", "approval:vote",
})  # fmt: skip
# What an older state would undo, so that it is known for an old one from then on, as when keys leave.
ANCHORED = frozenset({"identity:revoke", "identity:change", "identity:shred", "token-key:rotate", "budget:set"})
PLATFORM = Resource(type="Platform", name="platform")
ITSELF = Caller(name="authority", roles=frozenset(), kind="authority")


class Core:
    """State, keys, policy, clock and log."""

    def __init__(
        self, *, database: Database, keys: KeyService, journal: Journal, clock: Callable[[], float] = time.time
    ) -> None:
        self.database = database
        self.keys: Secrets = keys  # named keys are used through `Action.keys` only
        self._service = keys
        self.journal = journal
        self.rules = Rules()
        self.ledger_log = LedgerLog()
        self.clock = clock
        self._anchoring = threading.Lock()
        self._anchored = 0

    @contextlib.contextmanager
    def action(self, caller: Caller, action: str, **details: Any) -> Iterator[Action]:
        """Run one action as a transaction. Inside: `allow(resource)` first, then the effect.

        A block that ends without `allow` is a bug and commits nothing. A refusal or a failure undoes the effect
        and is recorded by itself. Only a missing approval commits, as a refusal: with the request for it.
        """
        act = Action(self, caller, action, dict(details), self._service)
        missing: ApprovalMissingError | None = None
        try:
            with self.database.transaction() as connection:
                act.connection = connection
                try:
                    yield act
                except ApprovalMissingError as error:
                    missing, act.outcome = error, "denied"
                act.require_allowed()
                act.head = self.journal.append(connection, [act.event(act.outcome)])
        except Exception as error:
            self._record_end(act, error)
            raise
        if missing:
            raise missing
        if action in ANCHORED:
            with contextlib.suppress(CloisterError):  # it is done, and must not be told as if it were not
                self.anchor(act)

    def reading(self, caller: Caller, action: str) -> AbstractContextManager[Action]:
        """Like `action`, for showing facts that are no secret: takes no lock, and only a refusal is recorded."""
        return self._of_no_consequence(caller, action, self.database.reading)

    def unlogged(self, caller: Caller, action: str) -> AbstractContextManager[Action]:
        """Like `reading`, for progress reports, which are written and are no secret."""
        return self._of_no_consequence(caller, action, self.database.transaction)

    @contextlib.contextmanager
    def _of_no_consequence(
        self, caller: Caller, action: str, begin: Callable[[], AbstractContextManager[Connection]]
    ) -> Iterator[Action]:
        act = Action(self, caller, action, {})
        try:
            with begin() as connection:
                act.connection = connection
                yield act
                act.require_allowed()
        except PermissionDeniedError as error:
            self._record_end(act, error)
            raise

    @contextlib.contextmanager
    def outside(self, caller: Caller, action: str, resource: Resource, **details: Any) -> Iterator[None]:
        """An effect outside of the database: the intent is on record before the block runs, its outcome after.

        An intent without an outcome says that the authority died in between: look at what is there.
        """
        correlation = secrets.token_hex(8)
        with self.action(caller, action, phase="intent", **details) as act:
            act.correlation = correlation
            act.allow(resource)
        act.details["phase"] = "outcome"
        try:
            yield
        except Exception as error:
            self._record_end(act, error)
            raise
        self._record(act, "success")

    @contextlib.contextmanager
    def of_itself(self, action: str, **details: Any) -> Iterator[Action]:
        """Like `action`, for what the authority does by itself: no policy is asked. A block that sets no `resource` has
        changed nothing, and leaves no entry."""
        act = Action(self, ITSELF, action, dict(details), self._service)
        act.rule = "itself"
        with self.database.transaction() as connection:
            act.connection = connection
            yield act
            if act.resource is not None:
                act.head = self.journal.append(connection, [act.event("success")])

    def record(
        self, caller: Caller, action: str, resource: Resource, outcome: Outcome, rule: str, **details: Any
    ) -> None:
        """Put something on record that asks no policy: the authority's own doings, logins."""
        with self.database.transaction() as connection:
            self.append(connection, caller, action, resource, outcome, rule, **details)

    def append(
        self, connection: Connection, caller: Caller, action: str, resource: Resource, outcome: Outcome, rule: str,
        **details: Any,
    ) -> None:  # fmt: skip
        """As `record`, in the transaction of the effect."""
        act = Action(self, caller, action, dict(details))
        act.connection, act.resource, act.rule = connection, resource, rule
        self.journal.append(connection, [act.event(outcome)])

    def _record_end(self, act: Action, error: Exception) -> None:
        if isinstance(error, UnavailableError) and not isinstance(error, KeyServiceError):
            return  # nothing happened, and it cannot be written down either: the database is what failed
        act.details.pop(LEDGER_DETAIL, None)  # its change was undone
        denied = isinstance(error, PermissionDeniedError | AuthenticationError)
        self._record(act, "denied" if denied else "failure", reason=type(error).__name__)

    def _record(self, act: Action, outcome: Outcome, reason: str = "") -> None:
        with self.database.transaction() as connection:
            act.connection = connection
            self.journal.append(connection, [act.event(outcome, reason=reason)])

    def anchor(self, act: Action) -> None:
        """Have the key service remember the log with the entry of `act`: called before keys leave, so that it sticks.

        Callers that wait for one another share one write.
        """
        if act.head is not None:
            self.anchor_at(act.head.size, act.head.root)

    def anchor_at(self, size: int, root: bytes) -> None:
        """As `anchor`, of the log as it was with `size` entries: for what witnesses have seen."""
        with self._anchoring:
            if self._anchored < size:
                self.keys.remember(size, root.hex())
                self._anchored = size

    def require_anchored(self) -> None:
        """Refuse a database that is older than what the key service remembers: its ledger would be too.

        Raises:
            IntegrityError: an old backup was restored, or the log is another one.
        """
        kept = self.keys.remembered()
        if kept is None:
            return
        size, root = kept
        with self.database.reading() as connection:
            head = self.journal.head(connection)
            same = head.size >= size and self.journal.root_at(connection, size).hex() == root
        if not same:
            raise IntegrityError(
                "the state is older than what keys were last given out under and witnesses cosigned, or another one",
                "restore the newest backup; if it is lost: cloister restore FOLDER --accept-rollback",
            )

    def key_states(self) -> list[KeyState]:
        """Every named key: names, versions and times, no secret."""
        return self._service.states()

    def destroy_versions(self, name: str, below: int) -> None:
        """For `Custody.finish`: destroy the versions of a key that a committed action has put down for it."""
        self._service.destroy_below(name, below)

    def now_text(self) -> str:
        return utc_text(datetime.fromtimestamp(self.clock(), UTC))


class Action:
    """One action in progress. `connection` is its transaction."""

    connection: Connection

    def __init__(
        self, core: Core, caller: Caller, action: str, details: dict[str, Any], service: KeyService | None = None
    ) -> None:
        self._core = core
        self._keys = KeyUse(service, details) if service else None
        self.caller = caller
        self.action = action
        self.resource: Resource | None = None
        self.details = details
        self.rule: str | None = None
        self.outcome: Outcome = "success"
        self.correlation = ""
        self.head: Head | None = None
        """The log with its entry, once it has ended."""

    def allow(self, resource: Resource, action: str | None = None) -> None:
        """Ask policy whether the caller may do this, or `action` instead, to `resource`.

        Raises:
            PermissionDeniedError: it may not.
        """
        self.resource = resource
        policy = self._core.rules.current(self.connection)
        decision = policy.require(self.request(self.caller, action or self.action, resource))
        self.rule = ",".join(decision.rules)

    @property
    def keys(self) -> KeyUse:
        """Named keys. What is done with them is counted in the entry of this action.

        Raises:
            PermissionDeniedError: this action leaves no entry, so that is a fault.
        """
        if self._keys is None:
            raise PermissionDeniedError(f"{self.action} leaves no entry", "report this: it is a fault in Cloister")
        return self._keys

    @property
    def ledger_log(self) -> LedgerLog:
        """What the log tells of ledgers, up to now."""
        self._core.ledger_log.catch_up(self.connection)
        return self._core.ledger_log

    def permits(self, resource: Resource) -> bool:
        """Whether the caller may do this to one of many: for leaving out of a list what they may not see."""
        policy = self._core.rules.current(self.connection)
        return policy.decide(self.request(self.caller, self.action, resource)).allowed

    def request(self, caller: Caller, action: str, resource: Resource) -> Request:
        """The question as policy is asked it."""
        context: dict[str, str | int | bool] = {"time": int(self._core.clock())}
        if caller.node:
            context |= {
                "node": caller.node.name,
                "node_region": caller.node.region,
                "node_assurance": caller.node.assurance,
            }
        return Request(
            principal=caller.name, kind=cast(Kind, caller.kind), action=action,
            roles=caller.roles - caller.lent if action in LASTING else caller.roles,
            resource_type=resource.type, resource=resource.name, attributes=resource.attributes, context=context,
        )  # fmt: skip

    def person(self, name: str) -> str:
        """What the log calls a person: for `details`."""
        return pseudonym_of(self.connection, name)

    def require_allowed(self) -> None:
        """A block that never asked policy is a fault, and must not commit.

        Raises:
            PermissionDeniedError: `allow` was not called.
        """
        if self.rule is None:
            raise PermissionDeniedError(f"{self.action} asked no policy", "report this: it is a fault in Cloister")

    def event(self, outcome: Outcome, *, reason: str = "") -> Event:
        """The entry for this action; people and their addresses by pseudonym."""
        caller, connection, resource = self.caller, self.connection, self.resource
        actor = pseudonym_of(connection, caller.name) if caller.kind == "person" else caller.name
        # A machine's address too: it may be somebody's desk. A stranger's `name` is `STRANGER`.
        source = source_of(connection, caller.name, caller.source)
        named = "-"
        if resource is not None:
            named = f"{resource.type}/{self.person(resource.name) if resource.person else resource.name}"
        details = self.details | ({"node": caller.node.name} if caller.node else {})
        return Event(
            time=self._core.now_text(), actor=actor, actor_kind=caller.kind, action=self.action, resource=named,
            outcome=outcome, reason=reason, rule=self.rule or "", source=source, correlation=self.correlation,
            details=details,
        )  # fmt: skip
