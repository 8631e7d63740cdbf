"""The tables of a report, and the sentences below them."""

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from causalrt.measure.bench.report import FirstWarmChunk, Flatness, Fraction, Report, Row
from causalrt.terminal import PrintableConsole

TABLE_WIDTH, SMALL_MS = 130, 100
LATENCY = ["", "p50", "p95", "p99", "cold, s", "warm", "frames/s", "MB sent", "MiB", "waits", "of eager", "of own"]
LATENCY_NOTE = (
    "p50, p95, p99: latency of chunks, ms; cold: first chunk from the start of a process; warm: from the request for a "
    "session, ms; frames/s: of the last chunks that a context pass follows; MB sent: by a rank to others in a chunk; MiB: the "
    "most that a rank held, mapped files included; waits: of the host for the GPU in a chunk; of eager, of own: time of "
    "products and attention at the highest rates that ops of eager torch, or of the executor itself, reach / time of a step: "
    "in the median repeat, and fastest over fastest"
)


def show(report: Report, write: Callable[[str], None]) -> None:
    """Print the rows as tables, then differences, checks, and what was left out."""
    manifest = report.manifest
    title = f"{manifest.what}, {manifest.config['build']['precision']}, on {manifest.machine.summary}"
    console = PrintableConsole()
    console.width = max(console.width, TABLE_WIDTH)
    stages = list(dict.fromkeys(name for row in report.rows for name in row.stages_ms))
    console.print(_table(title, LATENCY, [_latency(row) for row in report.rows], LATENCY_NOTE))
    rows = [
        [row.name, *(_ms(row.stages_ms[name].p50) if name in row.stages_ms else "-" for name in stages)]
        for row in report.rows
    ]
    console.print(_table("medians of the stages of a chunk, ms", ["", *stages], rows, None))
    for line in sentences(report):
        write(line)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=note, caption_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right" if name else "left", no_wrap=not name)
    for row in rows:
        table.add_row(*row)
    return table


def _latency(row: Row) -> list[str]:
    latency, first, rate = row.chunk_latency_ms, row.first_frame, row.frames_per_second
    peaks = [peak for peak in row.peak_memory.device_bytes or row.peak_memory.rank_bytes if peak]
    return [
        row.name,
        *map(_ms, (latency.p50, latency.p95, latency.p99)),
        f"{first.cold.total_ms.p50 / 1e3:.2f}",
        _ms(first.warm.total_ms.p50),
        "-" if rate is None else f"{rate.median:.2f}",
        f"{row.exchange.bytes_per_chunk / 1e6:.1f}",
        f"{max(peaks) / 2**20:.0f}" if peaks else "-",
        "-" if row.host_waits_per_chunk is None else str(row.host_waits_per_chunk),
        _fraction(None if row.roofline is None else row.roofline.of_eager_ops),
        _fraction(None if row.roofline is None else row.roofline.of_own_ops),
    ]


def _fraction(found: Fraction | None) -> str:
    return "-" if found is None else f"{found.products.median:.2f}/{found.products_fastest:.2f}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= SMALL_MS else f"{value:.1f}"


def sentences(report: Report) -> list[str]:
    """Differences between rows, ceilings, checks, rows that are missing, and the load of the machine."""
    load = [f"{moment.load_average[0]:.1f}" for moment in (report.manifest.before, report.manifest.after)]
    return [
        *_differences(report),
        *(
            f"ceilings of a rank, {each.way}: "
            + ", ".join(f"{name.replace('_', ' ')} {rate:.3g}" for name, rate in each.best.items())
            for each in report.ceilings
        ),
        *map(_checks, report.rows),
        *_missing(report),
        f"load average before {load[0]}, after {load[1]}",
    ]


def _differences(report: Report) -> list[str]:
    """Latencies against the first row, and against rows of the same executor and options."""
    kinds = {row.name: (row.executor, row.fused_ops, row.cuda_graphs) for row in report.rows}
    first = next(iter(kinds), None)
    lines = [
        each.says
        for each in report.comparisons
        if each.metric == "chunk latency" and (each.against == first or kinds[each.side] == kinds[each.against])
    ]
    intervals = [each.interval for each in report.comparisons if each.interval is not None]
    if len(lines) > 1 and len(intervals) == len(report.comparisons):
        missed = sum(1 - probability for _, _, probability in intervals)
        lines.append(
            f"about {missed:.1f} of all {len(intervals)} intervals in the report do not contain the true median"
        )
    return lines


def _checks(row: Row) -> str:
    flat, warm = row.checks.flat_once_full, row.checks.first_warm_chunk
    ratio = flat.slowest_over_fastest
    flatness = "too few chunks with a full window" if ratio is None else f"{ratio:.3f} ({_held(flat)})"
    return (
        f"{row.name}: slowest over fastest chunk once the window is full: {flatness}; first warm chunk over those of later "
        f"sessions: {warm.over_later_sessions:.3f} (one sample, {_held(warm)})"
    )


def _missing(report: Report) -> list[str]:
    missing: dict[str, list[int]] = {}
    for each in report.left_out:
        missing.setdefault(f"{each.executor}: {each.reason}", []).append(each.world_size)
    return [f"not measured, {', '.join(map(str, ranks))} rank(s), {why}" for why, ranks in missing.items()]


def _held(check: Flatness | FirstWarmChunk) -> str:
    return f"{'' if check.held else 'NOT '}within {100 * check.within:.0f} %"
