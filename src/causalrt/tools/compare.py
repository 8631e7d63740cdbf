"""Replay a recorded rollout through a bundle and its ranks, free-running, and compare every forward with the recording."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causalrt.config import HeadPlanName
from causalrt.export.build import build
from causalrt.runtime.engine import Engine, load
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
            errors = replay_errors(recording, engine)
    return {
        "executor": executor,
        "world_size": world_size,
        "max_abs_error": {name: error.largest for name, error in errors.items()},
        "worst": {name: error.at for name, error in errors.items()},
        "tolerance": tolerance,
        "passed": all(error.largest <= tolerance for error in errors.values()),
    }


def replay_errors(recording: Recording, engine: Engine) -> dict[str, Errors]:
    """Errors of flow, x0 and latents over all batch elements, chunks and passes."""
    errors = {"flow": Errors(), "x0": Errors(), "latents": Errors()}
    frames = recording.config.video.chunk_frames
    for element in range(recording.batch_size):
        with engine.session(
            recording.prompt(element), num_chunks=recording.num_chunks, noise=recording.noise(element), record=True
        ) as session:
            for chunk in session:
                expected = recording.tensors["out.latents"][element, chunk.index * frames : (chunk.index + 1) * frames]
                errors["latents"].add(chunk.latents, expected, f"element {element} chunk {chunk.index}")
        for index, records in enumerate(session.records):
            for k, record in enumerate(records):
                tag = f"c{index}.s{k}" if record.x0 is not None else f"c{index}.ctx"
                at = f"element {element} {tag}"
                errors["flow"].add(record.flow, recording.expected(f"out.{tag}.flow", element), at)
                if record.x0 is not None:
                    errors["x0"].add(record.x0, recording.expected(f"out.{tag}.x0", element), at)
    assert len(session.records) == recording.num_chunks
    return errors


