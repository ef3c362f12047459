"""Access tokens (RFC 9068) and client assertions (RFC 7523): made and checked by one module.

Guarantees: `verify` returns claims only for a token that the pinned issuer signed with a pinned Ed25519 key, for
this audience, in the form that `issue` writes, not expired and never valid for longer than `MAX_LIFETIME_S`. The
algorithm is fixed (`Ed25519`, RFC 9864), so neither `none` nor a MAC keyed with the public key can pass. The header
may hold `alg`, `typ` and `kid` and nothing else, so a token can neither bring its own key (`jwk`, `jku`, `x5u`,
`x5c`) nor change its own rules (`crit`, `b64`). The two kinds of token differ in `typ` (RFC 8725 section 3.11), so
one never passes for the other. No error contains a part of a token.

Not guaranteed: that a token is still wanted. Who accepts one also asks whether its `epoch` is still its subject's and
whether its `jti` was revoked (`Claims`); a token with a `thumbprint` holds only over the mutual TLS connection of that
certificate (RFC 8705 section 3). An assertion is good once only if the caller remembers the id that
`verify_assertion` returns for `ASSERTION_LIFETIME_S + CLOCK_SKEW_S` seconds and refuses it the second time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from cloister.errors import AuthenticationError, InputError, TokenExpiredError

ALGORITHM = "Ed25519"  # RFC 9864 section 2.2: the fully specified name; "EdDSA" is deprecated and names two curves
ACCESS_TOKEN_TYPE = "at+jwt"  # noqa: S105  (RFC 9068 section 2.1: a media type, not a password)
ASSERTION_TYPE = "client-authentication+jwt"  # draft-ietf-oauth-rfc7523bis section 4
INFERENCE_AUDIENCE = "urn:cloister:inference"
AUTHORITY_AUDIENCE = "urn:cloister:authority"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"  # RFC 7523 section 8.1
CLIENT_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"  # RFC 7523 section 8.2
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105  (RFC 8693 section 2.1: a name)
JWT_TYPE = "urn:ietf:params:oauth:token-type:jwt"  # RFC 8693 section 3
MAX_LIFETIME_S = 600
ASSERTION_LIFETIME_S = 60
CLOCK_SKEW_S = 5  # how far the issuer's clock may run ahead of ours; expiry gets no such grace
MAX_TOKEN_CHARS = 4096
MAX_CACHED_TOKENS = 4096

_HINT = "log in again, and send the access token in full as `Authorization: Bearer …`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """Who a verified token speaks for. Times are Unix seconds."""

    subject: str
    roles: frozenset[str]
    client_id: str
    kind: str
    epoch: int
    """Grows with each change of the subject's access: a token of an earlier epoch is dead."""
    thumbprint: str | None
    """Base64url SHA-256 of the client certificate that the token is bound to (RFC 8705 section 3.1)."""
    issued_at: int
    expires_at: int
    token_id: str

    @property
    def token_ids(self) -> tuple[str, str]:
        """What it may have been revoked by: its own id, and its session's, which is the part before the dot."""
        return self.token_id, self.token_id.partition(".")[0]


def issue(
    private_key_pem: bytes,
    *,
    issuer: str,
    subject: str,
    audience: str,
    roles: Iterable[str],
    lifetime_s: int,
    now: float,
    key_id: str,
    kind: str = "person",
    epoch: int = 0,
    thumbprint: str | None = None,
    client_id: str | None = None,
    scope: str | None = None,
    token_id: str | None = None,
) -> str:
    """An RFC 9068 access token. `client_id` defaults to the subject, `token_id` to 128 random bits.

    Raises:
        InputError: a lifetime outside 1 to `MAX_LIFETIME_S`, an empty name, or a key that is not Ed25519.
    """
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise InputError(f"an access token lives 1 to {MAX_LIFETIME_S} seconds", "ask for a shorter lifetime")
    issued_at = int(now)
    claims: dict[str, Any] = {
        "iss": issuer,
        "sub": subject,
        "aud": audience,
        "client_id": client_id or subject,
        "roles": sorted(roles),
        "kind": kind,
        "epoch": epoch,
        "iat": issued_at,
        "exp": issued_at + lifetime_s,
        "jti": token_id or secrets.token_urlsafe(16),
    }
    if scope is not None:
        claims["scope"] = scope
    if thumbprint is not None:
        claims["cnf"] = {"x5t#S256": thumbprint}
    return _sign(private_key_pem, {"typ": ACCESS_TOKEN_TYPE, "kid": key_id}, claims)


