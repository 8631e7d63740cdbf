"""The request of `causalrt gpu-day`, which is its command line; importing it is cheap, unlike importing what the parts run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from causalrt.measure.gpu_day.parts import PARTS
from causalrt.options import OUTPUT, Json

FOLDER = "causalrt-gpu-day"
BUDGET_S = 570.0
PART_NAMES = tuple(part.name for part in PARTS)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class GpuDayRequest:
    """Which parts to run, and where to write the report.

    Attributes:
        budget: Time for all parts together.
        parts: Run only these parts.
        list: List the parts and run nothing.
        dry_run: Run every part on the CPU at the smallest size, to see that it works.
        golden: Folder of recorded rollouts; by default tests/data/golden of the source tree.
        out: Folder of the report.
        json: see `Json`.
    """

    budget: Annotated[float, Parameter(metavar="SECONDS")] = BUDGET_S
    parts: Annotated[Sequence[str] | None, Parameter(consume_multiple=True, choices=PART_NAMES)] = None
    list: bool = False
    dry_run: bool = False
    golden: Annotated[Path | None, Parameter(metavar="FOLDER")] = None
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path(FOLDER)
    json: Json = False
