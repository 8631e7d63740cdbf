"""The fused ops in whole rollouts: their references on any number of ranks, their kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import onnx
import pytest
from safetensors import safe_open
from support import GOLDEN, SUPPORT, float64_replay

from causalrt.engines.bundle import open_bundle
from causalrt.errors import ConfigError, ExecutorError, RequestError
from causalrt.export.build import build
from causalrt.proof.compare import EMULATED, compare_emulated, compare_recorded, largest_errors, replay
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.recording import open_recording
from causalrt.runtime.load import load


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        ("B", 8),
        ("R", 2),
        *(pytest.param(*rollout, marks=pytest.mark.slow) for rollout in (("A", 8), ("B", 3), ("C", 8), ("D", 1))),
    ],
)
def test_references_in_eager(case, world_size):
    result = compare_recorded(
        GOLDEN / f"{case}.safetensors", executor="eager", world_size=world_size, plugins=True, num_threads=1
    )
    assert result["passed"], result


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        ("R", 2),
        *(pytest.param(*rollout, marks=pytest.mark.slow) for rollout in (("A", 8), ("B", 8), ("D", 1), ("J", 2))),
    ],
)
def test_functions_in_onnxruntime(case, world_size):
    result = compare_recorded(
        GOLDEN / f"{case}.safetensors", executor="onnxruntime", world_size=world_size, plugins=True, num_threads=1
    )
    assert result["passed"], result


@pytest.mark.parametrize(
    ("case", "world_size", "collectives"),
    [
        ("R", 2, "runtime"),
        pytest.param("B", 8, "engine", marks=pytest.mark.slow),
        pytest.param("C", 8, "engine", marks=pytest.mark.slow),
        pytest.param("J", 2, "engine", marks=pytest.mark.slow),
    ],
)
def test_functions_in_the_graphs_of_engines(case, world_size, collectives):
    path = GOLDEN / f"{case}.safetensors"
    result = compare_emulated(path, executor="tensorrt", world_size=world_size, collectives=collectives, plugins=True)
    assert result["emulated"] == f"{EMULATED}, plugins by their ONNX functions"
    assert result["passed"], result


@pytest.mark.slow
@pytest.mark.parametrize("head_plan", ["padded", "grouped"])
def test_other_head_plans(head_plan):
    result = compare_recorded(
        GOLDEN / "B.safetensors", executor="eager", world_size=8, head_plan=head_plan, plugins=True, num_threads=1
    )
    assert result["passed"], result


@pytest.mark.slow
def test_inside_a_compiled_step(tmp_path):
    recording = open_recording(GOLDEN / "R.safetensors", world_size=2)
    checkpoint = recording.write_checkpoint(tmp_path / "checkpoint.safetensors")
    path = build(recording.config, checkpoint=checkpoint, out=tmp_path / "bundle", executors=["eager"])
    with load(path, executor="inductor", device="cpu", fused_ops=True, timeout_s=300) as engine:
        errors = largest_errors(replay(recording, engine), recording.outputs())
    assert max(error.error for error in errors.values()) <= TOLERANCE


def small_recording(folder):
    """R with one layer of two heads, two steps, and as many chunks as its window takes to roll twice."""
    sizes = {"dim": 32, "num_heads": 2, "num_layers": 1, "num_chunks": 5, "denoising_step_list": [1000, 500]}
    with safe_open(GOLDEN / "R.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    path = folder / "small.safetensors"
    float64_replay.record(config | sizes, path)
    return path


@pytest.mark.parametrize(
    ("case", "time_index"),
    [
        ("small", "global"),
        pytest.param("small", "relative", marks=pytest.mark.slow),
        pytest.param("R", "global", marks=pytest.mark.slow),
    ],
)
def test_kernels_interpreted(case, time_index, tmp_path):
    """Golden R has a window that rolls; A to D take up to a minute each, and pass too."""
    script = SUPPORT / "interpreted_rollouts.py"
    recording = small_recording(tmp_path) if case == "small" else GOLDEN / f"{case}.safetensors"
    done = subprocess.run(
        [sys.executable, str(script), str(recording), str(tmp_path), time_index],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1]).values()) <= TOLERANCE


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A bundle for onnxruntime without fused ops, and one with them."""
    recording = open_recording(GOLDEN / "N1.safetensors", world_size=1)
    folder = tmp_path_factory.mktemp("plugins")
    checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
    return {
        mode: build(recording.config, checkpoint=checkpoint, out=folder / mode, fused_ops=mode)
        for mode in ("auto", "on")
    }


def test_the_manifest_says_what_was_built(bundles):
    assert not open_bundle(bundles["auto"]).fused_ops
    assert open_bundle(bundles["on"]).fused_ops
    for mode, functions in (("auto", 0), ("on", 2)):
        assert len(onnx.load(bundles[mode] / "step-000.onnx", load_external_data=False).functions) == functions


def test_an_executor_runs_what_was_built(bundles):
    with pytest.raises(ExecutorError, match="fused ops off; build it with `--fused-ops on`"):
        load(bundles["auto"], fused_ops=True)
    with pytest.raises(ExecutorError, match="fused ops on; build it with `--fused-ops off`"):
        load(bundles["on"], fused_ops=False)


def test_relative_time_is_not_run_without_fused_ops(tmp_path):
    recording = open_recording(GOLDEN / "N1.safetensors", world_size=1)
    config = replace(recording.config, video=replace(recording.config.video, time_index="relative"))
    checkpoint = recording.write_checkpoint(tmp_path / "checkpoint.safetensors")
    path = build(config, checkpoint=checkpoint, out=tmp_path / "bundle", executors=["eager"])
    assert open_bundle(path).fused_ops
    with pytest.raises(ExecutorError, match="load it with fused_ops=True"):
        load(path, fused_ops=False)


def test_plugins_are_asked_for_by_yes_and_no(bundles):
    with pytest.raises(RequestError, match=r"True, False, or None .* got 'off'"):
        load(bundles["on"], executor="eager", fused_ops="off")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "tensorrt_rtx", "plugins": True}, "tensorrt_rtx has no plugins"),
        ({"executor": "tensorrt", "plugins": True, "time_index": "relative"}, "no TensorRT plugin rotates"),
    ],
)
def test_nothing_is_vouched_for_that_cannot_be_built(options, message):
    with pytest.raises(ConfigError, match=message):
        compare_emulated(GOLDEN / "N1.safetensors", world_size=1, collectives="engine", **options)


@pytest.mark.parametrize("asked", [None, True, False])
def test_eager_runs_either_and_by_default_what_was_built(bundles, asked, monkeypatch):
    loaded = []
    monkeypatch.setattr("causalrt.runtime.load.start_engine", lambda bundle, options: loaded.append(options.fused_ops))
    for path in bundles.values():
        load(path, executor="eager", device="cpu", fused_ops=asked)
    assert loaded == ([False, True] if asked is None else [asked, asked])


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"fused_ops": "maybe"}, {}, "fused_ops must be on, off, auto, got 'maybe'"),
        ({"fused_ops": "off"}, {"time_index": "relative"}, "what the fused ops do"),
        ({"executors": ["tensorrt_rtx"], "targets": ["sm80"], "fused_ops": "on"}, {}, "tensorrt_rtx has no plugins"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, changes, message):
    config = open_recording(GOLDEN / "N1.safetensors", world_size=1).config
    config = replace(
        config,
        video=replace(config.video, **changes),
        build=replace(config.build, precision="bfloat16"),
    )
    with pytest.raises(ConfigError, match=message):
        build(config, checkpoint=tmp_path / "none", out=tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())
