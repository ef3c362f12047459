"""Reserved ports: nobody gets one by chance, and whoever was meant to gets it."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from cloister.ports import LOOPBACK, reserved_ports


def test_a_reserved_port_refuses_connections_until_its_server_listens() -> None:
    async def serve(port: int) -> None:
        server = await asyncio.start_server(lambda *_: None, LOOPBACK, port)
        socket.create_connection((LOOPBACK, port)).close()
        server.close()

    with reserved_ports(1) as (port,):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, port))
        asyncio.run(serve(port))


def test_nobody_who_asks_for_any_port_gets_a_reserved_one() -> None:
    """As if all others were taken: the range that the kernel chooses from is set to the reserved one (Linux 6.3)."""
    range_of_ports = getattr(socket, "IP_LOCAL_PORT_RANGE", 51)
    with reserved_ports(1) as (port,), socket.socket() as other:
        try:
            other.setsockopt(socket.IPPROTO_IP, range_of_ports, struct.pack("I", port << 16 | port))
        except OSError:
            pytest.skip("this kernel has no IP_LOCAL_PORT_RANGE")
        with pytest.raises(OSError, match="in use"):
            other.bind((LOOPBACK, 0))


def can_be_had(port: int) -> bool:
    """By somebody who wants it for themselves."""
    with socket.socket() as other:
        try:
            other.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def test_ports_are_distinct_and_given_back() -> None:
    with reserved_ports(8) as ports:
        assert len(set(ports)) == 8
        assert not any(map(can_be_had, ports))
    assert any(map(can_be_had, ports))  # somebody else may have some of them by now
