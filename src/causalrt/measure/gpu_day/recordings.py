"""Recorded rollouts, and bundles of their weights that replay them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from causalrt.config import Precision
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.export.build import build
from causalrt.measure.gpu_day.recorder import Recorder, SkippedError
from causalrt.proof.recording import Recording, open_recording

RECORDINGS = ("B", "J", "R")


@dataclass(frozen=True, slots=True)
class RecordedModel:
    """A recording, and a bundle of its weights for executors that compile nothing ahead of time."""

    recording: Recording
    bundle: Bundle


def recorded_model(
    recorder: Recorder, name: str, *, world_size: int = 1, precision: Precision = "float32"
) -> RecordedModel:
    """Open a recording, and build its bundle unless an earlier part has done so.

    Raises:
        SkippedError: the recording is missing.
    """
    recording = open_recording(recording_file(recorder, name), world_size=world_size)
    config = replace(recording.config, build=replace(recording.config.build, precision=precision))
    path = recorder.settings.work / f"golden-{name}-{world_size}-{precision}"
    if not path.exists():
        checkpoint = recording.write_checkpoint(recorder.settings.work / f"{name}.safetensors")
        build(config, checkpoint=checkpoint, out=path, executors=["eager"])
    return RecordedModel(recording, open_bundle(path))


def recording_file(recorder: Recorder, name: str) -> Path:
    """The file of a recording.

    Raises:
        SkippedError: it is missing.
    """
    path = recorder.settings.golden / f"{name}.safetensors"
    if not path.is_file():
        raise SkippedError(
            f"there is no {path}; recorded rollouts are in tests/data/golden of the source tree, name it with --golden"
        )
    return path


def exact_float32() -> None:
    """Compute products of float32 tensors in float32 on GPUs too, as the recordings were."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
