"""A connection to Vault or OpenBao that fails closed: TLS to a CA that is known, a login, a deadline for each use.

Guarantees: nothing is sent but over TLS that was verified, or to loopback; a use ends within its stated time, logging
in again and trying again included; a token is renewed while it lives, and replaced where the login can give another;
what the server says is never repeated, since its texts quote paths and values.
Not guaranteed: that a server that is slow within its time does the same work twice no harm; callers see to that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import hvac
import requests
from hvac import exceptions
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError

from cloister.errors import InputError, KeyServiceError
from cloister.stores.keys.settings import DEFAULT_TIMEOUT_S, AppRoleLogin, TokenLogin, VaultSettings

MAX_ANSWER_BYTES = 64 << 20
CHUNK_BYTES = 1 << 16
CONNECTIONS = 16
# Vault's names, and OpenBao's, which go first. https://developer.hashicorp.com/vault/docs/commands
PREFIXES = ("BAO_", "VAULT_")
VARIABLES = (
    "ADDR", "TOKEN", "NAMESPACE", "CACERT", "CAPATH", "CLIENT_CERT", "CLIENT_KEY", "TLS_SERVER_NAME", "CLIENT_TIMEOUT",
    "SKIP_VERIFY",
)  # fmt: skip
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0}
_ADVICE = "check the key service and the network to it; nothing was changed"

Answer = TypeVar("Answer")


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `environment` that say where and how a key service is reached."""
    names = [prefix + name for name in VARIABLES for prefix in PREFIXES]
    return {name: environment[name] for name in names if environment.get(name)}


