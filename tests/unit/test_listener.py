"""The authority's real port: mutual TLS by certificates of a day, renewed while connections live."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509

from authority_world import Person
from cloister.authority.listener import Listener
from cloister.authority.service import Authority
from cloister.authority.settings import AuthoritySettings
from cloister.client.authority import AuthorityClient
from cloister.client.node import NodeFolder
from cloister.errors import AuthenticationError, PermissionDeniedError, UnavailableError
from cloister.signing import certificates
from cloister.stores.files import write_atomic
from ports import free_port


class Port:
    """An authority that answers on a real port, and its first operator."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.settings = AuthoritySettings(port=free_port(), **settings)
        self.authority = Authority(directory, url=self.settings.url)
        self.operator = Person("operator", ["operator"])
        self.authority.identities.bootstrap("operator", self.operator.public)
        self.ready = threading.Event()
        self.listener = Listener(self.authority, self.settings, self.ready.set)
        self._thread = threading.Thread(target=self.listener.run)
        self._thread.start()
        assert self.ready.wait(60)

    def stop(self) -> None:
        self.listener.should_exit = True
        self._thread.join(60)

    @property
    def ca(self) -> Path:
        return self.settings.tls_certificate or self.authority.directory / "ca.pem"

    def client(self, person: Person, node: NodeFolder | None = None) -> AuthorityClient:
        return AuthorityClient(
            self.settings.url, ca_path=self.ca, name=person.name, private_key_pem=person.private, node=node
        )

    def served(self) -> x509.Certificate:
        """The certificate that a new connection is shown."""
        context = ssl.create_default_context(cafile=self.ca)
        with (
            socket.create_connection(("127.0.0.1", self.settings.port)) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
        ):
            return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    port = Port(tmp_path / "authority")
    yield port
    port.stop()


@pytest.fixture
def node(port: Port, tmp_path: Path) -> NodeFolder:
    """A registered node's folder."""
    folder = NodeFolder(tmp_path / "node")
    with contextlib.closing(port.client(port.operator)) as client:
        client.post("/v1/nodes", {"name": "n1", "public_key": folder.make("n1"), "region": "eu"})
    return folder


def spoken_from(port: Port, node: NodeFolder | None) -> str | None:
    with contextlib.closing(port.client(port.operator, node)) as client:
        found: str | None = client.get("/v1/me")["node"]
        return found


def certificate_of(node: NodeFolder) -> x509.Certificate:
    return x509.load_pem_x509_certificate((node.directory / "tls.pem").read_bytes())


def test_a_node_is_known_by_its_certificate_and_nobody_without(port: Port, node: NodeFolder) -> None:
    assert spoken_from(port, node) == "n1"
    assert spoken_from(port, None) is None
    left = certificate_of(node).not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=23) < left <= timedelta(hours=24)


def test_a_certificate_of_another_ca_ends_the_handshake(port: Port, node: NodeFolder) -> None:
    assert spoken_from(port, node) == "n1"
    key, ca_key = certificates.new_private_key(), certificates.new_private_key()
    ca = certificates.new_ca(ca_key, "Cloister node CA")
    request = certificates.signing_request(key, "n1")
    write_atomic(node.directory / "tls.key", key)
    write_atomic(node.directory / "tls.pem", certificates.issue(ca_key, ca, request, hosts=("n1",)))
    with pytest.raises(UnavailableError):
        spoken_from(port, node)


def test_a_certificate_for_endpoints_is_not_a_nodes(port: Port, node: NodeFolder) -> None:
    assert spoken_from(port, node) == "n1"
    key = certificates.new_private_key()
    secret = port.authority.core.keys.secret("endpoint-ca")
    request = certificates.signing_request(key, "n1")
    write_atomic(node.directory / "tls.key", key)
    issued = certificates.issue(secret, port.authority.endpoint_ca, request, hosts=("n1",))
    write_atomic(node.directory / "tls.pem", issued)
    with pytest.raises(UnavailableError):
        spoken_from(port, node)


def test_a_revoked_node_counts_for_nothing_at_once(port: Port, node: NodeFolder) -> None:
    with contextlib.closing(port.client(port.operator, node)) as client:
        assert client.get("/v1/me")["node"] == "n1"
        client.post("/v1/identities/n1/revocation")
        assert client.get("/v1/me")["node"] is None


