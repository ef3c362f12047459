"""Ports for servers of the tests."""

from __future__ import annotations

import contextlib

from cloister.ports import reserved_ports

_KEPT = contextlib.ExitStack()


def free_port() -> int:
    """One that nobody has, and nobody gets by chance, as long as this process lives: for a server that names it."""
    (port,) = _KEPT.enter_context(reserved_ports(1))
    return port
