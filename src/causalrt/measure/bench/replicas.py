"""What is measured: executors on numbers of ranks, as far as this machine can run them, over bundles of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from causalrt.config import BuildConfig, Config, override
from causalrt.control_groups import available_cpus
from causalrt.engines.bundle import VAE_WEIGHTS, WEIGHTS, Bundle, open_bundle
from causalrt.engines.kinds import EXECUTORS, choose_device, executor_kind, precision_fault
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import BundleError, ConfigError, ExecutorError, OutOfMemoryError
from causalrt.export.build import build, fused_ops_wanted
from causalrt.export.options import FusedOpsMode
from causalrt.export.random_weights import random_weights
from causalrt.measure.bench.arguments import BenchRequest
from causalrt.progress import Progress
from causalrt.runtime.memory import available_bytes, decoder_memory, predict_memory

MODES = {"on": [True], "off": [False], "both": [False, True]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A bundle; `bundle` is None if it is yet to be built with random weights, for the executors that are measured."""

    path: Path
    config: Config
    fused_ops: bool
    bundle: Bundle | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """An executor on a number of ranks: one row of the benchmark."""

    name: str
    executor: str
    config: Config
    fused_ops: bool
    cuda_graphs: bool
    threads: int
    device: str
    bundle: Path

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.config.build.world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A row that is not measured, with the reason."""

    executor: str
    world_size: int
    reason: str


def _device(request: BenchRequest) -> str:
    return request.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _threads(request: BenchRequest) -> int:
    return request.threads or available_cpus()


def bundles_of(request: BenchRequest) -> list[Source]:
    """Open the bundles of the request.

    Raises:
        BundleError: a bundle is damaged, or none was built for a number of ranks that is asked for.
        ConfigError: the bundles are not of one model.
    """
    paths = request.bundles
    if len({path.absolute() for path in paths}) < len(paths):
        raise ConfigError(f"a bundle is given twice: {', '.join(map(str, paths))}; leave one out")
    opened = [open_bundle(path, verify=False) for path in paths]
    for other in opened[1:]:
        _check_same_work(opened[0], other)
    built_for = [bundle.config.build.world_size for bundle in opened]
    for ranks in request.world_sizes or ():
        if ranks not in built_for:
            raise BundleError(
                f"no bundle for {ranks} rank(s): those given were built for {', '.join(map(str, built_for))}; build one with "
                f"`--world-size {ranks}`, or leave it out of --world-sizes"
            )
    return [
        Source(path=bundle.path, config=bundle.config, fused_ops=bundle.fused_ops, bundle=bundle)
        for bundle in opened
        if request.world_sizes is None or bundle.config.build.world_size in request.world_sizes
    ]


def _check_same_work(one: Bundle, other: Bundle) -> None:
    configs = [
        replace(bundle.config, build=BuildConfig(precision=bundle.config.build.precision)) for bundle in (one, other)
    ]
    hashes = [[bundle.hashes.get(name) for name in (WEIGHTS, VAE_WEIGHTS)] for bundle in (one, other)]
    if configs[0] != configs[1] or hashes[0] != hashes[1]:
        raise ConfigError(
            f"{one.path} and {other.path} are not the same work: bundles that are compared may differ in ranks and head plan "
            "only; build them from one checkpoint with the same settings"
        )


def sources_of(config: Config, request: BenchRequest, folder: Path) -> list[Source]:
    """Plan one bundle of a recipe for each number of ranks, to be built in `folder`."""
    if _device(request) == "cuda":
        usual = sorted({1, max(1, torch.cuda.device_count())})
    else:
        usual = [1, 2] if _threads(request) > 1 else [1]
    mode: FusedOpsMode = "on" if request.fused_ops == "on" else "auto"
    fused = fused_ops_wanted(mode, config, (), "onnx")
    return [
        Source(
            path=folder / f"ranks{ranks}",
            config=override(config, {"build.world_size": str(ranks)}),
            fused_ops=fused,
            bundle=None,
        )
        for ranks in dict.fromkeys(request.world_sizes or usual)
    ]


def build_random(
    sources: Sequence[Source], replicas: Sequence[Replica], folder: Path, *, seed: int, on_progress: Progress
) -> None:
    """Build the bundles that replicas need, all with the same random weights."""
    checkpoint = folder / "checkpoint.safetensors"
    model = sources[0].config.model
    save_file({f"model.{name}": tensor for name, tensor in random_weights(model, seed=seed)}, checkpoint)
    for source in sources:
        if names := [replica.executor for replica in replicas if replica.bundle == source.path]:
            build(
                source.config,
                checkpoint=checkpoint,
                out=source.path,
                executors=[name for name in dict.fromkeys(names) if executor_kind(name).compiled] or ["eager"],
                fused_ops="on" if source.fused_ops else "auto",
                on_progress=on_progress,
            )
    checkpoint.unlink()


def choose_replicas(
    sources: Sequence[Source], request: BenchRequest, can: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Replica], list[LeftOut]]:
    """Choose the rows to measure, and name the rows that cannot be measured here.

    Args:
        sources: the bundles.
        request: what to measure. A row that it asks for by name and that cannot run is an error; others are left out.
        can: what the machine can run, as `tools/doctor.py` reports it.

    Raises:
        ExecutorError: an executor is unknown, or was asked for and cannot run, or nothing can be measured.
    """
    for name in request.executors or ():
        executor_kind(name)
    replicas: list[Replica] = []
    left_out: list[LeftOut] = []
    for executor in dict.fromkeys(request.executors or EXECUTORS):
        for source in sources:
            ranks = source.config.build.world_size
            reason = why_not(executor, source, _device(request), can)
            if reason is None:
                replicas += _replicas_of(executor, source, request)
            elif request.executors is not None and (request.world_sizes is not None or source.bundle is not None):
                raise ExecutorError(f"{executor} on {ranks} rank(s): {reason}")
            else:
                left_out.append(LeftOut(executor=executor, world_size=ranks, reason=reason))
    if not replicas:
        raise ExecutorError(f"nothing to measure: {'; '.join(f'{each.executor}: {each.reason}' for each in left_out)}")
    names = [replica.name for replica in replicas]
    return [replace(r, name=f"{r.name} {r.bundle}") if names.count(r.name) > 1 else r for r in replicas], left_out


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


def _replicas_of(executor: str, source: Source, request: BenchRequest) -> list[Replica]:
    ranks, device = source.config.build.world_size, _device(request)
    threads = max(1, _threads(request) // ranks)
    where = f"{ranks}x{threads}" if device == "cpu" else f"P={ranks}"
    relative = source.config.video.time_index == "relative"
    if executor_kind(executor).compiled or request.fused_ops is None or relative:
        modes = [source.fused_ops]
    else:
        modes = MODES[request.fused_ops]
    captures = executor_kind(executor).warms_up and device == "cuda"
    graphs = MODES[request.cuda_graphs] if captures else [False]
    return [
        Replica(
            name=f"{executor}{'+fused' if fused else ''}{'-graphs' if captures and not graph else ''} {where}",
            executor=executor,
            config=source.config,
            fused_ops=fused,
            cuda_graphs=graph,
            threads=threads,
            device=device,
            bundle=source.path,
        )
        for fused in modes
        for graph in graphs
    ]


def check_all_fit(replicas: Sequence[Replica], *, vae: bool) -> None:
    """Refuse replicas that do not fit into host memory together; on GPUs each rank checks by itself.

    Raises:
        OutOfMemoryError: they do not fit; the message says what each needs.
    """
    available = available_bytes()
    if available is None or replicas[0].device != "cpu":
        return
    needs = {replica.name: _needed_bytes(replica, vae=vae) for replica in replicas}
    if sum(needs.values()) > available:
        each = ", ".join(f"{name} {needed / 2**30:.2f}" for name, needed in needs.items())
        raise OutOfMemoryError(
            f"all replicas stay loaded side by side, which needs {sum(needs.values()) / 2**30:.2f} GiB, and "
            f"{available / 2**30:.2f} are free (GiB: {each}); name fewer with --executors or --world-sizes, or take a smaller "
            "--recipe"
        )


def _needed_bytes(replica: Replica, *, vae: bool) -> int:
    memory, ranks = predict_memory(replica.config, replica.executor), replica.world_size
    shared = 0 if executor_kind(replica.executor).compiled else memory.weights_bytes * (ranks - 1)
    decoder = 0
    if vae:
        bundle = open_bundle(replica.bundle, verify=False)
        decoder = decoder_memory(bundle, "eager").total_bytes if bundle.vae is not None else 0
    return memory.total_bytes * ranks - shared + decoder
