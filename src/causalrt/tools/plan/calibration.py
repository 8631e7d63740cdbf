"""A machine that was measured: single ops are timed, costs are fitted to the samples, and steps are predicted from the costs.

    calibrate -> for each (executor, ranks) the samples of `tools/ops/timing.py` -> fit -> Calibration <-> file

Each kind of op costs a sum of features times seconds. The seconds are fitted so that relative errors are small, and none is
below zero. The error that the fit leaves is the spread of every prediction made from it.
"""

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from causalrt.control_groups import available_cpus
from causalrt.errors import ConfigError, ExecutorError
from causalrt.progress import Progress
from causalrt.regular_files import regular_file
from causalrt.tools.files import write_whole
from causalrt.tools.ops.micro_ops import (
    Features,
    OpExecutor,
    Sample,
    attention_features,
    exchange_features,
    gemm_features,
    pass_features,
    rates_of,
)
from causalrt.tools.ops.timing import Clock, OpTimer
from causalrt.tools.ops.work import StepWork
from causalrt.tools.plan.assumptions import Bound
from causalrt.tools.plan.roofline import StepTime

VERSION = 2
Costs = Mapping[str, Mapping[str, float]]
"""By kind of op, seconds of each feature."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Costs of one executor on one number of ranks.

    Attributes:
        executor: name of the executor.
        ranks: number of ranks, all of which ran at the same time.
        threads: threads of each rank.
        costs: by kind of op; `exchange` where there are several ranks.
        relative_error: root mean square of the relative errors of the fit.
        ceilings: the highest rates: `gemm_gflops`, `attention_gflops`, `memory_gbs`, on several ranks `exchange_gbs`.
    """

    executor: OpExecutor
    ranks: int
    threads: int
    costs: Costs
    relative_error: float
    ceilings: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The measured costs of one machine."""

    machine: str
    device: Literal["cpu", "cuda"]
    precision: str
    entries: tuple[Entry, ...]

    def entry(self, executor: OpExecutor, ranks: int) -> Entry:
        """The costs of an executor on `ranks` ranks.

        Raises:
            ConfigError: they were not measured.
        """
        for entry in self.entries:
            if (entry.executor, entry.ranks) == (executor, ranks):
                return entry
        known = ", ".join(f"{entry.executor} x {entry.ranks}" for entry in self.entries)
        raise ConfigError(
            f"the calibration has no {executor} on {ranks} rank(s), only {known}; plan for one of these, or calibrate "
            f"again with `--world-size {ranks}`"
        )

    def write(self, path: Path) -> None:
        """Write the calibration as JSON.

        Raises:
            RequestError: the file cannot be written; an earlier one stays as it was.
        """
        write_whole(path, (json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n").encode())


def read_calibration(path: Path) -> Calibration:
    """Read a file that `Calibration.write` has written.

    Raises:
        ConfigError: it cannot be read, or is of another version or shape.
    """
    try:
        plain: dict[str, Any] = json.loads(regular_file(path).read_text())
        if plain.pop("version") != VERSION:
            raise ConfigError(f"{path} is of another version of causalrt; measure again: `--calibrate {path}`")
        return Calibration(**{**plain, "entries": tuple(Entry(**entry) for entry in plain["entries"])})
    except (OSError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no calibration ({error!r}); make one: `causalrt plan --calibrate {path}`"
        ) from error


def default_device() -> str:
    """The device that `calibrate` measures unless another is named."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measured_precision(device: str) -> str:
    """The precision that `calibrate` measures on a device."""
    return "bfloat16" if device == "cuda" else "float32"


def calibrate(
    executors: Sequence[OpExecutor],
    world_sizes: Sequence[int],
    *,
    device: str | None = None,
    clock: Clock = "wall",
    on_progress: Progress = lambda *_: None,
) -> Calibration:
    """Measure this machine, in float32 on a CPU and in bfloat16 on GPUs.

    Args:
        executors: executors to measure; on GPUs only eager is.
        world_sizes: numbers of ranks; the CPU's cores are divided among them.
        device: `cpu` or `cuda`; None for GPUs if there are any.
        clock: `wall`, or `cpu` for processor time with one thread a rank, on a CPU that others use. It leaves waiting out.
        on_progress: called with stage, done and total.

    Raises:
        ExecutorError: there are fewer GPUs than ranks.
        MeasurementError: a process failed.
    """
    device = device or default_device()
    cases = [(name, ranks) for name in executors for ranks in world_sizes if device == "cpu" or name == "eager"]
    entries = []
    for done, (executor, ranks) in enumerate(cases):
        on_progress("measuring", done, len(cases))
        entries.append(_measure(executor, ranks, device, clock))
    on_progress("measuring", len(cases), len(cases))
    gpu = device == "cuda"
    return Calibration(
        machine=torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {available_cpus()} cores",
        device="cuda" if gpu else "cpu",
        precision=measured_precision(device),
        entries=tuple(entries),
    )


