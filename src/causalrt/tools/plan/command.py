"""`causalrt plan`: forecasts for a request, the sentences that judge them, and how both are shown."""

import json
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

from rich import box
from rich.table import Table

from causalrt.config import Config
from causalrt.engines.tensorrt_flavour import FLAVOURS, recommended_executor
from causalrt.errors import ConfigError, Faults
from causalrt.progress import Progress
from causalrt.terminal import PrintableConsole
from causalrt.tools.files import check_writable
from causalrt.tools.ops.micro_ops import OpExecutor
from causalrt.tools.ops.work import LAYOUTS
from causalrt.tools.plan.arguments import WORLD_SIZES, PlanRequest
from causalrt.tools.plan.calibration import (
    CalibratedMachine,
    calibrate,
    default_device,
    measured_precision,
    read_calibration,
)
from causalrt.tools.plan.hardware import Gpu, gpu_by_name
from causalrt.tools.plan.predict import Forecast, Machine, forecast
from causalrt.tools.plan.published import compare_published
from causalrt.tools.plan.roofline import GpuMachine, Lowering
from causalrt.tools.plan.timeline import check_straggler, draw_timeline, timeline

TIMELINE_CHUNKS = 200
TABLE_WIDTH = 118
REAL_TIME = 16.0
"""Frames a second at which the model's videos play."""
WORTH = 0.5
"""Fraction of the added GPUs that must come back as speed for them to be worth it."""
COLUMNS = ("P", "layout", "step ms", "chunk ms", "first frame ms", "frames/s", "limit", "GiB", "MB sent", "calls")
CAPTION = (
    "step: one step of the last chunk of the horizon; chunk: from its start to its frames; frames/s: of a stream; limit: at "
    "the makers' figures, without a VAE; in brackets: with all assumptions at either end. GiB, MB and calls are those of a "
    "rank, MB and calls for a chunk with its context pass"
)


def check_request(request: PlanRequest, config: Config | None) -> None:
    """Check a request before anything is measured; `config` is None if the recipe was refused.

    Raises:
        ConfigError: a field is out of range, or fields contradict each other (CombinedConfigError for several faults).
        RequestError: a file cannot be written.
    """
    faults = Faults()
    with faults:
        if request.gpu:
            gpu_by_name(request.gpu)
    with faults:
        if request.gpu and config is not None and config.build.precision == "float32":
            raise ConfigError(
                "the table of GPUs has rates for bfloat16 and float16; add `--dtype bf16`, or `--dtype fp16`"
            )
    with faults:
        if not request.gpu and request.vae not in (None, "none"):
            raise ConfigError(
                "a calibration has no times of the VAE; leave --vae out, or plan for a --gpu of the table"
            )
    with faults:
        if not (request.gpu or request.calibration or request.calibrate or request.validate):
            raise ConfigError(
                "say what to plan for: --gpu NAME, --calibration FILE, or --calibrate FILE to measure this machine"
            )
    with faults:
        check_straggler(request.straggler)
    for path in (request.calibrate, request.timeline):
        with faults:
            if path is not None:
                check_writable(path)
    with faults:
        if request.calibration:
            read_calibration(request.calibration)
    faults.report()


def run(request: PlanRequest, config: Config, *, write: Callable[[str], None], on_progress: Progress) -> None:
    """Run the command.

    Raises:
        ConfigError: the calibration does not fit the request.
        ExecutorError: the picture could not be drawn.
        MeasurementError: the machine could not be measured.
    """
    if request.validate:
        _show_validation(write, as_json=request.json)
        return
    forecasts = plan(request, config, on_progress=on_progress)
    chosen = max(best_layouts(forecasts) or forecasts, key=_speed)
    found = timeline(chosen, chunks=TIMELINE_CHUNKS, straggler=request.straggler)
    if request.timeline:
        draw_timeline(found, request.timeline, title=f"{chosen.world_size} x {chosen.machine}, {chosen.layout}")
    sentences = [*verdict(forecasts), *([_how_to_build(gpu_by_name(request.gpu))] if request.gpu else [])]
    if request.json:
        report = {
            "predicted_not_measured": True,
            "config": config.as_dict(),
            "forecasts": [each.as_dict() for each in forecasts],
            "timeline": {"world_size": chosen.world_size, "layout": chosen.layout, **found.summary()},
            "verdict": sentences,
        }
        write(json.dumps(report))
        return
    console = PrintableConsole()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(_table(forecasts))
    for line in (*_details(chosen, found.summary()), *sentences):
        write(line)


