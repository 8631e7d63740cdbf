"""Errors as clients see them: in the JSON shape of OpenAI's API, or with the codes of the WebSocket API.

{"error": {"message": "...", "type": "invalid_request_error", "param": "size", "code": "invalid_value"}}
"""

import math
from typing import Any

from starlette.responses import JSONResponse

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
REALTIME_CODES = {400: "bad_request", 401: "unauthorized", 413: "too_large", 503: "not_ready"}


class ApiError(Exception):
    """A request that is refused or has failed.

    Attributes:
        status: HTTP status code.
        code: short name of the cause.
        param: name of the invalid field, if there is one.
        retry_after_s: seconds after which a retry makes sense; None if it does not.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message.encode(
            errors="backslashreplace"
        ).decode()  # it may quote characters that JSON cannot hold
        self.param = param
        self.retry_after_s = None if retry_after_s is None else max(1, math.ceil(retry_after_s))

    def body(self) -> dict[str, Any]:
        """Return the error as a JSON body."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        headers = {"Cache-Control": "no-store"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)

    def realtime(self) -> dict[str, Any]:
        """Return the error as a WebSocket message."""
        code = self.code if self.status == 429 else REALTIME_CODES.get(self.status, "internal")
        return {"type": "error", "code": code, "message": self.message, "retry_after_s": self.retry_after_s}


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error of an invalid request, which a retry does not help."""
    return ApiError(400, code, message, param=param)


def unauthorized() -> ApiError:
    """Return the error of a missing or unknown token; it does not say which of the two."""
    return ApiError(401, "invalid_token", "a valid bearer token is needed: Authorization: Bearer TOKEN")


def not_found(what: str) -> ApiError:
    """Return the error of a resource that does not exist or belongs to another client."""
    return ApiError(404, "not_found", what)


def too_large(limit: int) -> ApiError:
    """Return the error of a body that exceeds `limit` bytes."""
    return ApiError(413, "too_large", f"the body of a request may have at most {limit} bytes")


def busy(message: str, *, retry_after_s: float) -> ApiError:
    """Return the error of a server whose capacity is exhausted."""
    return ApiError(429, "busy", message, retry_after_s=retry_after_s)


def rate_limited(retry_after_s: float) -> ApiError:
    """Return the error of a client that exceeds its rate limit."""
    return ApiError(
        429, "rate_limited", "too many generations in a short time; wait a little", retry_after_s=retry_after_s
    )


def not_ready(message: str, *, retry_after_s: float = 10) -> ApiError:
    """Return the error of a server that is starting, shutting down, or has lost its ranks."""
    return ApiError(503, "not_ready", message, retry_after_s=retry_after_s)
