"""One answer from the browser of this machine (RFC 8252 section 7.3).

Guarantees: the port is on 127.0.0.1 and closes with the block; one GET of the redirect URI with our state is taken as
the answer and nothing else, so a page that guesses the port can neither slip in a code nor end the login; nothing is
written to a log.
"""

from __future__ import annotations

import secrets
import time
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cloister.errors import UnavailableError

PATH = "/callback"
MAX_FIELDS = 16
READ_TIMEOUT_S = 5
_TAKEN = b"Cloister has the answer. You can close this page.\n"
_REFUSED = b"This is not the answer that Cloister waits for.\n"


class _QuietServer(TCPServer):
    """Not `HTTPServer`, which would look up a name for 127.0.0.1 first."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news, and a traceback could hold the code."""


class Loopback:
    """The listener. `redirect_uri` is where the browser must come back to."""

    def __init__(self, state: str) -> None:
        """Open the port.

        Raises:
            UnavailableError: no port can be had.
        """
        self._state = state
        self._answer: dict[str, str] | None = None
        try:
            self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        except OSError:
            raise UnavailableError("no port on 127.0.0.1 can be opened", "use the device flow") from None
        self._host = f"127.0.0.1:{self._server.server_address[1]}"
        self.redirect_uri = f"http://{self._host}{PATH}"

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def wait(self, timeout_s: float) -> dict[str, str] | None:
        """The fields of the answer, or None if none came in time."""
        deadline = time.monotonic() + timeout_s
        while self._answer is None and (left := deadline - time.monotonic()) > 0:
            self._server.timeout = left
            self._server.handle_request()
        return self._answer

    def _take(self, target: str, host: str | None) -> bool:
        url = urlsplit(target)
        if self._answer is not None or url.path != PATH or host != self._host:
            return False  # another Host: a name that was made to point here (DNS rebinding)
        try:
            pairs = parse_qsl(url.query, max_num_fields=MAX_FIELDS)
        except ValueError:
            return False
        fields = dict(pairs)
        if len(fields) != len(pairs) or not secrets.compare_digest(
            fields.get("state", "").encode(), self._state.encode()
        ):
            return False
        self._answer = fields
        return True

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            timeout = READ_TIMEOUT_S
            server_version, sys_version = "Cloister", ""

            def do_GET(self) -> None:
                taken = take(self.path, self.headers.get("Host"))
                page = _TAKEN if taken else _REFUSED
                self.send_response(200 if taken else 400)
                for name, value in (
                    ("Content-Type", "text/plain; charset=utf-8"),
                    ("Content-Length", str(len(page))),
                    ("Cache-Control", "no-store"),
                    ("Referrer-Policy", "no-referrer"),
                    ("Content-Security-Policy", "default-src 'none'"),
                    ("Connection", "close"),
                ):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_: object) -> None:
                """The request line holds the code."""

        return Handler
