"""Comparisons of whole rollouts: of replicas in this process, and of the executor in its rank processes.

In float32 every tensor must be within the tolerance of the reference, eager on one rank. In a lower precision the reference is
eager on one rank in float32 over the bundle's own weights, and the root mean square error of each kind of tensor must be at
most `EAGER_RATIO` times that of eager on one rank in the bundle's precision. Exchanges must be exact in every precision.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from causalrt.engines.bundle import Bundle
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import OutOfMemoryError
from causalrt.progress import Progress
from causalrt.proof.certificate import Certificate, Check, NotChecked, Series, attempt
from causalrt.proof.differences import (
    CERTIFIED,
    EAGER_RATIO,
    Comparison,
    differences,
    precision_comparison,
    relative_rms,
    rms_by_kind,
)
from causalrt.proof.emulate import bundle_graphs
from causalrt.proof.replica import (
    Replica,
    emulated_replica,
    in_float32,
    on_one_rank,
    ranks_device,
    ranks_text,
    replica_of,
)
from causalrt.proof.rollouts import Outputs, play_session
from causalrt.proof.trace import exchange_name
from causalrt.proof.traced_rollout import RolloutPlan, RolloutTrace, trace_bytes, trace_rollout
from causalrt.runtime.canary import ExchangeCheck
from causalrt.runtime.load import load
from causalrt.runtime.memory import available_bytes

LEAVING = (" flow", " x0", " latents")
"""Endings of the names of outputs that leave the ranks."""


@dataclass(kw_only=True, slots=True)
class Stage:
    """What the comparisons of one certificate share.

    Attributes:
        certificate: the certificate to fill in.
        bundle: the bundle that is certified.
        executor: the executor that is certified.
        plan: of every rollout.
        device: `cpu` or `cuda`.
        emulate: run the graphs of TensorRT's engines by ONNX Runtime.
        cuda_graphs: capture steps on a GPU.
        replicas: by name, the reference first.
        traces: the rollouts of replicas that ran, by name.
        reference: name of the replica that is taken to be right: eager on one rank, in float32.
        yardstick: name of eager on one rank in the bundle's precision; in float32 it is the reference.
        eager: name of eager on all ranks.
        candidate: name of the executor's replica, if its ranks can be threads.
    """

    certificate: Certificate
    bundle: Bundle
    executor: str
    plan: RolloutPlan
    device: str
    emulate: bool
    cuda_graphs: bool
    replicas: dict[str, Replica] = field(default_factory=dict)
    traces: dict[str, RolloutTrace] = field(default_factory=dict)
    reference: str = ""
    yardstick: str = ""
    eager: str = ""
    candidate: str | None = None

    @property
    def low(self) -> bool:
        """The bundle computes in less than float32."""
        return self.bundle.config.build.precision != "float32"

    @property
    def world_size(self) -> int:
        """Ranks of the bundle."""
        return self.bundle.config.build.world_size

    def skip(self, what: str, why: str) -> None:
        """Note in the certificate that something was not checked."""
        self.certificate.not_checked.append(NotChecked(what=what, why=why))

    def check_memory(self) -> None:
        """Refuse traces that would not fit in memory.

        Raises:
            OutOfMemoryError: they would not fit.
        """
        needed, available = trace_bytes(self.bundle.config, self.bundle.layout, self.plan), available_bytes()
        if available is not None and needed > available:
            raise OutOfMemoryError(
                f"a certificate keeps about {needed / 2**30:.1f} GiB of tensors of {len(self.plan.places)} forwards, and "
                f"{available / 2**30:.1f} GiB are free; certify with fewer chunks (--chunks 1), or on a machine with more "
                "memory"
            )


def make_replicas(stage: Stage, scratch: Path) -> None:
    """Make eager on one rank and on all ranks in the bundle's precision, the reference, and the executor."""
    device = ranks_device(stage.device)
    kind = f", {stage.bundle.config.build.precision}" if stage.low else ""
    one = on_one_rank(stage.bundle)
    stage.yardstick, stage.eager = f"eager, 1 rank{kind}", f"eager, {ranks_text(stage.world_size)}{kind}"
    made = [replica_of(stage.yardstick, one, "eager", device=device)]
    if stage.low:
        made.insert(0, replica_of("eager, 1 rank, float32", in_float32(one, scratch), "eager", device=device))
    stage.reference = made[0].name
    if stage.world_size > 1:
        made.append(replica_of(stage.eager, stage.bundle, "eager", device=device))
    why = _no_threads(stage)
    if why is not None:
        stage.skip(f"exchanges, KV slots and single steps of {stage.executor} from inside", why)
    elif stage.executor != "eager":
        stage.candidate = f"{stage.certificate.subject['executor']}, {ranks_text(stage.world_size)}"
        if stage.emulate:
            graphs = bundle_graphs(stage.bundle, stage.executor)
            made.append(emulated_replica(stage.candidate, graphs, num_threads=torch.get_num_threads()))
        else:
            graphs_on = stage.cuda_graphs
            made.append(replica_of(stage.candidate, stage.bundle, stage.executor, device=device, cuda_graphs=graphs_on))
    stage.replicas = {replica.name: replica for replica in made}


