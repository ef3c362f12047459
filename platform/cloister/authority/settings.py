"""Settings of an authority: where it listens, where its state is, whom it trusts and what needs approval."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cloister.authority.approvals import Required
from cloister.authority.federation import Federation, Issuer
from cloister.authority.retention import DEFAULT_INTERVAL_S
from cloister.authority.uploads import DEFAULT_SEALS_PER_MINUTE
from cloister.authority.witness import WitnessSettings
from cloister.errors import InputError
from cloister.stores.database import Database
from cloister.stores.keys.settings import EmbeddedSettings, KeySettings

DEFAULT_PORT = 8470


class AuthoritySettings(BaseModel):
    """The `authority` part of config.yaml. Every setting has a default that is safe on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    port: int = Field(default=DEFAULT_PORT, ge=1, le=65535)
    public_url: str | None = Field(default=None, pattern=r"^https://[^/\s]+$", max_length=300)
    """What callers know it by, if not by host and port: the same for all authorities over one database."""
    tls_certificate: Path | None = None
    """PEM chain that names `host`; read again when the file changes, as cert-manager changes it."""
    tls_key: Path | None = None
    """Its private key, PEM, mode 0600."""
    node_ca: Path | None = None
    """A CA whose certificates also count as registered nodes', by their DNS name; beside Cloister's own."""
    region: str = Field(default="eu", min_length=1, max_length=63)
    """Where this machine is: the region of the node that `cloister up` registers for it."""
    blobs: dict[Annotated[str, Field(min_length=1, max_length=63)], str] = Field(default={}, max_length=100)
    """Where sealed files lie, by region: `file:///a/folder` or `s3://bucket/prefix?region=…`; data of another region is
    refused. Without it, the authority's folder takes those of every region."""
    keys: KeySettings = EmbeddedSettings()
    """The key service: our own in the authority's folder, or a Vault."""
    database: str | None = None
    """`postgresql://user@host:port/name`; without it, SQLite in the authority's folder."""
    database_password_file: Path | None = None
    database_ca: Path | None = None
    retention_check_s: float = Field(default=DEFAULT_INTERVAL_S, ge=1, le=86_400)
    """How often the authority looks for what is due, and for what an earlier erasure has left to do."""
    seals_per_minute: int = Field(default=DEFAULT_SEALS_PER_MINUTE, ge=1, le=100_000)
    """How often one owner may ask for sealing keys, open files and register versions, at one authority."""
    approvals: Required = Required()
    issuers: tuple[Issuer, ...] = ()
    witnesses: tuple[WitnessSettings, ...] = ()

    @property
    def on_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        if self.public_url:
            return self.public_url
        host = f"[{self.host}]" if ":" in self.host else self.host  # RFC 3986 section 3.2.2
        return f"https://{host}:{self.port}"

    def open_database(self) -> Database | None:
        """PostgreSQL, if it is named.

        Raises:
            InputError, UnavailableError: as `Database`.
        """
        if self.database is None:
            return None
        return Database(self.database, password_file=self.database_password_file, ca=self.database_ca)

    def federation(self) -> Federation | None:
        return Federation(self.issuers) if self.issuers else None

    def require_safe(self) -> None:
        """Refuse to listen on a network with what is meant for one machine.

        Raises:
            InputError: a host that is not loopback, without a certificate that names it.
        """
        if self.on_loopback and not self.tls_certificate:
            return
        if not self.tls_certificate or not self.tls_key:
            raise InputError(
                f"the authority does not listen on {self.host} without a TLS certificate of its own",
                "set authority.tls_certificate and authority.tls_key in config.yaml, or use --host 127.0.0.1",
            )
        from cloister.signing.certificates import covers

        try:
            certificate = self.tls_certificate.read_bytes()
            key_mode = self.tls_key.stat().st_mode
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read", "check the path in config.yaml") from error
        if not covers(certificate, self.host):
            raise InputError(f"the TLS certificate does not name {self.host}", "issue one whose SAN has that host")
        if key_mode & 0o077:
            raise InputError("the TLS key is open to others", f"chmod 600 {self.tls_key}")
