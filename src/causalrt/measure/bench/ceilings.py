"""What single ops reach alone, measured in rounds between those of the sides, and what a chunk step would take at that.

A way to run is (torch or ONNX Runtime, ranks, threads). Each has processes of its own (`probe.py`), which stay and wait: in a
round all ranks run the products, attentions, sums and exchanges of the step, at its own sizes, with nothing between them.

    ceilings    the highest rate of any product, of any attention, of a sum of two activations, of an exchange
    roofline    counted work of a step (tools/plan/work.py) / these rates
"""

import contextlib
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any, Self, cast

from causalrt.child_python import python_command, python_environment
from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.errors import MeasurementError
from causalrt.layout import slots_from_config
from causalrt.measure.bench.sides import Replica
from causalrt.owned_paths import TemporaryFolder
from causalrt.tools.plan.calibration import Runtime
from causalrt.tools.plan.head_layouts import head_layout
from causalrt.tools.plan.work import StepWork, step_work

Rates = Mapping[str, float]
"""`gemm_gflops`, `attention_gflops`, `memory_gbs`, and with several ranks `exchange_gbs`, of one rank while all are at it."""

ANSWER_S = 600.0
"""Longest time that the processes may take for a round, or to get ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpBackend:
    """A way to run single ops."""

    runtime: Runtime
    world_size: int
    threads: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.runtime} {self.world_size}x{self.threads}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMs:
    """Milliseconds of a chunk step at the ceilings; `products_ms` is what nothing can do away with."""

    gemm: float
    attention: float
    memory: float
    exchange: float

    @property
    def products_ms(self) -> float:
        """Products and attentions."""
        return self.gemm + self.attention

    @property
    def all_ms(self) -> float:
        """Every part, one after the other, no pass fused with another."""
        return self.gemm + self.attention + self.memory + self.exchange


def work_of(config: Config, *, kv_frames: int) -> StepWork:
    """Work of a step on one rank of the bundle's own head plan, attending to so many latent frames."""
    layout = head_layout(config, config.build.head_plan)
    return step_work(config, layout, kv_rows=kv_frames * config.tokens_per_frame)


def full_work(config: Config) -> StepWork:
    """That of the last chunk of the horizon: what ops are measured at."""
    slots, video = slots_from_config(config), config.video
    return work_of(config, kv_frames=slots.valid_frames(video.first_frame_of(video.horizon_chunks - 1)))


def rates_of(samples: Sequence[Mapping[str, Any]], *, element_bytes: int) -> dict[str, float]:
    """The highest of each kind among `{"kind", "features", "seconds"}`; a sum reads two tensors and writes one."""

    def most(kind: str, feature: str, scale: float) -> float:
        return max(float(scale * s["features"][feature] / s["seconds"]) for s in samples if s["kind"] == kind) / 1e9

    rates = {
        "gemm_gflops": most("gemm", "flop", 1),
        "attention_gflops": most("attention", "flop", 1),
        "memory_gbs": most("arithmetic", "element", 3 * element_bytes),
    }
    if any(sample["kind"] == "exchange" for sample in samples):
        rates["exchange_gbs"] = most("exchange", "element", element_bytes)
    return rates


def roofline(work: StepWork, rates: Rates, *, element_bytes: int) -> StepMs:
    """A step at the ceilings."""
    others = work.layout.world_size - 1
    sent = others * sum(each.count * each.rows * each.head_dim for each in work.exchanges) * element_bytes
    moved = sum(each.count * 2 * each.elements for each in work.passes) * element_bytes
    return StepMs(
        gemm=sum(each.count * each.flops for each in work.gemms) / rates["gemm_gflops"] / 1e6,
        attention=sum(each.count * each.flops for each in work.attentions) / rates["attention_gflops"] / 1e6,
        memory=moved / rates["memory_gbs"] / 1e6,
        exchange=sent / rates["exchange_gbs"] / 1e6 if sent else 0.0,
    )


