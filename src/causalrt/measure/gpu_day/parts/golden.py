"""Recorded rollouts on one GPU: every flow, x0 and latent of every variant of the step against the reference."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from causalrt.engines.base import Executor
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.inductor import InductorExecutor
from causalrt.measure.gpu_day.recorder import Recorder, SkippedError
from causalrt.measure.gpu_day.recordings import RECORDINGS, RecordedModel, exact_float32, recorded_model
from causalrt.proof.compare import largest_errors, replay_here
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.replica import replica_on
from causalrt.runtime.collectives import LocalCollectives

TABLE = "largest errors"


@dataclass(frozen=True, slots=True)
class StepVariant:
    """A variant of the step."""

    name: str
    compiled: bool = False
    fused_ops: bool = False
    captured: bool = False

    def executor(self, model: RecordedModel, device: torch.device) -> Executor:
        """Make the executor; the class that captures compiled steps captures eager ones too (see `stance`)."""
        if not (self.compiled or self.captured):
            return EagerExecutor(model.bundle, LocalCollectives(), device=device, fused_ops=self.fused_ops)
        return InductorExecutor(
            model.bundle, LocalCollectives(), device=device, fused_ops=self.fused_ops, cuda_graphs=self.captured
        )

    def stance(self) -> AbstractContextManager[object]:
        """A context in which torch.compile compiles, or in which it runs functions uncompiled."""
        if self.compiled or not self.captured:
            return nullcontext()
        eagerly: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eagerly


VARIANTS = (
    StepVariant("eager"),
    StepVariant("eager, fused ops", fused_ops=True),
    StepVariant("inductor", compiled=True),
    StepVariant("inductor, fused ops", compiled=True, fused_ops=True),
    StepVariant("inductor, captured", compiled=True, captured=True),
    StepVariant("inductor, fused ops, captured", compiled=True, fused_ops=True, captured=True),
    StepVariant("eager, captured", captured=True),
    StepVariant("eager, fused ops, captured", fused_ops=True, captured=True),
)
"""Captured variants come last, since a capture that fails may leave the process unusable."""


def run(recorder: Recorder) -> None:
    """Replay every recording with every variant, simple ones first."""
    exact_float32()
    models = {}
    for name in RECORDINGS:
        try:
            models[name] = recorded_model(recorder, name)
        except SkippedError as reason:
            recorder.note(str(reason))
    if not models:
        raise SkippedError(recorder.record.notes[-1])
    if recorder.dry_run:
        recorder.note(
            "CUDA graphs cannot be tried on a CPU; steps that are captured are left out, as are compiled J and R."
        )
        recorder.note("On a CPU the fused ops are their references: Triton's kernels run on GPUs alone.")
    worst, count = 0.0, 0
    for variant in VARIANTS:
        for name, model in models.items():
            if recorder.dry_run and (variant.captured or (variant.compiled and name != RECORDINGS[0])):
                continue
            with recorder.attempt(f"{name}, {variant.name}"):
                worst, count = max(worst, _replay(recorder, name, variant, model)), count + 1
                recorder.headline(
                    "golden",
                    f"{count} replays of recorded rollouts, largest error {worst:.1e} (allowed {TOLERANCE:.0e}).",
                )


def _replay(recorder: Recorder, name: str, variant: StepVariant, model: RecordedModel) -> float:
    start = time.perf_counter()
    torch.compiler.reset()  # it would take the step of another executor for one compiled too often
    with variant.stance():
        replica = replica_on(variant.executor(model, recorder.device), model.bundle.config, model.bundle.layout)
        outputs = replay_here(model.recording, replica)
    errors = largest_errors(outputs, model.recording.outputs())
    worst = max(errors.values(), key=lambda error: error.error)
    agrees = worst.error <= TOLERANCE
    recorder.row(
        TABLE,
        recording=name,
        variant=variant.name,
        **{kind: error.error for kind, error in errors.items()},
        ok=agrees,
        seconds=round(time.perf_counter() - start, 1),
    )
    if not agrees:
        recorder.wrong(f"{name}, {variant.name}: {worst.error:.2e} at {worst.name}, allowed {TOLERANCE:.0e}")
    return worst.error
