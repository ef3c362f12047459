"""People and services log in at a real provider; then everything that an attacker could change on the way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import httpx
import pytest
from joserfc.jwk import ECKey

from cloister.authority.federation import Federation, Issuer, RoleMapping
from cloister.client import loopback as loopback_module
from cloister.client import oidc
from cloister.client.loopback import Loopback
from cloister.errors import AuthenticationError, InputError, IntegrityError, UnavailableError
from oidc.provider import AUDIENCE, AUDIENCE_RS256, CLIENT_ID, OTHER_AUDIENCE, Person, Provider
from oidc.scripted import ScriptedIssuer
from waiting import PATIENCE_S

REVIEWERS = RoleMapping(claim="groups", map={"ml-reviewers": ["reviewer", "auditor"], "pipelines": ["engineer"]})


@pytest.fixture
def federation(provider: Provider) -> Iterator[Federation]:
    made = Federation(
        [Issuer(issuer=provider.issuer, audience=AUDIENCE, client_id=CLIENT_ID, ca_file=provider.ca, roles=REVIEWERS)]
    )
    yield made
    made.close()


class Browser:
    """Opens what it is given, as a browser does: meanwhile. `change` may turn the address into another one."""

    def __init__(self, person: Person, change: Callable[[str], str] = lambda url: url) -> None:
        self._person = person
        self._change = change
        self.page = ""
        self._thread = threading.Thread()

    def __call__(self, url: str) -> None:
        def visit() -> None:
            self.page = self._person.visit(self._change(url))

        self._thread = threading.Thread(target=visit)
        self._thread.start()

    def done(self) -> str:
        self._thread.join(PATIENCE_S)
        return self.page


def changed(**fields: str) -> Callable[[str], str]:
    """An address whose query says something else."""

    def change(url: str) -> str:
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()} | fields
        return urlunsplit(parts._replace(query=urlencode(query)))

    return change


def browser_login(provider: Provider, browser: Callable[[str], object], **options: object) -> oidc.TokenSet:
    arguments = {"resource": AUDIENCE, "ca": provider.ca, "timeout_s": PATIENCE_S} | options
    return oidc.browser_login(provider.issuer, CLIENT_ID, open_browser=browser, **arguments)  # type: ignore[arg-type]


def device_login(
    provider: Provider, person: Person | None, *, decides_at: int = 1, **options: object
) -> tuple[oidc.TokenSet, list[float], list[oidc.DevicePrompt]]:
    """A device login in which the person goes to the page during the nth wait, and nobody really waits."""
    waits: list[float] = []
    shown: list[oidc.DevicePrompt] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if person is not None and len(waits) == decides_at:
            person.visit(shown[0].verification_uri_complete or "")

    arguments = {"resource": AUDIENCE, "ca": provider.ca, "sleep": sleep, "show": shown.append} | options
    return oidc.device_login(provider.issuer, CLIENT_ID, **arguments), waits, shown  # type: ignore[arg-type]


# The device flow.


def test_device_login_at_the_pace_that_the_issuer_asks_for(provider: Provider, federation: Federation) -> None:
    tokens, waits, shown = device_login(provider, provider.person("rita"), decides_at=3)
    # The first answer is "pending", the second "slow_down", since nobody really waited.
    assert waits == [5, 5, 10]
    assert shown[0].verification_uri == f"{provider.issuer}/device"
    assert shown[0].user_code in (shown[0].verification_uri_complete or "")
    assert shown[0].expires_in == 600
    assert tokens.subject == "rita"
    assert tokens.access_token not in repr(tokens)
    claims = federation.verify(tokens.access_token, time.time())
    assert (claims.subject, claims.client_id, claims.audience) == ("rita", CLIENT_ID, (AUDIENCE,))
    assert federation.roles(claims) == {"reviewer", "auditor"}


def test_person_who_refuses_a_device(provider: Provider) -> None:
    with pytest.raises(AuthenticationError, match="refused"):
        device_login(provider, provider.person("rita", agrees=False))


def test_person_who_does_nothing(provider: Provider) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(AuthenticationError, match="in time"):
        device_login(provider, None, sleep=sleep, clock=lambda: now[0])
    assert 600 <= now[0] <= 660


def test_device_code_that_the_issuer_let_expire(provider: Provider, provider_modules: Path, tmp_path: Path) -> None:
    with (
        Provider(provider_modules, tmp_path / "p", device_code_s=1) as brief,
        pytest.raises(AuthenticationError, match=r"over|in time"),
    ):
        device_login(brief, None, sleep=lambda _: time.sleep(0.6), clock=lambda: 0.0)


# The browser.


def test_browser_login_with_an_rsa_key_of_the_issuer(provider: Provider) -> None:
    browser = Browser(provider.person("rita"))
    tokens = browser_login(provider, browser, resource=AUDIENCE_RS256)
    assert "close this page" in browser.done()
    assert tokens.subject == "rita"
    federation = Federation(
        [Issuer(issuer=provider.issuer, audience=AUDIENCE_RS256, algorithms=["RS256"], ca_file=provider.ca)]
    )
    assert federation.verify(tokens.access_token, time.time()).subject == "rita"
    with pytest.raises(AuthenticationError):  # the ID token, where the access token is wanted
        federation.verify(tokens.id_token or "", time.time())


def test_person_who_cancels(provider: Provider) -> None:
    with pytest.raises(AuthenticationError, match="refused"):
        browser_login(provider, Browser(provider.person("rita", agrees=False)))


def test_code_that_was_made_for_another_verifier(provider: Provider) -> None:
    """RFC 7636 section 1: an attacker's code, or ours with an attacker's challenge."""
    with pytest.raises(AuthenticationError, match="over"):
        browser_login(provider, Browser(provider.person("rita"), changed(code_challenge="A" * 43)))


def test_answer_with_another_state_is_not_taken(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = Browser(provider.person("rita"), changed(state="guessed"))
    late, take = [0.0], Loopback._take

    def take_and_be_late(listener: Loopback, target: str, host: str | None) -> bool:
        late[0] = 2 * PATIENCE_S  # the time is over with the first answer, however long that took to come
        return take(listener, target, host)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr(Loopback, "_take", take_and_be_late)
    monkeypatch.setattr(loopback_module, "time", clock)
    with pytest.raises(AuthenticationError, match="in time"):
        browser_login(provider, browser)
    assert "not the answer" in browser.done()


def test_id_token_of_another_login(provider: Provider) -> None:
    with pytest.raises(AuthenticationError, match="another login"):
        browser_login(provider, Browser(provider.person("rita"), changed(nonce="replayed")))


@pytest.mark.parametrize("answer", [{"iss": "https://evil.test"}, {}])
def test_answer_of_another_issuer(provider: Provider, answer: dict[str, str]) -> None:
    """RFC 9207: the attacker's issuer sends the browser back with a code of its own."""

    def mixed_up(url: str) -> str:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        return asked["redirect_uri"] + "?" + urlencode({"code": "stolen", "state": asked["state"]} | answer)

    with pytest.raises(AuthenticationError, match="another issuer"):
        browser_login(provider, Browser(provider.person("rita"), mixed_up))


