"""Chunk steps at full size over every number of filled KV rows, side by side: eager, fused ops, inductor."""

import gc

import torch

from causalrt.config import Config, override
from causalrt.engines.bundle import Bundle
from causalrt.measure.gpu_day.predictions import Planner, columns, planner_for
from causalrt.measure.gpu_day.recorder import Recorder, one_line
from causalrt.measure.gpu_day.steps import (
    MakeExecutor,
    StepSession,
    check_flow,
    compare_steps,
    eager,
    inductor,
    noise_of,
    random_bundle,
)
from causalrt.recipes import recipe
from causalrt.tools.plan.roofline import Lowering

TABLE = "milliseconds of a chunk step"
REPEATS = 5

SIDES: dict[str, tuple[MakeExecutor, Lowering | None, bool]] = {
    "eager": (eager(), "eager", False),
    "eager, fused ops": (eager(fused_ops=True), "eager", True),
    "inductor, captured": (inductor(), "engine", False),
    "inductor, fused ops, captured": (inductor(fused_ops=True), "engine", True),
    "inductor": (inductor(cuda_graphs=False), None, False),
}
"""By name: the function that makes the executor; the lowering that the planner predicts for it, if any; whether it uses the
fused ops. The sides join one after another, since compiling takes long."""


def step_config(recorder: Recorder) -> Config:
    """The config of the model whose step is measured."""
    if recorder.dry_run:
        return override(recipe("tiny"), {"video.window_frames": "none", "video.sink_frames": "0"})
    return override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})


def step_bundle(recorder: Recorder) -> Bundle:
    """The bundle of that model, which several parts share."""
    return random_bundle(step_config(recorder), recorder.settings.work / "steps", device=recorder.device)


def run(recorder: Recorder) -> None:
    """Measure the first two sides, then again with each further one."""
    planner, bundle = planner_for(recorder), step_bundle(recorder)
    recorder.fact(
        "model", "the recipe tiny, float32" if recorder.dry_run else "wan_1_3b_480p, random weights, bfloat16"
    )
    recorder.note("Each side's times come from one run, in which all sides of the table took turns; medians of 5.")
    wanted = list(SIDES)
    if recorder.dry_run:
        wanted = ["eager", "eager, fused ops", "inductor"]
        recorder.note("On a CPU nothing is captured and no waits are counted; inductor is tried without the fused ops.")
    sessions: dict[str, StepSession] = {}
    with torch.no_grad():
        for side in wanted:
            with recorder.attempt(side):
                _join(recorder, sessions, side, bundle)
                if side != wanted[0]:
                    _measure(recorder, sessions, bundle, planner)


def _join(recorder: Recorder, sessions: dict[str, StepSession], side: str, bundle: Bundle) -> None:
    """Open a side; if there is too little memory, close all others but eager."""
    make, _, _ = SIDES[side]
    try:
        sessions[side] = StepSession(make, bundle, recorder.device)
    except torch.OutOfMemoryError as error:
        for other in list(sessions)[1:]:
            del sessions[other]
        gc.collect()
        torch.cuda.empty_cache()
        recorder.note(f"{side}: {one_line(error, 120)}; measured beside eager only")
        sessions[side] = StepSession(make, bundle, recorder.device)


def _measure(recorder: Recorder, sessions: dict[str, StepSession], bundle: Bundle, planner: Planner) -> None:
    config = bundle.config
    found: dict[str, list[dict[str, object]]] = dict(recorder.record.data.get("sides", {}))
    for number, rows in enumerate(compare_steps(sessions, config, noise_of(bundle, recorder.device), repeats=REPEATS)):
        for row in rows:
            side, kv_rows = row["side"], row["KV rows"]
            _, lowering, fused = SIDES[side]
            predicted = None
            if lowering is not None:
                predicted = planner.step(config, kv_rows=kv_rows, lowering=lowering, fused_ops=fused)
            known = found.setdefault(side, [])
            known[number:] = [{**row, **columns(predicted)}, *known[number + 1 :]]
            check_flow(recorder, row)
        recorder.table(TABLE, [row for of_side in found.values() for row in of_side])
    device = "CPU" if recorder.device.type == "cpu" else torch.cuda.get_device_name(recorder.device)
    recorder.data("title", f"{recorder.record.facts['model']}, {device}")
    recorder.data("sides", found)
    if recorder.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(recorder.device) / 2**30
        recorder.fact("peak GiB, all sides together", round(peak, 2))
    last = {side: rows[-1] for side, rows in found.items()}
    keys = next(iter(last.values()))["KV rows"]
    times = ", ".join(f"{side} {row['ms']:.4g} ms ({_predicted(row)})" for side, row in last.items())
    recorder.headline("steps", f"A chunk step over {keys} KV rows: {times}.")


def _predicted(row: dict[str, object]) -> str:
    value = row["predicted ms"]
    return f"planned {value:.4g}" if isinstance(value, float) else "no prediction"
