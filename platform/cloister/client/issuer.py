"""What an OpenID Connect issuer publishes about itself, and the form posts that it answers.

Guarantees: HTTPS only, the certificate checked, against the given CA alone if there is one; no redirect is followed and
no proxy is taken from the environment; an answer is bounded in size and time and is never decompressed; metadata are
believed only when they name exactly the issuer that was asked (OpenID Connect Discovery, section 4.3).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cloister.errors import InputError, IntegrityError, UnavailableError
from cloister.signing.dsse import strict_json
from cloister.signing.foreign import KeySet

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 256 * 1024
MAX_URL_CHARS = 2048
_WELL_KNOWN = "/.well-known/openid-configuration"


def check_url(url: object, what: str) -> str:
    """`url`, if it is an HTTPS URL without credentials or fragment and fits in a line.

    Raises:
        InputError: it is not.
    """
    try:
        parsed = httpx.URL(url) if isinstance(url, str) and url.isprintable() else None
    except httpx.InvalidURL:
        parsed = None
    if parsed is None or parsed.scheme != "https" or not parsed.host or parsed.userinfo or parsed.fragment:
        raise InputError(f"the {what} is not an HTTPS URL", "write https://HOST/PATH without a name or a fragment")
    if len(str(url)) > MAX_URL_CHARS:
        raise InputError(f"the {what} is longer than {MAX_URL_CHARS} characters", "shorten it")
    return str(url)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """The part of an issuer's metadata (RFC 8414 section 2) that Cloister uses. Absent endpoints are None."""

    issuer: str
    jwks_uri: str
    token_endpoint: str | None
    authorization_endpoint: str | None
    device_authorization_endpoint: str | None
    names_itself: bool  # RFC 9207: every authorization response carries `iss`
    challenge_methods: frozenset[str]
    assertion_algorithms: frozenset[str]


class IssuerClient:
    """A connection to one issuer. Thread-safe: it keeps no state but httpx's pool of connections."""

    def __init__(self, url: str, *, ca: Path | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            InputError: not an HTTPS URL, or `ca` holds no certificate.
        """
        self.url = check_url(url, "issuer")
        if httpx.URL(url).query:
            raise InputError("an issuer's URL has no query", "write it as the issuer itself does")
        try:
            context = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"{ca} is not a usable CA certificate", "give a PEM file") from error
        self._host = httpx.URL(url).host
        self._timeout_s = timeout_s
        self._http = httpx.Client(verify=context, timeout=timeout_s, trust_env=False, follow_redirects=False)

    def __enter__(self) -> IssuerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def metadata(self) -> Metadata:
        """What the issuer says about itself.

        Raises:
            UnavailableError: it does not answer as it should.
            IntegrityError: the answer is not about this issuer, or is malformed.
        """
        status, body = self._exchange("GET", self.url.rstrip("/") + _WELL_KNOWN)
        fields = self._fields(body) if status == 200 else None
        if fields is None:
            raise UnavailableError(f"{self._host} publishes no OpenID Connect metadata", "check the issuer's URL")
        if fields.get("issuer") != self.url:
            raise IntegrityError("the metadata are those of another issuer", "write the issuer exactly as it does")

        def endpoint(name: str) -> str | None:
            return None if fields.get(name) is None else check_url(fields[name], f"issuer's `{name}`")

        def listed(name: str) -> frozenset[str]:
            value = fields.get(name)
            return (
                frozenset(each for each in value if isinstance(each, str)) if isinstance(value, list) else frozenset()
            )

        try:
            return Metadata(
                issuer=self.url,
                jwks_uri=check_url(fields.get("jwks_uri"), "issuer's `jwks_uri`"),
                token_endpoint=endpoint("token_endpoint"),
                authorization_endpoint=endpoint("authorization_endpoint"),
                device_authorization_endpoint=endpoint("device_authorization_endpoint"),
                names_itself=fields.get("authorization_response_iss_parameter_supported") is True,
                challenge_methods=listed("code_challenge_methods_supported"),
                assertion_algorithms=listed("token_endpoint_auth_signing_alg_values_supported"),
            )
        except InputError as error:
            raise IntegrityError(error.message, "ask whoever runs the issuer") from None

    def keys(self, metadata: Metadata) -> KeySet:
        """The issuer's keys.

        Raises:
            UnavailableError: they cannot be had.
            IntegrityError: they are not a key set that can be used.
        """
        status, body = self._exchange("GET", metadata.jwks_uri)
        if status != 200:
            raise UnavailableError(f"{self._host} does not give out its keys", "ask whoever runs the issuer")
        try:
            return KeySet.parse(body)
        except InputError as error:
            raise IntegrityError(error.message, error.hint) from None

    def post(self, endpoint: str, form: Mapping[str, str]) -> tuple[bool, dict[str, Any]]:
        """Whether the issuer agreed, and what it said.

        Raises:
            UnavailableError: no answer, or none that OAuth knows.
        """
        status, body = self._exchange("POST", endpoint, data=dict(form))
        fields = self._fields(body)
        if fields is None or status not in (200, 400, 401, 403):
            raise UnavailableError(f"{self._host} answered {status}, and not as OAuth does", "try again later")
        return status == 200, fields

    def _exchange(self, method: str, url: str, **options: Any) -> tuple[int, bytes]:
        deadline = time.monotonic() + self._timeout_s
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        body = bytearray()
        try:
            with self._http.stream(method, url, headers=headers, **options) as answer:
                for chunk in answer.iter_raw():  # as sent: what comes packed all the same is not JSON
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                        raise UnavailableError(f"the answer of {self._host} is too long or too slow", "try again later")
                return answer.status_code, bytes(body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UnavailableError(
                f"the issuer at {self._host} cannot be reached ({type(error).__name__})",
                "check its address, its certificate and the network",
            ) from None

    @staticmethod
    def _fields(body: bytes) -> dict[str, Any] | None:
        try:
            fields = strict_json(body)
        except IntegrityError:
            return None
        return fields if isinstance(fields, dict) else None
