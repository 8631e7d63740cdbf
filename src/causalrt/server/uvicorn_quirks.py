"""Everything that overrides internals of uvicorn, whose protocol classes are no public API.

A test compares the source of the overridden classes with the digests below, so that a new version of uvicorn is noticed.
When it fails, read what changed in uvicorn, check the overrides, and update the digests.
"""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode
from websockets.protocol import State

from causalrt.server.admission import RateLimit
from causalrt.server.api_errors import ApiError
from causalrt.server.realtime import END

SOURCE_DIGESTS = {
    H11Protocol: "c2573d455fed4ec23b9bdae2dc7abef4b9a566936dc42d29e3c9bd2320d022c7",
    WebSocketsSansIOProtocol: "0bbcec98938432f71b93ca20eea63487298f4650159242db8526a6f664902997",
}
"""SHA-256 of the source of each overridden class, as of the version of uvicorn that the overrides were written for."""

PER_MINUTE = 3000
"""Frames or body chunks that a connection may send per minute, or at once after a quiet minute; parsing them takes 0.1 s."""
HEAD_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
LINGER_S = 5.0
"""Seconds that a client has to read the rest once its connection is being closed."""
MOST_PONG_BYTES = 16_384
"""Bytes of pongs that are queued for a client that reads nothing."""
PIECE_BYTES = 4096
"""Bytes that are parsed at a time: up to 682 frames."""
# uvicorn logs each handshake with its query; websockets logs the outcome, which is enough.
HANDSHAKES = logging.getLogger("uvicorn.error.handshakes")
HANDSHAKES.setLevel(logging.WARNING)


class FloodLimit:
    """Limits how many frames or chunks a connection sends.

    Sending empty ones costs a client nothing and needs no token, and the event loop serves nobody else while it parses them.
    """

    def __init__(self) -> None:
        self._rate = RateLimit(PER_MINUTE)

    def allows(self, count: int) -> bool:
        """Count `count` more; return whether they are within the limit."""
        try:
            for _ in range(count):
                self._rate.take("")
        except ApiError:
            return False
        return True


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, which knows how long it has been idle and limits the chunks of request bodies."""

    _idle_since = 0.0
    _unsent_bytes, _unsent_since = 0, 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take uvicorn's arguments. Requests are never logged, since their queries may hold tokens."""
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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the idle clock."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()

    def on_response_complete(self) -> None:
        """Restart the idle clock."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    @property
    def idle_since(self) -> float | None:
        """Event loop time since which the connection waits for a request; None while it answers a complete one."""
        answering = self._has_request and not (self.cycle.more_body and not self.cycle.response_started)
        return None if answering or self.transport.is_closing() else self._idle_since

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def end_if_late(self, *, head_s: float, stall_s: float) -> None:
        """Close the connection if no complete head arrived within `head_s`, or if the client read nothing for `stall_s`."""
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent_bytes:
            self._unsent_bytes, self._unsent_since = unsent, now
        elif now - self._unsent_since > stall_s:
            self.transport.abort()
        if not self._has_request and not self.transport.is_closing() and now - self._idle_since > head_s:
            if self.conn.trailing_data[0]:
                self.transport.write(HEAD_TIMED_OUT)
            self.transport.close()


class RealtimeProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection, made safe against clients that do not read or that flood the server.

    uvicorn itself answers every ping, closes a connection only after everything has been sent, and parses everything that one
    client has sent before it serves the others.
    """

    _pong_bytes = 0  # since the connection stopped being writable

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take uvicorn's arguments. Messages and queries may hold tokens, so they are not logged at any level."""
        super().__init__(*args, **kwargs)
        self.conn.debug = False
        self.logger = HANDSHAKES
        self._limit = FloodLimit()

    def data_received(self, data: bytes) -> None:
        """Parse in pieces, so that a flood is noticed before much of it is parsed."""
        for start in range(0, len(data), PIECE_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + PIECE_BYTES])
        if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn would wait forever
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def handle_events(self) -> None:
        """Close the connection of a client that sends too many frames: parsing takes time, and empty ones are cheap to send."""
        if self._limit.allows(len(self.conn.events)):
            super().handle_events()
            return
        self.conn.events.clear()
        if self.conn.state is State.OPEN:
            self.conn.fail(CloseCode.POLICY_VIOLATION, "too many messages, fragments or pings")
            self.handle_parser_exception()
        elif self.close_sent:
            self.transport.pause_reading()  # the client may still read the rest; the close timer ends the connection
        else:
            self.transport.abort()

    def handle_connect(self, event: Any) -> None:
        """Offer `_end` to the application as an ASGI extension."""
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope["extensions"][END] = self._end  # type: ignore[assignment]

    def send_receive_event_to_app(self) -> None:
        """Close the connection of a client whose text message is not UTF-8; uvicorn would log a traceback."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.fail(CloseCode.INVALID_DATA, "text that is not UTF-8")
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    async def send(self, message: Any) -> None:
        """Mark a refused handshake as complete; uvicorn would treat it as an error of the application."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True

    def handle_ping(self) -> None:
        """Answer a ping, but disconnect a client that keeps pinging and reads no answer: unread answers take memory."""
        if self.writable.is_set():
            super().handle_ping()
            return
        pongs = b"".join(self.conn.data_to_send())
        self._pong_bytes += len(pongs)
        if self._pong_bytes > MOST_PONG_BYTES:
            self.transport.abort()
        else:
            self.transport.write(pongs)

    def resume_writing(self) -> None:
        """Reset the count of unread pongs, since the client has read."""
        super().resume_writing()
        self._pong_bytes = 0

    def keepalive_timeout(self) -> None:
        """Drop the connection of a client that answers no ping, with whatever it has not read."""
        super().keepalive_timeout()
        self.transport.abort()

    def handle_close(self, event: Any) -> None:
        """Bound the wait for a client that closes the connection before it has read everything."""
        super().handle_close(event)
        self._linger()

    def handle_parser_exception(self) -> None:
        """Close after a protocol error; a connection whose handshake is incomplete is dropped at once."""
        if self.conn.close_sent is None:
            self.transport.abort()
            return
        super().handle_parser_exception()
        self._linger()

    async def run_asgi(self) -> None:
        """End the connection once the application has ended, however it ended."""
        await super().run_asgi()
        self._linger()

    def _linger(self) -> None:
        if self.transport.get_write_buffer_size():
            self.loop.call_later(LINGER_S, self.transport.abort)

    def _end(self, code: int, reason: str) -> None:
        """Queue a close frame behind the unsent data, and do not wait until it is sent."""
        if self.disconnected or self.close_sent or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:  # or the client's answer would not be seen
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(LINGER_S, self.transport.abort)
