"""The table of a report, and what is said below it."""

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from causalrt.terminal import PrintableConsole

TABLE_WIDTH, SMALL_MS = 130, 100
LATENCY = (
    "",
    "p50",
    "p95",
    "p99",
    "cold, s",
    "warm",
    "frames/s",
    "MB sent",
    "MiB",
    "waits",
    "of eager",
    "of own",
)
LATENCY_NOTE = (
    "ms of chunks by quantile; cold: first chunk from the start of a process; warm: from asking for a session, ms; "
    "frames/s: of the last chunks that a refresh follows; MB sent: by a rank to others in a chunk; MiB: the most that a "
    "rank held, mapped files included; waits: of the host for the GPU in a chunk; of eager, of own: time of products and "
    "attention at the highest rates that eager torch's ops, or the runtime's own, reach alone / time of a step: in the "
    "median repeat, and fastest over fastest"
)


def show(report: dict[str, Any], write: Callable[[str], None]) -> None:
    """Print a table of rows; say what differs from what, what was checked, and what was left out."""
    manifest = report["manifest"]
    machine = manifest["machine"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    title = f"{manifest['what']}, {manifest['config']['build']['precision']}, on {where}"
    console = PrintableConsole()
    console.width = max(console.width, TABLE_WIDTH)
    stages = list(dict.fromkeys(name for row in report["rows"] for name in row["stages_ms"]))
    console.print(_table(title, LATENCY, [_latency(row) for row in report["rows"]], LATENCY_NOTE))
    console.print(
        _table("medians of a chunk's stages, ms", ["", *stages], [_stages(row, stages) for row in report["rows"]], None)
    )
    for line in sentences(report):
        write(line)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=note, caption_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right" if name else "left", no_wrap=not name)
    for row in rows:
        table.add_row(*row)
    return table


def _latency(row: dict[str, Any]) -> list[str]:
    latency, first = row["chunk_latency_ms"], row["first_frame"]
    rate, roofline, waits = row["frames_per_second"], row["roofline"] or {}, row["host_waits_per_chunk"]
    peaks = [peak for peak in row["peak_memory"]["device_bytes"] or row["peak_memory"]["rank_bytes"] if peak]

    def fraction(key: str) -> str:
        found = roofline.get(key)
        return "-" if found is None else f"{found['products']['median']:.2f}/{found['products_fastest']:.2f}"

    return [
        row["name"],
        *(_ms(latency[name]) for name in ("p50", "p95", "p99")),
        f"{first['cold']['total_ms']['p50'] / 1e3:.2f}",
        _ms(first["warm"]["total_ms"]["p50"]),
        "-" if rate is None else f"{rate['median']:.2f}",
        f"{row['exchange']['bytes_per_chunk'] / 1e6:.1f}",
        f"{max(peaks) / 2**20:.0f}" if peaks else "-",
        "-" if waits is None else str(waits),
        fraction("of_eager_ops"),
        fraction("of_own_ops"),
    ]


def _stages(row: dict[str, Any], stages: Sequence[str]) -> list[str]:
    found = row["stages_ms"]
    return [row["name"], *(_ms(found[name]["p50"]) if name in found else "-" for name in stages)]


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= SMALL_MS else f"{value:.1f}"


def sentences(report: dict[str, Any]) -> list[str]:
    """What the rows say of each other, what single ops reached, what was checked, and what is missing."""
    executors = {row["name"]: (row["executor"], row["plugins"], row["cuda_graphs"]) for row in report["rows"]}
    first = report["rows"][0]["name"]
    lines = [
        each["says"]
        for each in report["comparisons"]
        if each["metric"] == "chunk latency"
        and (each["against"] == first or executors[each["side"]] == executors[each["against"]])
    ]
    if len(lines) > 1 and all(each["interval"] for each in report["comparisons"]):
        missed = sum(1 - each["interval"][2] for each in report["comparisons"])
        lines.append(
            f"of all {len(report['comparisons'])} intervals in the report, about {missed:.1f} miss, as intervals do"
        )
    for way in report["ceilings"]:
        rates = ", ".join(f"{name.replace('_', ' ')} {rate:.3g}" for name, rate in way["best"].items())
        lines.append(f"ceilings a rank, {way['way']}: {rates}")
    for row in report["rows"]:
        checks = row["checks"]
        flat, warm = checks["flat_once_full"], checks["first_warm_chunk"]
        ratio = flat["slowest_over_fastest"]
        flatness = "too few chunks with a full window" if ratio is None else f"{ratio:.3f} ({_held(flat)})"
        lines.append(
            f"{row['name']}: slowest over fastest chunk once the window is full {flatness}; first warm chunk over its like "
            f"{warm['over_later_sessions']:.3f} (one sample, {_held(warm)})"
        )
    missing: dict[str, list[int]] = {}
    for each in report["left_out"]:
        missing.setdefault(f"{each['executor']}: {each['reason']}", []).append(each["world_size"])
    lines += [f"not measured, {', '.join(map(str, ranks))} rank(s), {why}" for why, ranks in missing.items()]
    load = [f"{report['manifest'][when]['load_average'][0]:.1f}" for when in ("before", "after")]
    return [*lines, f"load average before {load[0]}, after {load[1]}"]


def _held(check: dict[str, Any]) -> str:
    return f"within {100 * check['within']:.0f} %" if check["held"] else f"NOT within {100 * check['within']:.0f} %"
