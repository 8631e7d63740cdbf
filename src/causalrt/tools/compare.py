"""Replay a recorded rollout through a bundle and its ranks, free-running, and compare every forward with the recording."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causalrt.config import HeadPlanName
from causalrt.export.build import build
from causalrt.runtime.engine import Engine, load, tokens_from_latents
from causalrt.tools.recording import Recording, open_recording

TOLERANCE = 5e-5
"""Largest difference from a float32 recording: golden data agree with a float64 replay within 5e-6, and the smallest
mistake worth the name (exact GELU for tanh) moves the latents by 3e-4."""


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
    head_plan: HeadPlanName = "shares",
    num_threads: int | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Build a bundle from a recording, replay it on `world_size` ranks, and report the largest errors.

    Returns:
        `{"executor", "world_size", "max_abs_error": {"flow", "x0", "latents"}, "worst", "tolerance", "passed"}`.

    Raises:
        RecordingError: the recording cannot be replayed.
        CausalRTError: whatever `build` and `load` raise.
    """
    recording = open_recording(path, world_size=world_size, head_plan=head_plan)
    with tempfile.TemporaryDirectory(prefix="causalrt-compare-") as folder:
        checkpoint = recording.write_checkpoint(Path(folder) / "checkpoint.safetensors")
        bundle = build(recording.config, checkpoint=checkpoint, out=Path(folder) / "bundle", executors=[executor])
        with load(bundle, executor=executor, num_threads=num_threads) as engine:
            errors = largest_errors(replay(recording, engine), recorded_outputs(recording))
    return {
        "executor": executor,
        "world_size": world_size,
        "max_abs_error": {name: error.largest for name, error in errors.items()},
        "worst": {name: error.at for name, error in errors.items()},
        "tolerance": tolerance,
        "passed": all(error.largest <= tolerance for error in errors.values()),
    }


Outputs = dict[tuple[int, str], torch.Tensor]
"""By batch element and the recording's own name (`out.c0.s1.flow`, `out.c0.s1.x0`, `out.c0`: latents): `[N, 64]`."""


def replay(recording: Recording, engine: Engine) -> Outputs:
    """Run every batch element as a session of its own, and keep what each forward computed."""
    outputs: Outputs = {}
    for element in range(recording.batch_size):
        with engine.session(
            recording.prompt(element), num_chunks=recording.num_chunks, noise=recording.noise(element), record=True
        ) as session:
            for chunk in session:
                outputs[element, f"out.c{chunk.index}"] = tokens_from_latents(chunk.latents, recording.config)
        assert len(session.records) == recording.num_chunks
        for index, records in enumerate(session.records):
            for k, record in enumerate(records):
                if record.x0 is None:
                    outputs[element, f"out.c{index}.ctx.flow"] = record.flow
                else:
                    outputs[element, f"out.c{index}.s{k}.flow"] = record.flow
                    outputs[element, f"out.c{index}.s{k}.x0"] = record.x0
    return outputs


def recorded_outputs(recording: Recording) -> Outputs:
    """What the recording holds of the same outputs."""
    expected: Outputs = {}
    frames = recording.config.video.chunk_frames
    for element in range(recording.batch_size):
        for name, tensor in recording.tensors.items():
            if name.startswith("out.c") and name.endswith((".flow", ".x0")):
                expected[element, name] = tokens_from_latents(tensor[element], recording.config)
        for chunk in range(recording.num_chunks):
            latents = recording.tensors["out.latents"][element, chunk * frames : (chunk + 1) * frames]
            expected[element, f"out.c{chunk}"] = tokens_from_latents(latents, recording.config)
    return expected


def largest_errors(got: Outputs, expected: Outputs) -> dict[str, Errors]:
    """Largest difference of flow, x0 and latents; both sides must hold the same outputs."""
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    errors = {"flow": Errors(), "x0": Errors(), "latents": Errors()}
    for (element, name), tensor in got.items():
        kind = name.rpartition(".")[2]
        errors.get(kind, errors["latents"]).add(tensor, expected[element, name], f"element {element} {name}")
    return errors
