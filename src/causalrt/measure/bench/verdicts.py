"""When a difference is one: ratios of two sides in the same repeat, and an interval for their median.

The interval is that of the sign test, from the k-th smallest to the k-th largest ratio: whatever the distribution is, it holds
the median with a probability that is known, and one outlier does not widen it once there are eight ratios. Five are the fewest
for which that probability reaches `CONFIDENCE`. A difference is shown where the interval leaves 1 out and the median is farther
from 1 than the ratios are from each other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["faster", "slower", "none shown"]
CONFIDENCE = 0.9
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear between neighbours; the largest of few is their p99."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def quantiles(values: Sequence[float]) -> dict[str, float | int]:
    """p50, p95, p99 and n of at least one value."""
    return {**{name: quantile(values, fraction) for name, fraction in QUANTILES.items()}, "n": len(values)}


def median_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The narrowest sign-test interval for the median: low, high, and the probability that it holds it.

    None if there are too few values for `CONFIDENCE`.
    """
    ordered, n = sorted(values), len(values)
    best = None
    for k in range(1, n // 2 + 1):
        held = 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
        if held < CONFIDENCE:
            break
        best = ordered[k - 1], ordered[-k], held
    return best


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One side against another.

    Attributes:
        side: the first.
        against: the other.
        metric: of which both have a time in each repeat.
        ratio: median over repeats of (time of `against`) / (time of `side`): how many times as fast the side is.
        ratios: all of them.
        spread: their interquartile range.
        interval: for the median, and the probability that it holds it; None where there are too few repeats.
        verdict: of the side.
    """

    side: str
    against: str
    metric: str
    ratio: float
    ratios: tuple[float, ...]
    spread: float
    interval: tuple[float, float, float] | None
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, the sentence among them."""
        return {**asdict(self), "says": self.sentence()}

    def sentence(self) -> str:
        """For people; a ratio that shows nothing is not called one."""
        what = f"{self.side} against {self.against}, {self.metric.replace('_', ' ')}"
        if self.interval is None:
            return f"{what}: none shown, {len(self.ratios)} repeat(s) are too few"
        low, high, held = self.interval
        # A bound is never rounded to 1: on which side of it the bound is decides.
        digits = next((n for n in (2, 3, 4) if all(round(x, n) != 1 or x == 1 for x in (low, high))), 5)
        bounds = f"{100 * held:.0f} % interval {low:.{digits}f} to {high:.{digits}f}"
        if self.verdict == "none shown":
            return f"{what}: no difference shown ({bounds})"
        return f"{what}: {self.ratio:.2f} times as fast, {self.verdict} ({bounds})"


def compare(side: str, against: str, metric: str, times: Mapping[str, Sequence[float]]) -> Comparison:
    """Two sides by their times in the same repeats.

    Args:
        side: name of the one.
        against: name of the other.
        metric: what the times are of.
        times: by name, one for each repeat.
    """
    ratios = [theirs / ours for ours, theirs in zip(times[side], times[against], strict=True)]
    ratio = statistics.median(ratios)
    spread = quantile(ratios, 0.75) - quantile(ratios, 0.25)
    interval = median_interval(ratios)
    verdict: Verdict = "none shown"
    if interval is not None and not interval[0] <= 1 <= interval[1] and abs(ratio - 1) > spread:
        verdict = "faster" if ratio > 1 else "slower"
    return Comparison(
        side=side,
        against=against,
        metric=metric,
        ratio=ratio,
        ratios=tuple(ratios),
        spread=spread,
        interval=interval,
        verdict=verdict,
    )
