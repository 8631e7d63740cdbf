"""What is measured against what: executors on numbers of ranks, as far as this machine runs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from causalrt.config import Config
from causalrt.engines.bundle import open_bundle
from causalrt.engines.kinds import EXECUTORS, choose_device, executor_kind, precision_fault
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import ExecutorError, OutOfMemoryError
from causalrt.measure.bench.sources import BenchRequest, Source
from causalrt.runtime.memory import available_bytes, decoder_memory, predict_memory

MODES = {"on": [True], "off": [False], "both": [False, True]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One row of the benchmark.

    Attributes:
        name: of the row; on a CPU it ends in ranks x threads of each.
        executor: what runs the step.
        config: with the number of ranks.
        plugins: self-attention is the fused ops.
        cuda_graphs: steps are captured, where the executor can.
        threads: CPU threads of each rank.
        device: `cpu` or `cuda`.
        bundle: folder.
    """

    name: str
    executor: str
    config: Config
    plugins: bool
    cuda_graphs: bool
    threads: int
    device: str
    bundle: Path

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.config.build.world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A row that is not measured, and why."""

    executor: str
    world_size: int
    reason: str


def choose_sides(
    sources: Sequence[Source], wishes: BenchRequest, can: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Replica], list[LeftOut]]:
    """Rows to measure, and rows that cannot be.

    Args:
        sources: bundles.
        wishes: see there. What is asked for by name and cannot be is an error, the rest is left out.
        can: what the machine can run, as `tools/doctor.py` says it.

    Raises:
        ExecutorError: an executor is unknown, or was asked for and cannot run; or nothing can.
    """
    for name in wishes.executors or ():
        executor_kind(name)
    sides: list[Replica] = []
    left_out: list[LeftOut] = []
    for executor in dict.fromkeys(wishes.executors or EXECUTORS):
        for source in sources:
            ranks = source.config.build.world_size
            reason = why_not(executor, source, wishes.chosen_device, can)
            if reason is None:
                sides += _sides_of(executor, source, wishes)
            elif wishes.executors is not None and (wishes.world_sizes is not None or source.bundle is not None):
                raise ExecutorError(f"{executor} on {ranks} rank(s): {reason}")
            else:
                left_out.append(LeftOut(executor=executor, world_size=ranks, reason=reason))
    if not sides:
        raise ExecutorError(f"nothing to measure: {'; '.join(f'{each.executor}: {each.reason}' for each in left_out)}")
    names = [side.name for side in sides]
    sides = [replace(s, name=f"{s.name} {s.bundle}") if names.count(s.name) > 1 else s for s in sides]
    return sides, left_out


def why_not(executor: str, source: Source, device: str, can: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why an executor cannot run a bundle on the device; None if it can."""
    build_config = source.config.build
    if source.bundle is not None and (lacking := source.bundle.why_not(executor)) is not None:
        return lacking
    needs = {"eager": ["run eager"], "inductor": ["run inductor"], "onnxruntime": ["build and run onnxruntime"]}
    wanted = list(needs.get(executor, [f"run {executor} engines"]))
    if executor in FLAVOURS and source.bundle is None:
        wanted.append(f"build {executor} engines")
    if build_config.world_size > 1:
        wanted.append("run several ranks on GPUs" if device == "cuda" else "run several ranks on CPUs")
    for need in wanted:
        if not can[need]["ok"]:
            return str(can[need]["detail"])
    if (fault := precision_fault(executor, build_config.precision, device)) is not None:
        return fault
    try:
        choose_device(executor, asked=device, world_size=build_config.world_size)
    except ExecutorError as error:
        return str(error)
    return None


def _sides_of(executor: str, source: Source, wishes: BenchRequest) -> list[Replica]:
    ranks, device = source.config.build.world_size, wishes.chosen_device
    threads = max(1, wishes.all_threads // ranks)
    where = f"{ranks}x{threads}" if device == "cpu" else f"P={ranks}"
    relative = source.config.video.time_index == "relative"
    if executor_kind(executor).compiled or wishes.plugins is None or relative:
        modes = [source.plugins]
    else:
        modes = MODES[wishes.plugins]
    captures = executor_kind(executor).warms_up and device == "cuda"
    graphs = MODES[wishes.cuda_graphs] if captures else [False]
    return [
        Replica(
            name=f"{executor}{'+plugins' if fused else ''}{'-graphs' if captures and not graph else ''} {where}",
            executor=executor,
            config=source.config,
            plugins=fused,
            cuda_graphs=graph,
            threads=threads,
            device=device,
            bundle=source.path,
        )
        for fused in modes
        for graph in graphs
    ]


def check_all_fit(sides: Sequence[Replica], *, vae: bool) -> None:
    """Refuse sides that do not fit on the host together; on GPUs each rank looks for itself.

    Raises:
        OutOfMemoryError: with the sides' needs, and what to do.
    """
    available = available_bytes()
    if available is None or sides[0].device != "cpu":
        return
    needs = {side.name: _needed_bytes(side, vae=vae) for side in sides}
    if sum(needs.values()) > available:
        each = ", ".join(f"{name} {needed / 2**30:.2f}" for name, needed in needs.items())
        raise OutOfMemoryError(
            f"all sides stay loaded side by side, which needs {sum(needs.values()) / 2**30:.2f} GiB, and "
            f"{available / 2**30:.2f} are free (GiB: {each}); name fewer with --executors or --world-sizes, or take a smaller "
            "--recipe"
        )


def _needed_bytes(side: Replica, *, vae: bool) -> int:
    memory, ranks = predict_memory(side.config, side.executor), side.world_size
    shared = 0 if executor_kind(side.executor).compiled else memory.weights_bytes * (ranks - 1)
    decoder = 0
    if vae:
        bundle = open_bundle(side.bundle, verify=False)
        decoder = decoder_memory(bundle, "eager").total_bytes if bundle.vae is not None else 0
    return memory.total_bytes * ranks - shared + decoder
