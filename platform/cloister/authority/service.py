"""The authority as one plain object: opens or creates its keys and state, and wires the parts together.

Nothing here knows HTTP: `api` puts routes in front of it, tests call it directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from nacl.signing import SigningKey

from cloister.audit.checkpoint import verifier_key_text
from cloister.audit.event import Event
from cloister.authority.core import LOG_ORIGIN, Core
from cloister.authority.data import Datasets
from cloister.authority.endpoints import Endpoints
from cloister.authority.identity import Identities
from cloister.authority.log import Log
from cloister.authority.models import Models
from cloister.authority.runs import Runs
from cloister.errors import NotFoundError
from cloister.policy import Policy
from cloister.sealing.envelope import new_key
from cloister.sealing.lease import ReceivingKey
from cloister.signing import certificates, keys
from cloister.stores.blobs import FolderBlobs
from cloister.stores.database import Database
from cloister.stores.files import private_directory, write_atomic
from cloister.stores.keys import EmbeddedKeys, KeyService


class Authority:
    """One authority over `directory` (0700): `keys/`, `state.db`, `blobs/`, `ca.pem`, `tls.pem`, `tls.key`."""

    def __init__(self, directory: Path, *, url: str, clock: Callable[[], float] = time.time) -> None:
        private_directory(directory)
        self.directory = directory
        self.url = url
        service = EmbeddedKeys(directory / "keys")
        blobs = FolderBlobs.make(directory / "blobs")

        log_key = SigningKey(_secret(service, "log", new_key))
        receiving = ReceivingKey.from_seed(_secret(service, "receiving", new_key))
        release = keys.p256_from_pem(_secret(service, "release", lambda: keys.private_to_pem(keys.generate_p256())))
        token_pem = _secret(service, "tokens", lambda: keys.private_to_pem(keys.generate_ed25519()))
        token_public = keys.public_to_pem(keys.ed25519_from_pem(token_pem).public_key())
        ca_key = _secret(service, "ca", certificates.new_private_key)

        endpoint_ca_key = _secret(service, "endpoint-ca", certificates.new_private_key)
        self.ca_certificate = _file(directory / "ca.pem", lambda: certificates.new_ca(ca_key, "Cloister internal CA"))
        # A CA of their own, so that no endpoint can pass for the authority.
        self.endpoint_ca = _file(
            directory / "endpoint-ca.pem", lambda: certificates.new_ca(endpoint_ca_key, "Cloister endpoint CA")
        )
        self._ca_key = ca_key
        self.receiving_public = receiving.public
        self.release_public = keys.public_to_pem(release.public_key())
        self.token_public = token_public

        self.core = Core(
            database=Database(directory / "state.db"),
            keys=service,
            policy=Policy.shipped(),
            log_key=log_key,
            clock=clock,
        )
        self.core.require_anchored()
        self.log = Log(self.core, verifier_key_text(LOG_ORIGIN, bytes(log_key.verify_key)))
        write_atomic(directory / "log.pub", self.log.verifier_key.encode() + b"\n")
        self.identities = Identities(
            self.core,
            issuer=url,
            token_key=token_pem,
            token_key_id=keys.key_id(token_public),
            token_public=token_public,
        )
        self.datasets = Datasets(self.core, receiving, blobs.url)
        self.runs = Runs(self.core, blobs.url)
        self.models = Models(self.core, release, blobs)
        self.endpoints = Endpoints(self.core, self.models, endpoint_ca_key, self.endpoint_ca, blobs.url)

    def tls_files(self, host: str) -> tuple[Path, Path]:
        """A fresh certificate of the internal CA for the listener, and its key, as files in `directory`."""
        certificate, private = self.directory / "tls.pem", self.directory / "tls.key"
        key = certificates.new_private_key()
        hosts = tuple(dict.fromkeys((host, "127.0.0.1", "localhost")))
        write_atomic(private, key)
        write_atomic(
            certificate,
            certificates.issue(self._ca_key, self.ca_certificate, certificates.signing_request(key, host), hosts=hosts),
        )
        return certificate, private

    def note(self, action: str) -> None:
        """Put the authority's own coming and going on record."""
        self.core.record(
            Event(time=self.core.now_text(), actor="authority", action=action, resource="Platform/platform",
                  outcome="success", rule="itself", source="local", details={"url": self.url})
        )  # fmt: skip

    def close(self) -> None:
        self.core.database.close()


def _secret(service: KeyService, name: str, make: Callable[[], bytes]) -> bytes:
    try:
        return service.secret(name)
    except NotFoundError:
        service.store_secret(name, make())
        return service.secret(name)


def _file(path: Path, make: Callable[[], bytes]) -> bytes:
    if not path.exists():
        write_atomic(path, make())
    return path.read_bytes()
