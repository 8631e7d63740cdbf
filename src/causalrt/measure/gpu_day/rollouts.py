"""Recorded rollouts, their bundles, and what a replay of one is compared with."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from causalrt.config import Precision
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.export.build import build
from causalrt.measure.gpu_day.book import Book, SkippedError
from causalrt.proof.recording import Recording, open_recording

RECORDINGS = ("B", "J", "R")


@dataclass(frozen=True, slots=True)
class Case:
    """A recording and a bundle of its weights, for executors that compile nothing ahead of time."""

    recording: Recording
    bundle: Bundle


def make_case(book: Book, name: str, *, world_size: int = 1, precision: Precision = "float32") -> Case:
    """Open a recording and build its bundle, if an earlier part has not.

    Raises:
        SkippedError: the recording is not there.
    """
    recording = open_recording(recording_file(book, name), world_size=world_size)
    config = replace(recording.config, build=replace(recording.config.build, precision=precision))
    path = book.settings.work / f"golden-{name}-{world_size}-{precision}"
    if not path.exists():
        checkpoint = recording.write_checkpoint(book.settings.work / f"{name}.safetensors")
        build(config, checkpoint=checkpoint, out=path, executors=["eager"])
    return Case(recording, open_bundle(path))


def recording_file(book: Book, name: str) -> Path:
    """The file of a recording.

    Raises:
        SkippedError: it is not there.
    """
    path = book.settings.golden / f"{name}.safetensors"
    if not path.is_file():
        raise SkippedError(
            f"there is no {path}; recorded rollouts are in tests/data/golden of the source tree, name it with --golden"
        )
    return path


def exact_float32() -> None:
    """Have products in float32 be float32 on a GPU too, as the recordings are."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
