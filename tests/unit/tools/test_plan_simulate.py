"""The simulation without jitter against sums and maxima by hand; with it, against what must hold."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from causalrt.config import override
from causalrt.errors import ConfigError, ExecutorError
from causalrt.recipes import recipe
from causalrt.tools.plan.hardware import GPUS
from causalrt.tools.plan.predict import Forecast, forecast
from causalrt.tools.plan.roofline import GpuMachine
from causalrt.tools.plan.simulate import Jitter, simulate
from causalrt.tools.plan.timeline import draw_timeline

CONFIG = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})
CHUNKS = 12


def a_forecast(vae: str, world_size: int = 4) -> Forecast:
    machine = GpuMachine(gpu=GPUS["a800"], fused_ops=True)
    return forecast(CONFIG, machine, "balanced", world_size=world_size, executor="tensorrt", vae=vae)


def times(found: Forecast) -> list[tuple[float, float, float]]:
    """(denoising, refresh, decoding) of each chunk."""
    chunks = [found.chunks[min(index, len(found.chunks) - 1)] for index in range(CHUNKS)]
    return [(c.denoise_s.nominal, c.step_s.nominal, c.decode_s.nominal) for c in chunks]


@pytest.mark.parametrize("vae", ["none", "shared", "split"])
def test_one_thing_after_another(vae: str) -> None:
    """Only the order in which a chunk's decoding and refresh are done could differ; after every refresh all is done."""
    found = a_forecast(vae)
    simulated = simulate(found, chunks=CHUNKS, chunks_ahead=0)
    expected = np.cumsum([sum(each) for each in times(found)])
    assert max(job.end_s for job in simulated.jobs) == pytest.approx(expected[-1])
    if vae == "none":
        assert simulated.delivered_s == pytest.approx(expected - [refresh for _, refresh, _ in times(found)])


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_decoder_of_its_own_is_a_pipeline(world_size: int) -> None:
    """Max-plus: a chunk is decoded when it is denoised and the decoder is free. One rank bounds it here, eight do not."""
    found = a_forecast("own", world_size)
    ranks = decoder = 0.0
    expected = []
    for denoise, refresh, decode in times(found):
        decoder = max(decoder, ranks + denoise) + decode
        ranks += denoise + refresh
        expected.append(decoder)
    simulated = simulate(found, chunks=CHUNKS, chunks_ahead=CHUNKS)
    assert simulated.delivered_s == pytest.approx(expected)
    video = len(found.chunks)
    assert found.frames_per_second.nominal == pytest.approx(81 / simulated.delivered_s[video - 1])


def test_ranks_that_may_not_be_ahead_wait_for_the_decoder() -> None:
    found = a_forecast("own", 8)
    now, expected = 0.0, []
    for denoise, refresh, decode in times(found):
        expected.append(now + denoise + decode)
        now = max(now + denoise + refresh, expected[-1])
    assert simulate(found, chunks=CHUNKS, chunks_ahead=0).delivered_s == pytest.approx(expected)


def test_a_straggler_holds_all_up() -> None:
    found = a_forecast("none", 8)
    exact = Jitter(rank_spread=0, segment=0, exchange=0)
    even = simulate(found, chunks=3, jitter=exact)
    slow = simulate(found, chunks=3, jitter=replace(exact, straggler=0.5))
    parts = found.chunks[0].parts
    compute = parts.total_s - parts.exchange_s
    assert slow.delivered_s[0] == pytest.approx(even.delivered_s[0] + 0.5 * 4 * compute)
    step = slow.jobs[0]
    assert step.busy_s[0] == pytest.approx(1.5 * step.busy_s[1])
    assert max(step.busy_s) < step.end_s - step.start_s  # the exchange is no computing


def test_jitter_only_costs_and_a_seed_repeats_it() -> None:
    found, jitter = a_forecast("own", 8), Jitter(seed=3)
    first, again, other = (simulate(found, chunks=40, jitter=each) for each in (jitter, jitter, Jitter(seed=4)))
    assert first == again
    assert first != other
    exact = simulate(found, chunks=40)
    busy = sum(job.end_s - job.start_s for job in exact.jobs if job.what != "decode")
    assert sum(job.end_s - job.start_s for job in first.jobs if job.what != "decode") > busy
    chunk_ms = first.summary()["chunk_ms"]
    assert isinstance(chunk_ms, dict)
    assert chunk_ms["p50"] <= chunk_ms["p95"] <= chunk_ms["p99"]


def test_no_device_does_two_things_at_once() -> None:
    simulated = simulate(a_forecast("shared", 2), chunks=10, jitter=Jitter())
    ordered = sorted(simulated.jobs, key=lambda job: job.start_s)
    assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(ordered))
    assert len(simulated.delivered_s) == 10
    assert (simulated.latencies_s > 0).all()


@pytest.mark.parametrize("arguments", [{"chunks": 0}, {"chunks": 3, "chunks_ahead": -1}])
def test_nothing_to_simulate(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least one chunk"):
        simulate(a_forecast("none"), **arguments)


def test_jitter_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"jitter\.segment"):
        Jitter(segment=-0.1)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    simulated = simulate(a_forecast("own", 8), chunks=5, jitter=Jitter())
    draw_timeline(simulated, tmp_path / "timeline.png", title="8 ranks")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ExecutorError, match="cannot write"):
        draw_timeline(simulated, tmp_path / "nowhere" / "timeline.png", title="8 ranks")


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ExecutorError, match="pip install 'matplotlib"):
        draw_timeline(simulate(a_forecast("none"), chunks=1), tmp_path / "timeline.png", title="")
