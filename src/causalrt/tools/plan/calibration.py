"""Measured costs of single ops on one machine: the fit, the file, and the machine that predicts from it.

Each kind of op costs a sum of features times seconds (`micro_ops.py`); the seconds are fitted so that relative errors are
small, none below zero. What the fit leaves is the spread of every prediction made from it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from causalrt.errors import ConfigError
from causalrt.regular_files import regular_file
from causalrt.tools.files import write_whole
from causalrt.tools.plan.roofline import StepTime
from causalrt.tools.plan.spans import Case
from causalrt.tools.plan.work import Attention, Exchange, Gemm, StepWork

VERSION = 1
Runtime = Literal["eager", "onnxruntime"]
Costs = Mapping[str, Mapping[str, float]]
"""By kind of op, seconds of each feature."""
Features = dict[str, float]


def gemm_features(gemm: Gemm) -> Features:
    """What the cost of one product is linear in."""
    return {"flop": gemm.flops, "element": gemm.elements, "call": 1}


def attention_features(attention: Attention) -> Features:
    """Likewise: the products, and softmax over the scores."""
    return {"flop": attention.flops, "score": attention.scores, "call": 1}


def pass_features(elements: int) -> Features:
    """Likewise."""
    return {"element": elements, "call": 1}


def exchange_features(exchange: Exchange, world_size: int) -> Features:
    """What the cost of one collective is linear in: the call, and what goes to others."""
    return {"element": (world_size - 1) * exchange.rows * exchange.head_dim, "call": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measured op."""

    kind: str
    features: Features
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Costs of one way to run.

    Attributes:
        runtime: executor.
        ranks: that ran at the same time.
        threads: of each.
        costs: by kind of op; `exchange` where there are several ranks.
        relative_error: root mean square of the fit's.
        ceilings: the highest rates seen: `gemm_gflops`, `attention_gflops`, `memory_gbs`.
    """

    runtime: Runtime
    ranks: int
    threads: int
    costs: Costs
    relative_error: float
    ceilings: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was measured on one machine.

    Attributes:
        machine: in words.
        device: that the ops ran on.
        precision: of the ops.
        entries: by way to run.
    """

    machine: str
    device: Literal["cpu", "cuda"]
    precision: str
    entries: tuple[Entry, ...]

    def entry(self, runtime: Runtime, ranks: int) -> Entry:
        """The costs of `ranks` ranks of `runtime`.

        Raises:
            ConfigError: they were not measured.
        """
        for entry in self.entries:
            if (entry.runtime, entry.ranks) == (runtime, ranks):
                return entry
        known = ", ".join(f"{entry.runtime} x {entry.ranks}" for entry in self.entries)
        raise ConfigError(
            f"the calibration has no {runtime} on {ranks} rank(s), only {known}; plan for one of these, or calibrate "
            f"again with `--world-size {ranks}`"
        )

    def write(self, path: Path) -> None:
        """As JSON.

        Raises:
            RequestError: it cannot be written; what was there is as it was.
        """
        write_whole(path, (json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n").encode())


def read_calibration(path: Path) -> Calibration:
    """A file that `write` has made.

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


def fit_costs(samples: Sequence[Sample]) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of each feature by kind, none negative, and the root mean square of the relative errors."""
    costs: dict[str, dict[str, float]] = {}
    errors: list[float] = []
    for kind in sorted({sample.kind for sample in samples}):
        own = [sample for sample in samples if sample.kind == kind]
        names = sorted(own[0].features)
        # Rows are divided by what was measured: the fit then minimises relative errors.
        matrix = np.array([[sample.features[name] / sample.seconds for name in names] for sample in own])
        fitted = _nonnegative(matrix, np.ones(len(own)))
        costs[kind] = dict(zip(names, map(float, fitted), strict=True))
        errors += list(matrix @ fitted - 1)
    return costs, float(np.sqrt(np.mean(np.square(errors))))


def _nonnegative(matrix: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Least squares without negative coefficients: the most negative one is dropped until there is none.

    Not always the optimum, but close to it for the two or three features that there are.
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
        """For people."""
        return f"{self.machine}, {self.entry.runtime}, {self.entry.ranks} x {self.entry.threads} thread(s)"

    def step_time(self, work: StepWork, case: Case, *, slot_rows: int) -> StepTime:
        """Seconds of one chunk step; `slot_rows` plays no part, for filled prefixes are bound."""
        del slot_rows
        off = {"best": -2, "nominal": 0, "worst": 2}[case] * self.entry.relative_error
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
