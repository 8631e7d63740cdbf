"""Below whole rollouts: exchanges bit for bit, chunk steps and segments fed alike, and where the first difference arises."""

from dataclasses import replace
from pathlib import Path

from causalrt.engines.kinds import executor_kind
from causalrt.progress import Progress
from causalrt.proof.attempt import attempt
from causalrt.proof.bisect import bisect_eager, bisect_step
from causalrt.proof.compare import TOLERANCE
from causalrt.proof.errors import Comparison, TensorError
from causalrt.proof.polygraphy_files import SavedSegments, command_line
from causalrt.proof.record import Check, NotChecked
from causalrt.proof.runners import StepRunner, compared, forwards_at, run, step_feed
from causalrt.proof.segments import SegmentGraph, compare_segment, explain, run_segments, segment_comparison
from causalrt.proof.stage import Stage
from causalrt.proof.transport import check_transport


def compare_exchanges(stage: Stage) -> None:
    """What the ranks of this process have moved, bit for bit."""
    if stage.world_size == 1:
        return
    blocks, faults = 0, list[str]()
    for name, played in stage.played.items():
        if len(played.tapes) == stage.world_size:
            count, wrong = check_transport(
                played.tapes, stage.plan.places, num_layers=stage.bundle.config.model.num_layers
            )
            blocks += count
            faults += [f"{name}: {fault}" for fault in wrong]
    found = f"{blocks} blocks arrived as they were sent, between threads"
    stage.certificate.checks.append(Check(name="exchanges", count=blocks, found=found, faults=tuple(faults)))


def compare_steps(stage: Stage, on_progress: Progress) -> Comparison | None:
    """The executor's chunk steps, each fed with what eager had."""
    if not _has_inside(stage):
        return None
    eager, candidate = stage.sides[stage.eager], stage.sides[stage.candidate or ""]
    feeds = [step_feed(forwards_at(stage.played[stage.eager].tapes, place)) for place in stage.plan.places]
    on_progress("chunk steps", 0, 1)
    runners = [StepRunner(side, feeds[0]) for side in (eager, candidate)]
    results, fault = attempt("a chunk step", lambda: run(runners, feeds))
    on_progress("chunk steps", 1, 1)
    errors: list[TensorError] = []
    if results is not None:
        lists = compared(results, reference=eager.name, candidate=candidate.name, tolerance=TOLERANCE)
        for place, found in zip(stage.plan.places, lists, strict=True):
            errors += [_at_place(error, place) for error in found]
    comparison = Comparison(
        name="chunk step",
        reference=f"{eager.name}, fed alike",
        candidate=candidate.name,
        rule=f"every tensor within {TOLERANCE:.0e}",
        errors=tuple(errors),
        faults=(fault,) if fault else (),
    )
    stage.certificate.comparisons.append(comparison)
    return comparison


def _has_inside(stage: Stage) -> bool:
    """Whether the executor's single steps can be compared with eager's."""
    if stage.candidate not in stage.played or stage.eager not in stage.played:
        return False
    whole_slots = stage.sides[stage.candidate].executors[0].whole_slots
    why = None
    if stage.low:
        why = "a lower precision has no tolerance for a single step; the rule is about whole rollouts"
    elif stage.emulate:
        why = "one emulation plays all ranks"
    elif whole_slots:
        why = "it takes KV slots whole, in another order than eager's"
    if why is not None:
        stage.certificate.not_checked.append(NotChecked(what=f"single chunk steps of {stage.executor}", why=why))
    return why is None


def compare_segments(
    stage: Stage, folder: Path | None, out: Path | None, on_progress: Progress, *, always_bisect: bool
) -> None:
    """Each ONNX file by itself; where the first that differs does so."""
    if executor_kind(stage.executor).graphs != "segments" or stage.low or stage.eager not in stage.played:
        return
    saved = SavedSegments(folder) if folder is not None else None
    errors: list[TensorError] = []
    graphs: dict[str, SegmentGraph] = {}
    total = sum(len(step.segments) for step in stage.bundle.steps)

    def every_segment() -> None:
        tapes, places = stage.played[stage.eager].tapes, stage.plan.places
        for done, (graph, fed) in enumerate(run_segments(stage.bundle, tapes, places)):
            on_progress("segments", done, total)
            graphs[graph.part.file] = graph
            errors.extend(compare_segment(graph, fed, tolerance=TOLERANCE, candidate=graph.part.file))
            if saved is not None:
                saved.save(stage.bundle.path / graph.part.file, fed[-1])
        on_progress("segments", total, total)

    _, fault = attempt("a segment by itself", every_segment)
    comparison = segment_comparison(
        errors, places=stage.plan.places, tolerance=TOLERANCE, candidate="onnxruntime, each segment", fault=fault
    )
    stage.certificate.comparisons.append(comparison)
    wrong = comparison.first_wrong
    if wrong is None and always_bisect:
        wrong = comparison.worst
    if wrong is not None:
        stage.certificate.bisected = explain(graphs[wrong.where["segment"]], wrong)
    if saved is not None and out is not None:
        for segment, files in saved.files.items():
            stage.certificate.polygraphy[segment] = command_line(
                stage.bundle.path, out.absolute(), segment, files, tolerance=TOLERANCE
            )
        if saved.left_out:
            why = f"their inputs and outputs are larger than is written: {', '.join(saved.left_out)}"
            stage.certificate.not_checked.append(NotChecked(what="some segments by Polygraphy's command line", why=why))


def find_first(stage: Stage, step: Comparison | None) -> None:
    """Where sides part, if the segments have not told."""
    certificate = stage.certificate
    if stage.reference not in stage.played or stage.low:
        return
    rollout = next((c for c in certificate.comparisons if c.name == "rollout" and c.candidate == stage.eager), None)
    if certificate.bisected is None and rollout is not None and not rollout.passed and stage.eager in stage.played:
        certificate.bisected = bisect_eager(
            stage.played[stage.reference].tapes,
            stage.played[stage.eager].tapes,
            stage.plan.places,
            stage.bundle.layout,
            tolerance=TOLERANCE,
        )
    if certificate.bisected is None and step is not None:
        certificate.bisected = bisect_step(step)


def _at_place(error: TensorError, place: tuple[int, str]) -> TensorError:
    """A chunk step's error, said where it is."""
    value, _, rank = error.name.rpartition(", rank ")
    where = {"chunk": place[0], "forward": place[1], "rank": int(rank), "value": value}
    return replace(error, name=f"chunk {place[0]} {place[1]}, {error.name}", where=where)
