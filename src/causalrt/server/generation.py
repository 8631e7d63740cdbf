"""One generation: a thread that drives a session, encodes its chunks, and hands them over.

    Control   any thread says: stop, pause, resume, switch; a reader gives credit for chunks
    Output    takes what comes out: a file that is written (jobs.py), or a WebSocket that is fed (realtime.py)

A chunk is generated when there is credit for it, so a slow reader stops the generator, and nothing is dropped.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from causalrt.errors import (
    CapacityError,
    EngineClosedError,
    ExecutorError,
    PromptError,
    RankError,
    RequestError,
    VideoError,
)
from causalrt.server.api_errors import ApiError, bad_request, busy, not_ready
from causalrt.server.engine_host import EngineHost, EngineLike, SessionLike
from causalrt.server.metrics import Metrics

log = logging.getLogger(__name__)

Kind = Literal["job", "realtime"]
MOST_SWITCHES = 4  # asked for and not yet made


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What is to be generated.

    Attributes:
        prompt: as it was given.
        prompt_cut_to: what `ModelLimits.check_prompt` says of it.
        seed: of the noise.
        num_chunks: None goes on as long as the bundle can.
    """

    prompt: str
    prompt_cut_to: int | None
    seed: int
    num_chunks: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """Another prompt from the next chunk on; `prompt_cut_to` is what `ModelLimits.check_prompt` says of it."""

    prompt: str
    prompt_cut_to: int | None
    policy: str


class Output(Protocol):
    """Where a generation goes; called from its thread, in this order."""

    def started(self, *, text_ms: float) -> None:
        """The session is open."""

    def write(self, frames: torch.Tensor) -> float:
        """A chunk's frames; returns the milliseconds of encoding."""

    def chunk_done(self, *, index: int, frames: int, latency_ms: float, stages: dict[str, float | None]) -> None:
        """What is known of the chunk that was written."""

    def paused(self, yes: bool) -> None:
        """The generator stands still because it was told to, or goes on."""

    def switched(self, switch: Switch, *, ms: float, from_chunk: int) -> None:
        """The prompt has changed."""

    def refused(self, problem: ApiError) -> None:
        """A switch could not be made; the video goes on."""

    def finish(self) -> bool:
        """No chunk comes any more. True: it is done, whatever it was told meanwhile."""

    def discard(self) -> None:
        """It failed: leave nothing half-written."""


class Control:
    """What a generation is told while it runs. Every method may be called from any thread."""

    def __init__(self, *, credit: int | None = None, pause_s: float = 600.0) -> None:
        """`credit`: chunks that may be made before `refund` is called; None needs none. A pause ends after `pause_s`."""
        self._credit = credit
        self._pause_s, self._pause_ends = pause_s, 0.0
        self._paused = self._told = False
        self._switches: deque[Switch] = deque()
        self._reason: str | None = None
        self._session: SessionLike | None = None
        self._changed = threading.Condition()

    @property
    def reason(self) -> str | None:
        """Why it was stopped; None if it was not."""
        return self._reason

    def stop(self, reason: str) -> None:
        """End it before the next chunk; the first reason counts."""
        with self._changed:
            if self._reason is None:
                self._reason = reason
            session = self._session
            self._changed.notify_all()
        if session is not None:
            session.cancel()

    def pause(self, yes: bool) -> None:
        """Make no chunk until it is resumed."""
        with self._changed:
            if yes and not self._paused:
                self._pause_ends = time.monotonic() + self._pause_s
            self._paused = yes
            self._changed.notify_all()

    def refund(self) -> None:
        """A chunk has reached the reader: another may be made."""
        with self._changed:
            if self._credit is not None:
                self._credit += 1
            self._changed.notify_all()

    def switch(self, switch: Switch) -> None:
        """Change the prompt before the next chunk.

        Raises:
            ApiError: too many are waiting.
        """
        with self._changed:
            if len(self._switches) >= MOST_SWITCHES:
                raise busy(f"{MOST_SWITCHES} prompt switches are waiting already", retry_after_s=1)
            self._switches.append(switch)
            self._changed.notify_all()

    def attach(self, session: SessionLike | None) -> None:
        """The session to cancel when it is stopped."""
        with self._changed:
            self._session = session
            stopped = self._reason is not None
        if stopped and session is not None:
            session.cancel()

    def next(self, on_pause: Callable[[bool], None]) -> Switch | Literal["chunk", "stop"]:
        """What to do next; waits while it is paused or without credit."""
        with self._changed:
            while self._reason is None:
                if self._paused and time.monotonic() >= self._pause_ends:
                    self._reason = "stalled"
                elif self._switches:
                    return self._switches.popleft()
                else:
                    if self._paused != self._told:
                        self._told = self._paused
                        on_pause(self._told)
                    if self._paused:
                        self._changed.wait(self._pause_ends - time.monotonic())
                    elif self._credit == 0:
                        self._changed.wait()
                    else:
                        if self._credit is not None:
                            self._credit -= 1
                        return "chunk"
            return "stop"