def _no_threads(stage: Stage) -> str | None:
    """Why the executor's ranks cannot be threads of this process; None if they can."""
    if stage.world_size == 1 or stage.emulate:
        return None
    if stage.executor == "inductor":
        return "its exchanges are functional collectives inside the compiled graph, which exist between processes alone"
    if stage.executor in FLAVOURS:
        return "each rank wants a GPU of its own, and a stream and a communicator there"
    return None


def compare_rollouts(stage: Stage, on_progress: Progress) -> None:
    """Run every replica free and compare its rollout with the reference's."""
    failed: dict[str, str] = {}
    for done, (name, replica) in enumerate(stage.replicas.items()):
        on_progress("rollouts", done, len(stage.replicas))
        work = functools.partial(trace_rollout, replica, stage.plan, held_by=stage.bundle.layout)
        trace, fault = attempt(f"the rollout of {name}", work)
        if trace is None:
            failed[name] = fault
        else:
            stage.traces[name] = trace
    on_progress("rollouts", len(stage.replicas), len(stage.replicas))
    for name in [*stage.replicas][1:] if stage.reference in stage.traces else [*stage.replicas]:
        if name in failed:
            _add_failure(stage, "rollout", name, failed[name])
        elif stage.reference in stage.traces and not (stage.low and name == stage.yardstick):
            _compare_outputs(stage, "rollout", name, stage.traces[name].outputs)
    if stage.low and stage.yardstick in stage.traces and stage.reference in stage.traces:
        _add_series(stage, stage.yardstick, stage.traces[stage.yardstick].outputs, ratio=EAGER_RATIO)


def compare_exchanges(stage: Stage) -> None:
    """Check bit for bit that every traced block arrived as it was sent, between ranks of this process."""
    if stage.world_size == 1:
        return
    blocks, faults = 0, list[str]()
    for name, trace in stage.traces.items():
        if len(trace.traces) == stage.world_size:
            for count, fault in _exchanged_blocks(trace, stage.plan, stage.bundle.config.model.num_layers):
                blocks += count
                faults += [f"{name}: {fault}"] if fault else []
    found = f"{blocks} blocks arrived as they were sent, between threads"
    stage.certificate.checks.append(Check(name="exchanges", count=blocks, found=found, faults=tuple(faults)))


def _exchanged_blocks(trace: RolloutTrace, plan: RolloutPlan, num_layers: int) -> Iterator[tuple[int, str]]:
    """For each block of each traced exchange (1, what is wrong with it or ""); (0, fault) for a missing exchange."""
    for place in plan.places:
        outputs = [forward.outputs for forward in trace.forwards(place)]
        for name in map(exchange_name, range(2 * num_layers)):
            at = f"chunk {place[0]} {place[1]}, {name}"
            if any(f"{name} sent" not in found for found in outputs):
                yield 0, f"{at}: there was no such exchange"
                continue
            sent = [found[f"{name} sent"] for found in outputs]
            for rank, found in enumerate(outputs):
                for source, got in enumerate(found[f"{name} received"]):
                    right = _same(got, sent[source][rank])
                    wrong = f"rank {rank} has {_origin(got, sent)} in the place of what rank {source} sent it"
                    yield 1, "" if right else f"{at}: {wrong}"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _origin(block: torch.Tensor, sent: Sequence[torch.Tensor]) -> str:
    for source, blocks in enumerate(sent):
        for destination, other in enumerate(blocks):
            if _same(block, other):
                return f"what rank {source} sent rank {destination}"
    return "something that no rank sent"