def plan(request: PlanRequest, config: Config, *, on_progress: Progress = lambda *_: None) -> list[Forecast]:
    """Make all forecasts that a request asks for."""
    layouts = LAYOUTS if request.head_plan == "all" else (request.head_plan,)
    if request.gpu:
        gpu, lowering = gpu_by_name(request.gpu), cast("Lowering", request.collectives)
        machine = GpuMachine(gpu=gpu, lowering=lowering, fused_ops=request.fused_ops == "on")
        machines: dict[int, Machine] = dict.fromkeys(
            (request.world_size,) if request.world_size else WORLD_SIZES, machine
        )
        executor, vae = recommended_executor(gpu.target), request.vae or "own"
    else:
        machines = _measured(request, config, on_progress)
        executor, vae = request.executor, request.vae or "none"
    return [
        forecast(config, machine, layout, world_size=ranks, executor=executor, vae=vae)
        for ranks, machine in machines.items()
        for layout in layouts
        if ranks > 1 or layout == layouts[0]
    ]


def _measured(request: PlanRequest, config: Config, on_progress: Progress) -> dict[int, Machine]:
    if request.calibrate:
        _check_precision(config, measured_precision(default_device()))
        sizes = sorted({1, request.world_size or 2})
        found = calibrate(get_args(OpExecutor), sizes, on_progress=on_progress)
        found.write(request.calibrate)
    else:
        assert request.calibration is not None
        found = read_calibration(request.calibration)
    _check_precision(config, found.precision)
    executor = request.executor
    known = sorted(entry.ranks for entry in found.entries if entry.executor == executor)
    return {
        ranks: CalibratedMachine(machine=found.machine, entry=found.entry(executor, ranks))
        for ranks in ([request.world_size] if request.world_size else known)
    }


def _check_precision(config: Config, measured: str) -> None:
    if config.build.precision != measured:
        raise ConfigError(f"the machine is measured in {measured}; add `--dtype {measured}`")


# ---- the verdict


def _speed(each: Forecast) -> float:
    return each.steady_frames_per_second.nominal


