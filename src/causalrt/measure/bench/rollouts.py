"""The measurement: all replicas stay loaded, and take turns chunk by chunk in an order that changes.

    load             process start, load, open, first chunk    once for each replica: the first frame after a cold start
    repeat 0         sessions, all chunks                      warm-up; host waits are counted here
    repeat 1 .. R    sessions, all chunks                      the same seed and prompt for all replicas; latents are compared

After each chunk the ranks are waited for, so that the context pass of one replica is over before the turn of another. Latency
is the time from the request until latents (and frames) have arrived at the caller. The period adds the rest of the context
pass, and is the time between chunks of a stream.
"""

import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from causalrt.errors import MeasurementError
from causalrt.measure.bench.machine import peak_host_bytes
from causalrt.measure.bench.replicas import Replica
from causalrt.progress import Progress
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.runtime.rollout import ChunkTimes
from causalrt.runtime.session import Chunk, Session

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference (root mean square) between latents of replicas that do the same work, about ten times what
rounding causes in small models. Other seeds or prompts differ by about 1."""
PROCESS_START_S = 120.0
"""Longest time that an interpreter may take to start and import this package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSample:
    """One chunk of one replica, in milliseconds.

    Attributes:
        repeat: number of the repeat, from 0; the warm-up has none.
        chunk: index of the chunk.
        kv_frames: latent frames attended to.
        latency_ms: from the request to latents and frames.
        period_ms: from the request to idle ranks, the context pass included; None for the last chunk, which has no such pass.
        denoise_ms: each denoising step, exchange included.
        exchange_ms: exchanges of all denoising steps; None where the host does not see them.
        gather_ms: collecting the latents on rank 0.
        decode_ms: decoding by the VAE.
        hand_over_ms: the rest of the latency.
        queue_ms: waiting for earlier work.
        context_pass_ms: the context pass; 0 if there is none.
        all_to_all_calls: exchanges of the denoising steps, as the host counted them.
        rows_sent: rows of one head sent in them, the rank's own block included.
    """

    repeat: int
    chunk: int
    kv_frames: int
    latency_ms: float
    period_ms: float | None
    denoise_ms: tuple[float, ...]
    exchange_ms: float | None
    gather_ms: float
    decode_ms: float
    hand_over_ms: float
    queue_ms: float
    context_pass_ms: float
    all_to_all_calls: int
    rows_sent: int

    @property
    def step_ms(self) -> float:
        """Mean of the denoising steps."""
        return sum(self.denoise_ms) / len(self.denoise_ms)

    def stages_ms(self) -> dict[str, float]:
        """Parts of the latency; an exchange that the host does not see is inside `denoise`."""
        exchange = {} if self.exchange_ms is None else {"exchange": self.exchange_ms}
        return {
            "queue": self.queue_ms,
            "denoise": sum(self.denoise_ms) - sum(exchange.values()),
            **exchange,
            "gather": self.gather_ms,
            "decode": self.decode_ms,
            "hand_over": self.hand_over_ms,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstSample:
    """The time until a first chunk, in total and by stage, in milliseconds."""

    total_ms: float
    stages_ms: Mapping[str, float]


@dataclass(kw_only=True, slots=True)
class Measured:
    """All samples of one replica.

    Attributes:
        cold: first chunk from the start of a process.
        first_session_ms: latency of chunk 0 right after loading, and in the warm-up.
        warm: first chunk of a new session of a warm engine, for each repeat.
        chunks: all chunks but those of the warm-up.
        largest_difference: largest relative difference of latents from those of the first replica.
        frames: frames shown of each chunk.
        peak_rank_bytes: most resident memory (VmHWM) of each rank.
        peak_decoder_bytes: the same of the decoder; None if there is none.
        peak_device_bytes: most device memory of each rank; None on a CPU.
        device_waits: how often the host of rank 0 waited for the device in one chunk; None on a CPU.
    """

    cold: FirstSample
    first_session_ms: list[float]
    warm: list[FirstSample] = field(default_factory=list)
    chunks: list[ChunkSample] = field(default_factory=list)
    largest_difference: float = 0.0
    frames: tuple[int, ...] = ()
    peak_rank_bytes: tuple[int | None, ...] = ()
    peak_decoder_bytes: int | None = None
    peak_device_bytes: tuple[int | None, ...] = ()
    device_waits: int | None = None


def process_start_ms() -> float:
    """Time the start of an interpreter and the imports of a caller, in a process of its own.

    Raises:
        MeasurementError: the process failed, or took longer than `PROCESS_START_S`.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", "from causalrt import load"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=PROCESS_START_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise MeasurementError(f"the start of a process could not be timed: {error}") from error
    return _ms_since(start)


def _ms_since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """A chunk, the times of each rank for it, and how long it took until the ranks were idle."""

    chunk: Chunk
    times: Mapping[int, ChunkTimes]
    period_ms: float


class Rollouts:
    """The engines of all replicas, which are closed at the end of the `with` block.

    Attributes:
        measured: samples by name of the replica.
        num_chunks: chunks of each rollout.
    """

    def __init__(self, replicas: Sequence[Replica], *, seed: int, num_chunks: int | None, vae: bool) -> None:
        self._replicas = replicas
        self._seed, self._wanted = seed, num_chunks
        self._vae = vae
        self._order = random.Random(seed)
        self._engines: dict[str, Engine] = {}
        self._closing = ExitStack()
        self.measured: dict[str, Measured] = {}
        self.num_chunks = 0
        config = replicas[0].config
        generator = torch.Generator().manual_seed(seed)
        self._prompt = torch.randn(config.model.text_len, config.model.text_dim, generator=generator)
        self._tolerance = TOLERANCES[config.build.precision]

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def decodes(self) -> bool:
        """Whether chunks are decoded to frames."""
        return any(engine.has_vae for engine in self._engines.values())

    def load(self, on_progress: Progress) -> None:
        """Load every replica, and time its first chunk.

        Raises:
            CausalRTError: `load` or `Engine.session` failed.
        """
        before_ms = process_start_ms()
        for done, replica in enumerate(self._replicas):
            on_progress("loading", done, len(self._replicas))
            self._load(replica, before_ms)
        on_progress("loading", len(self._replicas), len(self._replicas))

    def _load(self, replica: Replica, before_ms: float) -> None:
        start = time.perf_counter()
        engine = self._closing.enter_context(
            load(
                replica.bundle,
                executor=replica.executor,
                world_size=replica.world_size,
                device=replica.device,
                fused_ops=replica.fused_ops,
                cuda_graphs=replica.cuda_graphs,
                vae=None if self._vae else False,
                num_threads=replica.threads,
            )
        )
        load_ms = _ms_since(start)
        self._engines[replica.name] = engine
        with engine.session(self._prompt, seed=self._seed, num_chunks=1, ahead=False) as session:
            open_ms = _ms_since(start) - load_ms
            chunk = next(session)
            total_ms = before_ms + _ms_since(start)
        stages = {"start": before_ms, "load": load_ms, "open": open_ms, **_stages_of(chunk, replica.world_size)}
        self.measured[replica.name] = Measured(
            cold=FirstSample(total_ms=total_ms, stages_ms=stages), first_session_ms=[chunk.latency_ms]
        )

    def repeat(self, repeat: int) -> None:
        """Run one rollout of every replica side by side.

        Args:
            repeat: number of the repeat from 0; -1 is the warm-up, which is not kept.

        Raises:
            MeasurementError: latents of two replicas differ by more than rounding explains.
            RankError: a rank died, hung or raised.
        """
        sessions, opened_ms = {}, {}
        for name in self._shuffled():
            start = time.perf_counter()
            sessions[name] = self._engines[name].session(
                self._prompt, seed=self._seed + repeat + 1, num_chunks=self._wanted, ahead=False
            )
            opened_ms[name] = _ms_since(start)
        self.num_chunks = next(iter(sessions.values())).num_chunks
        turns = self._run(sessions, watched=max(0, self.num_chunks - 2) if repeat < 0 else None)
        for name, session in sessions.items():
            session.close()
            self._keep(name, repeat, turns[name], opened_ms[name])

    def _run(self, sessions: Mapping[str, Session], *, watched: int | None) -> dict[str, list[_Turn]]:
        """Run all chunks; host waits are counted in the chunk `watched`."""
        turns: dict[str, list[_Turn]] = {name: [] for name in sessions}
        for index in range(self.num_chunks):
            for name in self._shuffled():
                turns[name].append(self._turn(name, sessions[name], watched=index == watched))
            self._compare({name: own[-1].chunk.latents for name, own in turns.items()}, index)
        return turns

    def _keep(self, name: str, repeat: int, turns: Sequence[_Turn], opened_ms: float) -> None:
        found, first = self.measured[name], turns[0].chunk
        if repeat < 0:
            found.first_session_ms.append(first.latency_ms)
            codec = self._engines[name].config.video.codec
            found.frames = tuple(
                codec.frames_of(len(turn.chunk.latents), first=turn.chunk.index == 0) for turn in turns
            )
            return
        stages = {"open": opened_ms, **_stages_of(first, self._engines[name].config.build.world_size)}
        found.warm.append(FirstSample(total_ms=opened_ms + first.latency_ms, stages_ms=stages))
        found.chunks += [_sample(repeat, turn, self.num_chunks) for turn in turns]

    def read_memory(self) -> None:
        """Read the peak memory of ranks and decoders so far."""
        for name, engine in self._engines.items():
            found = self.measured[name]
            found.peak_rank_bytes = tuple(map(peak_host_bytes, engine.rank_pids))
            found.peak_decoder_bytes = peak_host_bytes(engine.decoder.pid) if engine.decoder is not None else None
            found.peak_device_bytes = tuple(usage.peak_device_bytes for usage in engine.usage())

    def _shuffled(self) -> list[str]:
        names = [replica.name for replica in self._replicas]
        self._order.shuffle(names)
        return names

    def _turn(self, name: str, session: Session, *, watched: bool) -> _Turn:
        engine = self._engines[name]
        if watched:
            engine.usage(count_waits=True)
        start = time.perf_counter()
        chunk = next(session)
        engine.wait()
        period_ms = _ms_since(start)
        if watched:
            self.measured[name].device_waits = engine.usage()[0].device_waits
        # The times are read now, since a session keeps those of its newest chunks only.
        return _Turn(chunk=chunk, times=session.times[chunk.index], period_ms=period_ms)

    def _compare(self, latents: Mapping[str, torch.Tensor], index: int) -> None:
        first = self._replicas[0].name
        reference = latents[first].double()
        for name, produced in latents.items():
            difference = float((produced.double() - reference).norm() / reference.norm())
            if not difference <= self._tolerance:
                raise MeasurementError(
                    f"{name} differs from {first} by {difference:.1e} (relative) in chunk {index}, and rounding explains at "
                    f"most {self._tolerance:g}: this is not the same work, so no time was kept; find out why with "
                    "`causalrt compare`"
                )
            found = self.measured[name]
            found.largest_difference = max(found.largest_difference, difference)


def _exchange_ms(times: ChunkTimes, ranks: int) -> float | None:
    """None where the host does not see the exchange: inside an engine, a compiled step or a CUDA graph."""
    return None if ranks > 1 and not times.all_to_all_calls else times.exchange_ms


def _stages_of(chunk: Chunk, ranks: int) -> dict[str, float]:
    exchange_ms = _exchange_ms(chunk.times, ranks)
    exchange = {} if exchange_ms is None else {"exchange": exchange_ms}
    return {
        "denoise": sum(chunk.times.denoise_ms) - sum(exchange.values()),
        **exchange,
        "gather": chunk.times.gather_ms,
        "decode": chunk.decode_ms,
        "hand_over": chunk.hand_over_ms + chunk.queue_ms,
    }


def _sample(repeat: int, turn: _Turn, num_chunks: int) -> ChunkSample:
    chunk, times = turn.chunk, turn.times[0]
    return ChunkSample(
        repeat=repeat,
        chunk=chunk.index,
        kv_frames=times.kv_frames,
        latency_ms=chunk.latency_ms,
        period_ms=turn.period_ms if chunk.index + 1 < num_chunks else None,
        denoise_ms=tuple(times.denoise_ms),
        exchange_ms=_exchange_ms(times, len(turn.times)),
        gather_ms=times.gather_ms,
        decode_ms=chunk.decode_ms,
        hand_over_ms=chunk.hand_over_ms,
        queue_ms=chunk.queue_ms,
        context_pass_ms=times.context_pass_ms,
        all_to_all_calls=times.all_to_all_calls,
        rows_sent=times.rows_sent,
    )
