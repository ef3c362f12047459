"""Keys leave only to registered machines of the right region, over mutual TLS that is theirs."""

from __future__ import annotations

import base64
import hashlib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from authority_world import CODE, NODE, Person, World, attempt_body, lease_body, receiver
from cloister.authority.nodes import LIFETIME, Peer
from cloister.errors import AuthenticationError, PermissionDeniedError
from cloister.sealing.lease import OneTimeKey
from cloister.signing import certificates

# ---- registering and certifying ----


def body(name: str = "node-us", **changes: Any) -> dict[str, Any]:
    return {"name": name, "public_key": Person(name, []).public, "region": "us"} | changes


def test_an_operator_registers_a_node_on_record(empty_world: World) -> None:
    with empty_world.recorded("operator", "node:register"):
        answer = empty_world.post("operator", "/v1/nodes", body(assurance=2))
    assert answer == {"name": "node-us", "region": "us", "assurance": 2}
    shown = next(each for each in empty_world.get("ada", "/v1/identities") if each["name"] == "node-us")
    assert (shown["kind"], shown["roles"], shown["attributes"]) == ("node", [], {"region": "us", "assurance": 2})


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (body(NODE), 409),
        (body("ed"), 409),
        (body("Node"), 400),
        (body("../node"), 400),
        (body("authority"), 400),
        (body("unknown"), 400),
        (body("run-0123456789"), 400),
        (body("ep-0123456789"), 400),
        (body(assurance=4), 400),
        (body(assurance=-1), 400),
        (body(region=""), 400),
        (body(public_key="no key"), 400),
        (body(kind="person"), 400),
        (body(roles=["operator"]), 400),
    ],
)
def test_a_false_registration_makes_no_node(calm_world: World, sent: dict[str, Any], status: int) -> None:
    content = calm_world.content()
    answer = calm_world.ask("operator", "POST", "/v1/nodes", sent)
    assert answer.status_code == status, answer.text
    assert calm_world.content() == content


def test_a_node_is_certified_for_a_day_under_its_own_name_only(empty_world: World) -> None:
    key = certificates.new_private_key()
    csr = certificates.signing_request(key, "node-us").decode()  # asks for another's name
    with empty_world.recorded(NODE, "node:certify"):
        pem = empty_world.post(NODE, "/v1/nodes/certificate", {"csr": csr})["certificate"]
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert Peer.from_der(ssl.PEM_cert_to_DER_cert(pem)).names == (NODE,)
    assert certificate.not_valid_after_utc - datetime.now(UTC) <= LIFETIME == timedelta(hours=24)
    node_ca = x509.load_pem_x509_certificate(empty_world.authority.node_ca)
    certificate.verify_directly_issued_by(node_ca)
    for other in (empty_world.authority.ca_certificate, empty_world.authority.endpoint_ca):
        with pytest.raises(ValueError, match=r"[Ii]ssuer"):
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(other))


def test_nobody_else_is_certified_as_a_node(calm_world: World) -> None:
    csr = certificates.signing_request(certificates.new_private_key(), NODE).decode()
    for name in ("operator", "ed", "sofia"):
        with calm_world.still("denied"):
            calm_world.refused(403, name, "POST", "/v1/nodes/certificate", {"csr": csr})


def test_a_node_may_do_nothing_else(calm_world: World) -> None:
    for method, path in (("GET", "/v1/datasets"), ("GET", "/v1/runs"), ("GET", "/v1/log"), ("GET", "/v1/identities")):
        with calm_world.still("denied"):
            assert calm_world.refused(403, NODE, method, path) == "PermissionDeniedError"


def test_a_revoked_node_gets_no_token_and_no_certificate(empty_world: World) -> None:
    token = empty_world.token(NODE)
    empty_world.post("operator", f"/v1/identities/{NODE}/revocation")
    csr = certificates.signing_request(certificates.new_private_key(), NODE).decode()
    headers = {"Authorization": f"Bearer {token}"}
    assert empty_world.http.post("/v1/nodes/certificate", json={"csr": csr}, headers=headers).status_code == 401
    assert empty_world.exchange(empty_world.assertion(NODE)).status_code == 401


# ---- certificates that are no good ----