def best_layouts(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """For each number of ranks, in rising order, the layout with the most frames a second that can be built."""
    best: dict[int, Forecast] = {}
    for each in forecasts:
        known = best.get(each.world_size)
        if each.layout != "gathered" and (known is None or _speed(each) > _speed(known)):
            best[each.world_size] = each
    return [best[ranks] for ranks in sorted(best)]


def verdict(forecasts: Sequence[Forecast]) -> list[str]:
    """Say which number of ranks of one machine is worth it, by nominal times."""
    by_ranks = best_layouts(forecasts)
    if len(by_ranks) < 2:
        return []
    fastest = max(by_ranks, key=_speed)
    return [*_worth(by_ranks, fastest), _real_time(by_ranks), *_bottleneck(fastest)]


def _worth(by_ranks: Sequence[Forecast], fastest: Forecast) -> list[str]:
    first = worth = by_ranks[0]
    if fastest is first and first.world_size == 1:
        return [
            f"1 rank(s) are the fastest: {_speed(first):.1f} frames/s; {by_ranks[1].world_size} make "
            f"{_speed(by_ranks[1]):.1f}. Use one GPU a session, and more GPUs for more sessions."
        ]
    if fastest is first:
        return [f"{first.world_size} ranks are the fastest of those asked for: {_speed(first):.1f} frames/s."]
    for each in by_ranks[1:]:
        gained = _speed(each) / _speed(worth) - 1
        if gained >= WORTH * (each.gpus / worth.gpus - 1):
            worth = each
    return [
        f"{worth.world_size} rank(s) {'is' if worth.world_size == 1 else 'are'} worth it: {_speed(worth):.1f} frames/s on "
        f"{worth.gpus} GPU(s), {_speed(worth) / worth.gpus:.1f} for each; beyond, less than {WORTH:.0%} of what is added comes "
        "back as speed.",
        f"The fastest is {fastest.world_size} ranks ({fastest.layout}): {_speed(fastest):.1f} frames/s.",
    ]


def _real_time(by_ranks: Sequence[Forecast]) -> str:
    least = next((each for each in by_ranks if _speed(each) >= REAL_TIME), None)
    if least is None:
        return f"None reaches {REAL_TIME:.0f} frames/s, real time."
    sure = least.steady_frames_per_second.worst >= REAL_TIME
    return f"{REAL_TIME:.0f} frames/s, real time, needs {least.world_size} rank(s) ({least.layout})" + (
        "." if sure else ", if the middle of the assumptions holds."
    )


def _bottleneck(fastest: Forecast) -> list[str]:
    last = fastest.chunks[-1]
    ranks_ms, decode_ms = 1e3 * (last.denoise_s.nominal + last.step_s.nominal), 1e3 * last.decode_s.nominal
    if decode_ms <= ranks_ms:
        return []
    return [f"The VAE is the bottleneck there: {decode_ms:.0f} ms a chunk; the ranks take {ranks_ms:.0f}."]


def _how_to_build(gpu: Gpu) -> str:
    name = recommended_executor(gpu.target)
    if FLAVOURS[name].targets:
        return f"{gpu.name} ({gpu.target}): build on any machine with `--executor {name} --target {gpu.target}`"
    return (
        f"{gpu.name} ({gpu.target}): build on that machine with `--executor {name}`; or build so on any other, and finish the "
        "bundle there with `causalrt build --finish`"
    )


# ---- what is printed


def _table(forecasts: Sequence[Forecast]) -> Table:
    title = f"PREDICTED, not measured: {forecasts[0].machine}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=CAPTION)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for each in forecasts:
        limit = each.bound_frames_per_second
        table.add_row(
            str(each.world_size),
            each.layout,
            *(time.text(1e3) for time in (each.chunks[-1].step_s, each.latency_s, each.first_frame_s)),
            each.steady_frames_per_second.text(digits=1),
            "-" if limit is None else f"{limit:.0f}",
            f"{each.memory_bytes['total_bytes'] / 2**30:.1f}",
            f"{each.counts['bytes_sent'] / 1e6:.0f}",
            str(each.counts["all_to_all_calls"]),
        )
    return table


def _details(chosen: Forecast, summary: dict[str, float]) -> list[str]:
    parts = chosen.chunks[-1].parts
    where = {name: 1e3 * getattr(parts, f"{name}_s") for name in ("gemm", "attention", "pass", "exchange", "idle")}
    lines = [
        f"P = {chosen.world_size}, {chosen.layout}: a step of the last chunk in ms: "
        + ", ".join(f"{name} {ms:.1f}" for name, ms in where.items()),
        f"GiB of a rank: {_in_gib(chosen.memory_bytes)}",
    ]
    if chosen.decoder_bytes:
        lines.append(f"GiB of the decoder: {_in_gib(chosen.decoder_bytes)}")
    times = {"last_chunk_ms": "from start to frames", "last_interval_ms": "between chunks"}
    said = [f"{summary[name]:.0f} ms {what}" for name, what in times.items() if name in summary]
    return [*lines, f"timeline of {TIMELINE_CHUNKS} chunks at nominal times, at its end: {', '.join(said)}"]


def _in_gib(parts: Any) -> str:
    return ", ".join(f"{name.removesuffix('_bytes')} {size / 2**30:.2f}" for name, size in parts.items())


def _show_validation(write: Callable[[str], None], *, as_json: bool) -> None:
    found = compare_published()
    if as_json:
        write(json.dumps([each.as_dict() for each in found]))
        return
    table = Table("what", "published", "predicted", "error", "in bars", box=box.SIMPLE_HEAD)
    for each in found:
        table.add_row(
            each.what,
            f"{each.published:g} {each.unit}",
            each.predicted.text(digits=2 if each.unit == "x" else 0),
            f"{each.error:+.0%}",
            "yes" if each.inside else "NO",
        )
    PrintableConsole().print(table)
