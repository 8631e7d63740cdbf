"""A chunk step at full size over every number of filled KV rows, side by side: eager, fused ops, inductor."""

import gc

import torch

from causalrt.config import Config, override
from causalrt.engines.bundle import Bundle
from causalrt.measure.gpu_day.book import Book, one_line
from causalrt.measure.gpu_day.predictions import Planner, columns, planner_for
from causalrt.measure.gpu_day.steps import (
    MOST_ERROR,
    MakeExecutor,
    StepSession,
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
    "eager, fused ops": (eager(plugins=True), "eager", True),
    "inductor, captured": (inductor(), "engine", False),
    "inductor, fused ops, captured": (inductor(plugins=True), "engine", True),
    "inductor": (inductor(cuda_graphs=False), None, False),
}
"""By name: what makes the executor; as what the planner sees it, if it knows the like; whether it has the fused ops.

The sides join one after another, since compiling takes long.
"""


def step_config(book: Book) -> Config:
    """The model whose step is measured."""
    if book.dry_run:
        return override(recipe("tiny"), {"video.window_frames": "none", "video.sink_frames": "0"})
    return override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})


def step_bundle(book: Book) -> Bundle:
    """Its bundle, which parts share."""
    return random_bundle(step_config(book), book.settings.work / "steps", device=book.device)


def run(book: Book) -> None:
    """Measure the first two sides, then again with each further one."""
    planner, bundle = planner_for(book), step_bundle(book)
    book.fact("model", "the recipe tiny, float32" if book.dry_run else "wan_1_3b_480p, random weights, bfloat16")
    book.note("Each side's times come from one run, in which all sides of the table took turns; medians of 5.")
    wanted = list(SIDES)
    if book.dry_run:
        wanted = ["eager", "eager, fused ops", "inductor"]
        book.note("On a CPU nothing is captured and no waits are counted; inductor is tried without the fused ops.")
    sessions: dict[str, StepSession] = {}
    with torch.no_grad():
        for side in wanted:
            with book.attempt(side):
                _join(book, sessions, side, bundle)
                if side != wanted[0]:
                    _measure(book, sessions, bundle, planner)


def _join(book: Book, sessions: dict[str, StepSession], side: str, bundle: Bundle) -> None:
    """Open a side; if the memory does not suffice, eager alone stays beside it."""
    make, _, _ = SIDES[side]
    try:
        sessions[side] = StepSession(make, bundle, book.device)
    except torch.OutOfMemoryError as error:
        for other in list(sessions)[1:]:
            del sessions[other]
        gc.collect()
        torch.cuda.empty_cache()
        book.note(f"{side}: {one_line(error, 120)}; measured beside eager alone")
        sessions[side] = StepSession(make, bundle, book.device)


def _measure(book: Book, sessions: dict[str, StepSession], bundle: Bundle, planner: Planner) -> None:
    config = bundle.config
    found: dict[str, list[dict[str, object]]] = dict(book.record.data.get("sides", {}))
    for number, rows in enumerate(compare_steps(sessions, config, noise_of(bundle, book.device), repeats=REPEATS)):
        for row in rows:
            side, kv_rows, error = row["side"], row["KV rows"], row["error"]
            _, lowering, fused = SIDES[side]
            predicted = None
            if lowering is not None:
                predicted = planner.step(config, kv_rows=kv_rows, lowering=lowering, fused_ops=fused)
            known = found.setdefault(side, [])
            known[number:] = [{**row, **columns(predicted)}, *known[number + 1 :]]
            text = f"{side} over {kv_rows} rows: the flow differs from eager's by {error:.2g}, allowed {MOST_ERROR:g}"
            if error > MOST_ERROR and text not in book.record.wrong:
                book.wrong(text)
        book.table(TABLE, [row for of_side in found.values() for row in of_side])
    device = "CPU" if book.device.type == "cpu" else torch.cuda.get_device_name(book.device)
    book.data("title", f"{book.record.facts['model']}, {device}")
    book.data("sides", found)
    if book.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(book.device) / 2**30
        book.fact("peak GiB, all sides together", round(peak, 2))
    last = {side: rows[-1] for side, rows in found.items()}
    keys = next(iter(last.values()))["KV rows"]
    times = ", ".join(f"{side} {row['ms']:.4g} ms ({_predicted(row)})" for side, row in last.items())
    book.headline("steps", f"A chunk step over {keys} KV rows: {times}.")


def _predicted(row: dict[str, object]) -> str:
    value = row["predicted ms"]
    return f"planned {value:.4g}" if isinstance(value, float) else "no prediction"
