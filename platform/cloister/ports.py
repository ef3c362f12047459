"""TCP ports for servers that are about to start.

Guarantees: while a port is reserved, the kernel gives it to nobody else, neither to a server that asks for any port
nor to an outgoing connection. A server that names the port and sets `SO_REUSEADDR` gets it (uvicorn, asyncio, gRPC and
PostgreSQL do). Until one listens there, connections are refused.
Does not guarantee anything against a program that names the same port and sets `SO_REUSEADDR` too.

How: a socket that is bound and does not listen. On Linux, two sockets that both have `SO_REUSEADDR` may have one port
as long as neither listens, and a bound port is never chosen for anybody else; socket(7).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def reserved_ports(count: int, host: str = LOOPBACK) -> Iterator[list[int]]:
    """`count` distinct ports of `host`, reserved until the block ends. A server that has taken one by then keeps it."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind((host, 0))
        yield [each.getsockname()[1] for each in sockets]
