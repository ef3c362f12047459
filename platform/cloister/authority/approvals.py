"""Approvals: n distinct people, by n distinct keys of their own, over the digest of exactly what is approved.

Guarantees: a vote is a signed statement (DSSE, in-toto) about one request, by the voter's registered key; the author
never counts, nor does anybody who has lost the right to vote or the key they signed with; a subject that changed has
another digest, so what was approved before is void; a request expires; one that was acted on is used up, except a
promotion's, which carries the model while it is served.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, insert, select, update

from cloister.authority import resources
from cloister.authority.core import PLATFORM, Action, Caller, Core
from cloister.authority.identity import load as load_identity
from cloister.authority.identity import signing_key
from cloister.errors import (
    ApprovalMissingError,
    CloisterError,
    ConflictError,
    InputError,
    IntegrityError,
    NotFoundError,
    PermissionDeniedError,
)
from cloister.models.release import APPROVAL_LIFETIME_S, APPROVAL_PREDICATE, approval_digest
from cloister.signing import dsse
from cloister.signing.keys import ed25519_public_from_pem, key_id
from cloister.stores.tables import approvals, votes

DAY_S = 24 * 3600
LIFETIME_S = {"training": 7 * DAY_S, "population": 7 * DAY_S, "promotion": APPROVAL_LIFETIME_S}
DEFAULT_LIFETIME_S = DAY_S


class Required(BaseModel):
    """How many approvals each kind of thing needs. A promotion, a policy and a destroyed key never go without."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: int = Field(default=1, ge=0, le=16)
    """For data of the classes in `training_classes`."""
    training_classes: tuple[str, ...] = ("confidential", "restricted")
    promotion: int = Field(default=1, ge=1, le=16)
    budget: int = Field(default=1, ge=0, le=16)
    budget_from: float = Field(default=10.0, ge=0.0)
    """The epsilon above which a first budget needs them too, as each that is raised."""
    population: int = Field(default=1, ge=1, le=16)
    """For a dataset in another ledger than others of its owner."""
    policy: int = Field(default=1, ge=1, le=16)
    access: int = Field(default=1, ge=1, le=16)
    key_destruction: int = Field(default=2, ge=1, le=16)

    def count(self, kind: str) -> int:
        return int(getattr(self, kind.replace("-", "_")))


