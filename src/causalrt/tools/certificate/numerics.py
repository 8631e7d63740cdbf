"""What is compared of a bundle's sides: rollouts, chunk steps, segments, rank processes; and where they part.

Float32: every tensor is within the tolerance of the reference, eager on one rank. Lower: the reference is eager on one rank in
float32 over the bundle's own weights, and the root mean square error of each kind of tensor is at most `EAGER_RATIO` times
that of eager on one rank in the bundle's precision; exchanges are still compared bit for bit.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from causalrt.engines.bundle import Bundle
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import OutOfMemoryError
from causalrt.export.options import Progress
from causalrt.runtime.memory import available_bytes
from causalrt.tools.certificate.attempt import attempt
from causalrt.tools.certificate.bisect import bisect_eager, bisect_step
from causalrt.tools.certificate.errors import Comparison, TensorError, precision_comparison, rms_by_group, tensor_error
from causalrt.tools.certificate.polygraphy_files import SavedSegments, command_line
from causalrt.tools.certificate.processes import play_in_processes
from causalrt.tools.certificate.record import Certificate, Check, NotChecked, Series
from causalrt.tools.certificate.rollouts import Played, RolloutPlan, recording_bytes
from causalrt.tools.certificate.runners import (
    RolloutRunner,
    StepRunner,
    compared,
    forwards_at,
    results_of,
    run,
    step_feed,
)
from causalrt.tools.certificate.segments import SegmentGraph, compare_segment, explain, run_segments, segment_comparison
from causalrt.tools.certificate.sides import Side, in_float32, on_one_rank, ranks_text, side_of
from causalrt.tools.certificate.transport import check_transport
from causalrt.tools.compare import EAGER_RATIO, TOLERANCE
from causalrt.tools.emulate import EngineGraphs, emulated_executor, rollout_view

LEAVING = (" flow", " x0", " latents")
"""Ends of the names of what leaves the ranks."""


class _Numerics:
    """One certificate's comparisons, in the order in which they are made."""

    def __init__(
        self, certificate: Certificate, bundle: Bundle, executor: str, plan: RolloutPlan, *, device: str, emulate: bool
    ) -> None:
        self.certificate, self.bundle, self.executor, self.plan = certificate, bundle, executor, plan
        self.device, self.emulate = device, emulate
        self.low = bundle.config.build.precision != "float32"
        self.world_size = bundle.config.build.world_size
        self.prompts = plan.prompts(bundle.config.model)
        self.played: dict[str, Played] = {}
        self.sides: dict[str, Side] = {}
        self.reference = ""
        self.yardstick = ""
        self.eager = ""
        self.candidate: str | None = None

    def make_sides(self, scratch: Path) -> None:
        """The reference, eager in this precision on one rank and on all, and the executor."""
        device, precision = (
            torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu"),
            self.bundle.config.build.precision,
        )
        one = on_one_rank(self.bundle)
        if self.low:
            wide = side_of("eager, 1 rank, float32", in_float32(one, scratch), "eager", device=device)
            self.sides[wide.name] = wide
        self.yardstick = f"eager, 1 rank{f', {precision}' if self.low else ''}"
        self.eager = f"eager, {ranks_text(self.world_size)}{f', {precision}' if self.low else ''}"
        self.sides[self.yardstick] = side_of(self.yardstick, one, "eager", device=device)
        self.reference = next(iter(self.sides))
        if self.world_size > 1:
            self.sides[self.eager] = side_of(self.eager, self.bundle, "eager", device=device)
        if self.executor == "eager":
            return
        why = self._no_threads()
        if why is not None:
            self.certificate.not_checked.append(
                NotChecked(what=f"exchanges, KV slots and single steps of {self.executor} from inside", why=why)
            )
            return
        self.candidate = f"{self.certificate.subject['executor']}, {ranks_text(self.world_size)}"
        if self.emulate:
            self.sides[self.candidate] = emulated_side(self.candidate, self.bundle, self.executor)
        else:
            self.sides[self.candidate] = side_of(self.candidate, self.bundle, self.executor, device=device)

    def _no_threads(self) -> str | None:
        """Why the executor's ranks cannot be threads of this process, if they cannot."""
        if self.world_size == 1 or self.emulate:
            return None
        if self.executor == "inductor":
            return "its exchanges are functional collectives inside the compiled graph, which exist between processes alone"
        if self.executor in FLAVOURS:
            return "each rank wants a GPU of its own, and a stream and a communicator there"
        return None

    def compare_rollouts(self, on_progress: Progress) -> None:
        """Each side generates by itself."""
        failed: dict[str, str] = {}
        for done, (name, side) in enumerate(self.sides.items()):
            on_progress("rollouts", done, len(self.sides))
            runner = RolloutRunner(side, self.prompts, self.plan, held_by=self.bundle.layout)
            work = functools.partial(run, [runner], [self.prompts])
            _, fault = attempt(f"the rollout of {name}", work)
            if runner.played is not None and not fault:
                self.played[name] = runner.played
            else:
                failed[name] = fault
        on_progress("rollouts", len(self.sides), len(self.sides))
        for name in [*self.sides][1:] if self.reference in self.played else [*self.sides]:
            if name in failed:
                self._add(
                    Comparison(
                        name="rollout",
                        reference=self.reference,
                        candidate=name,
                        rule="runs",
                        errors=(),
                        faults=(failed[name],),
                    )
                )
            elif self.reference in self.played and not (self.low and name == self.yardstick):
                self._compare_outputs("rollout", name, self.played[name].outputs)
        if self.low and self.yardstick in self.played and self.reference in self.played:
            self._add_series(self.yardstick, self.played[self.yardstick].outputs, ratio=EAGER_RATIO)

    def _compare_outputs(self, what: str, candidate: str, outputs: Mapping[str, torch.Tensor]) -> None:
        """A side's outputs against the reference's, by the rule of the precision."""
        expected = self.played[self.reference].outputs
        if what == "processes":
            expected = {name: value for name, value in expected.items() if name.endswith(LEAVING)}
        self._add_series(candidate, outputs)
        if not self.low:
            self._add_errors(what, self.reference, candidate, expected, outputs)
        elif self.yardstick in self.played:
            yardstick = {name: self.played[self.yardstick].outputs[name] for name in expected}
            self._add(
                precision_comparison(
                    name=what,
                    reference=self.reference,
                    candidate=candidate,
                    yardstick=self.yardstick,
                    ratio=EAGER_RATIO,
                    ours=rms_by_group(expected, outputs),
                    theirs=rms_by_group(expected, yardstick),
                )
            )

    def _add_errors(
        self,
        what: str,
        reference: str,
        candidate: str,
        expected: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
    ) -> None:
        results = results_of({reference: [expected], candidate: [outputs]})
        (errors,) = compared(results, reference=reference, candidate=candidate, tolerance=TOLERANCE)
        rule = f"every tensor within {TOLERANCE:.0e}"
        self._add(Comparison(name=what, reference=reference, candidate=candidate, rule=rule, errors=tuple(errors)))

    def _add_series(self, name: str, outputs: Mapping[str, torch.Tensor], *, ratio: float | None = None) -> None:
        """The picture's line of a side."""
        expected = self.played[self.reference].outputs
        errors: dict[int, float] = {}
        for chunk in range(self.plan.num_chunks):
            names = [name for name in expected if name.startswith(f"chunk {chunk} ") and name.endswith(LEAVING)]
            if self.low:
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
        self.certificate.series.append(Series(label=label, errors=errors, bound=ratio is not None))

    def compare_exchanges(self) -> None:
        """What the ranks of this process have moved, bit for bit."""
        if self.world_size == 1:
            return
        blocks, faults = 0, list[str]()
        for name, played in self.played.items():
            if len(played.tapes) == self.world_size:
                count, wrong = check_transport(
                    played.tapes, self.plan.places, num_layers=self.bundle.config.model.num_layers
                )
                blocks += count
                faults += [f"{name}: {fault}" for fault in wrong]
        found = f"{blocks} blocks arrived as they were sent, between threads"
        self.certificate.checks.append(Check(name="exchanges", count=blocks, found=found, faults=tuple(faults)))

    def compare_steps(self, on_progress: Progress) -> Comparison | None:
        """The executor's chunk steps, each fed with what eager had."""
        if not self._has_inside():
            return None
        eager, candidate = self.sides[self.eager], self.sides[self.candidate or ""]
        feeds = [step_feed(forwards_at(self.played[self.eager].tapes, place)) for place in self.plan.places]
        on_progress("chunk steps", 0, 1)
        runners = [StepRunner(side, feeds[0]) for side in (eager, candidate)]
        results, fault = attempt("a chunk step", lambda: run(runners, feeds))
        on_progress("chunk steps", 1, 1)
        errors: list[TensorError] = []
        if results is not None:
            lists = compared(results, reference=eager.name, candidate=candidate.name, tolerance=TOLERANCE)
            for place, found in zip(self.plan.places, lists, strict=True):
                errors += [_at_place(error, place) for error in found]
        comparison = Comparison(
            name="chunk step",
            reference=f"{eager.name}, fed alike",
            candidate=candidate.name,
            rule=f"every tensor within {TOLERANCE:.0e}",
            errors=tuple(errors),
            faults=(fault,) if fault else (),
        )
        self._add(comparison)
        return comparison

    def _has_inside(self) -> bool:
        """Whether the executor's single steps can be compared with eager's."""
        if self.candidate not in self.played or self.eager not in self.played:
            return False
        whole_slots = self.sides[self.candidate].executors[0].whole_slots
        why = None
        if self.low:
            why = "a lower precision has no tolerance for a single step; the rule is about whole rollouts"
        elif self.emulate:
            why = "one emulation plays all ranks"
        elif whole_slots:
            why = "it takes KV slots whole, in another order than eager's"
        if why is not None:
            self.certificate.not_checked.append(NotChecked(what=f"single chunk steps of {self.executor}", why=why))
        return why is None

    def compare_segments(
        self, folder: Path | None, out: Path | None, on_progress: Progress, *, always_bisect: bool
    ) -> None:
        """Each ONNX file by itself; where the first that differs does so."""
        if self.executor != "onnxruntime" or self.low or self.eager not in self.played:
            return
        saved = SavedSegments(folder) if folder is not None else None
        errors: list[TensorError] = []
        graphs: dict[str, SegmentGraph] = {}
        total = len(self.bundle.segments) + len(self.bundle.lone_segments)

        def every_segment() -> None:
            tapes, places = self.played[self.eager].tapes, self.plan.places
            for done, (graph, fed) in enumerate(run_segments(self.bundle, tapes, places)):
                on_progress("segments", done, total)
                graphs[graph.part.file] = graph
                errors.extend(compare_segment(graph, fed, tolerance=TOLERANCE, candidate=graph.part.file))
                if saved is not None:
                    saved.save(self.bundle.path / graph.part.file, fed[-1])
            on_progress("segments", total, total)

        _, fault = attempt("a segment by itself", every_segment)
        comparison = segment_comparison(
            errors, places=self.plan.places, tolerance=TOLERANCE, candidate="onnxruntime, each segment", fault=fault
        )
        self._add(comparison)
        wrong = comparison.first_wrong
        if wrong is None and always_bisect:
            wrong = comparison.worst
        if wrong is not None:
            self.certificate.bisected = explain(graphs[wrong.where["segment"]], wrong)
        if saved is not None and out is not None:
            for segment, files in saved.files.items():
                self.certificate.polygraphy[segment] = command_line(
                    self.bundle.path, out.absolute(), segment, files, tolerance=TOLERANCE
                )
            if saved.left_out:
                why = f"their inputs and outputs are larger than is written: {', '.join(saved.left_out)}"
                self.certificate.not_checked.append(
                    NotChecked(what="some segments by Polygraphy's command line", why=why)
                )

    def find_first(self, step: Comparison | None) -> None:
        """Where sides part, if the segments have not told."""
        certificate = self.certificate
        if self.reference not in self.played or self.low:
            return
        rollout = next((c for c in certificate.comparisons if c.name == "rollout" and c.candidate == self.eager), None)
        if certificate.bisected is None and rollout is not None and not rollout.passed and self.eager in self.played:
            certificate.bisected = bisect_eager(
                self.played[self.reference].tapes,
                self.played[self.eager].tapes,
                self.plan.places,
                self.bundle.layout,
                tolerance=TOLERANCE,
            )
        if certificate.bisected is None and step is not None:
            certificate.bisected = bisect_step(step)

    def compare_processes(self, on_progress: Progress, *, processes: bool) -> None:
        """The executor as users run it."""
        if not processes:
            self.certificate.not_checked.append(
                NotChecked(what="rank processes", why="they were left out by the caller")
            )
            return
        if self.emulate:
            why = "its engines want a GPU; only the graphs that they were built from were run"
            self.certificate.not_checked.append(
                NotChecked(what=f"rank processes and engines of {self.executor}", why=why)
            )
            return
        on_progress("rank processes", 0, 1)
        result, fault = attempt(
            "the rank processes' rollout",
            lambda: play_in_processes(self.bundle.path, self.executor, self.plan, self.prompts, device=self.device),
        )
        on_progress("rank processes", 1, 1)
        name = f"{self.executor}, {ranks_text(self.world_size)}, processes"
        if result is None:
            self._add(
                Comparison(
                    name="processes", reference=self.reference, candidate=name, rule="runs", errors=(), faults=(fault,)
                )
            )
            return
        outputs, exchanges = result
        if self.reference in self.played:
            self._compare_outputs("processes", name, outputs)
        if self.candidate in self.played and not self.low:
            threads = {key: value for key, value in self.played[self.candidate].outputs.items() if key in outputs}
            self._add_errors("processes", f"{self.candidate}, threads", name, threads, outputs)
        if self.world_size == 1:
            return
        faults = tuple(f"{check.name}: {check.fault}" for check in exchanges if check.fault)
        found = f"{len(exchanges)} exchanges of the rank processes moved each row where it belongs"
        self.certificate.checks.append(Check(name="canary", count=len(exchanges), found=found, faults=faults))
        if self.executor == "inductor":
            why = "they are in the compiled graph; the canary went through the process group that they use"
            self.certificate.not_checked.append(NotChecked(what="the canary in inductor's own exchanges", why=why))
        elif self.executor in FLAVOURS and self.bundle.engines[self.executor].collectives == "engine":
            why = (
                "a host cannot call exchanges inside an engine; the canary went through the communicator that they use"
            )
            self.certificate.not_checked.append(NotChecked(what="the canary in the engine's own exchanges", why=why))

    def _add(self, comparison: Comparison) -> None:
        self.certificate.comparisons.append(comparison)


