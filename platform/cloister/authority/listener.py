"""The authority's port: TLS 1.3, client certificates of nodes, and certificates that are renewed while it runs.

Guarantees: a client certificate is asked for and, where one is given, checked against the node CAs before a byte of
HTTP is read; the application is told which one (`gate.PEER`) by the TLS layer alone, never by a header; the server's
own certificate is replaced at half its life, or when its file changes, without a restart.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloister.authority import accountant
from cloister.authority.api import create_app
from cloister.authority.gate import PEER
from cloister.authority.service import Authority
from cloister.authority.settings import AuthoritySettings
from cloister.errors import CloisterError, InputError
from cloister.signing import certificates

RENEW_CHECK_S = 30.0
SILENCE_S = 10.0
_log = logging.getLogger("cloister.authority")


class _Protocol(H11Protocol):
    """HTTP over one TLS connection, whose client certificate goes with every request.

    Whoever connects and says nothing is let go of, so that a few silent strangers cannot take all the places.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(SILENCE_S, self._end_silence)
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls else None
        application = self.app

        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            await application({**scope, PEER: certificate}, receive, send)

        self.app = with_peer

    def _end_silence(self) -> None:
        if self.cycle is None and not self.transport.is_closing():  # not one whole request head yet
            self.transport.close()


class Listener(uvicorn.Server):
    """Serves `authority` until it is told to stop. `on_ready` is called once the port is open."""

    def __init__(self, authority: Authority, settings: AuthoritySettings, on_ready: Callable[[], None]) -> None:
        """Prepare; nothing listens yet.

        Raises:
            InputError: a certificate, its key or a CA cannot be used.
        """
        self._authority = authority
        self._settings = settings
        self._on_ready = on_ready
        self._stopping = threading.Event()
        if not settings.tls_certificate:
            authority.tls_files(settings.host)
        certificate, key = self._files()
        config = uvicorn.Config(
            create_app(authority),
            host=settings.host,
            port=settings.port,
            http=_Protocol,
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
            ws="none",
            proxy_headers=False,  # nothing stands in front that could be believed: the log says who really called
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=3,  # a client that keeps its connection open must not hold up `cloister down`
            limit_concurrency=256,
        )
        try:
            config.load()
            assert config.ssl is not None  # noqa: S101  (a certificate was given)
            self._tls = config.ssl
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_3
            self._tls.verify_mode = ssl.CERT_OPTIONAL
            # CERT_OPTIONAL means: none, or a good one. Nothing else of the system's trust store counts here.
            self._tls.load_verify_locations(cadata=authority.node_ca.decode())
            if settings.node_ca:
                self._tls.load_verify_locations(cafile=str(settings.node_ca))
        except (OSError, ssl.SSLError) as error:
            raise InputError("a TLS certificate, key or CA of the authority cannot be used", "check config.yaml") from (
                error
            )
        super().__init__(config)
        self._loaded = self._stamp()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            threading.Thread(target=self._renew_for_ever, daemon=True, name="certificates").start()
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        accountant.shared.refuse_all()  # who waits for a plan is told why it does not come
        await super().shutdown(sockets)
        # Here and not after `run`, which ends with the signal that it was stopped by.
        self._authority.witnessing.stop()
        self._authority.retention.stop()
        self._authority.note("authority:stop")
        self._authority.close()

    def renew(self) -> bool:
        """Take a new certificate if it is time, or if the site's file changed. True if one was taken."""
        if self._settings.tls_certificate:
            if self._stamp() == self._loaded:
                return False
        elif certificates.remaining(self._files()[0].read_bytes()) > 0.5:
            return False
        else:
            self._authority.tls_files(self._settings.host)
        certificate, key = self._files()
        self._tls.load_cert_chain(certificate, key)  # for connections from now on
        self._loaded = self._stamp()
        return True

    def _renew_for_ever(self) -> None:
        while not self._stopping.wait(RENEW_CHECK_S):
            try:
                self.renew()
            except (OSError, ssl.SSLError, CloisterError) as error:
                _log.error("the certificate was not renewed: %s", type(error).__name__)

    def _files(self) -> tuple[Path, Path]:
        if self._settings.tls_certificate and self._settings.tls_key:
            return self._settings.tls_certificate, self._settings.tls_key
        return self._authority.directory / "tls.pem", self._authority.directory / "tls.key"

    def _stamp(self) -> tuple[int, ...]:
        certificate = self._settings.tls_certificate or self._authority.directory / "tls.pem"
        status = certificate.stat()  # follows links: cert-manager swaps those
        return status.st_mtime_ns, status.st_ino, status.st_size
