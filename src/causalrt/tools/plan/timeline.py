"""The timeline of a forecast: when P ranks and a decoder work on which chunk, computed from nominal times, and its picture.

    ranks     one job at a time for all of them: 4 steps, context pass, 4 steps, ...
    decoder   one job a latent, in the order of chunks, on a device of its own or on rank 0's, first come first served

Times do not vary: how much they do on a real machine was never measured. Nobody leaves an exchange before all ranks have come,
so a step takes as long as the slowest rank needs. The reader takes frames at once; the ranks may be `chunks_ahead` chunks ahead
of the decoder.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causalrt.errors import ConfigError, ExecutorError
from causalrt.install_hint import install_package
from causalrt.model.codecs.wan_vae import TEMPORAL_SCALE
from causalrt.tools.plan.predict import ChunkForecast, Forecast

COLOURS = {"step": "tab:blue", "context pass": "tab:cyan", "decode": "tab:orange"}
WAITING = "0.85"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Something that held a device.

    Attributes:
        what: `step`, `context pass` or `decode`.
        chunk: index of the chunk.
        start_s: seconds from the beginning.
        end_s: seconds from the beginning.
        busy_s: seconds that each rank computes, without waiting for others and the exchange; empty for the decoder.
    """

    what: str
    chunk: int
    start_s: float
    end_s: float
    busy_s: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What the devices do, and when.

    Attributes:
        jobs: in order of their end.
        started_s: when the first step of each chunk begins.
        delivered_s: when the frames of each chunk are there.
        frames: frames of each chunk.
    """

    jobs: tuple[Job, ...]
    started_s: tuple[float, ...]
    delivered_s: tuple[float, ...]
    frames: tuple[int, ...]

    def summary(self) -> dict[str, float]:
        """Milliseconds of the first and the last chunk, and frames a second from the first delivery to the last."""
        found = {
            "first_frame_ms": 1e3 * self.delivered_s[0],
            "last_chunk_ms": 1e3 * (self.delivered_s[-1] - self.started_s[-1]),
        }
        if len(self.frames) > 1:
            found["last_interval_ms"] = 1e3 * (self.delivered_s[-1] - self.delivered_s[-2])
            found["frames_per_second"] = sum(self.frames[1:]) / (self.delivered_s[-1] - self.delivered_s[0])
        return found


@dataclass(slots=True)
class _Device:
    """Serves one job at a time, first come first served."""

    waiting: deque[tuple[str, int]] = field(default_factory=deque)
    busy: bool = False


def timeline(forecast: Forecast, *, chunks: int, straggler: float = 0.0, chunks_ahead: int = 1) -> Timeline:
    """Run a stream of `chunks` chunks; past the horizon, chunks cost what the last one does (a rolling window).

    Args:
        forecast: nominal times; its `vae` says where decoding happens. A split VAE is one job of the ranks for each chunk.
        chunks: number of chunks.
        straggler: fraction by which rank 0 computes more slowly than the others.
        chunks_ahead: chunks that may be denoised and not yet delivered when the ranks begin another.

    Raises:
        ConfigError: there are no chunks, or the straggler is out of range.
    """
    if chunks < 1 or chunks_ahead < 0:
        raise ConfigError(
            f"a timeline needs at least one chunk, and chunks_ahead of 0 or more, got {chunks}, {chunks_ahead}"
        )
    check_straggler(straggler)
    return _Run(forecast, chunks, straggler, chunks_ahead).run()


def check_straggler(straggler: float) -> None:
    """Raise ConfigError unless `straggler` is a fraction that makes sense."""
    if not 0 <= straggler < 10:
        raise ConfigError(f"straggler must lie in [0, 10), got {straggler}; 0.05 is 5 %")


class _Run:
    """The state while a timeline is computed."""

    def __init__(self, forecast: Forecast, chunks: int, straggler: float, ahead: int) -> None:
        self.forecast, self.chunks, self.slowness, self.ahead = forecast, chunks, 1 + straggler, ahead
        self.steps = round(forecast.chunks[-1].denoise_s.nominal / forecast.chunks[-1].step_s.nominal)
        self.group = _Device()
        self.decoder = _Device() if forecast.vae == "own" else self.group
        self.events: list[tuple[float, int, _Device, Job]] = []
        self.now = 0.0
        self.order = 0
        self.steps_done = 0  # of all chunks
        self.decoded = 0  # latents of the chunk that is being decoded
        self.started: list[float] = []
        self.delivered: list[float] = []
        self.jobs: list[Job] = []
        self.blocked: int | None = None

    def run(self) -> Timeline:
        self._begin(0)
        while self.events:
            self.now, _, device, job = heapq.heappop(self.events)
            device.busy = False
            self.jobs.append(job)
            self._finished(job)
            for each in (self.group, self.decoder):
                self._serve(each)
        return Timeline(
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
            self.group.waiting.append(("context pass", chunk))
        elif job.what == "context pass":
            self._begin(chunk + 1)
        else:
            self.decoded += 1
            if self.decoded == self._latents(chunk):
                self.decoded = 0
                self.delivered.append(self.now)
                if self.blocked is not None:
                    self._begin(self.blocked)
            self._ask_decode()

    def _ask_decode(self) -> None:
        """Queue the next decoder job, unless one waits or runs."""
        chunk = len(self.delivered)
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
            seconds = self._chunk(chunk).decode_s.nominal / self._latents(chunk)
        else:
            parts = self._chunk(chunk).parts
            compute_s = parts.total_s - parts.exchange_s
            busy = (self.slowness * compute_s, *[compute_s] * (self.forecast.world_size - 1))
            seconds = busy[0] + parts.exchange_s
            if what == "step" and chunk == len(self.started):
                self.started.append(self.now)
        job = Job(what=what, chunk=chunk, start_s=self.now, end_s=self.now + seconds, busy_s=busy)
        device.busy = True
        self.order += 1
        heapq.heappush(self.events, (job.end_s, self.order, device, job))

    def _latents(self, chunk: int) -> int:
        """Decoder jobs of a chunk; the first latent of a video makes one frame, every other one `TEMPORAL_SCALE`."""
        return 1 if self.forecast.vae == "split" else math.ceil(self._chunk(chunk).frames / TEMPORAL_SCALE)

    def _chunk(self, index: int) -> ChunkForecast:
        return self.forecast.chunks[min(index, len(self.forecast.chunks) - 1)]


def draw_timeline(found: Timeline, path: Path, *, title: str, chunks: int = 4) -> None:
    """Draw the first `chunks` chunks as a PNG; waiting and exchange are grey in a rank's bar.

    Raises:
        ExecutorError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ExecutorError(
            f"a picture needs matplotlib ({error}); {install_package('matplotlib')}, or leave --timeline out"
        ) from error
    ranks = max((len(job.busy_s) for job in found.jobs), default=1)
    figure = Figure(figsize=(11, 1.6 + 0.32 * (ranks + 2)), layout="constrained")
    ax = figure.subplots()
    delivered_ms = [1e3 * seconds for seconds in found.delivered_s[:chunks]]
    end_ms = 1.03 * delivered_ms[-1]
    _draw_jobs(ax, [job for job in found.jobs if 1e3 * job.start_s <= end_ms], ranks)
    for chunk, ms in enumerate(delivered_ms):
        ax.axvline(ms, color="tab:red", linewidth=1.2)
        ax.text(ms, -0.75, f"chunk {chunk}", color="tab:red", ha="right", va="bottom", fontsize=8)
    label = "milliseconds, computed from predicted times: nothing here was measured"
    ax.set(xlim=(0, end_ms), ylim=(ranks + 0.6, -1.3), xlabel=label, title=title)
    ax.set_yticks(range(ranks + 1), [*(f"rank {rank}" for rank in range(ranks)), "decoder"])
    labels = {
        "denoising step": COLOURS["step"],
        "context pass": COLOURS["context pass"],
        "exchange and waiting": WAITING,
        "decode": COLOURS["decode"],
        "frames delivered": "tab:red",
    }
    handles = [Patch(color=colour, label=name) for name, colour in labels.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ExecutorError(f"cannot write the picture {path}: {error}") from error


def _draw_jobs(ax: Any, jobs: list[Job], ranks: int) -> None:
    for job in jobs:
        start, length = 1e3 * job.start_s, 1e3 * (job.end_s - job.start_s)
        if job.what == "decode":
            ax.barh(ranks, length, left=start, height=0.8, color=COLOURS["decode"], linewidth=0)
        for rank, busy_s in enumerate(job.busy_s):
            ax.barh(rank, length, left=start, height=0.8, color=WAITING, linewidth=0)
            ax.barh(rank, 1e3 * busy_s, left=start, height=0.8, color=COLOURS[job.what], linewidth=0)
