"""Predictions of the planner (`tools/plan`) for the GPU of this machine, to be shown beside measured figures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from causalrt.config import Config
from causalrt.measure.gpu_day.recorder import Recorder
from causalrt.tools.ops.work import StepWork, head_layout, step_work
from causalrt.tools.plan.assumptions import MEMORY, Bound, Estimate, over_bounds
from causalrt.tools.plan.hardware import GPUS, Gpu, known_gpu
from causalrt.tools.plan.roofline import GpuMachine, Lowering

STAND_IN = "h200"
"""The GPU that a dry run predicts for."""


@dataclass(frozen=True, slots=True)
class Planner:
    """Predictions for one GPU; all are None for a GPU that is not in the planner's table."""

    gpu: Gpu | None

    def step(self, config: Config, *, kv_rows: int, lowering: Lowering, fused_ops: bool) -> Estimate | None:
        """Milliseconds of a chunk step on one rank.

        Args:
            config: sizes and number of ranks.
            kv_rows: filled KV rows, the chunk's own included.
            lowering: `eager` for op by op, `engine` for one captured graph.
            fused_ops: whether self-attention is done by the fused ops.
        """
        work = _work(config, kv_rows, fused_ops=fused_ops)

        def milliseconds(machine: GpuMachine, bound: Bound) -> float:
            return 1e3 * machine.step_time(work, bound, slot_rows=config.slot_rows).total_s

        return self._estimate(milliseconds, lowering=lowering, fused_ops=fused_ops)

    def attention(self, config: Config, *, kv_rows: int) -> Estimate | None:
        """Milliseconds of one layer's self-attention by the fused op, in one launch."""
        work = _work(config, kv_rows, fused_ops=True)
        launch = tuple(each for each in work.attentions if each.over_slots)
        return self._estimate(lambda machine, bound: 1e3 * machine.attention_seconds(launch, bound), fused_ops=True)

    def copy_gb_s(self) -> Estimate | None:
        """Rate of a large copy in GB/s, reading and writing."""
        return None if self.gpu is None else MEMORY.scaled(self.gpu.memory_gbs)

    def decode(self, config: Config, *, first_chunk: bool) -> Estimate | None:
        """Milliseconds of one chunk through Wan's decoder."""
        video = config.video
        size, frames = (video.latent_height, video.latent_width), video.chunk_frames

        def milliseconds(machine: GpuMachine, bound: Bound) -> float:
            seconds = machine.decode_seconds(bound, latent_size=size, latent_frames=frames, first_chunk=first_chunk)
            return 1e3 * seconds

        return self._estimate(milliseconds)

    def exchange(self, config: Config, *, index: int) -> Estimate | None:
        """Microseconds of an all-to-all: the one before attention (0) or the one after it (1)."""
        exchange = _work(config, config.slot_rows, fused_ops=True).exchanges[index]
        ranks = config.build.world_size
        return self._estimate(lambda machine, bound: 1e6 * machine.exchange_seconds(exchange, ranks, bound))

    def _estimate(
        self, compute: Callable[[GpuMachine, Bound], float], *, lowering: Lowering = "engine", fused_ops: bool = False
    ) -> Estimate | None:
        if self.gpu is None:
            return None
        machine = GpuMachine(gpu=self.gpu, lowering=lowering, fused_ops=fused_ops)
        return over_bounds(lambda bound: compute(machine, bound))


def _work(config: Config, kv_rows: int, *, fused_ops: bool) -> StepWork:
    return step_work(config, head_layout(config, "balanced"), kv_rows=kv_rows, fused_ops=fused_ops)


def planner_for(recorder: Recorder) -> Planner:
    """The planner for the recorder's device, with a note that says which GPU it predicts for."""
    if recorder.dry_run:
        recorder.note(f"Predictions are those for an {GPUS[STAND_IN].name}; the times beside them are this CPU's.")
        return Planner(GPUS[STAND_IN])
    name = torch.cuda.get_device_name(recorder.device)
    gpu = known_gpu(name)
    if gpu is None:
        recorder.note(f"{name} is not in the planner's table ({', '.join(GPUS)}), so there are no predictions.")
    else:
        recorder.note(f"Predictions are the planner's for {gpu.name}, made before anything was measured on one.")
    return Planner(gpu)


def columns(estimate: Estimate | None, unit: str = "ms") -> dict[str, Any]:
    """Columns of a table: the prediction, and its range from the best to the worst assumptions."""
    if estimate is None:
        return {f"predicted {unit}": None, "range": None}
    low, high = sorted((estimate.best, estimate.worst))
    return {f"predicted {unit}": estimate.nominal, "range": f"{low:.4g} to {high:.4g}"}
