"""Time single ops on P ranks, for calibrations and for the ceilings of `causalrt bench`: the one timer of both.

OpTimer       processes of this module, one a rank; each round times all ops once, while all ranks load the machine
calibration   sizes of its own, inputs that are in no cache, the median of the repeats
ceilings      the sizes of a config's step, the same inputs every time, the fastest of the repeats
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from causalrt.config import Config, config_from_dict
from causalrt.engines.base import TORCH_DTYPES
from causalrt.tools.ops.micro_ops import (
    HEAD,
    OpExecutor,
    Sample,
    exchange_features,
    gemm_op,
    micro_ops,
    random_tensors,
    runner,
    step_ops,
)
from causalrt.tools.ops.rank_processes import Rank, RankProcesses, serve
from causalrt.tools.ops.work import Exchange, Gemm, full_work

Clock = Literal["wall", "cpu"]
EXCHANGES = (64, 512, 2048, 8192)
"""Rows of `HEAD` channels that a calibration sends to each rank."""
BEFORE_EXCHANGE = Gemm(m=1024, n=1024, k=512, count=1)
"""A product before each exchange of a calibration, whose time is subtracted again: ranks come to an exchange from their work,
and never quite together."""
LEAST_S = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How often an op runs, and which of its times counts; collective ops run equally often on every rank.

    Attributes:
        seconds: time spent on repeats of one op.
        least: fewest repeats.
        collective: repeats of collective ops.
        fastest: whether the fastest repeat counts, which other load of the machine disturbs least, or the median.
    """

    seconds: float
    least: int
    collective: int
    fastest: bool


CALIBRATION = Repeats(seconds=0.25, least=5, collective=50, fastest=False)
CEILINGS = Repeats(seconds=0.05, least=2, collective=20, fastest=True)


def seconds_of(
    run: Callable[[], object], device: torch.device, *, now: Callable[[], float] = time.perf_counter
) -> float:
    """Time one call, from its start until the device is idle."""
    start = now()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def repeated_seconds(
    run: Callable[[], object], device: torch.device, repeats: Repeats, *, collective: bool, clock: Clock = "wall"
) -> float:
    """Time a call several times, all ranks beginning together, and return the time that counts.

    Args:
        run: the call.
        device: where it computes.
        repeats: how often it runs.
        collective: whether all ranks must call it equally often.
        clock: `wall`, or `cpu` for processor time, which leaves waiting out.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    if dist.is_initialized():
        dist.barrier()
    seconds_of(run, device)
    found: list[float] = []
    until = time.perf_counter() + repeats.seconds
    while len(found) < (repeats.collective if collective else repeats.least) or (
        not collective and time.perf_counter() < until
    ):
        found.append(seconds_of(run, device, now=now))
    return min(found) if repeats.fastest else statistics.median(found)


class OpTimer(AbstractContextManager["OpTimer"]):
    """Rank processes that time single ops, and wait between rounds."""

    def __init__(
        self,
        executor: OpExecutor,
        world_size: int,
        *,
        threads: int,
        device: str,
        config: Config | None = None,
        clock: Clock = "wall",
    ) -> None:
        """Start the processes.

        Args:
            executor: whose ops are timed: torch's own, or ONNX Runtime's.
            world_size: number of ranks.
            threads: CPU threads of each rank.
            device: `cpu` or `cuda`.
            config: time the ops of this config's step, for its ceilings; None for those of a calibration.
            clock: `wall`, or `cpu` for processor time.
        """
        task = {"executor": executor, "clock": clock, "config": None if config is None else config.as_dict()}
        self._processes = RankProcesses(
            __name__,
            world_size,
            device=device,
            threads=threads,
            task=task,
            what=f"single ops ({executor}, {world_size} rank(s))",
        )
        self.wait_ready, self.close = self._processes.wait_ready, self._processes.close

    def measure(self) -> list[Sample]:
        """Time every op once; the samples are those of rank 0.

        Raises:
            MeasurementError: a rank failed, or gave no answer in time.
        """
        return [Sample(**sample) for sample in self._processes.ask()[0]]

    def __exit__(self, *_: object) -> None:
        self.close()


def exchange_of(rows: int, ranks: int, width: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """An all-to-all of `rows` rows of `width` channels with each rank."""
    sent = torch.zeros(ranks, rows, width, device=device, dtype=dtype)
    return functools.partial(dist.all_to_all_single, torch.empty_like(sent), sent)


def _prepare(rank: Rank) -> Callable[[], Any]:
    executor, clock, plain = (rank.task[name] for name in ("executor", "clock", "config"))
    if plain is None:
        return functools.partial(_calibration_samples, rank, executor, clock)
    return _ceiling_samples(rank, executor, config_from_dict(plain))


def _calibration_samples(rank: Rank, executor: OpExecutor, clock: Clock) -> list[dict[str, Any]]:
    device, ranks = rank.device, rank.world_size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timed = functools.partial(repeated_seconds, device=device, repeats=CALIBRATION, clock=clock)
    samples = [
        _sample(op.kind, op.features, timed(runner(op, executor, device, cold=True), collective=False))
        for op in micro_ops(dtype)
    ]
    if ranks == 1:
        return samples
    compute = runner(gemm_op(BEFORE_EXCHANGE, random_tensors(dtype)), executor, device, cold=True)
    alone_s = timed(compute, collective=True)
    for rows in EXCHANGES:
        both = (compute, exchange_of(rows, ranks, HEAD, dtype, device))
        both_s = timed(functools.partial(call_all, both), collective=True)
        features = exchange_features(Exchange(rows=rows, head_dim=HEAD, count=1), ranks)
        samples.append(_sample("exchange", features, max(both_s - alone_s, LEAST_S)))
    return samples


def _ceiling_samples(rank: Rank, executor: OpExecutor, config: Config) -> Callable[[], list[dict[str, Any]]]:
    """Prepare the ops of a step once; each round times them all."""
    work, dtype, device = full_work(config), TORCH_DTYPES[config.build.precision], rank.device
    runs = [(op.kind, op.features, runner(op, executor, device)) for op in step_ops(work, executor, dtype)]
    for each in work.exchanges:
        run = exchange_of(each.rows, rank.world_size, each.head_dim, dtype, device)
        runs.append(("exchange", exchange_features(each, rank.world_size), run))
    return lambda: [
        _sample(kind, features, repeated_seconds(run, device, CEILINGS, collective=kind == "exchange"))
        for kind, features, run in runs
    ]


def _sample(kind: str, features: dict[str, float], seconds: float) -> dict[str, Any]:
    return {"kind": kind, "features": features, "seconds": seconds}


def call_all(calls: Sequence[Callable[[], object]]) -> None:
    """Make all calls, one after another."""
    for call in calls:
        call()


if __name__ == "__main__":
    serve(_prepare)
