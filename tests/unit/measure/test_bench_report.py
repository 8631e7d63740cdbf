"""Rates, rooflines, rows and checks from samples made by hand; what is read of the machine; host waits."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch

from causalrt.config import Config, override
from causalrt.errors import MeasurementError
from causalrt.measure.bench import rows
from causalrt.measure.bench.ceilings import BackendRates, Ceilings, roofline
from causalrt.measure.bench.machine import Machine, Moment, describe_machine, describe_moment, peak_host_bytes
from causalrt.measure.bench.picture import draw
from causalrt.measure.bench.replicas import Replica
from causalrt.measure.bench.report import FirstFrame, FirstFrames, Manifest, Quantiles, Report, Row
from causalrt.measure.bench.rollouts import ChunkSample, FirstSample, Measured
from causalrt.measure.bench.rows import comparisons, full_chunks, steady_chunks
from causalrt.measure.bench.show import sentences
from causalrt.recipes import recipe
from causalrt.runtime.usage import WaitCounter
from causalrt.tools.doctor import examine
from causalrt.tools.gpus import Gpu, Gpus
from causalrt.tools.ops.micro_ops import (
    OpExecutor,
    Sample,
    _onnx_runner,
    attention_op,
    random_tensors,
    rates_of,
    standard_attention_op,
    step_ops,
)
from causalrt.tools.ops.timing import OpTimer
from causalrt.tools.ops.work import Attention, full_work, work_of

RATES = {"gemm_gflops": 100.0, "attention_gflops": 50.0, "memory_gbs": 10.0, "exchange_gbs": 1.0}


def config(world_size: int = 1, **changes: str) -> Config:
    return override(recipe("tiny"), {"build.world_size": str(world_size), **changes})


def side(world_size: int = 1, name: str = "eager", executor: str = "eager") -> Replica:
    return Replica(
        name=name,
        executor=executor,
        config=config(world_size),
        fused_ops=False,
        cuda_graphs=False,
        threads=1,
        device="cpu",
        bundle=Path("bundle"),
    )


def row(replica: Replica, found: Measured, ceilings: Ceilings | None) -> dict[str, Any]:
    """The row as it stands in bench.json."""
    return asdict(rows.row(replica, found, ceilings))


def chunk(index: int, repeat: int = 0, *, steps: float = 10.0, last: bool = False, **fields: Any) -> ChunkSample:
    return ChunkSample(
        **{
            "repeat": repeat,
            "chunk": index,
            "kv_frames": (3, 6, 7, 7)[index],
            "latency_ms": 4 * steps + 5,
            "period_ms": None if last else 5 * steps + 10,
            "denoise_ms": (steps,) * 4,
            "exchange_ms": 0.0,
            "gather_ms": 1.0,
            "decode_ms": 0.0,
            "hand_over_ms": 4.0,
            "queue_ms": 0.0,
            "context_pass_ms": 0.0 if last else steps,
            "all_to_all_calls": 0,
            "rows_sent": 0,
            **fields,
        }
    )


def measured(repeats: int = 2, *, steps: float = 10.0, **fields: Any) -> Measured:
    samples = [chunk(i, r, steps=steps, last=i == 3, **fields) for r in range(repeats) for i in range(4)]
    first = FirstSample(total_ms=50.0, stages_ms={"open": 5.0, "denoise": 40.0, "gather": 1.0, "hand_over": 4.0})
    return Measured(
        cold=first, first_session_ms=[60.0, 46.0], warm=[first] * repeats, chunks=samples, frames=(9, 12, 12, 12)
    )


# ---- ceilings


def test_the_highest_rates_count() -> None:
    samples = [
        Sample(kind="gemm", features={"flop": 2e9}, seconds=0.1),
        Sample(kind="gemm", features={"flop": 2e9}, seconds=0.05),
        Sample(kind="attention", features={"flop": 1e9}, seconds=0.1),
        Sample(kind="arithmetic", features={"element": 1e6}, seconds=0.001),
    ]
    found = rates_of(samples, element_bytes=4)
    assert found == {"gemm_gflops": pytest.approx(40), "attention_gflops": 10, "memory_gbs": pytest.approx(12)}
    samples.append(Sample(kind="exchange", features={"element": 1e6}, seconds=0.002))
    assert rates_of(samples, element_bytes=4)["exchange_gbs"] == pytest.approx(2)


def test_a_roofline_by_hand() -> None:
    model = config().model
    rows, width, layers = 18, model.dim, model.num_layers
    products = layers * (6 * 2 * rows * width**2 + 2 * 2 * rows * width * model.ffn_dim) + 2 * 2 * rows * width * 64
    attentions = layers * 4 * rows * width * (7 * 6 + model.text_len)
    found = roofline(full_work(config()), RATES, element_bytes=4)
    assert found.gemm == pytest.approx(products / 100e9 * 1e3)
    assert found.attention == pytest.approx(attentions / 50e9 * 1e3)
    assert found.products_ms == pytest.approx(found.gemm + found.attention)
    assert (found.exchange, found.memory > 0) == (0.0, True)
    two = roofline(work_of(config(2), kv_frames=7), RATES, element_bytes=4)
    exchanged = sum(each.count * each.rows * each.head_dim * 4 for each in full_work(config(2)).exchanges)
    assert two.exchange == pytest.approx(exchanged / 1e9 * 1e3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_op_of_a_step_is_measured(world_size: int) -> None:
    work = full_work(config(world_size))
    executors: tuple[tuple[OpExecutor, int], ...] = (("eager", 1), ("onnxruntime", 2))
    for executor, times in executors:
        ops = step_ops(work, executor, torch.float32)
        flops = [op.features["flop"] for op in ops if op.kind == "attention"]
        assert flops == [each.flops for each in work.attentions] * times
        assert [op.features["flop"] for op in ops if op.kind == "gemm"] == [each.flops for each in work.gemms]
        assert sum(op.kind == "arithmetic" for op in ops) == 1


class OwnThreads(ort.SessionOptions):  # type: ignore[misc]
    """Asking for the pool of the process does nothing: it would change how other tests' sessions are made."""

    use_per_session_threads = True