def test_strangers_at_the_port_change_nothing() -> None:
    with Loopback("right") as listener:
        good = {"state": "right", "code": "c"}
        seen = []

        def knock() -> None:
            with httpx.Client(trust_env=False, timeout=PATIENCE_S) as stranger:
                for url, query, host in (
                    (listener.redirect_uri, {"code": "evil"}, None),
                    (listener.redirect_uri, good | {"state": "wrong"}, None),
                    (listener.redirect_uri.replace("callback", "other"), good, None),
                    (listener.redirect_uri + "?state=right", good, None),
                    (listener.redirect_uri, good, "rebound.test"),
                    (listener.redirect_uri, good | {str(n): "x" for n in range(20)}, None),
                ):
                    headers = {"Host": host} if host else {}
                    address = url + ("&" if "?" in url else "?") + urlencode(query)
                    seen.append(stranger.get(address, headers=headers).status_code)
                seen.append(stranger.post(listener.redirect_uri, data=good).status_code)
                seen.append(stranger.get(listener.redirect_uri, params=good).status_code)

        thread = threading.Thread(target=knock)
        thread.start()
        assert listener.wait(PATIENCE_S) == good
        thread.join(PATIENCE_S)
        assert seen == [400, 400, 400, 400, 400, 400, 501, 200]
        port = listener.redirect_uri
    with pytest.raises(httpx.ConnectError):
        httpx.get(port, trust_env=False)


def test_port_is_on_loopback_alone() -> None:
    with Loopback("state") as listener:
        port = urlsplit(listener.redirect_uri).port
        socket.create_connection(("127.0.0.1", port), 1).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 1)


def test_resource_that_the_issuer_does_not_know(provider: Provider) -> None:
    with pytest.raises(AuthenticationError, match="resource"):
        device_login(provider, None, resource="urn:nobody")


def test_client_that_the_issuer_does_not_know(provider: Provider) -> None:
    with pytest.raises(AuthenticationError, match="client"):
        oidc.device_login(provider.issuer, "nobody", show=lambda _: None, ca=provider.ca)


def test_issuer_with_a_certificate_of_somebody_else(provider: Provider) -> None:
    with pytest.raises(UnavailableError):
        oidc.device_login(provider.issuer, CLIENT_ID, show=lambda _: None)


# Issuers that say what they should not.


def test_issuer_without_s256(scripted: ScriptedIssuer) -> None:
    """RFC 9700 section 2.1.1: better no login than one whose code anybody can redeem."""
    pages = {"authorization_endpoint": scripted.url + "/auth", "token_endpoint": scripted.url + "/token"}
    scripted.serve(scripted.key, **pages, code_challenge_methods_supported=["plain"])
    with pytest.raises(UnavailableError, match="S256"):
        oidc.browser_login(scripted.url, CLIENT_ID, ca=scripted.ca, open_browser=lambda _: pytest.fail("opened"))


