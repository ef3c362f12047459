"""Where the authority may listen: loopback, or a network with a certificate of its own that names the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.config import AuthoritySettings, Settings
from cloister.errors import InputError
from cloister.signing import certificates
from cloister.stores.home import Home


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    ca_key, key = certificates.new_private_key(), certificates.new_private_key()
    request = certificates.signing_request(key, "authority.example")
    certificate = certificates.issue(ca_key, certificates.new_ca(ca_key, "a CA"), request, hosts=("authority.example",))
    (tmp_path / "tls.pem").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    (tmp_path / "tls.key").chmod(0o600)
    return tmp_path / "tls.pem", tmp_path / "tls.key"


def settings(host: str, certificate: Path | None = None, key: Path | None = None) -> AuthoritySettings:
    return AuthoritySettings(host=host, tls_certificate=certificate, tls_key=key)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    settings(host).require_safe()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "authority.example", "127.0.0.1.example"])  # noqa: S104
def test_a_network_without_a_certificate_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="TLS certificate"):
        settings(host).require_safe()


def test_a_network_with_a_certificate_that_names_the_host_is_taken(files: tuple[Path, Path]) -> None:
    settings("authority.example", *files).require_safe()


def test_a_certificate_for_another_host_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="does not name"):
        settings("other.example", *files).require_safe()


def test_a_key_open_to_others_is_refused(files: tuple[Path, Path]) -> None:
    files[1].chmod(0o640)
    with pytest.raises(InputError, match="open to others"):
        settings("authority.example", *files).require_safe()


def test_a_certificate_without_its_key_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        settings("authority.example", files[0]).require_safe()
    with pytest.raises(InputError, match="cannot be read"):
        settings("authority.example", files[0], tmp_path / "none.key").require_safe()


def test_an_address_is_written_into_a_url_as_it_must_be() -> None:
    assert settings("::1").url == "https://[::1]:8470"
    assert settings("authority.example").url == "https://authority.example:8470"


CONFIG = """
authority:
  host: authority.example
  port: 9000
  region: us
  database: postgresql://cloister@db.example:5432/cloister
  database_password_file: /run/secrets/db
  node_ca: /etc/cloister/node-ca.pem
  approvals: {training: 2, training_classes: [internal, confidential, restricted], key_destruction: 3}
  issuers:
    - issuer: https://login.example
      audience: urn:our-cloister
      client_id: cloister-cli
      roles: {claim: groups, map: {ml-reviewers: [reviewer]}}
"""


def loaded(tmp_path: Path, text: str) -> AuthoritySettings:
    (tmp_path / "config.yaml").write_text(text)
    return Settings.load(Home(tmp_path)).authority


def test_what_the_file_says_is_what_is_used(tmp_path: Path) -> None:
    found = loaded(tmp_path, CONFIG)
    assert (found.url, found.region) == ("https://authority.example:9000", "us")
    assert (found.approvals.training, found.approvals.promotion, found.approvals.key_destruction) == (2, 1, 3)
    federation = found.federation()
    assert federation is not None
    assert [issuer.client_id for issuer in federation.issuers] == ["cloister-cli"]
    federation.close()


@pytest.mark.parametrize("text", ["", "authority: {}", "authority:\n  port: 9000\n"])
def test_without_settings_one_machine_is_served_and_nobody_is_trusted(tmp_path: Path, text: str) -> None:
    found = loaded(tmp_path, text)
    assert found.on_loopback
    assert (found.open_database(), found.federation(), found.node_ca) == (None, None, None)
    assert (found.approvals.training, found.approvals.policy, found.approvals.access) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("authority: {approvals: {promotion: 0}}", "authority.approvals.promotion"),
        ("authority: {approvals: {policy: 0}}", "authority.approvals.policy"),
        ("authority: {approvals: {nothing: 1}}", "authority.approvals.nothing"),
        ("authority: {port: 0}", "authority.port"),
        ("authority: {password: hunter2}", "authority.password"),
        ("authority: {issuers: [{issuer: https://login.example}]}", "authority.issuers.0.audience"),
        ("autority: {}", "autority"),
        ("authority: {", "this is not YAML"),
        ("- authority", "the whole"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_without_its_value(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(InputError, match="is not valid") as caught:
        loaded(tmp_path, text)
    told = caught.value.message.partition("is not valid: ")[2]
    assert told == place or told.startswith(f"{place}: ")
    assert "hunter2" not in str(caught.value.args)


@pytest.mark.parametrize("issuer", ["http://login.example", "login.example", "https://login.example/?a=b"])
def test_an_issuer_that_is_not_at_a_plain_https_address_is_refused(tmp_path: Path, issuer: str) -> None:
    found = loaded(tmp_path, f"authority: {{issuers: [{{issuer: '{issuer}', audience: urn:a}}]}}")
    with pytest.raises(InputError):
        found.federation()
