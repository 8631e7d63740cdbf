"""TCP connections: how many may be open, and how long one may stay open without sending or reading anything.

uvicorn limits neither: its keep-alive timeout stops at the first byte of the next request, and it waits forever for a request
head that never ends. asyncio's own servers accept connections until the process runs out of file descriptors, and then log a
traceback for each connection that waits. So connections are accepted here and handed to uvicorn's protocol.
"""

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from causalrt.errors import ConfigError
from causalrt.server.settings import ServerSettings
from causalrt.server.uvicorn_quirks import HttpProtocol

log = logging.getLogger(__name__)

DESCRIPTORS_KEPT = 64
"""File descriptors reserved for everything but connections: a reloaded engine, job records, videos being written, logs."""
DESCRIPTORS_EACH = 2
"""File descriptors per connection: its socket, and the file that it downloads."""
FEWEST = 8
SWEEP_S = 0.5
RETRY_S = 1.0


def connection_limit(settings: ServerSettings) -> int:
    """Return how many connections may be open: `max_tcp_connections`, or fewer if there are too few file descriptors.

    Call it once the engine is loaded, so that the engine's descriptors are counted.

    Raises:
        ConfigError: the process may not open enough files and sockets to serve any client.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return settings.max_tcp_connections
    fitting = (most - len(os.listdir("/proc/self/fd")) - DESCRIPTORS_KEPT) // DESCRIPTORS_EACH
    if fitting < FEWEST:
        wanted = most + DESCRIPTORS_EACH * (FEWEST - fitting)
        raise ConfigError(
            f"the process may open {most} files and sockets, which is too few for a server; allow at least {wanted} "
            "(ulimit -n, or LimitNOFILE= in a systemd unit)"
        )
    if fitting < settings.max_tcp_connections:
        log.warning(
            "at most %d connections at once instead of %d: the process may open %d files and sockets (ulimit -n)",
            fitting,
            settings.max_tcp_connections,
            most,
        )
    return min(fitting, settings.max_tcp_connections)


class Acceptor:
    """Accepts connections, closes those that time out, and closes idle ones to make room when there are too many."""

    def __init__(
        self,
        listening: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: set[Any],
        settings: ServerSettings,
        *,
        limit: int,
    ) -> None:
        """Prepare to accept connections; `run` starts it.

        Args:
            listening: the listening socket.
            make_protocol: makes an `HttpProtocol` that joins `connections`.
            connections: the protocols of all open connections, WebSockets included (uvicorn's `ServerState.connections`).
            settings: timeouts, and the trusted proxies, whose connections carry many clients.
            limit: maximum number of open connections; one address may have half of them.
        """
        self._listening = listening
        self._make_protocol = make_protocol
        self._connections = connections
        self._settings = settings
        self._limit = limit
        listening.setblocking(False)

    async def run(self) -> None:
        """Accept connections until this is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for step in (self._accept, self._close_late_connections):
                tasks.create_task(_forever(step))

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, address = await loop.sock_accept(self._listening)
        except ConnectionAbortedError:
            return
        if not self._make_room(address[0]):
            log.warning(
                "a new connection was closed: the maximum number of connections is open, and none of them is idle"
            )
            connection.close()
            return
        try:
            await loop.connect_accepted_socket(self._make_protocol, connection)
        except BaseException:
            connection.close()
            raise

    def _make_room(self, host: str) -> bool:
        """Return whether a new connection from `host` may stay; the longest idle one is closed if there are too many."""
        rivals = list(self._connections)
        full = len(rivals) >= self._limit
        if host not in self._settings.trusted_proxies:
            same = [rival for rival in rivals if rival.client is not None and rival.client[0] == host]
            if len(same) >= -(-self._limit // 2):
                rivals, full = same, True
        if not full:
            return True
        idle = [rival for rival in rivals if isinstance(rival, HttpProtocol) and rival.idle_since is not None]
        if idle:
            min(idle, key=lambda rival: rival.idle_since or 0.0).transport.abort()
        return bool(idle)

    async def _close_late_connections(self) -> None:
        await asyncio.sleep(SWEEP_S)
        for connection in list(self._connections):
            if isinstance(connection, HttpProtocol):
                connection.end_if_late(head_s=self._settings.head_s, stall_s=self._settings.stall_s)


async def _forever(step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step forever, also after a failure, such as a lack of file descriptors or memory."""
    while True:
        try:
            await step()
        except Exception as error:
            log.error("connections could not be accepted or closed, next try in %g s: %s", RETRY_S, error)
            await asyncio.sleep(RETRY_S)
