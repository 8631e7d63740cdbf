"""A side: an executor on all ranks of a bundle, as threads of this process; and the bundles that references run on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

from causalrt.control_groups import available_cpus
from causalrt.engines.base import Executor
from causalrt.engines.bundle import WEIGHTS, Bundle
from causalrt.engines.make import make_executor
from causalrt.engines.streams import own_stream
from causalrt.layout import layout_from_config
from causalrt.proof.ranks import meet, run_threads
from causalrt.proof.watch import WatchedCollectives, WatchedExecutor

Result = TypeVar("Result")
MakeExecutor = Callable[[WatchedCollectives], Executor]


class Replica:
    """Executors and collectives of P ranks, all in this process.

    Attributes:
        name: in words.
        bundle: that it runs.
        collectives: of each rank.
        executors: of each rank, once it is open.
    """

    def __init__(self, name: str, bundle: Bundle, make: MakeExecutor, *, watches_residuals: bool = False) -> None:
        self.name, self.bundle = name, bundle
        self.world_size = bundle.config.build.world_size
        self.meeting, self.collectives = meet(self.world_size, WatchedCollectives)
        self.executors: list[WatchedExecutor] = []
        self._make, self._watches_residuals = make, watches_residuals

    def open(self) -> None:
        """Make the executors, one after another; harmless when called again."""
        for collectives in self.collectives[len(self.executors) :]:
            executor = WatchedExecutor(self._make(collectives), collectives)
            executor.watches_residuals = self._watches_residuals
            self.executors.append(executor)

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """`work` on every rank; the threads that torch may take here are shared among them."""
        before = torch.get_num_threads()
        threads = max(1, before // self.world_size)

        def on_rank(rank: int) -> Result:
            torch.set_num_threads(threads)
            with own_stream(self.executors[rank].device):  # the thread is new
                return work(rank)

        try:
            return run_threads(self.meeting, on_rank)
        finally:
            torch.set_num_threads(before)  # what a thread sets, later threads begin with


def side_of(name: str, bundle: Bundle, executor: str, *, device: torch.device, cuda_graphs: bool = True) -> Replica:
    """A side that runs `executor`, by fused ops where the bundle was built so."""
    cores = available_cpus()
    if executor == "inductor" and device.type == "cpu":
        from causalrt.engines.inductor import check_can_compile

        check_can_compile()

    def make(collectives: WatchedCollectives) -> Executor:
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

    return Replica(name, bundle, make, watches_residuals=executor == "eager")


def ranks_device(kind: str) -> torch.device:
    """The one device of all ranks of this process."""
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def ranks_text(world_size: int) -> str:
    """So many ranks, in words."""
    return f"{world_size} rank{'s' if world_size > 1 else ''}"


def on_one_rank(bundle: Bundle) -> Bundle:
    """The same weights and sizes on one rank, for executors that need no graphs."""
    config = replace(bundle.config, build=replace(bundle.config.build, world_size=1))
    return replace(bundle, config=config, layout=layout_from_config(config))


def in_float32(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle's own weights as float32, written to `folder`; for eager alone."""
    weights = {name: tensor.float() for name, tensor in load_file(bundle.path / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    config = replace(bundle.config, build=replace(bundle.config.build, precision="float32"))
    return replace(bundle, path=folder, config=config)
