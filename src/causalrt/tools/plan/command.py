"""`causalrt plan`: what it computes, and how that is shown."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, get_args

from rich import box
from rich.table import Table

from causalrt.config import Config
from causalrt.engines.tensorrt_flavour import FLAVOURS, recommended_executor
from causalrt.errors import ConfigError, Faults
from causalrt.terminal import PrintableConsole
from causalrt.tools.files import check_writable
from causalrt.tools.plan.arguments import WORLD_SIZES
from causalrt.tools.plan.calibration import CalibratedMachine, Runtime, read_calibration
from causalrt.tools.plan.hardware import Gpu, VaePlace, gpu_by_name
from causalrt.tools.plan.head_layouts import LAYOUTS, LayoutName
from causalrt.tools.plan.predict import Forecast, Machine, forecast
from causalrt.tools.plan.published import compare_published
from causalrt.tools.plan.roofline import GpuMachine
from causalrt.tools.plan.simulate import Jitter, Simulation, simulate
from causalrt.tools.plan.spans import Estimate
from causalrt.tools.plan.timeline import draw_timeline
from causalrt.tools.plan.verdict import best_layouts, verdict

SIMULATED_CHUNKS = 200
TABLE_WIDTH = 118


def run(
    arguments: argparse.Namespace, config: Config, *, write: Callable[[str], None], on_progress: Callable[..., None]
) -> None:
    """Run the command; `write` takes what is said.

    Raises:
        ConfigError: the arguments do not go together.
        ExecutorError: a measurement or the picture failed.
    """
    if arguments.validate:
        _show_validation(arguments, write)
        return
    forecasts = plan(arguments, config, on_progress=on_progress)
    chosen = max(best_layouts(forecasts) or forecasts, key=lambda each: each.steady_frames_per_second.nominal)
    simulation = simulate(
        chosen, chunks=SIMULATED_CHUNKS, jitter=_jitter(arguments), latents_per_chunk=config.video.chunk_frames
    )
    if arguments.timeline:
        draw_timeline(simulation, arguments.timeline, title=f"{chosen.world_size} x {chosen.machine}, {chosen.layout}")
    said = verdict(forecasts)
    if arguments.gpu:
        said = [*said, _how_to_build(gpu_by_name(arguments.gpu))]
    if arguments.json:
        found = {
            "predicted_not_measured": True,
            "config": config.as_dict(),
            "forecasts": [each.as_dict() for each in forecasts],
            "simulation": {"world_size": chosen.world_size, "layout": chosen.layout, **simulation.summary()},
            "verdict": said,
        }
        write(json.dumps(found))
        return
    console = PrintableConsole()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(_table(forecasts))
    for line in (*_details(chosen, simulation), *said):
        write(line)


def check_arguments(arguments: argparse.Namespace, config: Config | None) -> None:
    """Check arguments before anything is measured; `config` is None if it is not known what to plan.

    Raises:
        ConfigError: an argument cannot be, or several cannot (CombinedConfigError).
        RequestError: a file cannot be written.
    """
    faults = Faults()
    with faults:
        if arguments.gpu:
            gpu_by_name(arguments.gpu)
    with faults:
        if arguments.gpu and config is not None and config.build.precision == "float32":
            raise ConfigError(
                "the table of GPUs has rates for bfloat16 and float16; add `--dtype bf16`, or `--dtype fp16`"
            )
    with faults:
        if not arguments.gpu and arguments.vae not in (None, "none"):
            raise ConfigError(
                "a calibration has no times of the VAE; leave --vae out, or plan for a --gpu of the table"
            )
    with faults:
        if not (arguments.gpu or arguments.calibration or arguments.calibrate or arguments.validate):
            raise ConfigError(
                "say what to plan for: --gpu NAME, --calibration FILE, or --calibrate FILE to measure this machine"
            )
    with faults:
        _jitter(arguments)
    for path in (arguments.calibrate, arguments.timeline):
        with faults:
            if path is not None:
                check_writable(path)
    with faults:
        if arguments.calibration:
            read_calibration(arguments.calibration)
    faults.report()


def _how_to_build(gpu: Gpu) -> str:
    name = recommended_executor(gpu.target)
    if FLAVOURS[name].targets:
        return f"{gpu.name} ({gpu.target}): build on any machine with `--executor {name} --target {gpu.target}`"
    return (
        f"{gpu.name} ({gpu.target}): build on that machine with `--executor {name}`; or build so on any other, and finish the "
        "bundle there with `causalrt build --finish`"
    )


def _jitter(arguments: argparse.Namespace) -> Jitter:
    return Jitter(straggler=arguments.straggler, seed=arguments.seed)


def plan(
    arguments: argparse.Namespace, config: Config, *, on_progress: Callable[..., None] = lambda *_: None
) -> list[Forecast]:
    """All forecasts that the arguments ask for."""
    vae: VaePlace
    layouts: Sequence[LayoutName] = LAYOUTS if arguments.head_plan == "all" else (arguments.head_plan,)
    if arguments.gpu:
        machine = GpuMachine(
            gpu=gpu_by_name(arguments.gpu), lowering=arguments.collectives, fused_ops=arguments.plugins == "on"
        )
        sizes = (arguments.world_size,) if arguments.world_size else WORLD_SIZES
        machines: dict[int, Machine] = dict.fromkeys(sizes, machine)
        executor, vae = recommended_executor(machine.gpu.target), arguments.vae or "own"
    else:
        machines = _measured(arguments, config, on_progress)
        executor, vae = arguments.executor, arguments.vae or "none"
    return [
        forecast(config, machine, layout, world_size=ranks, executor=executor, vae=vae)
        for ranks, machine in machines.items()
        for layout in layouts
        if ranks > 1 or layout == layouts[0]
    ]


def _measured(arguments: argparse.Namespace, config: Config, on_progress: Callable[..., None]) -> dict[int, Machine]:
    if arguments.calibrate:
        from causalrt.tools.plan.calibrate import calibrate, default_device, measured_precision  # ONNX Runtime with it

        _check_precision(config, measured_precision(default_device()))
        sizes = sorted({1, arguments.world_size or 2})
        found = calibrate(get_args(Runtime), sizes, on_progress=on_progress)
        found.write(arguments.calibrate)
    else:
        found = read_calibration(arguments.calibration)
    _check_precision(config, found.precision)
    known = sorted(entry.ranks for entry in found.entries if entry.runtime == arguments.executor)
    sizes = [arguments.world_size] if arguments.world_size else known
    return {
        ranks: CalibratedMachine(machine=found.machine, entry=found.entry(arguments.executor, ranks)) for ranks in sizes
    }


def _check_precision(config: Config, measured: str) -> None:
    if config.build.precision != measured:
        raise ConfigError(f"the machine is measured in {measured}; add `--dtype {measured}`")


def _spread(span: Estimate, factor: float = 1.0, digits: int = 0) -> str:
    low, high = sorted((factor * span.best, factor * span.worst))
    return f"{factor * span.nominal:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _table(forecasts: Sequence[Forecast]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"PREDICTED, not measured: {forecasts[0].machine}", title_justify="left")
    for name in (
        "P",
        "layout",
        "step ms",
        "chunk ms",
        "first frame ms",
        "frames/s",
        "limit",
        "GiB",
        "MB sent",
        "calls",
    ):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for each in forecasts:
        bound = each.bound_frames_per_second
        table.add_row(
            str(each.world_size),
            each.layout,
            _spread(each.chunks[-1].step_s, 1e3),
            _spread(each.latency_s, 1e3),
            _spread(each.first_frame_s, 1e3),
            _spread(each.steady_frames_per_second, 1, 1),
            "-" if bound is None else f"{bound:.0f}",
            f"{each.memory_bytes['total_bytes'] / 2**30:.1f}",
            f"{each.counts['bytes_sent'] / 1e6:.0f}",
            str(each.counts["all_to_all_calls"]),
        )
    table.caption = (
        "last chunk of the horizon: one step, its frames from its start on, frames a second of a stream; limit: at the "
        "makers' peaks, without a VAE; in brackets: all assumptions at either end. GiB, MB and calls are a rank's, the "
        "latter two of a chunk with its refresh"
    )
    return table


def _details(chosen: Forecast, simulation: Simulation) -> list[str]:
    parts: dict[str, Any] = {
        name: 1e3 * getattr(chosen.chunks[-1].parts, f"{name}_s")
        for name in ("gemm", "attention", "pass", "exchange", "idle")
    }
    where = ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items())
    memory = ", ".join(f"{k.removesuffix('_bytes')} {v / 2**30:.2f}" for k, v in chosen.memory_bytes.items())
    lines = [
        f"P = {chosen.world_size}, {chosen.layout}: a step of the last chunk in ms: {where}",
        f"GiB of a rank: {memory}",
    ]
    if chosen.decoder_bytes:
        decoder = ", ".join(f"{k.removesuffix('_bytes')} {v / 2**30:.2f}" for k, v in chosen.decoder_bytes.items())
        lines.append(f"GiB of the decoder: {decoder}")
    summary = simulation.summary()
    for name in ("chunk_ms", "interval_ms"):
        if isinstance(quantiles := summary.get(name), dict):
            what = "start to frames" if name == "chunk_ms" else "between chunks"
            lines.append(f"simulated, {what}: " + ", ".join(f"{q} {ms:.0f} ms" for q, ms in quantiles.items()))
    return lines


def _show_validation(arguments: argparse.Namespace, write: Callable[[str], None]) -> None:
    found = compare_published()
    if arguments.json:
        write(json.dumps([each.as_dict() for each in found]))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("what", "published", "predicted", "error", "in bars"):
        table.add_column(name)
    for each in found:
        predicted = _spread(each.predicted, 1, 2 if each.unit == "x" else 0)
        table.add_row(
            each.what,
            f"{each.published:g} {each.unit}",
            predicted,
            f"{each.error:+.0%}",
            "yes" if each.inside else "NO",
        )
    PrintableConsole().print(table)
