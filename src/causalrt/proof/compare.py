"""Replay a recorded rollout, free-running, and compare every forward with the recording.

Either through a bundle and its rank processes, or, emulated, through the graphs that TensorRT parses.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from causalrt.config import HeadPlanName, Precision, TimeIndex
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import ConfigError
from causalrt.export.build import build, fused_ops_wanted
from causalrt.export.options import CollectivesMode, FusedOpsMode
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.proof.recording import open_recording
from causalrt.proof.replay import Outputs, eager_player, emulated_player, recorded_outputs, replay, replay_here
from causalrt.runtime.load import load

TOLERANCE = 5e-5
"""Largest difference from a float32 recording: golden data agree with a float64 replay within 5e-6, and the smallest
mistake worth the name (exact GELU for tanh) moves the latents by 3e-4."""
EAGER_RATIO = 1.25
"""How much further from a recording than eager, both in a lower precision, emulated graphs may be, by root mean square over a
rollout: over the recorded cases A to D, L, N1, N2 and R, bfloat16 and float16, the ratio lies between 0.89 and 1.08."""
EMULATED = "emulated: the graph that TensorRT parses, run by ONNX Runtime"


@dataclass(kw_only=True, slots=True)
class Errors:
    """Largest absolute difference, and where it is."""

    largest: float = 0.0
    at: str = ""

    def add(self, got: torch.Tensor, expected: torch.Tensor, at: str) -> None:
        """Take in one comparison; NaN counts as infinitely wrong."""
        error = float((got.double() - expected.double()).abs().nan_to_num(nan=torch.inf).max())
        if error > self.largest or not self.at:
            self.largest, self.at = error, at


def compare_recorded(
    path: Path,
    *,
    executor: str,
    world_size: int,
    head_plan: HeadPlanName = "balanced",
    plugins: bool = False,
    time_index: TimeIndex = "global",
    cuda_graphs: bool = True,
    num_threads: int | None = None,
    tolerance: float = TOLERANCE,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Build a bundle from a recording, replay it on `world_size` ranks, and report the largest errors.

    Attention sees differences of time alone, so a recording, which ends with its horizon, is the same by either `time_index`.

    Returns:
        `{"executor", "world_size", "time_index", "max_abs_error": {"flow", "x0", "latents"}, "worst", "tolerance", "passed"}`.

    Raises:
        RecordingError: the recording cannot be replayed.
        CausalRTError: whatever `build` and `load` raise.
    """
    if executor in FLAVOURS:
        raise ConfigError(
            f"recordings are float32, and {executor} has fused attention kernels in bfloat16 and float16 only; add --emulate "
            "to replay the graphs that it is built from"
        )
    recording = open_recording(path, world_size=world_size, head_plan=head_plan)
    config = replace(recording.config, video=replace(recording.config.video, time_index=time_index))
    with TemporaryFolder("compare") as folder:
        checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
        mode: FusedOpsMode = "on" if plugins else "auto"
        bundle = build(
            config,
            checkpoint=checkpoint,
            out=folder / "bundle",
            executors=[executor],
            fused_ops=mode,
            on_progress=on_progress,
        )
        on_progress("replay", 0, 1)
        with load(bundle, executor=executor, cuda_graphs=cuda_graphs, num_threads=num_threads) as engine:
            errors = largest_errors(replay(recording, engine), recorded_outputs(recording))
        on_progress("replay", 1, 1)
    return {
        "executor": executor,
        "world_size": world_size,
        "time_index": time_index,
        "max_abs_error": {name: error.largest for name, error in errors.items()},
        "worst": {name: error.at for name, error in errors.items()},
        "tolerance": tolerance,
        "passed": all(error.largest <= tolerance for error in errors.values()),
    }


