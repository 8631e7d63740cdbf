"""The graphs that TensorRT parses, run by ONNX Runtime with all ranks in this process, against the recordings.

In float32 for the structure of the graphs (passes, exchanges, KV slots, cuts), in bfloat16 and float16 for what rounding
costs: every value is rounded as a strongly typed engine rounds it.
"""

import json
import math
from dataclasses import replace

import pytest
from safetensors import safe_open
from support import GOLDEN, float64_replay

from causalrt.cli import main
from causalrt.proof.compare import EMULATED, compare_emulated, replay_here, rms_errors
from causalrt.proof.differences import EAGER_RATIO, TOLERANCE
from causalrt.proof.emulate import write_graphs
from causalrt.proof.recording import open_recording
from causalrt.proof.replica import eager_replica, emulated_replica

# `tests/integration/test_tensorrt_executor.py` replays B, D and R on more ranks, through the same graphs.
ENGINE = [
    ("C", 8, "engine"),
    ("J", 8, "engine"),
    ("R", 8, "engine"),
    *(pytest.param(case, 8, "engine", marks=pytest.mark.slow) for case in ("A", "B", "D", "J2")),
    *(pytest.param(*rollout, "engine", marks=pytest.mark.slow) for rollout in (("A", 1), ("B", 2), ("R", 3))),
]
RUNTIME = [
    ("J2", 2, "runtime"),
    *(pytest.param(*rollout, "runtime", marks=pytest.mark.slow) for rollout in (("B", 8), ("R", 1), ("R", 2))),
]


@pytest.mark.parametrize(("case", "world_size", "collectives"), ENGINE + RUNTIME)
def test_the_graph_is_the_recorded_rollout(case, world_size, collectives):
    path = GOLDEN / f"{case}.safetensors"
    result = compare_emulated(path, executor="tensorrt_rtx", world_size=world_size, collectives=collectives)
    assert result["max_abs_error"].keys() == {"flow", "x0", "latents"}
    assert max(result["max_abs_error"].values()) <= TOLERANCE, result
    assert result["passed"]


@pytest.fixture(scope="module")
def float64_recording(tmp_path_factory):
    """Case R's sizes on 3 ranks, 8 chunks of which 5 roll the window, recorded in float64."""
    with safe_open(GOLDEN / "R.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    path = tmp_path_factory.mktemp("float64") / "recording.safetensors"
    float64_replay.record(config | {"num_chunks": 8, "text_rows": 9}, path)
    return open_recording(path, world_size=3)


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_the_graph_is_as_close_to_float64_as_eager(float64_recording, tmp_path, precision):
    # Both sides round the same weights and nearly the same values: here eager's errors are 0.8% of a flow in bfloat16, a
    # tenth of that in float16, and the graph's are 0.95 to 1.05 of eager's. Independent errors of one size e are
    # sqrt(2) e apart; what both share (the weights) brings them closer.
    recording = float64_recording
    config = replace(recording.config, build=replace(recording.config.build, precision=precision))
    checkpoint = recording.write_checkpoint(tmp_path / "checkpoint.safetensors")
    graphs = write_graphs(config, checkpoint=checkpoint, folder=tmp_path, collectives="engine")
    expected = recording.outputs()
    ours = replay_here(recording, emulated_replica("emulated", graphs))
    theirs = replay_here(recording, eager_replica(config, checkpoint=checkpoint, folder=tmp_path / "eager"))
    error, eager_error, apart = rms_errors(ours, expected), rms_errors(theirs, expected), rms_errors(ours, theirs)
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[precision]
    for kind in error:
        assert unit < eager_error[kind] < 5 * unit, eager_error
        assert error[kind] <= EAGER_RATIO * eager_error[kind], (error, eager_error)
        assert apart[kind] <= math.sqrt(2) * eager_error[kind], (apart, eager_error)


def test_the_command_says_what_it_runs(capsys):
    flags = [
        "--recorded",
        str(GOLDEN / "N1.safetensors"),
        "--executor",
        "tensorrt_rtx",
        "--world-size",
        "2",
        "--emulate",
    ]
    assert main(["compare", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{EMULATED}; engine collectives, float32"
    assert lines[-1] == "passed: tensorrt_rtx, 2 rank(s), tolerance 5e-05"
    assert main(["compare", *flags, "--dtype", "bf16", "--collectives", "runtime", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["precision"], result["collectives"], result["emulated"]) == ("bfloat16", "runtime", EMULATED)
    assert "tolerance" not in result
    assert 1e-3 < result["rms_error"]["flow"] <= EAGER_RATIO * result["eager_rms_error"]["flow"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--executor", "onnxruntime", "--emulate"], "--emulate is for --executor tensorrt_rtx or tensorrt"),
        (["--executor", "tensorrt_rtx", "--dtype", "bf16"], "are for --emulate"),
        (["--collectives", "runtime"], "are for --emulate"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, flags, message):
    assert main(["compare", "--recorded", str(GOLDEN / "N1.safetensors"), *flags]) == 2
    assert message in capsys.readouterr().err
