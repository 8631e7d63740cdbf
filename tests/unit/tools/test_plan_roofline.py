"""Waves by hand, and that more work never takes less time."""

import pytest

from causalrt.config import override
from causalrt.errors import ConfigError
from causalrt.recipes import recipe
from causalrt.tools.ops.work import LAYOUTS, Attention, Exchange, Gemm, head_layout, step_work
from causalrt.tools.plan import assumptions as assumed
from causalrt.tools.plan.assumptions import BOUNDS, between
from causalrt.tools.plan.hardware import GPUS, gpu_by_name
from causalrt.tools.plan.predict import forecast
from causalrt.tools.plan.published import compare_published
from causalrt.tools.plan.roofline import GpuMachine, decode_fraction, gemm_tiles, waves

A800 = GpuMachine(gpu=GPUS["a800"])
CONFIG = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})


def attention(heads: int, rows: int, keys: int = 32760) -> Attention:
    return Attention(num_heads=heads, rows=rows, keys=keys, head_dim=128, count=1, over_slots=True)


@pytest.mark.parametrize(("tiles", "expected"), [(1, 1), (108, 1), (109, 2), (216, 2), (444, 5)])
def test_waves(tiles: int, expected: int) -> None:
    assert waves(tiles, 108) == expected


def test_projections_at_585_rows_fill_60_multiprocessors() -> None:
    assert gemm_tiles(Gemm(m=585, n=1536, k=1536, count=1), (128, 128)) == 60


def test_attention_by_hand() -> None:
    """74 tiles of two padded heads are one wave of 512 key blocks, each 4 x 128 x 64 x 128 operations at 1/108 of the rate."""
    rate = 312e12 * assumed.REACHED["ampere"].attention.nominal / 108
    expected = 512 * 4 * 128 * 64 * 128 / rate
    assert A800.attention_seconds((attention(2, 4680),), "nominal") == pytest.approx(expected, rel=1e-12)
    # 37 and 19 tiles, launched apart, are two such waves; 444 tiles of one rank are five.
    apart = sum(A800.attention_seconds((attention(1, rows),), "nominal") for rows in (4680, 2344))
    assert apart == pytest.approx(2 * expected, rel=1e-12)
    assert A800.attention_seconds((attention(12, 4680),), "nominal") == pytest.approx(5 * expected, rel=1e-12)


def test_one_launch_splits_its_keys() -> None:
    """56 tiles in seven key ranges: 392 programs, four waves of ceil(512 / 7) + 4 blocks (one range: 512; five: 3 x 107)."""
    fused = GpuMachine(gpu=GPUS["a800"], fused_ops=True)
    rate = 312e12 * assumed.REACHED["ampere"].attention.nominal / 108
    expected = 4 * (74 + 4) * 4 * 128 * 64 * 128 / rate
    launch = (attention(1, 4680), attention(1, 2344))
    assert fused.attention_seconds(launch, "nominal") == pytest.approx(expected, rel=1e-12)


def test_an_exchange_by_hand() -> None:
    exchange = Exchange(rows=3218, head_dim=128, count=1)
    near = 7 * 3218 * 128 * 2 / (200e9 * assumed.LINK_FRACTION["nvlink"].nominal)
    expected = assumed.LINK_LATENCY_S["nvlink"].nominal + near
    assert A800.exchange_seconds(exchange, 8, "nominal") == pytest.approx(expected, rel=1e-12)
    assert A800.exchange_seconds(exchange, 16, "nominal") > 5 * expected  # eight ranks lie behind the network


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("lowering", ["engine", "runtime", "eager"])
def test_more_work_takes_no_less(gpu: str, lowering: str) -> None:
    machine = GpuMachine(gpu=GPUS[gpu], lowering=lowering)
    for bound in BOUNDS:
        last = 0.0
        for frames in range(3, 22, 3):
            work = step_work(CONFIG, head_layout(CONFIG, "balanced"), kv_rows=1560 * frames)
            seconds = machine.step_time(work, bound, slot_rows=CONFIG.slot_rows).total_s
            assert seconds >= last
            assert seconds > machine.bound_seconds(work)
            last = seconds


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vae", ["none", "own", "shared", "split"])
def test_cases_are_in_order(layout: str, vae: str) -> None:
    found = forecast(CONFIG, A800, layout, world_size=8, executor="tensorrt", vae=vae)
    for span in (found.first_frame_s, found.latency_s, found.chunks[3].step_s):
        assert span.best < span.nominal < span.worst
    for speed in (found.frames_per_second, found.steady_frames_per_second):
        assert speed.best > speed.nominal > speed.worst
    assert found.bound_frames_per_second is not None
    assert found.bound_frames_per_second > found.steady_frames_per_second.best
    assert sum(chunk.frames for chunk in found.chunks) == 81


def test_a_first_chunk_of_one_frame_is_a_chunk_of_its_own() -> None:
    config = override(CONFIG, {"video.independent_first_frame": "true", "video.horizon_frames": "22"})
    found = forecast(config, A800, "balanced", world_size=8, executor="tensorrt", vae="own")
    assert [chunk.kv_frames for chunk in found.chunks] == [1, 4, 7, 10, 13, 16, 19, 22]
    assert [chunk.frames for chunk in found.chunks] == [1, *[12] * 7]
    first, second = found.chunks[:2]
    assert first.step_s.nominal < second.step_s.nominal
    assert first.decode_s.nominal < second.decode_s.nominal


def test_collectives_of_the_runtime_cost_more_than_those_of_the_engine() -> None:
    engine, runtime = (
        forecast(CONFIG, GpuMachine(gpu=GPUS["a800"], lowering=how), "balanced", world_size=8, executor="tensorrt")
        for how in ("engine", "runtime")
    )
    assert runtime.latency_s.nominal > engine.latency_s.nominal
    assert runtime.counts == engine.counts


def test_every_gpu_has_assumptions() -> None:
    for name, gpu in GPUS.items():
        assert gpu_by_name(name) is gpu
        assert gpu.source
        reached = assumed.REACHED[gpu.architecture]
        for span in (reached.gemm, reached.attention, assumed.LINK_FRACTION[gpu.link], decode_fraction(gpu)):
            assert 1 > span.best > span.nominal > span.worst > 0
    with pytest.raises(ConfigError, match="a800, a100"):
        gpu_by_name("tpu")


def test_nominal_is_the_middle_of_what_is_published() -> None:
    assert between(0.73, 0.50).nominal == pytest.approx(0.615)
    for reached in assumed.REACHED.values():
        for span in (reached.gemm, reached.attention):
            assert span.nominal == pytest.approx((span.best + span.worst) / 2)


def test_published_figures() -> None:
    """Errors as docs/performance.md states them: near on the A100, well below what was published on the H100."""
    found = {each.what: each for each in compare_published()}
    a100 = [each for what, each in found.items() if "A100" in what]
    h100 = [each for what, each in found.items() if "H100" in what]
    assert len(a100) == 3
    assert all(abs(each.error) < 0.12 and each.inside for each in a100)
    assert len(h100) == 2
    assert all(-0.45 < each.error < -0.2 and not each.inside for each in h100)
