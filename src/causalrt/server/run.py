"""Runs the server: it listens, drains on SIGTERM or SIGINT, and ends at once on a second signal."""

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import torch
import uvicorn

from causalrt.errors import RequestError
from causalrt.model.text.umt5 import PromptTokens
from causalrt.runtime.engine import Engine
from causalrt.server.app import make_app
from causalrt.server.auth import Tokens
from causalrt.server.connections import Acceptor, connection_limit
from causalrt.server.log_limit import limited_logs
from causalrt.server.services import FAREWELL_S, Services, make_services
from causalrt.server.settings import ServerSettings
from causalrt.server.uvicorn_quirks import HttpProtocol, RealtimeProtocol

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A uvicorn server that limits its connections, drains before it ends, and ends with exit code 0."""

    _drain: asyncio.Task[None] | None = None
    _accepting: asyncio.Task[None] | None = None

    def __init__(self, config: uvicorn.Config, services: Services, *, max_connections: int) -> None:
        super().__init__(config)
        self.services = services
        self._max_connections = max_connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and accept connections with `Acceptor` instead of asyncio's server."""
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
        """Stop accepting connections, and shut down as uvicorn does."""
        if self._accepting is not None:
            self._accepting.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, end at once on a further one."""
        asyncio.get_running_loop().call_soon_threadsafe(self.end, sig)

    def end(self, sig: int = signal.SIGTERM) -> None:
        """Handle a signal on the event loop."""
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
    """Open a listening socket; accepted connections inherit the size of its send buffer.

    Raises:
        RequestError: the address is in use or not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise RequestError(f"cannot listen on {host}:{port}: {error}; choose another with --host and --port") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    return listening


def address(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    engine: Engine,
    load: Callable[[], Engine],
    encode: Callable[[str], torch.Tensor],
    settings: ServerSettings,
    *,
    tokenize: Callable[[str], PromptTokens],
    tokens: Tokens,
    listening: socket.socket,
    version: str,
    on_start: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve until a signal arrives; return once everything has ended and the engine is closed.

    Args:
        engine: a loaded engine, which the server closes.
        load: loads another engine if its ranks die.
        encode: maps a prompt to embeddings `[rows, text_dim]`.
        settings: limits, paths and times.
        tokenize: maps a prompt to the tokens that `encode` reads; it quickly refuses what `encode` would refuse.
        tokens: the tokens that give access.
        listening: socket returned by `listen`.
        version: version of the OpenAPI document.
        on_start: called with the server before it starts.

    Raises:
        RequestError: the engine has no VAE, or the spool cannot be used.
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
        await services.close()  # a second SIGINT skips the lifespan, which normally closes them