def test_either_attention_of_onnxruntime_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "SessionOptions", OwnThreads)
    random = random_tensors(torch.float32)
    attention = Attention(num_heads=3, rows=5, keys=11, head_dim=16, count=1, over_slots=True)
    for make in (attention_op, standard_attention_op):
        op = make(attention, random)
        *_, made = _onnx_runner(op)()  # type: ignore[misc]
        torch.testing.assert_close(made, op.eager(*op.inputs.values()))


def with_rounds(sides: list[Replica], count: int) -> Ceilings:
    ceilings = Ceilings(sides)
    for each in sides:
        for backend in (ceilings.eager_backend(each), ceilings.own_backend(each)):
            assert backend is not None
            ceilings.rounds[backend] = [{name: rate * (1 + i) for name, rate in RATES.items()} for i in range(count)]
    return ceilings


def test_fractions_are_of_the_rounds_around_a_repeat() -> None:
    ceilings = with_rounds([side()], 3)
    rates = ceilings.around(ceilings.eager_backend(side()), 1)
    assert rates == {name: pytest.approx(2.5 * rate) for name, rate in RATES.items()}
    found = row(side(), measured(), ceilings)["roofline"]["of_own_ops"]
    works = [work_of(config(), kv_frames=frames) for frames in (3, 6, 7, 7)]
    at_ceilings = [sum(roofline(work, RATES, element_bytes=4).products_ms for work in works) / f for f in (1.5, 2.5)]
    assert found["products"]["max"] == pytest.approx(at_ceilings[0] / 40)
    assert found["products"]["min"] == pytest.approx(at_ceilings[1] / 40)
    assert found["with_passes_and_exchange"]["min"] > found["products"]["min"]
    assert found["products_fastest"] == pytest.approx(at_ceilings[0] * 1.5 / 3 / 40)


def test_the_fastest_step_is_held_against_the_best_rates() -> None:
    found = measured()
    found.chunks[0] = chunk(0, denoise_ms=(30.0, 5.0, 30.0, 30.0))  # the machine was busy, but for one step
    fraction = row(side(), found, with_rounds([side()], 3))["roofline"]["of_own_ops"]
    best = {name: 3 * rate for name, rate in RATES.items()}
    at_best = sum(roofline(work_of(config(), kv_frames=n), best, element_bytes=4).products_ms for n in (3, 6, 7, 7))
    assert fraction["products_fastest"] == pytest.approx(at_best / (5 + 10 + 10 + 10))