class Generator:
    """Runs generations, each on a thread of a pool. Belongs to the event loop, its threads aside."""

    def __init__(
        self, host: EngineHost, encode: Callable[[str], torch.Tensor], metrics: Metrics, *, threads: int
    ) -> None:
        self._host = host
        self._encode = encode
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="causalrt-generation")
        self._controls: set[Control] = set()

    async def run(self, kind: Kind, wish: GenerationRequest, control: Control, output: Output) -> tuple[str, int]:
        """Generate until the end, or until `control` says stop.

        Returns:
            The reason of the end (`done`, or what `control` was told), and the number of chunks.

        Raises:
            ApiError: it failed, or its prompt cannot be used; the output was discarded.
        """
        self._controls.add(control)
        future = asyncio.get_running_loop().run_in_executor(self._pool, self._generate, kind, wish, control, output)
        try:
            reason, chunks = await asyncio.shield(future)
        except asyncio.CancelledError:
            control.stop("cancelled")
            await asyncio.wait([future])
            raise
        except ApiError as problem:
            self._metrics.problems.labels(problem.code).inc()
            self._metrics.generations.labels(kind, "failed").inc()
            raise
        finally:
            self._controls.discard(control)
        self._metrics.generations.labels(kind, reason).inc()
        return reason, chunks

    @property
    def stopping(self) -> int:
        """Generations that were told to stop and are still in their last chunk."""
        return sum(control.reason is not None for control in self._controls)

    def stop_all(self, reason: str) -> None:
        """End every generation before its next chunk."""
        for control in list(self._controls):
            control.stop(reason)

    def close(self) -> None:
        """End the threads, once their generations have ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _generate(self, kind: Kind, wish: GenerationRequest, control: Control, output: Output) -> tuple[str, int]:
        engine = None
        try:
            engine = self._host.engine()
            session, text_ms = self._begin(engine, wish)
            try:
                control.attach(session)
                output.started(text_ms=text_ms)
                chunks = self._drive(kind, engine, session, control, output, text_ms)
                complete = output.finish()
            finally:
                control.attach(None)
                self._close(engine, session)
            return "done" if complete else control.reason or "done", chunks
        except BaseException as error:
            try:
                output.discard()
            except Exception:
                log.exception("what a failed generation has written could not be discarded")
            if isinstance(error, RankError | EngineClosedError):
                if control.reason:  # the engine was closed because the server ends
                    return control.reason, 0
                if engine is None:
                    raise not_ready(str(error)) from error
                self._host.report(engine, error)
            raise _problem(error) from error

    def _begin(self, engine: EngineLike, wish: GenerationRequest) -> tuple[Any, float]:
        """A session, and the milliseconds of its text. What is refused here is the client's affair, and later our own."""
        begun = time.perf_counter()
        try:
            embeds = self._encode(wish.prompt)
            text_ms = 1e3 * (time.perf_counter() - begun)
            return engine.session(embeds, seed=wish.seed, num_chunks=wish.num_chunks), text_ms
        except (PromptError, RequestError) as error:
            raise bad_request(str(error), param="prompt" if isinstance(error, PromptError) else None) from error

    def _close(self, engine: EngineLike, session: SessionLike) -> None:
        """Close a session; what goes wrong with that takes nothing from what was generated."""
        try:
            session.close()
        except (RankError, EngineClosedError) as error:
            log.warning("a session could not be closed: %s", error)
            self._host.report(engine, error)
        except Exception:
            log.exception("a session could not be closed")

    def _drive(
        self, kind: Kind, engine: EngineLike, session: Any, control: Control, output: Output, text_ms: float
    ) -> int:
        done = 0
        while (step := control.next(output.paused)) != "stop":
            if isinstance(step, Switch):
                self._switch(session, step, output)
                continue
            chunk = next(session, None)
            if chunk is None:
                break
            self._host.chunk_took(
                engine, 1e-3 * (sum(chunk.times.denoise_ms) + chunk.times.gather_ms + chunk.decode_ms)
            )
            encode_ms = output.write(chunk.frames)
            stages: dict[str, float | None] = {
                "queue": chunk.queue_ms,
                "denoise": sum(chunk.times.denoise_ms),
                "exchange": chunk.times.exchange_ms,
                "gather": chunk.times.gather_ms,
                "decode": chunk.decode_ms,
                "hand_over": chunk.hand_over_ms,
                "encode": encode_ms,
            }
            if chunk.index == 0:
                stages["text"] = text_ms
            self._count(kind, len(chunk.frames), chunk.latency_ms, stages)
            done += 1
            output.chunk_done(index=chunk.index, frames=len(chunk.frames), latency_ms=chunk.latency_ms, stages=stages)
        return done

    def _switch(self, session: Any, switch: Switch, output: Output) -> None:
        begun = time.perf_counter()
        try:
            from_chunk = session.next_chunk
            session.switch_prompt(self._encode(switch.prompt), policy=switch.policy)
        except (PromptError, RequestError) as error:
            output.refused(bad_request(str(error), param="prompt"))
            return
        seconds = time.perf_counter() - begun
        self._metrics.switch.labels(switch.policy).observe(seconds)
        output.switched(switch, ms=1e3 * seconds, from_chunk=from_chunk)

    def _count(self, kind: Kind, frames: int, latency_ms: float, stages: dict[str, float | None]) -> None:
        self._metrics.frames.labels(kind).inc(frames)
        self._metrics.chunk.labels("whole").observe(latency_ms / 1e3)
        for stage, ms in stages.items():
            if ms is not None:
                self._metrics.chunk.labels(stage).observe(ms / 1e3)


def _problem(error: BaseException) -> ApiError:
    """The error in a client's words; what is our own affair goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return busy(str(error), retry_after_s=5)
    if isinstance(error, RankError | EngineClosedError):
        return not_ready(
            "the generating processes have died; the server tries to start them again. Send the request once more"
        )
    if isinstance(error, VideoError | ExecutorError):
        log.error("a video could not be written: %s", error)
        return ApiError(500, "video_failed", "the video could not be written; the server's log says why")
    log.exception("a generation failed", exc_info=error)
    return ApiError(500, "internal", "the generation failed; the server's log says why")
