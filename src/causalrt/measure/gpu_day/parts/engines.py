"""TensorRT, in each flavour that imports here: small engines against the recording, then two layers of the 1.3B model."""

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
from causalrt.measure.gpu_day.book import Book, SkippedError
from causalrt.measure.gpu_day.predictions import columns, planner_for
from causalrt.measure.gpu_day.rollouts import make_case, recording_file
from causalrt.measure.gpu_day.steps import MOST_ERROR, StepSession, compare_steps, eager, noise_of, random_state
from causalrt.proof.compare import replay_here, rms_errors
from causalrt.proof.recording import open_recording
from causalrt.proof.replica import replica_on
from causalrt.recipes import recipe
from causalrt.runtime.collectives import LocalCollectives
from causalrt.tools.plan.roofline import Lowering

RECORDING = "A"
"""Its heads have 32 channels; for the 8 of B TensorRT has no fused attention."""
DRY_TARGET = "sm80"
SMALL, LAYERS = "small engines", "two layers of the 1.3B model"
MOST_RATIO = 1.5
"""How much further from the recording than eager in bfloat16 an engine may be, by root mean square."""
COLLECTIVES: Sequence[CollectivesMode] = ("engine", "runtime")


def run(book: Book) -> None:
    """Try each flavour.

    Raises:
        SkippedError: neither can be used here.
    """
    usable = [found for name in FLAVOURS if (found := _usable(book, FLAVOURS[name])) is not None]
    if not usable:
        raise SkippedError("; ".join(book.record.notes))
    for flavour, target in usable:
        for collectives in COLLECTIVES:
            with book.attempt(f"{flavour.name}, small engines, exchange by {collectives}"):
                _small(book, flavour, target, collectives)
    for flavour, target in usable:
        if book.dry_run:
            book.note("On a CPU engines are built and not run, and the two layers are left out.")
            continue
        with book.attempt(f"{flavour.name}, two layers"), torch.no_grad():
            _two_layers(book, flavour, target)


def _usable(book: Book, flavour: Flavour) -> tuple[Flavour, str] | None:
    """The flavour and what to build for; None, and a note, if it cannot be used here."""
    try:
        flavour.load()
        wanted = DRY_TARGET if book.dry_run else device_target(book.device)
        return flavour, flavour.check_target(wanted)
    except ExecutorError as error:
        book.note(f"{flavour.name}: {error}")
        return None


def _small(book: Book, flavour: Flavour, target: str, collectives: CollectivesMode) -> None:
    recording = open_recording(recording_file(book, RECORDING), world_size=1)
    case = make_case(book, RECORDING, precision="bfloat16")
    path = build(
        case.bundle.config,
        checkpoint=recording.write_checkpoint(book.settings.work / f"{RECORDING}.safetensors"),
        out=book.settings.work / f"small-{flavour.name}-{collectives}",
        executors=[flavour.name],
        targets=[target],
        collectives=collectives,
    )
    row: dict[str, Any] = {"flavour": flavour.name, "target": target, "exchange": collectives}
    if book.dry_run:
        book.row(SMALL, **row, captured=None, built=True)
        book.headline("engines", f"Small {flavour.name} engines for {target} build.")
        return
    bundle, expected = open_bundle(path), recording.outputs()

    def rms(executor: EagerExecutor | TensorRTExecutor) -> float:
        replica = replica_on(executor, bundle.config, bundle.layout)
        return rms_errors(replay_here(recording, replica), expected)["latents"]

    eagers = rms(EagerExecutor(bundle, LocalCollectives(), device=book.device))
    for captured in (False, True):
        what = f"{flavour.name}, exchange by {collectives}, {'captured' if captured else 'not captured'}"
        with book.attempt(what):
            engine = TensorRTExecutor(flavour, bundle, LocalCollectives(), device=book.device, cuda_graphs=captured)
            ratio = rms(engine) / eagers
            book.row(SMALL, **row, captured=captured, built=True, **{"rms error, of eager's": ratio})
            if not ratio <= MOST_RATIO:
                book.wrong(f"{what}: {ratio:.2f} of eager's error, allowed {MOST_RATIO}")
            book.headline("engines", f"Small {flavour.name} engines run, {'captured' if captured else 'not captured'}.")


def _two_layers(book: Book, flavour: Flavour, target: str) -> None:
    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16", "model.num_layers": "2"})
    checkpoint = book.settings.work / "two-layers.safetensors"
    if not checkpoint.exists():
        save_file(random_state(config, device=book.device), checkpoint)
    out = book.settings.work / f"two-layers-{flavour.name}"
    bundle = open_bundle(
        build(config, checkpoint=checkpoint, out=out, executors=[flavour.name], targets=[target]), verify=False
    )

    def engine(bundle: Bundle, device: torch.device) -> TensorRTExecutor:
        return TensorRTExecutor(flavour, bundle, LocalCollectives(), device=device)

    sessions = {
        name: StepSession(make, bundle, book.device) for name, make in (("eager", eager()), (flavour.name, engine))
    }
    planner = planner_for(book)
    for rows in compare_steps(sessions, config, noise_of(bundle, book.device), repeats=5):
        for each in rows:
            lowering: Lowering = "eager" if each["side"] == "eager" else "engine"
            predicted = planner.step(config, kv_rows=each["KV rows"], lowering=lowering, fused_ops=False)
            book.row(LAYERS, **each, **columns(predicted))
            if each["error"] > MOST_ERROR:
                book.wrong(
                    f"{each['side']} over {each['KV rows']} rows: the flow differs from eager's by {each['error']:.2g}, "
                    f"allowed {MOST_ERROR:g}"
                )
