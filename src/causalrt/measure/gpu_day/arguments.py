"""The request and the arguments of `causalrt gpu-day`; importing them is cheap, unlike importing what runs the parts."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causalrt.measure.gpu_day.parts import PARTS

FOLDER = "causalrt-gpu-day"
BUDGET_S = 570.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuDayRequest:
    """Which parts to run, and where to write the report; the help of the arguments explains every field."""

    budget: float = BUDGET_S
    out: Path = Path(FOLDER)
    parts: Sequence[str] | None = None
    list: bool = False
    dry_run: bool = False
    golden: Path | None = None
    json: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every argument except `--json`."""
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


def request_from_arguments(arguments: argparse.Namespace) -> GpuDayRequest:
    """Take the request from the parsed command line."""
    return GpuDayRequest(**{name: getattr(arguments, name) for name in GpuDayRequest.__dataclass_fields__})