def test_a_runtime_without_single_ops_has_eagers_alone() -> None:
    inductor = side(executor="inductor")
    assert Ceilings.own_backend(inductor) is None
    assert row(inductor, measured(), with_rounds([side()], 3))["roofline"]["of_own_ops"] is None
    assert row(side(), measured(), None)["roofline"] is None


# ---- rows


def test_a_row() -> None:
    found = row(side(), measured(), None)
    assert found["chunk_latency_ms"] == {"p50": 45, "p95": 45, "p99": 45, "n": 8}
    assert {name: each["p50"] for name, each in found["stages_ms"].items()} == {
        "queue": 0,
        "denoise": 40,
        "exchange": 0,
        "gather": 1,
        "decode": 0,
        "hand_over": 4,
        "context pass, after the latency": 10,
    }
    assert found["stages_ms"]["context pass, after the latency"]["n"] == 6  # the last chunk has none
    assert found["frames_per_second"] == {"median": 200, "min": 200, "max": 200, "chunks": [2], "full": True}
    assert [each["kv_frames"] for each in found["by_chunk"]] == [3, 6, 7, 7]
    assert found["first_frame"]["warm"]["total_ms"]["n"] == 2
    json.dumps(found)


def test_an_exchange_that_nobody_sees_is_part_of_denoising() -> None:
    unseen = row(side(2), measured(exchange_ms=None), None)
    assert "exchange" not in unseen["stages_ms"]
    assert unseen["stages_ms"]["denoise"]["p50"] == 40
    seen = row(side(2), measured(exchange_ms=15.0), None)
    assert (seen["stages_ms"]["denoise"]["p50"], seen["stages_ms"]["exchange"]["p50"]) == (25, 15)


def test_bytes_are_counted_or_else_computed() -> None:
    work = full_work(config(2))
    computed = row(side(2), measured(), None)["exchange"]
    counted = row(side(2), measured(all_to_all_calls=4 * work.calls, rows_sent=4 * work.rows_sent), None)["exchange"]
    assert (computed["source"], counted["source"]) == ("computed", "counted")
    assert computed["bytes_per_chunk"] == counted["bytes_per_chunk"] == 5 * work.rows_sent * 16 * 4 // 2
    assert counted["calls_per_chunk"] == 5 * 2 * 2
    assert row(side(), measured(), None)["exchange"]["bytes_per_chunk"] == 0


def test_steady_chunks_are_those_with_a_full_window_and_a_refresh() -> None:
    samples = measured().chunks
    assert full_chunks(samples, config()) == [2, 3]
    assert steady_chunks(samples, config()) == [2]
    assert steady_chunks(samples[:2], config()) == [1]
    assert steady_chunks([chunk(0, last=True)], config()) == []
    short = measured()
    short.chunks = [chunk(0, r, last=True) for r in range(2)]
    assert row(side(), short, None)["frames_per_second"] is None


def test_checks() -> None:
    found = row(side(), measured(), None)["checks"]
    assert found["flat_once_full"] == {"chunks": [2, 3], "slowest_over_fastest": 1, "within": 0.05, "held": True}
    assert found["first_warm_chunk"]["over_later_sessions"] == pytest.approx(46 / 45)
    assert found["first_warm_chunk"]["right_after_loading_over_later_sessions"] == pytest.approx(60 / 45)
    assert found["first_warm_chunk"]["held"]
    uneven = measured()
    uneven.chunks = [chunk(i, r, steps=20 if i == 3 else 10, last=i == 3) for r in range(2) for i in range(4)]
    uneven.first_session_ms[1] = 60
    checks = row(side(), uneven, None)["checks"]
    assert (checks["flat_once_full"]["held"], checks["first_warm_chunk"]["held"]) == (False, False)
    uneven.chunks = [sample for sample in uneven.chunks if sample.chunk < 2]
    assert row(side(), uneven, None)["checks"]["flat_once_full"]["held"] is None


def test_every_pair_is_compared() -> None:
    sides = [side(name=name) for name in ("a", "b", "c")]
    found = comparisons(
        sides, {"a": measured(6, steps=20.0), "b": measured(6, steps=10.0), "c": measured(6, steps=10.0)}
    )
    chosen = {(c.side, c.against): c.verdict for c in found if c.metric == "denoising step"}
    assert chosen == {("b", "a"): "faster", ("c", "a"): "faster", ("c", "b"): "none shown"}


