"""One session on one rank: denoise a chunk, deliver its latents, run the context pass, commit.

    noise -> steps x { flow = step(x); x0 = clean(x, flow); x = add_noise(x0, noise) } -> latents
    context pass:    step(x0) at the context timestep leaves clean keys and values in staging; commit moves them to history
    initial latents: step(rows) at timestep 0, commit: given latents become history like generated ones

Two counters: `_frame` is the position of the next chunk in the video, `_history` is the number of frames that the slots have
received. They differ after a prompt switch that drops or rebuilds history. The video's first chunk may be shorter
(`video.step_frames`); it then has its own layout and its own step of the executor.

Elementwise work is on local rows; the only communication is the step's own and the gather of what leaves the ranks.

A GPU is kept busy: everything is queued without waiting, and the host uses the time of the context pass to hand the latents
over and to draw the next chunk's first noise. On a CPU nothing is queued, so latents are handed over before the context pass::

    GPU    queue steps, gather, copy, context pass, commit | wait for the copy | deliver | draw | wait for the commit
    CPU    steps, gather | deliver | context pass, commit | draw
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from causalrt.config import Config
from causalrt.engines.base import Executor
from causalrt.errors import RequestError
from causalrt.layout import Layout
from causalrt.model.schedule import schedule_from_config
from causalrt.model.wan.conditioning import Conditioning
from causalrt.runtime.collectives import CountingCollectives
from causalrt.runtime.noise import Noise
from causalrt.runtime.session_buffers import SessionBuffers
from causalrt.runtime.snapshot import check_tensors, load_tensors, save_tensors
from causalrt.runtime.stopwatch import Stopwatch, stopwatch_for

SwitchPolicy = Literal["keep", "recache", "flush"]
"""What happens to history when the prompt changes: it is kept, recomputed under the new prompt, or dropped."""


@dataclass(kw_only=True, slots=True)
class ChunkTimes:
    """Times of one chunk on one rank, in milliseconds.

    Attributes:
        denoise_ms: each denoising step, exchange included.
        exchange_ms: the part of the denoising steps spent in all-to-alls; None on a GPU, where the host does not wait for them.
        gather_ms: collecting the latents on rank 0.
        context_pass_ms: the context pass and the commit, after the latents are handed over (on a GPU, meanwhile).
        all_to_all_calls: exchanges of the denoising steps that the host called, not those inside engines and CUDA graphs.
        rows_sent: rows of one head that the rank sent in them, those to itself included.
        kv_frames: latent frames attended over.
    """

    denoise_ms: list[float] = field(default_factory=list)
    exchange_ms: float | None = None
    gather_ms: float = 0.0
    context_pass_ms: float = 0.0
    all_to_all_calls: int = 0
    rows_sent: int = 0
    kv_frames: int = 0


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """Results of one forward, on rank 0: `[N, 64]` each; x0 is None for the context pass."""

    flow: torch.Tensor
    x0: torch.Tensor | None


class Rollout:
    """A session's state on one rank."""

    def __init__(
        self,
        executor: Executor,
        collectives: CountingCollectives,
        config: Config,
        layout: Layout,
        *,
        text: torch.Tensor,
        noise: Noise,
        buffers: SessionBuffers,
    ) -> None:
        self._executor, self._collectives = executor, collectives
        self._config = config
        self._layouts = [layout.with_tokens(frames * config.tokens_per_frame) for frames in config.video.step_frames]
        self._step_number = config.video.step_at(0)
        self._noise = noise
        self._drawn: tuple[int, torch.Tensor] | None = None
        self.buffers, self.slots = buffers, buffers.slots
        buffers.begin(executor.encode_prompt(text))
        self._schedule = schedule_from_config(config.sampler)
        self._times = [executor.embed_time(t) for t in self._schedule.timesteps]
        self._context_time = executor.embed_time(self._schedule.context_timestep)
        self._device = executor.device
        self._frame = self._history = 0
        self._clean: list[tuple[int, torch.Tensor]] = []

    @property
    def kv_frames(self) -> int:
        """Latent frames that the next chunk attends over, its own included."""
        return self.slots.plan.valid_frames(self._history, step=self._config.video.step_at(self._frame))

    def chunk(
        self,
        index: int,
        *,
        frame: int | None = None,
        context_pass: bool,
        record: bool,
        draw_next: bool = False,
        deliver: Callable[[torch.Tensor, ChunkTimes], None],
    ) -> tuple[ChunkTimes, list[StepRecord]]:
        """Generate chunk `index`; chunks are generated in order.

        Args:
            index: chunk number from 0.
            frame: frame of the video at which the caller expects the chunk to begin; None to skip the check.
            context_pass: leave clean keys and values for the next chunk.
            record: gather the flow and x0 of every forward on rank 0.
            draw_next: after the context pass, draw the first noise of chunk `index + 1`, so that a GPU need not wait for it.
            deliver: called on rank 0 with the latents `[N, 64]` and the times so far, before the context pass on a CPU and
                during it on a GPU.
        """
        if frame not in (None, self._frame):
            raise RuntimeError(f"chunk {index} begins at frame {frame}, and this rank is at {self._frame}")
        watch, times = stopwatch_for(self._device), ChunkTimes(kv_frames=self.kv_frames)
        records: list[StepRecord] | None = [] if record else None
        self._bind()
        x0, steps = self._denoise(index, watch, times, records)
        start = watch.mark()
        latents = self._gather(x0)
        gathered = watch.mark()

        def hand_over() -> None:
            watch.wait(gathered)
            times.denoise_ms = [watch.ms(*step) for step in steps]
            times.gather_ms = watch.ms(start, gathered)
            if latents is not None:
                deliver(latents, times)

        if self._device.type == "cpu":
            hand_over()
        if context_pass:
            pass_start = watch.mark()
            flow = self._context_pass(x0, self._context_time)
            pass_end = watch.mark()
            self._record(records, flow, None)
        if self._device.type == "cuda":
            hand_over()
        if context_pass:
            if draw_next:
                self._shape_for_next()
                self._drawn = index + 1, self._local_noise(index + 1, 0)
            self._wait()
            times.context_pass_ms = watch.ms(pass_start, pass_end)
        return times, records or []

    def _denoise(
        self, index: int, watch: Stopwatch, times: ChunkTimes, records: list[StepRecord] | None
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Return the chunk's clean rows, and the marks of the stopwatch around each step."""
        self._collectives.take_traffic()
        x, marks = self._first_noise(index), []
        for k, time in enumerate(self._times):
            start = watch.mark()
            flow = self._step(x, time)
            x0 = self._schedule.clean(k, x, flow)
            if k + 1 < len(self._times):
                x = self._schedule.add_noise(k + 1, x0, self._local_noise(index, k + 1))
            marks.append((start, watch.mark()))
            self._record(records, flow, x0)
        traffic = self._collectives.take_traffic()
        times.all_to_all_calls, times.rows_sent = traffic.all_to_all_calls, traffic.rows_sent
        if self._device.type == "cpu":
            times.exchange_ms = 1e3 * traffic.wait_s
        return x0, marks

    def _context_pass(self, clean: torch.Tensor, time: Conditioning) -> torch.Tensor:
        """Run a forward over clean rows, make its keys and values history, and return its flow."""
        flow = self._step(clean, time)
        self._commit(clean)
        return flow

    def take_initial(self, rows: torch.Tensor, *, record: bool) -> list[StepRecord]:
        """Make a chunk of initial latents history, by one forward at timestep 0, whatever the context timestep is.

        Args:
            rows: `[N, 64]`, clean; N is that of the video's next chunk. Initial chunks come in order, before the first one is
                generated.
            record: gather the flow of the forward on rank 0.
        """
        records: list[StepRecord] | None = [] if record else None
        self._bind()
        flow = self._context_pass(self._local_rows(rows), self._executor.embed_time(0.0))
        self._record(records, flow, None)
        self._wait()
        return records or []

    def switch_prompt(self, text: torch.Tensor, policy: SwitchPolicy) -> None:
        """From the next chunk on, attend to another prompt `[text_len, text_dim]`.

        To compute history again, the chunks that the window holds go through a context pass each, in order, as if nothing but
        the sink had been before them. Each keeps its place in time (or, where time is relative, its place in what is left of
        history).
        """
        self.buffers.change_prompt(self._executor.encode_prompt(text))
        if policy != "keep":
            kept = self._clean if policy == "recache" else []
            where = self._frame
            self._history, self._clean = 0, []
            for frame, rows in kept:
                self._frame = frame
                self._bind()
                self._context_pass(rows, self._context_time)
            self._frame = where
        self._wait()

    def save(self, path: Path) -> None:
        """Write what a rank needs to continue from here, between chunks (`runtime/snapshot.py`).

        Raises:
            RequestError: it cannot be written; the session is as it was.
        """
        tensors = {
            **self.slots.history(self._history),
            **{f"clean.{i}": rows for i, (_, rows) in enumerate(self._clean)},
        }
        tensors["frames"] = torch.tensor([self._frame, self._history, *(frame for frame, _ in self._clean)])
        save_tensors(tensors, path, {})

    @torch.inference_mode()
    def load(self, path: Path, *, frame: int, sha256: str) -> None:
        """Continue from where `save` was called; the prompt is set already.

        Args:
            path: file that `save` has written.
            frame: latent frame at which it must have been written.
            sha256: digest that the file must have.

        Raises:
            RequestError: the file cannot be read, or is not of this rank of this bundle at this place.
        """
        video, tensors = self._config.video, load_tensors(path, sha256)
        place = tensors.pop("frames", torch.empty(0))
        at, history, *starts = place.tolist() if place.dim() == 1 and place.dtype == torch.int64 else (-1, -1)
        chunks = {video.first_frame_of(chunk) for chunk in range(video.chunks_in(frame) + 1)}
        if at != frame or not 0 <= history <= at or not chunks.issuperset(starts) or starts != sorted(set(starts)):
            raise RequestError(
                f"{path} is damaged, or of another snapshot: it is at frame {at}, the session at {frame}; take another snapshot"
            )
        slots = self.slots.history(history)
        wanted = {name: (list(view.shape), view.dtype) for name, view in slots.items()}
        for index, start in enumerate(starts):
            rows = self._layouts[video.step_at(start)].local_tokens
            wanted[f"clean.{index}"] = ([rows, self._config.model.patch_features], torch.float32)
        check_tensors(path, tensors, wanted)
        for name, view in slots.items():
            view.copy_(tensors[name])
        self._clean = [(start, tensors[f"clean.{index}"].to(self._device)) for index, start in enumerate(starts)]
        self._frame, self._history = frame, history
        self._wait()

    @property
    def _layout(self) -> Layout:
        return self._layouts[self._step_number]

    def _shape_for_next(self) -> None:
        self._step_number = self._config.video.step_at(self._frame)

    def _bind(self) -> None:
        """Go on to the next chunk, and bind what it attends to."""
        self._shape_for_next()
        self._executor.bind(self.buffers.view(self._history, step=self._step_number))

    def _step(self, x: torch.Tensor, time: Conditioning) -> torch.Tensor:
        relative = self._config.video.time_index == "relative"
        return self._executor.step(x, time, self._history if relative else self._frame)

    def _commit(self, clean: torch.Tensor) -> None:
        """Make the clean chunk in staging history, keep its rows for a recache, and go on to the next chunk."""
        plan, chunk_frames = self.slots.plan, self._config.video.chunk_frames
        frames = self._config.video.frames_at(self._frame)
        self.slots.commit(self._history, step=self._step_number)
        self._clean.append((self._frame, clean))
        first = self._config.video.frames_at(self._clean[0][0])
        sinks = 1 + math.ceil((plan.sink_frames - first) / chunk_frames) if plan.sink_frames else 0
        ring = math.ceil(plan.ring_frames / chunk_frames)
        if len(self._clean) > sinks + ring:
            del self._clean[sinks]
        self._frame += frames
        self._history += frames

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _first_noise(self, chunk: int) -> torch.Tensor:
        drawn, self._drawn = self._drawn, None
        if drawn is not None and drawn[0] == chunk:
            return drawn[1]
        return self._local_noise(chunk, 0)

    def _local_noise(self, chunk: int, draw: int) -> torch.Tensor:
        shape = (self._layout.num_tokens, self._config.model.patch_features)
        return self._local_rows(self._noise.draw(chunk, draw, shape))

    def _local_rows(self, every: torch.Tensor) -> torch.Tensor:
        """This rank's rows of `[N, 64]`, padded with zeros, on its device."""
        tokens = self._layout.tokens(self._collectives.rank)
        rows = torch.zeros(self._layout.local_tokens, every.shape[1])
        rows[: len(tokens)] = every[tokens.start : tokens.stop]
        if self._device.type == "cuda":
            return rows.pin_memory().to(self._device, non_blocking=True)
        return rows

    def _gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """All rows on rank 0's host; from a GPU they arrive in pinned memory when the work queued so far is done."""
        gathered = self._collectives.gather(rows.float())
        return None if gathered is None else gathered[: self._layout.num_tokens].to("cpu", non_blocking=True, copy=True)

    def _record(self, records: list[StepRecord] | None, flow: torch.Tensor, x0: torch.Tensor | None) -> None:
        if records is None:
            return
        flows, clean = self._gather(flow), None if x0 is None else self._gather(x0)
        if flows is not None:
            records.append(StepRecord(flow=flows, x0=clean))
