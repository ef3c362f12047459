"""Where the authority may listen: loopback, or a network with a certificate of its own that names the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.config import AuthoritySettings
from cloister.errors import InputError
from cloister.signing import certificates


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
