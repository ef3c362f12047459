"""The token endpoint, and who is behind a token.

Guarantees: a token is given for an assertion signed by the caller's own key (RFC 7523), for a token of a trusted
outside issuer (RFC 8693), or for a refresh token that is used once (RFC 9700 section 4.14.2); each assertion works
once. `authenticate` believes the directory and not the token: who was revoked, or whose roles changed, is refused from
that moment on. A token that was asked for over mutual TLS works only over the same certificate (RFC 8705).
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from dataclasses import dataclass
from typing import Any

from joserfc.jwk import OKPKey
from sqlalchemy import Connection, delete, exists, insert, select, update

from cloister.authority.core import ITSELF, PLATFORM, Caller, Core, Resource
from cloister.authority.federation import Federation
from cloister.authority.identity import NAME, add_identity, end_tokens
from cloister.authority.nodes import Peer, node_of
from cloister.authority.pseudonyms import STRANGER
from cloister.errors import AuthenticationError, InputError, TokenExpiredError
from cloister.policy.decide import ROLES
from cloister.signing import keys, tokens
from cloister.signing.foreign import ForeignClaims
from cloister.stores.tables import (
    elevations,
    identities,
    refresh_tokens,
    revocations,
    token_keys,
    used_assertions,
)

AUDIENCES = frozenset({tokens.AUTHORITY_AUDIENCE, tokens.INFERENCE_AUDIENCE})
BY_ISSUER = "issuer"  # who registered those whom an issuer's groups let in
REFRESH_LIFETIME_S = 8 * 3600  # a working day: then the issuer is asked again who this is
FAILURES_RECORDED_PER_S = 10  # strangers must not be able to fill the log
_UNKNOWN = AuthenticationError(
    "the authority does not know this name with this key", "an operator runs: cloister identity add"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """The form of a token request (RFC 6749 section 4). Empty where not given."""

    grant_type: str
    resource: str = ""
    assertion: str = ""
    client_assertion_type: str = ""
    client_assertion: str = ""
    subject_token: str = ""
    subject_token_type: str = ""
    refresh_token: str = ""


class Sessions:
    """Tokens. `issuer` is the authority's URL."""

    def __init__(self, core: Core, *, issuer: str, issuers: Federation | None) -> None:
        self._core = core
        self.issuer = issuer
        self._issuers = issuers
        self._failures = (0, 0)  # in this second, and in which second
        self._lock = threading.Lock()
        self._first_key()
        self._verifier = tokens.TokenVerifier({}, issuer=issuer, audience=tokens.AUTHORITY_AUDIENCE)

    # ---- giving ----

    def token(self, request: TokenRequest, source: str, peer: Peer | None = None) -> dict[str, Any]:
        """Answer a token request: RFC 7523 sections 2.1 and 2.2, RFC 8693, RFC 6749 section 6; audience by RFC 8707.

        Raises:
            AuthenticationError: unknown caller, wrong key, used or expired assertion or refresh token.
            InputError: a grant type or an audience that does not exist.
        """
        if request.resource not in AUDIENCES:
            raise InputError("there is no such resource", "resources: " + ", ".join(sorted(AUDIENCES)))
        try:
            if request.grant_type == tokens.JWT_BEARER:
                return self._for_assertion(request.assertion, request.resource, source, peer)
            if request.grant_type == "client_credentials" and request.client_assertion_type == tokens.CLIENT_ASSERTION:
                return self._for_assertion(request.client_assertion, request.resource, source, peer)
            if request.grant_type == tokens.TOKEN_EXCHANGE and request.subject_token_type == tokens.JWT_TYPE:
                return self._for_foreign(request.subject_token, request.resource, source, peer)
            if request.grant_type == "refresh_token":
                return self._for_refresh(request.refresh_token, request.resource, source, peer)
        except AuthenticationError as error:
            self._note_failure(source, type(error).__name__, request.grant_type)
            raise
        raise InputError(
            "there is no such grant type", f"{tokens.JWT_BEARER}, client_credentials, token-exchange or refresh_token"
        )

    def _for_assertion(self, assertion: str, audience: str, source: str, peer: Peer | None) -> dict[str, Any]:
        now = self._core.clock()
        subject = tokens.unverified_subject(assertion)
        if not NAME.fullmatch(subject):
            raise _UNKNOWN
        with self._core.database.reading() as connection:
            row = connection.execute(select(identities).where(identities.c.name == subject)).one_or_none()
        # Whom an issuer vouches for has a key to sign with, not to log in with: or who leaves there would stay here.
        if row is None or row.public_key is None or row.issuer is not None:
            raise _UNKNOWN
        # Outside of any transaction: strangers' signatures must not hold the database's lock.
        try:
            jti = tokens.verify_assertion(
                assertion, row.public_key.encode(), subject=subject, audience=self.issuer, now=now
            )
        except TokenExpiredError:
            raise
        except AuthenticationError as error:
            raise _UNKNOWN from error
        with self._core.database.transaction() as connection:
            connection.execute(delete(used_assertions).where(used_assertions.c.expires < now))
            used = f"{subject}/{jti}"
            if connection.execute(select(used_assertions).where(used_assertions.c.jti == used)).first():
                raise AuthenticationError("this assertion was used before", "make a new one: cloister login")
            remember_s = tokens.ASSERTION_LIFETIME_S + 2 * tokens.CLOCK_SKEW_S
            connection.execute(insert(used_assertions).values(jti=used, expires=now + remember_s))
            return self._issue(connection, subject, audience, source, peer, rule="own-key", key=row.public_key)

    def _for_foreign(self, token: str, audience: str, source: str, peer: Peer | None) -> dict[str, Any]:
        if self._issuers is None:
            raise AuthenticationError("no outside issuer is trusted here", "name one in config.yaml: authority.issuers")
        claims = self._issuers.verify(token, self._core.clock())
        kind = "person" if self._issuers.settings(claims).kind == "people" else "service"
        mapped = sorted(self._issuers.roles(claims) & set(ROLES))
        with self._core.database.transaction() as connection:
            name = self._vouched_for(connection, claims, kind, mapped)
            if name is not None:
                family = secrets.token_hex(8)
                answer = self._issue(connection, name, audience, source, peer, rule="outside-issuer", family=family)
                if kind == "person":
                    answer["refresh_token"] = self._refresh_token(connection, name, family)
                return answer | {"name": name}
        raise AuthenticationError(
            "the issuer vouches for you, but nobody has given you access here",
            "an operator runs: cloister identity add NAME --role ROLE --issuer URL --subject YOUR-SUBJECT",
        )

    def _vouched_for(self, connection: Connection, claims: ForeignClaims, kind: str, roles: list[str]) -> str | None:
        """Whom an outside issuer's subject is here: as an operator registered them, or by the roles of their groups.

        None for nobody. What the issuer's word changes is on record: a newcomer, and roles that came or went.
        """
        mine = (identities.c.issuer == claims.issuer) & (identities.c.subject == claims.subject)
        row = connection.execute(select(identities).where(mine)).one_or_none()
        if row is not None and row.registered_by != BY_ISSUER:
            return str(row.name)
        now = self._core.clock()
        if row is None and not roles:
            return None
        if row is None:
            # Not the name that the issuer shows: people may change that, to somebody else's.
            name = "u-" + hashlib.sha256(f"{claims.issuer} {claims.subject}".encode()).hexdigest()[:12]
            add_identity(
                connection, name, roles, None, BY_ISSUER, now, kind=kind, issuer=claims.issuer, subject=claims.subject
            )
            self._note_word(connection, "identity:register", name, kind, roles)
            return name
        if set(row.roles) != set(roles):
            connection.execute(update(identities).where(mine).values(roles=roles))
            end_tokens(connection, row.name, now)
            self._note_word(connection, "identity:change", row.name, row.kind, roles)
        return str(row.name) if roles else None

    def _note_word(self, connection: Connection, action: str, name: str, kind: str, roles: list[str]) -> None:
        about = Resource(type="Identity", name=name, person=kind == "person")
        self._core.append(connection, ITSELF, action, about, "success", "outside-issuer", roles=",".join(roles))

    def _for_refresh(self, token: str, audience: str, source: str, peer: Peer | None) -> dict[str, Any]:
        refused = AuthenticationError("the session is over", "log in again: cloister login")
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        now = self._core.clock()
        with self._core.database.transaction() as connection:
            connection.execute(delete(refresh_tokens).where(refresh_tokens.c.expires < now))
            row = connection.execute(select(refresh_tokens).where(refresh_tokens.c.digest == digest)).one_or_none()
            if row is not None and not row.used:
                connection.execute(update(refresh_tokens).where(refresh_tokens.c.digest == digest).values(used=True))
                answer = self._issue(connection, row.name, audience, source, peer, rule="refresh", family=row.family)
                answer["refresh_token"] = self._refresh_token(connection, row.name, row.family, row.expires)
                return answer
            if row is not None and row.used:
                # Somebody has a copy of it: who of the two is the thief cannot be told, so both are out.
                end_tokens(connection, row.name, now)
                self._note_end(connection, row.name, source, "all-tokens", "reused-refresh-token")
        raise refused

    def _issue(
        self, connection: Connection, name: str, audience: str, source: str, peer: Peer | None, *, rule: str,
        key: str | None = None, family: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        now = self._core.clock()
        row = connection.execute(select(identities).where(identities.c.name == name)).one()
        if row.disabled or (key is not None and row.public_key != key):
            raise _UNKNOWN
        roles, until = roles_now(connection, row, now)
        lifetime_s = max(1, int(min(until - now, tokens.MAX_LIFETIME_S)))
        key_id, private = self._signing_key(connection)
        # A replica knows nothing of the caller's connection to the authority.
        thumbprint = peer.thumbprint if peer and audience == tokens.AUTHORITY_AUDIENCE else None
        token = tokens.issue(
            private, issuer=self.issuer, subject=name, audience=audience, roles=roles, lifetime_s=lifetime_s, now=now,
            key_id=key_id, kind=row.kind, epoch=row.epoch, thumbprint=thumbprint,
            token_id=f"{family or secrets.token_hex(8)}.{secrets.token_hex(8)}",
        )  # fmt: skip
        caller = Caller(name=name, roles=frozenset(roles), kind=row.kind, source=source)
        self._core.append(connection, caller, "token:issue", Resource(type="Audience", name=audience), "success", rule)
        return {"access_token": token, "token_type": "Bearer", "expires_in": lifetime_s}

    def _refresh_token(self, connection: Connection, name: str, family: str, expires: float | None = None) -> str:
        token = secrets.token_urlsafe(32)
        connection.execute(
            insert(refresh_tokens).values(
                digest=hashlib.sha256(token.encode()).hexdigest(), family=family, name=name,
                used=False, expires=expires or self._core.clock() + REFRESH_LIFETIME_S,
            )
        )  # fmt: skip
        return token

    def _note_failure(self, source: str, reason: str, grant_type: str) -> None:
        second = int(self._core.clock())
        with self._lock:
            count = self._failures[0] + 1 if self._failures[1] == second else 1
            self._failures = (count, second)
        if count <= FAILURES_RECORDED_PER_S:
            stranger = Caller(name=STRANGER, roles=frozenset(), kind="unknown", source=source)
            grant = grant_type if grant_type.isascii() else ""
            self._core.record(stranger, "token:issue", PLATFORM, "denied", "", error=reason, grant=grant[-40:])

    # ---- taking ----

    def authenticate(self, authorization: str | None, source: str, peer: Peer | None = None) -> Caller:
        """The caller behind an `Authorization: Bearer …` header.

        Raises:
            AuthenticationError: no token, not a good one, or one that was revoked.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AuthenticationError("this needs an access token", "log in: cloister login NAME")
        now = self._core.clock()
        with self._core.database.reading() as connection:
            self._verifier.trust(self.public_keys(connection))
            claims = self._verifier.verify(token, now)
            ended = exists().where(revocations.c.token_id.in_(claims.token_ids)).label("ended")
            lent = exists().where(elevations.c.name == identities.c.name, elevations.c.expires > now).label("lent")
            asked = select(identities, ended, lent).where(identities.c.name == claims.subject)
            row = connection.execute(asked).one_or_none()
            if row is None or row.ended or row.disabled or (row.epoch, row.kind) != (claims.epoch, claims.kind):
                raise AuthenticationError("this access has changed or ended", "get a new token: cloister login NAME")
            roles = roles_now(connection, row, now)[0] if row.lent else row.roles
            lent_roles = frozenset(roles) - frozenset(row.roles)
            node = node_of(connection, peer, now) if peer else None
        if claims.thumbprint is not None and (peer is None or peer.thumbprint != claims.thumbprint):
            raise AuthenticationError("this token belongs to another connection", "ask for a token over mutual TLS")
        return Caller(
            name=row.name, roles=frozenset(roles), kind=row.kind, source=source, node=node, session=claims.token_id,
            lent=lent_roles,
        )  # fmt: skip

    # ---- ending ----

    def revoke(self, token: str, source: str) -> None:
        """End a token (RFC 7009): whoever has it may end it. One that is not good is as ended as can be."""
        now = self._core.clock()
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        with self._core.database.transaction() as connection:
            row = connection.execute(select(refresh_tokens).where(refresh_tokens.c.digest == digest)).one_or_none()
            if row is not None:
                connection.execute(delete(refresh_tokens).where(refresh_tokens.c.family == row.family))
                end_tokens(connection, row.name, now, row.family)  # the access tokens of the session too
                self._note_end(connection, row.name, source, "refresh-token")
                return
            claims = None
            for audience in AUDIENCES:
                try:
                    claims = tokens.verify(
                        token, self.public_keys(connection), issuer=self.issuer, audience=audience, now=now
                    )
                except AuthenticationError:
                    continue
            if claims and self._alive(connection, claims):
                end_tokens(connection, claims.subject, now, claims.token_id)
                self._note_end(connection, claims.subject, source, "access-token")

    @staticmethod
    def _alive(connection: Connection, claims: tokens.Claims) -> bool:
        """Whether the token has not ended before its time: if it has, there is nothing to do and to record."""
        epoch = connection.execute(select(identities.c.epoch).where(identities.c.name == claims.subject))
        dead = connection.execute(select(revocations.c.sequence).where(revocations.c.token_id == claims.token_id))
        return epoch.scalar_one_or_none() == claims.epoch and dead.first() is None

    def _note_end(self, connection: Connection, name: str, source: str, what: str, rule: str = "holder") -> None:
        row = connection.execute(select(identities).where(identities.c.name == name)).one()
        caller = Caller(name=name, roles=frozenset(), kind=row.kind, source=source)
        self._core.append(connection, caller, "token:revoke", PLATFORM, "success", rule, what=what)

    # ---- keys ----

    def public_keys(self, connection: Connection) -> dict[str, bytes]:
        """The keys whose tokens may still be alive, by key id, PEM."""
        alive = token_keys.c.retired.is_(None) | (token_keys.c.retired > self._core.clock() - tokens.MAX_LIFETIME_S)
        rows = connection.execute(select(token_keys.c.key_id, token_keys.c.public_key).where(alive))
        return {row.key_id: row.public_key.encode() for row in rows}

    def published_keys(self) -> dict[str, bytes]:
        with self._core.database.reading() as connection:
            return self.public_keys(connection)

    def jwks(self) -> dict[str, Any]:
        """RFC 7517, of what signs access tokens."""
        return {
            "keys": [
                {**OKPKey.import_key(pem).as_dict(private=False), "kid": key_id, "use": "sig", "alg": tokens.ALGORITHM}
                for key_id, pem in self.published_keys().items()
            ]
        }

    def rotate_keys(self, caller: Caller, *, compromised: bool) -> dict[str, Any]:
        """Sign with a new key from now on. The old one's tokens live out their time, or die now if `compromised`."""
        with self._core.reading(caller, "token-key:rotate") as asked:
            asked.allow(PLATFORM)
        private = keys.private_to_pem(keys.generate_ed25519())
        key_id, public, secret = _describe(private)
        with self._core.outside(caller, "token-key:rotate", PLATFORM, key=key_id[:16]):
            self._core.keys.store_secret(secret, private)
        now = self._core.clock()
        with self._core.action(caller, "token-key:rotate", key=key_id[:16], compromised=compromised) as act:
            act.allow(PLATFORM)
            act.connection.execute(update(token_keys).where(token_keys.c.retired.is_(None)).values(retired=now))
            if compromised:
                act.connection.execute(update(token_keys).values(retired=0.0))
            self._insert_key(act.connection, key_id, public, secret)
        return {"key_id": key_id}

    def _first_key(self) -> None:
        with self._core.database.transaction() as connection:
            if connection.execute(select(token_keys.c.key_id).limit(1)).first() is None:
                private = keys.private_to_pem(keys.generate_ed25519())
                key_id, public, secret = _describe(private)
                self._core.keys.store_secret(secret, private)
                self._insert_key(connection, key_id, public, secret)

    def _insert_key(self, connection: Connection, key_id: str, public: bytes, secret: str) -> None:
        connection.execute(
            insert(token_keys).values(
                key_id=key_id, public_key=public.decode(), secret=secret, created=self._core.clock(), retired=None
            )
        )

    def _signing_key(self, connection: Connection) -> tuple[str, bytes]:
        row = connection.execute(select(token_keys).where(token_keys.c.retired.is_(None))).one()
        return row.key_id, self._core.keys.secret(row.secret)


def roles_now(connection: Connection, row: Any, now: float) -> tuple[list[str], float]:
    """The roles of an identity with those it has for a while, and until when (Unix seconds) that is so."""
    mine = (elevations.c.name == row.name) & (elevations.c.expires > now)
    lent = connection.execute(select(elevations).where(mine)).all()
    return sorted({*row.roles, *(each.role for each in lent)}), min(
        (each.expires for each in lent), default=float("inf")
    )


def _describe(private: bytes) -> tuple[str, bytes, str]:
    public = keys.public_to_pem(keys.ed25519_from_pem(private).public_key())
    key_id = keys.key_id(public)
    return key_id, public, f"tokens-{key_id[:16]}"
