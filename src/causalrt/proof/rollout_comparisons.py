"""Rollouts of all sides against the reference, free-running: between threads, and by the real rank processes."""

import functools
import math
from collections.abc import Mapping

import torch

from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.progress import Progress
from causalrt.proof.attempt import attempt
from causalrt.proof.compare import EAGER_RATIO, TOLERANCE
from causalrt.proof.errors import Comparison, precision_comparison, rms_by_group, tensor_error
from causalrt.proof.processes import play_in_processes
from causalrt.proof.record import Check, NotChecked, Series
from causalrt.proof.runners import RolloutRunner, compared, results_of, run
from causalrt.proof.sides import ranks_text
from causalrt.proof.stage import Stage

LEAVING = (" flow", " x0", " latents")
"""Ends of the names of what leaves the ranks."""


def compare_rollouts(stage: Stage, on_progress: Progress) -> None:
    """Each side generates by itstage."""
    failed: dict[str, str] = {}
    for done, (name, side) in enumerate(stage.sides.items()):
        on_progress("rollouts", done, len(stage.sides))
        runner = RolloutRunner(side, stage.prompts, stage.plan, held_by=stage.bundle.layout)
        work = functools.partial(run, [runner], [stage.prompts])
        _, fault = attempt(f"the rollout of {name}", work)
        if runner.played is not None and not fault:
            stage.played[name] = runner.played
        else:
            failed[name] = fault
    on_progress("rollouts", len(stage.sides), len(stage.sides))
    for name in [*stage.sides][1:] if stage.reference in stage.played else [*stage.sides]:
        if name in failed:
            stage.certificate.comparisons.append(
                Comparison(
                    name="rollout",
                    reference=stage.reference,
                    candidate=name,
                    rule="runs",
                    errors=(),
                    faults=(failed[name],),
                )
            )
        elif stage.reference in stage.played and not (stage.low and name == stage.yardstick):
            _compare_outputs(stage, "rollout", name, stage.played[name].outputs)
    if stage.low and stage.yardstick in stage.played and stage.reference in stage.played:
        _add_series(stage, stage.yardstick, stage.played[stage.yardstick].outputs, ratio=EAGER_RATIO)


def compare_processes(stage: Stage, on_progress: Progress, *, processes: bool) -> None:
    """The executor as users run it."""
    if not processes:
        stage.certificate.not_checked.append(NotChecked(what="rank processes", why="they were left out by the caller"))
        return
    if stage.emulate:
        why = "its engines want a GPU; only the graphs that they were built from were run"
        stage.certificate.not_checked.append(
            NotChecked(what=f"rank processes and engines of {stage.executor}", why=why)
        )
        return
    on_progress("rank processes", 0, 1)
    result, fault = attempt(
        "the rank processes' rollout",
        lambda: play_in_processes(
            stage.bundle.path,
            stage.executor,
            stage.plan,
            stage.prompts,
            device=stage.device,
            cuda_graphs=stage.cuda_graphs,
        ),
    )
    on_progress("rank processes", 1, 1)
    name = f"{stage.executor}, {ranks_text(stage.world_size)}, processes"
    if result is None:
        stage.certificate.comparisons.append(
            Comparison(
                name="processes", reference=stage.reference, candidate=name, rule="runs", errors=(), faults=(fault,)
            )
        )
        return
    outputs, exchanges = result
    if stage.reference in stage.played:
        _compare_outputs(stage, "processes", name, outputs)
    if stage.candidate in stage.played and not stage.low:
        threads = {key: value for key, value in stage.played[stage.candidate].outputs.items() if key in outputs}
        _add_errors(stage, "processes", f"{stage.candidate}, threads", name, threads, outputs)
    if stage.world_size == 1:
        return
    faults = tuple(f"{check.name}: {check.fault}" for check in exchanges if check.fault)
    found = f"{len(exchanges)} exchanges of the rank processes moved each row where it belongs"
    stage.certificate.checks.append(Check(name="canary", count=len(exchanges), found=found, faults=faults))
    if stage.executor == "inductor":
        why = "they are in the compiled graph; the canary went through the process group that they use"
        stage.certificate.not_checked.append(NotChecked(what="the canary in inductor's own exchanges", why=why))
    elif stage.executor in FLAVOURS and stage.bundle.engines[stage.executor].collectives == "engine":
        why = "a host cannot call exchanges inside an engine; the canary went through the communicator that they use"
        stage.certificate.not_checked.append(NotChecked(what="the canary in the engine's own exchanges", why=why))


def _compare_outputs(stage: Stage, what: str, candidate: str, outputs: Mapping[str, torch.Tensor]) -> None:
    """A side's outputs against the reference's, by the rule of the precision."""
    expected = stage.played[stage.reference].outputs
    if what == "processes":
        expected = {name: value for name, value in expected.items() if name.endswith(LEAVING)}
    _add_series(stage, candidate, outputs)
    if not stage.low:
        _add_errors(stage, what, stage.reference, candidate, expected, outputs)
    elif stage.yardstick in stage.played:
        yardstick = {name: stage.played[stage.yardstick].outputs[name] for name in expected}
        stage.certificate.comparisons.append(
            precision_comparison(
                name=what,
                reference=stage.reference,
                candidate=candidate,
                yardstick=stage.yardstick,
                ratio=EAGER_RATIO,
                ours=rms_by_group(expected, outputs),
                theirs=rms_by_group(expected, yardstick),
            )
        )


def _add_errors(
    stage: Stage,
    what: str,
    reference: str,
    candidate: str,
    expected: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
) -> None:
    results = results_of({reference: [expected], candidate: [outputs]})
    (errors,) = compared(results, reference=reference, candidate=candidate, tolerance=TOLERANCE)
    rule = f"every tensor within {TOLERANCE:.0e}"
    stage.certificate.comparisons.append(
        Comparison(name=what, reference=reference, candidate=candidate, rule=rule, errors=tuple(errors))
    )


def _add_series(stage: Stage, name: str, outputs: Mapping[str, torch.Tensor], *, ratio: float | None = None) -> None:
    """The picture's line of a side."""
    expected = stage.played[stage.reference].outputs
    errors: dict[int, float] = {}
    for chunk in range(stage.plan.num_chunks):
        names = [name for name in expected if name.startswith(f"chunk {chunk} ") and name.endswith(LEAVING)]
        if stage.low:
            size = rms_by_group(
                {f"{name} all": expected[name] for name in names},
                {f"{name} all": outputs[name] for name in names if name in outputs},
            )
            errors[chunk] = size.get("all", math.inf) * (ratio or 1.0)
        else:
            errors[chunk] = max(
                tensor_error(name, expected[name], outputs.get(name), tolerance=TOLERANCE).error for name in names
            )
    label = f"{ratio} x {name}" if ratio is not None else name
    stage.certificate.series.append(Series(label=label, errors=errors, bound=ratio is not None))
