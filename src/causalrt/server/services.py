"""The parts of one server, which its routes share."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from causalrt.errors import RequestError
from causalrt.model.text.umt5 import PromptTokens
from causalrt.runtime.engine import Engine
from causalrt.server.admission import Admission, RateLimit
from causalrt.server.api_errors import not_ready
from causalrt.server.auth import Tokens
from causalrt.server.engine_host import EngineHost
from causalrt.server.generation import Control, Generator
from causalrt.server.job_store import JobStore
from causalrt.server.jobs import Jobs
from causalrt.server.metrics import Metrics
from causalrt.server.model_limits import ModelLimits
from causalrt.server.settings import ServerSettings

log = logging.getLogger(__name__)

WATCH_S = 1.0
EXPIRE_EVERY = 10
END_S = 20.0
"""Seconds that a stopped generation has to finish its current chunk."""
FAREWELL_S = 5.0
"""Seconds that readers have for unread data once every generation has ended."""
DRAINING = "the server is shutting down; try another, or later"


@dataclass(kw_only=True, slots=True)
class Services:
    """The parts of a server; made by `make_services`."""

    settings: ServerSettings
    tokens: Tokens
    limits: ModelLimits
    host: EngineHost
    admission: Admission
    rate: RateLimit
    generator: Generator
    jobs: Jobs
    store: JobStore
    metrics: Metrics
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    _num_streams: int = 0
    _no_stream: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    def control(self, *, credit: int | None = None) -> Control:
        """Make the control of a new generation."""
        return Control(credit=credit, pause_s=self.settings.pause_s)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Register a connection within the block, so that `drain` waits until it has sent its data."""
        self._num_streams += 1
        self._no_stream.clear()
        try:
            yield
        finally:
            self._num_streams -= 1
            if not self._num_streams:
                self._no_stream.set()

    def check_ready(self) -> None:
        """Refuse a request that the server cannot serve now.

        Raises:
            ApiError: 503, with the reason.
        """
        if self.draining.is_set():
            raise not_ready(DRAINING)
        detail = self.host.look().detail
        if detail is not None:
            raise not_ready(detail)

    async def watch(self) -> None:
        """Check the engine's processes and remove expired jobs until this is cancelled."""
        ticks = 0
        while True:
            await asyncio.sleep(WATCH_S)
            ticks += 1
            try:
                self.host.look()
                if ticks % EXPIRE_EVERY == 0:
                    while self.jobs.expire():
                        await asyncio.sleep(0)
            except Exception:  # no failure may end the watch
                log.exception("a periodic check of the server failed; the checks continue")

    async def drain(self) -> None:
        """Refuse new requests, let running generations finish within the grace time, stop the rest, and wait for their end."""
        if self.draining.is_set():
            return
        log.warning(
            "draining: %d generations are running, %d are waiting", self.admission.running, self.admission.waiting
        )
        self.draining.set()
        self.admission.close(DRAINING, reason="draining")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.admission.empty(), self.settings.grace_s)
        self.generator.stop_all("draining")
        try:
            await asyncio.wait_for(self.admission.empty(), END_S)
        except TimeoutError:
            log.error("%d generations did not end in time; closing the engine anyway", self.admission.running)
            await asyncio.to_thread(self.host.close)
        if self._num_streams:
            try:
                await asyncio.wait_for(self._no_stream.wait(), FAREWELL_S)
            except TimeoutError:
                log.warning("%d readers did not read the rest in time", self._num_streams)

    async def close(self) -> None:
        """Stop all generations, close the engine and release the spool. Further calls have no effect."""
        if self._closed:
            return
        self._closed = True
        self.generator.stop_all("draining")
        try:
            await asyncio.to_thread(self.host.close)
            await self.jobs.finished()
        finally:
            self.generator.close()
            await asyncio.to_thread(self.store.close)


def make_services(
    engine: Engine,
    load: Callable[[], Engine],
    encode: Callable[[str], torch.Tensor],
    settings: ServerSettings,
    tokens: Tokens,
    *,
    tokenize: Callable[[str], PromptTokens],
) -> Services:
    """Make the services of a server on the running event loop.

    Args:
        engine: a loaded engine with a VAE.
        load: loads another engine if its ranks die.
        encode: maps a prompt to embeddings `[rows, text_dim]`; called from several threads.
        settings: limits, paths and times.
        tokens: the tokens that give access.
        tokenize: maps a prompt to the tokens that `encode` reads (`ModelLimits`).

    Raises:
        RequestError: the engine has no VAE, or the spool cannot be used.
    """
    if not engine.has_vae:
        raise RequestError(
            "the bundle has no VAE, so it makes latents and no pictures; build it with one to serve videos"
        )
    slots = _slots(engine, settings)
    metrics = Metrics()
    limits = ModelLimits.from_config(engine.config, settings, tokenize=tokenize)
    admission = Admission(slots=slots, max_queue=settings.max_queue)
    loop = asyncio.get_running_loop()

    def reloaded() -> None:
        metrics.reloads.inc()
        loop.call_soon_threadsafe(lambda: admission.resize(min(slots, _slots(host.current, settings))))

    host = EngineHost(
        engine,
        load,
        first_wait_s=settings.reload_after_s,
        max_wait_s=settings.reload_max_wait_s,
        on_reload=reloaded,
    )
    generator = Generator(host, encode, metrics, threads=slots)
    store = JobStore(settings.spool)
    jobs = Jobs(store, limits, admission, generator, metrics, settings)
    services = Services(
        settings=settings,
        tokens=tokens,
        limits=limits,
        host=host,
        admission=admission,
        rate=RateLimit(settings.generations_per_minute),
        generator=generator,
        jobs=jobs,
        store=store,
        metrics=metrics,
    )
    metrics.gauge("sessions", "Generations that are running", lambda: admission.running)
    metrics.gauge("sessions_limit", "Generations that may run at once", lambda: admission.slots)
    metrics.gauge("queue_length", "Generations that are waiting in the queue", lambda: admission.waiting)
    metrics.gauge("queue_limit", "Generations that may wait", lambda: settings.max_queue)
    metrics.gauge("kv_bytes", "KV slots of open sessions on all ranks", lambda: _kv_bytes(host.current))
    metrics.gauge("ready", "1 if requests are served, else 0", lambda: _ready(services))
    metrics.gauges("jobs", "Jobs kept, by status", "status", jobs.counts)
    return services


def _slots(engine: Engine, settings: ServerSettings) -> int:
    return max(1, min(settings.max_sessions, engine.max_sessions))


def _kv_bytes(engine: Engine) -> int:
    return engine.memory.kv_bytes * engine.config.build.world_size * engine.open_sessions


def _ready(services: Services) -> int:
    return int(services.host.status.detail is None and not services.draining.is_set())
