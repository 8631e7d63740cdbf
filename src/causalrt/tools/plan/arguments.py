"""The request and the arguments of `causalrt plan`; importing them is cheap, unlike importing what computes a plan."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from causalrt.tools.ops.work import LAYOUTS
from causalrt.tools.plan.hardware import GPUS, VaePlace

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
EXECUTORS = ("eager", "onnxruntime")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What to plan for, and how the step runs there; the help of the arguments explains every field and its default."""

    gpu: str | None = None
    calibration: Path | None = None
    calibrate: Path | None = None
    validate: bool = False
    world_size: int | None = None
    head_plan: str = "all"
    collectives: str = "engine"
    fused_ops: str = "off"
    vae: VaePlace | None = None
    executor: str = "onnxruntime"
    straggler: float = 0.0
    timeline: Path | None = None
    json: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every argument except recipe, overrides, dtype and `--json`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpu", help=f"one of {', '.join(GPUS)}")
    where.add_argument("--calibration", type=Path, metavar="FILE", help="a machine that --calibrate has measured")
    where.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measure this machine, write FILE, and plan for it"
    )
    where.add_argument("--validate", action="store_true", help="compare predictions with published figures")
    parser.add_argument("--world-size", type=int, help=f"ranks (a table over {', '.join(map(str, WORLD_SIZES))})")
    parser.add_argument(
        "--head-plan", choices=(*LAYOUTS, "all"), default="all", help="`gathered` can be computed, not built (all)"
    )
    parser.add_argument(
        "--collectives", choices=("engine", "runtime"), default="engine", help="who exchanges between ranks (engine)"
    )
    parser.add_argument(
        "--fused-ops",
        "--plugins",
        dest="fused_ops",
        choices=("on", "off"),
        default="off",
        help="self-attention of all heads in one launch (off)",
    )
    parser.add_argument(
        "--vae",
        choices=get_args(VaePlace),
        help="where frames are decoded: nowhere, on a GPU of its own, on the GPU of rank 0, or on all ranks, which the runtime "
        "cannot do yet (own; none on a machine that was measured)",
    )
    parser.add_argument(
        "--executor", choices=EXECUTORS, default="onnxruntime", help="on a machine that was measured (onnxruntime)"
    )
    parser.add_argument(
        "--straggler", type=float, default=0.0, help="fraction by which rank 0 is slower in the timeline (0)"
    )
    parser.add_argument("--timeline", type=Path, metavar="FILE.png", help="draw the timeline; needs matplotlib")


def request_from_arguments(arguments: argparse.Namespace) -> PlanRequest:
    """Take the request from the parsed command line."""
    return PlanRequest(**{name: getattr(arguments, name) for name in PlanRequest.__dataclass_fields__})
