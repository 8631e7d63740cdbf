"""TensorRT in each flavour that can be imported: small engines against a recording, then two layers of the 1.3B model."""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file

from causalrt.config import override
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.tensorrt import TensorRTExecutor
from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour, device_target
from causalrt.errors import ExecutorError
from causalrt.export.build import build
from causalrt.export.options import CollectivesMode
from causalrt.measure.gpu_day.predictions import columns, planner_for
from causalrt.measure.gpu_day.recorder import Recorder, SkippedError
from causalrt.measure.gpu_day.recordings import recorded_model, recording_file
from causalrt.measure.gpu_day.steps import StepSession, check_flow, compare_steps, eager, noise_of, random_state
from causalrt.proof.compare import replay_here, rms_errors
from causalrt.proof.recording import open_recording
from causalrt.proof.replica import replica_on
from causalrt.recipes import recipe
from causalrt.runtime.collectives import LocalCollectives
from causalrt.tools.plan.roofline import Lowering

RECORDING = "A"
"""The heads of this recording have 32 channels; TensorRT has no fused attention for the 8 channels of B."""
DRY_TARGET = "sm80"
SMALL, LAYERS = "small engines", "two layers of the 1.3B model"
MOST_RATIO = 1.5
"""Most root mean square error of an engine, relative to that of eager in bfloat16."""
COLLECTIVES: Sequence[CollectivesMode] = ("engine", "runtime")


def run(recorder: Recorder) -> None:
    """Try each flavour.

    Raises:
        SkippedError: no flavour can be used on this machine.
    """
    usable = [found for name in FLAVOURS if (found := _usable(recorder, FLAVOURS[name])) is not None]
    if not usable:
        raise SkippedError("; ".join(recorder.record.notes))
    for flavour, target in usable:
        for collectives in COLLECTIVES:
            with recorder.attempt(f"{flavour.name}, small engines, exchange by {collectives}"):
                _small(recorder, flavour, target, collectives)
    for flavour, target in usable:
        if recorder.dry_run:
            recorder.note("On a CPU engines are built and not run, and the two layers are left out.")
            continue
        with recorder.attempt(f"{flavour.name}, two layers"), torch.no_grad():
            _two_layers(recorder, flavour, target)


def _usable(recorder: Recorder, flavour: Flavour) -> tuple[Flavour, str] | None:
    """The flavour and the target to build for; None, with a note, if it cannot be used here."""
    try:
        flavour.load()
        wanted = DRY_TARGET if recorder.dry_run else device_target(recorder.device)
        return flavour, flavour.check_target(wanted)
    except ExecutorError as error:
        recorder.note(f"{flavour.name}: {error}")
        return None


def _small(recorder: Recorder, flavour: Flavour, target: str, collectives: CollectivesMode) -> None:
    recording = open_recording(recording_file(recorder, RECORDING), world_size=1)
    model = recorded_model(recorder, RECORDING, precision="bfloat16")
    path = build(
        model.bundle.config,
        checkpoint=recording.write_checkpoint(recorder.settings.work / f"{RECORDING}.safetensors"),
        out=recorder.settings.work / f"small-{flavour.name}-{collectives}",
        executors=[flavour.name],
        targets=[target],
        collectives=collectives,
    )
    row: dict[str, Any] = {"flavour": flavour.name, "target": target, "exchange": collectives}
    if recorder.dry_run:
        recorder.row(SMALL, **row, captured=None, built=True)
        recorder.headline("engines", f"Small {flavour.name} engines for {target} build.")
        return
    bundle, expected = open_bundle(path), recording.outputs()

    def rms(executor: EagerExecutor | TensorRTExecutor) -> float:
        replica = replica_on(executor, bundle.config, bundle.layout)
        return rms_errors(replay_here(recording, replica), expected)["latents"]

    eagers = rms(EagerExecutor(bundle, LocalCollectives(), device=recorder.device))
    for captured in (False, True):
        what = f"{flavour.name}, exchange by {collectives}, {'captured' if captured else 'not captured'}"
        with recorder.attempt(what):
            engine = TensorRTExecutor(flavour, bundle, LocalCollectives(), device=recorder.device, cuda_graphs=captured)
            ratio = rms(engine) / eagers
            recorder.row(SMALL, **row, captured=captured, built=True, **{"rms error, of eager's": ratio})
            if not ratio <= MOST_RATIO:
                recorder.wrong(f"{what}: {ratio:.2f} of eager's error, allowed {MOST_RATIO}")
            recorder.headline(
                "engines", f"Small {flavour.name} engines run, {'captured' if captured else 'not captured'}."
            )


def _two_layers(recorder: Recorder, flavour: Flavour, target: str) -> None:
    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16", "model.num_layers": "2"})
    checkpoint = recorder.settings.work / "two-layers.safetensors"
    if not checkpoint.exists():
        save_file(random_state(config, device=recorder.device), checkpoint)
    out = recorder.settings.work / f"two-layers-{flavour.name}"
    bundle = open_bundle(
        build(config, checkpoint=checkpoint, out=out, executors=[flavour.name], targets=[target]), verify=False
    )

    def engine(bundle: Bundle, device: torch.device) -> TensorRTExecutor:
        return TensorRTExecutor(flavour, bundle, LocalCollectives(), device=device)

    sessions = {
        name: StepSession(make, bundle, recorder.device) for name, make in (("eager", eager()), (flavour.name, engine))
    }
    planner = planner_for(recorder)
    for rows in compare_steps(sessions, config, noise_of(bundle, recorder.device), repeats=5):
        for each in rows:
            lowering: Lowering = "eager" if each["side"] == "eager" else "engine"
            predicted = planner.step(config, kv_rows=each["KV rows"], lowering=lowering, fused_ops=False)
            recorder.row(LAYERS, **each, **columns(predicted))
            check_flow(recorder, each)
