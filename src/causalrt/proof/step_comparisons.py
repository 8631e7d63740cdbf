"""Comparisons below whole rollouts: single steps and segments from eager's inputs, and where the first difference arises."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from causalrt.engines.kinds import executor_kind
from causalrt.progress import Progress
from causalrt.proof.certificate import attempt
from causalrt.proof.comparisons import Stage
from causalrt.proof.differences import CERTIFIED, Comparison, TensorError, differences, tensor_error
from causalrt.proof.replica import Replica
from causalrt.proof.rollouts import Outputs
from causalrt.proof.segments import (
    SavedSegments,
    SegmentGraph,
    command_line,
    compare_segment,
    describe,
    explain,
    run_segments,
    slots_name,
)
from causalrt.proof.trace import StepId, StepTrace, Trace, copied, copied_view, residual_name

STEP_BUFFERS = itertools.count(1_000)
"""Numbers of buffers that no session has."""


def compare_steps(stage: Stage, on_progress: Progress) -> Comparison | None:
    """Compare single steps of the executor with eager's, from the inputs that eager had; None if they cannot be compared."""
    if not _has_single_steps(stage):
        return None
    eager, candidate = stage.replicas[stage.eager], stage.replicas[stage.candidate or ""]
    on_progress("chunk steps", 0, 1)

    def every_step() -> list[TensorError]:
        errors = []
        for place in stage.plan.places:
            forwards = stage.traces[stage.eager].forwards(place)
            expected, got = run_step(eager, forwards), run_step(candidate, forwards)
            errors += [_at_place(error, place) for error in differences(expected, got)]
        return errors

    errors, fault = attempt("a chunk step", every_step)
    on_progress("chunk steps", 1, 1)
    comparison = Comparison(
        name="chunk step",
        reference=f"{eager.name}, fed alike",
        candidate=candidate.name,
        rule=CERTIFIED.text,
        errors=tuple(errors or ()),
        faults=(fault,) if fault else (),
    )
    stage.certificate.comparisons.append(comparison)
    return comparison


def run_step(replica: Replica, forwards: list[StepTrace]) -> Outputs:
    """Run one forward on all ranks from traced inputs; the outputs are named by value and rank."""
    common, buffers_id = forwards[0], next(STEP_BUFFERS)

    def on_rank(rank: int) -> Outputs:
        executor, forward = replica.executors[rank], forwards[rank]
        trace = executor.trace = Trace([(0, "step 0")], num_steps=1)
        prompt = copied(common.view.prompt)
        executor.bind(replace(copied_view(forward.view), buffers_id=buffers_id, prompt=prompt))
        executor.step(forward.x.clone(), common.time, common.first_frame)
        executor.trace = None
        return trace.forwards[0, "step 0"].outputs

    by_rank = replica.run(on_rank)
    return {f"{name}, rank {rank}": found[name] for name in by_rank[0] for rank, found in enumerate(by_rank)}


def _has_single_steps(stage: Stage) -> bool:
    """Whether single steps of the executor can be compared with eager's; the certificate notes why not."""
    if stage.candidate not in stage.traces or stage.eager not in stage.traces:
        return False
    whole_slots = stage.replicas[stage.candidate].executors[0].whole_slots
    why = None
    if stage.low:
        why = "a lower precision has no tolerance for a single step; the rule is about whole rollouts"
    elif stage.emulate:
        why = "one emulation plays all ranks"
    elif whole_slots:
        why = "it takes KV slots whole, in another order than eager's"
    if why is not None:
        stage.skip(f"single chunk steps of {stage.executor}", why)
    return why is None


def _at_place(error: TensorError, place: StepId) -> TensorError:
    value, _, rank = error.name.rpartition(", rank ")
    where = {"chunk": place[0], "forward": place[1], "rank": int(rank), "value": value}
    return replace(error, name=f"chunk {place[0]} {place[1]}, {error.name}", where=where)


