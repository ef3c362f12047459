"""Tokens of other issuers (OpenID Connect, RFC 9068, Kubernetes): checked here, never made.

Guarantees: `verify` returns claims only for a compact JWS that a key in the issuer's own key set signed, with an
algorithm that was asked for and that fits this key, from exactly this issuer, for this audience, good now and no older
than the caller allows. No MAC and no `none` exist here, so a public key can never pass as a secret. The header names a
key and brings neither key nor rule (`jwk`, `jku`, `x5u`, `x5c`, `crit`, `b64`). A key set that publishes a secret is
refused; keys that are weak, meant for something else or named twice are not there. ID tokens and tokens that are
bound to their holder's key (`cnf`) do not pass for bearer tokens. No error contains a part of a token.

Does not guarantee: that a token was not seen before, nor that its issuer has not revoked it. Ages are short instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeGuard

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from cloister.errors import AuthenticationError, InputError, IntegrityError, TokenExpiredError
from cloister.signing.dsse import strict_json

# RFC 7518 section 3.1, RFC 8037, RFC 9864: the key type and curve that each algorithm needs.
ALGORITHMS: Mapping[str, tuple[str, str | None]] = {
    "RS256": ("RSA", None),
    "PS256": ("RSA", None),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "Ed25519": ("OKP", "Ed25519"),
    "EdDSA": ("OKP", "Ed25519"),  # the older name, which many issuers still write
}
ACCESS_TOKEN = "at+jwt"  # noqa: S105  (RFC 9068 section 2.1: a media type, not a password)
PLAIN_JWT = "jwt"
UNTYPED = ""  # what Kubernetes writes
CLOCK_SKEW_S = 5
MAX_TOKEN_CHARS = 8192
MAX_KEYS = 100
MAX_TEXT_CHARS = 256
MAX_AUDIENCES = 16
RSA_BITS = range(2048, 8193)  # NIST SP 800-131A; more would let an issuer make us work
# RFC 7515 section 4.1; thumbprints only name a key, and Microsoft's and ADFS's tokens carry them.
_HEADER_NAMES = frozenset({"alg", "typ", "kid", "x5t", "x5t#S256"})
_SECRET_NAMES = frozenset({"d", "k", "p", "q", "dp", "dq", "qi", "oth"})  # RFC 7518 sections 6.2.2, 6.3.2, 6.4.1
# OpenID Connect Core sections 2 and 3.3.2.11, Back-Channel Logout section 2.4: what only other kinds of token say.
_OTHER_KINDS = frozenset({"nonce", "at_hash", "c_hash", "s_hash", "events"})
_PUBLIC_NAMES = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_KEY_CLASSES: Mapping[str, type[RSAKey] | type[ECKey] | type[OKPKey]] = {"RSA": RSAKey, "EC": ECKey, "OKP": OKPKey}
# CVE-2017-15361 ("ROCA"): such moduli lie, modulo each of these primes, in the subgroup that 65537 generates. For the
# other primes up to 167 that says nothing; a sound modulus passes all of these with a chance below 2**-27.
_ROCA = {
    p: {pow(65537, i, p) for i in range(p)}
    for p in (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
}
_HINT = "log in again at the issuer, and check that the token is meant for this authority"


class Registry(jws.JWSRegistry):
    """joserfc's registry with our algorithms and nothing else."""

    algorithms = {  # noqa: RUF012  (overrides an attribute that the base class declares in this way)
        name: jws.JWSRegistry.algorithms[name.replace("EdDSA", "Ed25519")] for name in ALGORITHMS
    }


@dataclass(frozen=True, slots=True)
class _Key:
    key: RSAKey | ECKey | OKPKey
    algorithms: frozenset[str]