class Connection:
    """Logged in, and kept so. `call` is the one way to use it, from any thread."""

    def __init__(self, settings: VaultSettings, environment: Mapping[str, str]) -> None:
        """Prepare, and log in.

        Raises:
            InputError: an address, a file or a variable that cannot be used.
            KeyServiceError: it cannot be reached, or refuses the login.
        """
        self._settings = settings
        self._environment = environment
        self.timeout_s = settings.timeout_s or _seconds(self._variable("CLIENT_TIMEOUT")) or DEFAULT_TIMEOUT_S
        address = (settings.address or self._variable("ADDR") or "").rstrip("/")
        if not address:
            raise InputError("no key service is named", "set authority.keys.address in config.yaml, or VAULT_ADDR")
        if not is_safe(address):
            raise InputError("the key service is not at an https:// address", "keys do not travel without TLS")
        if self._variable("SKIP_VERIFY").lower() in ("1", "t", "true"):
            raise InputError("VAULT_SKIP_VERIFY is set", "unset it, and name the CA: authority.keys.ca_certificate")
        self._session = _Session()
        # On the session: what hvac is given beside one, it ignores.
        self._session.verify, self._session.cert = self._trusted(), self._certificate()
        self._session.mount("https://", _Adapter(self._variable("TLS_SERVER_NAME") or None))
        self._client = hvac.Client(
            url=address,
            token="",
            namespace=settings.namespace or self._variable("NAMESPACE") or None,
            timeout=self.timeout_s,
            session=self._session,
            strict_http=True,  # GET with ?list=true: proxies do not know the method LIST
        )
        self._login_lock = threading.Lock()
        self._expires, self._renewable = math.inf, False
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None
        with self._deadline(), self._told():
            self._login()

    def call(self, use: Callable[[hvac.Client], Answer]) -> Answer:
        """What `use` returns, within the stated time.

        Raises:
            KeyServiceError: it cannot be had, or refuses the authority.
            hvac's InvalidRequest, InvalidPath: it did not like the request itself, which the caller understands.
        """
        with self._deadline(), self._told():
            for attempt in (1, 2):
                token = self._client.token
                try:
                    return use(self._client)
                except requests.exceptions.ConnectionError as error:
                    # A connection that the server closed meanwhile. All that we ask for may be asked for twice.
                    if attempt == 2 or isinstance(error, requests.exceptions.SSLError | requests.exceptions.Timeout):
                        raise
                except (exceptions.Forbidden, exceptions.Unauthorized):
                    if attempt == 2 or not self._login_instead_of(token):
                        raise
        raise AssertionError  # pragma: no cover

    def close(self) -> None:
        """End the token if it was ours alone, and the thread that renews it."""
        self._closed.set()
        if self._settings.login.kind != "token":
            with contextlib.suppress(Exception), self._deadline():
                self._client.auth.token.revoke_self()
        self._client.token = ""
        self._session.close()

    # ---- the login ----

    def _login_instead_of(self, token: str) -> bool:
        """A new token where `token` is refused. False if there is no other."""
        with self._login_lock:
            if self._client.token != token:
                return True  # another thread was first
            self._login()
            return bool(self._client.token != token)

    def _login(self) -> None:
        login = self._settings.login
        try:
            if isinstance(login, TokenLogin):
                self._client.token = self._given_token(login.token_file)
                self._note(self._client.auth.token.lookup_self()["data"], "ttl")
            else:
                proof = {"role_id": login.role_id, "secret_id": _content(login.secret_id_file)} if isinstance(
                    login, AppRoleLogin
                ) else {"role": login.role, "jwt": _content(login.jwt_file)}  # fmt: skip
                address = f"/v1/auth/{login.mount or login.kind}/login"
                answer = self._client.login(address, use_token=True, json=proof)
                self._note(answer["auth"], "lease_duration")
        except (exceptions.InvalidRequest, exceptions.InvalidPath):  # so it says that a credential is not good
            raise exceptions.Forbidden from None
        if self._keeper is None and math.isfinite(self._expires):
            self._keeper = threading.Thread(target=self._keep, daemon=True)
            self._keeper.start()

    def _given_token(self, file: Path | None) -> str:
        if file is None and self._variable("TOKEN"):
            return self._variable("TOKEN")
        usual = Path(self._environment.get("HOME", "/nonexistent")) / ".vault-token"
        if file is None and not usual.exists():
            raise InputError(
                "there is no token for the key service", "set authority.keys.login in config.yaml, or VAULT_TOKEN"
            )
        return _content(file or usual)

    def _note(self, token: Mapping[str, Any], lifetime: str) -> None:
        seconds = float(token[lifetime])
        self._expires = time.monotonic() + seconds if seconds else math.inf
        self._renewable = bool(token.get("renewable"))

    def _keep(self) -> None:
        """Renew after two thirds of each lifetime; without success, more and more often until the end, then rarely."""
        while not self._closed.wait(max(0.2, (self._expires - time.monotonic()) * 2 / 3)):
            late = time.monotonic() >= self._expires
            # The next use says what is wrong, if anything is.
            with contextlib.suppress(Exception), self._deadline(), self._login_lock:
                if self._renewable and not late:
                    self._note(self._client.auth.token.renew_self()["auth"], "lease_duration")
                else:
                    self._login()
            if time.monotonic() >= self._expires and self._closed.wait(self.timeout_s):
                return

    # ---- how it is reached ----

    def _variable(self, name: str) -> str:
        return next((found for prefix in PREFIXES if (found := self._environment.get(prefix + name))), "")

    def _trusted(self) -> bool | str:
        named = self._settings.ca_certificate or self._variable("CACERT") or self._variable("CAPATH")
        if named and not Path(named).exists():
            raise InputError(
                "the CA of the key service cannot be read", "name a PEM file: authority.keys.ca_certificate"
            )
        return str(named) if named else True

    def _certificate(self) -> tuple[str, str] | None:
        names = self._variable("CLIENT_CERT"), self._variable("CLIENT_KEY")
        if any(name and not Path(name).exists() for name in names):
            raise InputError("VAULT_CLIENT_CERT or VAULT_CLIENT_KEY cannot be read", "name PEM files, or unset both")
        return names if all(names) else None

    @contextlib.contextmanager
    def _deadline(self) -> Any:
        before = getattr(_time, "ends", None)
        _time.ends = before or time.monotonic() + self.timeout_s
        try:
            yield
        finally:
            _time.ends = before

    @contextlib.contextmanager
    def _told(self) -> Any:
        """Their errors as ours, without their texts."""
        try:
            yield
        except (exceptions.InvalidRequest, exceptions.InvalidPath):
            raise
        except (exceptions.Forbidden, exceptions.Unauthorized):
            raise KeyServiceError(
                "the key service refuses the authority", "check its token or role and the policy that it has there"
            ) from None
        except exceptions.VaultDown as error:
            sealed = any("sealed" in each for each in error.errors or ())
            said = "is sealed" if sealed else "is not ready"
            advice = "unseal it: vault operator unseal" if sealed else _ADVICE
            raise KeyServiceError(f"the key service {said}", advice) from None
        except exceptions.VaultError as error:
            raise KeyServiceError(f"the key service failed ({type(error).__name__})", _ADVICE) from None
        except requests.exceptions.SSLError:
            raise KeyServiceError(
                "the key service's certificate is not of the CA that is trusted, or names another host",
                "name its CA: authority.keys.ca_certificate, or VAULT_CACERT",
            ) from None
        except requests.exceptions.Timeout:
            raise KeyServiceError(
                f"the key service did not answer within {self.timeout_s:g} s", "check its load, then try again"
            ) from None
        except requests.exceptions.RequestException:
            raise KeyServiceError("the key service cannot be reached", _ADVICE) from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise KeyServiceError(
                "what answered is not a key service that we understand", "check authority.keys.address and its mounts"
            ) from None


