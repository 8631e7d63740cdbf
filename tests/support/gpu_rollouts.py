"""A recording and its bundle, and rollouts of it on a GPU in this process."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from causalrt.engines.base import Executor
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.export.build import build
from causalrt.proof.compare import replay_here
from causalrt.proof.recording import Recording, open_recording
from causalrt.proof.replica import replica_on
from causalrt.proof.rollouts import Outputs
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.noise import RecordedNoise
from causalrt.runtime.rollout import Rollout
from causalrt.runtime.session_buffers import SessionBufferPool
from support import GOLDEN

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Case:
    recording: Recording
    bundle: Bundle


def make_case(
    folder: Path, precision: str, executor: str, *, name: str = "B", world_size: int = 1, **options: Any
) -> Case:
    """A bundle of recording `name` for an executor; options are those of `build`."""
    recording = open_recording(GOLDEN / f"{name}.safetensors", world_size=world_size)
    config = replace(recording.config, build=replace(recording.config.build, precision=precision))  # type: ignore[arg-type]
    checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
    bundle = build(config, checkpoint=checkpoint, out=folder / "bundle", executors=[executor], **options)
    return Case(recording, open_bundle(bundle))


def play(case: Case, executor: Executor) -> Outputs:
    """The whole rollout, on one rank; outputs on the CPU."""
    replica = replica_on(executor, case.bundle.config, case.bundle.layout)
    return replay_here(case.recording, replica)


def largest_difference(one: Outputs, other: Outputs) -> float:
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def ready_to_step(case: Case, executor: Executor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Functions that take a denoising step of a first chunk, and draw noise for the next."""
    config, recording = case.bundle.config, case.recording
    model, prompt = config.model, recording.prompt(0)
    text = torch.cat([prompt, torch.zeros(model.text_len - len(prompt), model.text_dim)])
    noise = RecordedNoise(recording.noise(0))
    buffers = SessionBufferPool(executor, config, case.bundle.layout).take()
    layout = case.bundle.layout
    session = Rollout(executor, LocalCollectives(), config, layout, text=text, noise=noise, buffers=buffers)
    executor.bind(buffers.view(0))
    x = session._local_noise(0, 0)
    time = session._times[0]
    return lambda: executor.step(x, time, 0), lambda: session._local_noise(0, 1)
