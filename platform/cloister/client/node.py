"""The node that this process runs on: its own key, and the certificate of a day that the authority gives it for that.

Guarantees: the private keys never leave the folder (0700); the certificate is renewed at half its life, by whichever
process needs it first; who uses it sees a new one without a restart.

    node.json   name, and which authority           node.key   the node's own Ed25519 key (PKCS #8 PEM)
    tls.key     the key of the certificate          tls.pem    the certificate
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloister.errors import CloisterError, NotFoundError
from cloister.signing import certificates, keys
from cloister.stores.files import locked, private_directory, read_json, write_atomic, write_json

RENEW_BELOW = 0.5
NODE_VARIABLE = "CLOISTER_NODE"
_HINT = "an operator runs: cloister node add NAME --region REGION"


@dataclass(frozen=True, slots=True)
class NodeFolder:
    """Where a node keeps what it is."""

    directory: Path

    @property
    def exists(self) -> bool:
        return (self.directory / "node.json").is_file()

    @property
    def name(self) -> str:
        """Raises: NotFoundError: this machine is no node."""
        return str(read_json(self.directory / "node.json", what="node on this machine", hint=_HINT)["name"])

    def make(self, name: str) -> str:
        """Become the node `name`; returns its public key (PEM), for registering it. Made already: the same again."""
        private_directory(self.directory)
        key = self.directory / "node.key"
        if not key.exists():
            write_atomic(key, keys.private_to_pem(keys.generate_ed25519()))
        write_json(self.directory / "node.json", {"name": name})
        return keys.public_to_pem(keys.ed25519_from_pem(key.read_bytes()).public_key()).decode()

    def private_key(self) -> bytes:
        try:
            return (self.directory / "node.key").read_bytes()
        except OSError as error:
            raise NotFoundError("this machine has no node's key", _HINT) from error

    def load_into(self, context: ssl.SSLContext, certify: Callable[[bytes], bytes]) -> int:
        """Have `context` present the certificate, renewed by `certify(signing request)` if it is time.

        Returns a number that changes with the certificate.

        Raises:
            CloisterError: there is none that is good, and `certify` failed.
        """
        certificate, key = self.directory / "tls.pem", self.directory / "tls.key"
        with locked(self.directory / "lock"):  # one process renews; nobody reads certificate and key of two makes
            left = self._left()
            if left < RENEW_BELOW:
                try:
                    self._renew(certify)
                except CloisterError:
                    if left <= 0:
                        raise
            try:
                context.load_cert_chain(certificate, key)
            except ssl.SSLError:  # somebody died between writing the two
                self._renew(certify)
                context.load_cert_chain(certificate, key)
            return certificate.stat().st_mtime_ns

    def _left(self) -> float:
        try:
            return certificates.remaining((self.directory / "tls.pem").read_bytes())
        except OSError:
            return 0.0

    def _renew(self, certify: Callable[[bytes], bytes]) -> None:
        key = certificates.new_private_key()
        certificate = certify(certificates.signing_request(key, self.name))
        write_atomic(self.directory / "tls.key", key)
        write_atomic(self.directory / "tls.pem", certificate)


def present_node(directory: str | None) -> NodeFolder | None:
    """The node of this machine: `$CLOISTER_NODE`, or `directory`; None if there is none."""
    place = os.environ.get(NODE_VARIABLE) or directory
    folder = NodeFolder(Path(place)) if place else None
    return folder if folder and folder.exists else None
