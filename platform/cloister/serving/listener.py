"""A replica's own HTTPS port: uvicorn in a thread, TLS 1.3 only.

Guarantees: no plaintext port and no older TLS; several replicas of one node share the port (`SO_REUSEPORT`), and the
kernel stops sending connections to one that died at once; `stop` lets requests in flight finish. No access log: who
asked what is the audit log's matter.

Not guaranteed: that the port is ours alone. `SO_REUSEPORT` lets other processes of the same user bind it as well;
they cannot answer for us without the private key of the certificate, but they can take connections away.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from cloister.errors import InputError, UnavailableError

BACKLOG = 512
MAX_CONNECTIONS = 512  # connections and requests at once; more are answered 503 (uvicorn `limit_concurrency`)
DRAIN_S = 5
_START_TIMEOUT_S = 10.0


class Listener:
    """One ASGI app on one port, from construction until `stop`."""

    def __init__(self, app: Any, *, host: str, port: int, certificate: Path, key: Path) -> None:
        """Bind and answer.

        Raises:
            InputError: the certificate or its key is not usable.
            UnavailableError: the port is taken by something that does not share it.
        """
        context = _context(certificate, key)
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                ssl_context_factory=lambda _config, _default: context,
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                log_level="critical",  # its errors quote exceptions of the app
                server_header=False,
                proxy_headers=False,  # nothing stands in front that could be believed
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="cloister-https", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise UnavailableError("the HTTPS port did not open", "look at the replica's log")
            time.sleep(0.005)

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._thread.is_alive() and self._server.started and not self._server.should_exit

    def stop(self) -> None:
        """Accept nothing new, let requests in flight finish (at most `DRAIN_S`), close. May be called again."""
        self._server.should_exit = True
        self._thread.join(DRAIN_S + 2)
        self._socket.close()


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InputError("the endpoint's certificate is not usable", "deploy the endpoint again") from error
    return context


def _bind(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UnavailableError(
            f"port {port} on {host} cannot be had", "stop what uses it, or choose another"
        ) from error
    return listening
