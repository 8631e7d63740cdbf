"""`Session`: a video that is being generated, as an iterator of chunks.

session = engine.session("a fox in the snow", seed=0)
chunk = next(session)                                  # or: async for chunk in session
session.switch_prompt("the fox runs", policy="keep")   # acts from the next chunk on

A slow reader holds back its own session only: at most one chunk is generated before it is requested. The memory of a session
does not grow with the number of its chunks, unless it was begun with `record=True`.
"""

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import torch

from causalrt.engines.bundle import VAE_WEIGHTS, Bundle
from causalrt.errors import CapacityError, EngineClosedError, RequestError
from causalrt.model.tokens import latents_from_tokens
from causalrt.runtime.messages import ChunkCommand, Done, PromptCommand, Reply, SaveCommand
from causalrt.runtime.noise import Noise, SeededNoise
from causalrt.runtime.requests import Embeddings
from causalrt.runtime.rollout import ChunkTimes, StepRecord, SwitchPolicy
from causalrt.runtime.snapshot import SessionRecord, new_snapshot, write_session
from causalrt.runtime.workers import Workers

MAX_TIMES = 1024
"""Number of chunks, the newest ones, whose times a session keeps."""

Made = tuple[torch.Tensor, ChunkTimes, float]
"""A chunk's token rows `[N, 64]`, rank 0's times, and the milliseconds in the queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One generated chunk and its times in milliseconds.

    Attributes:
        index: number of the chunk, from 0.
        latents: `[F, 16, H, W]`, float32, normalised VAE latents; F is that of the chunk (`video.frames_at`).
        frames: uint8 `[T, 8H, 8W, 3]`, or None without a VAE; 4 frames a latent, but one for the video's first.
        latency_ms: from the request to latents and frames in the caller's hands; stages that ran before the request, where
            chunks are generated ahead, do not count.
        queue_ms: the part of it spent waiting for earlier work: the previous chunk's refresh, other sessions.
        times: rank 0's stages; the context pass has not run yet (`Session.times` has it afterwards).
        decode_ms: what the decoder took; 0 without a VAE.
    """

    index: int
    latents: torch.Tensor
    frames: torch.Tensor | None
    latency_ms: float
    queue_ms: float
    times: ChunkTimes
    decode_ms: float

    @property
    def hand_over_ms(self) -> float:
        """The rest of the latency: transfers between processes, drawing noise, binding KV slots."""
        named = self.queue_ms + sum(self.times.denoise_ms) + self.times.gather_ms + self.decode_ms
        return max(0.0, self.latency_ms - named)


