"""Replicas: an executor on all ranks of a model in this process.

bundle, executor name       replica_of               P ranks, one thread each
an executor                 replica_on               one rank, in the caller's thread
weights of a recording      eager_replica            one rank of eager, likewise
graphs for TensorRT         emulated_replica         one executor that runs all ranks of the graphs
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import load_file, save_file

from causalrt.config import Config
from causalrt.control_groups import available_cpus
from causalrt.engines.base import Executor
from causalrt.engines.bundle import WEIGHTS, Bundle, open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.make import make_executor
from causalrt.engines.streams import own_stream
from causalrt.export.build import build
from causalrt.layout import Layout, layout_from_config
from causalrt.proof.ranks import run_threads, thread_group
from causalrt.proof.trace import TracedCollectives, TracedExecutor
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.session_buffers import SessionBufferPool

if TYPE_CHECKING:
    from causalrt.proof.emulate import EngineGraphs

Result = TypeVar("Result")
MakeExecutor = Callable[[TracedCollectives], Executor]


class Replica:
    """Executors and collectives of all ranks.

    Attributes:
        name: what runs, in words.
        config: the config of its rollouts; its precision is that of the KV slots.
        layout: the layout of its rollouts.
        collectives: of each rank.
        executors: of each rank, once the replica is open.
        pools: session buffers of each rank, once the replica is open.
    """

    def __init__(
        self, name: str, config: Config, layout: Layout, make: MakeExecutor, *, with_residuals: bool = False
    ) -> None:
        self.name, self.config, self.layout = name, config, layout
        self.world_size = config.build.world_size
        self._group, self.collectives = thread_group(self.world_size, TracedCollectives)
        self.executors: list[TracedExecutor] = []
        self.pools: list[SessionBufferPool] = []
        self._make, self._with_residuals = make, with_residuals

    def open(self) -> None:
        """Make the executors, one after another; does nothing if they exist."""
        for collectives in self.collectives[len(self.executors) :]:
            executor = TracedExecutor(self._make(collectives), collectives, with_residuals=self._with_residuals)
            self.executors.append(executor)
            self.pools.append(SessionBufferPool(executor, self.config, self.layout))

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """Run `work` on every rank, with torch's threads shared among the ranks; returns the results in rank order."""
        self.open()
        if self.world_size == 1:
            return [work(0)]
        before = torch.get_num_threads()
        threads = max(1, before // self.world_size)

        def on_rank(rank: int) -> Result:
            torch.set_num_threads(threads)
            with own_stream(self.executors[rank].device):  # a stream is chosen per thread, and this thread is new
                return work(rank)

        try:
            return run_threads(self._group, on_rank)
        finally:
            torch.set_num_threads(before)  # threads started later inherit the last value set by any thread


def replica_of(name: str, bundle: Bundle, executor: str, *, device: torch.device, cuda_graphs: bool = True) -> Replica:
    """A replica that runs `executor` on a bundle, with the fused ops if the bundle was built with them."""
    cores = available_cpus()
    if executor == "inductor" and device.type == "cpu":
        from causalrt.engines.inductor import check_can_compile

        check_can_compile()

    def make(collectives: TracedCollectives) -> Executor:
        if executor == "onnxruntime":
            from causalrt.engines.onnxruntime import OnnxRuntimeExecutor

            threads = max(1, cores // bundle.config.build.world_size)
            return OnnxRuntimeExecutor(bundle, collectives, num_threads=threads, device=device, own_threads=True)
        return make_executor(
            executor,
            bundle,
            collectives,
            num_threads=cores,
            device=device,
            fused_ops=bundle.fused_ops,
            cuda_graphs=cuda_graphs,
        )

    return Replica(name, bundle.config, bundle.layout, make, with_residuals=executor == "eager")


def replica_on(executor: Executor, config: Config, layout: Layout) -> Replica:
    """A replica of one rank that runs an executor of the caller's."""
    return Replica(type(executor).__name__, config, layout, lambda collectives: executor)


def eager_replica(config: Config, *, checkpoint: Path, folder: Path) -> Replica:
    """Eager on one rank, in the precision of `config`; its bundle is written to `folder`."""
    config = replace(config, build=replace(config.build, world_size=1))
    bundle = open_bundle(build(config, checkpoint=checkpoint, out=folder, executors=["eager"]))
    return replica_on(
        EagerExecutor(bundle, LocalCollectives(), device=torch.device("cpu")), bundle.config, bundle.layout
    )


def emulated_replica(name: str, graphs: "EngineGraphs", *, num_threads: int = 1) -> Replica:
    """The graphs that TensorRT parses, run by ONNX Runtime: one executor computes all ranks."""
    from causalrt.proof.emulate import emulated_executor, rollout_view  # needs ONNX Runtime, which may be missing

    config, layout = rollout_view(graphs.config)
    return Replica(name, config, layout, lambda collectives: emulated_executor(graphs, num_threads=num_threads))


def ranks_device(kind: str) -> torch.device:
    """The device that all ranks of this process share."""
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def ranks_text(world_size: int) -> str:
    """The number of ranks in words."""
    return f"{world_size} rank{'s' if world_size > 1 else ''}"


def on_one_rank(bundle: Bundle) -> Bundle:
    """The bundle's weights and sizes on one rank, for executors that need no graphs."""
    config = replace(bundle.config, build=replace(bundle.config.build, world_size=1))
    return replace(bundle, config=config, layout=layout_from_config(config))


def in_float32(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle's weights converted to float32 and written to `folder`, for eager."""
    weights = {name: tensor.float() for name, tensor in load_file(bundle.path / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    config = replace(bundle.config, build=replace(bundle.config.build, precision="float32"))
    return replace(bundle, path=folder, config=config)