class Probe:
    """The processes of one way."""

    def __init__(self, way: OpBackend, config: Config, device: str) -> None:
        self.way = way
        self._bytes = TORCH_DTYPES[config.build.precision].itemsize
        self._folder = TemporaryFolder("bench")
        folder = self._folder.path
        (folder / "config.json").write_text(json.dumps(config.as_dict()))
        environment = python_environment(GLOO_SOCKET_IFNAME="lo", OMP_WAIT_POLICY="passive")
        command = [*python_command("causalrt.measure.bench.probe"), "--runtime", way.runtime]
        command += ["--device", device, "--threads", str(way.threads), "--folder", str(folder)]
        self._log = (folder / "log").open("w+")
        # A group of their own: Ctrl-C is for the benchmark, which ends them.
        self._processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                start_new_session=True,
            )
            for rank in range(way.world_size)
        ]

    def wait_ready(self) -> None:
        """Return when every process has what it needs, and is idle.

        Raises:
            MeasurementError: a process failed.
        """
        self._answers()

    def measure(self) -> dict[str, float]:
        """One round.

        Raises:
            MeasurementError: a process failed.
        """
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended, which its answer tells
                process.stdin.write("go\n")
                process.stdin.flush()
        return rates_of(self._answers()[0], element_bytes=self._bytes)

    def _answers(self) -> list[Any]:
        """The next line of every rank, as they come: where one has ended, the others wait for it and write none."""
        pipes = {process.stdout.fileno(): process.stdout for process in self._processes if process.stdout is not None}
        answers: dict[int, Any] = {}
        try:
            while len(answers) < len(pipes):
                waiting = [number for number in pipes if number not in answers]
                if not (found := connection.wait(waiting, timeout=ANSWER_S)):
                    raise TimeoutError(f"no answer within {ANSWER_S:g} s")
                for ready in found:
                    number = cast("int", ready)
                    answers[number] = json.loads(pipes[number].readline())
            return [answers[number] for number in pipes]
        except (OSError, ValueError) as error:
            self._log.seek(0)
            raise MeasurementError(
                f"single ops could not be measured ({self.way.name}): {self._log.read()[-2000:].strip() or error}; "
                "leave them out with --no-ceilings"
            ) from error

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._log.close()
        self._folder.remove()


class Ceilings(AbstractContextManager["Ceilings"]):
    """Every way that sides are compared with, and the rates of each round.

    Attributes:
        rounds: by way, the rates of each round.
    """

    def __init__(self, sides: Sequence[Replica]) -> None:
        self.rounds: dict[OpBackend, list[Rates]] = {}
        self._probes: list[Probe] = []
        self._sides = sides

    def __enter__(self) -> Self:
        configs = {
            way: side.config for side in self._sides for way in (self.eager_way(side), self.own_way(side)) if way
        }
        try:
            for way, config in configs.items():
                self._probes.append(Probe(way, config, self._sides[0].device))
            for probe in self._probes:
                probe.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for probe in self._probes:
            probe.close()

    @staticmethod
    def eager_way(side: Replica) -> OpBackend:
        """Eager torch's ops, on as many ranks."""
        return OpBackend(runtime="eager", world_size=side.world_size, threads=side.threads)

    @staticmethod
    def own_way(side: Replica) -> OpBackend | None:
        """Those of the side's own runtime; None where they cannot be had one by one."""
        eager = Ceilings.eager_way(side)
        if side.executor == "eager":
            return eager
        if side.executor == "onnxruntime" and side.device == "cpu":
            return replace(eager, runtime="onnxruntime")
        return None

    def measure(self, *, counts: bool = True) -> None:
        """A round of each way, one after the other; the first of all warms up."""
        for probe in self._probes:
            rates = probe.measure()
            if counts:
                self.rounds.setdefault(probe.way, []).append(rates)

    def around(self, way: OpBackend, repeat: int) -> Rates:
        """The mean of the rounds before and after a repeat of the sides, both counted from 0."""
        before, after = self.rounds[way][repeat : repeat + 2]
        return {name: statistics.mean((before[name], after[name])) for name in before}

    def best(self, way: OpBackend) -> Rates:
        """Of all rounds."""
        rounds = self.rounds[way]
        return {name: max(rates[name] for rates in rounds) for name in rounds[0]}

    def as_list(self) -> list[dict[str, Any]]:
        """Plain JSON types: the best of all rounds, and every round."""
        return [
            {
                "way": way.name,
                "runtime": way.runtime,
                "world_size": way.world_size,
                "threads": way.threads,
                "best": self.best(way),
                "rounds": [dict(rates) for rates in rounds],
            }
            for way, rounds in self.rounds.items()
        ]
