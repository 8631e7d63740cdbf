"""The ASGI application: routes, the request guard, and errors in one JSON shape."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from causalrt.server.api_errors import ApiError, bad_request
from causalrt.server.engine_host import EngineStatus
from causalrt.server.hosts import normal_origin
from causalrt.server.metrics import CONTENT_TYPE
from causalrt.server.realtime import realtime_routes
from causalrt.server.request_guard import Owner, RequestGuard
from causalrt.server.services import Services
from causalrt.server.videos import video_routes

KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class ErrorDetail(BaseModel):
    """Cause of an error, and the parameter that it concerns."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """An error in the shape of OpenAI's API."""

    error: ErrorDetail


class Health(BaseModel):
    """Status of the server, the reason if it is not ready, and the state of the engine (`EngineStatus`)."""

    status: str
    detail: str | None
    engine: str
    since: datetime
    tries: int
    next_try_s: float | None

    @classmethod
    def of(cls, status: str, engine: EngineStatus, detail: str | None) -> Self:
        """Combine the server's `status` with the status of its engine."""
        return cls(
            status=status,
            detail=detail,
            engine=engine.state,
            since=datetime.fromtimestamp(round(engine.since), UTC),
            tries=engine.tries,
            next_try_s=None if engine.next_try_s is None else round(engine.next_try_s, 1),
        )


def make_app(services: Services, *, version: str) -> FastAPI:
    """Make the ASGI application of `services`; its lifespan watches and closes them."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(services.watch())
        yield
        watch.cancel()
        await services.close()

    error_body = {"model": ErrorBody}
    app = FastAPI(
        title="CausalRT",
        version=version,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=dict.fromkeys((400, 401, 403, 404, 408, 409, 413, 415, 421, 429, 503), error_body),
        redirect_slashes=False,
    )
    app.state.tokens = services.tokens
    if services.settings.allowed_origins:
        app.add_middleware(
            _CrossOrigin,
            allow_origins=services.settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Range"],
            expose_headers=["Content-Range", "Retry-After"],
        )
    app.add_middleware(
        RequestGuard, settings=services.settings, count=lambda code: services.metrics.errors.labels(code).inc()
    )
    _handle_errors(app, services)
    app.include_router(video_routes(services))
    app.include_router(realtime_routes(services))
    _add_state_routes(app, services)
    _add_page(app)
    app.openapi = _openapi(app, with_tokens=services.tokens.wanted)  # type: ignore[method-assign]
    return app


class _CrossOrigin(CORSMiddleware):
    """Starlette's CORS middleware, which also accepts other spellings of an allowed origin."""

    def is_allowed_origin(self, origin: str) -> bool:
        try:
            return super().is_allowed_origin(normal_origin(origin))
        except ValueError:
            return False


def _handle_errors(app: FastAPI, services: Services) -> None:
    def answer(error: ApiError) -> JSONResponse:
        services.metrics.errors.labels(error.code).inc()
        return error.response()

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(bad_request(first["msg"], param=".".join(str(part) for part in first["loc"][1:])))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        response = answer(ApiError(error.status_code, codes.get(error.status_code, "invalid_request"), error.detail))
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(sorted(_methods(app, request)))
        return response

    @app.exception_handler(Exception)
    async def _internal(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "internal", "internal error; the server's log has the details"))


def _methods(app: FastAPI, request: Request) -> set[str]:
    """Return the methods that the path of a request supports; Starlette names those of only one of its routes."""
    found: set[str] = set()
    for method in ("GET", "HEAD", "POST", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] == Match.FULL for route in app.routes):
            found.add(method)
    return found


def _add_state_routes(app: FastAPI, services: Services) -> None:
    @app.get("/healthz", tags=["state"], summary="Liveness of the process, and the state of its engine")
    async def healthz() -> Health:
        engine = services.host.status
        return Health.of("alive", engine, engine.detail)

    @app.get(
        "/readyz", tags=["state"], summary="Readiness: whether requests are served", responses={503: {"model": Health}}
    )
    async def readyz(response: Response) -> Health:
        try:
            services.check_ready()
        except ApiError as error:
            response.status_code = 503
            return Health.of("not ready", services.host.status, error.message)
        return Health.of("ready", services.host.status, None)

    @app.get("/metrics", tags=["state"], summary="Metrics for Prometheus", response_class=Response)
    async def metrics(owner: Owner) -> Response:
        return Response(services.metrics.page(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = Path(str(files("causalrt.server") / "page"))
    static = StaticFiles(directory=folder, check_dir=False)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix not in KINDS:
            continue

        app.add_route(
            "/" if path.name == "index.html" else f"/{path.name}", _served(static, path), include_in_schema=False
        )


def _served(static: StaticFiles, path: Path) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that serves one file; a closure, because FastAPI turns extra arguments into query parameters."""

    async def page(request: Request) -> Response:
        response = static.file_response(path, path.stat(), request.scope)
        # Browsers revalidate the file each time, and get 304 as long as it is unchanged.
        response.headers["Cache-Control"] = "no-cache"
        if response.status_code == 200:
            response.headers["Content-Type"] = KINDS[path.suffix]
        return response

    return page


def _openapi(app: FastAPI, *, with_tokens: bool) -> Any:
    """Return a function that makes FastAPI's document without 422, which is never sent, and without unneeded tokens."""
    whole = app.openapi

    def document() -> dict[str, Any]:
        made = whole()
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                if not with_tokens:
                    operation.pop("security", None)
        return made

    return document
