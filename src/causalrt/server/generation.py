"""One generation: a thread that drives a session, encodes its chunks, and passes them to an output.

    Control   any thread may stop, pause, resume or switch the generation; a reader gives credit for chunks
    Output    receives the frames: a file (jobs.py) or a WebSocket (realtime_messages.py)

A chunk is generated only when there is credit for it, so a slow reader stops the generator and no frame is dropped.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

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
from causalrt.runtime.engine import Engine
from causalrt.runtime.rollout import SwitchPolicy
from causalrt.runtime.session import Session
from causalrt.server.api_errors import ApiError, bad_request, busy, not_ready
from causalrt.server.engine_host import EngineHost
from causalrt.server.metrics import Metrics

log = logging.getLogger(__name__)

Kind = Literal["job", "realtime"]
MOST_SWITCHES = 4  # that may be pending


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        prompt: text of the prompt as the client sent it.
        prompt_cut_to: tokens to which the prompt is cut, as `ModelLimits.check_prompt` returns it.
        seed: seed of the noise.
        num_chunks: number of chunks; None continues as long as the bundle can.
    """

    prompt: str
    prompt_cut_to: int | None
    seed: int
    num_chunks: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """A new prompt from the next chunk on; `prompt_cut_to` as in `GenerationRequest`."""

    prompt: str
    prompt_cut_to: int | None
    policy: SwitchPolicy


class Output(Protocol):
    """Receiver of a generation; its methods are called from the generation's thread, in this order."""

    def started(self, *, text_ms: float) -> None:
        """Handle the start of the session."""

    def write(self, frames: torch.Tensor) -> float:
        """Encode the frames of a chunk and return the milliseconds that this took."""

    def chunk_done(self, *, index: int, frames: int, latency_ms: float, stages: dict[str, float | None]) -> None:
        """Handle the timings of the chunk that was written."""

    def paused(self, yes: bool) -> None:
        """Handle that the generator has paused on request, or has resumed."""

    def switched(self, switch: Switch, *, ms: float, from_chunk: int) -> None:
        """Handle a change of the prompt."""

    def refused(self, error: ApiError) -> None:
        """Handle a prompt switch that failed; the video continues."""

    def finish(self) -> bool:
        """Handle the end of the chunks; return True if the output is complete, even if the generation was stopped meanwhile."""

    def discard(self) -> None:
        """Handle a failure: remove incomplete output."""


