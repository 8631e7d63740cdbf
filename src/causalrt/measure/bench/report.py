"""What was measured, as plain JSON types: a row a side, comparisons of pairs of rows, checks. Times are milliseconds."""

import statistics
from collections.abc import Sequence
from typing import Any

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.measure.bench.ceilings import Ceilings, OpBackend, Rates, StepMs, roofline, work_of
from causalrt.measure.bench.samples import ChunkSample, FirstSample, Measured
from causalrt.measure.bench.sides import Replica
from causalrt.measure.bench.verdicts import Comparison, compare, quantile, quantiles

FLAT_WITHIN, FIRST_WITHIN = 0.05, 0.10
"""How flat chunk latency shall be once the window is full, and how close a first warm chunk to a later one like it."""
METRICS = ("chunk latency", "denoising step", "first warm chunk")


def full_chunks(samples: Sequence[ChunkSample], config: Config) -> list[int]:
    """Chunks that attend to a full window."""
    capacity = config.video.capacity_frames
    return sorted({sample.chunk for sample in samples if sample.kv_frames == capacity})


def steady_chunks(samples: Sequence[ChunkSample], config: Config) -> list[int]:
    """Chunks that frames a second are taken from: a refresh follows, and the window is full, or else as full as it gets."""
    refreshed = sorted({sample.chunk for sample in samples if sample.period_ms is not None})
    return [chunk for chunk in refreshed if chunk in full_chunks(samples, config)] or refreshed[-1:]


def row(side: Replica, found: Measured, ceilings: Ceilings | None) -> dict[str, Any]:
    """One side."""
    return {
        "name": side.name,
        "executor": side.executor,
        "world_size": side.world_size,
        "threads_per_rank": side.threads,
        "plugins": side.plugins,
        "cuda_graphs": side.cuda_graphs,
        "device": side.device,
        "bundle": side.bundle.name,
        "chunk_latency_ms": quantiles([sample.latency_ms for sample in found.chunks]),
        "stages_ms": _stages(found.chunks),
        "denoising_steps_ms": [
            quantiles(column) for column in zip(*(sample.denoise_ms for sample in found.chunks), strict=True)
        ],
        "by_chunk": _by_chunk(found.chunks),
        "first_frame": {"cold": _first([found.cold]), "warm": _first(found.warm)},
        "frames_per_second": _frames_per_second(side.config, found),
        "exchange": _exchange(side.config, found.chunks),
        "peak_memory": {
            "rank_bytes": list(found.peak_rank_bytes),
            "decoder_bytes": found.peak_decoder_bytes,
            "device_bytes": None if side.device == "cpu" else list(found.peak_device_bytes),
        },
        "host_waits_per_chunk": found.device_waits,
        "roofline": None if ceilings is None else _fractions(side, found.chunks, ceilings),
        "largest_difference": found.largest_difference,
        "checks": _checks(side.config, found),
    }


def comparisons(sides: Sequence[Replica], measured: dict[str, Measured]) -> list[Comparison]:
    """Every pair of sides by every metric; the side that comes later against the one that comes earlier."""
    return [
        compare(side.name, against.name, metric, {each.name: _times(measured[each.name], metric) for each in sides})
        for metric in METRICS
        for index, against in enumerate(sides)
        for side in sides[index + 1 :]
    ]


def _times(found: Measured, metric: str) -> list[float]:
    """One for each repeat."""
    if metric == "first warm chunk":
        return [first.total_ms for first in found.warm]
    repeats: dict[int, list[float]] = {}
    for sample in found.chunks:
        value = sample.latency_ms if metric == "chunk latency" else sample.step_ms
        repeats.setdefault(sample.repeat, []).append(value)
    return [statistics.mean(values) for _, values in sorted(repeats.items())]


def _stages(samples: Sequence[ChunkSample]) -> dict[str, dict[str, float | int]]:
    stages = [sample.stages_ms() for sample in samples]
    found = {name: quantiles([each[name] for each in stages]) for name in stages[0]}
    refreshes = [sample.refresh_ms for sample in samples if sample.period_ms is not None]
    return found | ({"refresh, after the latency": quantiles(refreshes)} if refreshes else {})


def _by_chunk(samples: Sequence[ChunkSample]) -> list[dict[str, Any]]:
    rows = []
    for chunk in sorted({sample.chunk for sample in samples}):
        own = [sample for sample in samples if sample.chunk == chunk]
        stages = [sample.stages_ms() for sample in own]
        latencies = [sample.latency_ms for sample in own]
        rows.append(
            {
                "chunk": chunk,
                "kv_frames": own[0].kv_frames,
                "latency_ms": {
                    "median": statistics.median(latencies),
                    "p25": quantile(latencies, 0.25),
                    "p75": quantile(latencies, 0.75),
                    "min": min(latencies),
                    "max": max(latencies),
                },
                "step_ms": statistics.median(sample.step_ms for sample in own),
                "refresh_ms": statistics.median(sample.refresh_ms for sample in own),
                "stages_ms": {name: statistics.median(each[name] for each in stages) for name in stages[0]},
            }
        )
    return rows


