"""Which issuers are believed, with which keys, and what happens when they rotate, vanish or misbehave."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from joserfc import jws
from joserfc.jwk import ECKey, RSAKey
from pydantic import ValidationError

from cloister.authority import federation as federation_module
from cloister.authority.federation import MAX_KEYS_AGE_S, MIN_FETCH_INTERVAL_S, Federation, Issuer, RoleMapping
from cloister.client import oidc
from cloister.client.issuer import IssuerClient
from cloister.errors import AuthenticationError, CloisterError, InputError, IntegrityError, UnavailableError
from oidc.provider import AUDIENCE, Provider, signing_keys
from oidc.scripted import METADATA, ScriptedIssuer
from waiting import PATIENCE_S

NODE_SIGNER = RSAKey.generate_key(2048, {"kid": "cluster-1"})


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


@pytest.fixture
def make(clock: list[float]) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def federation(*issuers: Issuer) -> Federation:
        made.append(Federation(issuers, clock=lambda: clock[0]))
        return made[-1]

    yield federation
    for each in made:
        each.close()


def settings(issuer: ScriptedIssuer | Provider, **changes: Any) -> Issuer:
    url = issuer.url if isinstance(issuer, ScriptedIssuer) else issuer.issuer
    return Issuer(**({"issuer": url, "audience": AUDIENCE, "ca_file": issuer.ca} | changes))


def service_token(provider: Provider) -> str:
    key = provider.services["nightly-es256"][0]
    found = oidc.client_credentials(
        provider.issuer, "nightly-es256", private_key_pem=key, resource=AUDIENCE, ca=provider.ca
    )
    return found.access_token


# With the real provider.


def test_rotated_key_is_found_and_the_old_one_forgotten(
    provider_modules: Path, tmp_path: Path, make: Callable[..., Federation], clock: list[float]
) -> None:
    with Provider(provider_modules, tmp_path / "p") as provider:
        federation = make(settings(provider))
        old = service_token(provider)
        assert federation.verify(old, time.time()).subject == "nightly-es256"

        provider.stop()
        provider.keys = signing_keys(generation=2)
        provider.start()
        new = service_token(provider)
        with pytest.raises(AuthenticationError, match="does not publish"):  # asked a moment ago: not again yet
            federation.verify(new, time.time())
        clock[0] += MIN_FETCH_INTERVAL_S
        assert federation.verify(new, time.time()).subject == "nightly-es256"
        with pytest.raises(AuthenticationError, match="does not publish"):
            federation.verify(old, time.time())

        provider.stop()  # gone: the keys that are known serve for ten minutes, then nothing is believed
        clock[0] += MAX_KEYS_AGE_S - 1
        assert federation.verify(new, time.time()).subject == "nightly-es256"
        clock[0] += 1
        with pytest.raises(UnavailableError):
            federation.verify(new, time.time())


def test_token_of_a_real_issuer_that_nobody_configured(
    provider: Provider, scripted: ScriptedIssuer, make: Callable[..., Federation]
) -> None:
    with pytest.raises(AuthenticationError, match="not configured"):
        make(settings(scripted)).verify(service_token(provider), time.time())
    assert scripted.asked == []


def test_issuer_cannot_speak_for_another(
    provider: Provider, scripted: ScriptedIssuer, make: Callable[..., Federation]
) -> None:
    """Both are configured; each signs with a good key; one names the other."""
    federation = make(settings(provider), settings(scripted))
    assert federation.verify(scripted.token(), time.time()).issuer == scripted.url
    with pytest.raises(AuthenticationError, match="does not publish"):
        federation.verify(scripted.token(iss=provider.issuer), time.time())


# Keys: how often, how long, how many threads.


def test_a_flood_of_invented_keys_is_one_request(
    scripted: ScriptedIssuer, make: Callable[..., Federation], clock: list[float]
) -> None:
    federation = make(settings(scripted))
    federation.verify(scripted.token(), time.time())
    assert scripted.asked == [METADATA, "/jwks"]
    clock[0] += MIN_FETCH_INTERVAL_S
    for number in range(50):
        with pytest.raises(AuthenticationError):
            federation.verify(scripted.token(ECKey.generate_key("P-256", {"kid": f"x{number}"})), time.time())
        federation.verify(scripted.token(), time.time())
    assert scripted.asked == [METADATA, "/jwks"] * 2


def test_many_threads_fetch_once(
    scripted: ScriptedIssuer, make: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation_module, "FIRST_KEYS_WAIT_S", PATIENCE_S)
    federation, token = make(settings(scripted)), scripted.token()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: federation.verify(token, time.time()).subject, range(64)))
    assert found == ["rita"] * 64
    assert scripted.asked == [METADATA, "/jwks"]


def test_keys_that_their_issuer_withdrew_are_dead_after_ten_minutes(
    scripted: ScriptedIssuer, make: Callable[..., Federation], clock: list[float]
) -> None:
    federation = make(settings(scripted))
    federation.verify(scripted.token(), time.time())
    scripted.serve(ECKey.generate_key("P-256", {"kid": "k2"}))
    clock[0] += MAX_KEYS_AGE_S
    with pytest.raises(AuthenticationError, match="does not publish"):
        federation.verify(scripted.token(), time.time())


def test_issuer_that_fails_is_not_asked_again_at_once(
    scripted: ScriptedIssuer, make: Callable[..., Federation], clock: list[float]
) -> None:
    federation = make(settings(scripted))
    good = scripted.answers[METADATA]
    scripted.answers[METADATA] = (503, {}, b"")
    for _ in range(5):
        with pytest.raises(UnavailableError):
            federation.verify(scripted.token(), time.time())
    assert scripted.asked == [METADATA]
    scripted.answers[METADATA] = good
    clock[0] += MIN_FETCH_INTERVAL_S
    assert federation.verify(scripted.token(), time.time()).subject == "rita"


def test_unknown_key_of_an_issuer_that_went_away(
    scripted: ScriptedIssuer, make: Callable[..., Federation], clock: list[float]
) -> None:
    federation = make(settings(scripted))
    federation.verify(scripted.token(), time.time())
    scripted.answers["/jwks"] = (500, {}, b"")
    clock[0] += MIN_FETCH_INTERVAL_S
    with pytest.raises(UnavailableError):
        federation.verify(scripted.token(ECKey.generate_key("P-256", {"kid": "new"})), time.time())
    assert federation.verify(scripted.token(), time.time()).subject == "rita"  # who is known stays known


# Issuers that misbehave.


@pytest.mark.parametrize("path", [METADATA, "/jwks"])
@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b""),
        (200, {}, b"<html>"),
        (200, {}, b"[]"),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(b"{}", mtime=0)),
        (302, {"Location": "https://evil.test/jwks"}, b""),
        (301, {"Location": "/moved"}, b""),
        (404, {}, b"{}"),
        (500, {}, b"{}"),
        (200, {}, json.dumps({"keys": [ECKey.generate_key("P-256").as_dict(private=True)]}).encode()),
        (200, {}, json.dumps({"issuer": "https://evil.test", "jwks_uri": "https://evil.test/jwks"}).encode()),
    ],
    ids=lambda answer: f"{answer[0]}-{answer[2][:12]!r}",
)
def test_answers_that_are_not_believed(
    scripted: ScriptedIssuer, make: Callable[..., Federation], path: str, answer: tuple[int, dict[str, str], bytes]
) -> None:
    scripted.answers["/moved"] = scripted.answers[path]
    scripted.answers[path] = answer
    with pytest.raises(UnavailableError):
        make(settings(scripted)).verify(scripted.token(), time.time())
    assert "/moved" not in scripted.asked


@pytest.mark.parametrize("path", [METADATA, "/jwks"])
def test_answer_without_end(scripted: ScriptedIssuer, make: Callable[..., Federation], path: str) -> None:
    status, headers, body = scripted.answers[path]
    scripted.answers[path] = (status, headers, body + b" " * 300_000)
    with pytest.raises(UnavailableError):
        make(settings(scripted)).verify(scripted.token(), time.time())


@pytest.mark.parametrize(
    "metadata",
    [
        {"issuer": "https://127.0.0.1"},
        {"issuer": None},
        {"jwks_uri": None},
        {"jwks_uri": "http://127.0.0.1/jwks"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "https://name:word@127.0.0.1/jwks"},
        {"token_endpoint": "http://127.0.0.1/token"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"device_authorization_endpoint": 5},
    ],
    ids=str,
)
def test_metadata_that_are_not_believed(scripted: ScriptedIssuer, metadata: dict[str, Any]) -> None:
    scripted.serve(scripted.key, **metadata)
    with IssuerClient(scripted.url, ca=scripted.ca) as client, pytest.raises(IntegrityError):
        client.metadata()


def test_issuer_that_sends_a_byte_at_a_time(scripted: ScriptedIssuer) -> None:
    with IssuerClient(scripted.url, ca=scripted.ca) as client:
        assert client.metadata().issuer == scripted.url
    scripted.drips = True
    with (
        IssuerClient(scripted.url, ca=scripted.ca, timeout_s=2.0) as client,
        pytest.raises(UnavailableError, match="slow"),
    ):
        client.metadata()


def test_issuer_with_another_certificate(scripted: ScriptedIssuer, make: Callable[..., Federation]) -> None:
    with pytest.raises(UnavailableError):
        make(settings(scripted, ca_file=None)).verify(scripted.token(), time.time())
    assert scripted.asked == []


@pytest.mark.parametrize("url", ["http://login.test", "login.test", "", "https://", "https://a@login.test", 5])
def test_issuer_that_is_no_https_url(url: Any) -> None:
    with pytest.raises(InputError):
        IssuerClient(url)


@pytest.mark.parametrize(
    "url",
    ["https://login.test?tenant=1", "https://login.test#x", "https://login.test/\n", "https://login.test/\u202egnp"],
)
def test_issuer_with_more_than_an_address(url: str) -> None:
    with pytest.raises(InputError):
        IssuerClient(url)


def test_issuer_in_a_folder_of_its_host(scripted: ScriptedIssuer) -> None:
    scripted.answers["/realms/a" + METADATA] = (
        200, {}, json.dumps({"issuer": scripted.url + "/realms/a", "jwks_uri": scripted.url + "/jwks"}).encode()
    )  # fmt: skip
    with IssuerClient(scripted.url + "/realms/a", ca=scripted.ca) as client:
        assert "k1" in client.keys(client.metadata())


# Kubernetes: a projected token, and a key file, since the cluster's issuer cannot be reached.


def projected(**changes: Any) -> str:
    now = int(time.time())
    claims = {
        "aud": [AUDIENCE], "exp": now + 3607, "iat": now, "nbf": now, "iss": "https://kubernetes.default.svc",
        "jti": "3f1c", "sub": "system:serviceaccount:training:nightly",
        "kubernetes.io": {"namespace": "training", "serviceaccount": {"name": "nightly", "uid": "u1"},
                          "pod": {"name": "nightly-x", "uid": "u2"}, "node": {"name": "n1", "uid": "u3"}},
    } | changes  # fmt: skip
    # The API server writes no `typ`.
    return jws.serialize_compact({"alg": "RS256", "kid": "cluster-1"}, json.dumps(claims).encode(), NODE_SIGNER)


@pytest.fixture
def cluster(tmp_path: Path) -> Issuer:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [NODE_SIGNER.as_dict(private=False, use="sig", alg="RS256")]}))
    return Issuer(issuer="https://kubernetes.default.svc", audience=AUDIENCE, kind="workloads", jwks_file=file)


def test_projected_token_of_a_pod(cluster: Issuer, make: Callable[..., Federation]) -> None:
    federation = make(cluster)
    claims = federation.verify(projected(), time.time())
    assert claims.subject == "system:serviceaccount:training:nightly"
    assert claims.claims["kubernetes.io"]["namespace"] == "training"
    assert claims.expires_at == claims.issued_at + 3600
    assert federation.settings(claims).kind == "workloads"
    assert federation.roles(claims) == frozenset()


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["https://kubernetes.default.svc"]},
        {"aud": [AUDIENCE, "https://kubernetes.default.svc"]},
        {"iss": "https://other.default.svc"},
        {"iat": 0},
        {"nbf": 2**40},
    ],
    ids=str,
)
def test_projected_token_for_others(cluster: Issuer, make: Callable[..., Federation], changes: dict[str, Any]) -> None:
    with pytest.raises(AuthenticationError):
        make(cluster).verify(projected(**changes), time.time())


def test_untyped_token_where_people_log_in(cluster: Issuer, make: Callable[..., Federation]) -> None:
    people = cluster.model_copy(update={"kind": "people"})
    with pytest.raises(AuthenticationError, match="not an access token"):
        make(people).verify(projected(), time.time())
    assert make(people.model_copy(update={"types": [""]})).verify(projected(), time.time()).subject


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"keys": [{"kty": "oct", "k": "AAAA", "kid": "cluster-1"}]}'])
def test_key_file_that_is_absent_or_wrong(
    cluster: Issuer, make: Callable[..., Federation], content: bytes | None
) -> None:
    assert cluster.jwks_file is not None
    cluster.jwks_file.unlink()
    if content is not None:
        cluster.jwks_file.write_bytes(content)
    with pytest.raises(UnavailableError):
        make(cluster).verify(projected(), time.time())


# Settings.


def test_settings_of_an_issuer_hold_for_its_tokens(scripted: ScriptedIssuer, make: Callable[..., Federation]) -> None:
    shared = scripted.token(aud=[AUDIENCE, "account"], azp="cloister-cli")
    assert make(settings(scripted, client_id="cloister-cli")).verify(shared, time.time()).subject == "rita"
    with pytest.raises(AuthenticationError, match="several audiences"):
        make(settings(scripted)).verify(shared, time.time())
    with pytest.raises(AuthenticationError, match="algorithm"):
        make(settings(scripted, algorithms=["RS256"])).verify(scripted.token(), time.time())


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": AUDIENCE},
        {"algorithms": ["HS256"]},
        {"algorithms": ["none"]},
        {"algorithms": []},
        {"types": ["id_token"]},
        {"kind": "anybody"},
        {"audience": ""},
        {"max_age_s": 10**9},
        {"jwks_file": "a", "ca_file": "b"},
        {"roles": {"claim": "groups", "map": {"admins": []}}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_settings_that_would_be_unsafe(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Issuer(**({"issuer": "https://login.test", "audience": AUDIENCE} | changes))


def test_one_issuer_configured_twice(cluster: Issuer) -> None:
    with pytest.raises(InputError, match="twice"):
        Federation([cluster, cluster.model_copy(update={"audience": "urn:other"})])


def test_issuers_that_cannot_be_asked() -> None:
    for changes in (
        {"issuer": "http://login.test"},
        {"issuer": "http://kubernetes.default.svc", "jwks_file": Path("jwks.json")},
        {"ca_file": Path("/nonexistent.pem")},
    ):
        with pytest.raises(CloisterError):
            Federation([Issuer(**({"issuer": "https://login.test", "audience": AUDIENCE} | changes))])


def test_roles_come_from_the_named_claim_alone(scripted: ScriptedIssuer, make: Callable[..., Federation]) -> None:
    mapping = RoleMapping(claim="groups", map={"ml": ["engineer"], "audit": ["auditor", "reviewer"]})
    federation = make(settings(scripted, roles=mapping))
    for groups, roles in (
        (["ml", "audit", "other"], {"engineer", "auditor", "reviewer"}),
        ("ml", {"engineer"}),
        (["operator"], set()),
        ([["ml"]], set()),
        ({"ml": True}, set()),
        (None, set()),
    ):
        claims = federation.verify(scripted.token(groups=groups, roles=["operator"]), time.time())
        assert federation.roles(claims) == roles
