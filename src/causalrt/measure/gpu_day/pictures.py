"""Pictures of what parts have measured; matplotlib is imported when one is drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causalrt.atomic_files import atomic_file


def draw_kernels(data: Mapping[str, Any], path: Path) -> None:
    """Draw the kernels' times beside those of SDPA and copies."""
    from causalrt.measure.kernel_bench.picture import plot

    with atomic_file(path) as partial:
        plot(data, partial)


def draw_steps(data: Mapping[str, Any], path: Path) -> None:
    """Draw the time of a chunk step over the filled KV rows: measured by side, and what the planner predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    for number, (side, rows) in enumerate(data["sides"].items()):
        keys, colour = [row["KV rows"] for row in rows], f"C{number}"
        times.plot(keys, [row["ms"] for row in rows], marker="o", color=colour, label=side)
        ratios.plot(keys, [row["of eager"] for row in rows], marker="o", color=colour, label=side)
        predicted = [row["predicted ms"] for row in rows]
        if None not in predicted:
            times.plot(keys, predicted, linestyle=":", color=colour, label=f"{side}, predicted")
    times.set(title="a chunk step", xlabel="filled KV rows", ylabel="milliseconds (median)", ylim=(0, None))
    ratios.set(title="of eager's time, in the same run", xlabel="filled KV rows", ylim=(0, None))
    for ax in (times, ratios):
        ax.grid(visible=True, alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(data["title"])
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
