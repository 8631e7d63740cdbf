"""A server over a fake engine, on a real port, in a thread of the test."""

import asyncio
import contextlib
import json
import signal
import threading
import time

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from causalrt.server.auth import Tokens
from causalrt.server.run import address, listen, serve
from causalrt.server.settings import ServerSettings
from support.fake_engine import FakeEngine, fake_encode, fake_tokenize

DEADLINE_S = 30.0


def until(condition, what="it"):
    """Wait for something that is bound to happen."""
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.005)
    return found


class Running:
    """Attributes: engine, url, http (a client), settings, services once it is up."""

    def __init__(self, engine=None, *, load=None, tokens=None, **settings):
        self.engine = engine or FakeEngine()
        self.engines = [self.engine]
        self._load = load or FakeEngine
        self.settings = ServerSettings(**{"port": 0, "grace_s": 10.0, "generations_per_minute": 10_000, **settings})
        self._tokens = tokens or Tokens()
        self._listening = listen(self.settings.host, 0, send_buffer_bytes=self.settings.send_buffer_bytes)
        self.url = address(self._listening)
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S)
        self.error = None
        self.server = None
        self._loop = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def loop(self):
        return self._loop

    @property
    def services(self):
        return self.server.services

    def _reload(self):
        self.engines.append(self._load())
        return self.engines[-1]

    def _run(self):
        async def main():
            self._loop = asyncio.get_running_loop()
            await serve(
                self.engine,
                self._reload,
                fake_encode,
                self.settings,
                tokenize=fake_tokenize,
                tokens=self._tokens,
                listening=self._listening,
                version="0",
                on_start=lambda server: setattr(self, "server", server),
            )

        try:
            asyncio.run(main())
        except BaseException as error:
            self.error = error

    def end(self, sig=signal.SIGTERM):
        """What a signal does; returns at once."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self.server.end, sig)

    def ended(self):
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the server did not end"
        if self.error:
            raise self.error

    def __enter__(self):
        self._thread.start()
        until(lambda: self.error or (self.server and self.server.started), "the start")
        if self.error:
            raise self.error
        return self

    def __exit__(self, *_):
        for engine in self.engines:
            engine.close()  # what hangs at a gate goes on, and fails
        self.end()
        self.http.close()
        self.ended()

    # ---- what tests ask

    def post(self, **fields):
        return self.http.post("/v1/videos", json={"prompt": "a fox", **fields})

    def video(self, video_id, **headers):
        return self.http.get(f"/v1/videos/{video_id}", headers=headers).json()

    def finished(self, video_id):
        return until(
            lambda: (v := self.video(video_id)) and v["status"] in ("completed", "failed") and v, "the job's end"
        )

    def metric(self, name):
        """The value of one line of /metrics, as `causalrt_jobs{status="failed"}`."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)

    @contextlib.contextmanager
    def realtime(self, *, ready=True, **how):
        url = self.url.replace("http", "ws") + "/v1/realtime"
        with connect(url, compression=None, open_timeout=DEADLINE_S, **how) as socket:
            client = Client(socket)
            if ready:
                client.ready = client.next("ready")
            yield client


class Client:
    """One WebSocket: `next` reads until a message of a type; what comes before is kept in `seen` and `media`."""

    def __init__(self, socket):
        self.socket = socket
        self.seen = []
        self.media = []

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def start(self, **fields):
        self.send("start", **{"prompt": "a fox", **fields})

    def read(self):
        received = self.socket.recv(timeout=DEADLINE_S)
        if isinstance(received, bytes):
            self.media.append(received)
            return None
        self.seen.append(json.loads(received))
        return self.seen[-1]

    def next(self, kind, **fields):
        while True:
            message = self.read()
            if message and message["type"] == kind and all(message[name] == value for name, value in fields.items()):
                return message

    def closed(self):
        """Read to the end; the close code."""
        try:
            while True:
                self.read()
        except ConnectionClosed as error:
            return error.rcvd.code if error.rcvd else None