@dataclass(frozen=True, slots=True)
class KeySet:
    """The public keys of one issuer that may sign tokens, by `kid`."""

    _keys: Mapping[str, _Key]

    @classmethod
    def parse(cls, document: bytes) -> KeySet:
        """Read a JWK Set (RFC 7517 section 5). Keys that cannot be used here are left out.

        Raises:
            InputError: not a JWK Set, too many keys, a private or symmetric key in it, or no usable key.
        """
        try:
            listed = strict_json(document)["keys"]
        except (IntegrityError, KeyError, TypeError):
            listed = None
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise InputError("this is not a JWK Set", "expected an object with a list `keys` (RFC 7517 section 5)")
        if len(listed) > MAX_KEYS:
            raise InputError(f"the JWK Set has more than {MAX_KEYS} keys", "check the address that it came from")
        if any(each.get("kty") == "oct" or _SECRET_NAMES & each.keys() for each in listed):
            raise InputError("the JWK Set publishes a secret key: whoever reads it can forge tokens", "tell its issuer")
        found: dict[str, _Key | None] = {}
        for each in listed:
            name, key = each.get("kid"), _usable(each)
            if key is not None and _is_text(name):
                found[name] = None if name in found else key
        keys = {name: key for name, key in found.items() if key is not None}
        if not keys:
            raise InputError("the JWK Set has no key that may sign tokens", "RSA of 2048 bits, P-256, P-384 or Ed25519")
        return cls(keys)

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    def get(self, key_id: str) -> _Key | None:
        return self._keys.get(key_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignClaims:
    """Who a verified token speaks for. Times are Unix seconds; `expires_at` is no later than the age allows."""

    issuer: str
    subject: str
    audience: tuple[str, ...]
    client_id: str | None
    issued_at: int
    expires_at: int
    token_id: str | None
    claims: Mapping[str, Any] = field(repr=False, compare=False)

    def values(self, claim: str) -> frozenset[str]:
        """The strings of a claim such as `groups`; none if it is absent or of another shape."""
        value = self.claims.get(claim, ())
        listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        return frozenset(each for each in listed if isinstance(each, str))


def unverified(token: str) -> tuple[str, str]:
    """The issuer and the key id that a token *claims*, for looking up the keys to verify it with. Nothing is proven.

    Raises:
        AuthenticationError: this is not even shaped like a token.
    """
    header = _header(token)
    claims = _claims(jws.extract_compact(token.encode()).payload)
    issuer, key_id = claims.get("iss"), header.get("kid")
    if not isinstance(issuer, str) or not isinstance(key_id, str):
        _refuse("the token names no issuer or no key")
    return issuer, key_id


def verify(
    token: str,
    keys: KeySet,
    *,
    issuer: str,
    audience: str,
    algorithms: Collection[str],
    now: float,
    max_age_s: int,
    types: Collection[str] = (ACCESS_TOKEN,),
    clients: Collection[str] = (),
) -> ForeignClaims:
    """The claims of a good access token for `audience`. `types` are the `typ` values that pass, in lower case.

    1. header, key and signature (RFC 8725 sections 3.1, 3.2, 3.10); 2. the kind of token (RFC 9068 section 4); 3.
    issuer and audience; a token for several audiences must have been made for one of `clients` (`azp`, OpenID Connect
    Core section 2), since any of these audiences could pass it on; 4. times; 5. the subject.

    Raises:
        TokenExpiredError: everything is right but the time.
        AuthenticationError: anything else.
        InputError: `algorithms` is empty or holds one that is not in `ALGORITHMS`.
    """
    header, payload = verify_signature(token, keys, algorithms)  # 1
    claims = _claims(payload)
    if _type(header) not in types or _OTHER_KINDS & claims.keys():  # 2
        _refuse("this is not an access token")
    if "cnf" in claims:
        _refuse("the token is bound to a key of its holder, which cannot be checked here")
    audiences = _audiences(claims, audience)  # 3
    if len(audiences) > 1 and not any(client == claims.get("azp") for client in clients):
        _refuse("the token is meant for several audiences, and not for a client that is known here")
    return _checked(claims, audiences, issuer, now, max_age_s)


def verify_id_token(
    token: str,
    keys: KeySet,
    *,
    issuer: str,
    client_id: str,
    nonce: str | None,
    algorithms: Collection[str],
    now: float,
    max_age_s: int,
) -> ForeignClaims:
    """The claims of an ID token that was made for `client_id` in this login (OpenID Connect Core section 3.1.3.7).

    Raises: as `verify`.
    """
    header, payload = verify_signature(token, keys, algorithms)
    claims = _claims(payload)
    if _type(header) not in (PLAIN_JWT, UNTYPED):
        _refuse("this is not an ID token")
    audiences = _audiences(claims, client_id)
    if (len(audiences) > 1 or "azp" in claims) and claims.get("azp") != client_id:
        _refuse("the ID token was made for another client")
    if nonce is not None and claims.get("nonce") != nonce:
        _refuse("the ID token belongs to another login")
    return _checked(claims, audiences, issuer, now, max_age_s)


def verify_signature(token: str, keys: KeySet, algorithms: Collection[str]) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a compact JWS, once a key of `keys` is known to have signed it.

    Raises: as `verify`.
    """
    if not algorithms or not set(algorithms) <= ALGORITHMS.keys():
        raise InputError("name the algorithms that a token may be signed with", f"from {', '.join(ALGORITHMS)}")
    header = _header(token)
    if not header.keys() <= _HEADER_NAMES:
        _refuse("the token's header brings a key or a rule of its own")
    algorithm, key_id = header["alg"], header.get("kid")
    if algorithm not in algorithms:
        _refuse("the token is signed with an algorithm that is not accepted from its issuer")
    key = keys.get(key_id) if isinstance(key_id, str) else None
    if key is None:
        _refuse("the token is signed with a key that its issuer does not publish")
    if algorithm not in key.algorithms:
        _refuse("the token's algorithm is not the one that its key is for")
    try:
        signed = jws.deserialize_compact(token, key.key, registry=Registry(algorithms=[algorithm]))
    except (JoseError, ValueError, TypeError):
        _refuse("the signature of the token does not verify")
    return header, signed.payload


def _usable(jwk: Mapping[str, Any]) -> _Key | None:
    """The key, if it may verify signatures and is sound (RFC 7517 section 4, RFC 8725 section 3.2)."""
    kind, operations = jwk.get("kty"), jwk.get("key_ops", ["verify"])
    if not isinstance(kind, str) or kind not in _PUBLIC_NAMES or jwk.get("use", "sig") != "sig":
        return None
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    fitting = {name for name, needs in ALGORITHMS.items() if needs == (kind, jwk.get("crv"))}
    meant = jwk.get("alg")
    if meant is not None:
        fitting = {name for name in fitting if name == meant or (kind == "OKP" and meant in ALGORITHMS)}
    public = {name: value for name in _PUBLIC_NAMES[kind] if isinstance(value := jwk.get(name), str)}
    if not fitting or len(public) < len(_PUBLIC_NAMES[kind]):
        return None
    try:
        key = _KEY_CLASSES[kind].import_key({"kty": kind, **public})
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key, RSAKey):
        numbers = key.public_key.public_numbers()
        # FIPS 186-5, appendix A.1.1. That `e` is odd has been checked.
        if key.public_key.key_size not in RSA_BITS or not 2**16 < numbers.e < 2**256:
            return None
        if all(numbers.n % prime in weak for prime, weak in _ROCA.items()):
            return None
    return _Key(key, frozenset(fitting))


def _header(token: str) -> dict[str, Any]:
    if not isinstance(token, str) or not token.isascii() or not 0 < len(token) <= MAX_TOKEN_CHARS:
        _refuse("this is not a token")
    try:
        header = jws.extract_compact(token.encode()).headers()
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError):
        _refuse("this is not a token")
    if not isinstance(header, dict) or not isinstance(header.get("alg"), str):
        _refuse("this is not a token")
    return header


def _claims(payload: bytes) -> dict[str, Any]:
    try:
        claims = strict_json(payload)
    except IntegrityError:
        claims = None
    if not isinstance(claims, dict):
        _refuse("the token holds no claims")
    return claims


def _type(header: Mapping[str, Any]) -> str:
    kind = header.get("typ", UNTYPED)
    return kind.lower().removeprefix("application/") if isinstance(kind, str) else "?"  # RFC 7515 section 4.1.9


def _audiences(claims: Mapping[str, Any], ours: str) -> tuple[str, ...]:
    value = claims.get("aud")
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > MAX_AUDIENCES or not all(map(_is_text, listed)):
        _refuse("the token names no usable audience")
    if ours not in listed:
        _refuse("the token is meant for somebody else")
    return tuple(listed)


def _checked(
    claims: dict[str, Any], audiences: tuple[str, ...], issuer: str, now: float, max_age_s: int
) -> ForeignClaims:
    if claims.get("iss") != issuer:
        _refuse("the token is from another issuer")
    subject, token_id = claims.get("sub"), claims.get("jti")
    if not _is_text(subject):
        _refuse("the token has no usable subject")
    client = claims.get("client_id", claims.get("azp"))
    issued_at, expires_at = _time(claims, "iat"), _time(claims, "exp")
    if max(issued_at, _time(claims, "nbf") if "nbf" in claims else issued_at) > now + CLOCK_SKEW_S:
        _refuse("the token is not good yet")
    expires_at = min(expires_at, issued_at + max_age_s)
    if now >= expires_at + CLOCK_SKEW_S:
        raise TokenExpiredError("the issuer's token has expired or is too old", "log in again at the issuer")
    return ForeignClaims(
        issuer=issuer,
        subject=subject,
        audience=audiences,
        client_id=client if _is_text(client) else None,
        issued_at=int(issued_at),
        expires_at=int(expires_at),
        token_id=token_id if _is_text(token_id) else None,
        claims=claims,
    )


def _time(claims: Mapping[str, Any], name: str) -> float:
    """A NumericDate (RFC 7519 section 2), which may have a fraction."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:  # nor is a NaN
        _refuse("the token does not say from when until when it is good")
    return value


def _is_text(value: object) -> TypeGuard[str]:
    """A name that can stand in a log line: no control characters, bounded."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT_CHARS and value.isprintable()


def _refuse(message: str) -> NoReturn:
    raise AuthenticationError(message, _HINT) from None
