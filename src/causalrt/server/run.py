"""Listening, and an end that loses nothing: SIGTERM drains, a second one does not wait."""

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode
from websockets.protocol import State

from causalrt.errors import RequestError
from causalrt.model.text.umt5 import PromptTokens
from causalrt.server.app import make_app
from causalrt.server.auth import Tokens
from causalrt.server.connections import Acceptor, HttpProtocol, connection_limit
from causalrt.server.engine_host import EngineLike
from causalrt.server.floods import FloodLimit
from causalrt.server.log_limit import limited_logs
from causalrt.server.realtime import END
from causalrt.server.services import FAREWELL_S, Services, make_services
from causalrt.server.settings import ServerSettings

log = logging.getLogger(__name__)

LINGER_S = 5.0  # that a reader has to take the last word
MOST_PONG_BYTES = 16_384  # written to a reader who reads nothing else
PIECE_BYTES = 4096  # parsed at a time: up to 682 frames
# uvicorn logs each handshake with its query; websockets logs the outcome, which is enough.
HANDSHAKES = logging.getLogger("uvicorn.error.handshakes")
HANDSHAKES.setLevel(logging.WARNING)


class RealtimeProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, for clients that do not read, or that flood the server.

    uvicorn answers every ping, closes once all is sent, or never, and parses all that one client has sent before it serves the
    others.
    """

    _pong_bytes = 0  # since the connection can be written no more

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As uvicorn makes it; but messages and queries, which may hold tokens, are not logged at any level."""
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
        if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn would wait for ever
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def handle_events(self) -> None:
        """Close the connection of a client that sends too many frames: each takes time, and empty ones cost it little."""
        if self._limit.allows(len(self.conn.events)):
            super().handle_events()
            return
        self.conn.events.clear()
        if self.conn.state is State.OPEN:
            self.conn.fail(CloseCode.POLICY_VIOLATION, "too many messages, fragments or pings")
            self.handle_parser_exception()
        elif self.close_sent:
            self.transport.pause_reading()  # what is unsent may still be read; the close timer ends the connection
        else:
            self.transport.abort()

    def handle_connect(self, event: Any) -> None:
        """Offer the way to the application, as an ASGI extension."""
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope["extensions"][END] = self._end  # type: ignore[assignment]

    def send_receive_event_to_app(self) -> None:
        """Close the connection of a client whose text is no text, without uvicorn's traceback in the log."""
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
        """Note that a refused handshake is complete, which uvicorn takes for an error of the application."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True

    def handle_ping(self) -> None:
        """Answer; but a client that pings on, and reads no answer, is cut off: what it leaves unread takes memory."""
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
        """It has read."""
        super().resume_writing()
        self._pong_bytes = 0

    def keepalive_timeout(self) -> None:
        """A client that answers no ping is gone; what it has not read goes nowhere."""
        super().keepalive_timeout()
        self.transport.abort()

    def handle_close(self, event: Any) -> None:
        """A client that closes may leave before it has read everything."""
        super().handle_close(event)
        self._linger()

    def handle_parser_exception(self) -> None:
        """So may one that sends what is no WebSocket; before the end of its handshake there is nothing to close."""
        if self.conn.close_sent is None:
            self.transport.abort()
            return
        super().handle_parser_exception()
        self._linger()

    async def run_asgi(self) -> None:
        """Whatever the application's end was, the connection has one, too."""
        await super().run_asgi()
        self._linger()

    def _linger(self) -> None:
        if self.transport.get_write_buffer_size():
            self.loop.call_later(LINGER_S, self.transport.abort)

    def _end(self, code: int, reason: str) -> None:
        """Close behind what is unsent, without waiting for it."""
        if self.disconnected or self.close_sent or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:  # or the client's answer would not be seen
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(LINGER_S, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn that limits its connections, drains before it ends, and ends with exit code 0."""

    _drain: asyncio.Task[None] | None = None
    _accepting: asyncio.Task[None] | None = None

    def __init__(self, config: uvicorn.Config, services: Services, *, max_connections: int) -> None:
        super().__init__(config)
        self.services = services
        self._max_connections = max_connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and accept connections ourselves where uvicorn would have asyncio do it."""
        assert sockets is not None
        (listening,) = sockets
        await super().startup([])
        make_protocol = functools.partial(
            HttpProtocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        acceptor = Acceptor(
            listening, make_protocol, self.server_state.connections, self.services.settings, limit=self._max_connections
        )
        self._accepting = asyncio.create_task(acceptor.run())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and end as uvicorn does."""
        if self._accepting is not None:
            self._accepting.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a further one ends at once."""
        asyncio.get_running_loop().call_soon_threadsafe(self.end, sig)

    def end(self, sig: int = signal.SIGTERM) -> None:
        """On the loop: what a signal does."""
        if self._drain is not None:
            self.should_exit = True
            if sig == signal.SIGINT:
                self.force_exit = True
            return
        self._drain = asyncio.create_task(self._drain_and_exit(self.services))

    async def _drain_and_exit(self, services: Services) -> None:
        try:
            await services.drain()
        finally:
            self.should_exit = True


def listen(host: str, port: int, *, send_buffer_bytes: int) -> socket.socket:
    """A listening socket; the connections that it accepts have its send buffer.

    Raises:
        RequestError: the address is taken, or is not ours.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise RequestError(f"cannot listen on {host}:{port}: {error}; choose another with --host and --port") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    return listening


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    engine: EngineLike,
    load: Callable[[], EngineLike],
    encode: Callable[[str], torch.Tensor],
    settings: ServerSettings,
    *,
    tokenize: Callable[[str], PromptTokens],
    tokens: Tokens,
    listening: socket.socket,
    version: str,
    on_start: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve until a signal; returns when everything has ended and the engine is closed.

    Args:
        engine: loaded; the server closes it.
        load: makes another one, if its ranks die.
        encode: prompt -> embeddings `[rows, text_dim]`.
        settings: limits and places.
        tokenize: prompt -> what `encode` reads of it; refuses, quickly, what `encode` would refuse.
        tokens: who may use it.
        listening: from `listen`.
        version: of the OpenAPI document.
        on_start: told the server before it starts.

    Raises:
        RequestError: the engine makes no frames, or the spool cannot be used.
        ConfigError: the process may not open enough files and sockets.
    """
    services = make_services(engine, load, encode, settings, tokens, tokenize=tokenize)
    try:
        app = make_app(services, version=version)
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws=RealtimeProtocol,
            ws_per_message_deflate=False,
            ws_max_size=settings.max_message_bytes,
            log_config=None,
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            timeout_graceful_shutdown=int(FAREWELL_S),
            lifespan="on",
        )
        server = Server(config, services, max_connections=connection_limit(settings))
        on_start(server)
        with limited_logs("uvicorn.error", Acceptor.__module__):
            await server.serve(sockets=[listening])
    finally:
        await services.close()  # a second SIGINT leaves the lifespan, which closes them, out
