"""Times of kernels on a GPU that are fair between the sides of a case, and verdicts by their ratios.

    side     its calls, over several sets of operands  --capture-->  one CUDA graph
    round    for every side, in turns: flush L2, event, replay, event          sample: milliseconds of one call
    case     many rounds; medians with p10 and p90, and ratios of two sides round by round

A graph holds many calls where they are short, so that neither Python nor the start of a graph is measured. Operands are taken
from several sets that together exceed L2. On a CPU, for trials, calls just run and wall time is taken.
"""

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Output = torch.Tensor | tuple[torch.Tensor, ...]
Call = Callable[[], Output]

WARM_UPS = 3
GRAPH_MS = 0.5
MAX_CALLS = 128
FLUSH_BYTES = 2**30
"""A flush of this size takes some 300 us, in which the host queues a replay."""
NOMINAL_BYTES_S, NOMINAL_FLOPS_S = 4.8e12, 990e12
"""Figures of an H200's data sheet in bfloat16, for the least time of a case in a dry run and never for a verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The properties of a device that cases depend on; by default those of an H200, for dry runs."""

    capability: int = 90
    multiprocessors: int = 132
    l2_bytes: int = 60 * 2**20
    shared_bytes: int = 227 * 1024

    @classmethod
    def of(cls, device: torch.device) -> "Facts":
        """The properties of a CUDA device, or small ones for a CPU."""
        if device.type != "cuda":
            return cls(capability=80, multiprocessors=2, l2_bytes=1, shared_bytes=163 * 1024)
        found = torch.cuda.get_device_properties(device)
        return cls(
            capability=10 * found.major + found.minor,
            multiprocessors=found.multi_processor_count,
            l2_bytes=found.L2_cache_size,
            shared_bytes=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The least bytes that one call must move, and its operations."""

    num_bytes: int
    flops: int = 0

    @property
    def floor_ms(self) -> float:
        """Milliseconds at the nominal rates."""
        return 1e3 * max(self.num_bytes / NOMINAL_BYTES_S, self.flops / NOMINAL_FLOPS_S)

    def num_sets(self, facts: Facts) -> int:
        """Number of sets of operands that together are twice as large as L2."""
        return max(1, math.ceil(2 * facts.l2_bytes / self.num_bytes))

    def num_calls(self, facts: Facts) -> int:
        """Number of calls in a graph: each set equally often, up to half a millisecond of work."""
        sets = self.num_sets(facts)
        rounds = max(1, math.ceil(GRAPH_MS / (sets * self.floor_ms)))
        return sets * max(1, min(rounds, MAX_CALLS // sets))


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the tenth and the ninetieth percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """The spread of some samples."""
        median, p10, p90 = (float(np.percentile(samples, percent)) for percent in (50, 10, 90))
        return cls(median, p10, p90)

    def as_json(self) -> dict[str, float]:
        """The values, rounded to six digits."""
        return {name: float(f"{getattr(self, name):.6g}") for name in ("median", "p10", "p90")}

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.p10:.4g} .. {self.p90:.4g})"


Samples = tuple[float, ...]
"""Milliseconds of one call, by round."""


def ratio(ours: Samples, other: Samples, scale: float = 1.0) -> Spread:
    """`scale * ours / other`, round by round."""
    return Spread.of([scale * a / b for a, b in zip(ours, other, strict=True)])


@dataclass(kw_only=True)
class Captured:
    """Calls that are repeated as one by `replay`; `outputs` are those of the last replay, one for each call."""

    replay: Callable[[], None]
    outputs: list[Output] = field(default_factory=list)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors of all outputs."""
        for output in self.outputs:
            yield from output if isinstance(output, tuple) else (output,)


class Timer:
    """Captures sides, and measures them on one device."""

    def __init__(self, device: torch.device, *, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.facts = Facts.of(device)
        self.clocks: list[str] = []
        size = max(4 * self.facts.l2_bytes, FLUSH_BYTES) if device.type == "cuda" else 1
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def capture(self, calls: Sequence[Call]) -> Captured:
        """Run calls until everything is compiled, then capture them in a CUDA graph."""
        captured = Captured(replay=lambda: captured.outputs.__setitem__(slice(None), [call() for call in calls]))
        if self.device.type != "cuda":
            captured.replay()
            return captured
        for _ in range(WARM_UPS):
            for call in calls:
                call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.outputs = [call() for call in calls]
        captured.replay = graph.replay
        captured.replay()
        torch.cuda.synchronize(self.device)
        return captured

    def measure(self, sides: Mapping[str, Captured]) -> dict[str, Samples]:
        """Measure all sides in every round, in an order that alternates, and return the samples of each."""
        samples: dict[str, list[float]] = {name: [] for name in sides}
        with self._watched_clocks():
            for number in range(self.repeats):
                order = list(sides.items())
                for name, side in order if number % 2 else order[::-1]:
                    samples[name].append(self._sample(side) / len(side.outputs))
        return {name: tuple(values) for name, values in samples.items()}

    def host_us(self, call: Call, count: int = 20) -> float | None:
        """Microseconds in which the host queues one call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        call()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        taken = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return round(1e6 * taken / count, 1)

    def _sample(self, side: Captured) -> float:
        """Milliseconds of one replay."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            side.replay()
            return 1e3 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        before.record()
        side.replay()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))

    @contextlib.contextmanager
    def _watched_clocks(self) -> Iterator[None]:
        """Ask for the clocks while the block runs."""
        asked = _ask_nvidia_smi(self.device, "clocks.sm,clocks.mem,temperature.gpu,power.draw")
        yield
        if asked is not None:
            self.clocks.append(asked.communicate()[0].strip())


def _ask_nvidia_smi(device: torch.device, fields: str) -> "subprocess.Popen[str] | None":
    """Start nvidia-smi, which only reads; its answer is collected later."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={_uuid(device)}"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _uuid(device: torch.device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and versions of what runs on it."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if device.type != "cuda":
        return found | {"device": "CPU: wall time of calls, for a trial"}
    properties = torch.cuda.get_device_properties(device)
    asked = _ask_nvidia_smi(device, "driver_version,clocks.max.sm,clocks.max.mem,power.limit")
    found |= {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver, most MHz of SM and memory, most watts": asked.communicate()[0].strip() if asked else None,
    }
    return found


# ---- verdicts


def judge(limit: Spread) -> str:
    """Judge the claim that a ratio to its limit is at most 1: `met`, `not met`, or `none` where the spread is larger.

    The distance from 1 is logarithmic: 2 is as far from 1 as 1/2 is.
    """
    if abs(math.log(limit.median)) <= math.log(limit.p90 / limit.p10):
        return "none"
    return "met" if limit.median < 1 else "not met"


def judge_all(verdicts: Collection[str]) -> str:
    """Judge a claim about several cases, which is met if it is met in each."""
    return next((verdict for verdict in ("not met", "none") if verdict in verdicts), "met")


def progress(line: str) -> None:
    """Write a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
