"""The timeline against sums and maxima by hand."""

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
from causalrt.tools.plan.timeline import draw_timeline, timeline

CONFIG = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})
CHUNKS = 12


def a_forecast(vae: str, world_size: int = 4) -> Forecast:
    machine = GpuMachine(gpu=GPUS["a800"], fused_ops=True)
    return forecast(CONFIG, machine, "balanced", world_size=world_size, executor="tensorrt", vae=vae)


def times(found: Forecast) -> list[tuple[float, float, float]]:
    """(denoising, context pass, decoding) of each chunk."""
    chunks = [found.chunks[min(index, len(found.chunks) - 1)] for index in range(CHUNKS)]
    return [(c.denoise_s.nominal, c.step_s.nominal, c.decode_s.nominal) for c in chunks]


@pytest.mark.parametrize("vae", ["none", "shared", "split"])
def test_one_thing_after_another(vae: str) -> None:
    """The order of a chunk's decoding and context pass could differ; after every context pass all is done."""
    found = a_forecast(vae)
    run = timeline(found, chunks=CHUNKS, chunks_ahead=0)
    expected = np.cumsum([sum(each) for each in times(found)])
    assert max(job.end_s for job in run.jobs) == pytest.approx(expected[-1])
    if vae == "none":
        assert run.delivered_s == pytest.approx(expected - [context_pass for _, context_pass, _ in times(found)])


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_decoder_of_its_own_is_a_pipeline(world_size: int) -> None:
    """Max-plus: a chunk is decoded when it is denoised and the decoder is free. One rank bounds it here, eight do not."""
    found = a_forecast("own", world_size)
    ranks = decoder = 0.0
    expected = []
    for denoise, context_pass, decode in times(found):
        decoder = max(decoder, ranks + denoise) + decode
        ranks += denoise + context_pass
        expected.append(decoder)
    run = timeline(found, chunks=CHUNKS, chunks_ahead=CHUNKS)
    assert run.delivered_s == pytest.approx(expected)
    video = len(found.chunks)
    assert found.frames_per_second.nominal == pytest.approx(81 / run.delivered_s[video - 1])


def test_ranks_that_may_not_be_ahead_wait_for_the_decoder() -> None:
    found = a_forecast("own", 8)
    now, expected = 0.0, []
    for denoise, context_pass, decode in times(found):
        expected.append(now + denoise + decode)
        now = max(now + denoise + context_pass, expected[-1])
    assert timeline(found, chunks=CHUNKS, chunks_ahead=0).delivered_s == pytest.approx(expected)


def test_a_straggler_holds_all_up() -> None:
    found = a_forecast("none", 8)
    even, slow = timeline(found, chunks=3), timeline(found, chunks=3, straggler=0.5)
    parts = found.chunks[0].parts
    compute = parts.total_s - parts.exchange_s
    assert slow.delivered_s[0] == pytest.approx(even.delivered_s[0] + 0.5 * 4 * compute)
    step = slow.jobs[0]
    assert step.busy_s[0] == pytest.approx(1.5 * step.busy_s[1])
    assert max(step.busy_s) < step.end_s - step.start_s  # the exchange is no computing


def test_a_summary_by_hand() -> None:
    found = timeline(a_forecast("own", 8), chunks=CHUNKS)
    first, last, before = found.delivered_s[0], found.delivered_s[-1], found.delivered_s[-2]
    assert found.summary() == pytest.approx(
        {
            "first_frame_ms": 1e3 * first,
            "last_chunk_ms": 1e3 * (last - found.started_s[-1]),
            "last_interval_ms": 1e3 * (last - before),
            "frames_per_second": 12 * (CHUNKS - 1) / (last - first),
        }
    )
    assert set(timeline(a_forecast("own", 8), chunks=1).summary()) == {"first_frame_ms", "last_chunk_ms"}


def test_no_device_does_two_things_at_once() -> None:
    found = timeline(a_forecast("shared", 2), chunks=10)
    ordered = sorted(found.jobs, key=lambda job: job.start_s)
    assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(ordered))
    assert [job.what for job in ordered].count("decode") == 10 * 3  # one a latent
    assert len(found.delivered_s) == 10
    assert all(end > start for start, end in zip(found.started_s, found.delivered_s, strict=True))


@pytest.mark.parametrize("arguments", [{"chunks": 0}, {"chunks": 3, "chunks_ahead": -1}])
def test_nothing_to_timeline(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least one chunk"):
        timeline(a_forecast("none"), **arguments)


def test_a_straggler_out_of_range() -> None:
    with pytest.raises(ConfigError, match="straggler"):
        timeline(a_forecast("none"), chunks=1, straggler=-0.1)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = timeline(a_forecast("own", 8), chunks=5)
    draw_timeline(run, tmp_path / "timeline.png", title="8 ranks")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ExecutorError, match="cannot write"):
        draw_timeline(run, tmp_path / "nowhere" / "timeline.png", title="8 ranks")


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ExecutorError, match="pip install 'matplotlib"):
        draw_timeline(timeline(a_forecast("none"), chunks=1), tmp_path / "timeline.png", title="")
