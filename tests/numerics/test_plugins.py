"""The fused ops in whole rollouts: their references on any number of ranks, their kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from causalrt.engines.bundle import open_bundle
from causalrt.errors import ExecutorError
from causalrt.export.build import build
from causalrt.runtime.engine import load
from causalrt.tools.compare import TOLERANCE, compare_recorded, largest_errors
from causalrt.tools.recording import open_recording
from causalrt.tools.replay import recorded_outputs, replay

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        *(("B", ranks) for ranks in (1, 2, 3, 8)),
        ("R", 8),
        *(pytest.param(case, 8, marks=pytest.mark.slow) for case in "ACD"),
    ],
)
def test_references_in_eager(case, world_size):
    result = compare_recorded(
        GOLDEN / f"{case}.safetensors", executor="eager", world_size=world_size, plugins=True, num_threads=1
    )
    assert result["passed"], result


@pytest.mark.slow
@pytest.mark.parametrize("head_plan", ["pad", "mesh"])
def test_other_head_plans(head_plan):
    result = compare_recorded(
        GOLDEN / "B.safetensors", executor="eager", world_size=8, head_plan=head_plan, plugins=True, num_threads=1
    )
    assert result["passed"], result


def test_inside_a_compiled_step(tmp_path):
    recording = open_recording(GOLDEN / "R.safetensors", world_size=2)
    checkpoint = recording.write_checkpoint(tmp_path / "checkpoint.safetensors")
    path = build(recording.config, checkpoint=checkpoint, out=tmp_path / "bundle", executors=["eager"])
    with load(path, executor="inductor", device="cpu", plugins=True, timeout_s=300) as engine:
        errors = largest_errors(replay(recording, engine), recorded_outputs(recording))
    assert max(error.largest for error in errors.values()) <= TOLERANCE


@pytest.mark.parametrize("case", ["R"])
def test_kernels_interpreted(case, tmp_path):
    """Golden R (a window that rolls); A to D take up to a minute each, and pass too."""
    script = Path(__file__).with_name("interpreted_rollouts.py")
    done = subprocess.run(
        [sys.executable, str(script), str(GOLDEN / f"{case}.safetensors"), str(tmp_path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1]).values()) <= TOLERANCE


def test_an_executor_that_runs_what_was_built_takes_none(tmp_path):
    recording = open_recording(GOLDEN / "N1.safetensors", world_size=1)
    checkpoint = recording.write_checkpoint(tmp_path / "checkpoint.safetensors")
    path = build(recording.config, checkpoint=checkpoint, out=tmp_path / "bundle")
    assert open_bundle(path).executors[-1] == "onnxruntime"
    with pytest.raises(ExecutorError, match="plugins are for eager and inductor"):
        load(path, plugins=True)
