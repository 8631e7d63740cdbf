"""Compute the tables and the picture of docs/performance.md anew.

python benchmarks/plan_tables.py
"""

from pathlib import Path

from causalrt.config import override
from causalrt.recipes import recipe
from causalrt.tools.plan.hardware import GPUS
from causalrt.tools.plan.predict import forecast
from causalrt.tools.plan.roofline import GpuMachine
from causalrt.tools.plan.simulate import Jitter, simulate
from causalrt.tools.plan.tables import with_tables
from causalrt.tools.plan.timeline import draw_timeline

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Write both."""
    page = DOCS / "performance.md"
    page.write_text(with_tables(page.read_text()))
    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})
    machine = GpuMachine(gpu=GPUS["a800"], fused_ops=True)
    found = forecast(config, machine, "balanced", world_size=7, executor="tensorrt", vae="own")
    simulation = simulate(found, chunks=8, jitter=Jitter())
    draw_timeline(
        simulation, DOCS / "plan-timeline.png", title="7 ranks and a decoder on 8 x A800, balanced: predicted"
    )


if __name__ == "__main__":
    main()
