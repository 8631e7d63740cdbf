"""The arguments of `causalrt plan`, apart from what it computes, whose imports every other command would wait for."""

import argparse
from pathlib import Path
from typing import get_args

from causalrt.tools.plan.hardware import GPUS, VaePlace
from causalrt.tools.plan.head_layouts import LAYOUTS

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
RUNTIMES = ("eager", "onnxruntime")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments beside recipe, overrides, dtype and `--json`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpu", help=f"one of {', '.join(GPUS)}")
    where.add_argument("--calibration", type=Path, metavar="FILE", help="a machine that --calibrate has measured")
    where.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measure this machine, write FILE, and plan for it"
    )
    where.add_argument("--validate", action="store_true", help="compare predictions with what others have published")
    parser.add_argument("--world-size", type=int, help=f"ranks (a table over {', '.join(map(str, WORLD_SIZES))})")
    parser.add_argument("--head-plan", choices=(*LAYOUTS, "all"), default="all", help="gathered is computed only (all)")
    parser.add_argument(
        "--collectives", choices=("engine", "runtime"), default="engine", help="who exchanges between ranks (engine)"
    )
    parser.add_argument(
        "--plugins", choices=("on", "off"), default="off", help="self-attention of all heads in one launch (off)"
    )
    parser.add_argument(
        "--vae",
        choices=get_args(VaePlace),
        help="where frames are decoded: nowhere, on a GPU of its own, on rank 0's, or over all ranks, which the runtime cannot "
        "do yet (own; none for a machine that was measured)",
    )
    parser.add_argument(
        "--executor", choices=RUNTIMES, default="onnxruntime", help="on a machine that was measured (onnxruntime)"
    )
    parser.add_argument("--straggler", type=float, default=0.0, help="in the simulation, how much slower rank 0 is (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (0)")
    parser.add_argument("--timeline", type=Path, metavar="FILE.png", help="draw the simulation; wants matplotlib")