def scripted_login(issuer: ScriptedIssuer, codes: dict[str, Any], answer: dict[str, Any]) -> oidc.TokenSet:
    start = {"device_code": "d", "user_code": "ABCD-EFGH", "verification_uri": issuer.url + "/device", "expires_in": 60}
    pages = {"device_authorization_endpoint": issuer.url + "/start", "token_endpoint": issuer.url + "/token"}
    issuer.serve(issuer.key, **pages)
    issuer.says("/start", **(start | codes))
    identity = issuer.token(aud=CLIENT_ID, typ="JWT")
    issuer.says("/token", **({"access_token": "a", "token_type": "Bearer", "id_token": identity} | answer))
    return oidc.device_login(issuer.url, CLIENT_ID, show=lambda _: None, ca=issuer.ca, sleep=lambda _: None)


def test_scripted_login_is_good_unless_changed(scripted: ScriptedIssuer) -> None:
    tokens = scripted_login(scripted, {}, {})
    assert (tokens.subject, tokens.access_token, tokens.expires_in) == ("rita", "a", None)


@pytest.mark.parametrize(
    "codes",
    [
        {"user_code": "\x1b[2JABCD"},
        {"user_code": "A" * 65},
        {"user_code": None},
        {"device_code": 5},
        {"verification_uri": "http://login.test"},
        {"verification_uri": "https://login.test/\u202egnp"},
        {"verification_uri_complete": "javascript:alert(1)"},
        {"expires_in": "soon"},
        {"expires_in": -5},
        {"interval": True},
    ],
    ids=str,
)
def test_codes_that_are_not_shown(scripted: ScriptedIssuer, codes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        scripted_login(scripted, codes, {})


@pytest.mark.parametrize(
    "answer",
    [
        {"access_token": None},
        {"access_token": "a\r\nX: y"},
        {"token_type": "DPoP"},
        {"token_type": None},
        {"id_token": None},
        {"expires_in": 0},
    ],
    ids=str,
)
def test_tokens_that_are_not_taken(scripted: ScriptedIssuer, answer: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        scripted_login(scripted, {}, answer)


def test_id_token_for_another_client(scripted: ScriptedIssuer) -> None:
    with pytest.raises(AuthenticationError):
        scripted_login(scripted, {}, {"id_token": scripted.token(aud="other", typ="JWT")})


# Services.


def service(provider: Provider, name: str, **options: object) -> oidc.TokenSet:
    arguments = {"private_key_pem": provider.services[name][0], "resource": AUDIENCE, "ca": provider.ca} | options
    return oidc.client_credentials(provider.issuer, name, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nightly-es256", "nightly-rs256", "nightly-eddsa"])
def test_service_with_its_own_key(provider: Provider, federation: Federation, name: str) -> None:
    tokens = service(provider, name)
    claims = federation.verify(tokens.access_token, time.time())
    assert (claims.subject, claims.client_id, tokens.subject) == (name, name, None)
    assert federation.roles(claims) == ({"engineer"} if name == "nightly-es256" else frozenset())


def test_service_at_an_issuer_that_wants_its_token_endpoint_named(provider: Provider) -> None:
    assert service(provider, "nightly-es256", audience=f"{provider.issuer}/token").access_token


def test_service_with_the_key_of_another(provider: Provider) -> None:
    stranger = ECKey.generate_key("P-256").as_pem(private=True)
    with pytest.raises(AuthenticationError, match="key"):
        service(provider, "nightly-es256", private_key_pem=stranger)


def test_assertion_that_was_made_for_another_issuer(provider: Provider) -> None:
    with pytest.raises(AuthenticationError, match="key"):
        service(provider, "nightly-es256", audience="https://evil.test")


@pytest.mark.parametrize(
    "pem",
    [b"", b"-----BEGIN PRIVATE KEY-----", ECKey.generate_key("P-521").as_pem(private=True)],
    ids=["empty", "cut", "another curve"],
)
def test_service_key_that_cannot_sign(provider: Provider, pem: bytes) -> None:
    with pytest.raises(InputError):
        service(provider, "nightly-es256", private_key_pem=pem)


def test_token_for_another_audience(provider: Provider, federation: Federation) -> None:
    stray = service(provider, "nightly-es256", resource=OTHER_AUDIENCE)
    with pytest.raises(AuthenticationError, match="somebody else"):
        federation.verify(stray.access_token, time.time())


def test_token_sets_are_as_told(provider: Provider) -> None:
    tokens = service(provider, "nightly-es256")
    assert 0 < (tokens.expires_in or 0) <= 600
    assert replace(tokens, access_token="x") != tokens
    assert tokens.id_token is None
    assert tokens.refresh_token is None