class Control:
    """Controls a running generation. Every method may be called from any thread."""

    def __init__(self, *, credit: int | None = None, pause_s: float = 600.0) -> None:
        """`credit` is the number of chunks that may be made without `refund`, None unlimited; `pause_s` limits a pause."""
        self._credit = credit
        self._pause_s, self._pause_ends = pause_s, 0.0
        self._paused = self._reported_pause = False
        self._switches: deque[Switch] = deque()
        self._reason: str | None = None
        self._session: Session | None = None
        self._changed = threading.Condition()

    @property
    def reason(self) -> str | None:
        """Reason why the generation was stopped; None if it was not."""
        return self._reason

    def stop(self, reason: str) -> None:
        """Stop the generation before the next chunk; the first reason counts."""
        with self._changed:
            if self._reason is None:
                self._reason = reason
            session = self._session
            self._changed.notify_all()
        if session is not None:
            session.cancel()

    def pause(self, yes: bool) -> None:
        """Pause the generation before the next chunk, or resume it."""
        with self._changed:
            if yes and not self._paused:
                self._pause_ends = time.monotonic() + self._pause_s
            self._paused = yes
            self._changed.notify_all()

    def refund(self) -> None:
        """Allow one more chunk, since one has reached the reader."""
        with self._changed:
            if self._credit is not None:
                self._credit += 1
            self._changed.notify_all()

    def switch(self, switch: Switch) -> None:
        """Change the prompt before the next chunk.

        Raises:
            ApiError: too many switches are pending.
        """
        with self._changed:
            if len(self._switches) >= MOST_SWITCHES:
                raise busy(f"{MOST_SWITCHES} prompt switches are already pending", retry_after_s=1)
            self._switches.append(switch)
            self._changed.notify_all()

    def attach(self, session: Session | None) -> None:
        """Set the session that `stop` cancels."""
        with self._changed:
            self._session = session
            stopped = self._reason is not None
        if stopped and session is not None:
            session.cancel()

    def next(self, on_pause: Callable[[bool], None]) -> Switch | Literal["chunk", "stop"]:
        """Return what to do next; wait while the generation is paused or has no credit."""
        with self._changed:
            while self._reason is None:
                if self._paused and time.monotonic() >= self._pause_ends:
                    self._reason = "stalled"
                elif self._switches:
                    return self._switches.popleft()
                else:
                    if self._paused != self._reported_pause:
                        self._reported_pause = self._paused
                        on_pause(self._reported_pause)
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
    """Runs each generation on a thread of a pool. Its public methods are called on the event loop."""

    def __init__(
        self, host: EngineHost, encode: Callable[[str], torch.Tensor], metrics: Metrics, *, threads: int
    ) -> None:
        self._host = host
        self._encode = encode
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="causalrt-generation")
        self._controls: set[Control] = set()

    async def run(self, kind: Kind, request: GenerationRequest, control: Control, output: Output) -> tuple[str, int]:
        """Generate until the end, or until `control` stops it.

        Returns:
            The reason of the end (`done`, or the reason given to `control`), and the number of chunks.

        Raises:
            ApiError: the generation failed, or its prompt cannot be used; the output was discarded.
        """
        self._controls.add(control)
        future = asyncio.get_running_loop().run_in_executor(self._pool, self._generate, kind, request, control, output)
        try:
            reason, chunks = await asyncio.shield(future)
        except asyncio.CancelledError:
            control.stop("cancelled")
            await asyncio.wait([future])
            raise
        except ApiError as error:
            self._metrics.errors.labels(error.code).inc()
            self._metrics.generations.labels(kind, "failed").inc()
            raise
        finally:
            self._controls.discard(control)
        self._metrics.generations.labels(kind, reason).inc()
        return reason, chunks

    @property
    def stopping(self) -> int:
        """Number of stopped generations that are still in their last chunk."""
        return sum(control.reason is not None for control in self._controls)

    def stop_all(self, reason: str) -> None:
        """Stop every generation before its next chunk."""
        for control in list(self._controls):
            control.stop(reason)

    def close(self) -> None:
        """End the threads as their generations end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _generate(self, kind: Kind, request: GenerationRequest, control: Control, output: Output) -> tuple[str, int]:
        engine = None
        try:
            engine = self._host.engine()
            session, text_ms = self._begin(engine, request)
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
                log.exception("the output of a failed generation could not be discarded")
            if isinstance(error, RankError | EngineClosedError):
                if control.reason:  # the engine was closed because the server ends
                    return control.reason, 0
                if engine is None:
                    raise not_ready(str(error)) from error
                self._host.report(engine, error)
            raise _api_error(error) from error

    def _begin(self, engine: Engine, request: GenerationRequest) -> tuple[Session, float]:
        """Open a session; return it and the milliseconds of text encoding. The request causes the errors raised here."""
        begun = time.perf_counter()
        try:
            embeds = self._encode(request.prompt)
            text_ms = 1e3 * (time.perf_counter() - begun)
            return engine.session(embeds, seed=request.seed, num_chunks=request.num_chunks), text_ms
        except (PromptError, RequestError) as error:
            raise bad_request(str(error), param="prompt" if isinstance(error, PromptError) else None) from error

    def _close(self, engine: Engine, session: Session) -> None:
        """Close a session; an error in that does not affect what was generated."""
        try:
            session.close()
        except (RankError, EngineClosedError) as error:
            log.warning("a session could not be closed: %s", error)
            self._host.report(engine, error)
        except Exception:
            log.exception("a session could not be closed")

    def _drive(
        self, kind: Kind, engine: Engine, session: Session, control: Control, output: Output, text_ms: float
    ) -> int:
        done = 0
        while (step := control.next(output.paused)) != "stop":
            if isinstance(step, Switch):
                self._switch(session, step, output)
                continue
            chunk = next(session, None)
            if chunk is None:
                break
            frames = chunk.frames
            assert frames is not None  # the engine has a VAE
            self._host.chunk_took(
                engine, 1e-3 * (sum(chunk.times.denoise_ms) + chunk.times.gather_ms + chunk.decode_ms)
            )
            encode_ms = output.write(frames)
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
            self._count(kind, len(frames), chunk.latency_ms, stages)
            done += 1
            output.chunk_done(index=chunk.index, frames=len(frames), latency_ms=chunk.latency_ms, stages=stages)
        return done

    def _switch(self, session: Session, switch: Switch, output: Output) -> None:
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


def _api_error(error: BaseException) -> ApiError:
    """Return the error to send to the client; internal errors are logged and not sent."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return busy(str(error), retry_after_s=5)
    if isinstance(error, RankError | EngineClosedError):
        return not_ready("the generating processes have died and are being restarted; send the request again")
    if isinstance(error, VideoError | ExecutorError):
        log.error("a video could not be written: %s", error)
        return ApiError(500, "video_failed", "the video could not be written; the server's log says why")
    log.exception("a generation failed", exc_info=error)
    return ApiError(500, "internal", "the generation failed; the server's log says why")
