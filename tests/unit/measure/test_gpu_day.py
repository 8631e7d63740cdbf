"""`causalrt gpu-day` without its parts: time limits, kills, budgets, interrupts, and what the report then says."""

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from support import GOLDEN

from causalrt import cli
from causalrt.measure.bench.machine import describe_machine
from causalrt.measure.gpu_day import command, runner
from causalrt.measure.gpu_day.command import run_day
from causalrt.measure.gpu_day.parts import PARTS, Part, golden, ranks
from causalrt.measure.gpu_day.predictions import Planner, columns
from causalrt.measure.gpu_day.recorder import Recorder, Settings, SkippedError
from causalrt.measure.gpu_day.report import Report, as_markdown, markdown_table
from causalrt.measure.gpu_day.runner import Outcome
from causalrt.proof.ranks import ThreadCollectives
from causalrt.tools.plan.hardware import GPUS, known_gpu

FAKES = {
    "hanging": """
        import subprocess, sys, time
        def run(recorder):
            recorder.row("results", side="first", ms=2.0)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            recorder.fact("child", child.pid)
            print("about to hang", flush=True)
            time.sleep(600)
    """,
    "killed": """
        import os, signal
        def run(recorder):
            recorder.row("results", side="before", ms=3.0)
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "raising": """
        def run(recorder):
            recorder.row("results", side="before", ms=3.0)
            raise ValueError("no such thing")
    """,
    "wrong": """
        def run(recorder):
            recorder.headline("topic", "All is well.")
            with recorder.attempt("the first"):
                raise ValueError("off by one")
            recorder.row("results", side="after", ms=4.0)
    """,
    "skipping": """
        from causalrt.measure.gpu_day.recorder import SkippedError
        def run(recorder):
            raise SkippedError("there is one GPU")
    """,
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """`fakes(name, ...)`: parts of these names, which a child process can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, source in FAKES.items():
        (folder / f"gpu_day_{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(folder))

    def part(name, *, limit_s=60.0, least_s=1.0):
        return Part(name=name, module=f"gpu_day_{name}", summary=f"{name}?", limit_s=limit_s, least_s=least_s)

    return part


def run(parts, out, *, budget_s=300.0):
    out.mkdir(exist_ok=True)
    said = []
    report = run_day(parts, out=out, golden=out, budget_s=budget_s, dry_run=True, version="0", on_stage=said.append)
    found = json.loads((out / "gpu.json").read_text())
    assert [part["status"] for part in found["parts"]] == [outcome.status for outcome in report.outcomes]
    return report, {part["name"]: part for part in found["parts"]}, (out / "gpu.md").read_text()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    while not condition():
        time.sleep(0.05)


def test_a_crash_an_error_and_a_wrong_result_are_recorded_and_the_day_goes_on(fakes, tmp_path):
    names = ("killed", "raising", "wrong", "skipping")
    report, parts, text = run([fakes(name) for name in names], tmp_path / "out")
    assert report.failed
    assert [parts[name]["status"] for name in names] == ["failed", "failed", "failed", "skipped"]
    assert "SIGKILL" in parts["killed"]["reason"]
    assert "last words" in parts["killed"]["log_tail"]
    assert parts["killed"]["record"]["tables"]["results"] == [{"side": "before", "ms": 3.0}]
    assert parts["raising"]["reason"] == "ValueError: no such thing"
    assert "Traceback" in parts["raising"]["log_tail"]
    assert parts["wrong"]["record"]["wrong"] == ["the first: ValueError: off by one"]
    assert parts["wrong"]["record"]["tables"]["results"] == [{"side": "after", "ms": 4.0}]
    assert parts["skipping"]["reason"] == "there is one GPU"
    for wanted in ("All is well.", "## killed: failed", "- **wrong**: the first: ValueError", "| after | 4 |"):
        assert wanted in text


class Clock:
    """In the place of the module `time`: it can be put forward."""

    ahead_s = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self):
        return time.monotonic() + self.ahead_s


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_had(fakes, tmp_path, monkeypatch):
    clock, outcome = Clock(), Outcome(name="hanging", summary="")
    monkeypatch.setattr(runner, "time", clock)

    def once_it_hangs_its_time_is_over():
        if outcome.record.get("facts"):
            clock.ahead_s = 1000.0

    settings = Settings(out=tmp_path, work=tmp_path, golden=tmp_path, dry_run=True)
    changed = once_it_hangs_its_time_is_over
    runner.run_part(fakes("hanging"), outcome, settings, limit_s=900.0, on_change=changed)
    assert outcome.status == "timed out"
    assert outcome.record["tables"]["results"] == [{"side": "first", "ms": 2.0}]
    assert "about to hang" in outcome.log_tail
    wait_until(lambda: not is_running(outcome.record["facts"]["child"]))
    assert Report(tmp_path, [outcome], asked={}, machine=describe_machine("cpu")).failed


def test_parts_that_no_longer_fit_are_skipped_and_say_so(fakes, tmp_path, monkeypatch):
    limits = []

    def run_part(part, outcome, settings, *, limit_s, on_change):
        limits.append(limit_s)
        outcome.status = "done"

    monkeypatch.setattr(command, "run_part", run_part)
    monkeypatch.setattr(command, "DRY_RUN_PATIENCE", 1.0)
    parts = [fakes("one", least_s=1000.0), fakes("two", limit_s=60.0), fakes("three", limit_s=5000.0)]
    report, _, text = run(parts, tmp_path / "out", budget_s=300.0)
    assert [outcome.status for outcome in report.outcomes] == ["skipped", "done", "done"]
    assert not report.failed
    assert report.outcomes[0].reason.startswith("it needs at least 1000 s, and ")
    assert report.outcomes[0].reason in text
    assert limits[0] == 60.0
    assert 60.0 < limits[1] < 300.0


DAY = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from causalrt.measure.gpu_day.command import run_day
    from causalrt.measure.gpu_day.parts import Part
    parts = [
        Part(name=name, module="gpu_day_hanging", summary=name, limit_s=500.0, least_s=least_s)
        for name, least_s in (("long", 1e6), ("hanging", 1.0), ("last", 1.0))
    ]
    out = Path(sys.argv[2])
    run_day(parts, out=out, golden=out, budget_s=1000.0, dry_run=True, version="0", on_stage=print)
"""


@pytest.fixture
def day(fakes, tmp_path):
    """A day in a process of its own, whose second part hangs; (process, folder of the report, process of the part's child)."""
    out = tmp_path / "out"
    out.mkdir()
    code = textwrap.dedent(DAY)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "modules"), str(out)])

    def child():
        with contextlib.suppress(OSError, IndexError, KeyError):
            return json.loads((out / "gpu.json").read_text())["parts"][1]["record"]["facts"]["child"]
        return None

    try:
        wait_until(child)  # what a running part has written is in the report already
        yield process, out, child()
    finally:
        process.kill()
        process.wait()


