"""When `bench` calls a difference one: equal samples, shifted ones, outliers, few of them."""

import random
from dataclasses import asdict

import numpy as np
import pytest

from causalrt.measure.bench.report import Comparison, Quantiles
from causalrt.measure.bench.rows import CONFIDENCE, compare, median_interval


def noisy(rng: random.Random, mean: float, count: int, spread: float = 0.05) -> list[float]:
    return [mean * rng.lognormvariate(0, spread) for _ in range(count)]


def judged(ours: list[float], theirs: list[float]) -> Comparison:
    return compare("a", "b", "chunk latency", {"a": ours, "b": theirs})


@pytest.mark.parametrize("count", [5, 8, 20])
def test_equal_sides_are_seldom_told_apart(count: int) -> None:
    rng = random.Random(0)
    found = [judged(noisy(rng, 100, count), noisy(rng, 100, count)).verdict for _ in range(400)]
    assert found.count("none shown") >= CONFIDENCE * len(found)


@pytest.mark.parametrize("count", [5, 8, 20])
def test_a_large_shift_is_shown(count: int) -> None:
    rng = random.Random(1)
    fast, slow = noisy(rng, 50, count), noisy(rng, 100, count)
    found = judged(fast, slow)
    assert found.verdict == "faster"
    assert found.ratio == pytest.approx(2, rel=0.1)
    assert "2.0" in found.says or "1.9" in found.says
    assert judged(slow, fast).verdict == "slower"


def test_pairs_are_of_one_repeat() -> None:
    """The machine slows down fivefold while both run: each sample differs more than the sides do."""
    load = [1.0, 1.6, 2.5, 3.9, 5.0]
    assert judged([100 * x for x in load], [130 * x for x in load]).verdict == "faster"


def test_an_outlier_does_not_hide_a_shift() -> None:
    theirs = [200.0] * 9
    ours = [100.0, 101, 99, 102, 98, 100, 101, 99, 2000]
    assert judged(ours, theirs).verdict == "faster"


def test_an_outlier_makes_no_difference() -> None:
    found = judged([100.0, 101, 99, 100, 10], [100.0, 100, 100, 101, 100])
    assert found.verdict == "none shown"
    assert "no difference shown" in found.says


def test_what_is_smaller_than_the_spread_is_no_difference() -> None:
    found = judged([100.0] * 6, [101.0, 103, 105, 120, 130, 140])
    assert found.interval is not None
    assert found.interval[0] > 1
    assert abs(found.ratio - 1) < found.spread
    assert found.verdict == "none shown"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_repeats_show_nothing(count: int) -> None:
    found = judged([1.0] * count, [3.0] * count)
    assert (found.verdict, found.interval) == ("none shown", None)
    assert "too few" in found.says
    assert "3" not in found.says


def test_a_verdict_in_json() -> None:
    plain = asdict(judged([1.0] * 5, [1.0] * 5))
    assert plain["verdict"] == "none shown"
    assert plain["says"] == "a against b, chunk latency: no difference shown (94 % interval 1.00 to 1.00)"


@pytest.mark.parametrize(
    ("count", "low", "high", "held"),
    [(5, 0, 4, 15 / 16), (7, 0, 6, 63 / 64), (8, 1, 6, 1 - 18 / 256), (11, 2, 8, 1 - 2 * 67 / 2048)],
)
def test_intervals_by_hand(count: int, low: int, high: int, held: float) -> None:
    assert median_interval([float(i) for i in range(count)]) == (low, high, pytest.approx(held))


def test_an_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = random.Random(2)
    drawn = [median_interval([rng.expovariate(1) for _ in range(8)]) for _ in range(2000)]
    median = np.log(2)
    held = [found is not None and found[0] <= median <= found[1] for found in drawn]
    assert np.mean(held) == pytest.approx(1 - 18 / 256, abs=0.02)


def test_quantiles_are_numpys() -> None:
    values = [5.0, 1.0, 9.0, 2.0, 7.5, 3.0]
    found = Quantiles.of(values)
    assert found.n == 6
    for name, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
        assert getattr(found, name) == pytest.approx(np.percentile(values, percent))
    assert Quantiles.of([4.0]) == Quantiles(p50=4.0, p95=4.0, p99=4.0, n=1)


def test_a_bound_is_never_rounded_to_one() -> None:
    found = judged([100.0] * 5, [100.1, 150, 160, 170, 180])
    assert found.verdict == "faster"
    assert "interval 1.001 to 1.800" in found.says
    assert "interval 1.00 to 1.00" in judged([100.0] * 5, [100.0] * 5).says
