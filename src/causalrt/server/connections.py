"""TCP connections: how many may be open, and how long one may hold its place without sending or reading anything.

uvicorn limits neither: its keep-alive time-out ends with the first byte of the next request, and a request head that never
ends is waited for without limit. asyncio's own servers accept connections until the process has no descriptor left, and then
log a traceback for each one that waits. So connections are accepted here, and handed to uvicorn's protocol.
"""

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from causalrt.errors import ConfigError
from causalrt.server.floods import ChunkLimitedProtocol
from causalrt.server.settings import ServerSettings

log = logging.getLogger(__name__)

DESCRIPTORS_KEPT = 64
"""File descriptors for all but connections: an engine that is loaded again, records of jobs, videos being written, logs."""
DESCRIPTORS_EACH = 2
"""File descriptors of a connection: its socket, and the file that it downloads."""
FEWEST = 8
SWEEP_S = 0.5
RETRY_S = 1.0
HEAD_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def connection_limit(settings: ServerSettings) -> int:
    """How many connections may be open: `max_tcp_connections`, or fewer where the descriptors would not suffice.

    Called once the engine is loaded, so that its descriptors are counted.

    Raises:
        ConfigError: the process may not open enough files and sockets to serve anybody.
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


class HttpProtocol(ChunkLimitedProtocol):
    """uvicorn's HTTP/1.1 connection, which knows for how long it has been idle."""

    _idle_since = 0.0
    _unsent_bytes, _unsent_since = 0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    @property
    def idle_since(self) -> float | None:
        """Since when it has waited for a request, by the event loop's clock; None while it answers one that is complete."""
        answering = self._has_request and not (self.cycle.more_body and not self.cycle.response_started)
        return None if answering or self.transport.is_closing() else self._idle_since

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def end_if_late(self, *, head_s: float, stall_s: float) -> None:
        """Close if no whole head has come for `head_s`, or if the client has read nothing for `stall_s`."""
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent_bytes:
            self._unsent_bytes, self._unsent_since = unsent, now
        elif now - self._unsent_since > stall_s:
            self.transport.abort()
        if not self._has_request and not self.transport.is_closing() and now - self._idle_since > head_s:
            if self.conn.trailing_data[0]:
                self.transport.write(HEAD_TIMED_OUT)
            self.transport.close()


class Acceptor:
    """Accepts connections, closes those that are late, and makes room for new ones when there are too many."""

    def __init__(
        self,
        listening: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: set[Any],
        settings: ServerSettings,
        *,
        limit: int,
    ) -> None:
        """Nothing is accepted before `run`.

        Args:
            listening: where clients connect.
            make_protocol: makes an `HttpProtocol` that joins `connections`.
            connections: the protocols of all open connections, WebSockets too (uvicorn's `ServerState.connections`).
            settings: times, and the proxies whose connections are those of many clients.
            limit: how many may be open; one address may have half of them.
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
            for step in (self._accept, self._end_late_ones):
                tasks.create_task(_for_ever(step))

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, address = await loop.sock_accept(self._listening)
        except ConnectionAbortedError:
            return
        if not self._make_room(address[0]):
            log.warning("a new connection was closed: there are as many as there may be, and none of them is idle")
            connection.close()
            return
        try:
            await loop.connect_accepted_socket(self._make_protocol, connection)
        except BaseException:
            connection.close()
            raise

    def _make_room(self, host: str) -> bool:
        """Whether a connection from this address may stay; one that is idle is closed for it if there are too many."""
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

    async def _end_late_ones(self) -> None:
        await asyncio.sleep(SWEEP_S)
        for connection in list(self._connections):
            if isinstance(connection, HttpProtocol):
                connection.end_if_late(head_s=self._settings.head_s, stall_s=self._settings.stall_s)


async def _for_ever(step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step without end, also after one that failed, for lack of descriptors or memory perhaps."""
    while True:
        try:
            await step()
        except Exception as error:
            log.error("connections could not be accepted or closed, next try in %g s: %s", RETRY_S, error)
            await asyncio.sleep(RETRY_S)
