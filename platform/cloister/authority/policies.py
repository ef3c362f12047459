"""The site's own policies: shown, explained, and changed by approval.

Guarantees: a change is validated against the schema, approved by n others over the digest of its text, recorded, and in
force everywhere from the transaction that commits it (`cloister.authority.rules`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert

from cloister.authority import resources
from cloister.authority.approvals import Approvals
from cloister.authority.core import LASTING, PLATFORM, Action, Caller, Core
from cloister.authority.identity import load
from cloister.authority.sessions import roles_now
from cloister.canonical import sha256_hex
from cloister.errors import InputError
from cloister.policy import Policy
from cloister.policy.explain import explain
from cloister.stores.tables import policy_versions

READ = {
    "Platform": "policy:read", "Dataset": "dataset:read", "Run": "run:read", "Model": "model:read",
    "Endpoint": "endpoint:list", "Approval": "approval:list",
}  # fmt: skip


class Policies:
    """What is in force, why, and what comes next."""

    def __init__(self, core: Core, approvals: Approvals) -> None:
        self._core = core
        self._approvals = approvals

    def show(self, caller: Caller) -> dict[str, Any]:
        """The version in force and the site's own text. The shipped rules are public."""
        with self._core.reading(caller, "policy:read") as act:
            act.allow(PLATFORM)
            version = self._core.rules.version(act.connection)
            text = self._core.rules.text(act.connection, version)
        return {"version": version, "text": text, "digest": sha256_hex(text.encode())}

    def propose(self, caller: Caller, text: str, reason: str) -> dict[str, Any]:
        """Put `text` in force as the site's policies, in place of those it has; an empty one leaves the shipped alone.

        Raises:
            InputError: it does not parse, does not fit the schema, or takes the name of a shipped rule.
            ApprovalMissingError: not enough others have approved exactly this; names the request.
        """
        with self._core.reading(caller, "policy:propose") as asked:
            asked.allow(PLATFORM)
        coming = Policy.shipped().with_site(text)
        if not coming.decide(asked.request(caller, "policy:propose", PLATFORM)).allowed:
            raise InputError("under these policies you could not propose others", "leave a way back")
        with self._core.action(caller, "policy:propose", digest=sha256_hex(text.encode("utf-8", "replace"))) as act:
            act.allow(PLATFORM)
            version = self._core.rules.version(act.connection) + 1
            digest = sha256_hex(text.encode())
            details = {"version": version, "text_digest": digest, "text": text, "reason": reason}
            self._approvals.demand(
                act,
                "policy",
                f"policy version {version}",
                details,
                next_step="propose it again: cloister policy propose",
            )
            act.details["version"] = version
            act.connection.execute(
                insert(policy_versions).values(
                    version=version, text=text, digest=digest, author=caller.name, created=self._core.clock()
                )
            )
        return {"version": version, "digest": digest}

    def explain(
        self, caller: Caller, principal: str | None, action: str, resource_type: str, resource: str
    ) -> dict[str, Any]:
        """Why `principal`, or the caller, may or may not do this, by the facts that the authority has.

        About others only for whoever may list identities.
        """
        with self._core.reading(caller, "identity:me") as act:
            act.allow(resources.identity(load(act.connection, caller.name)))
            asked = caller
            if principal not in (None, caller.name):
                act.allow(PLATFORM, "identity:list")
                row = load(act.connection, str(principal))
                roles, _ = roles_now(act.connection, row, self._core.clock())
                asked = Caller(name=row.name, roles=frozenset(roles), kind=row.kind)
            known = resources.resource_named(act.connection, resource_type, resource)
            request = Action(self._core, asked, action, {}).request(asked, action, known)
            policy = self._core.rules.current(act.connection)
            answer = explain(policy, request).to_dict()
            read = READ.get(resource_type, "identity:list")
            if not policy.decide(act.request(caller, read, known)).allowed:
                # Whoever may not see the thing learns which rule it is, and not what the thing is like.
                answer |= {"problem": None, "findings": [{**each, "reasons": []} for each in answer["findings"]]}
        if asked.lent and action in LASTING:
            answer["problem"] = "a lent role is no good for this, since what it would do outlives the loan"
        return {"principal": asked.name, "roles": sorted(asked.roles)} | answer
