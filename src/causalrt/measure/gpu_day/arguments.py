"""The arguments of `causalrt gpu-day`; importing this is cheap, unlike importing what the command runs."""

import argparse
from pathlib import Path

from causalrt.measure.gpu_day.parts import PARTS

FOLDER = "causalrt-gpu-day"
BUDGET_S = 570.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments beside `--json`."""
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help=f"time for all parts together ({BUDGET_S:g})"
    )
    parser.add_argument("--out", type=Path, default=Path(FOLDER), help=f"folder of the report ({FOLDER})")
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in PARTS], metavar="NAME", help="run only these parts"
    )
    parser.add_argument("--list", action="store_true", help="list the parts and run nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="run every part on the CPU at the smallest size, to see that it works"
    )
    parser.add_argument(
        "--golden", type=Path, metavar="FOLDER", help="recorded rollouts (tests/data/golden of the source tree)"
    )
