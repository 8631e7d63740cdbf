"""What the comparisons of a certificate share: sides, their rollouts, and the certificate that they fill in."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from causalrt.engines.bundle import Bundle
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.proof.emulate import EngineGraphs, emulated_executor, rollout_view
from causalrt.proof.record import Certificate, NotChecked
from causalrt.proof.rollouts import RolloutPlan, RolloutTrace
from causalrt.proof.sides import Replica, in_float32, on_one_rank, ranks_device, ranks_text, side_of


@dataclass(kw_only=True, slots=True)
class Stage:
    """Everything that is compared.

    Attributes:
        certificate: to fill in.
        bundle: that is certified.
        executor: that is certified.
        plan: of every rollout.
        device: `cpu` or `cuda`.
        emulate: run the graphs of TensorRT's engines.
        cuda_graphs: capture steps on a GPU.
        sides: by name, the reference first.
        played: the rollouts of sides that could make one.
        reference: name of the side that is right: eager on one rank, in float32.
        yardstick: eager on one rank in the bundle's precision; in float32 the reference.
        eager: eager on all ranks.
        candidate: the executor, where its ranks can be threads.
    """

    certificate: Certificate
    bundle: Bundle
    executor: str
    plan: RolloutPlan
    device: str
    emulate: bool
    cuda_graphs: bool
    sides: dict[str, Replica] = field(default_factory=dict)
    played: dict[str, RolloutTrace] = field(default_factory=dict)
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

    @property
    def prompts(self) -> dict[str, torch.Tensor]:
        """Of every rollout, by name."""
        return self.plan.prompts(self.bundle.config.model)


def make_sides(stage: Stage, scratch: Path) -> None:
    """The reference, eager in this precision on one rank and on all, and the executor."""
    device = ranks_device(stage.device)
    kind = f", {stage.bundle.config.build.precision}" if stage.low else ""
    one = on_one_rank(stage.bundle)
    if stage.low:
        wide = side_of("eager, 1 rank, float32", in_float32(one, scratch), "eager", device=device)
        stage.sides[wide.name] = wide
    stage.yardstick, stage.eager = f"eager, 1 rank{kind}", f"eager, {ranks_text(stage.world_size)}{kind}"
    stage.sides[stage.yardstick] = side_of(stage.yardstick, one, "eager", device=device)
    stage.reference = next(iter(stage.sides))
    if stage.world_size > 1:
        stage.sides[stage.eager] = side_of(stage.eager, stage.bundle, "eager", device=device)
    if stage.executor == "eager":
        return
    why = _no_threads(stage)
    if why is not None:
        stage.certificate.not_checked.append(
            NotChecked(what=f"exchanges, KV slots and single steps of {stage.executor} from inside", why=why)
        )
        return
    stage.candidate = f"{stage.certificate.subject['executor']}, {ranks_text(stage.world_size)}"
    if stage.emulate:
        stage.sides[stage.candidate] = emulated_side(stage.candidate, stage.bundle, stage.executor)
    else:
        stage.sides[stage.candidate] = side_of(
            stage.candidate, stage.bundle, stage.executor, device=device, cuda_graphs=stage.cuda_graphs
        )


def _no_threads(stage: Stage) -> str | None:
    """Why the executor's ranks cannot be threads of this process, if they cannot."""
    if stage.world_size == 1 or stage.emulate:
        return None
    if stage.executor == "inductor":
        return "its exchanges are functional collectives inside the compiled graph, which exist between processes alone"
    if stage.executor in FLAVOURS:
        return "each rank wants a GPU of its own, and a stream and a communicator there"
    return None


def emulated_side(name: str, bundle: Bundle, flavour: str) -> Replica:
    """The graphs that TensorRT parses, all ranks of them played by one."""
    graphs = EngineGraphs(
        folder=bundle.path,
        config=bundle.config,
        collectives="engine" if bundle.engines[flavour].collectives == "engine" else "runtime",
        steps=[step.tensorrt for step in bundle.steps],
        fused=bundle.fused_ops,
    )
    config, layout = rollout_view(bundle.config)

    def make(collectives: object) -> Any:
        return emulated_executor(graphs, num_threads=torch.get_num_threads())

    return Replica(name, replace(bundle, config=config, layout=layout), make)
