"""The types of the report: a row for each replica, comparisons of pairs of rows, and checks. Times are milliseconds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from causalrt.measure.bench.ceilings import BackendRates
from causalrt.measure.bench.machine import Machine, Moment
from causalrt.measure.bench.replicas import LeftOut

Verdict = Literal["faster", "slower", "none shown"]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Quantiles of `n` values, linear between neighbours; p99 of few values is about the largest."""

    p50: float
    p95: float
    p99: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Quantiles of at least one value."""
        p50, p95, p99 = (float(np.percentile(values, percent)) for percent in (50, 95, 99))
        return cls(p50, p95, p99, len(values))


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the range of some values."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Median and range of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRow:
    """All samples of one chunk: quartiles of its latency, and medians of its parts."""

    chunk: int
    kv_frames: int
    latency_ms: dict[str, float]
    step_ms: float
    context_pass_ms: float
    stages_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstFrame:
    """The time to a first frame, in total and by stage (medians)."""

    total_ms: Quantiles
    stages_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstFrames:
    """The first frame after the start of a process, and in a new session of a warm engine."""

    cold: FirstFrame
    warm: FirstFrame


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameRate:
    """Frames a second by the period of `chunks`; `full` if all of them attend to a full window."""

    median: float
    min: float
    max: float
    chunks: list[int]
    full: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What one rank sends to others in a chunk with its context pass, `counted` by the host or `computed`."""

    bytes_per_chunk: int
    calls_per_chunk: int
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakMemory:
    """Most resident memory of each rank and of the decoder, and most device memory of each rank (None on a CPU)."""

    rank_bytes: list[int | None]
    decoder_bytes: int | None
    device_bytes: list[int | None] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fraction:
    """Time of steps at the ceilings of one op backend, over the time that they took.

    Attributes:
        way: name of the backend.
        products: of products and attentions only, by repeat.
        with_passes_and_exchange: of every part, by repeat.
        products_fastest: of products and attentions at the best rates, over the fastest step of each chunk.
    """

    way: str
    products: Spread
    with_passes_and_exchange: Spread
    products_fastest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fractions:
    """Fractions of the ceilings of eager's ops, and of the executor's own ops where these can be run one by one."""

    of_eager_ops: Fraction
    of_own_ops: Fraction | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Flatness:
    """Whether the latency of `chunks`, which attend to a full window, stays within a fraction; None for too few chunks."""

    chunks: list[int]
    slowest_over_fastest: float | None
    within: float
    held: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstWarmChunk:
    """Whether the first chunk of a warm engine takes as long as the first chunks of later sessions."""

    over_later_sessions: float
    right_after_loading_over_later_sessions: float
    within: float
    held: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """Checks that are reported and not enforced."""

    flat_once_full: Flatness
    first_warm_chunk: FirstWarmChunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The figures of one replica; docs/bench.md explains each."""

    name: str
    executor: str
    world_size: int
    threads_per_rank: int
    fused_ops: bool
    cuda_graphs: bool
    device: str
    bundle: str
    chunk_latency_ms: Quantiles
    stages_ms: dict[str, Quantiles]
    denoising_steps_ms: list[Quantiles]
    by_chunk: list[ChunkRow]
    first_frame: FirstFrames
    frames_per_second: FrameRate | None
    exchange: Exchange
    peak_memory: PeakMemory
    host_waits_per_chunk: int | None
    roofline: Fractions | None
    largest_difference: float
    checks: Checks


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One replica against another.

    Attributes:
        side: name of the one.
        against: name of the other.
        metric: the times that are compared.
        ratio: median over repeats of (time of `against`) / (time of `side`): how many times as fast the side is.
        ratios: the ratio of each repeat.
        spread: interquartile range of the ratios.
        interval: of the median, with the probability that it contains it; None where there are too few repeats.
        verdict: whether the side is faster or slower.
        says: the comparison as a sentence.
    """

    side: str
    against: str
    metric: str
    ratio: float
    ratios: tuple[float, ...]
    spread: float
    interval: tuple[float, float, float] | None
    verdict: Verdict
    says: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What was measured, how, and on what."""

    what: str
    date: str
    command: list[str]
    machine: Machine
    before: Moment
    after: Moment
    bundles: list[dict[str, Any]]
    random_weights: bool
    seed: int
    repeats: int
    chunks: int
    config: dict[str, Any]
    includes: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The contents of bench.json."""

    schema: int
    manifest: Manifest
    rows: list[Row]
    comparisons: list[Comparison]
    ceilings: list[BackendRates]
    left_out: list[LeftOut]