def compare_emulated(
    path: Path,
    *,
    executor: str,
    world_size: int,
    collectives: CollectivesMode,
    precision: Precision = "float32",
    head_plan: HeadPlanName = "balanced",
    plugins: bool = False,
    time_index: TimeIndex = "global",
    tolerance: float = TOLERANCE,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Replay a recording through the graphs that TensorRT parses, run by ONNX Runtime with all ranks in this process.

    In float32 the errors are held against `tolerance`. In a lower precision the recording is further away than any tolerance
    worth the name; then eager is replayed in that precision too, and the graphs pass if their error is no more than
    `EAGER_RATIO` of eager's own. With `plugins`, what TensorRT takes for a plugin is run by its ONNX function.

    Returns:
        What `compare_recorded` returns, and `"emulated"` (what was run, in words), `"collectives"`, `"precision"`; in a lower
        precision `"rms_error"` and `"eager_rms_error"` too, and no tolerance.

    Raises:
        RecordingError: the recording cannot be replayed.
        ConfigError: no build for `executor` has such plugins.
    """
    from causalrt.proof.emulate import write_graphs  # needs ONNX Runtime, which may be missing

    recording = open_recording(path, world_size=world_size, head_plan=head_plan)
    config = replace(
        recording.config,
        video=replace(recording.config.video, time_index=time_index),
        build=replace(recording.config.build, precision=precision),
    )
    fused = fused_ops_wanted("on" if plugins else "auto", config, (executor,), "onnx")
    expected = recorded_outputs(recording)
    result: dict[str, Any] = {
        "executor": executor,
        "emulated": EMULATED + (", plugins by their ONNX functions" if plugins else ""),
        "world_size": world_size,
        "time_index": time_index,
        "collectives": collectives,
        "precision": precision,
    }
    with TemporaryFolder("emulate") as folder:
        checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
        on_progress("graphs", 0, 1)
        graphs = write_graphs(config, checkpoint=checkpoint, folder=folder, collectives=collectives, fused=fused)
        on_progress("graphs", 1, 1)
        on_progress("replay", 0, 1)
        outputs = replay_here(recording, emulated_player(graphs))
        on_progress("replay", 1, 1)
        errors = largest_errors(outputs, expected)
        result["max_abs_error"] = {kind: error.largest for kind, error in errors.items()}
        result["worst"] = {kind: error.at for kind, error in errors.items()}
        if precision == "float32":
            passed = all(error.largest <= tolerance for error in errors.values())
            return result | {"tolerance": tolerance, "passed": passed}
        on_progress("replay in eager", 0, 1)
        eager = replay_here(recording, eager_player(config, checkpoint=checkpoint, folder=folder / "eager"))
        on_progress("replay in eager", 1, 1)
    ours, theirs = rms_errors(outputs, expected), rms_errors(eager, expected)
    passed = all(ours[kind] <= EAGER_RATIO * theirs[kind] for kind in ours)
    return result | {"rms_error": ours, "eager_rms_error": theirs, "eager_ratio": EAGER_RATIO, "passed": passed}


def largest_errors(got: Outputs, expected: Outputs) -> dict[str, Errors]:
    """Largest difference of flow, x0 and latents; both sides must hold the same outputs."""
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    errors = {"flow": Errors(), "x0": Errors(), "latents": Errors()}
    for (element, name), tensor in got.items():
        errors[_kind(name)].add(tensor, expected[element, name], f"element {element} {name}")
    return errors


def rms_errors(got: Outputs, expected: Outputs) -> dict[str, float]:
    """Root mean square of the difference over that of the expected values, of flow, x0 and latents; NaN stays NaN."""
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    errors = {}
    for kind in ("flow", "x0", "latents"):
        keys = [key for key in got if _kind(key[1]) == kind]
        difference = torch.stack([(got[key].double() - expected[key].double()).square().sum() for key in keys]).sum()
        size = torch.stack([expected[key].double().square().sum() for key in keys]).sum()
        errors[kind] = float((difference / size).sqrt())
    return errors


def _kind(name: str) -> str:
    """`flow`, `x0` or, for a name that ends with the chunk, `latents`."""
    last = name.rpartition(".")[2]
    return last if last in ("flow", "x0") else "latents"
