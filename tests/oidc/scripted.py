"""An issuer that says what a test wants, over real HTTPS: for what no honest provider would say."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from cloister.signing import certificates
from oidc.provider import AUDIENCE

METADATA = "/.well-known/openid-configuration"


class ScriptedIssuer:
    """An HTTPS server that says what the test wants. `asked` are the paths of its requests."""

    def __init__(self, folder: Path) -> None:
        ca_key, key = certificates.new_private_key(), certificates.new_private_key()
        ca = certificates.new_ca(ca_key, "scripted")
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(ca)
        chain = certificates.issue(ca_key, ca, certificates.signing_request(key, "scripted"), hosts=("127.0.0.1",))
        (folder / "server.pem").write_bytes(key + chain)
        self.asked: list[str] = []
        self.drips = False  # whether 100 blanks follow each answer, one every 20 ms
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                outer.asked.append(self.path)
                status, headers, body = outer.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) + 1000 * outer.drips))
                self.end_headers()
                self.wfile.write(body)
                if outer.drips:
                    self._drip()

            def _drip(self) -> None:
                for _ in range(1000):
                    time.sleep(0.02)
                    try:
                        self.wfile.write(b" ")
                    except OSError:
                        return

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.key = ECKey.generate_key("P-256", {"kid": "k1"})
        self.serve(self.key)

    def serve(self, *keys: Any, **metadata: Any) -> None:
        fields = {"issuer": self.url, "jwks_uri": f"{self.url}/jwks"} | metadata
        self.says(METADATA, **fields)
        self.says("/jwks", keys=[key.as_dict(private=False) for key in keys])

    def says(self, path: str, **fields: Any) -> None:
        self.answers[path] = (200, {}, json.dumps(fields).encode())

    def token(self, key: Any = None, *, typ: str = "at+jwt", **claims: Any) -> str:
        now = int(time.time())
        body = {"iss": self.url, "sub": "rita", "aud": AUDIENCE, "iat": now, "exp": now + 300} | claims
        key = key or self.key
        return jwt.encode({"alg": "ES256", "typ": typ, "kid": key.kid}, body, key, ["ES256"])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedIssuer]:
    issuer = ScriptedIssuer(tmp_path)
    yield issuer
    issuer.close()
