"""Which key service, and how it is reached: the `authority.keys` part of config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cloister.stores.keys.embedded import EmbeddedKeys
from cloister.stores.keys.root import Passphrase
from cloister.stores.keys.service import KeyService

DEFAULT_TIMEOUT_S = 5.0
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$")]
SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EmbeddedSettings(_Part):
    """Our own, in the authority's folder."""

    kind: Literal["embedded"] = "embedded"
    passphrase: bool = False
    """Whether a passphrase seals the root key. Only a new key service can get one."""
    passphrase_file: Path | None = None
    """Where it is; else `$CLOISTER_PASSPHRASE_FILE`, else `cloister up` asks."""


class TokenLogin(_Part):
    """A token: in a file, as Vault Agent writes it, or `$VAULT_TOKEN`, or `~/.vault-token`."""

    kind: Literal["token"] = "token"
    token_file: Path | None = None


class AppRoleLogin(_Part):
    kind: Literal["approle"]
    role_id: Annotated[str, Field(min_length=1, max_length=200)]
    secret_id_file: Path
    mount: _Word = "approle"


class JwtLogin(_Part):
    """A workload's own token, read anew for each login. `kubernetes` reads the service account's."""

    kind: Literal["jwt", "kubernetes"]
    role: _Word
    jwt_file: Path = SERVICE_ACCOUNT_TOKEN
    mount: _Word | None = None


class VaultSettings(_Part):
    """Vault or OpenBao. What is not said here comes from `VAULT_ADDR` and its family (or `BAO_ADDR` and its)."""

    kind: Literal["vault"]
    address: Annotated[str, Field(pattern=r"^https?://[^\s/]+/?$", max_length=300)] | None = None
    namespace: _Word | None = None
    ca_certificate: Path | None = None
    """PEM. Then no other CA is trusted, the system's neither."""
    timeout_s: Annotated[float, Field(ge=0.1, le=60)] | None = None
    """For each use, with all that it takes; 5 if nothing else is said."""
    transit: _Word = "transit"
    kv: _Word = "secret"
    prefix: Annotated[str, Field(pattern=r"^[a-z][a-z0-9]{0,30}$")] = "cloister"
    """What the names of keys and secrets begin with: of each authority over the same state the same."""
    login: Annotated[TokenLogin | AppRoleLogin | JwtLogin, Field(discriminator="kind")] = TokenLogin()


KeySettings = Annotated[EmbeddedSettings | VaultSettings, Field(discriminator="kind")]


def open_keys(
    settings: EmbeddedSettings | VaultSettings, directory: Path, passphrase: Passphrase | None = None
) -> KeyService:
    """The key service that is named. `directory` is the embedded one's.

    Raises:
        InputError, IntegrityError, KeyServiceError: it cannot be opened, or not reached.
    """
    if isinstance(settings, VaultSettings):
        from cloister.stores.keys.vault import VaultKeys  # here, so that nobody else loads hvac

        return VaultKeys(settings)
    return EmbeddedKeys(directory, passphrase=passphrase if settings.passphrase else None)
