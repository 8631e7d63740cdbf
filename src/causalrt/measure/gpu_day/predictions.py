"""What the planner (`tools/plan`) predicts of the GPU at hand, to stand beside what is measured on it."""

from dataclasses import dataclass
from typing import Any

import torch

from causalrt.config import Config
from causalrt.measure.gpu_day.book import Book
from causalrt.tools.plan import assumptions
from causalrt.tools.plan.hardware import GPUS, Gpu
from causalrt.tools.plan.head_layouts import head_layout
from causalrt.tools.plan.roofline import GpuMachine, Lowering
from causalrt.tools.plan.spans import Estimate, over_cases
from causalrt.tools.plan.work import StepWork, step_work

STAND_IN = "h200"
"""Predicted for in a dry run, where there is no GPU."""


def known_gpu(name: str) -> Gpu | None:
    """The GPU of the planner's table that torch's name of a device means; None if there is none."""
    plain = name.lower().replace(" ", "").replace("-", "")
    return next((gpu for key, gpu in GPUS.items() if key in plain), None)


@dataclass(frozen=True, slots=True)
class Planner:
    """Predictions for one GPU; for one that is not in the planner's table there are none (None)."""

    gpu: Gpu | None

    def step(self, config: Config, *, kv_rows: int, lowering: Lowering, fused_ops: bool) -> Estimate | None:
        """Milliseconds of a chunk step on one rank.

        Args:
            config: sizes and number of ranks.
            kv_rows: filled KV rows, the chunk's own included.
            lowering: `eager` for op by op, `engine` for one captured graph.
            fused_ops: self-attention by the fused ops.
        """
        if self.gpu is None:
            return None
        machine = GpuMachine(gpu=self.gpu, lowering=lowering, fused_ops=fused_ops)
        work = self._work(config, kv_rows, fused_ops=fused_ops)
        return over_cases(lambda case: 1e3 * machine.step_time(work, case, slot_rows=config.slot_rows).total_s)

    def attention(self, config: Config, *, kv_rows: int) -> Estimate | None:
        """Milliseconds of one layer's self-attention by the fused op, in one launch."""
        if self.gpu is None:
            return None
        machine = GpuMachine(gpu=self.gpu, fused_ops=True)
        work = self._work(config, kv_rows, fused_ops=True)
        launch = tuple(each for each in work.attentions if each.over_slots)
        return over_cases(lambda case: 1e3 * machine.attention_seconds(launch, case))

    def copy_gb_s(self) -> Estimate | None:
        """Bytes read and written by a large copy, GB/s."""
        return None if self.gpu is None else assumptions.MEMORY.scaled(self.gpu.memory_gbs)

    def decode(self, config: Config, *, first_chunk: bool) -> Estimate | None:
        """Milliseconds of one chunk through Wan's decoder."""
        if self.gpu is None:
            return None
        machine, video = GpuMachine(gpu=self.gpu), config.video
        size = video.latent_height, video.latent_width
        return over_cases(
            lambda case: (
                1e3
                * machine.decode_seconds(
                    case, latent_size=size, latent_frames=video.chunk_frames, first_chunk=first_chunk
                )
            )
        )

    def exchange(self, config: Config, *, index: int) -> Estimate | None:
        """Microseconds of an all-to-all: the one before attention (0) or the one after it (1)."""
        if self.gpu is None:
            return None
        machine = GpuMachine(gpu=self.gpu)
        work = self._work(config, config.slot_rows, fused_ops=True)
        ranks = config.build.world_size
        return over_cases(lambda case: 1e6 * machine.exchange_seconds(work.exchanges[index], ranks, case))

    def _work(self, config: Config, kv_rows: int, *, fused_ops: bool) -> StepWork:
        return step_work(config, head_layout(config, "balanced"), kv_rows=kv_rows, fused_ops=fused_ops)


def planner_for(book: Book) -> Planner:
    """The planner of the device at hand; what its predictions are of is noted."""
    if book.dry_run:
        book.note(f"Predictions are those for an {GPUS[STAND_IN].name}; the times beside them are this CPU's.")
        return Planner(GPUS[STAND_IN])
    name = torch.cuda.get_device_name(book.device)
    gpu = known_gpu(name)
    if gpu is None:
        book.note(f"{name} is not in the planner's table ({', '.join(GPUS)}), so there are no predictions.")
    else:
        book.note(f"Predictions are the planner's for {gpu.name}, made before anything was measured on one.")
    return Planner(gpu)


def columns(span: Estimate | None, unit: str = "ms") -> dict[str, Any]:
    """Columns of a table: the prediction, and the range from the best to the worst assumptions."""
    if span is None:
        return {f"predicted {unit}": None, "range": None}
    low, high = sorted((span.best, span.worst))
    return {f"predicted {unit}": span.nominal, "range": f"{low:.4g} to {high:.4g}"}
