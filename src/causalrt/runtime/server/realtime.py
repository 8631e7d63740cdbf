"""`/v1/realtime`: a video while it is generated, over a WebSocket.

    client  auth, start, switch, pause, resume, stop       (JSON)
    server  ready, queued, started, <init segment>, { <fragments>, chunk }, ended     (JSON and fragmented MP4)

One generation at a time on a connection. What goes out passes one queue, in order; a chunk is generated when the reader has
taken the ones before it, but for `max_queued_chunks`.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from causalrt.runtime.server.admission import LeftError
from causalrt.runtime.server.auth import bearer_token
from causalrt.runtime.server.generation import Control, Switch, Wish
from causalrt.runtime.server.offer import MAX_SEED
from causalrt.runtime.server.problems import Problem, bad_request, busy, unauthorized
from causalrt.runtime.server.services import DRAINING, Services
from causalrt.runtime.video_file import FragmentWriter, boxes

log = logging.getLogger(__name__)

UNAUTHORIZED, BUSY, TOO_SLOW, GOING_AWAY, INTERNAL, POLICY = 4401, 4429, 4408, 1001, 1011, 1008
END = "causalrt.end"
"""Name of the ASGI extension that ends a connection whose reader does not read (`run.py`)."""
MOST_REPLIES = 256
Outgoing = dict[str, Any] | list[bytes]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Auth(_Message):
    """The token, first of all."""

    type: Literal["auth"]
    token: str = Field(max_length=1024)


class Start(_Message):
    """Begin a generation."""

    type: Literal["start"]
    prompt: str
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    chunks: int | None = None


class SwitchPrompt(_Message):
    """Change its prompt."""

    type: Literal["switch"]
    prompt: str
    policy: Literal["keep", "recache", "flush"] = "keep"


class Plain(_Message):
    """Messages without fields."""

    type: Literal["pause", "resume", "stop"]


Incoming = Auth | Start | SwitchPrompt | Plain
_incoming: TypeAdapter[Incoming] = TypeAdapter(Annotated[Incoming, Field(discriminator="type")])


def realtime_routes(services: Services) -> APIRouter:
    """The route of the WebSocket."""
    router = APIRouter()
    waiting: set[Connection] = set()  # for their tokens: strangers take no places from those who have one
    connected: set[Connection] = set()
    services.metrics.gauge("connections", "WebSockets that are open", lambda: len(connected))
    full = busy("the server has as many connections as it takes", retry_after_s=5)

    @router.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        connection = Connection(websocket, services)
        for place, step in ((waiting, connection.authenticate), (connected, connection.serve)):
            if len(place) >= services.settings.max_connections:
                await connection.refuse(full)
                return
            place.add(connection)
            try:
                if not await step():
                    return
            finally:
                place.discard(connection)

    return router


class _RealtimeOutput:
    """Encodes chunks, and hands them to the connection's queue; called from a generation's thread."""

    def __init__(
        self, post: Callable[[Outgoing], None], services: Services, number: str, wish: Wish, chunks: int | None
    ) -> None:
        self._post = post
        self._offer = services.offer
        self._number = number
        self._wish = wish
        self._chunks = chunks
        self._writer: FragmentWriter | None = None

    def started(self, *, text_ms: float) -> None:
        offer = self._offer
        self._writer = FragmentWriter(height=offer.height, width=offer.width, fps=offer.fps)
        self._post(
            {
                "type": "started",
                "id": self._number,
                "seed": self._wish.seed,
                "chunks": self._chunks,
                "text_ms": round(text_ms, 3),
            }
        )
        self._post([self._writer.header])

    def write(self, frames: torch.Tensor) -> float:
        assert self._writer is not None
        begun = time.perf_counter()
        fragments = _split(self._writer.write(frames))
        encode_ms = 1e3 * (time.perf_counter() - begun)
        self._post(fragments)
        return encode_ms

    def chunk_done(self, *, index: int, frames: int, latency_ms: float, stages: dict[str, float | None]) -> None:
        rounded = {stage: None if ms is None else round(ms, 3) for stage, ms in stages.items()}
        self._post(
            {
                "type": "chunk",
                "index": index,
                "frames": frames,
                "latency_ms": round(latency_ms, 3),
                "stages": rounded,
            }
        )

    def paused(self, yes: bool) -> None:
        self._post({"type": "paused" if yes else "resumed"})

    def switched(self, *, ms: float, from_chunk: int, policy: str) -> None:
        self._post({"type": "switched", "ms": round(ms, 3), "from_chunk": from_chunk, "policy": policy})

    def refused(self, problem: Problem) -> None:
        self._post(problem.realtime())

    def finish(self) -> None:
        assert self._writer is not None
        if last := self._writer.close():
            self._post(_split(last))

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Connection:
    """One client, from its handshake to its end."""

    def __init__(self, websocket: WebSocket, services: Services) -> None:
        self._websocket = websocket
        self._services = services
        self._settings = services.settings
        self._queue: asyncio.Queue[Outgoing] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._owner = ""
        self._generation: asyncio.Task[None] | None = None
        self._control: Control | None = None
        self._give_up: Callable[[str], None] = lambda reason: None
        self._asked: float | None = None  # when the start came, until its first frames are sent
        self._frames_sent = self._frames_made = 0
        self._close_with: tuple[int, str] | None = None

    async def authenticate(self) -> bool:
        """Whether the client may stay; if not, it was told and the connection is closed."""
        try:
            self._owner = await self._authenticated()
        except Problem as problem:
            await self.refuse(problem)
        except TimeoutError:
            await self._close(TOO_SLOW, "no token came in time")
        except WebSocketDisconnect:
            pass
        return bool(self._owner)

    async def serve(self) -> bool:
        """Until the client leaves, stalls, or the server ends."""
        self._post(self._ready())
        tasks = [
            asyncio.create_task(self._send_all()),
            asyncio.create_task(self._receive_all()),
            asyncio.create_task(self._end_when_draining()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None and not isinstance(error, WebSocketDisconnect):
                    log.error("a connection failed", exc_info=error)
                    self._close_with = self._close_with or (INTERNAL, "the server has failed here")
        finally:
            self._stop("left")
            for task in tasks:
                task.cancel()
            if self._close_with is not None:
                await self._close(*self._close_with)
            if self._generation is not None:
                await asyncio.wait([self._generation])
            self._services.metrics.dropped_frames.inc(self._frames_made - self._frames_sent)
        return True

    async def refuse(self, problem: Problem) -> None:
        """Say why, and close."""
        self._services.metrics.problems.labels(problem.code).inc()
        with contextlib.suppress(WebSocketDisconnect, TimeoutError, RuntimeError):
            async with asyncio.timeout(self._settings.stall_s):
                await self._websocket.send_json(problem.realtime())
        await self._close(UNAUTHORIZED if problem.status == 401 else BUSY, problem.message)

    async def _authenticated(self) -> str:
        tokens = self._services.tokens
        header = bearer_token(self._websocket.headers.get("authorization"))
        if header is not None or not tokens.wanted:
            return tokens.owner(header)
        try:
            async with asyncio.timeout(self._settings.auth_s):
                message = await self._receive()
        except Problem:
            raise unauthorized() from None
        if not isinstance(message, Auth):
            raise unauthorized()
        return tokens.owner(message.token)

    def _ready(self) -> dict[str, Any]:
        offer = self._services.offer
        return {
            "type": "ready",
            "width": offer.width,
            "height": offer.height,
            "fps": offer.fps,
            "mime": offer.mime,
            "max_prompt_chars": offer.max_prompt_chars,
            "max_chunks": offer.max_chunks,
        }

    # ---- in

    async def _receive(self) -> Incoming:
        """The next message.

        Raises:
            Problem: 400, it is none of ours.
            WebSocketDisconnect: the client has left.
        """
        received = await self._websocket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1005))
        try:
            return _incoming.validate_json(received.get("text") or "")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"][1:])
            raise bad_request(f"{where}: {first['msg']}" if where else first["msg"]) from None

    async def _receive_all(self) -> None:
        while True:
            try:
                self._obey(await self._receive())
            except Problem as problem:
                self._services.metrics.problems.labels(problem.code).inc()
                self._post(problem.realtime())
            if self._queue.qsize() > MOST_REPLIES:
                self._close_with = POLICY, "too many messages, and their answers are not read"
                return

    def _obey(self, message: Incoming) -> None:
        services = self._services
        if isinstance(message, Auth):
            if services.tokens.owner(message.token) != self._owner:
                raise unauthorized()
            return
        running = self._generation is not None and not self._generation.done()
        if isinstance(message, Start):
            if running:
                raise bad_request("a generation runs already; stop it first, or switch its prompt")
            self._start(message)
        elif not running or self._control is None:
            raise bad_request(f"there is no generation to {message.type}; send start first")
        elif isinstance(message, SwitchPrompt):
            prompt = services.offer.checked_prompt(message.prompt)
            services.rate.take(self._rate_key())
            self._control.switch(Switch(prompt=prompt, policy=message.policy))
        elif message.type == "stop":
            self._stop("stopped")
        else:
            self._control.pause(message.type == "pause")

    def _start(self, message: Start) -> None:
        services = self._services
        asked = time.perf_counter()
        services.check_ready()
        prompt = services.offer.checked_prompt(message.prompt)
        chunks = services.offer.checked_chunks(message.chunks)
        services.rate.take(self._rate_key())
        ticket = services.admission.enter()
        self._asked = asked
        self._control = control = services.control(credit=self._settings.max_queued_chunks)
        self._give_up = ticket.give_up
        wish = Wish(prompt=prompt, seed=message.seed, num_chunks=chunks)
        known = services.offer.max_chunks if message.chunks is None else message.chunks

        async def generate() -> None:
            try:
                while position := await ticket.moved():
                    self._post({"type": "queued", "position": position})
                number = f"rt_{secrets.token_hex(8)}"
                output = _RealtimeOutput(self._post_from_thread, services, number, wish, known)
                reason, made = await services.generator.run("realtime", wish, control, output)
                self._post({"type": "ended", "reason": reason, "chunks": made})
            except LeftError as left:
                self._post({"type": "ended", "reason": left.reason, "chunks": 0})
            except Problem as problem:
                self._post(problem.realtime())
            finally:
                ticket.leave()

        self._generation = asyncio.create_task(generate())

    def _rate_key(self) -> str:
        if self._services.tokens.wanted:
            return self._owner
        client = self._websocket.client
        return client.host if client else "unknown"

    def _stop(self, reason: str) -> None:
        if self._control is not None:
            self._control.stop(reason)
        self._give_up(reason)

    # ---- out

    def _post(self, item: Outgoing) -> None:
        if isinstance(item, dict) and item["type"] == "chunk":
            self._frames_made += item["frames"]
        self._queue.put_nowait(item)

    def _post_from_thread(self, item: Outgoing) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to send to
            self._loop.call_soon_threadsafe(self._post, item)

    async def _send_all(self) -> None:
        first_frame_ms: float | None = None
        while True:
            item = await self._queue.get()
            if isinstance(item, list):
                for number, part in enumerate(item):
                    if not await self._send(part):
                        return
                    if self._asked is not None and number == 0 and part[4:8] == b"moof":
                        first_frame_ms = 1e3 * (time.perf_counter() - self._asked)
                        self._asked = None
                        self._services.metrics.first_frame.labels("realtime").observe(first_frame_ms / 1e3)
                continue
            if item["type"] == "chunk" and item["index"] == 0 and first_frame_ms is not None:
                item["first_frame_ms"] = round(first_frame_ms, 3)
            if not await self._send(json.dumps(item)):
                return
            if item["type"] == "chunk":
                self._frames_sent += item["frames"]
                assert self._control is not None
                self._control.refund()

    async def _send(self, data: str | bytes) -> bool:
        """Whether the reader has taken it within `stall_s`; if not, it is given up."""
        try:
            async with asyncio.timeout(self._settings.stall_s):
                if isinstance(data, str):
                    await self._websocket.send_text(data)
                else:
                    await self._websocket.send_bytes(data)
        except TimeoutError:
            log.warning("a reader took nothing for %g s and is given up", self._settings.stall_s)
            self._stop("stalled")
            self._close_with = TOO_SLOW, "nothing was read for too long"
            return False
        return True

    async def _end_when_draining(self) -> None:
        await self._services.draining.wait()
        if self._generation is not None:
            await asyncio.wait([self._generation])
        await self._sent()
        self._close_with = GOING_AWAY, DRAINING

    async def _sent(self) -> None:
        """Return when the queue is empty, or its reader was given up."""
        while not self._queue.empty():
            await asyncio.sleep(0.01)

    async def _close(self, code: int, reason: str) -> None:
        """Close, whether the client reads or not."""
        end = self._websocket.scope.get("extensions", {}).get(END)
        if code == TOO_SLOW and end is not None:
            end(code, reason)
            return
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._websocket.close(code, reason[:120])


def _split(data: bytes) -> list[bytes]:
    """Fragments (moof and mdat, and what ends the file) as messages of their own."""
    parts: list[bytes] = []
    for name, payload in boxes(data):
        box = (len(payload) + 8).to_bytes(4, "big") + name.encode("latin-1") + payload
        if name == "mdat" and parts:
            parts[-1] += box
        else:
            parts.append(box)
    return parts
