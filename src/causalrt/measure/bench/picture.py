"""The picture of a report: chunk latency, where it goes, first frames, and fractions of the ceilings."""

import io
from typing import Any

from causalrt.errors import ExecutorError
from causalrt.install_hint import install_package

STAGES = ("start", "load", "open", "queue", "denoise", "exchange", "gather", "decode", "hand_over")
COLOURS = ("0.55", "0.75", "tab:olive", "tab:pink", "tab:blue", "tab:red", "tab:purple", "tab:orange", "tab:green")
INVISIBLE = 0.001
"""Of the longest bar."""


def figure_class() -> Any:
    """The Figure of matplotlib; no window, no global state.

    Raises:
        ExecutorError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExecutorError(
            f"a picture wants matplotlib ({error}); `{install_package('matplotlib')}`, or leave it out with --no-picture"
        ) from error
    return Figure


def draw(report: dict[str, Any]) -> bytes:
    """A PNG.

    Raises:
        ExecutorError: there is no matplotlib.
    """
    figure_type = figure_class()
    import matplotlib

    with matplotlib.rc_context({"axes.titlesize": 10, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}):
        return _draw(report, figure_type)


def _draw(report: dict[str, Any], figure_type: Any) -> bytes:
    rows = report["rows"]
    figure = figure_type(figsize=(11, 7 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots(3, 2)
    _latency(axes[0, 0], rows)
    _stages(axes[0, 1], rows)
    _first(axes[1, 0], rows, "cold")
    _first(axes[1, 1], rows, "warm")
    _fractions(axes[2, 0], rows)
    _ratios(axes[2, 1], report)
    manifest = report["manifest"]
    machine = manifest["machine"]
    device = machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['cores']} cores"
    config = manifest["config"]
    figure.suptitle(
        f"{manifest['what']} on {device}, {config['build']['precision']}, {manifest['repeats']} repeats, "
        f"{manifest['date'][:10]}; load {manifest['before']['load_average'][0]:.1f} to "
        f"{manifest['after']['load_average'][0]:.1f}",
        fontsize=10,
    )
    # A stage that is too short to be seen in one of these is not in its legend, and may be in another's.
    drawn = [ax.get_legend_handles_labels() for ax in (axes[0, 1], axes[1, 0], axes[1, 1])]
    handles = {label: handle for found in drawn for handle, label in zip(*found, strict=True)}
    named = {label: handles[label] for label in map(_label, STAGES) if label in handles}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()


def _latency(ax: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        chunks = [each["chunk"] for each in row["by_chunk"]]
        found = [each["latency_ms"] for each in row["by_chunk"]]
        (line,) = ax.plot(chunks, [each["median"] for each in found], marker="o", markersize=3, label=row["name"])
        ax.fill_between(
            chunks,
            [each["p25"] for each in found],
            [each["p75"] for each in found],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    ax.set(title="chunk latency, ms: median and quartiles", xlabel="chunk", xticks=chunks)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7, framealpha=0.7, loc="upper left")


def _stages(ax: Any, rows: list[dict[str, Any]]) -> None:
    _bars(ax, rows, [row["by_chunk"][-1]["stages_ms"] for row in rows])
    ax.set_title("last chunk by stage, ms")


def _first(ax: Any, rows: list[dict[str, Any]], which: str) -> None:
    cold = which == "cold"
    scale = 1e-3 if cold else 1.0
    stages = [row["first_frame"][which]["stages_ms"] for row in rows]
    _bars(ax, rows, [{name: scale * value for name, value in each.items()} for each in stages])
    ax.set_title(
        "first chunk, cold: s from a process's start" if cold else "first chunk, warm: ms from asking for a session"
    )


def _label(stage: str) -> str:
    return stage.replace("_", " ")


def _bars(ax: Any, rows: list[dict[str, Any]], stages: list[dict[str, float]]) -> None:
    ends, longest = [0.0] * len(rows), max(sum(each.values()) for each in stages)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        widths = [each.get(stage, 0.0) for each in stages]
        if max(widths) > INVISIBLE * longest:
            ax.barh(range(len(rows)), widths, left=ends, color=colour, label=_label(stage))
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    ax.set_xlim(left=0)
    _names(ax, rows)


def _fractions(ax: Any, rows: list[dict[str, Any]]) -> None:
    for offset, key, label in ((-0.2, "of_eager_ops", "of eager's ops"), (0.2, "of_own_ops", "of its own ops")):
        for index, row in enumerate(rows):
            found = (row["roofline"] or {}).get(key)
            if found is not None:
                median, low, high = (found["products"][name] for name in ("median", "min", "max"))
                colour = "tab:gray" if offset < 0 else "tab:blue"
                ax.barh(index + offset, median, height=0.36, color=colour, label=None if index else label)
                ax.plot([low, high], [index + offset] * 2, color="black", linewidth=1)
                fastest = found["products_fastest"]
                name = "fastest step, best ops" if not index and offset < 0 else None
                ax.plot(fastest, index + offset, "D", color="tab:orange", markersize=5, label=name)
    ax.axvline(1, color="tab:red", linewidth=1)
    ax.set_title("products and attention at their ceilings / step")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, framealpha=0.7, loc="upper right")
    _names(ax, rows)


def _ratios(ax: Any, report: dict[str, Any]) -> None:
    first = report["rows"][0]["name"]
    found = [c for c in report["comparisons"] if c["metric"] == "chunk latency" and c["against"] == first]
    for index, each in enumerate(found):
        low, high = (each["interval"] or (min(each["ratios"]), max(each["ratios"])))[:2]
        shown = each["verdict"] != "none shown"
        ax.plot([low, high], [index] * 2, color="tab:blue" if shown else "0.6", linewidth=4, alpha=0.6)
        ax.plot(each["ratios"], [index] * len(each["ratios"]), "|", color="black")
    ax.axvline(1, color="tab:red", linewidth=1)
    ax.set_title(f"times as fast as {first}: repeats, interval", fontsize=10)
    names = [each["side"] + "\nnone shown" * (each["verdict"] == "none shown") for each in found]
    ax.set_yticks(range(len(found)), names, fontsize=7)
    ax.invert_yaxis()


def _names(ax: Any, rows: list[dict[str, Any]]) -> None:
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    ax.invert_yaxis()
