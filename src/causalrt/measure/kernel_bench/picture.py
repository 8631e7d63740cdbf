"""The picture of a report: times of `qk_norm_rope` and of head plans; ratios and rates of attention over the number of keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causalrt.measure.kernel_bench.rope_attention import FORMS
from causalrt.measure.kernel_bench.sections import SDPA_RATIO


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture as a PNG; sections that did not run are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 10), layout="constrained")
    rows, ratios, plans, rates = figure.subplots(2, 2).flat
    measured = {
        f"P = {entry['P']}: {name}": side["ms"]
        for entry in report.get("qk_norm_rope", ())
        for name, side in entry["sides"].items()
        if "ms" in side and name != "large copy"
    }
    _bars(rows, measured, "qk_norm_rope")
    rows.set_xscale("log" if measured else "linear")
    sides = report.get("plans", {}).get("sides", {})
    _bars(plans, {name: side["ms"] for name, side in sides.items() if "ms" in side}, "head plans, all slots filled")
    _curves(ratios, rates, report.get("rope_attention", ()))
    for ax in figure.axes:
        ax.set_visible(ax.has_data())
    options, found = report["options"], report["machine"]
    figure.suptitle(f"{options['recipe']}, {options['dtype']}, {found['device']}, torch {found['torch']}")
    figure.savefig(path, format="png", dpi=110)


def _bars(ax: Any, times: Mapping[str, Mapping[str, float]], title: str) -> None:
    below, above = ([abs(entry["median"] - entry[name]) for entry in times.values()] for name in ("p10", "p90"))
    colours = ["tab:blue" if name.endswith("kernel") else "tab:gray" for name in times]
    ax.barh(list(times), [entry["median"] for entry in times.values()], xerr=[below, above], color=colours)
    ax.invert_yaxis()
    ax.set(title=title, xlabel="milliseconds of a call (median, p10 .. p90)")


def _curves(ratios: Any, rates: Any, attention: Any) -> None:
    world_sizes = dict.fromkeys(entry["P"] for entry in attention)
    for world_size, style in zip(world_sizes, ("-", "--", ":", "-."), strict=False):
        entries = [entry for entry in attention if entry["P"] == world_size]
        keys = [entry["kv_rows"] for entry in entries]
        for number, form in enumerate(FORMS):
            how: dict[str, Any] = {"color": f"C{number}", "label": f"{form}, P = {world_size}", "linestyle": style}
            if all(form in entry["of_best"] for entry in entries):
                ratios.plot(keys, [entry["of_best"][form]["median"] for entry in entries], marker="o", **how)
            if all("tflop_s" in entry["sides"].get(form, {}) for entry in entries):
                rates.plot(keys, [entry["sides"][form]["tflop_s"] for entry in entries], **how)
        if all(entry["best"] for entry in entries):
            best = [entry["sides"][entry["best"]]["tflop_s"] for entry in entries]
            rates.plot(keys, best, color="black", linestyle=style, label=f"fastest SDPA, P = {world_size}")
    ratios.axhline(SDPA_RATIO, color="tab:red", linewidth=1)
    ratios.set(title=f"rope_attention: time over the fastest SDPA's; limit {SDPA_RATIO}", xlabel="keys", ylim=(0, None))
    rates.set(title="rope_attention", xlabel="keys", ylabel="TFLOP/s", ylim=(0, None))
    for ax in (ratios, rates):
        ax.grid(visible=True, alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
