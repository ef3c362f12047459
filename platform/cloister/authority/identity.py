"""People and workloads: who they are, and the short-lived tokens that prove it.

Guarantees: no password exists; a token is given only for an assertion (RFC 7523) signed by the caller's own key, and
each assertion works once; the private key never reaches the authority.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.exc import IntegrityError as DuplicateError

from cloister.audit.event import Event
from cloister.authority.core import PLATFORM, Caller, Core
from cloister.errors import AuthenticationError, ConflictError, InputError, TokenExpiredError
from cloister.policy.decide import WORKLOAD_ROLES
from cloister.signing import tokens
from cloister.signing.keys import ed25519_public_from_pem, public_to_pem
from cloister.stores.database import identities, used_assertions

AUDIENCES = frozenset({tokens.AUTHORITY_AUDIENCE, tokens.INFERENCE_AUDIENCE})
ROLES = ("operator", "data-owner", "engineer", "reviewer", "consumer", "auditor")
_NAME = re.compile(r"[a-z][a-z0-9._-]{0,62}")
# Names that the log uses for the authority itself and for workloads: a person of such a name would be taken for one.
_RESERVED = re.compile(r"authority|(run|ep)-.*")


class Identities:
    """The directory of who exists, and the token endpoint. `issuer` is the authority's URL."""

    def __init__(self, core: Core, *, issuer: str, token_key: bytes, token_key_id: str, token_public: bytes) -> None:
        self._core = core
        self.issuer = issuer
        self._token_key = token_key
        self.token_key_id = token_key_id
        self._verifier = tokens.TokenVerifier(
            {token_key_id: token_public}, issuer=issuer, audience=tokens.AUTHORITY_AUDIENCE
        )

    def register(self, caller: Caller, name: str, roles: list[str], public_key: str) -> dict[str, Any]:
        """Make a person known.

        Raises:
            InputError: bad name, unknown role, not an Ed25519 public key.
            ConflictError: the name or the key is taken.
        """
        with self._core.action(caller, "identity:register", name=name[:80], roles=",".join(roles)[:200]) as act:
            act.allow(PLATFORM)
            unknown = sorted(set(roles) - set(ROLES))
            if unknown or not roles:
                raise InputError(f"unknown role {', '.join(unknown)[:80] or '(none)'}", "roles: " + ", ".join(ROLES))
            if _RESERVED.fullmatch(name):
                raise InputError("'authority', 'run-…' and 'ep-…' are names of Cloister's own", "choose another name")
            add_identity(act.connection, name, roles, public_key, caller.name, self._core.clock())
        return {"name": name, "roles": roles}

    def bootstrap(self, name: str, public_key: str) -> None:
        """The first identity of a new authority: whoever starts it on its own machine operates it."""
        with self._core.database.transaction() as connection:
            if connection.execute(select(identities.c.name).limit(1)).first():
                return
            add_identity(connection, name, ["operator"], public_key, "authority", self._core.clock())
            self._core.append(
                connection,
                Event(time=self._core.now_text(), actor="authority", action="identity:bootstrap",
                      resource=f"Person/{name}", outcome="success", rule="first-start", source="local",
                      details={"roles": "operator"}),
            )  # fmt: skip

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        with self._core.unlogged(caller, "identity:list") as act:
            act.allow(PLATFORM)
            rows = act.connection.execute(select(identities).order_by(identities.c.created)).all()
        return [
            {"name": row.name, "roles": row.roles, "registered_by": row.registered_by}
            for row in rows
            if not WORKLOAD_ROLES & set(row.roles)
        ]

    def token(self, assertion: str, audience: str, source: str) -> dict[str, Any]:
        """Exchange an assertion for an access token (RFC 7523 section 2.1; audience by RFC 8707).

        Raises:
            AuthenticationError: unknown caller, wrong key, used or expired assertion.
            InputError: an audience that does not exist.
        """
        if audience not in AUDIENCES:
            raise InputError("there is no such resource", "resources: " + ", ".join(sorted(AUDIENCES)))
        now = self._core.clock()
        subject = tokens.unverified_subject(assertion)
        unknown = AuthenticationError(
            "the authority does not know this name with this key", "an operator runs: cloister identity add"
        )
        if not _NAME.fullmatch(subject):
            raise unknown
        with self._core.database.transaction() as connection:
            row = connection.execute(select(identities).where(identities.c.name == subject)).one_or_none()
        if row is None:
            raise unknown
        # Outside of any transaction: strangers' signatures must not hold the database's lock.
        try:
            jti = tokens.verify_assertion(
                assertion, row.public_key.encode(), subject=subject, audience=self.issuer, now=now
            )
        except TokenExpiredError:
            raise
        except AuthenticationError as error:
            raise unknown from error
        with self._core.database.transaction() as connection:
            connection.execute(delete(used_assertions).where(used_assertions.c.expires < now))
            if connection.execute(select(used_assertions).where(used_assertions.c.jti == f"{subject}/{jti}")).first():
                raise AuthenticationError("this assertion was used before", "make a new one: cloister login")
            remember_s = tokens.ASSERTION_LIFETIME_S + 2 * tokens.CLOCK_SKEW_S
            connection.execute(insert(used_assertions).values(jti=f"{subject}/{jti}", expires=now + remember_s))
            self._core.append(
                connection,
                Event(time=self._core.now_text(), actor=subject, action="token:issue", resource=f"Audience/{audience}",
                      outcome="success", rule="own-key", source=source, details={}),
            )  # fmt: skip
        token = tokens.issue(
            self._token_key,
            issuer=self.issuer,
            subject=subject,
            audience=audience,
            roles=row.roles,
            lifetime_s=tokens.MAX_LIFETIME_S,
            now=now,
            key_id=self.token_key_id,
        )
        return {"access_token": token, "token_type": "Bearer", "expires_in": tokens.MAX_LIFETIME_S}

    def authenticate(self, authorization: str | None, source: str) -> Caller:
        """The caller behind an `Authorization: Bearer …` header.

        Raises:
            AuthenticationError: no token, or not a good one.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AuthenticationError("this needs an access token", "log in: cloister login NAME")
        claims = self._verifier.verify(token, self._core.clock())
        return Caller(name=claims.subject, roles=claims.roles, source=source)


def add_identity(
    connection: Connection, name: str, roles: list[str], public_key: str, registered_by: str, now: float
) -> None:
    """Insert a person or a workload.

    Raises:
        InputError, ConflictError: as `Identities.register`.
    """
    if not _NAME.fullmatch(name):
        raise InputError("a name is 1 to 63 lower-case letters, digits, '.', '_' or '-'", "start it with a letter")
    public_key = public_to_pem(ed25519_public_from_pem(public_key.encode())).decode()  # one key has one text
    try:
        with connection.begin_nested():
            connection.execute(
                insert(identities).values(
                    name=name, roles=roles, public_key=public_key, registered_by=registered_by, created=now
                )
            )
    except DuplicateError as error:
        raise ConflictError(f"the name {name} or its key is registered already", "choose another name") from error
