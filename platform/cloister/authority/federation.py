"""The issuers whose word the authority takes: their settings, their keys, and the check of their tokens.

Guarantees: a token is checked against the one configured issuer that it names, and never against another's keys; keys
come from that issuer over TLS (or from a file, for a cluster whose issuer cannot be reached) and are used for at most
`MAX_KEYS_AGE_S`; a key id that is not known makes them be read again, at most once in `MIN_FETCH_INTERVAL_S`, so that
neither a rotated key nor a flood of invented ones is a problem; an issuer that cannot be reached means no, not yes.

Does not guarantee: that a subject may do anything. Roles come from the settings or from who is registered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cloister.client.issuer import IssuerClient, check_url
from cloister.errors import AuthenticationError, CloisterError, InputError, UnavailableError
from cloister.signing import foreign
from cloister.signing.foreign import ForeignClaims, KeySet

MAX_KEYS_AGE_S = 600
MIN_FETCH_INTERVAL_S = 10
FIRST_KEYS_WAIT_S = 2.0
MAX_KEY_FILE_BYTES = 256 * 1024

Algorithm = Literal["RS256", "PS256", "ES256", "ES384", "Ed25519", "EdDSA"]
Text = Annotated[str, Field(min_length=1, max_length=256)]


class RoleMapping(BaseModel):
    """Which roles the values of one claim give: `{claim: groups, map: {ml-reviewers: [reviewer]}}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    claim: Text
    map: Annotated[dict[Text, Annotated[list[Text], Field(min_length=1, max_length=20)]], Field(max_length=1000)]


class Issuer(BaseModel):
    """One issuer. `client_id` is what people's command line logs in as; `types` are the `typ` values that pass.

    Access tokens say `at+jwt` (RFC 9068). An issuer that writes `JWT` needs `types: [at+jwt, jwt]`; Kubernetes writes
    none, which is `""`, and is the default for workloads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: Annotated[str, Field(max_length=2048)]
    audience: Text
    kind: Literal["people", "workloads"] = "people"
    client_id: Text | None = None
    scope: Text = "openid"
    ca_file: Path | None = None
    jwks_file: Path | None = None
    algorithms: Annotated[list[Algorithm], Field(min_length=1)] = list(get_args(Algorithm))
    types: list[Literal["at+jwt", "jwt", ""]] | None = None
    max_age_s: Annotated[int, Field(ge=60, le=86_400)] = 3600
    roles: RoleMapping | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.audience == self.client_id:
            raise ValueError("audience must not be client_id: the issuer's ID tokens would pass for access tokens")
        if self.jwks_file is not None and self.ca_file is not None:
            raise ValueError("with jwks_file nothing is fetched, so ca_file has no meaning")
        return self

    @property
    def accepted_types(self) -> tuple[str, ...]:
        if self.types is not None:
            return tuple(self.types)
        if self.kind == "people":
            return (foreign.ACCESS_TOKEN,)
        return (foreign.ACCESS_TOKEN, foreign.PLAIN_JWT, foreign.UNTYPED)


class Federation:
    """All configured issuers. Thread-safe; `verify` waits for the network only when keys are stale or unknown."""

    def __init__(self, issuers: Iterable[Issuer], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; nothing is fetched yet.

        Raises:
            InputError: an issuer twice, not an HTTPS URL, or a CA file that is none.
        """
        self._issuers: dict[str, tuple[Issuer, _Keys]] = {}
        for each in issuers:
            if each.issuer in self._issuers:
                raise InputError(f"the issuer {each.issuer} is configured twice", "keep one of them")
            self._issuers[each.issuer] = (each, _Keys(each, clock))

    @property
    def issuers(self) -> tuple[Issuer, ...]:
        return tuple(settings for settings, _ in self._issuers.values())

    def close(self) -> None:
        for _, keys in self._issuers.values():
            keys.close()

    def verify(self, token: str, now: float) -> ForeignClaims:
        """The claims of a token that a configured issuer made for this authority. `now` is in Unix seconds.

        Raises:
            TokenExpiredError: everything is right but the time.
            AuthenticationError: anything else is wrong with it, or nobody configured its issuer.
            UnavailableError: the issuer's keys cannot be had.
        """
        name, key_id = foreign.unverified(token)
        if name not in self._issuers:
            raise AuthenticationError(
                "the token is from an issuer that is not configured here", "log in at one that is"
            )
        settings, keys = self._issuers[name]
        return foreign.verify(
            token,
            keys.get(key_id),
            issuer=settings.issuer,
            audience=settings.audience,
            algorithms=settings.algorithms,
            now=now,
            max_age_s=settings.max_age_s,
            types=settings.accepted_types,
            clients=() if settings.client_id is None else (settings.client_id,),
        )

    def settings(self, claims: ForeignClaims) -> Issuer:
        """The settings of the issuer that verified claims are from."""
        return self._issuers[claims.issuer][0]

    def roles(self, claims: ForeignClaims) -> frozenset[str]:
        """The roles that the issuer's claim gives. Without a mapping, none."""
        mapping = self.settings(claims).roles
        if mapping is None:
            return frozenset()
        return frozenset(role for value in claims.values(mapping.claim) for role in mapping.map.get(value, ()))


class _Keys:
    """One issuer's keys, read when needed."""

    def __init__(self, settings: Issuer, clock: Callable[[], float]) -> None:
        check_url(settings.issuer, "issuer")
        self._settings = settings
        self._clock = clock
        self._client = None if settings.jwks_file else IssuerClient(settings.issuer, ca=settings.ca_file)
        self._lock = threading.Lock()
        self._current: tuple[KeySet, float] | None = None  # one reference, so that reading it needs no lock
        self._tried_at: float | None = None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def get(self, key_id: str) -> KeySet:
        """The keys, read again if they are old or lack `key_id`.

        Raises:
            UnavailableError: there are none that are fresh enough.
        """
        keys = self._fresh()
        if keys is not None and key_id in keys:
            return keys
        # Nobody waits long for somebody else's fetch: a slow issuer would take all the threads there are.
        if not self._lock.acquire(timeout=FIRST_KEYS_WAIT_S if keys is None else 0):
            return self._or_unavailable(keys)
        try:
            keys = self._fresh()
            if (keys is not None and key_id in keys) or not self._may_fetch():
                return self._or_unavailable(keys)
            asked_at = self._clock()
            try:
                keys = self._read()
            except (CloisterError, OSError):
                raise self._unavailable() from None
            finally:
                self._tried_at = self._clock()
            self._current = (keys, asked_at)
            return keys
        finally:
            self._lock.release()

    def _or_unavailable(self, keys: KeySet | None) -> KeySet:
        if keys is None:
            raise self._unavailable()
        return keys

    def _fresh(self) -> KeySet | None:
        current = self._current
        return current[0] if current is not None and self._clock() - current[1] < MAX_KEYS_AGE_S else None

    def _may_fetch(self) -> bool:
        return self._tried_at is None or self._clock() - self._tried_at >= MIN_FETCH_INTERVAL_S

    def _read(self) -> KeySet:
        if self._client is None:
            assert self._settings.jwks_file is not None  # noqa: S101  (one of the two is there)
            with self._settings.jwks_file.open("rb") as file:
                return KeySet.parse(file.read(MAX_KEY_FILE_BYTES))
        return self._client.keys(self._client.metadata())

    def _unavailable(self) -> UnavailableError:
        return UnavailableError(
            f"the keys of the issuer {self._settings.issuer} cannot be had, so its tokens cannot be checked",
            "check that it can be reached from the authority, then try again in ten seconds",
        )