def _first(samples: Sequence[FirstSample]) -> dict[str, Any]:
    stages = {name: statistics.median(s.stages_ms[name] for s in samples) for name in samples[0].stages_ms}
    return {"total_ms": quantiles([sample.total_ms for sample in samples]), "stages_ms": stages}


def _frames_per_second(config: Config, found: Measured) -> dict[str, Any] | None:
    """By the period of the steady chunks: frames that are shown of them, or would be of their latents."""
    steady = steady_chunks(found.chunks, config)
    if not steady:
        return None
    rates = [
        1e3 * found.frames[sample.chunk] / sample.period_ms
        for sample in found.chunks
        if sample.chunk in steady and sample.period_ms is not None
    ]
    full = set(steady) <= set(full_chunks(found.chunks, config))
    return {**_spread(rates), "chunks": steady, "full": full}


def _exchange(config: Config, samples: Sequence[ChunkSample]) -> dict[str, Any]:
    """Of one rank in one chunk with its refresh, its own block left out: counted on the wire, or else computed."""
    ranks, steps = config.build.world_size, len(config.sampler.steps)
    largest = max(samples, key=lambda sample: sample.rows_sent)
    work = work_of(config, kv_frames=largest.kv_frames)
    counted = bool(largest.all_to_all_calls)
    calls = largest.all_to_all_calls if counted else steps * work.calls
    rows = largest.rows_sent if counted else steps * work.rows_sent
    sent = rows * config.model.head_dim * TORCH_DTYPES[config.build.precision].itemsize * (ranks - 1) // ranks
    return {
        "bytes_per_chunk": sent * (steps + 1) // steps,
        "calls_per_chunk": calls * (steps + 1) // steps,
        "source": "counted" if counted or ranks == 1 else "computed",
    }


def _fractions(side: Replica, samples: Sequence[ChunkSample], ceilings: Ceilings) -> dict[str, Any] | None:
    """Time of the steps at the ceilings of the same rounds / time that they took, over whole rollouts."""
    eager, own = ceilings.eager_way(side), ceilings.own_way(side)
    # The ceilings were measured with the sizes of step 0 alone.
    video = side.config.video
    whole = [sample for sample in samples if video.step_at(video.first_frame_of(sample.chunk)) == 0]
    if not whole:
        return None
    return {
        "of_eager_ops": _fraction(side.config, whole, ceilings, eager),
        "of_own_ops": None if own is None else _fraction(side.config, whole, ceilings, own),
    }


def _fraction(config: Config, samples: Sequence[ChunkSample], ceilings: Ceilings, way: OpBackend) -> dict[str, Any]:
    size = TORCH_DTYPES[config.build.precision].itemsize
    works = {kv_frames: work_of(config, kv_frames=kv_frames) for kv_frames in {s.kv_frames for s in samples}}

    def at(rates: Rates, sample: ChunkSample) -> StepMs:
        return roofline(works[sample.kv_frames], rates, element_bytes=size)

    products, everything = [], []
    for repeat in sorted({sample.repeat for sample in samples}):
        own, rates = [s for s in samples if s.repeat == repeat], ceilings.around(way, repeat)
        took_ms = sum(sample.step_ms for sample in own)
        products.append(sum(at(rates, sample).products_ms for sample in own) / took_ms)
        everything.append(sum(at(rates, sample).all_ms for sample in own) / took_ms)
    fastest: dict[int, float] = {}
    for sample in samples:
        step_ms = min(sample.denoise_ms)
        fastest[sample.chunk] = min(fastest.get(sample.chunk, step_ms), step_ms)
    once, best = [s for s in samples if s.repeat == samples[0].repeat], ceilings.best(way)
    return {
        "way": way.name,
        "products": _spread(products),
        "with_passes_and_exchange": _spread(everything),
        "products_fastest": sum(at(best, sample).products_ms for sample in once) / sum(fastest.values()),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _checks(config: Config, found: Measured) -> dict[str, Any]:
    """Reported, not enforced; None where the run has nothing to tell it by."""
    full = full_chunks(found.chunks, config)
    medians = [statistics.median(s.latency_ms for s in found.chunks if s.chunk == chunk) for chunk in full]
    flat = max(medians) / min(medians) if len(medians) > 1 else None
    later = statistics.median(s.latency_ms for s in found.chunks if s.chunk == 0)
    after_load, warm = (ms / later for ms in found.first_session_ms)
    return {
        "flat_once_full": {
            "chunks": full,
            "slowest_over_fastest": flat,
            "within": FLAT_WITHIN,
            "held": None if flat is None else flat <= 1 + FLAT_WITHIN,
        },
        "first_warm_chunk": {
            "over_later_sessions": warm,
            "right_after_loading_over_later_sessions": after_load,
            "within": FIRST_WITHIN,
            "held": abs(warm - 1) <= FIRST_WITHIN,
        },
    }
