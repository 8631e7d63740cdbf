"""The picture of a certificate: each side's largest error chunk by chunk, the tolerance drawn."""

import math
from pathlib import Path

from causalrt.errors import ExecutorError
from causalrt.install_hint import install_extra
from causalrt.proof.record import Certificate

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
MARKERS = ("o", "s", "^", "D")
FLOOR = 1e-9
"""An error of zero is drawn here."""


def draw(certificate: Certificate, path: Path) -> None:
    """Write a PNG.

    Raises:
        ExecutorError: there is no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExecutorError(f"a certificate wants matplotlib ({error}); {install_extra('proof')}") from error
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    shown = [series for series in certificate.series if series.errors]
    for number, series in enumerate(shown):
        finite = {chunk: max(error, FLOOR) for chunk, error in series.errors.items() if math.isfinite(error)}
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        colour, style = ("tab:red", "--") if series.bound else (colour, f"-{marker}")
        size = 5 + 3 * (len(shown) - number)  # of lines that lie on each other, the later one is drawn within
        ax.plot(
            list(finite),
            list(finite.values()),
            style,
            color=colour,
            label=series.label,
            markersize=size,
            fillstyle="none",
        )
        lost = sorted(set(series.errors) - set(finite))
        if lost:
            ax.plot(lost, [1.0] * len(lost), "x", color=colour, markersize=9, label=f"{series.label}: not finite")
    if certificate.tolerance is not None:
        ax.axhline(
            certificate.tolerance, color="tab:red", linestyle="--", label=f"tolerance {certificate.tolerance:.0e}"
        )
    chunks = sorted({chunk for series in shown for chunk in series.errors})
    ax.set_yscale("log")
    ax.set_xticks(chunks)
    kind = "largest error" if certificate.tolerance is not None else "root mean square error, relative,"
    subject = certificate.subject
    verdict = "passed" if certificate.passed else "FAILED"
    lowest = ", an error of 0 drawn as 1e-9" if any(0.0 in series.errors.values() for series in shown) else ""
    ax.set(xlabel=f"chunk{lowest}", ylabel=f"{kind} of flow, x0 and latents")
    ax.set_title(
        f"{verdict}: {subject['executor']}, {subject['world_size']} rank(s), {subject['precision']}, free-running",
        fontsize=10,
    )
    ax.grid(True, which="major", color="0.9")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ExecutorError(f"cannot write the picture {path}: {error}") from error