_time = threading.local()  # when the use that this thread is at must have ended


class _Session(requests.Session):
    """Takes nothing from the environment, sends nothing without TLS, and reads no longer than the use may last."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        if not is_safe(request.url or ""):  # a redirect to it, too
            raise requests.exceptions.InvalidSchema
        options |= {"timeout": _remaining(), "stream": True}
        response = super().send(request, **options)
        body = bytearray()
        try:
            while part := response.raw.read1(
                CHUNK_BYTES, decode_content=True
            ):  # what is there, without waiting for all
                body += part
                _remaining()
                if len(body) > MAX_ANSWER_BYTES:
                    raise requests.exceptions.ContentDecodingError
            response._content, response._content_consumed = bytes(body), True
        except ReadTimeoutError:
            raise requests.exceptions.ReadTimeout from None
        except HTTPError:
            raise requests.exceptions.ConnectionError from None
        finally:
            response.close()
        return response


class _Adapter(HTTPAdapter):
    """Connections whose certificate must name `host`, if that is not the address's."""

    def __init__(self, host: str | None) -> None:
        self._host = host
        super().__init__(pool_maxsize=CONNECTIONS)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> Any:
        if self._host:
            options |= {"assert_hostname": self._host, "server_hostname": self._host}
        return super().init_poolmanager(*arguments, **options)


def is_safe(url: str) -> bool:
    """Whether keys may be sent there: over TLS, or to this machine (as to `vault server -dev`)."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return True
    try:
        return parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.scheme == "http" and parts.hostname == "localhost"


def _remaining() -> float:
    left = float(_time.ends) - time.monotonic()
    if left <= 0:
        raise requests.exceptions.Timeout
    return left


def _seconds(text: str) -> float | None:
    """`60`, `60s`, `500ms` or `1m`, as VAULT_CLIENT_TIMEOUT may be."""
    if not text:
        return None
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]+)?)(ms|s|m|)", text)
    if not found or not float(found[1]):
        raise InputError("VAULT_CLIENT_TIMEOUT is no time", "write seconds, such as 5 or 5s")
    return float(found[1]) * _UNITS[found[2]]


def _content(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"the credential for the key service cannot be read: {file}", "check authority.keys.login in config.yaml"
        ) from None


def environment() -> Mapping[str, str]:
    return os.environ