def compare_processes(stage: Stage, on_progress: Progress) -> None:
    """Run the rollout in the executor's rank processes, and the exchange self-test in their collectives."""
    on_progress("rank processes", 0, 1)
    result, fault = attempt("the rank processes' rollout", lambda: _play_in_processes(stage))
    on_progress("rank processes", 1, 1)
    name = f"{stage.executor}, {ranks_text(stage.world_size)}, processes"
    if result is None:
        _add_failure(stage, "processes", name, fault)
        return
    outputs, exchanges = result
    if stage.reference in stage.traces:
        _compare_outputs(stage, "processes", name, outputs)
    if stage.candidate in stage.traces and not stage.low:
        threads = {key: value for key, value in stage.traces[stage.candidate].outputs.items() if key in outputs}
        _add_errors(stage, "processes", f"{stage.candidate}, threads", name, threads, outputs)
    if stage.world_size == 1:
        return
    faults = tuple(f"{check.name}: {check.fault}" for check in exchanges if check.fault)
    found = f"{len(exchanges)} exchanges of the rank processes moved each row where it belongs"
    stage.certificate.checks.append(Check(name="canary", count=len(exchanges), found=found, faults=faults))
    if stage.executor == "inductor":
        why = "they are in the compiled graph; the canary went through the process group that they use"
        stage.skip("the canary in inductor's own exchanges", why)
    elif stage.executor in FLAVOURS and stage.bundle.engines[stage.executor].collectives == "engine":
        why = "a host cannot call exchanges inside an engine; the canary went through the communicator that they use"
        stage.skip("the canary in the engine's own exchanges", why)


def _play_in_processes(stage: Stage) -> tuple[Outputs, list[ExchangeCheck]]:
    with load(
        stage.bundle, executor=stage.executor, device=stage.device, cuda_graphs=stage.cuda_graphs, vae=False
    ) as engine:
        checks = engine.check_exchanges()
        return play_session(engine, stage.plan.spec(engine.config.model)), checks


def _compare_outputs(stage: Stage, what: str, candidate: str, outputs: Mapping[str, torch.Tensor]) -> None:
    """Compare outputs with the reference's by the rule of the bundle's precision."""
    expected: Mapping[str, torch.Tensor] = stage.traces[stage.reference].outputs
    if what == "processes":
        expected = {name: value for name, value in expected.items() if name.endswith(LEAVING)}
    _add_series(stage, candidate, outputs)
    if not stage.low:
        _add_errors(stage, what, stage.reference, candidate, expected, outputs)
    elif stage.yardstick in stage.traces:
        yardstick = {name: stage.traces[stage.yardstick].outputs[name] for name in expected}
        stage.certificate.comparisons.append(
            precision_comparison(
                name=what,
                reference=stage.reference,
                candidate=candidate,
                yardstick=stage.yardstick,
                ours=rms_by_kind(expected, outputs),
                theirs=rms_by_kind(expected, yardstick),
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
    errors = tuple(differences(expected, outputs))
    stage.certificate.comparisons.append(
        Comparison(name=what, reference=reference, candidate=candidate, rule=CERTIFIED.text, errors=errors)
    )


def _add_failure(stage: Stage, what: str, candidate: str, fault: str) -> None:
    stage.certificate.comparisons.append(
        Comparison(name=what, reference=stage.reference, candidate=candidate, rule="runs", errors=(), faults=(fault,))
    )


def _add_series(stage: Stage, name: str, outputs: Mapping[str, torch.Tensor], *, ratio: float | None = None) -> None:
    """Add a replica's error by chunk to the picture; `ratio` makes it the limit of the others."""
    expected = stage.traces[stage.reference].outputs
    errors: dict[int, float] = {}
    for chunk in range(stage.plan.num_chunks):
        wanted = {
            name: value
            for name, value in expected.items()
            if name.startswith(f"chunk {chunk} ") and name.endswith(LEAVING)
        }
        got = {name: outputs[name] for name in wanted if name in outputs}
        if stage.low:
            errors[chunk] = relative_rms((value, got.get(name)) for name, value in wanted.items()) * (ratio or 1.0)
        else:
            errors[chunk] = max(error.error for error in differences(wanted, got))
    label = f"{ratio} x {name}" if ratio is not None else name
    stage.certificate.series.append(Series(label=label, errors=errors, bound=ratio is not None))