class Approvals:
    """Requests and votes. `on_granted` and `on_refused` act, by kind, in the transaction of the vote that decides."""

    def __init__(self, core: Core, required: Required) -> None:
        self._core = core
        self.required = required
        self.on_granted: dict[str, Callable[[Action, Any], None]] = {}
        self.on_refused: dict[str, Callable[[Action, Any], None]] = {}

    def request(
        self, act: Action, kind: str, subject: str, details: Mapping[str, Any], *, author: str = "", owner: str = "",
        digest: str | None = None,
    ) -> Any:  # fmt: skip
        """The open request for exactly this, made if need be. Requests for what the subject was before are void.

        `author` is who made the subject, if it is not the caller; `owner` whose dataset is concerned. `digest`
        replaces that of the details where the subject has one of its own.
        """
        known = dict(details) | {"owner": owner}
        digest, author = digest or approval_digest(known), author or act.caller.name
        now, connection = self._core.clock(), act.connection
        same = (approvals.c.kind == kind) & (approvals.c.subject == subject) & (approvals.c.author == author)
        alive = approvals.c.state.in_(["open", "refused"]) & (approvals.c.expires > now)
        found = None
        for row in connection.execute(select(approvals).where(same, alive)).all():
            # Where the subject has a digest of its own, what approvers are shown and sign may change beside it.
            if (row.digest, row.details) == (digest, known):
                found = row
            elif row.state == "open":
                connection.execute(update(approvals).where(approvals.c.id == row.id).values(state="void"))
        if found is not None:
            return found
        approval = "apr-" + secrets.token_hex(4)
        connection.execute(
            insert(approvals).values(
                id=approval, kind=kind, subject=subject, digest=digest, details=known, author=author,
                required=self.required.count(kind), state="open",
                expires=float(int(now) + LIFETIME_S.get(kind, DEFAULT_LIFETIME_S)), created=now,
            )
        )  # fmt: skip
        return _load(connection, approval)

    def demand(
        self, act: Action, kind: str, subject: str, details: Mapping[str, Any], *, next_step: str, author: str = "",
        owner: str = "", digest: str | None = None, wanted: str = "",
    ) -> tuple[str, list[Any]]:  # fmt: skip
        """The id of the request for exactly this and its good votes, once there are enough. Arguments as `request`;
        `wanted` is what a refusal says that it needs them, in place of the subject.

        Marks the request as used, unless it is a promotion's.

        Raises:
            ApprovalMissingError: not enough yet; names the request. The request is kept, nothing else.
            ConflictError: somebody refused.
        """
        row = self.request(act, kind, subject, details, author=author, owner=owner, digest=digest)
        good, refused = self.votes(act.connection, row)
        act.details.update(approval=row.id, approvals=len(good))
        if refused:
            raise ConflictError(f"{subject} was refused by {', '.join(refused)}", "change it and ask again")
        needed = self._needed(row)
        act.details["required"] = needed
        if len(good) < needed:
            said = f"{subject} has {len(good)} of {needed} approvals that it needs ({kind})"
            if wanted:
                said = f"{wanted} needs {needed} approval{'s' if needed > 1 else ''} and has {len(good)}"
            raise ApprovalMissingError(
                said,
                f"{_who_decides(row, act.caller.name)} runs: cloister approve {row.id}   then {next_step}",
            )
        if kind != "promotion":
            act.connection.execute(update(approvals).where(approvals.c.id == row.id).values(state="used"))
        return row.id, good

    def _needed(self, row: Any) -> int:
        """How many: as many as when it was asked for, and no fewer than now."""
        return max(int(row.required), self.required.count(row.kind))

    def votes(self, connection: Connection, row: Any) -> tuple[list[Any], list[str]]:
        """The votes for a request that count now, and who refused it.

        Each is verified again: a vote counts while its voter may vote and has the key that signed it.
        """
        cast = connection.execute(select(votes).where(votes.c.approval == row.id)).all()
        refused = sorted(vote.person for vote in cast if vote.decision != "approve")
        good: dict[str, Any] = {}
        for vote in cast:
            if vote.decision == "approve" and vote.person != row.author:
                try:
                    self._may_still(connection, row, vote.person)
                    self._check(connection, row, vote.person, vote.envelope)
                except CloisterError:
                    continue
                good[key_id(signing_key(connection, vote.person))] = vote
        return list(good.values()), refused

    def _may_still(self, connection: Connection, row: Any, person: str) -> None:
        who = load_identity(connection, person)
        if who.disabled:
            raise PermissionDeniedError(f"{person} was revoked", "ask somebody else")
        _require_independent(who, row)
        voter = Caller(name=person, roles=frozenset(who.roles), kind=who.kind)
        asked = Action(self._core, voter, "approval:vote", {})
        asked.connection = connection
        asked.allow(resources.approval(row))

    def _check(self, connection: Connection, row: Any, person: str, envelope: dict[str, Any]) -> str:
        """The decision in a vote, once it is known to be `person`'s, by their key, about this request."""
        public = signing_key(connection, person)
        verified = dsse.verify(
            envelope, {key_id(public): ed25519_public_from_pem(public)}, predicate_type=APPROVAL_PREDICATE,
            subject_digest=row.digest,
        )  # fmt: skip
        said = verified.predicate
        about = {name: said.get(name) for name in ("approval", "kind", "person", "expires", "details")}
        if about != {
            "approval": row.id, "kind": row.kind, "person": person, "expires": int(row.expires), "details": row.details,
        }:  # fmt: skip
            raise IntegrityError("the signed decision is about another request", "run cloister approve again")
        decision = said.get("decision")
        if decision not in ("approve", "deny"):
            raise InputError("a decision is 'approve' or 'deny'", "run cloister approve or cloister deny")
        return str(decision)

    def vote(self, caller: Caller, approval: str, envelope: dict[str, Any]) -> dict[str, Any]:
        """Take a signed decision.

        Raises:
            PermissionDeniedError: the author, or nobody who may decide this.
            IntegrityError: not signed by the caller's own key, or about something else.
        """
        with self._core.action(caller, "approval:vote", approval=approval[:40]) as act:
            row = _load(act.connection, approval)
            try:
                act.allow(resources.approval(row))
            except PermissionDeniedError as refused:
                if row.author != caller.name:
                    raise
                raise PermissionDeniedError(
                    "you asked for this, so others decide", f"ask {_who_decides(row, caller.name)}"
                ) from refused
            _require_independent(load_identity(act.connection, caller.name), row)
            if row.state != "open" or row.expires <= self._core.clock():
                raise NotFoundError("there is no such open approval", "list them: cloister approvals list")
            decision = self._check(act.connection, row, caller.name, envelope)
            cast = act.connection.execute(select(votes).where(votes.c.approval == approval)).all()
            key = key_id(signing_key(act.connection, caller.name))
            if any(vote.person == caller.name or vote.key_id == key for vote in cast):
                raise ConflictError("you have decided on this already", "a decision is final; ask for a new request")
            act.details.update(decision=decision, kind=row.kind, digest=row.digest)
            act.connection.execute(
                insert(votes).values(
                    approval=approval, person=caller.name, key_id=key, decision=decision, envelope=envelope,
                    created=self._core.clock(),
                )
            )  # fmt: skip
            if decision == "deny":
                act.connection.execute(update(approvals).where(approvals.c.id == approval).values(state="refused"))
                if row.kind in self.on_refused:
                    self.on_refused[row.kind](act, row)
            elif row.kind in self.on_granted and len(self.votes(act.connection, row)[0]) >= self._needed(row):
                self.on_granted[row.kind](act, row)
                act.connection.execute(update(approvals).where(approvals.c.id == approval).values(state="used"))
            return self._public(act.connection, _load(act.connection, approval))

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        """Requests that have not expired, with their votes."""
        with self._core.reading(caller, "approval:list") as act:
            act.allow(PLATFORM)
            now = self._core.clock()
            rows = act.connection.execute(
                select(approvals).where(approvals.c.expires > now, approvals.c.state == "open")
                .order_by(approvals.c.created)
            ).all()  # fmt: skip
            return [self._public(act.connection, row) for row in rows]

    def _public(self, connection: Connection, row: Any) -> dict[str, Any]:
        cast = connection.execute(select(votes).where(votes.c.approval == row.id)).all()
        good, _ = self.votes(connection, row)
        return {
            "approval": row.id,
            "kind": row.kind,
            "subject": row.subject,
            "digest": row.digest,
            "details": row.details,
            "requested_by": row.author,
            "required": self._needed(row),
            "approved": len(good),
            "state": row.state,
            "expires": row.expires,
            "votes": [{"person": vote.person, "decision": vote.decision} for vote in cast],
        }


def _who_decides(row: Any, reader: str) -> str:
    """Who may vote on a request by the policies that ship, told to `reader`."""
    owner, author = row.details["owner"], "you" if row.author == reader else row.author
    who = "a reviewer" if row.kind in ("training", "promotion") else "a security officer"
    if row.kind == "training" and owner != row.author:
        who += f", or {owner}"
    return f"{who} (not {author})"


def _require_independent(voter: Any, row: Any) -> None:
    """Refuse whom the author registered: or one person could vote by a second name.

    Raises:
        PermissionDeniedError: so it is.
    """
    if voter.registered_by == row.author:
        raise PermissionDeniedError(f"{voter.name} was registered by the author of this", "ask somebody else")


def _load(connection: Connection, approval: str) -> Any:
    row = connection.execute(select(approvals).where(approvals.c.id == approval)).one_or_none()
    if row is None:
        raise NotFoundError("there is no such open approval", "list them: cloister approvals list")
    return row
