"""Just-in-time access: a role for a while, approved by somebody else, gone by itself."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert

from cloister.authority.approvals import Approvals
from cloister.authority.core import PLATFORM, Action, Caller, Core
from cloister.authority.identity import load
from cloister.errors import ConflictError, InputError
from cloister.policy.decide import ROLES
from cloister.stores.tables import elevations

MAX_DURATION_S = 8 * 3600


class Access:
    """Requests for elevated access. An approved one begins with the deciding vote."""

    def __init__(self, core: Core, approvals: Approvals) -> None:
        self._core = core
        self._approvals = approvals
        approvals.on_granted["access"] = self._grant

    def request(self, caller: Caller, role: str, duration_s: int, reason: str) -> dict[str, Any]:
        """Ask for `role` for `duration_s` seconds from the approval on.

        Raises:
            InputError: no such role, longer than a shift, or no reason.
            ConflictError: the caller has the role.
        """
        with self._core.action(caller, "access:request", role=role[:40], seconds=duration_s) as act:
            act.allow(PLATFORM)
            if role not in ROLES:
                raise InputError(f"unknown role {role[:40]}", "roles: " + ", ".join(ROLES))
            if not 60 <= duration_s <= MAX_DURATION_S:
                raise InputError("access is lent for 1 minute to 8 hours", "such as --for 1h")
            if not reason.strip():
                raise InputError("this needs a reason", "say what you need it for")
            if role in caller.roles:
                raise ConflictError(f"you are {role} already", "nothing to do")
            details = {"person": caller.name, "role": role, "seconds": duration_s, "reason": reason}
            row = self._approvals.request(act, "access", f"{role} for {caller.name}", details)
            act.details["approval"] = row.id
            if row.state == "refused":
                raise ConflictError("this was refused", "ask for something else, or tomorrow")
        return {"approval": row.id, "role": role, "seconds": duration_s, "required": row.required}

    def _grant(self, act: Action, row: Any) -> None:
        now = self._core.clock()
        person = row.details["person"]
        if load(act.connection, person).disabled:
            raise ConflictError(f"{person} was revoked", "nothing to do")
        act.details.update(role=row.details["role"], person=act.person(person), seconds=row.details["seconds"])
        act.connection.execute(
            insert(elevations).values(
                approval=row.id, name=person, role=row.details["role"], starts=now,
                expires=now + row.details["seconds"],
            )
        )  # fmt: skip
