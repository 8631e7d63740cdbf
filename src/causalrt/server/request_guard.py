"""Checks that every request passes first: the host name, the origin, the size of the body, and the token.

A web page of another site must not be able to use a server on its visitor's machine: its requests carry its `Origin`, and
a host name that it points here by DNS rebinding is not among the allowed ones. The body of a refused request is never read.
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
"""Name of the client whose token the request carries; 401 without a valid token."""


class RequestGuard:
    """The outermost ASGI middleware."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, count: Callable[[str], None]) -> None:
        """`count` is called with the error code of each refused request."""
        self._app = app
        self._count = count
        self._max_body_bytes = settings.max_body_bytes
        self._origins = frozenset(settings.allowed_origins)
        self._hosts = frozenset(map(normal_host, (*settings.allowed_hosts, settings.host)))
        self._any_host = not settings.allowed_hosts and not settings.on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on with a limited body and security headers."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            self._count(refusal.code)
        if scope["type"] == "websocket":
            if refusal is not None:
                await refusal.response()(scope, receive, send)  # sent as the answer to the handshake
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

        if refusal is not None:
            await refusal.response()(scope, receive, send_secured)
            return
        await self._app(scope, self._limited(receive), send_secured)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._any_host and not self._is_ours(host):
            return ApiError(
                421,
                "wrong_host",
                "this server does not answer to that host name; use localhost, or start it with --allow-host",
            )
        origin = headers.get("origin")
        safe = scope["type"] == "http" and scope["method"] in SAFE_METHODS
        if origin and not safe and not self._is_allowed(origin, host):
            return ApiError(
                403, "wrong_origin", "pages of other origins may not use this server unless --allow-origin names them"
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