def compare_sides(
    certificate: Certificate,
    bundle: Bundle,
    executor: str,
    plan: RolloutPlan,
    *,
    device: str,
    emulate: bool,
    always_bisect: bool,
    processes: bool,
    scratch: Path,
    folder: Path | None,
    out: Path | None,
    on_progress: Progress,
) -> None:
    """Fill in what is compared; see `certify` for the arguments.

    Raises:
        OutOfMemoryError: what is kept of the forwards would not fit.
        CausalRTError: an executor cannot run here.
    """
    needed, available = recording_bytes(bundle.config, bundle.layout, plan), available_bytes()
    if available is not None and needed > available:
        raise OutOfMemoryError(
            f"a certificate keeps about {needed / 2**30:.1f} GiB of tensors of {len(plan.places)} forwards, and "
            f"{available / 2**30:.1f} GiB are free; certify with fewer chunks (--chunks 1), or on a machine with more memory"
        )
    numerics = _Numerics(certificate, bundle, executor, plan, device=device, emulate=emulate)
    if plan.evicted_chunk is None or plan.evicted_chunk >= plan.num_chunks:
        why = "the window holds the whole horizon" if plan.evicted_chunk is None else "too few chunks; add --chunks"
        certificate.not_checked.append(NotChecked(what="a chunk after eviction", why=why))
    numerics.make_sides(scratch)
    numerics.compare_rollouts(on_progress)
    numerics.compare_exchanges()
    step = numerics.compare_steps(on_progress)
    numerics.compare_segments(folder, out, on_progress, always_bisect=always_bisect)
    numerics.find_first(step)
    numerics.compare_processes(on_progress, processes=processes)


def emulated_side(name: str, bundle: Bundle, flavour: str) -> Side:
    """The graphs that TensorRT parses, all ranks of them played by one."""
    graphs = EngineGraphs(
        folder=bundle.path,
        config=bundle.config,
        collectives="engine" if bundle.engines[flavour].collectives == "engine" else "runtime",
        parts=[asdict(part) for part in bundle.engine_parts],
        lone_parts=[asdict(part) for part in bundle.lone_engine_parts],
        fused=bundle.plugins,
    )
    config, layout = rollout_view(bundle.config)

    def make(collectives: object) -> Any:
        return emulated_executor(graphs, num_threads=torch.get_num_threads())

    return Side(name, replace(bundle, config=config, layout=layout), make)


def _at_place(error: TensorError, place: tuple[int, str]) -> TensorError:
    """A chunk step's error, said where it is."""
    value, _, rank = error.name.rpartition(", rank ")
    where = {"chunk": place[0], "forward": place[1], "rank": int(rank), "value": value}
    return replace(error, name=f"chunk {place[0]} {place[1]}, {error.name}", where=where)
