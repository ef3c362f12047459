"""Ports for servers of the tests."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """One that nobody has. It is below those that the kernel hands out, so it stays free until it is asked for."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