def test_a_killed_day_leaves_a_readable_report_and_no_process(day):
    process, out, child = day
    process.kill()
    process.wait()
    long, hanging, last = json.loads((out / "gpu.json").read_text())["parts"]
    assert (long["status"], hanging["status"], last["status"]) == ("skipped", "running", "waiting")
    assert hanging["record"]["tables"]["results"] == [{"side": "first", "ms": 2.0}]
    assert "| first | 2 |" in (out / "gpu.md").read_text()
    wait_until(lambda: not is_running(child))


def test_an_interrupt_leaves_the_report_and_no_process(day):
    process, out, child = day
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    found = json.loads((out / "gpu.json").read_text())
    assert found["state"] == "interrupted"
    assert [part["status"] for part in found["parts"]] == ["skipped", "interrupted", "waiting"]
    assert found["parts"][1]["record"]["tables"]["results"] == [{"side": "first", "ms": 2.0}]
    wait_until(lambda: not is_running(child))


# ---- the command line


def test_the_list_names_every_part(capsys):
    assert cli.main(["gpu-day", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [part.name for part in PARTS]
    assert cli.main(["gpu-day", "--list", "--json", "--parts", "steps", "doctor"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["doctor", "steps"]


def test_every_part_has_a_module_with_run():
    import importlib

    for part in PARTS:
        assert callable(importlib.import_module(part.module).run), part.name
        assert 0 < part.least_s < part.limit_s


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("mine")
    assert cli.main(["gpu-day", "--dry-run", "--out", str(taken / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write to {taken / 'out'}")
    assert len(said.splitlines()) == 1
    assert taken.read_text() == "mine"


def test_everything_that_is_wrong_with_the_arguments_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--budget", "-1", "--golden", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert cli.main(["gpu-day", *arguments]) == 2
    said = capsys.readouterr().err
    for wanted in ("--budget must be a positive number", "--dry-run", "is no folder"):
        assert wanted in said
    assert not (tmp_path / "out").exists()


def test_files_of_an_earlier_report_go_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(
        command, "run_day", lambda parts, **_: Report(tmp_path, [], asked={}, machine=describe_machine("cpu"))
    )
    outside = tmp_path.parent / "outside.png"
    for path in (tmp_path / "steps.png", tmp_path / "mine.png", outside):
        path.write_text("picture")
    earlier = {"parts": [{"record": {"files": ["steps.png", "../outside.png", "gone.png"]}}, {"record": {}}]}
    (tmp_path / "gpu.json").write_text(json.dumps(earlier))
    cli.main(["gpu-day", "--dry-run", "--out", str(tmp_path)])
    assert not (tmp_path / "steps.png").exists()
    assert (tmp_path / "mine.png").exists()
    assert outside.exists()


# ---- parts whose results would be wrong


def recorder_at(tmp_path, golden=GOLDEN):
    return Recorder(Settings(out=tmp_path, work=tmp_path, golden=golden, dry_run=True), tmp_path / "record.json")


def test_rank_threads_replay_a_recording_and_a_wrong_exchange_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "WORLD_SIZES", (2,))
    recorder = recorder_at(tmp_path)
    ranks.run(recorder)
    assert [(row["variant"], row["exchange"], row["ok"]) for row in recorder.record.tables[ranks.TABLE]] == [
        ("eager", "ok", True),
        ("fused ops", "ok", True),
    ]
    assert recorder.record.wrong == []

    def own_block_only(self, received, sent):
        received.copy_(sent)

    monkeypatch.setattr(ThreadCollectives, "all_to_all", own_block_only)
    recorder = recorder_at(tmp_path)
    ranks.run(recorder)
    assert not any(row["ok"] for row in recorder.record.tables[ranks.TABLE])
    assert any("rank 0 expected row 0" in text for text in recorder.record.wrong)
    assert any("allowed 5e-05" in text for text in recorder.record.wrong)


def test_a_replay_that_is_off_is_wrong(tmp_path, monkeypatch):
    exact = golden.replay_here
    monkeypatch.setattr(golden, "VARIANTS", golden.VARIANTS[:1])
    monkeypatch.setattr(golden, "RECORDINGS", ("J",))
    monkeypatch.setattr(golden, "replay_here", lambda *given: {k: v + 1e-3 for k, v in exact(*given).items()})
    recorder = recorder_at(tmp_path)
    golden.run(recorder)
    assert len(recorder.record.wrong) == 1
    assert "J, eager: 1.0" in recorder.record.wrong[0]
    assert not recorder.record.tables[golden.TABLE][0]["ok"]


@pytest.mark.parametrize("part", [golden, ranks])
def test_without_recordings_a_part_is_skipped_and_says_where_they_are(tmp_path, part):
    with pytest.raises(SkippedError, match=r"there is no .*[BR]\.safetensors; .* name it with --golden"):
        part.run(recorder_at(tmp_path, golden=tmp_path))


# ---- the report and its predictions


def test_a_table_has_a_column_for_every_key():
    lines = markdown_table([{"a": 1.23456, "b": "x|y"}, {"a": 12345.6, "c": True, "b": None}])
    assert lines == ["| a | b | c |", "| ---: | --- | --- |", "| 1.235 | x\\|y |  |", "| 12,346 |  | yes |"]


def test_a_picture_that_cannot_be_drawn_is_noted(tmp_path):
    outcome = Outcome(name="steps", summary="", record={"data": {"sides": {"eager": [{}]}}, "notes": [], "files": []})
    Report(tmp_path, [outcome], asked={}, machine=describe_machine("cpu")).draw(outcome)
    assert outcome.record["notes"] == ["no picture: KeyError: 'KV rows'"] or "no picture: Module" in str(outcome)
    assert outcome.record["files"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA L40S", None),
    ],
)
def test_the_planner_knows_gpus_by_torchs_names(name, key):
    assert known_gpu(name) is (GPUS[key] if key else None)


def test_predictions_are_ordered_and_missing_where_the_gpu_is_unknown():
    from causalrt.config import override
    from causalrt.recipes import recipe

    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})
    planner = Planner(known_gpu("NVIDIA H200"))
    spans = [planner.step(config, kv_rows=rows, lowering="eager", fused_ops=False) for rows in (4680, 32760)]
    assert spans[0].nominal < spans[1].nominal
    for span in (*spans, planner.attention(config, kv_rows=4680), planner.decode(config, first_chunk=True)):
        found = columns(span)
        low, high = map(float, found["range"].split(" to "))
        assert 0 < low <= found["predicted ms"] <= high
    copies = planner.copy_gb_s()
    assert 0 < copies.nominal < 4800
    nobody = Planner(None)
    assert nobody.copy_gb_s() is nobody.step(config, kv_rows=4680, lowering="eager", fused_ops=False) is None
    assert columns(None) == {"predicted ms": None, "range": None}


def test_the_report_of_a_gpu_and_of_a_dry_run_have_other_titles():
    found = {"version": "0", "began": "now", "seconds": 1.0, "budget_s": 570.0, "state": "finished", "parts": []}
    assert as_markdown({**found, "dry_run": True}).startswith("# GPU day, a dry run on a CPU\n")
    assert as_markdown({**found, "dry_run": False}).startswith("# GPU day\n")
