"""The endpoint directory: all that a replica is told, as files that only its user can read.

    endpoint.json   which model, which authority, which port          `EndpointConfig`
    trust.json      the pinned keys that everything is checked with   `Trust`
    endpoint.key    this endpoint's own Ed25519 key (PKCS #8 PEM), with which it speaks to the authority
    tls.crt, tls.key   the certificate chain and key of the HTTPS port

Guarantees: a Serve application holds the path of this directory and nothing else, because Ray writes constructor
arguments to its logs and database; `open_endpoint` refuses a directory or key that others could read or write.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cloister.errors import InputError, NotFoundError
from cloister.signing.tokens import INFERENCE_AUDIENCE
from cloister.stores.files import private_directory, write_atomic

CONFIG_FILE, TRUST_FILE, KEY_FILE = "endpoint.json", "trust.json", "endpoint.key"
CA_FILE, CERTIFICATE_FILE, CERTIFICATE_KEY_FILE = "ca.pem", "tls.crt", "tls.key"
_HINT = "deploy the endpoint again: cloister serve deploy"

Name = Annotated[str, Field(min_length=1, max_length=128)]


class EndpointConfig(BaseModel):
    """What a replica serves and where. Public facts only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["cloister.dev/endpoint/v1"] = "cloister.dev/endpoint/v1"
    endpoint: Name
    model: Name
    authority_url: Annotated[str, Field(pattern=r"^https://")]
    authority_ca: str
    """Path of the certificate authority's PEM; relative paths start at the endpoint directory."""
    node: str | None = None
    """The folder of the node that replicas run on; `$CLOISTER_NODE` of a replica's machine goes first."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)]
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    decimals: Annotated[int, Field(ge=0, le=6)] = 2
    quota_block: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Rows to ask for at once: more means fewer calls, and more stranded by a crash."""


class Trust(BaseModel):
    """What a replica believes without asking anybody."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    release_key: str
    """P-256 SPKI PEM."""
    required_approvals: Annotated[int, Field(ge=1)]
    token_issuer: Name
    token_audience: Name = INFERENCE_AUDIENCE
    token_keys: Annotated[dict[str, str], Field(min_length=1)]
    """Key id to Ed25519 SPKI PEM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An endpoint directory that was read and found in order. Holds paths of secrets, no secret."""

    directory: Path
    config: EndpointConfig
    trust: Trust

    @property
    def key_path(self) -> Path:
        return self.directory / KEY_FILE

    @property
    def certificate_path(self) -> Path:
        return self.directory / CERTIFICATE_FILE

    @property
    def certificate_key_path(self) -> Path:
        return self.directory / CERTIFICATE_KEY_FILE

    @property
    def authority_ca_path(self) -> Path:
        return self.directory / self.config.authority_ca


def open_endpoint(directory: Path) -> Endpoint:
    """Read an endpoint directory.

    Raises:
        NotFoundError: a file is missing.
        InputError: a file breaks its format, or others than the owner could read or change a secret.
    """
    _require_private(directory, 0o077)
    for name in (KEY_FILE, CERTIFICATE_KEY_FILE):
        _require_private(directory / name, 0o077)
    return Endpoint(
        directory=directory,
        config=_read(EndpointConfig, directory / CONFIG_FILE),
        trust=_read(Trust, directory / TRUST_FILE),
    )


def write_endpoint(
    directory: Path,
    *,
    endpoint: str,
    model: str,
    authority_url: str,
    authority_ca: bytes,
    node: str,
    port: int,
    replicas: int,
    quota_block: int,
    info: Mapping[str, Any],
    endpoint_key: bytes,
    tls_certificate: bytes,
    tls_key: bytes,
) -> Endpoint:
    """Make the directory of a new endpoint. `info` is the authority's `/v1/info`, read over its pinned TLS."""
    private_directory(directory)
    config = EndpointConfig(
        endpoint=endpoint, model=model, authority_url=authority_url, authority_ca=CA_FILE, node=node, port=port,
        replicas=replicas, quota_block=quota_block,
    )  # fmt: skip
    trust = Trust(
        release_key=info["release_public_key"],
        required_approvals=info["required_approvals"],
        token_issuer=info["issuer"],
        token_keys=info["token_public_keys"],
    )
    for name, content in (
        (CA_FILE, authority_ca),
        (CONFIG_FILE, config.model_dump_json(indent=2).encode()),
        (TRUST_FILE, trust.model_dump_json(indent=2).encode()),
        (KEY_FILE, endpoint_key),
        (CERTIFICATE_FILE, tls_certificate),
        (CERTIFICATE_KEY_FILE, tls_key),
    ):
        write_atomic(directory / name, content)
    return open_endpoint(directory)


def _require_private(path: Path, forbidden: int) -> None:
    try:
        status = path.lstat()
    except OSError:
        raise NotFoundError(f"the endpoint has no {path.name}", _HINT) from None
    if status.st_uid != os.getuid() or status.st_mode & forbidden or stat.S_ISLNK(status.st_mode):
        raise InputError(f"{path.name} of the endpoint is open to others than its owner", "chmod go= it, or " + _HINT)


Model = TypeVar("Model", bound=BaseModel)


def _read(kind: type[Model], path: Path) -> Model:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError:
        raise NotFoundError(f"the endpoint has no {path.name}", _HINT) from None
    except ValidationError as error:
        fields = ", ".join(sorted({str(part["loc"][0]) for part in error.errors() if part["loc"]})) or "all of it"
        raise InputError(f"{path.name} of the endpoint is wrong in: {fields}", _HINT) from None
