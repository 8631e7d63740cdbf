"""Metrics for Prometheus, in one registry per server."""

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from causalrt.runtime.stopwatch import process_age_s

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("queue", "text", "denoise", "exchange", "gather", "decode", "hand_over", "encode")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms that the server fills; gauges ask where the number lives."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.first_frame = Histogram(
            "causalrt_first_frame_seconds",
            "Time from the request until its first frames are sent, with the wait in the queue",
            ["kind"],
            buckets=SECONDS,
            registry=registry,
        )
        self.cold_first_frame = Gauge(
            "causalrt_cold_first_frame_seconds",
            "Time from process start to loaded, plus the wait for the process's first frame; 0 until there is one",
            registry=registry,
        )
        self._loaded_s: float | None = process_age_s()
        self.chunk = Histogram(
            "causalrt_chunk_seconds",
            "Latency of a chunk, whole and by stage",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.switch = Histogram(
            "causalrt_switch_seconds",
            "Duration of prompt switches, with text encoding",
            ["policy"],
            buckets=SECONDS,
            registry=registry,
        )
        self.frames = Counter("causalrt_frames", "Frames generated", ["kind"], registry=registry)
        self.dropped_frames = Counter(
            "causalrt_dropped_frames",
            "Frames generated for readers that left, stalled or stopped; a connected reader gets every frame",
            registry=registry,
        )
        self.generations = Counter(
            "causalrt_generations", "Generations that have ended, by reason", ["kind", "reason"], registry=registry
        )
        self.errors = Counter(
            "causalrt_errors", "Requests that were refused or failed, by code", ["code"], registry=registry
        )
        self.reloads = Counter("causalrt_engine_reloads", "Engine reloads after ranks died", registry=registry)
        for stage in ("whole", *STAGES):
            self.chunk.labels(stage)
        for kind in ("job", "realtime"):
            self.first_frame.labels(kind)
            self.frames.labels(kind)

    def first_frame_after(self, kind: str, seconds: float) -> float | None:
        """Record the wait for a first frame; for the first one of the process, return the seconds of loading plus this wait."""
        self.first_frame.labels(kind).observe(seconds)
        if self._loaded_s is None:
            return None
        cold_s, self._loaded_s = self._loaded_s + seconds, None
        self.cold_first_frame.set(cold_s)
        return cold_s

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed when it is scraped."""
        Gauge(f"causalrt_{name}", what, registry=self.registry).set_function(value)

    def gauges(self, name: str, what: str, label: str, values: Callable[[], Mapping[str, float]]) -> None:
        """Add a gauge with one label, whose values are computed when it is scraped; the labels never change."""
        gauge = Gauge(f"causalrt_{name}", what, [label], registry=self.registry)
        for key in values():
            gauge.labels(key).set_function(partial(_entry, values, key))

    def page(self) -> bytes:
        """Return the metrics in the exposition format."""
        return generate_latest(self.registry)


def _entry(values: Callable[[], Mapping[str, float]], key: str) -> float:
    return values()[key]