def _measure(executor: OpExecutor, ranks: int, device: str, clock: Clock) -> Entry:
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise ExecutorError(
            f"{ranks} ranks need a GPU each, and torch sees {torch.cuda.device_count()}; ask for fewer ranks"
        )
    threads = max(1, available_cpus() // ranks) if (device, clock) == ("cpu", "wall") else 1
    with OpTimer(executor, ranks, threads=threads, device=device, clock=clock) as timer:
        timer.wait_ready()
        samples = timer.measure()
    costs, relative_error = fit_costs(samples)
    logger.info("%s, %d rank(s): fitted with a relative error of %.1f %%", executor, ranks, 100 * relative_error)
    return Entry(
        executor=executor,
        ranks=ranks,
        threads=threads,
        costs=costs,
        relative_error=relative_error,
        ceilings=rates_of(samples, element_bytes=2 if device == "cuda" else 4),
    )


def fit_costs(samples: Sequence[Sample]) -> tuple[dict[str, dict[str, float]], float]:
    """Fit seconds of each feature by kind of op, none negative; return them and the root mean square relative error."""
    costs: dict[str, dict[str, float]] = {}
    errors: list[float] = []
    for kind in sorted({sample.kind for sample in samples}):
        own = [sample for sample in samples if sample.kind == kind]
        names = sorted(own[0].features)
        # Rows are divided by the measured time: the fit then minimises relative errors.
        matrix = np.array([[sample.features[name] / sample.seconds for name in names] for sample in own])
        fitted = _nonnegative(matrix, np.ones(len(own)))
        costs[kind] = dict(zip(names, map(float, fitted), strict=True))
        errors += list(matrix @ fitted - 1)
    return costs, float(np.sqrt(np.mean(np.square(errors))))


def _nonnegative(matrix: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Least squares without negative coefficients: the most negative one is dropped until none is left.

    This is not always the optimum, but close to it for two or three features.
    """
    kept = list(range(matrix.shape[1]))
    while True:
        part = matrix[:, kept]
        scale = np.abs(part).max(axis=0)
        found = np.linalg.lstsq(part / scale, target, rcond=None)[0] / scale
        if len(kept) == 1 or found.min() >= 0:
            whole = np.zeros(matrix.shape[1])
            whole[kept] = np.maximum(found, 0)
            return whole
        kept.pop(int((found * scale).argmin()))


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedMachine:
    """A machine that was measured, running one executor."""

    machine: str
    entry: Entry

    @property
    def name(self) -> str:
        """Machine, executor, ranks and threads."""
        return f"{self.machine}, {self.entry.executor}, {self.entry.ranks} x {self.entry.threads} thread(s)"

    def step_time(self, work: StepWork, bound: Bound, *, slot_rows: int) -> StepTime:
        """Seconds of one chunk step; `slot_rows` is unused, because these executors bind only the filled rows."""
        del slot_rows
        off = {"best": -2, "nominal": 0, "worst": 2}[bound] * self.entry.relative_error
        factor = max(1 + off, 0.1)

        def seconds(kind: str, features: Features) -> float:
            costs = self.entry.costs[kind]
            return factor * sum(costs[name] * value for name, value in features.items())

        return StepTime(
            gemm_s=sum(op.count * seconds("gemm", gemm_features(op)) for op in work.gemms),
            attention_s=sum(op.count * seconds("attention", attention_features(op)) for op in work.attentions),
            pass_s=sum(op.count * seconds(op.kind, pass_features(op.elements)) for op in work.passes),
            exchange_s=sum(
                op.count * seconds("exchange", exchange_features(op, self.entry.ranks)) for op in work.exchanges
            ),
            idle_s=0.0,
        )
