"""Rows of the report from the samples of replicas, and comparisons of pairs of replicas.

Two replicas are compared by the ratios of their times in the same repeats, and by an interval for the median ratio. It is the
interval of the sign test, from the k-th smallest to the k-th largest ratio: for any distribution it contains the median with a
known probability, and one outlier does not widen it once there are eight ratios. Five are the fewest for which that probability
reaches `CONFIDENCE`. A difference is shown where the interval excludes 1 and the median is farther from 1 than the ratios are
from each other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.measure.bench.ceilings import Ceilings, OpBackend, Rates, StepMs, roofline
from causalrt.measure.bench.replicas import Replica
from causalrt.measure.bench.report import (
    Checks,
    ChunkRow,
    Comparison,
    Exchange,
    FirstFrame,
    FirstFrames,
    FirstWarmChunk,
    Flatness,
    Fraction,
    Fractions,
    FrameRate,
    PeakMemory,
    Quantiles,
    Row,
    Spread,
    Verdict,
)
from causalrt.measure.bench.rollouts import ChunkSample, FirstSample, Measured
from causalrt.tools.ops.work import work_of

FLAT_WITHIN, FIRST_WITHIN = 0.05, 0.10
"""How flat chunk latency should be once the window is full, and how close a first warm chunk to later ones like it."""
METRICS = ("chunk latency", "denoising step", "first warm chunk")
CONFIDENCE = 0.9


def full_chunks(samples: Sequence[ChunkSample], config: Config) -> list[int]:
    """Chunks that attend to a full window."""
    capacity = config.video.capacity_frames
    return sorted({sample.chunk for sample in samples if sample.kv_frames == capacity})


def steady_chunks(samples: Sequence[ChunkSample], config: Config) -> list[int]:
    """Chunks that frames a second are taken from: with a context pass and a full window, or else the fullest window."""
    followed = sorted({sample.chunk for sample in samples if sample.period_ms is not None})
    return [chunk for chunk in followed if chunk in full_chunks(samples, config)] or followed[-1:]


def row(replica: Replica, found: Measured, ceilings: Ceilings | None) -> Row:
    """The figures of one replica."""
    steps = zip(*(sample.denoise_ms for sample in found.chunks), strict=True)
    return Row(
        name=replica.name,
        executor=replica.executor,
        world_size=replica.world_size,
        threads_per_rank=replica.threads,
        fused_ops=replica.fused_ops,
        cuda_graphs=replica.cuda_graphs,
        device=replica.device,
        bundle=replica.bundle.name,
        chunk_latency_ms=Quantiles.of([sample.latency_ms for sample in found.chunks]),
        stages_ms=_stages(found.chunks),
        denoising_steps_ms=[Quantiles.of(column) for column in steps],
        by_chunk=_by_chunk(found.chunks),
        first_frame=FirstFrames(cold=_first([found.cold]), warm=_first(found.warm)),
        frames_per_second=_frames_per_second(replica.config, found),
        exchange=_exchange(replica.config, found.chunks),
        peak_memory=PeakMemory(
            rank_bytes=list(found.peak_rank_bytes),
            decoder_bytes=found.peak_decoder_bytes,
            device_bytes=None if replica.device == "cpu" else list(found.peak_device_bytes),
        ),
        host_waits_per_chunk=found.device_waits,
        roofline=None if ceilings is None else _fractions(replica, found.chunks, ceilings),
        largest_difference=found.largest_difference,
        checks=_checks(replica.config, found),
    )


def _stages(samples: Sequence[ChunkSample]) -> dict[str, Quantiles]:
    stages = [sample.stages_ms() for sample in samples]
    found = {name: Quantiles.of([each[name] for each in stages]) for name in stages[0]}
    passes = [sample.context_pass_ms for sample in samples if sample.period_ms is not None]
    return found | ({"context pass, after the latency": Quantiles.of(passes)} if passes else {})


def _by_chunk(samples: Sequence[ChunkSample]) -> list[ChunkRow]:
    rows = []
    for chunk in sorted({sample.chunk for sample in samples}):
        own = [sample for sample in samples if sample.chunk == chunk]
        quartiles = np.percentile([sample.latency_ms for sample in own], (50, 25, 75, 0, 100))
        rows.append(
            ChunkRow(
                chunk=chunk,
                kv_frames=own[0].kv_frames,
                latency_ms=dict(zip(("median", "p25", "p75", "min", "max"), map(float, quartiles), strict=True)),
                step_ms=statistics.median(sample.step_ms for sample in own),
                context_pass_ms=statistics.median(sample.context_pass_ms for sample in own),
                stages_ms=_medians([sample.stages_ms() for sample in own]),
            )
        )
    return rows


def _medians(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in stages) for name in stages[0]}


def _first(samples: Sequence[FirstSample]) -> FirstFrame:
    totals = Quantiles.of([sample.total_ms for sample in samples])
    return FirstFrame(total_ms=totals, stages_ms=_medians([sample.stages_ms for sample in samples]))


def _frames_per_second(config: Config, found: Measured) -> FrameRate | None:
    """The rate by the period of the steady chunks, in frames that are shown, or would be shown of their latents."""
    steady = steady_chunks(found.chunks, config)
    if not steady:
        return None
    spread = Spread.of(
        [
            1e3 * found.frames[sample.chunk] / sample.period_ms
            for sample in found.chunks
            if sample.chunk in steady and sample.period_ms is not None
        ]
    )
    full = set(steady) <= set(full_chunks(found.chunks, config))
    return FrameRate(median=spread.median, min=spread.min, max=spread.max, chunks=steady, full=full)


def _exchange(config: Config, samples: Sequence[ChunkSample]) -> Exchange:
    """What a rank sends in a chunk: as the host counted it, or computed where the host does not see it."""
    ranks, steps = config.build.world_size, len(config.sampler.steps)
    largest = max(samples, key=lambda sample: sample.rows_sent)
    work = work_of(config, kv_frames=largest.kv_frames)
    counted = bool(largest.all_to_all_calls)
    calls = largest.all_to_all_calls if counted else steps * work.calls
    rows = largest.rows_sent if counted else steps * work.rows_sent
    sent = rows * config.model.head_dim * TORCH_DTYPES[config.build.precision].itemsize * (ranks - 1) // ranks
    return Exchange(
        bytes_per_chunk=sent * (steps + 1) // steps,
        calls_per_chunk=calls * (steps + 1) // steps,
        source="counted" if counted or ranks == 1 else "computed",
    )


def _fractions(replica: Replica, samples: Sequence[ChunkSample], ceilings: Ceilings) -> Fractions | None:
    eager, own = ceilings.eager_backend(replica), ceilings.own_backend(replica)
    # The ceilings were measured at the sizes of step 0.
    video = replica.config.video
    whole = [sample for sample in samples if video.step_at(video.first_frame_of(sample.chunk)) == 0]
    if not whole:
        return None
    return Fractions(
        of_eager_ops=_fraction(replica.config, whole, ceilings, eager),
        of_own_ops=None if own is None else _fraction(replica.config, whole, ceilings, own),
    )


def _fraction(config: Config, samples: Sequence[ChunkSample], ceilings: Ceilings, backend: OpBackend) -> Fraction:
    """Fractions by repeat, with the ceilings of the rounds around it, and of the fastest steps at the best rates."""
    size = TORCH_DTYPES[config.build.precision].itemsize
    works = {kv_frames: work_of(config, kv_frames=kv_frames) for kv_frames in {s.kv_frames for s in samples}}

    def at(rates: Rates, sample: ChunkSample) -> StepMs:
        return roofline(works[sample.kv_frames], rates, element_bytes=size)

    products, everything = [], []
    for repeat in sorted({sample.repeat for sample in samples}):
        own, rates = [s for s in samples if s.repeat == repeat], ceilings.around(backend, repeat)
        took_ms = sum(sample.step_ms for sample in own)
        products.append(sum(at(rates, sample).products_ms for sample in own) / took_ms)
        everything.append(sum(at(rates, sample).all_ms for sample in own) / took_ms)
    fastest: dict[int, float] = {}
    for sample in samples:
        step_ms = min(sample.denoise_ms)
        fastest[sample.chunk] = min(fastest.get(sample.chunk, step_ms), step_ms)
    once, best = [s for s in samples if s.repeat == samples[0].repeat], ceilings.best(backend)
    return Fraction(
        way=backend.name,
        products=Spread.of(products),
        with_passes_and_exchange=Spread.of(everything),
        products_fastest=sum(at(best, sample).products_ms for sample in once) / sum(fastest.values()),
    )


def _checks(config: Config, found: Measured) -> Checks:
    full = full_chunks(found.chunks, config)
    medians = [statistics.median(s.latency_ms for s in found.chunks if s.chunk == chunk) for chunk in full]
    flat = max(medians) / min(medians) if len(medians) > 1 else None
    later = statistics.median(s.latency_ms for s in found.chunks if s.chunk == 0)
    after_load, warm = (ms / later for ms in found.first_session_ms)
    return Checks(
        flat_once_full=Flatness(
            chunks=full,
            slowest_over_fastest=flat,
            within=FLAT_WITHIN,
            held=None if flat is None else flat <= 1 + FLAT_WITHIN,
        ),
        first_warm_chunk=FirstWarmChunk(
            over_later_sessions=warm,
            right_after_loading_over_later_sessions=after_load,
            within=FIRST_WITHIN,
            held=abs(warm - 1) <= FIRST_WITHIN,
        ),
    )


# ---- comparisons


def comparisons(replicas: Sequence[Replica], measured: Mapping[str, Measured]) -> list[Comparison]:
    """Compare every pair of replicas by every metric, the later one against the earlier one."""
    return [
        compare(later.name, earlier.name, metric, {each.name: _times(measured[each.name], metric) for each in replicas})
        for metric in METRICS
        for index, earlier in enumerate(replicas)
        for later in replicas[index + 1 :]
    ]


def _times(found: Measured, metric: str) -> list[float]:
    """The time of each repeat."""
    if metric == "first warm chunk":
        return [first.total_ms for first in found.warm]
    repeats: dict[int, list[float]] = {}
    for sample in found.chunks:
        value = sample.latency_ms if metric == "chunk latency" else sample.step_ms
        repeats.setdefault(sample.repeat, []).append(value)
    return [statistics.mean(values) for _, values in sorted(repeats.items())]


def compare(side: str, against: str, metric: str, times: Mapping[str, Sequence[float]]) -> Comparison:
    """Compare two replicas by their times, of which `times` has one for each repeat by name."""
    ratios = [theirs / ours for ours, theirs in zip(times[side], times[against], strict=True)]
    ratio = statistics.median(ratios)
    spread = float(np.subtract(*np.percentile(ratios, (75, 25))))
    interval = median_interval(ratios)
    verdict: Verdict = "none shown"
    if interval is not None and not interval[0] <= 1 <= interval[1] and abs(ratio - 1) > spread:
        verdict = "faster" if ratio > 1 else "slower"
    if interval is None:
        says = f"none shown, {len(ratios)} repeat(s) are too few"
    elif verdict == "none shown":
        says = f"no difference shown ({_bounds(*interval)})"
    else:
        says = f"{ratio:.2f} times as fast, {verdict} ({_bounds(*interval)})"
    return Comparison(
        side=side,
        against=against,
        metric=metric,
        ratio=ratio,
        ratios=tuple(ratios),
        spread=spread,
        interval=interval,
        verdict=verdict,
        says=f"{side} against {against}, {metric}: {says}",
    )


def _bounds(low: float, high: float, probability: float) -> str:
    # A bound is never rounded to 1, since the side of 1 on which it lies decides.
    digits = next((n for n in (2, 3, 4) if all(round(x, n) != 1 or x == 1 for x in (low, high))), 5)
    return f"{100 * probability:.0f} % interval {low:.{digits}f} to {high:.{digits}f}"


def median_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The narrowest sign-test interval for the median: low, high, and the probability that it contains the median.

    None if there are too few values for `CONFIDENCE`.
    """
    ordered, n = sorted(values), len(values)
    best = None
    for k in range(1, n // 2 + 1):
        probability = 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
        if probability < CONFIDENCE:
            break
        best = ordered[k - 1], ordered[-k], probability
    return best
