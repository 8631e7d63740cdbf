"""The measurement: engines loaded one after the other, then kept, taking turns chunk by chunk in an order that changes.

    load   process start, load, open, first chunk            once a side: what a first frame takes cold
    repeat 0         sessions, all chunks                    warms up, not counted; host waits are counted here
    repeat 1 .. R    sessions, all chunks                    the same seed and prompt for every side; latents compared

After each chunk the ranks are waited for, so that one side's refresh is over before another's turn. Latency is from the
request to latents (and frames) in the caller's hands; the period adds the rest of the refresh, and is what a stream sees.
"""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from causalrt.errors import MeasurementError
from causalrt.measure.bench.machine import peak_host_bytes
from causalrt.measure.bench.samples import ChunkSample, FirstSample, Measured
from causalrt.measure.bench.sides import Replica
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.runtime.rollout import ChunkTimes
from causalrt.runtime.session import Chunk, Session

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference (root mean square) of a chunk's latents between sides that do the same work: about ten times what
roundings make of small models. Other seeds or prompts are 1 apart."""


PROCESS_START_S = 120.0
"""Longest time that an interpreter may take to start and import this package."""


def process_start_ms() -> float:
    """The interpreter and the imports of a caller, in a process of its own; the same for every side.

    Raises:
        MeasurementError: the process failed, or took longer than `PROCESS_START_S`.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", "from causalrt import load"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=PROCESS_START_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise MeasurementError(f"the start of a process could not be timed: {error}") from error
    return 1e3 * (time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    chunk: Chunk
    times: Mapping[int, ChunkTimes]
    """By rank, the refresh included."""
    period_ms: float


class Rollouts:
    """The engines of all sides. A context: leaving it, however that is, closes them.

    Attributes:
        measured: by name of the side.
        num_chunks: of each rollout.
    """

    def __init__(self, sides: Sequence[Replica], *, seed: int, num_chunks: int | None, vae: bool) -> None:
        self._sides = sides
        self._seed, self._wanted = seed, num_chunks
        self._vae = vae
        self._order = random.Random(seed)
        self._engines: dict[str, Engine] = {}
        self._closing = ExitStack()
        self.measured: dict[str, Measured] = {}
        self.num_chunks = 0
        config = sides[0].config
        generator = torch.Generator().manual_seed(seed)
        self._prompt = torch.randn(config.model.text_len, config.model.text_dim, generator=generator)
        self._tolerance = TOLERANCES[config.build.precision]

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def decodes(self) -> bool:
        """Chunks have frames."""
        return any(engine.has_vae for engine in self._engines.values())

    def load(self, on_progress: Callable[[str, int, int], None]) -> None:
        """Load every side, and time its first chunk.

        Raises:
            CausalRTError: what `load` and `Engine.session` raise.
        """
        before_ms = process_start_ms()
        for done, side in enumerate(self._sides):
            on_progress("loading", done, len(self._sides))
            self._load_side(side, before_ms)
        on_progress("loading", len(self._sides), len(self._sides))

    def _load_side(self, side: Replica, before_ms: float) -> None:
        start = time.perf_counter()
        engine = self._closing.enter_context(
            load(
                side.bundle,
                executor=side.executor,
                world_size=side.world_size,
                device=side.device,
                plugins=side.plugins,
                cuda_graphs=side.cuda_graphs,
                vae=None if self._vae else False,
                num_threads=side.threads,
            )
        )
        load_ms = 1e3 * (time.perf_counter() - start)
        self._engines[side.name] = engine
        with engine.session(self._prompt, seed=self._seed, num_chunks=1, ahead=False) as session:
            open_ms = 1e3 * (time.perf_counter() - start) - load_ms
            chunk = next(session)
            total_ms = before_ms + 1e3 * (time.perf_counter() - start)
        stages = {"start": before_ms, "load": load_ms, "open": open_ms, **_stages_of(chunk, side.world_size)}
        self.measured[side.name] = Measured(
            cold=FirstSample(total_ms=total_ms, stages_ms=stages), first_session_ms=[chunk.latency_ms]
        )

    def repeat(self, repeat: int) -> None:
        """One rollout of every side, side by side; `repeat` is counted from 0, and -1 is the warm-up.

        Raises:
            MeasurementError: latents of two sides differ by more than roundings.
            RankError: a rank died, hung or raised.
        """
        sessions, opened_ms = {}, {}
        for name in self._shuffled():
            start = time.perf_counter()
            sessions[name] = self._engines[name].session(
                self._prompt, seed=self._seed + repeat + 1, num_chunks=self._wanted, ahead=False
            )
            opened_ms[name] = 1e3 * (time.perf_counter() - start)
        self.num_chunks = next(iter(sessions.values())).num_chunks
        chunks: dict[str, list[_Turn]] = {name: [] for name in sessions}
        for index in range(self.num_chunks):
            latents = {}
            watched = repeat < 0 and index == max(0, self.num_chunks - 2)
            for name in self._shuffled():
                turn = self._turn(name, sessions[name], watched=watched)
                chunks[name].append(turn)
                latents[name] = turn.chunk.latents
            self._compare(latents, index)
        for name, session in sessions.items():
            session.close()
            found = self.measured[name]
            first = chunks[name][0].chunk
            if repeat < 0:
                found.first_session_ms.append(first.latency_ms)
                found.frames = tuple(4 * len(turn.chunk.latents) - 3 * (turn.chunk.index == 0) for turn in chunks[name])
                continue
            stages = {"open": opened_ms[name], **_stages_of(first, self._engines[name].config.build.world_size)}
            found.warm.append(FirstSample(total_ms=opened_ms[name] + first.latency_ms, stages_ms=stages))
            found.chunks += [_sample(repeat, turn, self.num_chunks) for turn in chunks[name]]

    def read_memory(self) -> None:
        """Peak memory of ranks and decoders, over everything so far."""
        for name, engine in self._engines.items():
            found = self.measured[name]
            found.peak_rank_bytes = tuple(map(peak_host_bytes, engine.rank_pids))
            found.peak_decoder_bytes = peak_host_bytes(engine.decoder.pid) if engine.decoder is not None else None
            found.peak_device_bytes = tuple(usage.peak_device_bytes for usage in engine.usage())

    def _shuffled(self) -> list[str]:
        names = [side.name for side in self._sides]
        self._order.shuffle(names)
        return names

    def _turn(self, name: str, session: Session, *, watched: bool) -> _Turn:
        engine = self._engines[name]
        if watched:
            engine.usage(count_waits=True)
        start = time.perf_counter()
        chunk = next(session)
        engine.wait()
        period_ms = 1e3 * (time.perf_counter() - start)
        if watched:
            self.measured[name].device_waits = engine.usage()[0].device_waits
        # Now, since a session keeps the times of its newest chunks only.
        return _Turn(chunk=chunk, times=session.times[chunk.index], period_ms=period_ms)

    def _compare(self, latents: Mapping[str, torch.Tensor], index: int) -> None:
        first = self._sides[0].name
        reference = latents[first].double()
        for name, produced in latents.items():
            difference = float((produced.double() - reference).norm() / reference.norm())
            if not difference <= self._tolerance:
                raise MeasurementError(
                    f"{name} differs from {first} by {difference:.1e} (relative) in chunk {index}, and {self._tolerance:g} is "
                    "what roundings may do: not the same work, so no time was kept; find out why with `causalrt compare`"
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
        refresh_ms=times.refresh_ms,
        all_to_all_calls=times.all_to_all_calls,
        rows_sent=times.rows_sent,
    )
