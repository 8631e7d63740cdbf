"""The request of `causalrt plan`, which is its command line; importing it is cheap, unlike importing what computes a plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import mutually_exclusive

from causalrt.options import FUSED_OPS, INPUT, OUTPUT, Dtype, Json, OnOff, Overrides, RecipeName
from causalrt.tools.plan.hardware import GPUS, VaePlace

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
MACHINE = Group("Machine", sort_key=2, validator=mutually_exclusive)
PLAN = Parameter(group=Group("Plan", sort_key=3))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What to plan for, and how the step is run there.

    Attributes:
        recipe: see `RecipeName`.
        dtype: Type of weights and activations; bf16 by default with --gpu, and otherwise the recipe's.
        overrides: see `Overrides`.
        gpu: see `GPUS`.
        calibration: Plan for a machine that --calibrate has measured.
        calibrate: Measure this machine, write this file, and plan for the machine.
        validate: Compare predictions with published figures, and plan nothing.
        world_size: Number of ranks; by default a table over 1 to 16.
        head_plan: How attention is divided among ranks. `gathered` can be predicted, but not built.
        collectives: What exchanges data between ranks: the engine, or the runtime.
        fused_ops: Compute self-attention of all heads in one launch of the fused op.
        vae: Where frames are decoded: not at all, on a GPU of its own, on the GPU of rank 0, or split over all ranks, which the
            runtime cannot do yet. By default own with --gpu, and none on a machine that was measured.
        executor: Executor, on a machine that was measured.
        straggler: Fraction by which rank 0 is slower in the timeline.
        timeline: Draw the timeline to this file, which needs matplotlib.
        json: see `Json`.
    """

    recipe: RecipeName = "wan_1_3b_480p"
    dtype: Annotated[Dtype | None, Parameter(group=INPUT)] = None
    overrides: Overrides = ()
    gpu: Annotated[
        str | None, Parameter(group=MACHINE, metavar="NAME", help=f"Plan for GPUs of this kind: {', '.join(GPUS)}.")
    ] = None
    calibration: Annotated[Path | None, Parameter(group=MACHINE, metavar="FILE")] = None
    calibrate: Annotated[Path | None, Parameter(group=MACHINE, metavar="FILE")] = None
    validate: Annotated[bool, Parameter(group=MACHINE)] = False
    world_size: Annotated[int | None, PLAN] = None
    head_plan: Annotated[Literal["balanced", "padded", "grouped", "gathered", "all"], PLAN] = "all"
    collectives: Annotated[Literal["engine", "runtime"], PLAN] = "engine"
    fused_ops: Annotated[OnOff, PLAN, FUSED_OPS] = "off"
    vae: Annotated[VaePlace | None, PLAN] = None
    executor: Annotated[Literal["eager", "onnxruntime"], PLAN] = "onnxruntime"
    straggler: Annotated[float, PLAN, Parameter(metavar="FRACTION")] = 0.0
    timeline: Annotated[Path | None, Parameter(group=OUTPUT, metavar="FILE.png")] = None
    json: Json = False
