"""A discrete-event simulation of P ranks and a decoder: what jitter and stragglers make of a forecast.

    ranks     one job at a time for all of them: 4 steps, refresh, 4 steps, ...
    decoder   one job a latent, in the order of chunks, on a device of its own or on rank 0's, first come first served

A step is a chain of segments between exchanges. Nobody leaves an exchange before all have come, so a segment takes as long as
the slowest rank does; how slow a rank is, is drawn once, and each segment's jitter anew. The reader takes frames at once; the
ranks may be `chunks_ahead` chunks ahead of the decoder.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from causalrt.errors import ConfigError
from causalrt.tools.plan.assumptions import RANK_SPREAD
from causalrt.tools.plan.predict import ChunkForecast, Forecast

QUANTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Jitter:
    """How times vary; all zero makes the simulation exact.

    Attributes:
        rank_spread: a rank is slower than the fastest by up to this fraction, drawn evenly once a run.
        segment: standard deviation of the logarithm of a segment's time (our guess).
        exchange: likewise of an exchange's (our guess).
        straggler: additional slowness of rank 0, as a fraction.
        seed: of the draws.
    """

    rank_spread: float = RANK_SPREAD
    segment: float = 0.02
    exchange: float = 0.30
    straggler: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank_spread", "segment", "exchange", "straggler"):
            if not 0 <= getattr(self, name) < 10:
                raise ConfigError(f"jitter.{name} must lie in [0, 10), got {getattr(self, name)}; 0.05 is 5 %")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Something that held a device.

    Attributes:
        what: `step`, `refresh` or `decode`.
        chunk: that it was for.
        start_s: since the beginning.
        end_s: likewise.
        busy_s: by rank, of the ranks' jobs: computing, not waiting for others or the exchange.
    """

    what: str
    chunk: int
    start_s: float
    end_s: float
    busy_s: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What happened.

    Attributes:
        jobs: in order of their end.
        started_s: when each chunk's first step began.
        delivered_s: when each chunk's frames were there.
        frames: of each chunk.
    """

    jobs: tuple[Job, ...]
    started_s: tuple[float, ...]
    delivered_s: tuple[float, ...]
    frames: tuple[int, ...]

    @property
    def latencies_s(self) -> npt.NDArray[np.float64]:
        """Of each chunk, from its first step to its frames."""
        return np.subtract(self.delivered_s, self.started_s)

    @property
    def intervals_s(self) -> npt.NDArray[np.float64]:
        """Between deliveries."""
        return np.diff(self.delivered_s)

    def summary(self) -> dict[str, dict[str, float] | float]:
        """Quantiles in milliseconds, and frames a second from the first delivery to the last."""
        found: dict[str, dict[str, float] | float] = {"first_frame_ms": 1e3 * self.delivered_s[0]}
        for name, values in (("chunk_ms", self.latencies_s), ("interval_ms", self.intervals_s)):
            if values.size:
                found[name] = {f"p{q}": 1e3 * float(np.percentile(values, q)) for q in QUANTILES}
        if len(self.frames) > 1:
            found["frames_per_second"] = sum(self.frames[1:]) / (self.delivered_s[-1] - self.delivered_s[0])
        return found


@dataclass(slots=True)
class _Device:
    """Serves one job at a time, first come first served."""

    waiting: deque[tuple[str, int]] = field(default_factory=deque)
    busy: bool = False


def simulate(
    forecast: Forecast, *, chunks: int, jitter: Jitter | None = None, chunks_ahead: int = 1, latents_per_chunk: int = 3
) -> Simulation:
    """Run a stream of `chunks` chunks; past the horizon, chunks cost what the last one does (a rolling window).

    Args:
        forecast: nominal times; its `vae` says where decoding happens. A split VAE is a job of the ranks.
        chunks: to simulate.
        jitter: how times vary; None for not at all.
        chunks_ahead: chunks that the ranks may have denoised and the decoder not yet delivered, when they begin another.
        latents_per_chunk: decoder jobs of a chunk; a split VAE decodes all of a chunk at once.

    Raises:
        ConfigError: nothing to simulate.
    """
    if chunks < 1 or chunks_ahead < 0:
        raise ConfigError(
            f"a simulation wants at least one chunk, and chunks_ahead 0 or more, got {chunks}, {chunks_ahead}"
        )
    return _Run(
        forecast, chunks, jitter or Jitter(rank_spread=0, segment=0, exchange=0), chunks_ahead, latents_per_chunk
    ).run()


class _Run:
    """The state of one simulation."""

    def __init__(self, forecast: Forecast, chunks: int, jitter: Jitter, ahead: int, latents: int) -> None:
        self.forecast, self.chunks, self.jitter = forecast, chunks, jitter
        self.ahead, self.latents = ahead, 1 if forecast.vae == "split" else latents
        self.random = np.random.default_rng(jitter.seed)
        ranks = forecast.world_size
        self.slowness = 1 + jitter.rank_spread * self.random.random(ranks)
        self.slowness[0] += jitter.straggler
        self.steps = round(forecast.chunks[-1].denoise_s.nominal / forecast.chunks[-1].step_s.nominal)
        self.group = _Device()
        self.decoder = _Device() if forecast.vae == "own" else self.group
        self.events: list[tuple[float, int, _Device, Job]] = []
        self.now = 0.0
        self.order = 0
        self.steps_done = self.decoded = 0  # of all chunks; latents
        self.started: list[float] = []
        self.delivered: list[float] = []
        self.jobs: list[Job] = []
        self.blocked: int | None = None

    def run(self) -> Simulation:
        self._begin(0)
        while self.events:
            self.now, _, device, job = heapq.heappop(self.events)
            device.busy = False
            self.jobs.append(job)
            self._finished(job)
            for each in (self.group, self.decoder):
                self._serve(each)
        return Simulation(
            jobs=tuple(self.jobs),
            started_s=tuple(self.started),
            delivered_s=tuple(self.delivered),
            frames=tuple(self._chunk(index).frames for index in range(self.chunks)),
        )

    def _begin(self, chunk: int) -> None:
        """Start a chunk, unless the ranks are too far ahead; its steps follow one another."""
        if chunk >= self.chunks:
            return
        if self.forecast.vae != "none" and chunk - len(self.delivered) > self.ahead:
            self.blocked = chunk
            return
        self.blocked = None
        self.group.waiting.append(("step", chunk))
        self._serve(self.group)

    def _finished(self, job: Job) -> None:
        chunk = job.chunk
        if job.what == "step":
            self.steps_done += 1
            if self.steps_done % self.steps:
                self.group.waiting.append(("step", chunk))
                return
            if self.forecast.vae == "none":
                self.delivered.append(self.now)
            else:
                self._ask_decode()
            self.group.waiting.append(("refresh", chunk))
        elif job.what == "refresh":
            self._begin(chunk + 1)
        else:
            self.decoded += 1
            if self.decoded % self.latents == 0:
                self.delivered.append(self.now)
                if self.blocked is not None:
                    self._begin(self.blocked)
            self._ask_decode()

    def _ask_decode(self) -> None:
        """One decoder job at a time waits or runs."""
        chunk = self.decoded // self.latents
        pending = any(what == "decode" for what, _ in self.decoder.waiting)
        running = any(job.what == "decode" for _, _, _, job in self.events)
        if chunk < self.steps_done // self.steps and not pending and not running:
            self.decoder.waiting.append(("decode", chunk))

    def _serve(self, device: _Device) -> None:
        if device.busy or not device.waiting:
            return
        what, chunk = device.waiting.popleft()
        busy: tuple[float, ...] = ()
        if what == "decode":
            seconds = self._chunk(chunk).decode_s.nominal / self.latents * self._draw(self.jitter.segment)
        else:
            seconds, busy = self._step(chunk)
            if what == "step" and chunk == len(self.started):
                self.started.append(self.now)
        job = Job(what=what, chunk=chunk, start_s=self.now, end_s=self.now + seconds, busy_s=busy)
        device.busy = True
        self.order += 1
        heapq.heappush(self.events, (job.end_s, self.order, device, job))

    def _chunk(self, index: int) -> ChunkForecast:
        return self.forecast.chunks[min(index, len(self.forecast.chunks) - 1)]

    def _draw(self, deviation: float) -> float:
        return float(np.exp(deviation * self.random.standard_normal())) if deviation else 1.0

    def _step(self, chunk: int) -> tuple[float, tuple[float, ...]]:
        """Seconds of a step, and how long each rank computes in it."""
        forecast, jitter = self.forecast, self.jitter
        parts = self._chunk(chunk).parts
        forwards = self.steps + 1
        exchanges = forecast.counts["all_to_all_calls"] // forwards
        segments = exchanges + 1
        compute_s = (parts.total_s - parts.exchange_s) / segments
        noise = self.random.standard_normal((segments, forecast.world_size)) * jitter.segment
        busy = compute_s * self.slowness * np.exp(noise)
        exchange_s = 0.0
        if exchanges:
            drawn = np.exp(self.random.standard_normal(exchanges) * jitter.exchange)
            exchange_s = float((parts.exchange_s / exchanges * drawn).sum())
        return float(busy.max(axis=1).sum()) + exchange_s, tuple(float(each) for each in busy.sum(axis=0))
