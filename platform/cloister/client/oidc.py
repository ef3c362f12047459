"""Logging in at an OpenID Connect issuer, from a person's machine or as a service.

Guarantees: no password is ever seen here. In a browser: authorization code with PKCE S256, a fresh state and nonce, the
answer taken on 127.0.0.1 alone, once, and only with our state (RFC 8252, RFC 7636, RFC 9207). Without one: the device
flow (RFC 8628), at the pace that the issuer asks for. A service signs an assertion with its own key (RFC 7523 section
2.2). Tokens are asked for one audience (`resource`, RFC 8707); an ID token that comes with them has been checked. What
an issuer sends is shown to a terminal only if it is printable. Tokens are in no error and in no `repr`.

Does not guarantee: that the access token is for our audience. Whoever takes it checks that (`signing.foreign`).
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import time
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from joserfc import jwk, jwt

from cloister.client.issuer import IssuerClient, Metadata, check_url
from cloister.client.loopback import Loopback
from cloister.errors import AuthenticationError, InputError, IntegrityError, UnavailableError
from cloister.signing import foreign
from cloister.signing.tokens import CLIENT_ASSERTION

DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"  # RFC 8628 section 3.4
DEFAULT_INTERVAL_S = 5  # RFC 8628 section 3.2
SLOW_DOWN_S = 5  # RFC 8628 section 3.5
MAX_INTERVAL_S = 60
MAX_WAIT_S = 1800
BROWSER_WAIT_S = 300
ASSERTION_LIFETIME_S = 60
ID_TOKEN_MAX_AGE_S = 600
_VISIBLE = re.compile(r"[\x20-\x7e]{1,64}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,16384}")  # RFC 6750 section 2.1
_REASONS = {  # RFC 6749 sections 4.1.2.1 and 5.2, RFC 8628 section 3.5, RFC 8707 section 2
    "access_denied": "the login was refused",
    "expired_token": "the login was not finished in time",
    "invalid_grant": "the issuer does not accept this login: it is over, or belongs to another client",
    "invalid_client": "the issuer does not know this client, or not with this key",
    "unauthorized_client": "the issuer does not let this client log in in this way",
    "unsupported_grant_type": "the issuer does not offer this way of logging in",
    "invalid_scope": "the issuer does not give this scope to this client",
    "invalid_target": "the issuer does not give out tokens for this resource",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """What a login gave. `expires_in` is in seconds; `subject` is from the checked ID token, if there was one."""

    access_token: str = field(repr=False)
    expires_in: int | None
    subject: str | None
    id_token: str | None = field(repr=False)
    refresh_token: str | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePrompt:
    """What a person must do: open the address, compare or type the code, within `expires_in` seconds."""

    verification_uri: str
    verification_uri_complete: str | None
    user_code: str
    expires_in: int


def device_login(
    issuer_url: str,
    client_id: str,
    *,
    show: Callable[[DevicePrompt], object],
    resource: str | None = None,
    scope: str = "openid",
    ca: Path | None = None,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> TokenSet:
    """Log in with a browser on any other device.

    1. codes for this device (RFC 8628 section 3.1); 2. the person is shown one of them; 3. ask until they have decided,
    no faster than told, and slower when told (section 3.5); 4. the tokens.

    Raises:
        AuthenticationError: refused, too late, or the ID token is not good.
        UnavailableError: the issuer is not there or has no device flow.
        IntegrityError: what it says is malformed.
    """
    with IssuerClient(issuer_url, ca=ca) as issuer:
        metadata = issuer.metadata()
        start = _offered(metadata.device_authorization_endpoint, "device flow")
        token_endpoint = _offered(metadata.token_endpoint, "tokens")
        common = _without_none(client_id=client_id, resource=resource)
        agreed, codes = issuer.post(start, common | {"scope": scope})  # 1
        if not agreed:
            _refuse(codes)
        device_code, prompt = _prompt(codes)
        interval = float(_seconds(codes, "interval", DEFAULT_INTERVAL_S, MAX_INTERVAL_S))
        give_up = clock() + prompt.expires_in
        show(prompt)  # 2
        while clock() < give_up:  # 3
            sleep(interval)
            form = common | {"grant_type": DEVICE_CODE, "device_code": device_code}
            agreed, answer = issuer.post(token_endpoint, form)
            if agreed:
                return _token_set(issuer, metadata, answer, client_id=client_id, scope=scope, nonce=None)  # 4
            if answer.get("error") == "slow_down":
                interval = min(interval + SLOW_DOWN_S, MAX_INTERVAL_S)
            elif answer.get("error") != "authorization_pending":
                _refuse(answer)
        _refuse({"error": "expired_token"})


def browser_login(
    issuer_url: str,
    client_id: str,
    *,
    resource: str | None = None,
    scope: str = "openid",
    ca: Path | None = None,
    open_browser: Callable[[str], object] = webbrowser.open,
    timeout_s: float = BROWSER_WAIT_S,
) -> TokenSet:
    """Log in with the browser of this machine. `open_browser` gets the address and must return at once.

    1. a verifier, a state and a nonce that nobody else knows; 2. the browser goes to the issuer; 3. its answer comes to
    our own port, with our state and from this issuer; 4. the code and the verifier for the tokens (RFC 7636 section
    4.5); 5. the ID token has our nonce.

    Raises:
        AuthenticationError: refused, too late, another issuer's answer, or the ID token is not good.
        UnavailableError: the issuer is not there, does not do PKCE S256, or no port can be had.
        IntegrityError: what it says is malformed.
    """
    with IssuerClient(issuer_url, ca=ca) as issuer:
        metadata = issuer.metadata()
        authorize = _offered(metadata.authorization_endpoint, "login page")
        token_endpoint = _offered(metadata.token_endpoint, "tokens")
        if "S256" not in metadata.challenge_methods:
            raise UnavailableError("the issuer does not offer PKCE with S256", "use the device flow")
        verifier, state, nonce = (secrets.token_urlsafe(32) for _ in range(3))  # 1
        common = _without_none(client_id=client_id, resource=resource)
        with Loopback(state) as listener:
            common["redirect_uri"] = listener.redirect_uri
            query = common | {
                "response_type": "code",
                "scope": scope,
                "state": state,
                "nonce": nonce,
                "code_challenge": _s256(verifier),
                "code_challenge_method": "S256",
            }
            open_browser(f"{authorize}{'&' if '?' in authorize else '?'}{urlencode(query)}")  # 2
            answer = listener.wait(timeout_s)  # 3
        if answer is None:
            _refuse({"error": "expired_token"})
        if (metadata.names_itself or "iss" in answer) and answer.get("iss") != metadata.issuer:
            raise AuthenticationError("the answer is from another issuer", "log in again")
        if "code" not in answer:
            _refuse(answer)
        form = common | {"grant_type": "authorization_code", "code": answer["code"], "code_verifier": verifier}
        agreed, tokens = issuer.post(token_endpoint, form)  # 4
        if not agreed:
            _refuse(tokens)
        return _token_set(issuer, metadata, tokens, client_id=client_id, scope=scope, nonce=nonce)  # 5


def client_credentials(
    issuer_url: str,
    client_id: str,
    *,
    private_key_pem: bytes,
    resource: str | None = None,
    scope: str | None = None,
    ca: Path | None = None,
    key_id: str | None = None,
    audience: str | None = None,
) -> TokenSet:
    """A service's own token, by `private_key_jwt` (RFC 7523 section 2.2, OpenID Connect Core section 9).

    The assertion is made for the issuer itself, so that no other issuer can use it (RFC 7523bis); `audience` is for
    issuers that still ask for the address of their token endpoint there.

    Raises:
        AuthenticationError: the issuer does not accept the service or its key.
        InputError: the key is not one that this issuer takes.
        UnavailableError, IntegrityError: as `device_login`.
    """
    with IssuerClient(issuer_url, ca=ca) as issuer:
        metadata = issuer.metadata()
        token_endpoint = _offered(metadata.token_endpoint, "tokens")
        assertion = _assertion(private_key_pem, client_id, audience or metadata.issuer, metadata, key_id)
        form = _without_none(
            grant_type="client_credentials",
            client_id=client_id,
            client_assertion_type=CLIENT_ASSERTION,
            client_assertion=assertion,
            resource=resource,
            scope=scope,
        )
        agreed, answer = issuer.post(token_endpoint, form)
        if not agreed:
            _refuse(answer)
        return _token_set(issuer, metadata, answer, client_id=client_id, scope="", nonce=None)


def _prompt(codes: Mapping[str, Any]) -> tuple[str, DevicePrompt]:
    malformed = IntegrityError("the issuer's device codes are malformed", "ask whoever runs the issuer")
    device_code, user_code, complete = codes.get("device_code"), codes.get("user_code"), None
    if not isinstance(device_code, str) or not isinstance(user_code, str) or not _VISIBLE.fullmatch(user_code):
        raise malformed
    try:
        address = check_url(codes.get("verification_uri"), "issuer's `verification_uri`")
        if codes.get("verification_uri_complete") is not None:
            complete = check_url(codes["verification_uri_complete"], "issuer's `verification_uri_complete`")
    except InputError:
        raise malformed from None
    return device_code, DevicePrompt(
        verification_uri=address,
        verification_uri_complete=complete,
        user_code=user_code,
        expires_in=_seconds(codes, "expires_in", MAX_WAIT_S, MAX_WAIT_S),
    )


def _token_set(
    issuer: IssuerClient,
    metadata: Metadata,
    answer: Mapping[str, Any],
    *,
    client_id: str,
    scope: str,
    nonce: str | None,
) -> TokenSet:
    access, identity, refresh = (answer.get(name) for name in ("access_token", "id_token", "refresh_token"))
    if not isinstance(access, str) or not _TOKEN.fullmatch(access):
        raise IntegrityError("the issuer sent no access token", "ask whoever runs the issuer")
    if str(answer.get("token_type")).lower() != "bearer":
        raise IntegrityError("the issuer sent a token of another type than Bearer", "ask whoever runs the issuer")
    subject = None
    if "openid" in scope.split():
        if not isinstance(identity, str):
            raise IntegrityError("the issuer sent no ID token", "ask whoever runs the issuer")
        subject = foreign.verify_id_token(
            identity,
            issuer.keys(metadata),
            issuer=metadata.issuer,
            client_id=client_id,
            nonce=nonce,
            algorithms=tuple(foreign.ALGORITHMS),
            now=time.time(),
            max_age_s=ID_TOKEN_MAX_AGE_S,
        ).subject
    return TokenSet(
        access_token=access,
        expires_in=_seconds(answer, "expires_in", None, 2**31),
        subject=subject,
        id_token=identity if subject is not None else None,
        refresh_token=refresh if isinstance(refresh, str) and _TOKEN.fullmatch(refresh) else None,
    )


def _assertion(private_key_pem: bytes, client_id: str, audience: str, metadata: Metadata, key_id: str | None) -> str:
    try:
        private = load_pem_private_key(private_key_pem, None)
    except (ValueError, TypeError):
        raise InputError("this is not an unencrypted PKCS #8 PEM key", "use an Ed25519, EC or RSA key") from None
    key: jwk.OKPKey | jwk.ECKey | jwk.RSAKey
    if isinstance(private, Ed25519PrivateKey):
        key = jwk.OKPKey.import_key(private_key_pem)
    elif isinstance(private, EllipticCurvePrivateKey):
        key = jwk.ECKey.import_key(private_key_pem)
    elif isinstance(private, RSAPrivateKey) and private.key_size in foreign.RSA_BITS:
        key = jwk.RSAKey.import_key(private_key_pem)
    else:
        raise InputError("services sign with Ed25519, P-256, P-384 or RSA of 2048 bits", "make such a key")
    kind = (key.key_type, None if isinstance(key, jwk.RSAKey) else key.curve_name)
    fitting = [name for name, needs in foreign.ALGORITHMS.items() if needs == kind]
    # An issuer that names none may take any: its answer will tell.
    offered = [name for name in fitting if name in metadata.assertion_algorithms or not metadata.assertion_algorithms]
    if not offered:
        raise InputError("the issuer does not take assertions that are signed with this kind of key", "use another")
    now = int(time.time())
    claims = {
        "iss": client_id,
        "sub": client_id,
        "aud": audience,
        "iat": now,
        "exp": now + ASSERTION_LIFETIME_S,
        "jti": secrets.token_urlsafe(16),
    }
    header = _without_none(alg=offered[0], kid=key_id)
    return jwt.encode(header, claims, key, registry=foreign.Registry(algorithms=[offered[0]]))


def _offered(endpoint: str | None, what: str) -> str:
    if endpoint is None:
        raise UnavailableError(f"the issuer offers no {what}", "choose another way of logging in")
    return endpoint


def _seconds(answer: Mapping[str, Any], name: str, default: Any, most: int) -> Any:
    value = answer.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise IntegrityError(f"the issuer's `{name}` is not a number of seconds", "ask whoever runs the issuer")
    return min(value, most)


def _s256(verifier: str) -> str:
    """RFC 7636 section 4.2."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def _without_none(**fields: str | None) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value is not None}


def _refuse(answer: Mapping[str, Any]) -> NoReturn:
    code = answer.get("error")
    reason = _REASONS.get(code, "the issuer refused the login") if isinstance(code, str) else "the issuer refused"
    raise AuthenticationError(reason, "log in again, and check `client_id` and the issuer's settings for it")
