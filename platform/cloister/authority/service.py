"""The authority as one plain object: opens or creates its keys and state, and wires the parts together.

Nothing here knows HTTP: `api` puts routes in front of it, tests call it directly.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nacl.signing import SigningKey

from cloister.audit.checkpoint import verifier_key_text
from cloister.authority import ledger_seals
from cloister.authority.access import Access
from cloister.authority.approvals import Approvals, Required
from cloister.authority.attempts import Attempts
from cloister.authority.core import ITSELF, PLATFORM, Core
from cloister.authority.custody import Custody
from cloister.authority.data import Datasets
from cloister.authority.endpoints import Endpoints
from cloister.authority.ends import Ends
from cloister.authority.federation import Federation
from cloister.authority.identity import Identities
from cloister.authority.journal import LOG_ORIGIN, Journal
from cloister.authority.key_use import RELEASE
from cloister.authority.lifecycle import Lifecycle
from cloister.authority.log import Log
from cloister.authority.models import Models
from cloister.authority.nodes import LIFETIME, Nodes
from cloister.authority.overlap import Overlap
from cloister.authority.policies import Policies
from cloister.authority.registration import Registration
from cloister.authority.retention import DEFAULT_INTERVAL_S, Retention
from cloister.authority.runs import Runs
from cloister.authority.sessions import Sessions
from cloister.authority.shredding import Shredding
from cloister.authority.uploads import DEFAULT_SEALS_PER_MINUTE, Uploads
from cloister.authority.witness import Witnessing, WitnessSettings
from cloister.errors import ConflictError, NotFoundError
from cloister.sealing.envelope import new_key
from cloister.sealing.lease import ReceivingKey
from cloister.signing import certificates, keys
from cloister.stores.blobs import Stores
from cloister.stores.database import Database
from cloister.stores.files import private_directory, write_atomic
from cloister.stores.keys import EmbeddedKeys, KeyService


class Authority:
    """One authority over `directory` (0700): `keys/`, `state.db`, `blobs/`, CAs, `tls.pem`, `tls.key`."""

    def __init__(
        self,
        directory: Path,
        *,
        url: str,
        database: Database | None = None,
        issuers: Federation | None = None,
        witnesses: Sequence[WitnessSettings] = (),
        required: Required | None = None,
        blobs: Mapping[str, str] | None = None,
        key_service: KeyService | None = None,
        retention_check_s: float = DEFAULT_INTERVAL_S,
        seals_per_minute: int = DEFAULT_SEALS_PER_MINUTE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create it. `database` replaces `state.db`; `issuers` vouch for people and workloads from outside,
        `witnesses` cosign the log, `blobs` are the URLs of the stores by region, in place of the folder `blobs/`."""
        private_directory(directory)
        self.directory = directory
        self.url = url
        self.issuers = issuers.issuers if issuers else ()
        self.uploads = Uploads(seals_per_minute)
        service = key_service or EmbeddedKeys(directory / "keys")
        self._key_service = service
        self.stores = Stores(blobs or {}, directory / "blobs")

        log_key = SigningKey(_secret(service, "log", new_key))
        receiving = ReceivingKey.from_seed(_secret(service, "receiving", new_key))
        release = service.signer(RELEASE)
        self._ca_key, self.ca_certificate = _ca(service, "ca", "Cloister internal CA", directory)
        # A CA of their own, so that no endpoint can pass for the authority.
        endpoint_ca_key, self.endpoint_ca = _ca(service, "endpoint-ca", "Cloister endpoint CA", directory)
        node_ca_key, self.node_ca = _ca(service, "node-ca", "Cloister node CA", directory)
        self.receiving_public = receiving.public
        self.release_public = keys.public_to_pem(release.public_key())

        self.core = Core(
            database=database or Database(directory / "state.db"), keys=service, journal=Journal(log_key), clock=clock
        )
        self.core.require_anchored()
        self.custody = Custody(self.core)
        self.custody.finish()
        ledger_seals.adopt(self.core)
        verifier_key = verifier_key_text(LOG_ORIGIN, bytes(log_key.verify_key))
        opened = [witness.open(verifier_key) for witness in witnesses]
        self.log = Log(self.core, verifier_key, [key for key, _ in opened])
        self.witnessing = Witnessing(self.core, [witness for _, witness in opened if witness])
        write_atomic(directory / "log.pub", self.log.verifier_key.encode() + b"\n")
        self.identities = Identities(self.core, issuer=url)
        self.sessions = Sessions(self.core, issuer=url, issuers=issuers)
        self.nodes = Nodes(self.core, node_ca_key, self.node_ca)
        self.approvals = Approvals(self.core, required or Required())
        self.access = Access(self.core, self.approvals)
        self.policies = Policies(self.core, self.approvals)
        overlap = Overlap(self.approvals)
        self.datasets = Datasets(self.core, self.approvals, overlap, self.stores)
        self.shredding = Shredding(self.core, self.custody, self.stores)
        self.lifecycle = Lifecycle(self.core, self.approvals, self.custody, self.shredding)
        self.registration = Registration(self.core, receiving, self.stores, self.lifecycle, self.shredding, overlap)
        self.runs = Runs(self.core, self.approvals)
        self.attempts = Attempts(self.core, self.stores)
        self.ends = Ends(self.core, self.runs)
        self.retention = Retention(self.lifecycle, self.shredding, self.ends, retention_check_s)
        self.models = Models(self.core, self.approvals, self.stores)
        self.endpoints = Endpoints(self.core, self.sessions, self.models, endpoint_ca_key, self.endpoint_ca)

    def tls_files(self, host: str) -> tuple[Path, Path]:
        """A fresh certificate of a day for the listener, of the internal CA, and its key, as files in `directory`."""
        certificate, private = self.directory / "tls.pem", self.directory / "tls.key"
        key = certificates.new_private_key()
        hosts = tuple(dict.fromkeys((host, "127.0.0.1", "localhost")))
        write_atomic(private, key)
        write_atomic(
            certificate,
            certificates.issue(
                self._ca_key,
                self.ca_certificate,
                certificates.signing_request(key, host),
                hosts=hosts,
                lifetime=LIFETIME,
            ),
        )
        return certificate, private

    def note(self, action: str) -> None:
        """Put the authority's own coming and going on record."""
        self.core.record(ITSELF, action, PLATFORM, "success", "itself", url=self.url)

    def close(self) -> None:
        self.core.database.close()
        self._key_service.close()


def _secret(service: KeyService, name: str, make: Callable[[], bytes]) -> bytes:
    try:
        return service.secret(name)
    except NotFoundError:
        with contextlib.suppress(ConflictError):  # another authority was first
            service.store_secret(name, make())
        return service.secret(name)


def _ca(service: KeyService, name: str, title: str, directory: Path) -> tuple[bytes, bytes]:
    """Key and certificate of a CA, the same for all authorities over one key service; the certificate as a file too."""
    key = _secret(service, name, certificates.new_private_key)
    certificate = _secret(service, f"{name}-certificate", lambda: certificates.new_ca(key, title))
    file = directory / f"{name}.pem"
    if not file.exists() or file.read_bytes() != certificate:
        write_atomic(file, certificate)
    return key, certificate
