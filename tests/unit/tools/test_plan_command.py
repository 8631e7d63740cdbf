"""`causalrt plan` as it is called: JSON that does not change, verdicts, the calibration's file, refusals."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from plan_tables import TABLES, with_tables

from causalrt.cli import main
from causalrt.config import override
from causalrt.errors import ConfigError, MeasurementError
from causalrt.recipes import recipe
from causalrt.tools.ops.micro_ops import OpExecutor, Sample
from causalrt.tools.ops.rank_processes import RankProcesses
from causalrt.tools.ops.timing import exchange_of
from causalrt.tools.ops.work import PassKind
from causalrt.tools.plan.calibration import CalibratedMachine, Calibration, Entry, fit_costs, read_calibration
from causalrt.tools.plan.command import verdict
from causalrt.tools.plan.hardware import GPUS
from causalrt.tools.plan.predict import forecast
from causalrt.tools.plan.roofline import GpuMachine


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_json_is_the_same_twice(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--gpu", "a800", "--world-size", "8", "--json")
    first = said(capsys, *arguments)
    assert said(capsys, *arguments) == first
    found = json.loads(first)
    assert found["predicted_not_measured"] is True
    assert [each["layout"] for each in found["forecasts"]] == ["balanced", "padded", "grouped", "gathered"]
    assert found["forecasts"][0]["counts"]["all_to_all_calls"] == 5 * 60
    assert found["forecasts"][3]["counts"]["all_to_all_calls"] == 5 * 30
    assert set(found["timeline"]) == {
        "world_size",
        "layout",
        "first_frame_ms",
        "last_chunk_ms",
        "last_interval_ms",
        "frames_per_second",
    }


@pytest.mark.parametrize(
    ("gpu", "built"),
    [
        *(
            (gpu, "`--executor tensorrt`; or build so on any other, and finish")
            for gpu in ("a100", "a800", "h200", "b200")
        ),
        ("rtx5090", "build on any machine with `--executor tensorrt_rtx --target sm120`"),
    ],
)
def test_the_executor_to_build_is_named(capsys: pytest.CaptureFixture[str], gpu: str, built: str) -> None:
    arguments = ("--gpu", gpu, "--world-size", "1", "--head-plan", "balanced")
    assert built in said(capsys, *arguments)
    assert built in json.loads(said(capsys, *arguments, "--json"))["verdict"][-1]


def test_a_table_over_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--gpu", "h100", "--head-plan", "balanced", "--collectives", "runtime")
    assert "PREDICTED, not measured" in out
    rows = [line.split()[0] for line in out.splitlines() if " balanced " in line and line.strip()[0].isdigit()]
    assert rows == ["1", "2", "3", "4", "6", "8", "12", "16"]


def test_validation(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "--validate", "--json"))
    assert all({"what", "published", "predicted", "error", "source"} <= set(each) for each in found)
    assert "one A100" in said(capsys, "--validate")


def test_a_small_model_wants_one_gpu() -> None:
    config = override(recipe("tiny"), {"build.precision": "bfloat16"})
    machine = GpuMachine(gpu=GPUS["rtx5090"])
    found = [forecast(config, machine, "balanced", world_size=p, executor="tensorrt") for p in (1, 2, 4)]
    assert "Use one GPU a session" in verdict(found)[0]


def test_a_large_model_is_worth_more(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "--recipe", "wan_14b_480p", "--gpu", "a800", "--head-plan", "padded", "--json"))
    assert any("worth it" in sentence for sentence in found["verdict"])
    assert any("real time" in sentence for sentence in found["verdict"])


def calibration(ranks: tuple[int, ...] = (1,), executors: tuple[OpExecutor, ...] = ("onnxruntime",)) -> Calibration:
    costs = {
        "gemm": {"flop": 1e-11, "element": 0.0, "call": 1e-5},
        "attention": {"flop": 1e-11, "score": 1e-9, "call": 0.0},
        "exchange": {"element": 1e-9, "call": 1e-4},
        **{kind: {"element": 1e-10, "call": 0.0} for kind in get_args(PassKind)},
    }
    entries = [
        Entry(executor=executor, ranks=p, threads=1, costs=costs, relative_error=0.05, ceilings={})
        for executor in executors
        for p in ranks
    ]
    return Calibration(machine="a machine", device="cpu", precision="float32", entries=tuple(entries))


def test_a_calibration_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    calibration((1, 2)).write(path)
    assert read_calibration(path) == calibration((1, 2))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0}', '{"version": 2, "entries": [{}]}'])
def test_what_is_no_calibration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="calibrat"):
        read_calibration(path)


def test_a_plan_from_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.json"
    calibration((1, 2)).write(path)
    found = json.loads(
        said(capsys, "--recipe", "bench_cpu", "--calibration", str(path), "--head-plan", "balanced", "--json")
    )
    assert [each["world_size"] for each in found["forecasts"]] == [1, 2]
    with pytest.raises(ConfigError, match="onnxruntime x 1"):
        read_calibration(path).entry("eager", 1)


def test_a_measured_step_by_hand() -> None:
    config = recipe("tiny")
    machine = CalibratedMachine(machine="m", entry=calibration().entries[0])
    found = forecast(config, machine, "balanced", world_size=1, executor="eager")
    parts = found.chunks[0].parts
    s, c, f, layers = 18, 48, 96, 2
    flops = layers * (6 * 2 * s * c * c + 2 * 2 * s * c * f) + 2 * 2 * s * c * 64
    assert parts.gemm_s == pytest.approx(1e-11 * flops + 1e-5 * (8 * layers + 2))
    scores = layers * 3 * s * (s + 8)
    assert parts.attention_s == pytest.approx(1e-9 * scores + 1e-11 * 4 * 16 * scores)
    assert parts.exchange_s == 0
    assert found.chunks[0].step_s.worst == pytest.approx(1.1 * parts.total_s)


def test_a_fit_finds_what_made_the_samples() -> None:
    samples = [
        Sample(kind="gemm", features={"flop": flop, "element": element, "call": 1}, seconds=2e-11 * flop + 3e-5)
        for flop, element in ((1e6, 2e4), (1e8, 3e5), (5e8, 7e6), (9e8, 1e6))
    ]
    costs, error = fit_costs(samples)
    assert costs["gemm"]["flop"] == pytest.approx(2e-11)
    assert costs["gemm"]["call"] == pytest.approx(3e-5)
    assert costs["gemm"]["element"] == pytest.approx(0, abs=1e-13)
    assert error < 1e-6


def test_a_fit_has_no_negative_costs() -> None:
    samples = [
        Sample(kind="copy", features={"element": n, "call": 1}, seconds=1e-9 * n - 2e-7)
        for n in (1000.0, 5000.0, 9000.0)
    ]
    costs, error = fit_costs(samples)
    assert min(costs["copy"].values()) >= 0
    assert error > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to plan for"),
        (("--gpu", "tpu"), "no GPU 'tpu'"),
        (("--gpu", "a800", "--dtype", "fp32"), "--dtype bf16"),
        (("--gpu", "a800", "--set", "nonsense"), "--set wants"),
        (("--gpu", "a800", "--world-size", "0"), "world_size"),
        (("--calibration", "nowhere.json"), "no calibration"),
        (("--gpu", "a800", "--straggler", "-1"), "straggler"),
        (("--calibrate", "nowhere/machine.json"), "writable folder"),
        (("--calibrate", "machine.json", "--world-size", "-1"), "at least 1"),
        (("--calibrate", "machine.json", "--dtype", "fp16"), "add `--dtype"),
    ],
)
def test_refusals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    def measured(*_: object, **__: object) -> Calibration:
        raise AssertionError("something was measured")

    monkeypatch.setattr("causalrt.tools.plan.command.calibrate", measured)
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_tables_of_the_docs_are_what_the_planner_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    assert page.count("<!-- table:") == len(TABLES)
    assert with_tables(page) == page, (
        "run `python benchmarks/plan_tables.py`, and read what the page says about its tables"
    )


def test_a_measurement_does_not_wait_for_the_ranks_of_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_fails.py").write_text(
        "import json, sys, time\n"
        "if json.loads(sys.argv[1])['rank']:\n"
        "    raise MemoryError('too much')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with RankProcesses("one_fails", 2, device="cpu", threads=1, task={}, what="a test") as ranks:
        with pytest.raises(MeasurementError, match=r"a test could not be measured: rank 1 failed: [^$]*too much"):
            ranks.wait_ready()
        assert ranks._processes[0].poll() is None
    assert all(process.poll() is not None for process in ranks._processes)


def test_an_exchange_is_timed_in_the_precision_that_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda *tensors: exchanged.extend(tensors))
    exchange_of(8, 2, 64, torch.bfloat16, torch.device("cpu"))()
    assert [tensor.dtype for tensor in exchanged] == [torch.bfloat16] * 2


@pytest.mark.slow
def test_this_machine_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two executors on one and on two ranks; a time is never asserted."""
    path = tmp_path / "machine.json"
    out = said(capsys, "--recipe", "tiny", "--calibrate", str(path), "--head-plan", "balanced", "--json")
    assert [each["world_size"] for each in json.loads(out)["forecasts"]] == [1, 2]
    found = read_calibration(path)
    assert {(entry.executor, entry.ranks) for entry in found.entries} == {
        (executor, ranks) for executor in ("eager", "onnxruntime") for ranks in (1, 2)
    }
    assert all(cost >= 0 for entry in found.entries for costs in entry.costs.values() for cost in costs.values())
    assert "exchange" in found.entry("eager", 2).costs