class Session:
    """An iterator of chunks for one thread; created by `Engine.session`.

    Attributes:
        times: `ChunkTimes` by rank, for each finished chunk by its index; of the newest `MAX_TIMES` chunks. A chunk is
            finished when the next command (or `close`) has taken in the end of its context pass.
        records: with `record=True`, for each finished chunk what each forward computed.
        initial_records: with `record=True`, for each chunk of the initial latents what its forward computed.
        kv_rows_moved: rows of one head that the last finished chunk had moved to history, over the session.
        text_ms: milliseconds that encoding the prompt took; 0 for embeddings.
        initial_frames: what the initial latents decode to, uint8 `[T, 8H, 8W, 3]`, if there were some and a VAE.
    """

    def __init__(
        self,
        number: int,
        *,
        workers: Workers,
        bundle: Bundle,
        encode_prompt: Callable[[str | Embeddings], tuple[torch.Tensor, float]],
        text: torch.Tensor,
        noise: Noise,
        num_chunks: int,
        num_given: int,
        ahead: bool,
        text_ms: float,
        record: bool,
    ) -> None:
        self.number = number
        self.num_chunks = num_chunks
        self.text_ms = text_ms
        self.initial_frames: torch.Tensor | None = None
        self.times: dict[int, dict[int, ChunkTimes]] = {}
        self.records: list[tuple[StepRecord, ...]] = []
        self.initial_records: list[tuple[StepRecord, ...]] = []
        self.kv_rows_moved = 0
        self._workers, self._bundle, self._encode_prompt = workers, bundle, encode_prompt
        self._text, self._noise = text, noise
        self._num_given = num_given
        self._record = record
        self._ahead_thread = ThreadPoolExecutor(1, f"causalrt-session-{number}") if ahead else None
        self._made_ahead: Future[Made] | None = None
        self._next = 0
        self._interrupted: Chunk | None = None
        # One caller at a time: when a task is cancelled, its chunk is still made, and then dropped.
        self._lock = threading.RLock()
        self._closed = self._freed = False
        self._cancelled = False
        self._finalizer = weakref.finalize(self, workers.abandon_session, number)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Generate the next chunk. The session closes itself after the last one, or when it was cancelled.

        An interrupt (Ctrl-C) is raised as KeyboardInterrupt when the current chunk is complete; the next call returns that
        chunk. A second interrupt is raised at once and ends the engine.

        Raises:
            RankError: a rank or the decoder died, hung or raised.
            RequestError: the latents are not finite, and cannot be decoded.
            CapacityError: the decoder has too little memory for this session, which is then closed.
            EngineClosedError: the session or the engine was closed.
            ForkError: the engine was loaded by another process, from which this one was forked.
        """
        asked = time.perf_counter()
        self._workers.check_owner()
        with self._lock:
            with self._workers.deferred_interrupts():
                if self._cancelled or (self._next == self.num_chunks and self._interrupted is None):
                    self.close()
                    raise StopIteration
                self._check_open()
                self._interrupted = self._interrupted or self._next_chunk(asked)
            chunk, self._interrupted = self._interrupted, None
            return chunk

    def _next_chunk(self, asked: float) -> Chunk:
        index = self._next
        made = self._generate(index) if self._made_ahead is None else self._made_ahead.result()
        self._next, self._made_ahead = index + 1, None
        if self._ahead_thread is not None and self._next < self.num_chunks:
            self._made_ahead = self._ahead_thread.submit(self._generate, self._next)
        rows, times, queue_ms = made
        latents, frames, decode_ms = latents_from_tokens(rows, self._bundle.config), None, 0.0
        if self._workers.decoder is not None:
            try:
                decoded = self._workers.decode(self.number, latents)
            except (CapacityError, RequestError):  # now the ranks are a chunk ahead of the decoder
                self.close()
                raise
            frames, decode_ms = decoded.frames, decoded.decode_ms
            queue_ms += decoded.queue_ms
        return Chunk(
            index=index,
            latents=latents,
            frames=frames,
            latency_ms=1e3 * (time.perf_counter() - asked),
            queue_ms=queue_ms,
            times=times,
            decode_ms=decode_ms,
        )

    @property
    def next_chunk(self) -> int:
        """Number of the first chunk that has not been started, from which on a prompt switch would act."""
        return self._next if self._made_ahead is None else self._next + 1

    def _generate(self, index: int) -> Made:
        """Make a chunk; the ranks go on with its context pass when this returns."""
        asked = time.perf_counter()
        with self._workers.conversation():
            queue_ms = 1e3 * (time.perf_counter() - asked)
            more = index + 1 < self.num_chunks
            command = ChunkCommand(
                session=self.number,
                index=index,
                frame=self._bundle.config.video.first_frame_of(self._num_given + index),
                context_pass=self._record or more,
                record=self._record,
                draw_next=more,
            )
            self.times[index] = {}
            self.times.pop(index - MAX_TIMES, None)
            latents = self._workers.generate(command, self.take)
        return latents.rows, latents.times, queue_ms

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """Run `next` in a thread.

        If the task is cancelled, the current chunk is completed and dropped, and the next call continues after it.
        """
        chunk = await asyncio.to_thread(next, self, None)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def cancel(self) -> None:
        """End the iteration before the next chunk. This method may be called from any thread, at any time."""
        self._cancelled = True

    def switch_prompt(self, prompt: str | Embeddings, *, policy: SwitchPolicy = "keep") -> float:
        """Change the prompt from the next chunk that has not been started (`next_chunk`) on.

        Args:
            prompt: as for `Engine.session`.
            policy: what happens to the history. `keep`: it stays as the old prompt made it. `recache`: the keys and values of
            the
                frames in the window are recomputed under the new prompt, with one forward for each chunk. `flush`: it is
                dropped.

        Returns:
            Milliseconds from the call until the ranks are ready, including the encoding of the text and earlier work.

        Raises:
            PromptError: text that cannot be encoded, wrong shape or type, or values that are not finite.
            RequestError: no such policy.
            RankError: a rank died, hung or raised.
            EngineClosedError: the session or the engine was closed.
        """
        if policy not in get_args(SwitchPolicy):
            raise RequestError(f"policy must be {', '.join(get_args(SwitchPolicy))}, got {policy!r}")
        asked = time.perf_counter()
        self._workers.check_owner()
        with self._lock:
            self._check_open()
            text, _ = self._encode_prompt(prompt)
            with self._workers.deferred_interrupts():
                if self._made_ahead is not None:
                    self._made_ahead.result()  # the switch acts after the chunk that is made ahead
                with self._workers.conversation():
                    self._workers.run(PromptCommand(session=self.number, text=text, policy=policy))
                self._text = text
        return 1e3 * (time.perf_counter() - asked)

    def snapshot(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the session to a folder, from which `Engine.resume` continues it. The session itself stays open.

        The folder holds the KV slots, the decoder's caches and the prompt: gigabytes for a long window. A resumed session
        continues after the newest chunk that was generated. After an interrupt, first fetch the chunk that was held back with
        `next`.

        Raises:
            RequestError: the last chunk was generated, the noise came from the caller, or the folder cannot be written, in
            which
                case nothing is left of it.
            RankError: a rank or the decoder died, hung or raised.
            EngineClosedError: the session or the engine was closed.
        """
        if not isinstance(self._noise, SeededNoise):
            raise RequestError("a snapshot holds a seed, and the session has noise of its own; begin it with a seed")
        self._workers.check_owner()
        with self._lock, self._workers.deferred_interrupts():
            self._check_open()
            self._write(Path(folder), self._noise.seed, overwrite=overwrite)

    def _write(self, folder: Path, seed: int, *, overwrite: bool) -> None:
        ahead = None if self._made_ahead is None else self._made_ahead.result()[0]
        if self._next + (ahead is not None) == self.num_chunks:
            raise RequestError("the last chunk was generated, so nothing could be resumed; take the snapshot earlier")
        record = SessionRecord(
            seed=seed,
            num_given=self._num_given,
            next_chunk=self._next,
            num_chunks=self.num_chunks,
            vae=self._bundle.hashes[VAE_WEIGHTS] if self._workers.decoder is not None else None,
        )
        with new_snapshot(folder, overwrite=overwrite) as work:
            with self._workers.conversation():
                self._workers.run(SaveCommand(session=self.number, folder=work))
                if self._workers.decoder is not None:
                    self._workers.decoder.save(self.number, work)
            write_session(work, self._bundle, record, self._text, ahead)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the session was closed; open another with engine.session(...)")

    def begin_at(self, chunk: int, rows: torch.Tensor | None) -> None:
        """Continue a resumed session at `chunk`, whose token rows are `rows` if it was generated before the snapshot."""
        self._next = chunk
        if rows is not None:
            self._made_ahead = Future()
            self._made_ahead.set_result((rows, ChunkTimes(), 0.0))

    def abandon(self) -> None:
        """Give the session up; the engine frees its memory before it opens another one."""
        self._closed = True
        self._finalizer()

    def take_initial(self, reply: Done) -> None:
        """Keep what rank 0 has recorded of an initial chunk."""
        if self._record:
            self.initial_records.append(reply.records)

    def take(self, rank: int, reply: Reply) -> None:
        """Store a rank's answer about the chunk that it has finished."""
        assert isinstance(reply, Done)
        assert reply.times is not None
        self.times[max(self.times)][rank] = reply.times
        if rank == 0:
            self.kv_rows_moved = reply.kv_rows_moved
            if self._record:
                self.records.append(reply.records)

    def close(self) -> None:
        """Free the session on every rank, once the current chunk is complete.

        Calling it again, or in a forked process, has no effect.
        """
        if not self._workers.is_ours:
            return
        with self._lock, self._workers.deferred_interrupts():
            self._closed = True
            if self._freed:
                return
            if self._ahead_thread is not None:
                self._ahead_thread.shutdown(cancel_futures=True)
            with contextlib.suppress(EngineClosedError), self._workers.conversation():
                self._workers.close_session(self.number)
            self._freed = True
            self._finalizer.detach()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
