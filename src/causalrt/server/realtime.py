"""`/v1/realtime`: streams a video over a WebSocket while it is being generated.

    client  auth, start, switch, pause, resume, stop       (JSON)
    server  ready, queued, started, <init segment>, { <fragments>, chunk }, ended     (JSON and fragmented MP4)

A connection runs one generation at a time. Everything that is sent passes through one queue, in order. At most
`max_queued_chunks` chunks are generated ahead of what the reader has taken.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from causalrt.server.admission import LeftError, Ticket
from causalrt.server.api_errors import ApiError, bad_request, busy, unauthorized
from causalrt.server.auth import bearer_token
from causalrt.server.generation import Control, GenerationRequest, Switch
from causalrt.server.realtime_messages import (
    Auth,
    Incoming,
    Outgoing,
    RealtimeOutput,
    Start,
    SwitchPrompt,
    parse,
)
from causalrt.server.services import DRAINING, Services

log = logging.getLogger(__name__)

UNAUTHORIZED, BUSY, TOO_SLOW, GOING_AWAY, INTERNAL, POLICY = 4401, 4429, 4408, 1001, 1011, 1008
END = "causalrt.end"
"""Name of the ASGI extension that closes a connection without waiting for its reader (`uvicorn_quirks.py`)."""
MOST_REPLIES = 256


@dataclass(kw_only=True, slots=True)
class _Generation:
    """A generation of a connection; `asked` is the time of its request, or None once its first frames are sent."""

    control: Control
    ticket: Ticket
    asked: float | None
    task: asyncio.Task[None] | None = None
    first_frame_ms: float | None = None
    cold_ms: float | None = None


def realtime_routes(services: Services) -> APIRouter:
    """Make the route of the WebSocket."""
    router = APIRouter()
    waiting: set[Connection] = set()  # not yet authenticated; they take no places of clients that are
    connected: set[Connection] = set()
    services.metrics.gauge("connections", "WebSockets that are open", lambda: len(connected))
    full = busy("the server has the maximum number of connections", retry_after_s=5)

    @router.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        connection = Connection(websocket, services)
        for place, step in ((waiting, connection.authenticate), (connected, connection.serve)):
            if len(place) >= services.settings.max_connections and not (place is waiting and connection.needs_no_wait):
                await connection.refuse(full)
                return
            place.add(connection)
            try:
                if not await step():
                    return
            finally:
                place.discard(connection)

    return router


class Connection:
    """The connection of one client, from its handshake to its end."""

    def __init__(self, websocket: WebSocket, services: Services) -> None:
        self._websocket = websocket
        self._services = services
        self._settings = services.settings
        self._inbox: asyncio.Queue[Incoming] = asyncio.Queue()
        self._queue: asyncio.Queue[tuple[Outgoing, _Generation | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._owner = ""
        self._generation: _Generation | None = None
        self._frames_sent = self._frames_made = 0
        self._close_with: tuple[int, str] | None = None

    @property
    def needs_no_wait(self) -> bool:
        """Whether authentication needs no message: the token is in a header, or none is needed."""
        return (
            not self._services.tokens.wanted or bearer_token(self._websocket.headers.get("authorization")) is not None
        )

    async def authenticate(self) -> bool:
        """Authenticate the client; return False after sending an error and closing the connection if that fails."""
        authenticated = asyncio.ensure_future(self._authenticated())
        draining = asyncio.ensure_future(self._services.draining.wait())
        try:
            await asyncio.wait([authenticated, draining], return_when=asyncio.FIRST_COMPLETED)
            if not authenticated.done():
                await self._close(GOING_AWAY, DRAINING)
                return False
            self._owner = authenticated.result()
        except ApiError as error:
            await self.refuse(error)
        except TimeoutError:
            await self._close(TOO_SLOW, "no token was sent in time")
        except WebSocketDisconnect:
            pass
        finally:
            authenticated.cancel()
            draining.cancel()
        return bool(self._owner)

    async def serve(self) -> bool:
        """Serve the client until it leaves or stalls, or the server ends."""
        with self._services.streaming():
            return await self._serve()

    async def _serve(self) -> bool:
        self._post(self._ready())
        tasks = [
            asyncio.create_task(self._send_all()),
            asyncio.create_task(self._receive_all()),
            asyncio.create_task(self._handle_all()),
            asyncio.create_task(self._end_when_draining()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None and not isinstance(error, WebSocketDisconnect):
                    log.error("a connection failed", exc_info=error)
                    self._close_with = self._close_with or (INTERNAL, "internal error")
        finally:
            self._stop("left")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._close_with is not None:
                await self._close(*self._close_with)
            await self._generated()
            self._services.metrics.dropped_frames.inc(self._frames_made - self._frames_sent)
        return True

    async def refuse(self, error: ApiError) -> None:
        """Send the error and close the connection."""
        self._services.metrics.errors.labels(error.code).inc()
        with contextlib.suppress(WebSocketDisconnect, TimeoutError, RuntimeError):
            async with asyncio.timeout(self._settings.stall_s):
                await self._websocket.send_json(error.realtime())
        await self._close(UNAUTHORIZED if error.status == 401 else BUSY, error.message)

    async def _authenticated(self) -> str:
        tokens = self._services.tokens
        header = bearer_token(self._websocket.headers.get("authorization"))
        if header is not None or not tokens.wanted:
            return tokens.owner(header)
        try:
            async with asyncio.timeout(self._settings.auth_s):
                message = await self._receive()
        except ApiError:
            raise unauthorized() from None
        if not isinstance(message, Auth):
            raise unauthorized()
        return tokens.owner(message.token)

    def _ready(self) -> dict[str, Any]:
        limits = self._services.limits
        return {
            "type": "ready",
            "width": limits.width,
            "height": limits.height,
            "fps": limits.fps,
            "mime": limits.mime,
            "max_prompt_chars": limits.max_prompt_chars,
            "max_chunks": limits.max_chunks,
            "about": limits.about,
            "examples": limits.examples,
        }

    # ---- incoming

    async def _receive(self) -> Incoming:
        """Receive the next message.

        Raises:
            ApiError: 400, it is not a valid message.
            WebSocketDisconnect: the client has disconnected.
        """
        received = await self._websocket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1005))
        return parse(received.get("text") or "")

    async def _receive_all(self) -> None:
        while True:
            try:
                self._inbox.put_nowait(await self._receive())
            except ApiError as error:
                self._answer_with(error)
            if max(self._inbox.qsize(), self._queue.qsize()) > MOST_REPLIES:
                self._close_with = POLICY, "too many messages whose answers are not read"
                return

    async def _handle_all(self) -> None:
        while True:
            message = await self._inbox.get()
            if message.type != "stop" and self._generation is not None and self._generation.control.reason is not None:
                await self._generated()  # it was stopped, so the message concerns the next one
            try:
                self._handle(message)
            except ApiError as error:
                self._answer_with(error)

    def _answer_with(self, error: ApiError) -> None:
        self._services.metrics.errors.labels(error.code).inc()
        self._post(error.realtime())

    def _handle(self, message: Incoming) -> None:
        services = self._services
        if isinstance(message, Auth):
            if services.tokens.owner(message.token) != self._owner:
                raise unauthorized()
            return
        running = self._generation
        if running is not None and (running.task is None or running.task.done()):
            running = None
        if isinstance(message, Start):
            if running is not None:
                raise bad_request("a generation is already running; stop it first, or switch its prompt")
            self._start(message)
        elif running is None:
            raise bad_request(f"there is no generation to {message.type}; send start first")
        elif isinstance(message, SwitchPrompt):
            cut_to = services.limits.check_prompt(message.prompt)
            services.rate.take(self._rate_key())
            running.control.switch(Switch(prompt=message.prompt, prompt_cut_to=cut_to, policy=message.policy))
        elif message.type == "stop":
            self._stop("stopped")
        else:
            running.control.pause(message.type == "pause")

    def _start(self, message: Start) -> None:
        services = self._services
        asked = time.perf_counter()
        services.check_ready()
        cut_to = services.limits.check_prompt(message.prompt)
        chunks = services.limits.checked_chunks(message.chunks)
        services.rate.take(self._rate_key())
        ticket = services.admission.enter()
        control = services.control(credit=self._settings.max_queued_chunks)
        request = GenerationRequest(prompt=message.prompt, prompt_cut_to=cut_to, seed=message.seed, num_chunks=chunks)
        known = services.limits.max_chunks if message.chunks is None else message.chunks
        self._generation = generation = _Generation(control=control, ticket=ticket, asked=asked)
        generation.task = asyncio.create_task(self._generate(generation, request, known))

    async def _generate(self, generation: _Generation, request: GenerationRequest, chunks: int | None) -> None:
        def post(item: Outgoing) -> None:  # called from the generation's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed, and so is the connection
                self._loop.call_soon_threadsafe(self._post, item, generation)

        try:
            while position := await generation.ticket.moved():
                self._post({"type": "queued", "position": position})
            output = RealtimeOutput(post, self._services.limits, f"rt_{secrets.token_hex(8)}", request, chunks)
            reason, made = await self._services.generator.run("realtime", request, generation.control, output)
            self._post({"type": "ended", "reason": reason, "chunks": made})
        except LeftError as left:
            self._post({"type": "ended", "reason": left.reason, "chunks": 0})
        except ApiError as error:
            self._post(error.realtime())
        finally:
            generation.ticket.leave()

    def _rate_key(self) -> str:
        if self._services.tokens.wanted:
            return self._owner
        client = self._websocket.client
        return client.host if client else "unknown"

    def _stop(self, reason: str) -> None:
        if self._generation is not None:
            self._generation.control.stop(reason)
            self._generation.ticket.give_up(reason)

    async def _generated(self) -> None:
        """Wait until no generation is running."""
        if self._generation is not None and self._generation.task is not None:
            await asyncio.wait([self._generation.task])

    # ---- outgoing

    def _post(self, item: Outgoing, generation: _Generation | None = None) -> None:
        if isinstance(item, dict) and item["type"] == "chunk":
            self._frames_made += item["frames"]
        self._queue.put_nowait((item, generation))

    async def _send_all(self) -> None:
        sent = True
        while sent:
            item, generation = await self._queue.get()
            if isinstance(item, bytes):
                sent = await self._send(item)
            elif isinstance(item, list):
                sent = await self._send_fragments(item, generation)
            elif item["type"] == "chunk" and generation is not None:
                sent = await self._send_chunk(item, generation)
            else:
                sent = await self._send(json.dumps(item))
            self._queue.task_done()

    async def _send_fragments(self, fragments: list[bytes], generation: _Generation | None) -> bool:
        for fragment in fragments:
            if not await self._send(fragment):
                return False
            if generation is not None and generation.asked is not None:
                seconds = time.perf_counter() - generation.asked
                generation.asked, generation.first_frame_ms = None, round(1e3 * seconds, 3)
                cold_s = self._services.metrics.first_frame_after("realtime", seconds)
                generation.cold_ms = None if cold_s is None else round(1e3 * cold_s, 3)
        return True

    async def _send_chunk(self, item: dict[str, Any], generation: _Generation) -> bool:
        if item["index"] == 0:
            item |= {"first_frame_ms": generation.first_frame_ms, "cold_ms": generation.cold_ms}
        if not await self._send(json.dumps(item)):
            return False
        self._frames_sent += item["frames"]
        generation.control.refund()
        return True

    async def _send(self, data: str | bytes) -> bool:
        """Send a message; return False, and stop the generation, if the reader does not take it within `stall_s`."""
        try:
            async with asyncio.timeout(self._settings.stall_s):
                if isinstance(data, str):
                    await self._websocket.send_text(data)
                else:
                    await self._websocket.send_bytes(data)
        except TimeoutError:
            log.warning("a reader took nothing for %g s and is disconnected", self._settings.stall_s)
            self._stop("stalled")
            self._close_with = TOO_SLOW, "nothing was read for too long"
            return False
        return True

    async def _end_when_draining(self) -> None:
        await self._services.draining.wait()
        await self._generated()
        await self._queue.join()
        self._close_with = GOING_AWAY, DRAINING

    async def _close(self, code: int, reason: str) -> None:
        """Close the connection, whether the client reads or not."""
        end = self._websocket.scope.get("extensions", {}).get(END)
        if end is not None:
            end(code, reason[:120])
            return
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._websocket.close(code, reason[:120])
