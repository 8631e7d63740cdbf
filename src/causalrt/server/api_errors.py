"""Errors as clients see them: the shape that OpenAI's API has, and the codes of our WebSocket.

{"error": {"message": "...", "type": "invalid_request_error", "param": "size", "code": "invalid_value"}}
"""

import math
from typing import Any

from starlette.responses import JSONResponse

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
REALTIME_CODES = {400: "bad_request", 401: "unauthorized", 413: "too_large", 503: "not_ready"}


class ApiError(Exception):
    """Why a request is not served.

    Attributes:
        status: of HTTP.
        code: a short name of the cause.
        param: the field that is at fault, if one is.
        retry_after_s: when another try makes sense, if it does.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message.encode(errors="backslashreplace").decode()  # it may quote what no JSON can hold
        self.param = param
        self.retry_after_s = None if retry_after_s is None else max(1, math.ceil(retry_after_s))

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As HTTP."""
        headers = {"Cache-Control": "no-store"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)

    def realtime(self) -> dict[str, Any]:
        """As a message of the WebSocket."""
        code = self.code if self.status == 429 else REALTIME_CODES.get(self.status, "internal")
        return {"type": "error", "code": code, "message": self.message, "retry_after_s": self.retry_after_s}


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """What was asked cannot be done, however often it is asked."""
    return ApiError(400, code, message, param=param)


def unauthorized() -> ApiError:
    """No token, or an unknown one: it is not said which."""
    return ApiError(401, "invalid_token", "a valid bearer token is needed: Authorization: Bearer TOKEN")


def not_found(what: str) -> ApiError:
    """There is no such thing, or it is somebody else's."""
    return ApiError(404, "not_found", what)


def too_large(limit: int) -> ApiError:
    """The body has more bytes than are taken."""
    return ApiError(413, "too_large", f"the request's body may have {limit} bytes")


def busy(message: str, *, retry_after_s: float) -> ApiError:
    """Everything is taken, and the queue is full."""
    return ApiError(429, "busy", message, retry_after_s=retry_after_s)


def rate_limited(retry_after_s: float) -> ApiError:
    """One client asks too often."""
    return ApiError(
        429, "rate_limited", "too many generations in a short time; wait a little", retry_after_s=retry_after_s
    )


def not_ready(message: str, *, retry_after_s: float = 10) -> ApiError:
    """The server is starting, ending, or has lost its ranks."""
    return ApiError(503, "not_ready", message, retry_after_s=retry_after_s)
