"""The picture of a simulation: what each rank and the decoder do, and when frames are there."""

from pathlib import Path
from typing import Any

from causalrt.errors import ExecutorError
from causalrt.install_hint import install_package
from causalrt.tools.plan.simulate import Simulation

COLOURS = {"step": "tab:blue", "refresh": "tab:cyan", "decode": "tab:orange"}
WAITING = "0.85"


def draw_timeline(simulation: Simulation, path: Path, *, title: str, chunks: int = 4) -> None:
    """Write a PNG of the first `chunks` chunks; of a rank's bar, what it waits for others and the exchange is grey.

    Raises:
        ExecutorError: there is no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ExecutorError(
            f"a picture wants matplotlib ({error}); {install_package('matplotlib')}, or leave --timeline out"
        ) from error
    ranks = max((len(job.busy_s) for job in simulation.jobs), default=1)
    figure = Figure(figsize=(11, 1.6 + 0.32 * (ranks + 2)), layout="constrained")
    ax = figure.subplots()
    shown = min(chunks, len(simulation.delivered_s))
    end_ms = 1e3 * simulation.delivered_s[shown - 1] * 1.03
    for job in simulation.jobs:
        start, length = 1e3 * job.start_s, 1e3 * (job.end_s - job.start_s)
        if start > end_ms:
            continue
        if job.what == "decode":
            _bar(ax, ranks, start, length, COLOURS["decode"])
            continue
        for rank, busy_s in enumerate(job.busy_s):
            _bar(ax, rank, start, length, WAITING)
            _bar(ax, rank, start, 1e3 * busy_s, COLOURS[job.what])
    for chunk, delivered_s in enumerate(simulation.delivered_s[:shown]):
        ax.axvline(1e3 * delivered_s, color="tab:red", linewidth=1.2)
        ax.text(1e3 * delivered_s, -0.75, f"chunk {chunk}", color="tab:red", ha="right", va="bottom", fontsize=8)
    ax.set(
        xlim=(0, end_ms),
        ylim=(ranks + 0.6, -1.3),
        xlabel="milliseconds, simulated from predicted times: nothing here was measured",
        title=title,
    )
    ax.set_yticks(range(ranks + 1), [*(f"rank {rank}" for rank in range(ranks)), "decoder"])
    labels = {"denoising step": COLOURS["step"], "refresh": COLOURS["refresh"], "exchange and waiting": WAITING}
    handles = [Patch(color=colour, label=label) for label, colour in {**labels, "decode": COLOURS["decode"]}.items()]
    handles.append(Patch(color="tab:red", label="frames delivered"))
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ExecutorError(f"cannot write the picture {path}: {error}") from error


def _bar(ax: Any, row: int, start: float, length: float, colour: str) -> None:
    ax.barh(row, length, left=start, height=0.8, color=colour, linewidth=0)
