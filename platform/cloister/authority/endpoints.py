"""Serving endpoints: model leases for replicas, and the quotas that their answers are paid from.

Guarantees: a model's key leaves only HPKE-sealed to a replica's one-time key, for the production version that the
endpoint was deployed with, after the lease is on record; a quota block is debited durably before it is granted, so
all replicas together never answer more than the quota (a crash strands at most one block a replica).
"""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from cloister.authority import resources
from cloister.authority.core import PLATFORM, Caller, Core
from cloister.authority.identity import add_identity
from cloister.authority.models import Models, load, production
from cloister.authority.sessions import Sessions
from cloister.errors import ConflictError, InputError, NotFoundError
from cloister.models.release import PRODUCTION
from cloister.sealing import purposes
from cloister.signing import certificates
from cloister.stores.tables import endpoints, quota_windows, revocations

LONGEST_WINDOW_S = 86_400


class Endpoints:
    """Deployed endpoints. `ca_key` and `ca_certificate` issue their TLS certificates."""

    def __init__(self, core: Core, sessions: Sessions, models: Models, ca_key: bytes, ca_certificate: bytes) -> None:
        self._core = core
        self._sessions = sessions
        self._models = models
        self._ca_key = ca_key
        self._ca_certificate = ca_certificate

    def deploy(
        self, caller: Caller, name: str, public_key: str, csr: bytes, quota_requests: int, quota_window_s: int
    ) -> dict[str, Any]:
        """Register an endpoint for the production version of a model and certify its TLS key for loopback.

        Raises:
            NotFoundError: no version of the model is in production.
        """
        endpoint = "ep-" + secrets.token_hex(5)
        with self._core.action(
            caller, "endpoint:deploy", endpoint=endpoint, quota=f"{quota_requests} in {quota_window_s} s"
        ) as act:
            act.allow(PLATFORM)
            if not (1 <= quota_requests <= 10_000_000 and 1 <= quota_window_s <= 86_400):
                raise InputError(
                    "a quota is 1 to 10,000,000 requests in 1 to 86,400 seconds", "such as --quota 600/60s"
                )
            row = production(act.connection, name)
            act.details["model"] = f"{row.name}@{row.version}"
            certificate = certificates.issue(self._ca_key, self._ca_certificate, csr, hosts=("127.0.0.1", "localhost"))
            act.connection.execute(
                insert(endpoints).values(
                    id=endpoint, model=row.name, version=row.version, deployed_by=caller.name, state="active",
                    quota_requests=quota_requests, quota_window_s=quota_window_s, created=self._core.clock(),
                )
            )  # fmt: skip
            add_identity(
                act.connection, endpoint, ["endpoint"], public_key, caller.name, self._core.clock(), kind="endpoint"
            )
        return {"endpoint": endpoint, "model": f"{row.name}@{row.version}", "certificate": certificate.decode()}

    def stop(self, caller: Caller, endpoint: str) -> None:
        """End an endpoint: its leases and quota blocks are refused from now on."""
        with self._core.action(caller, "endpoint:stop") as act:
            row = _endpoint(act.connection, endpoint)
            act.allow(resources.endpoint(row))
            act.connection.execute(update(endpoints).where(endpoints.c.id == endpoint).values(state="stopped"))

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        with self._core.reading(caller, "endpoint:list") as act:
            act.allow(PLATFORM)
            rows = act.connection.execute(select(endpoints).order_by(endpoints.c.created)).all()
        return [
            {"endpoint": row.id, "model": f"{row.model}@{row.version}", "state": row.state,
             "quota": f"{row.quota_requests} in {row.quota_window_s} s"}
            for row in rows
        ]  # fmt: skip

    def lease(self, caller: Caller, endpoint: str, public_key: bytes) -> dict[str, Any]:
        """Everything that a replica needs to verify and open its model; the key only sealed."""
        with self._core.action(caller, "endpoint:lease") as act:
            row = _endpoint(act.connection, endpoint)
            act.allow(resources.endpoint(row))
            _require_active(row)
            model = load(act.connection, row.model, row.version)
            if model.stage != PRODUCTION:
                raise ConflictError(f"{row.model}@{row.version} is {model.stage}", "deploy the production version")
            act.details.update(model=f"{row.model}@{row.version}", root=model.root_digest)
            evidence = self._models.evidence(act.connection, model)
            sealed = self._models.sealed_key(act, model, public_key, purposes.model_lease(endpoint))
        self._core.anchor(act)
        return evidence | {"sealed": sealed, "model": f"{row.model}@{row.version}"}

    def changes(self, caller: Caller, endpoint: str, after: int, policy_version: int) -> dict[str, Any]:
        """What a replica must know at once: dead tokens since `after`, token keys, the site's policies if they changed.

        Returns `serving`: whether the endpoint may still answer.
        """
        with self._core.reading(caller, "endpoint:work") as act:
            row = _endpoint(act.connection, endpoint)
            act.allow(resources.endpoint(row))
            model = load(act.connection, row.model, row.version)
            newest = act.connection.execute(select(func.max(revocations.c.sequence))).scalar_one_or_none() or 0
            if after > newest:  # more than there is: the state was restored, so the replica hears all of it again
                after = 0
            dead = act.connection.execute(
                select(revocations).where(revocations.c.sequence > after).order_by(revocations.c.sequence)
            ).all()
            version = self._core.rules.version(act.connection)
            text = self._core.rules.text(act.connection, version) if version != policy_version else None
            keys = self._sessions.public_keys(act.connection)
        return {
            "sequence": dead[-1].sequence if dead else after,
            "revoked": [{"name": each.name, "epoch": each.epoch, "token_id": each.token_id} for each in dead],
            "policy": None if text is None else {"version": version, "text": text},
            "token_keys": {key_id: pem.decode() for key_id, pem in keys.items()},
            "serving": row.state == "active" and model.stage == PRODUCTION,
        }

    def quota_block(self, caller: Caller, endpoint: str, subject: str, wanted: int) -> dict[str, Any]:
        """Up to `wanted` answers for `subject` in the present window, debited before they are granted."""
        with self._core.action(caller, "endpoint:work", step="quota") as act:
            row = _endpoint(act.connection, endpoint)
            act.allow(resources.endpoint(row))
            _require_active(row)
            now = self._core.clock()
            start = int(now) - int(now) % row.quota_window_s
            mine = (
                (quota_windows.c.model == row.model)
                & (quota_windows.c.subject == subject)
                & (quota_windows.c.window_start == start)
            )
            past = quota_windows.c.window_start < start - LONGEST_WINDOW_S  # not sooner: clocks go back
            act.connection.execute(delete(quota_windows).where(past))
            used = act.connection.execute(select(quota_windows.c.granted).where(mine)).scalar_one_or_none()
            granted = max(0, min(wanted, row.quota_requests - (used or 0)))
            if used is None:
                act.connection.execute(
                    insert(quota_windows).values(model=row.model, subject=subject, window_start=start, granted=granted)
                )
            elif granted:
                act.connection.execute(update(quota_windows).where(mine).values(granted=used + granted))
            act.outcome = "success" if granted else "denied"
            act.details["subject"] = act.person(subject)
            act.details["granted"] = granted
        return {"granted": granted, "window_ends": start + row.quota_window_s}


def _endpoint(connection: Connection, endpoint: str) -> Any:
    row = connection.execute(select(endpoints).where(endpoints.c.id == endpoint)).one_or_none()
    if row is None:
        raise NotFoundError("there is no such endpoint", "list them: cloister serve status")
    return row


def _require_active(row: Any) -> None:
    if row.state != "active":
        raise ConflictError("this endpoint was stopped", "deploy again: cloister serve deploy")
