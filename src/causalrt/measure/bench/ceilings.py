"""Ceilings: rates that single ops reach, measured in rounds between those of the replicas, and steps at these rates.

An op backend is (torch or ONNX Runtime, ranks, threads). Each has rank processes of its own (`tools/ops/timing.py`), which wait
between rounds. In a round all ranks run the products, attentions, sums and exchanges of a step at its own sizes.

    ceilings    the highest rate of any product, of any attention, of a sum of two activations, of an exchange
    roofline    counted work of a step (`tools/ops/work.py`) / these rates
"""

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Self

from causalrt.engines.base import TORCH_DTYPES
from causalrt.errors import MeasurementError
from causalrt.measure.bench.replicas import Replica
from causalrt.tools.ops.micro_ops import OpExecutor, rates_of
from causalrt.tools.ops.timing import OpTimer
from causalrt.tools.ops.work import StepWork

Rates = Mapping[str, float]
"""`gemm_gflops`, `attention_gflops`, `memory_gbs`, on several ranks `exchange_gbs`, of one rank while all ranks compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpBackend:
    """An executor whose single ops can be timed, on a number of ranks."""

    executor: OpExecutor
    world_size: int
    threads: int

    @property
    def name(self) -> str:
        """Executor, ranks and threads."""
        return f"{self.executor} {self.world_size}x{self.threads}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMs:
    """Milliseconds of a chunk step at the ceilings, by part."""

    gemm: float
    attention: float
    memory: float
    exchange: float

    @property
    def products_ms(self) -> float:
        """Products and attentions, which no fusion can remove."""
        return self.gemm + self.attention

    @property
    def all_ms(self) -> float:
        """Every part, one after another, with no pass fused into another op."""
        return self.gemm + self.attention + self.memory + self.exchange


def roofline(work: StepWork, rates: Rates, *, element_bytes: int) -> StepMs:
    """The time of a step at the ceilings."""
    others = work.layout.world_size - 1
    sent = others * sum(each.count * each.rows * each.head_dim for each in work.exchanges) * element_bytes
    moved = sum(each.count * 2 * each.elements for each in work.passes) * element_bytes
    return StepMs(
        gemm=sum(each.count * each.flops for each in work.gemms) / rates["gemm_gflops"] / 1e6,
        attention=sum(each.count * each.flops for each in work.attentions) / rates["attention_gflops"] / 1e6,
        memory=moved / rates["memory_gbs"] / 1e6,
        exchange=sent / rates["exchange_gbs"] / 1e6 if sent else 0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendRates:
    """The rates of one op backend: the best of all rounds, and those of every round."""

    way: str
    executor: str
    world_size: int
    threads: int
    best: Rates
    rounds: Sequence[Rates]


class Ceilings(AbstractContextManager["Ceilings"]):
    """All op backends that replicas are compared with; their processes end with the `with` block.

    Attributes:
        rounds: by backend, the rates of each round.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.rounds: dict[OpBackend, list[Rates]] = {}
        self._timers: dict[OpBackend, OpTimer] = {}
        self._replicas = replicas
        self._element_bytes = TORCH_DTYPES[replicas[0].config.build.precision].itemsize
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        configs = {
            backend: replica.config
            for replica in self._replicas
            for backend in (self.eager_backend(replica), self.own_backend(replica))
            if backend
        }
        with contextlib.ExitStack() as started, _hinting():
            for backend, config in configs.items():
                self._timers[backend] = started.enter_context(
                    OpTimer(
                        backend.executor,
                        backend.world_size,
                        threads=backend.threads,
                        device=self._replicas[0].device,
                        config=config,
                    )
                )
            for timer in self._timers.values():
                timer.wait_ready()
            self._closing = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @staticmethod
    def eager_backend(replica: Replica) -> OpBackend:
        """Eager torch, on as many ranks as the replica."""
        return OpBackend(executor="eager", world_size=replica.world_size, threads=replica.threads)

    @staticmethod
    def own_backend(replica: Replica) -> OpBackend | None:
        """The replica's own executor; None where its ops cannot be run one by one."""
        eager = Ceilings.eager_backend(replica)
        if replica.executor == "eager":
            return eager
        if replica.executor == "onnxruntime" and replica.device == "cpu":
            return replace(eager, executor="onnxruntime")
        return None

    def measure(self, *, counts: bool = True) -> None:
        """Run a round of each backend, one after another; one that does not count warms up.

        Raises:
            MeasurementError: a process failed, or gave no answer in time.
        """
        for backend, timer in self._timers.items():
            with _hinting():
                rates = rates_of(timer.measure(), element_bytes=self._element_bytes)
            if counts:
                self.rounds.setdefault(backend, []).append(rates)

    def around(self, backend: OpBackend, repeat: int) -> Rates:
        """The mean of the rounds before and after a repeat of the replicas, which is counted from 0."""
        before, after = self.rounds[backend][repeat : repeat + 2]
        return {name: statistics.mean((before[name], after[name])) for name in before}

    def best(self, backend: OpBackend) -> Rates:
        """The highest rates of all rounds."""
        rounds = self.rounds[backend]
        return {name: max(rates[name] for rates in rounds) for name in rounds[0]}

    def summary(self) -> list[BackendRates]:
        """The rates of every backend, for the report."""
        return [
            BackendRates(
                way=backend.name,
                executor=backend.executor,
                world_size=backend.world_size,
                threads=backend.threads,
                best=self.best(backend),
                rounds=rounds,
            )
            for backend, rounds in self.rounds.items()
        ]


@contextlib.contextmanager
def _hinting() -> Iterator[None]:
    """Say how to do without ceilings when they cannot be measured."""
    try:
        yield
    except MeasurementError as error:
        raise MeasurementError(f"{error}; leave single ops out with --no-ceilings") from error