def certificate(*names: str, lifetime: timedelta = LIFETIME, san: bool = True) -> bytes:
    """Of somebody's own making: what TLS has verified is the listener's business, so only the names matter here."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NODE)])
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + lifetime)
    )  # fmt: skip
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@dataclass
class Training:
    """A run that has not had its leases; certificates of a node in the US, and of one that was revoked."""

    world: World
    run: str
    american: bytes
    revoked: bytes


@pytest.fixture(scope="module")
def training(sealed_template: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    world = sealed_template.copy(tmp_path_factory.mktemp("nodes") / "authority")
    run = world.submit()
    american, revoked = world.register_node("node-us", "us"), world.register_node("node-revoked")
    world.post("operator", "/v1/identities/node-revoked/revocation")
    world.token(run)
    yield Training(world, run, american, revoked)
    world.close()


BAD: dict[str, Callable[[Training], bytes | None]] = {
    "none": lambda _: None,
    "of a node of another region": lambda training: training.american,
    "of a node that was revoked": lambda training: training.revoked,
    "of a node that nobody registered": lambda _: certificate("node-nobody"),
    "of a person": lambda _: certificate("operator"),
    "of the run itself": lambda training: certificate(training.run),
    "expired": lambda _: certificate(NODE, lifetime=timedelta(hours=-1)),
    "of two nodes": lambda _: certificate(NODE, "node-us"),
    "without names": lambda _: certificate(),
}


@pytest.mark.parametrize("which", BAD)
def test_without_a_good_certificate_no_key_leaves(training: Training, which: str) -> None:
    world, run = training.world, training.run
    for path, body in (("attempts", attempt_body()), ("leases", lease_body())):
        with world.over(BAD[which](training)), world.still("denied"):
            answer = world.ask(run, "POST", f"/v1/runs/{run}/{path}", body)
        assert (answer.status_code, answer.json()["kind"]) == (403, "PermissionDeniedError")
        rule = "data-is-opened-only-in-its-region" if "region" in which else "workloads-act-only-from-a-node"
        assert rule in answer.json()["error"]


@pytest.mark.parametrize("der", [certificate(san=False), b"garbage", b"\x30\x00"])
def test_a_certificate_that_names_nobody_is_refused_before_anything_else(training: Training, der: bytes) -> None:
    world, run = training.world, training.run
    with world.over(der), world.still(entries=0):
        for path in (f"/v1/runs/{run}", "/v1/datasets"):
            assert world.ask(run, "GET", path).status_code == 401


def test_a_node_of_another_region_may_work_on_what_needs_no_data(training: Training) -> None:
    """The rule is about opening data: progress of a run that got its lease elsewhere is no secret."""
    world, run = training.world, training.run
    with world.over(training.american):
        assert world.get(run, f"/v1/runs/{run}")["state"] == "submitted"
        with world.still():  # 409: no attempt is open; policy did not object
            block = {"attempt": 1, "first": 0, "last": 1}
            assert world.refused(409, run, "POST", f"/v1/runs/{run}/blocks", block) == "ConflictError"


def test_the_good_certificate_gives_the_lease_and_the_entry_names_the_node(world: World) -> None:
    run = world.submit()
    world.attempt(run)
    with world.recorded(run, "run:lease"):
        world.lease(run)
    assert world.log()[-1].details["node"] == NODE


def test_a_node_that_is_revoked_while_it_serves_gets_nothing_more(world: World) -> None:
    world.train()
    world.release()
    endpoint = world.deploy()
    assert world.client(endpoint).lease_model(endpoint)
    world.post("operator", f"/v1/identities/{NODE}/revocation")
    for path, sent in (("leases", receiver()), ("quota", {"subject": "carl", "wanted": 1})):
        with world.still("denied"):
            assert world.refused(403, endpoint, "POST", f"/v1/endpoints/{endpoint}/{path}", sent)
    assert world.refused(403, endpoint, "GET", f"/v1/endpoints/{endpoint}/changes") == "PermissionDeniedError"


def test_a_certificate_ends_in_the_middle_of_a_connection(world: World) -> None:
    """TLS checks it when the connection is made; here it is looked at again for every request."""
    run, mine = world.submit(), world.certificate_of(NODE)
    world.clock.offset = LIFETIME.total_seconds() + 5
    world.tokens.clear()
    with world.over(mine), world.still("denied"):
        world.token(run)
        assert world.refused(403, run, "POST", f"/v1/runs/{run}/leases", lease_body()) == "PermissionDeniedError"


def test_a_node_is_believed_by_its_certificate_and_by_nothing_that_it_says(world: World) -> None:
    run = world.submit()
    caller = world.caller(run)
    with pytest.raises(PermissionDeniedError, match="workloads-act-only-from-a-node"):
        world.authority.attempts.lease(replace(caller, node=None), run, 1, 0, OneTimeKey.generate().public, CODE)


def test_the_thumbprint_is_that_of_the_specification() -> None:
    """RFC 8705 section 3.1: base64url of SHA-256 over the DER, without padding."""
    der = certificate(NODE)
    expected = base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode()
    assert Peer.from_der(der).thumbprint == expected
    with pytest.raises(AuthenticationError):
        Peer.from_der(b"garbage")
