"""Whether other processes live, on any machine: a connection to each, which its system closes when the process ends.

The connections wait in the queue of a listening socket and are never accepted, so that a process which computes, or is
stopped for a while, needs to do nothing to count as alive.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import time
from collections.abc import Iterable, Sequence

WAITING = (BlockingIOError, InterruptedError)  # nothing to read: it lives
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # seconds, seconds, times: for lost machines
CONNECTING = 3.0  # seconds for all connections together, e.g. where a firewall answers none
Address = tuple[str, int]  # host, port; port 0 where there is none


class Lifeline:
    """What the others connect to: this process's listening socket. Without network none of them can."""

    def __init__(self, main_host: str, processes: int) -> None:
        self.address: Address = ("", 0)
        self.listener: socket.socket | None = None
        with contextlib.suppress(OSError):
            host = find_own_address(main_host)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self.listener = socket.create_server((host, 0), family=family, backlog=processes)
            self.address = host, self.listener.getsockname()[1]

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()


class Watch:
    """Connections to the other processes' lifelines. One that never came to be says nothing."""

    def __init__(self, addresses: Sequence[Address], own_rank: int) -> None:
        self.connections: dict[int, socket.socket] = {}
        for rank, address in enumerate(addresses):
            if rank != own_rank and address[1]:
                self.connections[rank] = start_connection(address)
        wait_until_made(self.connections.values())

    def list_ended(self) -> list[int]:
        """The ranks of processes that have ended."""
        ended: list[int] = []
        for rank, connection in list(self.connections.items()):
            try:
                alive = bool(connection.recv(1, socket.MSG_PEEK))
            except WAITING:
                continue
            except (ConnectionResetError, TimeoutError):
                alive = False
            except OSError:  # refused or unreachable: there is no such connection
                self.connections.pop(rank).close()
                continue
            if not alive:
                ended.append(rank)
        return ended

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()


def find_own_address(host: str) -> str:
    """This machine's address as the machine `host` sees it. OSError where there is no way to it."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # nothing is sent
        return probe.getsockname()[0]


def start_connection(address: Address) -> socket.socket:
    """A connection that is being made; nothing waits for it."""
    host, port = address
    connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connection.connect_ex((host, port))
    return connection


def wait_until_made(connections: Iterable[socket.socket]) -> None:
    """Until each connection is made or refused; those that are still being made then are left to it."""
    deadline = time.monotonic() + CONNECTING
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_WRITE)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(deadline - time.monotonic()):
                selector.unregister(key.fileobj)