def verify(token: str, public_keys: Mapping[str, bytes], *, issuer: str, audience: str, now: float) -> Claims:
    """The claims of a good access token. `public_keys` maps key ids to SPKI PEM.

    1. shape and header (RFC 8725 sections 3.1, 3.10, 3.11); 2. key by `kid`, signature; 3. issuer and audience
    (RFC 9068 section 4); 4. times; 5. the remaining claims.

    Raises:
        TokenExpiredError: everything is right but the time.
        AuthenticationError: anything else.
    """
    header = _header(token)  # 1
    if header.keys() != {"alg", "typ", "kid"} or header["typ"] != ACCESS_TOKEN_TYPE:
        _refuse("this is not an access token of this system")
    public_pem = public_keys.get(header["kid"]) if isinstance(header["kid"], str) else None  # 2
    if public_pem is None:
        _refuse("the access token is signed with a key that is not trusted here")
    claims = _verified_claims(token, public_pem)
    _match(claims, {"iss": issuer, "aud": audience})  # 3
    issued_at, expires_at = _times(claims, MAX_LIFETIME_S, now)  # 4
    roles = claims.get("roles")  # 5
    if not isinstance(roles, list) or not all(isinstance(role, str) and role for role in roles):
        _refuse("the access token lists no roles")
    epoch = claims.get("epoch")
    if type(epoch) is not int or epoch < 0:
        _refuse("the access token has no usable `epoch`")
    return Claims(
        subject=_name(claims, "sub"),
        roles=frozenset(roles),
        kind=_name(claims, "kind"),
        epoch=epoch,
        thumbprint=_thumbprint(claims),
        client_id=_name(claims, "client_id"),
        issued_at=issued_at,
        expires_at=expires_at,
        token_id=_name(claims, "jti"),
    )


class TokenVerifier:
    """`verify` with its trust fixed and a bounded memory of good tokens, since a signature costs about 100 µs.

    Guarantees: an entry is keyed by the SHA-256 of the whole token and is dead from the second that its token
    expires; refusals are not remembered; at most `max_tokens` entries, the oldest leave first.
    """

    def __init__(
        self, public_keys: Mapping[str, bytes], *, issuer: str, audience: str, max_tokens: int = MAX_CACHED_TOKENS
    ) -> None:
        self._public_keys: Mapping[str, bytes] = dict(public_keys)
        self._issuer = issuer
        self._audience = audience
        self._max_tokens = max_tokens
        self._good: OrderedDict[bytes, Claims] = OrderedDict()
        self._lock = threading.Lock()

    def trust(self, public_keys: Mapping[str, bytes]) -> None:
        """Trust these keys from now on, and only these: what was verified with others is forgotten."""
        if dict(public_keys) == self._public_keys:
            return
        with self._lock:
            self._public_keys = dict(public_keys)
            self._good = OrderedDict()

    def verify(self, token: str, now: float) -> Claims:
        """As the function `verify`."""
        key = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        claims = self._good.get(key)
        if claims is not None:
            if now < claims.expires_at:
                return claims
            with self._lock:
                self._good.pop(key, None)
            _refuse_expired()
        trusted = self._public_keys
        claims = verify(token, trusted, issuer=self._issuer, audience=self._audience, now=now)
        with self._lock:
            if trusted is not self._public_keys:
                return claims  # the keys changed meanwhile: what was verified with the old ones is not remembered
            self._good[key] = claims
            while len(self._good) > self._max_tokens:
                self._good.popitem(last=False)
        return claims

    def __len__(self) -> int:
        return len(self._good)


def issue_assertion(private_key_pem: bytes, *, subject: str, audience: str, now: float) -> str:
    """A client assertion (RFC 7523 section 3): `subject` proves to `audience`, once, that it holds its key."""
    issued_at = int(now)
    claims = {
        "iss": subject,
        "sub": subject,
        "aud": audience,
        "iat": issued_at,
        "exp": issued_at + ASSERTION_LIFETIME_S,
        "jti": secrets.token_urlsafe(16),
    }
    return _sign(private_key_pem, {"typ": ASSERTION_TYPE}, claims)