def compare_segments(
    stage: Stage, folder: Path | None, out: Path | None, on_progress: Progress, *, always_bisect: bool
) -> None:
    """Compare each ONNX segment with eager, and explain the first one that differs.

    Args:
        stage: what is certified.
        folder: that Polygraphy's files are written to; None writes none.
        out: where `folder` will be when the certificate is finished.
        on_progress: called after each segment.
        always_bisect: explain the largest difference if all are within the tolerance.
    """
    if executor_kind(stage.executor).graphs != "segments" or stage.low or stage.eager not in stage.traces:
        return
    saved = SavedSegments(folder) if folder is not None else None
    errors: list[TensorError] = []
    graphs: dict[str, SegmentGraph] = {}
    total = sum(len(step.segments) for step in stage.bundle.steps)

    def every_segment() -> None:
        runs = run_segments(stage.bundle, stage.traces[stage.eager], stage.plan.places)
        for done, (graph, fed) in enumerate(runs):
            on_progress("segments", done, total)
            graphs[graph.part.file] = graph
            errors.extend(compare_segment(graph, fed))
            if saved is not None:
                saved.save(stage.bundle.path / graph.part.file, fed[-1])
        on_progress("segments", total, total)

    _, fault = attempt("a segment by itself", every_segment)
    order = {place: number for number, place in enumerate(stage.plan.places)}
    comparison = Comparison(
        name="segment",
        reference="eager's own tensors",
        candidate="onnxruntime, each segment",
        rule=CERTIFIED.text,
        errors=tuple(sorted(errors, key=lambda error: order[error.where["chunk"], error.where["forward"]])),
        faults=(fault,) if fault else (),
    )
    stage.certificate.comparisons.append(comparison)
    wrong = comparison.first_wrong
    if wrong is None and always_bisect:
        wrong = comparison.worst
    if wrong is not None:
        stage.certificate.bisected = explain(graphs[wrong.where["segment"]], wrong)
    if saved is not None and out is not None:
        for segment, files in saved.files.items():
            stage.certificate.polygraphy[segment] = command_line(stage.bundle.path, out.absolute(), segment, files)
        if saved.left_out:
            why = f"their inputs and outputs are larger than is written: {', '.join(saved.left_out)}"
            stage.skip("some segments by Polygraphy's command line", why)


def find_first(stage: Stage, step: Comparison | None) -> None:
    """Find where the executor leaves eager if the comparison of segments has not found it."""
    certificate = stage.certificate
    if stage.reference not in stage.traces or stage.low:
        return
    rollout = next((c for c in certificate.comparisons if c.name == "rollout" and c.candidate == stage.eager), None)
    if certificate.bisected is None and rollout is not None and not rollout.passed and stage.eager in stage.traces:
        certificate.bisected = _bisect_eager(stage)
    if certificate.bisected is None and step is not None:
        certificate.bisected = _bisect_step(step)


def _bisect_eager(stage: Stage) -> dict[str, Any] | None:
    """The first layer at which eager on P ranks leaves eager on one, according to the residual stream."""
    for place in stage.plan.places:
        (one,), every = stage.traces[stage.reference].forwards(place), stage.traces[stage.eager].forwards(place)
        values = {residual_name(n): (r, [f.residuals[n] for f in every]) for n, r in enumerate(one.residuals)}
        values["flow"] = one.outputs["flow"], [forward.outputs["flow"] for forward in every]
        for name, (expected, parts) in values.items():
            error = tensor_error(name, expected, torch.cat(parts)[: len(expected)])
            if not error:
                rank = error.index[0] // len(parts[0]) if error.index else 0
                where = {"chunk": place[0], "forward": place[1], "rank": rank}
                made_by = "what comes after the last residual value that agrees with one rank's"
                return where | {"segment": "eager on several ranks", "value": name} | _found(name, made_by)
    return None


def _bisect_step(comparison: Comparison) -> dict[str, Any] | None:
    """The first exchange or KV slot of a single step that leaves eager, where no segment by itself does."""
    wrong = comparison.first_wrong
    if wrong is None:
        return None
    value = str(wrong.where["value"])
    value = slots_name(value) if value.startswith(("k.", "v.")) else value
    made_by = "what the executor does around its graphs"
    return {**wrong.where, "segment": "the executor as it runs"} | _found(value, made_by)


def _found(value: str, made_by: str) -> dict[str, Any]:
    return {"part": describe(value), "made_by": made_by, "operations": [], "agreed_before": []}
