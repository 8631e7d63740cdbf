"""`benchmarks/gpu_kernels.py` as far as no GPU is needed: plan, verdicts, checks, and what it asks of torch.cuda."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_kernels
import pytest
import torch

from causalrt.config import override
from causalrt.measure.kernel_bench import cases, qk_norm_rope, rope_attention
from causalrt.measure.kernel_bench.sections import Bench
from causalrt.measure.kernel_bench.timing import Captured, Facts, Spread, Timer, Work, judge, judge_all, ratio
from causalrt.recipes import recipe

SCRIPT = Path(gpu_kernels.__file__)
TINY = [
    "--device",
    "cpu",
    "--recipe",
    "tiny",
    "--dtype",
    "fp32",
    "--no-compile",
    "--repeats",
    "2",
    "--world-sizes",
    "1",
    "2",
]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", *map(str, arguments)])
    gpu_kernels.main()


# ---- without a GPU


def test_dry_run_names_every_case(monkeypatch, capsys):
    run(monkeypatch, "--dry-run", "--tune", "--kv-splits")
    lines = capsys.readouterr().out.splitlines()
    for ranks, rows in ((1, 4680), (8, 585)):
        assert any(line.startswith(f"qk_norm_rope, P = {ranks}, {rows} rows: ") for line in lines)
        for section in ("rope_attention", "tune", "kv_splits"):
            for keys in range(4680, 32761, 4680):
                assert any(line.startswith(f"{section}, P = {ranks}, {keys} keys: ") for line in lines)
    rows = {"balanced": "1 x 4680 + 1 x 2344", "padded": "2 x 4680", "grouped": "3 x 2344"}
    for plan, of_shares in rows.items():
        assert any(f"P = 8, 32760 keys, {plan}: {of_shares} query rows" in line for line in lines)


def test_dry_run_is_a_command_of_its_own():
    done = subprocess.run([sys.executable, SCRIPT, "--dry-run"], capture_output=True, text=True, check=True, timeout=60)
    assert "of timing on an H200" in done.stdout


def test_no_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run"):
        run(monkeypatch)


def test_lengths_that_no_slots_have_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match=r"4679 is not between a chunk \(4680 rows\) and the slots \(32760\)"):
        run(monkeypatch, "--dry-run", "--kv-rows", 4679)


# ---- on a CPU, where references stand in for kernels


def test_run_writes_a_report_with_a_verdict_for_every_claim(monkeypatch, tmp_path, capsys):
    run(monkeypatch, *TINY, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report.json").read_text())
    claims = [line["claim"] for line in report["claims"]]
    assert len(claims) == 2 * 2 + 2 * 2 + 5
    assert {line["verdict"] for line in report["claims"]} <= {"met", "not met", "none"}
    assert all(claim in capsys.readouterr().out for claim in claims[:1])
    for entry in (*report["qk_norm_rope"], *report["rope_attention"], report["plans"]):
        assert all(
            0 < side["ms"]["p10"] <= side["ms"]["median"] <= side["ms"]["p90"] for side in entry["sides"].values()
        )
    kernels = [
        side for entry in report["rope_attention"] for name, side in entry["sides"].items() if "sdpa" not in name
    ]
    assert len(kernels) == 2 * 2 * 4
    assert all(0 < side["error"] <= 6e-6 for side in kernels)
    with contextlib.suppress(ImportError):
        import matplotlib  # noqa: F401

        assert (tmp_path / "report.png").stat().st_size > 10_000


def test_interpreted_kernels_pass_its_checks(tmp_path):
    sweeps = ["--sections", "qk_norm_rope", "rope_attention", "--forms", "whole-rotated", "--tune", "--kv-splits", "3"]
    command = [sys.executable, SCRIPT, *TINY[:-2], "2", "--kv-rows", "36", *sweeps, "--out", tmp_path / "report"]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True, timeout=300, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["kv_rows"] for entry in report["tune"]] == [36]
    assert report["tune"][0]["best"] in report["tune"][0]["sides"]
    assert report["kv_splits"][0]["sides"]["3"]["error"] <= 6e-6


def spoil(out, arguments):
    out.view(-1)[-1] += 0.01


def leave_out(out, arguments):
    out.view(-1)[-1] = torch.nan


def leave_staging(out, arguments):
    arguments[1][-1][..., 0, :] = torch.nan


def write_history(out, arguments):
    arguments[1][0][..., -1, :] += 1


@pytest.mark.parametrize(
    ("where", "name", "how"),
    [
        (qk_norm_rope, "qk_norm_rope", spoil),
        (qk_norm_rope, "qk_norm_rope", leave_out),
        (rope_attention, "rope_attention_in_place", spoil),
        (rope_attention, "rope_attention_in_place", leave_out),
        (rope_attention, "rope_attention_in_place", leave_staging),
        (rope_attention, "rope_attention_in_place", write_history),
    ],
)
def test_wrong_kernel_ends_the_run_and_leaves_the_report(monkeypatch, tmp_path, where, name, how):
    op, section = getattr(where, name), name.removesuffix("_in_place")

    def wrong(*arguments):
        out = op(*arguments)
        how(out, arguments)
        return out

    monkeypatch.setattr(where, name, wrong)
    lengths = ["--kv-rows", "36"]  # with history
    with pytest.raises(cases.WrongResultError):
        run(monkeypatch, *TINY, *lengths, "--sections", section, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["claims"] == []
    assert "ms" not in json.dumps(report.get(section, []))


def test_wrong_competitor_is_left_out_with_the_reason(monkeypatch, tmp_path):
    sdpa = rope_attention.F.scaled_dot_product_attention
    wrong_one = SimpleNamespace(scaled_dot_product_attention=lambda *parts: 1.1 * sdpa(*parts))
    monkeypatch.setattr(rope_attention, "F", wrong_one)
    run(monkeypatch, *TINY, "--kv-rows", "36", "--sections", "rope_attention", "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["claims"] == []
    for entry in report["rope_attention"]:
        assert entry["best"] is None
        assert "WrongResultError" in entry["sides"]["sdpa flash"]["left out"]


# ---- times


@pytest.mark.parametrize(
    ("spread", "verdict"),
    [
        ((0.9, 0.89, 0.91), "met"),
        ((1.1, 1.09, 1.11), "not met"),
        ((0.99, 0.97, 1.0), "none"),
        ((1.02, 1.0, 1.05), "none"),
        ((20.0, 15.0, 30.0), "not met"),
        ((0.05, 0.04, 0.07), "met"),
    ],
)
def test_a_difference_within_the_spread_is_none(spread, verdict):
    assert judge(Spread(*spread)) == verdict
    median, p10, p90 = spread
    turned = {"met": "not met", "not met": "met", "none": "none"}
    assert judge(Spread(1 / median, 1 / p90, 1 / p10)) == turned[verdict]


def test_a_claim_about_all_is_met_by_each():
    assert judge_all(["met", "met"]) == "met"
    assert judge_all(["met", "none"]) == "none"
    assert judge_all(["none", "not met", "met"]) == "not met"


def test_ratio_is_taken_round_by_round():
    slow, fast = (2.0, 20.0, 4.0), (1.0, 10.0, 2.0)
    assert ratio(slow, fast) == Spread(2.0, 2.0, 2.0)
    assert ratio(slow, fast, 0.25).median == 0.5


@pytest.mark.parametrize("num_bytes", [10**5, 12_500_000, 86_000_000, 260_000_000])
@pytest.mark.parametrize("flops", [0, 10**9, 10**12])
def test_sets_exceed_the_cache_and_take_turns_equally(num_bytes, flops):
    facts, work = Facts(), Work(num_bytes=num_bytes, flops=flops)
    sets, calls = work.num_sets(facts), work.num_calls(facts)
    assert sets * num_bytes >= 2 * facts.l2_bytes
    assert calls % sets == 0
    assert calls >= sets


def test_bytes_and_operations_are_those_of_the_issue():
    config = override(recipe("wan_1_3b_480p"), {"build.world_size": "8", "build.precision": "bfloat16"})
    rows = 3 * 585 * 1536 + 2 * 1536 + 8 * 3218 * 128
    assert qk_norm_rope.QkNormRope(config).work.num_bytes == 2 * rows + 2 * 585 * 64 * 4 + 3 * 585 * 12 * 2 * 4
    attention = rope_attention.RopeAttention(config, 32760)
    assert attention.work.flops == 4 * (4680 + 2344) * 32760 * 128
    assert attention.work.num_bytes == 2 * 128 * (2 * (4680 + 2344) + 2 * 2 * (32760 + 4680))


class RecordedCuda:
    """In the place of torch.cuda: what is asked of it, in order."""

    def __init__(self):
        self.log, self.clock = [], 0.0

    def synchronize(self, device=None):
        self.log.append("wait")

    def Event(self, *, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: None)

        def record():
            event.at = self.clock
            self.log.append("event")

        event.record, event.elapsed_time = record, lambda other: other.at - event.at
        return event

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)

    @contextlib.contextmanager
    def graph(self, graph):
        self.log.append("capture")
        yield
        self.log.append("captured")


@pytest.fixture
def recorded(monkeypatch):
    cuda = RecordedCuda()
    for name in ("synchronize", "Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    timer = Timer(torch.device("cpu"), repeats=4)
    timer.device = torch.device("cuda", 0)
    monkeypatch.setattr(Timer, "_watched_clocks", lambda self: contextlib.nullcontext())
    timer._flush = SimpleNamespace(zero_=lambda: cuda.log.append("flush"))
    return timer, cuda


def test_calls_are_compiled_before_they_are_captured(recorded):
    timer, cuda = recorded

    def call():
        cuda.log.append("call")
        return torch.zeros(3)

    captured = timer.capture([call, call])
    assert cuda.log == ["call"] * 6 + ["wait", "capture", "call", "call", "captured", "wait"]
    assert len(captured.outputs) == 2


def test_sides_take_turns_between_flushes_and_events(recorded):
    timer, cuda = recorded

    def side(name, ms):
        def replay():
            cuda.clock += ms
            cuda.log.append(name)

        return Captured(replay=replay, outputs=[torch.zeros(1)] * 5)

    samples = timer.measure({"one": side("one", 10.0), "two": side("two", 20.0)})
    assert samples == {"one": (2.0,) * 4, "two": (4.0,) * 4}
    around = [["flush", "event", name, "event"] for name in ("two", "one", "one", "two") * 2]
    assert cuda.log == [entry for sample in around for entry in sample]


def test_bench_methods_are_its_sections():
    assert all(callable(getattr(Bench, name)) for name in gpu_kernels.SECTIONS)
