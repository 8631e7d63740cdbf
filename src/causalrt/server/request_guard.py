"""What every request passes first: the name it calls the server by, its origin, its size, and whose it is.

A page of another site must not use a server on somebody's own machine: its requests carry its `Origin`, and names that it has
made to point here (DNS rebinding) are not ours. What is refused here has not been read.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from causalrt.server.api_errors import ApiError, too_large
from causalrt.server.hosts import is_loopback, normal_host, normal_origin
from causalrt.server.settings import ServerSettings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


async def _owner(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
) -> str:
    owner: str = request.app.state.tokens.owner(None if credentials is None else credentials.credentials)
    return owner


Owner = Annotated[str, Depends(_owner)]
"""Whose request it is; 401 if it is nobody's."""


class RequestGuard:
    """ASGI middleware, outermost."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, count: Callable[[str], None]) -> None:
        """`count` is told the code of each refusal."""
        self._app = app
        self._count = count
        self._max_body_bytes = settings.max_body_bytes
        self._origins = frozenset(settings.allowed_origins)
        self._hosts = frozenset(map(normal_host, (*settings.allowed_hosts, settings.host)))
        self._any_host = not settings.allowed_hosts and not settings.on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with a limited body and secured headers."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._refusal(scope, headers)
        if problem is not None:
            self._count(problem.code)
        if scope["type"] == "websocket":
            if problem is not None:
                await problem.response()(scope, receive, send)  # the handshake is answered with it
                return
            await self._app(scope, receive, send)
            return

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    out.setdefault(name, value)
                out.setdefault("Cache-Control", "no-store")
            await send(message)

        if problem is not None:
            await problem.response()(scope, receive, send_secured)
            return
        await self._app(scope, self._limited(receive), send_secured)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._any_host and not self._is_ours(host):
            return ApiError(
                421,
                "wrong_host",
                "this server is not called by that name; call it localhost, or start it with --allow-host",
            )
        origin = headers.get("origin")
        safe = scope["type"] == "http" and scope["method"] in SAFE_METHODS
        if origin and not safe and not self._is_allowed(origin, host):
            return ApiError(
                403, "wrong_origin", "pages of other origins may not use this server (--allow-origin lets them)"
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            return too_large(self._max_body_bytes)
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = normal_host(host)
        except ValueError:
            return False
        return name in self._hosts or is_loopback(name)

    def _is_allowed(self, origin: str, host: str) -> bool:
        try:
            given = normal_origin(origin)
            return given in self._origins or given == normal_origin(f"{given.partition('://')[0]}://{host}")
        except ValueError:
            return False

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body_bytes:
                raise too_large(self._max_body_bytes)
            return message

        return limited
