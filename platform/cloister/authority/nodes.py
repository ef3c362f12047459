"""Nodes: the machines that workers and replicas run on, and their certificates.

Guarantees: a certificate lives 24 hours, names one registered node and is given only for that node's own key; a
connection counts as a node's only while its certificate is good and the node is not revoked. TLS itself has checked the
chain: the listener asks for a client certificate of the node CA, or of the CA that the site configured.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

from cryptography import x509
from sqlalchemy import Connection, select

from cloister.authority.core import PLATFORM, Caller, Core, Node
from cloister.authority.identity import add_identity, require_free
from cloister.canonical import b64
from cloister.errors import AuthenticationError, InputError
from cloister.signing import certificates
from cloister.stores.tables import identities

LIFETIME = timedelta(hours=24)
MAX_ASSURANCE = 3


@dataclass(frozen=True, slots=True)
class Peer:
    """A client certificate that TLS has verified. `names` are its DNS names; `thumbprint` as RFC 8705 section 3.1."""

    names: tuple[str, ...]
    expires: float
    thumbprint: str

    @classmethod
    def from_der(cls, certificate: bytes) -> Peer:
        """Raises: AuthenticationError: it names nobody."""
        return _parsed(certificate)


@lru_cache(maxsize=1024)
def _parsed(certificate: bytes) -> Peer:
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        raise AuthenticationError("the client certificate names nobody", "use one with a DNS name") from None
    digest = b64(hashlib.sha256(certificate).digest()).translate(str.maketrans("+/", "-_")).rstrip("=")
    return Peer(
        names=tuple(names.get_values_for_type(x509.DNSName)), expires=parsed.not_valid_after_utc.timestamp(),
        thumbprint=digest,
    )  # fmt: skip


def node_of(connection: Connection, peer: Peer, now: float) -> Node | None:
    """The node behind a certificate; None if it names none, or one that was revoked, or has expired meanwhile."""
    if now >= peer.expires:
        return None
    rows = connection.execute(select(identities).where(identities.c.name.in_(peer.names))).all()
    nodes = [row for row in rows if row.kind == "node" and not row.disabled]
    if len(nodes) != 1:
        return None
    attributes = nodes[0].attributes
    return Node(name=nodes[0].name, region=attributes["region"], assurance=attributes["assurance"])


class Nodes:
    """Registered nodes. `ca_key` and `ca_certificate` issue their certificates."""

    def __init__(self, core: Core, ca_key: bytes, ca_certificate: bytes) -> None:
        self._core = core
        self._ca_key = ca_key
        self._ca_certificate = ca_certificate

    def register(self, caller: Caller, name: str, public_key: str, region: str, assurance: int) -> dict[str, Any]:
        """Make a node known, by its public key.

        Raises:
            InputError: no such assurance level, or not a name for a node.
            ConflictError: the name or the key is taken.
        """
        with self._core.action(caller, "node:register", name=name[:63], region=region, assurance=assurance) as act:
            act.allow(PLATFORM)
            if not 0 <= assurance <= MAX_ASSURANCE:
                raise InputError(f"an assurance level is 0 to {MAX_ASSURANCE}", "0 is software only")
            require_free(name)
            attributes = {"region": region, "assurance": assurance}
            add_identity(
                act.connection, name, [], public_key, caller.name, self._core.clock(), kind="node",
                attributes=attributes,
            )  # fmt: skip
        return {"name": name, "region": region, "assurance": assurance}

    def certify(self, caller: Caller, request: bytes) -> dict[str, Any]:
        """A certificate of 24 hours for the calling node's TLS key.

        Raises:
            InputError: not a signing request.
        """
        with self._core.action(caller, "node:certify") as act:
            act.allow(PLATFORM)
            certificate = certificates.issue(
                self._ca_key, self._ca_certificate, request, hosts=(caller.name,), lifetime=LIFETIME
            )
        return {"certificate": certificate.decode()}
