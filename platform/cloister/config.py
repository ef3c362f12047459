"""Settings, from `config.yaml` in Cloister's home. Every one has a default that is safe on one machine.

authority:
  host: 127.0.0.1        anything else needs `tls_certificate` and `tls_key` of your own
  port: 8470
  tls_certificate: …     PEM chain that names `host`
  tls_key: …             its private key, PEM, mode 0600
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cloister.errors import InputError
from cloister.stores.home import Home

DEFAULT_PORT = 8470


class AuthoritySettings(BaseModel):
    """Where the authority listens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    port: int = Field(default=DEFAULT_PORT, ge=1, le=65535)
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    @property
    def on_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

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


class Settings(BaseModel):
    """All settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    authority: AuthoritySettings = AuthoritySettings()

    @classmethod
    def load(cls, home: Home) -> Settings:
        """Read `config.yaml`; without one, the defaults.

        Raises:
            InputError: unknown or wrong settings, by name.
        """
        try:
            return cls.model_validate(yaml.safe_load(home.config_file.read_text()) or {})
        except FileNotFoundError:
            return cls()
        except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
            place = ".".join(str(p) for p in error.errors()[0]["loc"]) if isinstance(error, ValidationError) else "YAML"
            raise InputError(f"{home.config_file} is not valid: {place}", "see the README's settings") from None
