"""`load` and `Engine`: a bundle on its ranks, and the sessions that generate from it.

    engine = causalrt.load("bundle", executor="onnxruntime")
    with engine.session(prompt_embeds, seed=0) as session:
        for chunk in session:
            use(chunk.latents)                # [F, 16, H, W]

Commands from several sessions (or threads) take turns by chunk. The refresh of a chunk runs on the ranks while the caller
uses its latents; whoever commands next waits for it.
"""

import contextlib
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.kinds import choose_device, executor_kind
from causalrt.errors import BundleError, ExecutorError, RequestError
from causalrt.plugins.kernel_launch import require_triton
from causalrt.runtime.memory import check_memory, predict_memory
from causalrt.runtime.messages import (
    CloseCommand,
    Done,
    GivenCommand,
    LoadCommand,
    OpenCommand,
    PromptCommand,
    Reply,
)
from causalrt.runtime.noise import Noise, SeededNoise, checked_noise
from causalrt.runtime.ranks import START_S, WARM_START_S, RankPool
from causalrt.runtime.session import Embeddings, Session, checked_chunks, checked_given, checked_text

DEFAULT_TIMEOUT_S = 600.0


def load(
    bundle: str | Path,
    *,
    executor: str | None = None,
    world_size: int | None = None,
    device: str | None = None,
    plugins: bool | None = None,
    num_threads: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> "Engine":
    """Verify a bundle, start its rank processes, and keep them warm.

    Args:
        bundle: folder written by `causalrt build`.
        executor: one of `EXECUTORS`; by default the best that the bundle was built for.
        world_size: ranks that the caller expects; must be what the bundle was built for.
        device: `cuda` (rank r on GPU r) or `cpu`; by default GPUs, where the executor can use them and each rank has one.
        plugins: have `eager` and `inductor` run self-attention by the fused ops (Triton kernels on a GPU), or not; by default
            as the bundle was built. The others run what was built.
        num_threads: CPU threads of each rank; by default the cores shared among the ranks.
        timeout_s: a rank that gives no answer for so long has failed; starting may take two minutes however short it is, and
            half an hour with an executor that compiles.

    Raises:
        BundleError: damaged, or built for another world size or executor.
        ExecutorError: the executor cannot run here.
        KernelError: `plugins` on GPUs, and Triton is missing.
        OutOfMemoryError: the ranks would not fit.
        RankError: a rank process failed to start.
        RequestError: `timeout_s` or `num_threads` is out of range.
    """
    if not 0.001 <= timeout_s <= 1e6:
        raise RequestError(f"timeout_s must lie in [0.001, 1e6], got {timeout_s}; give 1e6 for `never`")
    if num_threads is not None and num_threads < 1:
        raise RequestError(f"num_threads must be at least 1, got {num_threads}; leave it out to share the cores")
    opened = open_bundle(Path(bundle))
    built_for = opened.config.build.world_size
    if world_size is not None and world_size != built_for:
        raise BundleError(
            f"{bundle} was built for {built_for} rank(s), not {world_size}; load it with world_size={built_for}, "
            f"or build one with `--world-size {world_size}`"
        )
    chosen = executor or opened.executors[-1]
    kind = executor_kind(chosen)
    if kind.compiled and chosen not in opened.executors:
        raise BundleError(
            f"{bundle} was built for {', '.join(opened.executors)}; build again with `--executor {chosen}` to run it so"
        )
    if plugins not in (None, True, False):
        raise RequestError(f"plugins must be True, False, or None (as the bundle was built), got {plugins!r}")
    fused = opened.plugins if plugins is None else plugins
    if not fused and opened.config.video.time_index == "relative":
        raise ExecutorError(
            f"{bundle} has video.time_index=relative, which is what the fused ops do; load it with plugins on"
        )
    if fused != opened.plugins and kind.compiled:
        built, wanted = ("on", "off") if opened.plugins else ("off", "on")
        raise ExecutorError(
            f"{chosen} runs what was built, and {bundle} was built with plugins {built}; build again with `--plugins {wanted}`"
        )
    where = choose_device(chosen, asked=device, world_size=built_for)
    if fused and where == "cuda" and not kind.compiled:
        require_triton()
    if where == "cpu":
        precision = opened.config.build.precision
        if chosen == "onnxruntime" and precision != "float32":
            raise ExecutorError(
                f"onnxruntime on a CPU runs float32 only, and {bundle} is {precision}; load it with executor='eager', run it "
                "on a GPU with onnxruntime-gpu, or build it again with `--dtype float32`"
            )
        check_memory(predict_memory(opened.config, chosen), ranks=built_for, shared_weights=not kind.compiled)
    return Engine(opened, chosen, device=where, plugins=fused, num_threads=num_threads, timeout_s=timeout_s)


class Engine:
    """A loaded bundle; made by `load`, ended by `close` or a `with` block."""

    def __init__(
        self,
        bundle: Bundle,
        executor: str,
        *,
        device: str,
        plugins: bool,
        num_threads: int | None,
        timeout_s: float,
    ) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.executor = executor
        self.device = device
        world_size = bundle.config.build.world_size
        self.num_threads = num_threads or max(1, len(os.sched_getaffinity(0)) // world_size)
        self._start_s = WARM_START_S if executor_kind(executor).warms_up else START_S
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._dropped: deque[int] = deque()
        self._unfinished: tuple[Session, Iterator[tuple[int, Reply]]] | None = None
        self._pool = RankPool(world_size, timeout_s=timeout_s)
        self._finalizer = weakref.finalize(self, self._pool.close, kill=True)
        with self._turn():
            self._run(
                LoadCommand(
                    bundle=bundle.path,
                    executor=executor,
                    device=device,
                    plugins=plugins,
                    num_threads=self.num_threads,
                    timeout_s=max(timeout_s, self._start_s),
                )
            )

    @property
    def rank_pids(self) -> list[int]:
        """Process numbers of the ranks."""
        return self._pool.pids

    def session(
        self,
        prompt_embeds: Embeddings,
        *,
        seed: int = 0,
        num_chunks: int | None = None,
        given: torch.Tensor | None = None,
        noise: torch.Tensor | Sequence[torch.Tensor] | None = None,
        record: bool = False,
    ) -> Session:
        """Begin a rollout.

        Args:
            prompt_embeds: `[rows, text_dim]` with rows <= text_len; missing rows are zero, as in the reference.
            seed: of the noise; the same seed gives the same video on any number of ranks.
            num_chunks: chunks to generate; by default as many as the horizon holds, given frames included, and with
                `video.time_index=relative` any number is possible.
            given: `[G, 16, H, W]`, clean latents that the video begins with (an encoded clip, or the end of an earlier video),
                whole chunks, after one frame where a video's first is alone (`independent_first_frame`); they are not among
                the chunks that come out.
            noise: for each chunk `[steps, N, 64]` token rows to use instead of the seed's; one tensor will do where all chunks
                are of one length.
            record: keep the flow and x0 of every forward in `Session.records`.

        Raises:
            PromptError: wrong shape or type, or values that are not finite.
            RequestError: more chunks than the bundle can make (`checked_chunks`), or given frames or noise of a wrong shape.
        """
        given_rows = checked_given(self.config, given)
        chunks = checked_chunks(self.config, num_chunks, num_given=len(given_rows))
        source: Noise = SeededNoise(seed)
        if noise is not None:
            source = checked_noise(self.config, noise, num_chunks=chunks, num_given=len(given_rows))
        text = checked_text(self.config, prompt_embeds)
        session = Session(self, next(self._numbers), chunks, record)
        with self._turn():
            self._settle()
            while self._dropped:
                self._run(CloseCommand(session=self._dropped.popleft()))
            self._run(OpenCommand(session=session.number, text=text, noise=source))
            for rows in given_rows:
                session.take_given(self._run(GivenCommand(session=session.number, rows=rows, record=record)))
        return session

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One conversation with the ranks. One that breaks off ends them: its answers would be left in the channels."""
        with self._lock:
            try:
                yield
            except BaseException:
                self._pool.close(kill=True)
                raise

    def _run(self, command: LoadCommand | OpenCommand | GivenCommand | PromptCommand | CloseCommand) -> Done:
        """Have every rank do it; what rank 0 answers."""
        self._pool.send(command)
        answers = dict(self._pool.replies(at_least_s=self._start_s if isinstance(command, LoadCommand) else 0.0))
        assert isinstance(answers[0], Done)
        return answers[0]

    def _settle(self) -> None:
        """Take in what the ranks still owe: the end of the last chunk's refresh."""
        if self._unfinished is not None:
            session, replies = self._unfinished
            for rank, reply in replies:
                session.take(rank, reply)
            self._unfinished = None

    def wait(self) -> None:
        """Return when the ranks are idle: the last chunk's refresh has ended, and its session's `times` are complete."""
        with self._turn():
            self._pool.check_open()
            self._settle()

    def close(self) -> None:
        """End the ranks and free their memory; harmless when called again.

        A chunk that another thread is waiting for ends with an `EngineClosedError` there.
        """
        if not self._lock.acquire(blocking=False):
            self._pool.kill()
            self._lock.acquire()
        try:
            self._pool.close()
        finally:
            self._lock.release()
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
