"""Limits on what costs a client nothing and the server time: empty frames of a WebSocket, tiny chunks of a request's body.

Whoever sends them needs no token, and the event loop serves nobody else while it parses them.
"""

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from causalrt.runtime.server.admission import RateLimit
from causalrt.runtime.server.problems import Problem

PER_MINUTE = 3000
"""Of one connection, all of them at once if it has been quiet; they take about 0.1 s to parse."""


class FloodLimit:
    """Counts what one connection sends."""

    def __init__(self) -> None:
        self._rate = RateLimit(PER_MINUTE)

    def allows(self, count: int) -> bool:
        """Whether so many more are within the limit."""
        try:
            for _ in range(count):
                self._rate.take("")
        except Problem:
            return False
        return True


class ChunkLimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, cut off if it sends a body in too many chunks, answered or not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As uvicorn makes it; but requests, whose queries may hold tokens, are not logged, whoever listens."""
        super().__init__(*args, **kwargs)
        self.access_log = False
        self._limit = FloodLimit()
        self._next_event = self.conn.next_event
        self.conn.next_event = self._counted_event  # type: ignore[method-assign]

    def _counted_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = self._next_event()
        if isinstance(event, h11.Data) and not self._limit.allows(1):
            self.transport.abort()
            return h11.NEED_DATA
        return event
