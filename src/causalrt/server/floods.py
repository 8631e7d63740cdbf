"""Limits on what costs the server time and a client nothing: empty frames of a WebSocket, tiny chunks of a request's body.

Whoever sends them needs no token, and the event loop serves nobody else while it parses them.
"""

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from causalrt.server.admission import RateLimit
from causalrt.server.api_errors import ApiError

PER_MINUTE = 3000
"""How many one connection may send, all of them at once if it has been quiet; to parse so many takes about 0.1 s."""


class FloodLimit:
    """Counts what one connection sends."""

    def __init__(self) -> None:
        self._rate = RateLimit(PER_MINUTE)

    def allows(self, count: int) -> bool:
        """Whether so many more are within the limit."""
        try:
            for _ in range(count):
                self._rate.take("")
        except ApiError:
            return False
        return True


class ChunkLimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, cut off if it sends a body in too many chunks, answered or not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes uvicorn's arguments. Requests are never logged, since their queries may hold tokens."""
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
