"""A server that speaks the real-time protocol and draws its own moving pictures, one chunk when the test says so.

It stands in for `causalrt serve` where a test has to decide what happens next: a busy server, a lost connection, a chunk that
does not come. Its video is real H.264 in fragmented MP4.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse

import causalrt.server
from causalrt.media.video_file import FragmentWriter
from causalrt.server.request_guard import SECURITY_HEADERS

PAGE = Path(causalrt.server.__file__).parent / "page"


def pictures(first: int, count: int, *, height: int, width: int, prompt: str) -> npt.NDArray[np.uint8]:
    """Frames `first` on, uint8 [count, height, width, 3]: hills under a sun that moves, or under a moon: the prompt says."""
    x = np.linspace(0, width / height, width, dtype=np.float32)[None, :]
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    night = "night" in prompt
    sky = np.array([[46, 84, 150], [16, 20, 48]][int(night)], np.float32)
    glow = np.array([[250, 200, 140], [70, 84, 140]][int(night)], np.float32)
    sun = np.array([[255, 244, 214], [226, 232, 250]][int(night)], np.float32)
    frames = []
    for t in range(first, first + count):
        picture = sky + (glow - sky) * (y**1.5)[..., None] * np.ones_like(x)[..., None]
        centre = (0.45 + 0.007 * t) % 2.4 - 0.2
        distance = np.sqrt((x - centre) ** 2 + (y - 0.3 + 0.04 * np.sin(t / 9)) ** 2)
        halo = (np.exp(-9 * distance) * 0.55 + 1 / (1 + np.exp((distance - 0.085) * 260)))[..., None]
        picture = picture * (1 - halo.clip(0, 1)) + sun * halo.clip(0, 1)
        for layer, (base, swing, speed) in enumerate([(0.62, 0.07, 0.006), (0.74, 0.06, 0.014), (0.88, 0.05, 0.03)]):
            phase = speed * t
            edge = base + swing * (np.sin(3.1 * (x + phase) + layer) + 0.5 * np.sin(7.3 * (x + phase) + 2 * layer))
            land = (glow * 0.35 + sky * 0.4) * (0.95 - 0.28 * layer)
            picture = np.where((y > edge)[..., None], land, picture)
        frames.append(picture.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


@contextlib.contextmanager
def served(app: FastAPI, *, port: int = 0) -> Iterator[int]:
    """Serve `app` on the loopback from a thread; the port."""
    config = uvicorn.Config(
        app, port=port, log_config=None, access_log=False, lifespan="off", ws_per_message_deflate=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError(f"the server could not start on port {port}")
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


@dataclass
class StandInServer:
    """Attributes the test may set before or while the page is there.

    token: what the page must send, or None.
    refuse: errors that answer the next "start"s, in order.
    refuse_switch: the error that answers every "switch".
    about, examples: what the page is told of the model.
    chunk_s: seconds a chunk takes, or None: a chunk is made for each `release`.
    first_frames: frames of the first chunk; each later one has 12.
    """

    width: int = 416
    height: int = 240
    fps: int = 16
    token: str | None = None
    mime: str | None = None
    max_chunks: int | None = None
    about: str = ""
    examples: list[str] = field(default_factory=list)
    chunk_s: float | None = None
    first_frames: int = 9
    port: int = 0
    refuse: list[dict[str, Any]] = field(default_factory=list)
    refuse_switch: dict[str, Any] | None = None
    received: list[dict[str, Any]] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._sockets: list[WebSocket] = []

    @contextlib.contextmanager
    def running(self) -> Iterator["StandInServer"]:
        with served(self._app(), port=self.port) as self.port:
            self.url = f"http://127.0.0.1:{self.port}/"
            yield self

    def release(self, chunks: int) -> None:
        self._permits.release(chunks)

    def close_connections(self, code: int, reason: str = "") -> None:
        for socket in list(self._sockets):
            asyncio.run_coroutine_threadsafe(socket.close(code, reason), self._loop).result(10)

    def messages(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.received if message["type"] == kind]

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/{name:path}")
        def page(name: str) -> Response:
            path = PAGE / (name or "index.html")
            if path.parent != PAGE or not path.is_file():
                return Response(status_code=404)
            return FileResponse(path, headers=SECURITY_HEADERS)

        @app.websocket("/v1/realtime")
        async def realtime(socket: WebSocket) -> None:
            await socket.accept()
            self._loop = asyncio.get_running_loop()
            self._sockets.append(socket)
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the second: sent after the test closed it
                await _Connection(self, socket).serve()
            self._sockets.remove(socket)

        return app


class _Connection:
    def __init__(self, server: StandInServer, socket: WebSocket) -> None:
        self.server = server
        self.socket = socket
        self.go_on = asyncio.Event()
        self.stopped = False
        self.prompt = ""
        self.next_chunk = 0
        self.task: asyncio.Task[None] | None = None

    async def say(self, kind: str, **fields: Any) -> None:
        self.server.sent.append({"type": kind, **fields})
        await self.socket.send_json({"type": kind, **fields})

    async def read(self) -> dict[str, Any]:
        message = await self.socket.receive_json()
        self.server.received.append(message)
        return message

    async def serve(self) -> None:
        server = self.server
        if server.token is not None and (await self.read()).get("token") != server.token:
            await self.say("error", code="unauthorized", message="no such token", retry_after_s=None)
            await self.socket.close(4401)
            return
        mime = server.mime or FragmentWriter(height=server.height, width=server.width, fps=server.fps).mime
        size = {"width": server.width, "height": server.height, "fps": server.fps}
        model = {"about": server.about, "examples": server.examples}
        await self.say("ready", **size, mime=mime, max_prompt_chars=2000, max_chunks=server.max_chunks, **model)
        try:
            while True:
                message = await self.read()
                await getattr(self, f"on_{message['type']}")(message)
        finally:
            if self.task:
                self.task.cancel()

    async def on_start(self, message: dict[str, Any]) -> None:
        if self.server.refuse:
            await self.say("error", **self.server.refuse.pop(0))
            return
        self.prompt, self.stopped = message["prompt"], False
        self.go_on.set()
        self.task = asyncio.create_task(self.generate(message))

    async def on_switch(self, message: dict[str, Any]) -> None:
        if self.server.refuse_switch:
            await self.say("error", **self.server.refuse_switch)
            return
        self.prompt = message["prompt"]
        await self.say("switched", ms=6.5, from_chunk=self.next_chunk, policy=message["policy"], warnings=[])

    async def on_pause(self, message: dict[str, Any]) -> None:
        self.go_on.clear()
        await self.say("paused")

    async def on_resume(self, message: dict[str, Any]) -> None:
        self.go_on.set()
        await self.say("resumed")

    async def on_stop(self, message: dict[str, Any]) -> None:
        self.stopped = True
        self.go_on.set()

    async def permit(self) -> None:
        """Wait for the test's permission, or for the chunk's time."""
        if self.server.chunk_s is not None:
            await asyncio.sleep(self.server.chunk_s)
            return
        while not self.stopped and not self.server._permits.acquire(blocking=False):
            await asyncio.sleep(0.01)

    async def generate(self, start: dict[str, Any]) -> None:
        server = self.server
        received = time.perf_counter()
        writer = FragmentWriter(height=server.height, width=server.width, fps=server.fps)
        await self.say("started", id="stand-in", seed=start["seed"], chunks=start["chunks"], text_ms=3.0, warnings=[])
        await self.socket.send_bytes(writer.header)
        done = frames = 0
        first: dict[str, float] = {}
        while start["chunks"] is None or done < start["chunks"]:
            self.next_chunk = done
            await self.permit()
            await self.go_on.wait()
            if self.stopped:
                break
            begun, count = time.perf_counter(), 12 if done else server.first_frames
            images = await asyncio.to_thread(
                pictures, frames, count, height=server.height, width=server.width, prompt=self.prompt
            )
            drawn = time.perf_counter()
            for at in range(0, count, 3):
                await self.socket.send_bytes(b"".join(writer.write(images[at : at + 3])))
                if not done and not at:
                    first = {"first_frame_ms": 1e3 * (time.perf_counter() - received)}
            sent = time.perf_counter()
            # The wait is split into made-up stages, so that every colour is seen; drawing and encoding are what they are.
            wait = 1e3 * (server.chunk_s or 0.5)
            stages = {"queue": 0.03 * wait, "text": None if done else 0.1 * wait, "denoise": 0.8 * wait}
            stages |= {"exchange": 0.14 * wait, "gather": 0.02 * wait, "hand_over": 0.02 * wait}
            stages |= {"decode": 0.03 * wait + 1e3 * (drawn - begun), "encode": 1e3 * (sent - drawn)}
            in_engine = [ms for stage, ms in stages.items() if ms and stage not in ("text", "exchange", "encode")]
            latency = sum(in_engine) + 0.02 * wait
            await self.say("chunk", index=done, frames=count, latency_ms=latency, stages=stages, **first)
            first = {}
            frames, done = frames + count, done + 1
        await self.socket.send_bytes(b"".join(writer.close()))
        await self.say("ended", reason="stopped" if self.stopped else "done", chunks=done)
