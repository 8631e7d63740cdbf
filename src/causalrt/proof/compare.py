"""Replay a recorded rollout, free-running, and compare every forward with the recording.

The replay runs either in the rank processes of a bundle, or in this process on a replica, such as the emulated graphs that
TensorRT parses. Its outputs have the recording's own names.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from causalrt.config import Config, HeadPlanName, Precision, TimeIndex
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import ConfigError
from causalrt.export.build import build, fused_ops_wanted
from causalrt.export.options import CollectivesMode, FusedOpsMode
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.proof.differences import (
    EAGER_RATIO,
    RECORDED,
    TensorError,
    differences,
    largest_by_kind,
    rms_by_kind,
)
from causalrt.proof.recording import Recording, open_recording
from causalrt.proof.replica import Replica, eager_replica, emulated_replica
from causalrt.proof.rollouts import Outputs, play, play_session
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.runtime.rollout import SwitchPolicy

EMULATED = "emulated: the graph that TensorRT parses, run by ONNX Runtime"
KINDS = ("flow", "x0", "latents")


def replay(recording: Recording, engine: Engine) -> Outputs:
    """Replay every batch element in a session of its own of an engine."""
    outputs: Outputs = {}
    for element in range(recording.batch_size):
        outputs |= play_session(engine, recording.rollout(element))
    return outputs


def replay_here(recording: Recording, replica: Replica, *, policy: SwitchPolicy = "keep") -> Outputs:
    """Replay every batch element in this process; `policy` is what becomes of the history when the prompt changes."""
    outputs: Outputs = {}
    for element in range(recording.batch_size):
        outputs |= play(replica, recording.rollout(element), policy=policy)
    return outputs


def largest_errors(got: Outputs, expected: Outputs) -> dict[str, TensorError]:
    """The largest absolute difference of a flow, of an x0 and of latents; infinite if one side lacks an output."""
    in_order = {name: expected[name] for name in got if name in expected} | expected
    largest = largest_by_kind(differences(in_order, got, RECORDED))
    return {kind: largest[kind] for kind in KINDS}


def rms_errors(got: Outputs, expected: Outputs) -> dict[str, float]:
    """The relative root mean square error of flows, of x0 and of latents."""
    errors = rms_by_kind({name: expected[name] for name in got if name in expected} | expected, got)
    return {kind: errors[kind] for kind in KINDS}


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
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Build a bundle from a recording, replay it on `world_size` ranks, and report the largest errors.

    Attention depends on differences of time only, so a recording, which ends within the horizon, gives the same outputs with
    either `time_index`.

    Returns:
        `{"executor", "world_size", "time_index", "max_abs_error": {"flow", "x0", "latents"}, "worst", "tolerance", "passed"}`.

    Raises:
        RecordingError: the recording cannot be replayed.
        CausalRTError: as `build` and `load` raise it.
    """
    if executor in FLAVOURS:
        raise ConfigError(
            f"recordings are float32, and {executor} has fused attention kernels in bfloat16 and float16 only; add --emulate "
            "to replay the graphs that it is built from"
        )
    recording, config = _open(path, world_size, head_plan, time_index)
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
            errors = largest_errors(replay(recording, engine), recording.outputs())
        on_progress("replay", 1, 1)
    result = {"executor": executor, "world_size": world_size, "time_index": time_index}
    return result | _plain_errors(errors) | _verdict(errors)


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
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Replay a recording on the graphs that TensorRT parses, run by ONNX Runtime with all ranks in this process.

    In float32, errors must be within the tolerance. A lower precision is further from the recording than any useful tolerance;
    eager is then replayed in that precision too, and the root mean square error of the graphs must be at most `EAGER_RATIO`
    times that of eager. With `plugins`, what TensorRT replaces by a plugin is run by its ONNX function.

    Returns:
        As `compare_recorded`, with `"emulated"` (what was run, in words), `"collectives"` and `"precision"`. A lower precision
        has `"rms_error"`, `"eager_rms_error"` and `"eager_ratio"` in place of `"tolerance"`.

    Raises:
        RecordingError: the recording cannot be replayed.
        ConfigError: no build for `executor` has such plugins.
    """
    from causalrt.proof.emulate import write_graphs  # needs ONNX Runtime, which may be missing

    recording, config = _open(path, world_size, head_plan, time_index)
    config = replace(config, build=replace(config.build, precision=precision))
    fused = fused_ops_wanted("on" if plugins else "auto", config, (executor,), "onnx")
    expected = recording.outputs()
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
        outputs = replay_here(recording, emulated_replica(EMULATED, graphs))
        on_progress("replay", 1, 1)
        errors = largest_errors(outputs, expected)
        result |= _plain_errors(errors)
        if precision == "float32":
            return result | _verdict(errors)
        on_progress("replay in eager", 0, 1)
        eager = replay_here(recording, eager_replica(config, checkpoint=checkpoint, folder=folder / "eager"))
        on_progress("replay in eager", 1, 1)
    ours, theirs = rms_errors(outputs, expected), rms_errors(eager, expected)
    passed = all(ours[kind] <= EAGER_RATIO * theirs[kind] for kind in ours)
    return result | {"rms_error": ours, "eager_rms_error": theirs, "eager_ratio": EAGER_RATIO, "passed": passed}


def _open(path: Path, world_size: int, head_plan: HeadPlanName, time_index: TimeIndex) -> tuple[Recording, Config]:
    recording = open_recording(path, world_size=world_size, head_plan=head_plan)
    return recording, replace(recording.config, video=replace(recording.config.video, time_index=time_index))


def _plain_errors(errors: Mapping[str, TensorError]) -> dict[str, Any]:
    return {
        "max_abs_error": {kind: error.error for kind, error in errors.items()},
        "worst": {kind: error.name for kind, error in errors.items()},
    }


def _verdict(errors: Mapping[str, TensorError]) -> dict[str, Any]:
    return {"tolerance": RECORDED.tolerance, "passed": all(errors.values())}
