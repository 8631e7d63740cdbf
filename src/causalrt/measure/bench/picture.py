"""The picture of a report: chunk latency and its stages, first frames, and fractions of the ceilings."""

import io
from typing import Any

from causalrt.errors import ExecutorError
from causalrt.install_hint import install_package
from causalrt.measure.bench.report import FirstFrame, Fraction, Report, Row

STAGES = ("start", "load", "open", "queue", "denoise", "exchange", "gather", "decode", "hand_over")
COLOURS = ("0.55", "0.75", "tab:olive", "tab:pink", "tab:blue", "tab:red", "tab:purple", "tab:orange", "tab:green")
INVISIBLE = 0.001
"""Fraction of the longest bar below which a stage is not drawn."""


def figure_class() -> Any:
    """The class of matplotlib's figures, which needs no window and has no global state.

    Raises:
        ExecutorError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExecutorError(
            f"a picture needs matplotlib ({error}); `{install_package('matplotlib')}`, or leave it out with --no-picture"
        ) from error
    return Figure


def draw(report: Report) -> bytes:
    """Draw the report as a PNG.

    Raises:
        ExecutorError: matplotlib is missing.
    """
    figure_type = figure_class()
    import matplotlib

    with matplotlib.rc_context({"axes.titlesize": 10, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}):
        return _draw(report, figure_type)


def _draw(report: Report, figure_type: Any) -> bytes:
    rows, manifest = report.rows, report.manifest
    figure = figure_type(figsize=(11, 7 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots(3, 2)
    _latency(axes[0, 0], rows)
    _bars(axes[0, 1], rows, [row.by_chunk[-1].stages_ms for row in rows], "last chunk by stage, ms")
    cold, warm = ([getattr(row.first_frame, which) for row in rows] for which in ("cold", "warm"))
    _first(axes[1, 0], rows, cold, 1e-3, "first chunk, cold: s from the start of a process")
    _first(axes[1, 1], rows, warm, 1.0, "first chunk, warm: ms from the request for a session")
    _fractions(axes[2, 0], rows)
    _ratios(axes[2, 1], report)
    figure.suptitle(
        f"{manifest.what} on {manifest.machine.summary}, {manifest.config['build']['precision']}, {manifest.repeats} repeats, "
        f"{manifest.date[:10]}; load {manifest.before.load_average[0]:.1f} to {manifest.after.load_average[0]:.1f}",
        fontsize=10,
    )
    # A stage that is too short to be visible in one of these is not in its legend, and may be in that of another.
    drawn = [ax.get_legend_handles_labels() for ax in (axes[0, 1], axes[1, 0], axes[1, 1])]
    handles = {label: handle for found in drawn for handle, label in zip(*found, strict=True)}
    named = {label: handles[label] for label in map(_label, STAGES) if label in handles}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()


def _latency(ax: Any, rows: list[Row]) -> None:
    for row in rows:
        chunks = [each.chunk for each in row.by_chunk]
        median, p25, p75 = ([each.latency_ms[name] for each in row.by_chunk] for name in ("median", "p25", "p75"))
        (line,) = ax.plot(chunks, median, marker="o", markersize=3, label=row.name)
        ax.fill_between(chunks, p25, p75, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set(title="chunk latency, ms: median and quartiles", xlabel="chunk", xticks=chunks)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7, framealpha=0.7, loc="upper left")


def _first(ax: Any, rows: list[Row], frames: list[FirstFrame], scale: float, title: str) -> None:
    _bars(ax, rows, [{name: scale * ms for name, ms in each.stages_ms.items()} for each in frames], title)


def _label(stage: str) -> str:
    return stage.replace("_", " ")


def _bars(ax: Any, rows: list[Row], stages: list[dict[str, float]], title: str) -> None:
    ends, longest = [0.0] * len(rows), max(sum(each.values()) for each in stages)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        widths = [each.get(stage, 0.0) for each in stages]
        if max(widths) > INVISIBLE * longest:
            ax.barh(range(len(rows)), widths, left=ends, color=colour, label=_label(stage))
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    ax.set_xlim(left=0)
    ax.set_title(title)
    _names(ax, rows)


def _fractions(ax: Any, rows: list[Row]) -> None:
    for offset, key, label in ((-0.2, "of_eager_ops", "of eager's ops"), (0.2, "of_own_ops", "of its own ops")):
        for index, row in enumerate(rows):
            found: Fraction | None = getattr(row.roofline, key, None)
            if found is not None:
                colour, spread = "tab:gray" if offset < 0 else "tab:blue", found.products
                ax.barh(index + offset, spread.median, height=0.36, color=colour, label=None if index else label)
                ax.plot([spread.min, spread.max], [index + offset] * 2, color="black", linewidth=1)
                name = "fastest step, best ops" if not index and offset < 0 else None
                ax.plot(found.products_fastest, index + offset, "D", color="tab:orange", markersize=5, label=name)
    ax.axvline(1, color="tab:red", linewidth=1)
    ax.set_title("products and attention at their ceilings / step")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, framealpha=0.7, loc="upper right")
    _names(ax, rows)


def _ratios(ax: Any, report: Report) -> None:
    first = report.rows[0].name
    found = [each for each in report.comparisons if each.metric == "chunk latency" and each.against == first]
    for index, each in enumerate(found):
        low, high = (each.interval or (min(each.ratios), max(each.ratios)))[:2]
        colour = "0.6" if each.verdict == "none shown" else "tab:blue"
        ax.plot([low, high], [index] * 2, color=colour, linewidth=4, alpha=0.6)
        ax.plot(each.ratios, [index] * len(each.ratios), "|", color="black")
    ax.axvline(1, color="tab:red", linewidth=1)
    ax.set_title(f"times as fast as {first}: repeats, interval", fontsize=10)
    names = [each.side + "\nnone shown" * (each.verdict == "none shown") for each in found]
    ax.set_yticks(range(len(found)), names, fontsize=7)
    ax.invert_yaxis()


def _names(ax: Any, rows: list[Row]) -> None:
    ax.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    ax.invert_yaxis()