# ---- machine and ranks


def test_what_is_said_of_the_machine() -> None:
    machine = describe_machine("cpu")
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.versions["torch"] == torch.__version__
    json.dumps([asdict(machine), asdict(describe_moment("cpu"))])


def test_gpus_are_named_without_starting_cuda_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("CUDA was started in the process that measures")

    for name in ("init", "get_device_name", "get_device_properties", "get_device_capability", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = Gpus(
        counted=2,
        found=[Gpu(index=index, name=f"card {index}", target="sm90", total_bytes=2**37) for index in range(2)],
    )
    child = f"print({json.dumps(asdict(found))!r})"
    monkeypatch.setattr("causalrt.tools.gpus.python_command", lambda module: [sys.executable, "-c", child])
    assert describe_machine("cuda").gpus == ["card 0", "card 1"]
    assert examine()["machine"]["torch"] == torch.__version__
    assert not torch.cuda.is_initialized()


def test_peak_memory_is_read_by_process() -> None:
    mine = peak_host_bytes(os.getpid())
    assert mine is not None
    assert mine > 2**20
    assert peak_host_bytes(2**22 + 1) is None


def test_waits_are_counted_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    counter = WaitCounter(torch.device("cpu"))
    counter.begin()
    assert (counter.end(), modes) == (None, [])
    counter = WaitCounter(torch.device("cuda", 0))
    for _ in range(2):
        counter.begin()
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("the mode does not yet detect all synchronizing operations", stacklevel=1)
        assert counter.end() == 3
    assert counter.end() is None
    assert modes == ["warn", "default"] * 2


def report(*rows_: Row, ceilings: Sequence[BackendRates] = ()) -> Report:
    idle = Moment(load_average=(0.0, 0.0, 0.0), cpu_mhz=[], cpu_governor=None, gpus=None)
    manifest = Manifest(
        what="tiny",
        date="2026-11-21",
        command=[],
        machine=Machine(
            device="cpu", gpus=[], cpu="one", cores=1, cpu_quota=None, platform="", versions={}, commit=None
        ),
        before=idle,
        after=idle,
        bundles=[],
        random_weights=True,
        seed=0,
        repeats=2,
        chunks=4,
        config=config().as_dict(),
        includes={},
    )
    return Report(schema=0, manifest=manifest, rows=list(rows_), comparisons=[], ceilings=list(ceilings), left_out=[])


def test_the_legend_names_every_stage_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is too short for a picture of cold starts, and long in that of warm ones."""
    from matplotlib.figure import Figure

    named: list[str] = []
    monkeypatch.setattr(Figure, "legend", lambda _, __, names, **___: named.extend(names))
    total = Quantiles.of([1.0])
    first = FirstFrames(
        cold=FirstFrame(total_ms=total, stages_ms={"load": 1e4, "open": 1.0}),
        warm=FirstFrame(total_ms=total, stages_ms={"open": 1.0, "denoise": 4.0}),
    )
    draw(report(replace(rows.row(side(), measured(), None), first_frame=first)))
    assert named == ["load", "open", "denoise", "gather", "hand over"]


def test_a_low_rate_is_not_shown_as_none() -> None:
    rates = {"exchange_gbs": 0.0123}
    ceilings = BackendRates(way="eager 2x1", executor="eager", world_size=2, threads=1, best=rates, rounds=[rates])
    found = report(rows.row(side(), measured(), None), ceilings=[ceilings])
    assert "ceilings of a rank, eager 2x1: exchange gbs 0.0123" in sentences(found)


def test_ceilings_that_cannot_be_measured_say_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[OpTimer] = []

    def fail(timer: OpTimer) -> None:
        raise MeasurementError("a rank failed")

    monkeypatch.setattr(OpTimer, "__init__", lambda self, *_, **__: None)
    monkeypatch.setattr(OpTimer, "__exit__", lambda self, *_: closed.append(self))
    monkeypatch.setattr(OpTimer, "wait_ready", fail, raising=False)
    with pytest.raises(MeasurementError, match="a rank failed; leave single ops out with --no-ceilings"):
        Ceilings([side(), side(2)]).__enter__()
    assert len(closed) == 2
