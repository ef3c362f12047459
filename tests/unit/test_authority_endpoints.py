"""Somebody serves a model that was not released, or answers more than the quota pays for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from authority_world import Person, World, receiver
from cloister.canonical import b64


@pytest.fixture
def released(world: World) -> World:
    world.train()
    world.release()
    return world


def take(world: World, endpoint: str, wanted: int, subject: str = "carl") -> dict[str, Any]:
    return world.authority.endpoints.quota_block(world.caller(endpoint), endpoint, subject, wanted)


def test_a_candidate_is_not_deployed(world: World) -> None:
    world.train()
    with world.still():
        assert world.refused(404, "operator", "POST", "/v1/endpoints", world.deploy_body(Person("x", [])))


def test_only_an_operator_deploys_and_it_is_on_record(released: World) -> None:
    for name in ("ed", "rita", "olga", "carl", "ada"):
        with released.still("denied"):
            assert released.refused(403, name, "POST", "/v1/endpoints", released.deploy_body(Person("x", [])))
    with released.recorded("operator", "endpoint:deploy"):
        endpoint = released.deploy()
    assert released.get("ada", "/v1/endpoints")[0]["endpoint"] == endpoint


@pytest.mark.parametrize(("quota", "window_s"), [(0, 60), (-1, 60), (10_000_001, 60), (1, 0), (1, 86_401), (10**30, 1)])
def test_a_quota_outside_its_range_is_refused(released: World, quota: int, window_s: int) -> None:
    with released.still(entries=0):
        body = released.deploy_body(Person("x", []), quota, window_s)
        assert released.refused(400, "operator", "POST", "/v1/endpoints", body)


def csr(key: Any) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "endpoint")])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm)
    return request.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    "key",
    [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()),
     rsa.generate_private_key(public_exponent=65537, key_size=2048), None],
)  # fmt: skip
def test_a_certificate_is_issued_to_a_p256_request_only(released: World, key: Any) -> None:
    body = released.deploy_body(Person("x", [])) | {"csr": csr(key) if key else "-----BEGIN NOTHING-----"}
    with released.still():
        assert released.refused(400, "operator", "POST", "/v1/endpoints", body)


def test_a_lease_is_on_record_and_opens_the_production_model(released: World) -> None:
    endpoint = released.deploy()
    with released.recorded(endpoint, "endpoint:lease"):
        lease = released.client(endpoint).lease_model(endpoint)
    assert len(lease.approvals) == 1
    assert released.log()[-1].details["model"] == "adult@1"


def test_a_lease_for_another_endpoint_or_key_is_refused(released: World) -> None:
    mine, other = released.deploy(), released.deploy()
    with released.still("denied"):
        assert released.refused(403, mine, "POST", f"/v1/endpoints/{other}/leases", receiver())
    with released.still("denied"):
        assert released.refused(403, mine, "POST", f"/v1/endpoints/{other}/quota", {"subject": "carl", "wanted": 1})
    with released.still():
        assert released.refused(400, mine, "POST", f"/v1/endpoints/{mine}/leases", {"public_key": b64(b"x")})


def test_no_lease_once_another_version_is_in_production(released: World) -> None:
    endpoint = released.deploy()
    released.train(model=b"v2")
    released.release(2)
    with released.still():
        assert released.refused(409, endpoint, "POST", f"/v1/endpoints/{endpoint}/leases", receiver())


def test_a_stopped_endpoint_gets_nothing(released: World) -> None:
    endpoint = released.deploy()
    for name in ("ed", "carl", "ada", endpoint):
        with released.still("denied"):
            assert released.refused(403, name, "POST", f"/v1/endpoints/{endpoint}/stop")
    with released.recorded("operator", "endpoint:stop"):
        released.post("operator", f"/v1/endpoints/{endpoint}/stop")
    for path, body in (("leases", receiver()), ("quota", {"subject": "carl", "wanted": 1})):
        with released.still():
            assert released.refused(409, endpoint, "POST", f"/v1/endpoints/{endpoint}/{path}", body)


def middle_of_a_window(world: World, window_s: int) -> float:
    """Move the clock there: windows begin at multiples of their length, and none shall end during a test."""
    world.clock.offset = offset = window_s / 2 - time.time() % window_s
    return offset


def test_many_replicas_at_once_are_granted_the_quota_and_no_more(released: World) -> None:
    endpoint = released.deploy(quota=100, window_s=3600)
    middle_of_a_window(released, 3600)
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(lambda _: take(released, endpoint, 7), range(24)))
    assert sum(block["granted"] for block in blocks) == 100
    outcomes = [entry.outcome for entry in released.log() if entry.details.get("step") == "quota"]
    assert (outcomes.count("success"), len(outcomes)) == (15, 24)
    assert take(released, endpoint, 1) == {"granted": 0, "window_ends": blocks[0]["window_ends"]}
    assert released.log()[-1].outcome == "denied"


def test_a_new_window_grants_anew_and_a_clock_that_goes_back_does_not(released: World) -> None:
    endpoint = released.deploy(quota=10, window_s=60)
    start = middle_of_a_window(released, 60)
    first = take(released, endpoint, 8)
    assert (first["granted"], take(released, endpoint, 8)["granted"]) == (8, 2)
    assert 0 < first["window_ends"] - released.clock() <= 60
    released.clock.offset = start + 60
    second = take(released, endpoint, 10_000)
    assert (second["granted"], second["window_ends"]) == (10, first["window_ends"] + 60)
    released.clock.offset = start
    assert take(released, endpoint, 1)["granted"] == 0


def test_each_caller_has_a_quota_of_their_own_that_all_endpoints_share(released: World) -> None:
    one, two = released.deploy(quota=10, window_s=3600), released.deploy(quota=10, window_s=3600)
    middle_of_a_window(released, 3600)
    assert take(released, one, 6)["granted"] + take(released, two, 6)["granted"] == 10
    assert take(released, two, 6, "dora")["granted"] == 6


@pytest.mark.parametrize(
    "body", [{"wanted": 0}, {"wanted": -5}, {"wanted": 10_001}, {"subject": ""}, {"subject": "x" * 64}]
)
def test_an_odd_quota_request_is_refused(released: World, body: dict[str, Any]) -> None:
    endpoint = released.deploy()
    with released.still(entries=0):
        asked = {"subject": "carl", "wanted": 1} | body
        assert released.refused(400, endpoint, "POST", f"/v1/endpoints/{endpoint}/quota", asked)
