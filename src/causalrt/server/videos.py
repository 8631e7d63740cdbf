"""`/v1/videos`: video jobs in the form of OpenAI's API, with a seed."""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse

from causalrt.server.api_errors import ApiError, bad_request, not_found
from causalrt.server.job_store import Job
from causalrt.server.model_limits import MAX_SEED, ModelLimits, prompt_warnings
from causalrt.server.request_guard import Owner
from causalrt.server.services import Services

POLL_MS = 1000
SECONDS = r"[0-9]{1,5}(\.[0-9]{1,3})?"
NUMBER = r"[0-9]{1,32}(\.[0-9]{1,32})?([eE][+-]?[0-9]{1,3})?"  # of JSON, not negative
LEAST_SECONDS = 0.001
PROMPT = (
    r"^[^\x00-\x08\x0e-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x08\x0e-\x1f\x7f]*$"  # no control characters, and not blank
)
FIELDS = ("model", "prompt", "seconds", "size", "seed")


class VideoError(BaseModel):
    """Reason why a job has failed."""

    code: str
    message: str


class VideoWarning(BaseModel):
    """A deviation from the request; `prompt_cut` means that the prompt is longer than the model reads."""

    code: str
    message: str
    param: str


class Video(BaseModel):
    """A video job. Times are Unix times in seconds."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    seed: int
    remixed_from_video_id: None = None
    error: VideoError | None
    warnings: list[VideoWarning]


class VideoList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """Confirmation that a job was deleted."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def video_routes(services: Services) -> APIRouter:
    """Make the routes of video jobs."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])
    jobs, limits, settings = services.jobs, services.limits, services.settings

    @router.post(
        "", response_model=Video, openapi_extra={"requestBody": _request_body(limits)}, summary="Create a video"
    )
    async def create(request: Request, owner: Owner) -> Video:
        asked = time.perf_counter()
        services.check_ready()
        fields = await _fields(request, timeout_s=settings.body_s)
        prompt, seed, seconds = _checked(fields, limits)
        cut_to = limits.check_prompt(prompt)
        services.rate.take(owner if services.tokens.wanted else _address(request))
        return _video(
            jobs.submit(owner=owner, prompt=prompt, prompt_cut_to=cut_to, seed=seed, seconds=seconds, asked=asked)
        )

    @router.get("", response_model=VideoList, summary="List videos")
    async def list_all(
        owner: Owner,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[
            str | None, Query(max_length=64, description="id of the last video of the page before")
        ] = None,
    ) -> VideoList:
        found = jobs.owned(owner)
        if order == "desc":
            found.reverse()
        if after is not None:
            place = next((place for place, job in enumerate(found) if job.id == after), None)
            if place is None:
                raise not_found(f"there is no video {after!r} to continue after")
            found = found[place + 1 :]
        page = [_video(job) for job in found[:limit]]
        return VideoList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    @router.get("/{video_id}", response_model=Video, summary="Retrieve the state of a video")
    async def retrieve(video_id: str, owner: Owner, response: Response) -> Video:
        response.headers["openai-poll-after-ms"] = str(POLL_MS)
        return _video(jobs.get(video_id, owner))

    @router.delete("/{video_id}", response_model=VideoDeleted, summary="Delete a video, and stop its generation")
    async def delete(video_id: str, owner: Owner) -> VideoDeleted:
        jobs.delete(jobs.get(video_id, owner))
        return VideoDeleted(id=video_id)

    async def content(video_id: str, owner: Owner, variant: Literal["video"] = "video") -> Response:
        job = jobs.get(video_id, owner)
        if job.status == "failed":
            raise not_found(f"the video has failed: {job.error_message}")
        if job.status != "completed":
            raise ApiError(
                409,
                "video_not_ready",
                f"the video is {job.status}, {job.progress} % done",
                retry_after_s=POLL_MS / 1000,
            )
        path = jobs.video(job)
        try:
            found = path.stat()
        except FileNotFoundError:
            raise not_found("the video's file is gone") from None
        return FileResponse(path, media_type="video/mp4", filename=path.name, stat_result=found)

    mp4 = {"description": "The MP4, or the requested range of it", "content": {"video/mp4": {}}}
    router.add_api_route(
        "/{video_id}/content",
        content,
        methods=["GET"],
        response_class=FileResponse,
        responses={
            200: mp4,
            206: mp4,
            409: {"description": "Not complete yet"},
            416: {"description": "Range not satisfiable"},
        },
        summary="Download a video; range requests are supported",
    )
    router.add_api_route("/{video_id}/content", content, methods=["HEAD"], include_in_schema=False)
    return router


def _video(job: Job) -> Video:
    error = None
    if job.error_code is not None:
        error = VideoError(code=job.error_code, message=job.error_message or "")
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=job.progress,
        created_at=job.created_at,
        completed_at=job.completed_at,
        expires_at=job.expires_at,
        prompt=job.prompt,
        seconds=job.seconds,
        size=job.size,
        seed=job.seed,
        error=error,
        warnings=[VideoWarning(**warning) for warning in prompt_warnings(job.prompt_cut_to)],
    )


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


async def _fields(request: Request, *, timeout_s: float) -> Mapping[str, Any]:
    """Read the fields of a body, which is JSON or a form.

    Raises:
        ApiError: 400, 408, 413, 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(
            415, "unsupported_media_type", f"send application/json or multipart/form-data, got {kind[:64]!r}"
        )
    try:
        async with asyncio.timeout(timeout_s):
            if kind == "application/json":
                found = json.loads(await request.body())
                if not isinstance(found, dict):
                    raise bad_request("the body must be a JSON object")
                return found
            async with request.form(max_files=1) as form:
                items = form.multi_items()
    except TimeoutError:
        raise ApiError(408, "timeout", f"the body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise bad_request("the client disconnected before its request was complete") from None
    except HTTPException as error:
        raise bad_request(f"the form cannot be read: {error.detail}") from None
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {str(error) or type(error).__name__}") from None
    if len({name for name, _ in items}) < len(items):
        raise bad_request("a field occurs twice")
    return dict(items)


def _checked(fields: Mapping[str, Any], limits: ModelLimits) -> tuple[str, int, str]:
    """Return the prompt, seed and seconds of a request; a field that is null counts as absent, as for OpenAI's clients.

    Raises:
        ApiError: 400, naming the invalid field.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in FIELDS:
            raise bad_request(
                f"unknown parameter {name[:64]!r}; known are {', '.join(FIELDS)}",
                param=name[:64].encode("ascii", "backslashreplace").decode(),
                code="unknown_parameter",
            )
    if not isinstance(given.get("prompt"), str):
        raise bad_request("prompt must be a string", param="prompt")
    model = given.get("model", limits.model_name)
    if model != limits.model_name:
        raise bad_request(
            f"the only model of this server is {limits.model_name!r}", param="model", code="model_not_found"
        )
    if given.get("size", limits.size) != limits.size:
        raise bad_request(f"the only size of this server's videos is {limits.size}", param="size")
    return given["prompt"], _seed(given.get("seed", 0)), _seconds(given.get("seconds"), limits)


def _seed(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value, re.ASCII):  # from a form
        value = int(value)
    if isinstance(value, float) and value.is_integer() and value < 2**53:  # 1.0 is a whole number in JSON Schema
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise bad_request(f"seed must be a whole number from 0 to {MAX_SEED}", param="seed")
    return value


def _seconds(value: Any, limits: ModelLimits) -> str:
    """Return the seconds as text; the text of a plain number is unchanged."""
    if value is None:
        return limits.default_seconds
    text = str(value)
    number = float(text) if re.fullmatch(NUMBER, text) and not isinstance(value, bool) else 0.0
    if not LEAST_SECONDS <= number <= limits.max_seconds:
        raise bad_request(
            f"seconds must be a number from {LEAST_SECONDS} to {limits.max_seconds:g}, such as 4 or '4'",
            param="seconds",
        )
    return text if re.fullmatch(SECONDS, text) else f"{number:.3f}".rstrip("0").rstrip(".")


def _request_body(limits: ModelLimits) -> dict[str, Any]:
    """Return the schema of the request body for the OpenAPI document, with the limits of this server."""
    seed: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": MAX_SEED}
    text: dict[str, Any] = {"type": "string", "pattern": f"^{SECONDS}$"}
    number: dict[str, Any] = {"type": "number", "minimum": LEAST_SECONDS, "maximum": limits.max_seconds}
    prompt = {"type": "string", "minLength": 1, "maxLength": limits.max_prompt_chars, "pattern": PROMPT}
    about_seconds = {"description": f"at most {limits.max_seconds:g}", "default": limits.default_seconds}

    def schema(*null: dict[str, str]) -> dict[str, Any]:
        properties = {
            "prompt": prompt,
            "model": {"anyOf": [{"type": "string", "enum": [limits.model_name]}, *null]},
            "seconds": {"anyOf": [text, number, *null], **about_seconds},
            "size": {"anyOf": [{"type": "string", "enum": [limits.size]}, *null]},
            "seed": {"anyOf": [seed, *null], "default": 0},
        }
        others = null[0] if null else False
        return {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": others}

    return {
        "required": True,
        "content": {
            "application/json": {"schema": schema({"type": "null"})},
            "multipart/form-data": {"schema": schema()},  # forms have no null
        },
    }
