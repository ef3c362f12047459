"""The authority's process: `python -m cloister.authority DIRECTORY --host H --port P`. Started by `cloister up`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import ssl
import sys
import threading
from pathlib import Path

import uvicorn

from cloister.authority.api import create_app
from cloister.authority.service import Authority
from cloister.errors import CloisterError
from cloister.process import Daemon, describe


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--operator", required=True)
    parser.add_argument("--operator-key", type=Path, required=True)
    parser.add_argument("--tls-certificate", type=Path)
    parser.add_argument("--tls-key", type=Path)
    options = parser.parse_args()
    daemon = Daemon(options.directory / "daemon")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        authority = Authority(options.directory, url=f"https://{options.host}:{options.port}")
        authority.identities.bootstrap(options.operator, options.operator_key.read_text())
        certificate, key = (
            (options.tls_certificate, options.tls_key) if options.tls_certificate else authority.tls_files(options.host)
        )
    except CloisterError as error:
        daemon.report("failed", error=describe(error))
        return 1
    config = uvicorn.Config(
        create_app(authority),
        host=options.host,
        port=options.port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,  # a client that keeps its connection open must not hold up `cloister down`
        limit_concurrency=256,
    )
    config.load()
    assert config.ssl is not None  # noqa: S101  (a certificate was given)
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    authority.note("authority:start")
    _Server(config, daemon, authority).run()
    return 0


class _Server(uvicorn.Server):
    """Says `ready` once the port is really open, then warms what the first plan would have to wait for."""

    def __init__(self, config: uvicorn.Config, daemon: Daemon, authority: Authority) -> None:
        super().__init__(config)
        self._daemon = daemon
        self._authority = authority

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._daemon.report("ready", pid=os.getpid())
            threading.Thread(target=_warm, daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # Here and not after `run`, which ends with the signal that it was stopped by.
        self._authority.note("authority:stop")
        self._authority.close()


def _warm() -> None:
    from cloister.privacy import accounting

    accounting.warm()


if __name__ == "__main__":
    sys.exit(main())
