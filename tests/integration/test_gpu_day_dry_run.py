"""`causalrt gpu-day --dry-run` from end to end, as it is started on a machine with a GPU, and the report that it leaves."""

import json
import subprocess
import sys

import pytest
from support.tolerances import RECORDED

from causalrt.measure.gpu_day.parts import PARTS
from causalrt.measure.gpu_day.report import JSON_FILE, TEXT_FILE

BUDGET_S = 3000.0
"""Enough for a machine that does other things meanwhile."""
TABLES = {
    "doctor": {"what this machine can do": "what"},
    "golden": {"largest errors": "variant"},
    "demo": {"videos of the demo model": "largest difference, of 255"},
    "ranks": {"largest errors": "ranks"},
    "kernels": {"qk_norm_rope": "error", "rope_attention": "of fastest SDPA"},
    "steps": {"milliseconds of a chunk step": "predicted ms"},
    "decoder": {"milliseconds of a chunk": "ms"},
    "trace": {"eager: what takes the time": "share"},
    "exchange": {"microseconds of an all-to-all": "predicted us"},
    "engines": {"small engines": "built"},
}
"""By part: its tables, and a column of each."""
FILES = {"demo": ["demo.png"], "kernels": ["kernels.png"], "steps": ["steps.png"], "trace": ["trace-eager.json.gz"]}


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    out = tmp_path_factory.mktemp("day") / "report"
    command = [
        sys.executable,
        "-m",
        "causalrt.cli",
        "gpu-day",
        "--dry-run",
        "--budget",
        str(BUDGET_S),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\n{(out / TEXT_FILE).read_text()}"
    parts = json.loads((out / JSON_FILE).read_text())["parts"]
    return out, {part["name"]: part for part in parts}, (out / TEXT_FILE).read_text()


pytestmark = [pytest.mark.slow, pytest.mark.timeout(BUDGET_S + 60)]


def test_every_part_is_done_or_says_what_is_missing(day):
    _, parts, text = day
    assert list(parts) == [part.name for part in PARTS]
    for name, part in parts.items():
        if part["status"] == "skipped":  # TensorRT may be missing
            assert name == "engines"
            assert "needs the Python module" in part["reason"]
            continue
        assert part["status"] == "done", part
        record = part["record"]
        assert record["wrong"] == []
        for title, column in TABLES[name].items():
            rows = record["tables"][title]
            assert any(row.get(column) is not None for row in rows), (name, title)
            assert f"### {title}" in text
    assert text.startswith("# GPU day, a dry run on a CPU\n")


def test_what_a_cpu_cannot_do_is_said(day):
    _, parts, text = day
    for wanted in ("CUDA graphs cannot be tried on a CPU", "nothing is captured and no waits are counted"):
        assert wanted in text
    assert "Predictions are those for an H200" in " ".join(parts["steps"]["record"]["notes"])


def test_the_recordings_agree_in_every_way(day):
    _, parts, _ = day
    rows = parts["golden"]["record"]["tables"]["largest errors"]
    assert {(row["recording"], row["variant"]) for row in rows} >= {
        (name, variant) for name in "BJR" for variant in ("eager", "eager, fused ops")
    } | {("B", "inductor"), ("B", "inductor, fused ops")}
    ranks = parts["ranks"]["record"]["tables"]["largest errors"]
    assert {(row["ranks"], row["variant"]) for row in ranks} == {
        (size, variant) for size in (2, 3, 8) for variant in ("eager", "fused ops")
    }
    assert all(row["ok"] and row["latents"] <= RECORDED for row in (*rows, *ranks))


def test_pictures_and_trace_lie_beside_the_report(day):
    out, parts, text = day
    for name, files in FILES.items():
        assert set(parts[name]["record"]["files"]) <= set(files)
        for file in parts[name]["record"]["files"]:
            assert (out / file).stat().st_size > 5_000
            assert f"({file})" in text
    assert {path.name for path in out.iterdir()} == {
        JSON_FILE,
        TEXT_FILE,
        *(file for files in FILES.values() for file in files),
    }
