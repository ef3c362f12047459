"""The directory: people, services, nodes and workloads, and what each may do.

Guarantees: an identity proves itself by a key of its own or by an outside issuer's token, never by a password; a change
of roles, a revocation or a new key ends every token that was given before, at once; the last operator cannot be taken
away; forgetting a person (`shred`) leaves the log whole and nobody's.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError as DuplicateError

from cloister.authority import resources
from cloister.authority.core import ITSELF, PLATFORM, Caller, Core, Resource
from cloister.authority.pseudonyms import shred
from cloister.errors import AuthenticationError, ConflictError, InputError, IntegrityError, NotFoundError
from cloister.policy.decide import ROLES
from cloister.signing.keys import ed25519_public_from_pem, public_to_pem
from cloister.signing.tokens import MAX_LIFETIME_S, key_proof_audience, verify_assertion
from cloister.stores.tables import approvals, elevations, identities, refresh_tokens, revocations

PEOPLE_AND_SERVICES = frozenset({"person", "service"})
NAME = re.compile(r"[a-z][a-z0-9._-]{0,62}")
# Names that the log uses for the authority itself, strangers and workloads: a person of such a name would be one.
_RESERVED = re.compile(r"authority|unknown|issuer|(run|ep|u)-.*|[ap]-[0-9a-f]{16}")


class Identities:
    """Who exists. `issuer` is the authority's URL."""

    def __init__(self, core: Core, *, issuer: str) -> None:
        self._core = core
        self._issuer = issuer

    def register(
        self, caller: Caller, name: str, roles: list[str], *, public_key: str | None = None, kind: str = "person",
        issuer: str | None = None, subject: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Make a person or a service known, by their public key or by their subject at an outside issuer.

        Raises:
            InputError: bad name, unknown role, not an Ed25519 public key, neither key nor subject.
            ConflictError: the name, the key or the subject is taken.
        """
        with self._core.action(caller, "identity:register", roles=",".join(roles)[:200], kind=kind[:20]) as act:
            act.allow(PLATFORM)
            _check_roles(roles)
            if kind not in PEOPLE_AND_SERVICES:
                raise InputError("an identity is a person or a service", "nodes: cloister node add")
            require_free(name)
            if bool(issuer) != bool(subject) or not (public_key or issuer):
                raise InputError("an identity needs a public key, or an issuer and a subject", "see --help")
            add_identity(
                act.connection, name, roles, public_key, caller.name, self._core.clock(), kind=kind, issuer=issuer,
                subject=subject,
            )  # fmt: skip
            act.details["name"] = act.person(name) if kind == "person" else name
        return {"name": name, "kind": kind, "roles": roles}

    def bootstrap(self, name: str, public_key: str) -> None:
        """The first identity of a new authority: whoever starts it on its own machine operates it."""
        with self._core.database.transaction() as connection:
            if connection.execute(select(identities.c.name).limit(1)).first():
                return
            add_identity(connection, name, ["operator"], public_key, "authority", self._core.clock())
            person = Resource(type="Identity", name=name, person=True)
            self._core.append(
                connection, ITSELF, "identity:bootstrap", person, "success", "first-start", roles="operator"
            )

    def me(self, caller: Caller) -> dict[str, Any]:
        """Who the caller is here, what they may do for now, and whether they can sign."""
        with self._core.reading(caller, "identity:me") as act:
            row = load(act.connection, caller.name)
            act.allow(resources.identity(row))
        return {
            "name": row.name, "kind": row.kind, "roles": sorted(caller.roles), "has_key": row.public_key is not None,
            "node": caller.node.name if caller.node else None,
        }  # fmt: skip

    def change_roles(self, caller: Caller, name: str, roles: list[str]) -> dict[str, Any]:
        """Give an identity these roles instead of those it has. Its tokens end.

        Raises:
            ConflictError: nobody would be left who operates.
        """
        with self._core.action(caller, "identity:change", roles=",".join(roles)[:200]) as act:
            row = load(act.connection, name)
            act.allow(resources.identity(row))
            _check_roles(roles)
            if row.kind not in PEOPLE_AND_SERVICES:
                raise InputError(f"{name} is a {row.kind}, whose role is fixed", "register another identity")
            _require_access(row)
            # By the caller's word from now on: an issuer's groups do not undo it.
            changed = {"roles": roles, "registered_by": caller.name}
            act.connection.execute(update(identities).where(identities.c.name == name).values(**changed))
            _require_operator(act.connection)
            _end_loans(act.connection, name)
            end_tokens(act.connection, name, self._core.clock())
        return {"name": name, "roles": roles}

    def revoke(self, caller: Caller, name: str) -> dict[str, Any]:
        """Shut an identity out, now and for good: no token is given any more, and those that were are dead.

        Raises:
            ConflictError: nobody would be left who operates.
        """
        with self._core.action(caller, "identity:revoke") as act:
            row = load(act.connection, name)
            act.allow(resources.identity(row))
            _require_access(row)
            act.connection.execute(update(identities).where(identities.c.name == name).values(disabled=True))
            _require_operator(act.connection)
            _end_loans(act.connection, name)
            end_tokens(act.connection, name, self._core.clock())
        return {"name": name, "disabled": True}

    def set_key(self, caller: Caller, name: str, public_key: str, proof: str = "") -> dict[str, Any]:
        """Register one's own signing key, or another in its place. Votes by the old key do not count any more.

        To replace a key takes `proof`, an assertion that the old one signed for the new one (`key_proof_audience`):
        a token alone lives minutes, and must not become a key that lives for ever.

        Raises:
            IntegrityError: no good proof.
            ConflictError: the key is registered already.
        """
        with self._core.action(caller, "identity:key") as act:
            row = load(act.connection, name)
            act.allow(resources.identity(row))
            pem = _key_text(public_key)
            if row.public_key is not None:
                audience = key_proof_audience(self._issuer, pem.encode())
                try:
                    verify_assertion(
                        proof, row.public_key.encode(), subject=name, audience=audience, now=self._core.clock()
                    )
                except AuthenticationError:
                    raise IntegrityError("the old key has not agreed to the new one", "cloister identity key") from None
            try:
                with act.connection.begin_nested():
                    act.connection.execute(update(identities).where(identities.c.name == name).values(public_key=pem))
            except DuplicateError as error:
                raise ConflictError("this key is registered already", "make a new one") from error
            if row.public_key is not None:
                end_tokens(act.connection, name, self._core.clock())
        return {"name": name, "public_key": pem}

    def shred(self, caller: Caller, name: str) -> dict[str, Any]:
        """Forget which entries of the log are about a person who was revoked.

        Raises:
            ConflictError: they still have access.
        """
        with self._core.action(caller, "identity:shred") as act:
            row = load(act.connection, name)
            if row.kind != "person":
                raise InputError(f"{name} is a {row.kind}: the log names it, for it is nobody", "nothing to do")
            act.allow(resources.identity(row))
            if not row.disabled:
                raise ConflictError(f"{name} still has access", f"first: cloister identity revoke {name}")
            act.details["name"] = act.person(name)
            act.resource = None  # or the entry would make a new pseudonym, and undo what it records
            act.details["pseudonyms"] = shred(act.connection, name)
        self._core.database.scrub()
        return {"name": name, "forgotten": True}

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        """People, services and nodes."""
        with self._core.reading(caller, "identity:list") as act:
            act.allow(PLATFORM)
            rows = act.connection.execute(
                select(identities).where(identities.c.kind.in_(["person", "service", "node"]))
                .order_by(identities.c.created)
            ).all()  # fmt: skip
            elevated = act.connection.execute(select(elevations).where(elevations.c.expires > self._core.clock())).all()
        return [
            {
                "name": row.name, "kind": row.kind, "roles": row.roles, "issuer": row.issuer, "subject": row.subject,
                "attributes": row.attributes, "disabled": row.disabled, "registered_by": row.registered_by,
                "elevated": [{"role": e.role, "expires": e.expires} for e in elevated if e.name == row.name],
            }
            for row in rows
        ]  # fmt: skip


def require_free(name: str) -> None:
    """Raises: InputError: a name that people and machines cannot have."""
    if _RESERVED.fullmatch(name):
        raise InputError("this is one of the names that Cloister keeps for itself", "choose another name")


def add_identity(
    connection: Connection, name: str, roles: list[str], public_key: str | None, registered_by: str, now: float, *,
    kind: str = "person", issuer: str | None = None, subject: str | None = None,
    attributes: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Insert somebody.

    Raises:
        InputError, ConflictError: as `Identities.register`.
    """
    if not NAME.fullmatch(name):
        raise InputError("a name is 1 to 63 lower-case letters, digits, '.', '_' or '-'", "start it with a letter")
    pem = _key_text(public_key) if public_key else None
    try:
        with connection.begin_nested():
            connection.execute(
                insert(identities).values(
                    name=name, kind=kind, roles=roles, public_key=pem, issuer=issuer, subject=subject,
                    attributes=attributes or {}, epoch=0, disabled=False, registered_by=registered_by, created=now,
                )
            )  # fmt: skip
    except DuplicateError as error:
        raise ConflictError(f"the name {name}, its key or its subject is taken", "choose another name") from error


def end_tokens(connection: Connection, name: str, now: float, token_id: str | None = None) -> None:
    """Kill one token of `name`, or all of them; replicas learn of it from `changes`."""
    if token_id is None:
        connection.execute(update(identities).where(identities.c.name == name).values(epoch=identities.c.epoch + 1))
        connection.execute(delete(refresh_tokens).where(refresh_tokens.c.name == name))
    epoch = connection.execute(select(identities.c.epoch).where(identities.c.name == name)).scalar_one()
    last = connection.execute(select(func.coalesce(func.max(revocations.c.sequence), 0))).scalar_one()
    # Tokens of that time are dead by themselves; the last row stays, for its number.
    past = revocations.c.created < now - 2 * MAX_LIFETIME_S
    connection.execute(delete(revocations).where(past, revocations.c.sequence < last))
    connection.execute(
        insert(revocations).values(sequence=last + 1, name=name, epoch=epoch, token_id=token_id, created=now)
    )


def _end_loans(connection: Connection, name: str) -> None:
    """What was lent to somebody, or asked for, was so under the roles that they had."""
    connection.execute(delete(elevations).where(elevations.c.name == name))
    asked = (approvals.c.kind == "access") & (approvals.c.author == name) & (approvals.c.state == "open")
    connection.execute(update(approvals).where(asked).values(state="void"))


def _require_access(row: Any) -> None:
    if row.disabled:
        raise ConflictError(f"{row.name} was revoked already", "revoking is for good: register another name")


def load(connection: Connection, name: str) -> Any:
    """One identity's row.

    Raises:
        NotFoundError: there is none.
    """
    row = connection.execute(select(identities).where(identities.c.name == name)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no identity {name[:63]}", "list them: cloister identity list")
    return row


def signing_key(connection: Connection, name: str) -> bytes:
    """The key (PEM) that somebody signs with.

    Raises:
        AuthenticationError: they have registered none.
    """
    pem = load(connection, name).public_key
    if pem is None:
        raise AuthenticationError(f"{name} has no signing key yet", "make and register one: cloister identity key")
    return str(pem).encode()


def _key_text(public_key: str) -> str:
    return public_to_pem(ed25519_public_from_pem(public_key.encode())).decode()  # one key has one text


def _check_roles(roles: list[str]) -> None:
    unknown = sorted(set(roles) - set(ROLES))
    if unknown or not roles:
        raise InputError(f"unknown role {', '.join(unknown)[:80] or '(none)'}", "roles: " + ", ".join(ROLES))


def _require_operator(connection: Connection) -> None:
    rows = connection.execute(select(identities.c.roles).where(identities.c.disabled.is_(False))).scalars()
    if not any("operator" in roles for roles in rows):
        raise ConflictError("nobody would be left who operates this authority", "give another person the role first")
