"""The timeline of a forecast: when P ranks and a decoder work on which chunk, computed from nominal times, and its picture.

    ranks     one job at a time for all of them: 4 steps, context pass, 4 steps, ...
    decoder   one job a latent, in the order of chunks, on a device of its own or on rank 0's, first come first served

Times do not vary: how much they do on a real machine was never measured. Nobody leaves an exchange before all ranks have come,
so a step takes as long as the slowest rank needs. The reader takes frames at once; the ranks may be `chunks_ahead` chunks ahead
of the decoder.
"""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalrt.codec_geometry import WAN21
from causalrt.errors import ConfigError, ExecutorError
from causalrt.install_hint import install_package
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
    """What the devices do, and when each chunk begins and its frames are delivered."""

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


def check_straggler(straggler: float) -> None:
    """Raise ConfigError unless `straggler` is a fraction that makes sense."""
    if not 0 <= straggler < 10:
        raise ConfigError(f"straggler must lie in [0, 10), got {straggler}; 0.05 is 5 %")


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
    run = _Run(forecast, 1 + straggler)
    for chunk in range(chunks):
        run.make(chunk, ahead=chunks_ahead)
    while run.latents:
        run.decode_one()
    return Timeline(
        jobs=tuple(run.jobs),
        started_s=tuple(run.started),
        delivered_s=tuple(run.delivered),
        frames=tuple(run.chunk(index).frames for index in range(chunks)),
    )


class _Run:
    """The state while a timeline is computed: when the ranks and the decoder are free, and latents that wait for decoding."""

    def __init__(self, forecast: Forecast, slowness: float) -> None:
        self.forecast, self.slowness = forecast, slowness
        self.steps = round(forecast.chunks[-1].denoise_s.nominal / forecast.chunks[-1].step_s.nominal)
        self.apart = forecast.vae == "own"
        self.ranks_s = self.decoder_s = 0.0
        self.latents: deque[tuple[int, bool, float]] = deque()  # chunk, whether it is the chunk's last one, ready at
        self.started: list[float] = []
        self.delivered: list[float] = []
        self.jobs: list[Job] = []

    def chunk(self, index: int) -> ChunkForecast:
        return self.forecast.chunks[min(index, len(self.forecast.chunks) - 1)]

    def make(self, chunk: int, *, ahead: int) -> None:
        """Denoise a chunk once the ranks are not too far ahead, queue its latents, and run its context pass."""
        while self.latents and (self.apart or chunk - len(self.delivered) > ahead):
            self.decode_one()
        if self.apart and chunk > ahead:
            self.ranks_s = max(self.ranks_s, self.delivered[chunk - ahead - 1])
        self.started.append(self.ranks_s)
        for step in range(self.steps):
            if step:
                self._share()
            self._rank_job("step", chunk)
        if self.forecast.vae == "none":
            self.delivered.append(self.ranks_s)
        else:
            count = self._jobs_of(chunk)
            self.latents.extend((chunk, index + 1 == count, self.ranks_s) for index in range(count))
        self._share()
        self._rank_job("context pass", chunk)
        self._share()

    def decode_one(self) -> None:
        """Decode the next latent, on a device of its own or on that of the ranks."""
        chunk, last, ready_s = self.latents.popleft()
        seconds = self.chunk(chunk).decode_s.nominal / self._jobs_of(chunk)
        start_s = max(self.decoder_s, ready_s) if self.apart else self.ranks_s
        self.decoder_s = start_s + seconds
        if not self.apart:
            self.ranks_s = self.decoder_s
        self.jobs.append(Job(what="decode", chunk=chunk, start_s=start_s, end_s=self.decoder_s))
        if last:
            self.delivered.append(self.decoder_s)

    def _share(self) -> None:
        """On a shared device, the decoder takes its turn after every job of the ranks."""
        if self.latents and not self.apart:
            self.decode_one()

    def _jobs_of(self, chunk: int) -> int:
        """Decoder jobs of a chunk; the first latent of a video makes one frame, every other one `frames_per_latent`."""
        return 1 if self.forecast.vae == "split" else math.ceil(self.chunk(chunk).frames / WAN21.frames_per_latent)

    def _rank_job(self, what: str, chunk: int) -> None:
        parts = self.chunk(chunk).parts
        compute_s = parts.total_s - parts.exchange_s
        busy = (self.slowness * compute_s, *[compute_s] * (self.forecast.world_size - 1))
        start_s = self.ranks_s
        self.ranks_s += busy[0] + parts.exchange_s
        self.jobs.append(Job(what=what, chunk=chunk, start_s=start_s, end_s=self.ranks_s, busy_s=busy))


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