def verify_assertion(token: str, public_pem: bytes, *, subject: str, audience: str, now: float) -> str:
    """The id (`jti`) of a good assertion; the caller must refuse an id that it has seen (RFC 7523 section 3, 7).

    Raises:
        TokenExpiredError: everything is right but the time.
        AuthenticationError: anything else.
    """
    header = _header(token)
    if header.keys() != {"alg", "typ"} or header["typ"] != ASSERTION_TYPE:
        _refuse("this is not a client assertion of this system")
    claims = _verified_claims(token, public_pem)
    _match(claims, {"iss": subject, "sub": subject, "aud": audience})
    _times(claims, ASSERTION_LIFETIME_S, now)
    return _name(claims, "jti")


def key_proof_audience(issuer: str, new_public_pem: bytes) -> str:
    """Whom an assertion is for, by which an old key agrees to this new one in its place."""
    return f"{issuer}#{hashlib.sha256(new_public_pem).hexdigest()}"


def unverified_subject(token: str) -> str:
    """Who an assertion *claims* to be from, for looking up the key to verify it with. Nothing is proven.

    Raises:
        AuthenticationError: this is not even shaped like a token.
    """
    _header(token)
    try:
        return _name(json.loads(jws.extract_compact(token.encode()).payload), "sub")
    except (JoseError, ValueError, AttributeError, RecursionError):
        _refuse("this is not a token")


def _sign(private_key_pem: bytes, header: dict[str, Any], claims: dict[str, Any]) -> str:
    if not all(claims[name] for name in ("iss", "sub", "aud", "jti")):
        raise InputError("a token needs an issuer, a subject, an audience and an id")
    try:
        key = load_pem_private_key(private_key_pem, None)
    except (ValueError, TypeError):
        raise InputError("this is not an unencrypted PKCS#8 PEM key", "use an Ed25519 key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("tokens are signed with Ed25519 keys only", "use an Ed25519 key")
    return jwt.encode(
        {"alg": ALGORITHM, **header}, claims, OKPKey.import_key(private_key_pem), [ALGORITHM], default_type=None
    )


@functools.lru_cache(maxsize=256)
def _public_key(public_pem: bytes) -> OKPKey:
    try:
        key = load_pem_public_key(public_pem)
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        _refuse("the key registered for this token is not an Ed25519 public key")
    return OKPKey.import_key(public_pem)


def _header(token: str) -> dict[str, Any]:
    if not isinstance(token, str) or not token.isascii() or not 0 < len(token) <= MAX_TOKEN_CHARS:
        _refuse("this is not a token")
    try:
        header = jws.extract_compact(token.encode("ascii")).headers()
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError):
        _refuse("this is not a token")
    if header.get("alg") != ALGORITHM:
        _refuse(f"tokens are signed with {ALGORITHM} only")
    return header


def _verified_claims(token: str, public_pem: bytes) -> dict[str, Any]:
    try:
        return jwt.decode(token, _public_key(public_pem), algorithms=[ALGORITHM]).claims
    except (JoseError, ValueError, RecursionError):
        _refuse("the signature of the token does not verify")


def _match(claims: dict[str, Any], expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        if claims.get(name) != value:  # a list of audiences is refused too: our tokens are for one audience each
            _refuse(f"the token's `{name}` is not the one that is accepted here")


def _times(claims: dict[str, Any], max_lifetime_s: int, now: float) -> tuple[int, int]:
    issued_at, expires_at, not_before = claims.get("iat"), claims.get("exp"), claims.get("nbf", claims.get("iat"))
    if not (type(issued_at) is int and type(expires_at) is int and type(not_before) is int):
        _refuse("the token does not say from when until when it is good")
    if not 0 < expires_at - issued_at <= max_lifetime_s:
        _refuse(f"the token is good for longer than {max_lifetime_s} seconds")
    if max(issued_at, not_before) > now + CLOCK_SKEW_S:
        _refuse("the token is not good yet")
    if now >= expires_at:
        _refuse_expired()
    return issued_at, expires_at


def _name(claims: dict[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        _refuse(f"the token has no usable `{name}`")
    return value


def _thumbprint(claims: dict[str, Any]) -> str | None:
    confirmation = claims.get("cnf")
    if confirmation is None:
        return None
    if not isinstance(confirmation, dict) or confirmation.keys() != {"x5t#S256"}:
        _refuse("the access token is bound to something that is not known here")
    return _name(confirmation, "x5t#S256")


def _refuse(message: str) -> NoReturn:
    raise AuthenticationError(message, _HINT) from None


def _refuse_expired() -> NoReturn:
    raise TokenExpiredError("the access token has expired", "get a new one: cloister login") from None