def test_a_node_renews_at_half_its_life_while_its_client_lives(
    port: Port, node: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(port.client(port.operator, node)) as client:
        assert client.get("/v1/me")["node"] == "n1"
        first = certificate_of(node).serial_number
        client._tokens.clear()  # as after ten minutes
        assert client.get("/v1/me")["node"] == "n1"
        assert certificate_of(node).serial_number == first, "not before it is time"
        monkeypatch.setattr("cloister.client.node.RENEW_BELOW", 1.1)
        client._tokens.clear()
        assert client.get("/v1/me")["node"] == "n1"
        assert certificate_of(node).serial_number != first


def test_a_crash_between_key_and_certificate_is_mended(port: Port, node: NodeFolder) -> None:
    assert spoken_from(port, node) == "n1"
    write_atomic(node.directory / "tls.key", certificates.new_private_key())
    assert spoken_from(port, node) == "n1"


def test_a_token_got_over_mutual_tls_is_worth_nothing_elsewhere(port: Port, node: NodeFolder) -> None:
    with contextlib.closing(port.client(port.operator, node)) as client:
        token = client.token()
    context = ssl.create_default_context(cafile=port.ca)
    answer = httpx.get(
        f"{port.settings.url}/v1/me",
        headers={"Authorization": f"Bearer {token}"},
        verify=context,
        trust_env=False,
        timeout=60,
    )
    assert answer.status_code == 401


def test_a_header_cannot_claim_a_certificate(port: Port, node: NodeFolder) -> None:
    assert spoken_from(port, node) == "n1"
    with contextlib.closing(port.client(port.operator)) as client:
        token = client.token()
    pem = (node.directory / "tls.pem").read_text().replace("\n", " ").strip()
    for name in ("x-client-cert", "x-forwarded-client-cert", "x-ssl-client-cert", "cloister.peer"):
        answer = httpx.get(
            f"{port.settings.url}/v1/me", headers={"Authorization": f"Bearer {token}", name: pem},
            verify=ssl.create_default_context(cafile=port.ca), trust_env=False, timeout=60,
        )  # fmt: skip
        assert answer.json()["node"] is None


def test_the_authority_renews_its_own_certificate_without_a_restart(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = port.served()
    assert first.not_valid_after_utc - datetime.now(UTC) <= timedelta(hours=24)
    with contextlib.closing(port.client(port.operator)) as client:
        client.get("/v1/me")
        assert not port.listener.renew()
        monkeypatch.setattr(certificates, "remaining", lambda _certificate: 0.49)
        assert port.listener.renew()
        assert port.served().serial_number != first.serial_number
        client.get("/v1/me")  # a connection from before goes on


def test_a_certificate_of_the_site_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    ca_key = certificates.new_private_key()
    ca = certificates.new_ca(ca_key, "The site's CA")
    chain, key_file = tmp_path / "chain.pem", tmp_path / "key.pem"

    def issue() -> None:
        key = certificates.new_private_key()
        leaf = certificates.issue(ca_key, ca, certificates.signing_request(key, "a"), hosts=("127.0.0.1",))
        write_atomic(key_file, key)
        write_atomic(chain, leaf + ca)

    issue()
    port = Port(tmp_path / "authority", tls_certificate=chain, tls_key=key_file)
    try:
        first = port.served()
        issue()
        assert port.listener.renew()
        assert port.served().serial_number != first.serial_number
    finally:
        port.stop()


def test_certificates_of_an_outside_ca_count_if_they_name_a_registered_node(tmp_path: Path) -> None:
    ca_key = certificates.new_private_key()
    ca = certificates.new_ca(ca_key, "cert-manager")
    (tmp_path / "node-ca.pem").write_bytes(ca)
    port = Port(tmp_path / "authority", node_ca=tmp_path / "node-ca.pem")
    try:
        folder = NodeFolder(tmp_path / "node")
        for name, wanted in (("n1", "n1"), ("stranger", None)):
            public = folder.make(name)
            if wanted:
                with contextlib.closing(port.client(port.operator)) as client:
                    client.post("/v1/nodes", {"name": name, "public_key": public, "region": "eu"})
            key = certificates.new_private_key()
            request = certificates.signing_request(key, name)
            write_atomic(folder.directory / "tls.key", key)
            write_atomic(folder.directory / "tls.pem", certificates.issue(ca_key, ca, request, hosts=(name,)))
            assert spoken_from(port, folder) == wanted
    finally:
        port.stop()


def test_a_run_without_a_node_gets_no_lease(port: Port) -> None:
    """The rule that the certificate is for; the leases themselves are tested in `test_authority_runs`."""
    body = {"attempt": 1, "rank": 0, "public_key": "", "code_digest": "sha256:" + "0" * 64}
    with contextlib.closing(port.client(Person("nobody", []))) as client, pytest.raises(AuthenticationError):
        client.post("/v1/runs/run-0/leases", body)
    with contextlib.closing(port.client(port.operator)) as client, pytest.raises(PermissionDeniedError):
        client.post("/v1/nodes/certificate", {"csr": "x"})
