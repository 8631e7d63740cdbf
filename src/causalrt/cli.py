"""The command line: `causalrt COMMAND --help`. Thin: every command reads arguments, calls one function, prints."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, get_args

import torch
from rich import box
from rich.table import Table

from causalrt import __version__
from causalrt.config import Config, TimeIndex, override
from causalrt.control_groups import available_cpus
from causalrt.engines.kinds import EXECUTORS
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import CausalRTError, ConfigError, Faults
from causalrt.progress import Progress
from causalrt.recipes import RECIPES, recipe
from causalrt.terminal import PrintableConsole, PrintableFormatter, printable
from causalrt.tools.load_arguments import add_cuda_graphs
from causalrt.tools.progress_bars import shown_progress

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
EXIT_FAILED, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141


def _say(text: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    print(printable(text), file=file, flush=flush)


class _Parser(argparse.ArgumentParser):
    """Prints errors without characters that steer a terminal; argparse makes the parsers of subcommands of this class, too."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _choose_dtype(arguments: argparse.Namespace, executors: Sequence[str]) -> None:
    """Choose bfloat16 for TensorRT unless a type is named: recipes have float32, for which it has no fused attention."""
    named = arguments.dtype or any(text.startswith("build.precision=") for text in arguments.set)
    if not named and any(name in FLAVOURS for name in executors):
        arguments.dtype = "bfloat16"


def _config(arguments: argparse.Namespace) -> Config:
    changes, faults = {}, Faults()
    for text in arguments.set:
        name, separator, value = text.partition("=")
        with faults:
            if not separator:
                raise ConfigError(f"--set wants FIELD=VALUE, for example --set video.window_frames=9, got {text!r}")
            changes[name] = value
    for flag, field in (("world_size", "world_size"), ("head_plan", "head_plan"), ("dtype", "precision")):
        if getattr(arguments, flag) is not None:
            changes[f"build.{field}"] = str(getattr(arguments, flag))
    with faults:
        config = override(recipe(arguments.recipe), changes)
    faults.report()
    return config


_SOURCE = ("recipe", "checkpoint", "out")
"""Options that a build from a checkpoint needs."""
_OF_THE_BUNDLE: dict[str, Any] = {
    **dict.fromkeys(("recipe", "checkpoint", "vae", "world_size", "head_plan", "dtype", "executor")),
    "target": [],
    "set": [],
    "prepare": False,
    "collectives": "engine",
    "frontend": "onnx",
    "plugins": "auto",
}
"""Options whose values `build --finish` takes from the bundle, with their defaults."""


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _build(arguments: argparse.Namespace) -> int:
    if arguments.finish is not None:
        return _finish_build(arguments)
    missing = [name for name in _SOURCE if getattr(arguments, name) is None]
    if missing:
        raise ConfigError(
            f"build needs {_flags(missing)}; or give --finish BUNDLE alone, to build the engines that a bundle lacks"
        )
    from causalrt.export.build import build, check_options
    from causalrt.export.checkpoint import open_checkpoint

    config, faults, executors = None, Faults(), arguments.executor or []
    _choose_dtype(arguments, executors)
    with faults:
        config = _config(arguments)
    with faults:
        check_options(
            arguments.dtype if config is None else config.build.precision,
            executors=executors,
            targets=arguments.target,
            collectives=arguments.collectives,
            frontend=arguments.frontend,
            timing_cache=arguments.timing_cache,
            prepare=arguments.prepare,
        )
    with faults:
        open_checkpoint(arguments.checkpoint)
    faults.report()
    assert config is not None
    default = ["onnxruntime"] if config.build.precision == "float32" else ["eager"]
    start = time.perf_counter()
    with shown_progress() as progress:
        path = build(
            config,
            checkpoint=arguments.checkpoint,
            out=arguments.out,
            executors=executors or default,
            targets=arguments.target,
            collectives=arguments.collectives,
            frontend=arguments.frontend,
            timing_cache=arguments.timing_cache,
            fused_ops=arguments.plugins,
            vae=arguments.vae,
            prepare=arguments.prepare,
            overwrite=arguments.overwrite,
            on_progress=progress,
        )
    return _report_build(path, time.perf_counter() - start, as_json=arguments.json)


def _finish_build(arguments: argparse.Namespace) -> int:
    from causalrt.export.finish import finish_build

    given = [name for name, default in _OF_THE_BUNDLE.items() if getattr(arguments, name) != default]
    if given:
        raise ConfigError(f"--finish builds what the bundle was prepared for; leave {_flags(given)} out")
    start = time.perf_counter()
    with shown_progress() as progress:
        path = finish_build(
            arguments.finish,
            out=arguments.out,
            timing_cache=arguments.timing_cache,
            overwrite=arguments.overwrite,
            on_progress=progress,
        )
    return _report_build(path, time.perf_counter() - start, as_json=arguments.json)


def _report_build(path: Path, seconds: float, *, as_json: bool) -> int:
    from causalrt.engines.bundle import how_to_finish, open_bundle

    bundle = open_bundle(path, verify=False)
    size, config = sum(bundle.sizes.values()), bundle.config
    if as_json:
        found = {"bundle": str(path), "seconds": seconds, "bytes": size, "config": config.as_dict()}
        _say(json.dumps(found | {"unfinished": list(bundle.unfinished)}))
        return 0
    done = "prepared" if bundle.unfinished else "built"
    _say(
        f"{path}: {done} in {seconds:.1f} s for {config.build.world_size} rank(s), in {config.build.precision}, "
        f"{size / 2**20:,.1f} MiB"
    )
    if bundle.unfinished:
        _say(f"its {' and '.join(bundle.unfinished)} engines are not built: copy the folder, and {how_to_finish(path)}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from causalrt.tools.inspect import inspect_bundle

    if arguments.target and not arguments.kernels:
        raise ConfigError("--target says what to compile kernels for; add --kernels")
    with shown_progress() as progress:
        found = inspect_bundle(
            arguments.bundle, kernels=arguments.target if arguments.kernels else None, on_progress=progress
        )
    steps = [step for engines in found["engines"] for step in engines["steps"]]
    tables = [table for step in steps for table in step["constants"].values()]
    code = 0 if all(table["equal_constants"] for table in tables) else EXIT_FAILED
    if arguments.json:
        _say(json.dumps(found))
        return code
    config, layout = found["config"], found["layout"]
    table = Table(title=found["path"], show_header=False, title_justify="left")
    table.add_row("executors", ", ".join(found["executors"]))
    table.add_row("plugins", found["plugins"])
    vae = {key: value for key, value in (found["vae"] or {}).items() if not key.startswith("latents_")}
    table.add_row("VAE", ", ".join(f"{key}={value}" for key, value in vae.items()) or "none: latents only")
    table.add_row("parameters", f"{found['parameters']:,}")
    for section, values in config.items():
        table.add_row(section, ", ".join(f"{key}={value}" for key, value in values.items()))
    table.add_row("layout", ", ".join(f"{key}={value}" for key, value in layout.items() if key != "balanced"))
    for number, shard in enumerate(layout["balanced"]):
        table.add_row(f"shard {number}", ", ".join(f"{key}={value}" for key, value in shard.items()))
    for name, parts in found["bytes_per_rank"].items():
        sizes = ", ".join(f"{key.removesuffix('_bytes')} {value / 2**20:,.1f}" for key, value in parts.items())
        table.add_row(f"MiB a rank, {name}", sizes)
    for name, parts in found["decoder_bytes"].items():
        sizes = ", ".join(f"{key.removesuffix('_bytes')} {value / 2**20:,.1f}" for key, value in parts.items())
        table.add_row(f"MiB, decoder, {name}", sizes)
    if found["graphs"]:
        exchanges = sum(graph["exchange_after"] for graph in found["graphs"])
        table.add_row("onnxruntime, step", f"{len(found['graphs'])} segments, {exchanges} all-to-alls")
    for engines in found["engines"]:
        _add_engine_rows(table, engines)
    for kernel in found.get("kernels", ()):
        table.add_row(*_kernel_row(kernel))
    table.add_row("toolchain", ", ".join(f"{key} {value}" for key, value in found["toolchain"].items()))
    for name, unfinished in found["unfinished"].items():
        targets = f" for {', '.join(unfinished['targets'])}" if unfinished["targets"] else ""
        table.add_row(name, f"engines{targets}: not built; {unfinished['to_do']}")
    table.add_row("files", f"{len(found['files'])}, {sum(found['files'].values()) / 2**20:,.1f} MiB")
    PrintableConsole().print(table)
    return code


def _add_engine_rows(table: Table, engines: dict[str, Any]) -> None:
    name = f"{engines['flavour']} {engines['target']}"
    files, sizes = engines["files"], engines["bytes_per_rank"]
    table.add_row(
        name,
        f"{engines['flavour']} {engines['version']}, {len(files)} files for every rank, "
        f"{sum(file['bytes'] for file in files.values()) / 2**20:,.1f} MiB, by {engines['frontend']}",
    )
    for number, step in enumerate(engines["steps"]):
        kind = f"{step['frames']}-frame step" if number else "step"
        _add_step_rows(table, f"{name}, {kind}", step, engines["collectives"])
    if engines["collectives"] == "engine":
        step_file, entry = list(files.items())[2]
        table.add_row(f"{name}, one for all ranks", f"{step_file}, sha256 {entry['sha256'][:16]}...")
    table.add_row(
        f"MiB a rank, {name}",
        ", ".join(f"{key.replace('_bytes', '')} {value / 2**20:,.1f}" for key, value in sizes.items()),
    )
    builder = engines["builder_memory"]
    table.add_row(
        f"MiB, {name}, by its builder",
        ", ".join(f"{key.removesuffix('_bytes')} {value / 2**20:,.1f}" for key, value in builder.items())
        if builder
        else "not in this bundle",
    )
    inspector = engines["inspector"]
    table.add_row(f"{name}, inspector", inspector.get("unavailable") or f"see --json ({len(inspector)} engines)")


def _add_step_rows(table: Table, name: str, step: dict[str, Any], collectives: str) -> None:
    where = "inside the engine" if collectives == "engine" else "at runtime"
    exchanges = step["collectives_in_engine"] + step["collectives_at_runtime"]
    table.add_row(
        name,
        f"{step['engines']} engine(s), {sum(step['layers'].values()):,} layers; {step['self_attentions']} self-attentions "
        f"({step['self_attentions_with_lengths']} with KV lengths), {step['cross_attentions']} cross-attentions, "
        f"{step['decomposable_attentions']} decomposable; {step['cache_updates']} KV updates in place; "
        + "".join(f"{count} {plugin} plugins; " for plugin, count in step["plugins"].items())
        + f"{exchanges} all-to-alls {where}"
        + (f" of {step['ranks_of_collectives']} ranks" if step["ranks_of_collectives"] else ""),
    )
    tables = ", ".join(
        f"{key} {'x'.join(map(str, entry['shape']))} {'equal' if entry['equal_constants'] else 'MISSING'}"
        for key, entry in step["constants"].items()
    )
    table.add_row(f"{name}, constants", tables)


def _kernel_row(kernel: dict[str, Any]) -> tuple[str, str]:
    name = f"{kernel['target']} {kernel['kernel']}" + (
        ", rotating" if kernel["rotate"] and kernel["kernel"] != "combine_splits" else ""
    )
    name += ", small tiles" if kernel["small_tiles"] else ""
    if "unavailable" in kernel:
        return name, f"unavailable: {kernel['unavailable'].splitlines()[0]}"
    blocks, splits = kernel["blocks_per_multiprocessor"], kernel["kv_splits"]
    facts = (
        f"grid {'x'.join(map(str, kernel['grid']))}" + (f" with {splits} key ranges" if splits > 1 else ""),
        f"{kernel['warps']} warp(s) ({kernel['threads']} threads)",
        f"{kernel['registers']} registers",
        f"SPILLS {kernel['spill_bytes']} bytes" if kernel["spill_bytes"] else "no spills",
        f"{kernel['shared_bytes']:,} bytes shared",
        f"{blocks} block(s) on each of {kernel['multiprocessors']} multiprocessors ({kernel['gpu']})"
        if blocks
        else f"DOES NOT FIT on a multiprocessor ({kernel['gpu']})",
        f"PTX {kernel['ptx_version']}, {kernel['ptx_bytes'] / 2**10:,.0f} KiB",
        "from the cache" if kernel["cached"] else "compiled",
    )
    return name, ", ".join(facts)


def _generate(arguments: argparse.Namespace) -> int:
    from causalrt.tools.generate import Request, generate

    request = Request(
        out=arguments.out,
        prompt=arguments.prompt,
        prompt_embeds=arguments.prompt_embeds,
        text_encoder=arguments.text_encoder,
        text_device=arguments.text_device,
        given=arguments.given,
        given_part=arguments.given_part,
        background=arguments.background,
        switches=arguments.switch,
        switch_policy=arguments.switch_policy,
        seed=arguments.seed,
        chunks=arguments.chunks,
        warm=arguments.warm,
        executor=arguments.executor,
        device=arguments.device,
        plugins=None if arguments.plugins is None else arguments.plugins == "on",
        cuda_graphs=arguments.cuda_graphs == "on",
        threads=arguments.threads,
        timeout_s=arguments.timeout,
    )
    with shown_progress() as progress:
        report = generate(arguments.bundle, request, on_progress=progress)
    if arguments.json:
        _say(json.dumps(report))
        return 0
    what = "frames" if "first_frame" in report else "latents"
    _say(f"{report['out']}: {what} {report['shape']}")
    for name, first in report["first_frame" if what == "frames" else "first_latents"].items():
        stages = ", ".join(f"{stage.replace('_', ' ')} {ms:.0f}" for stage, ms in first["stages_ms"].items())
        _say(f"first {what}, {name}: {first['total_ms']:.0f} ms ({stages})")
    last = report["chunks"][-1]
    _say(
        f"last chunk: {last['latency_ms']:.0f} ms, {last['queue_ms']:.0f} of them waiting for the context pass before it"
    )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    if (arguments.bundle is None) == (arguments.recorded is None):
        raise ConfigError("give a bundle, to certify it, or --recorded FILE, to replay a recording; one of the two")
    if arguments.bundle is not None:
        from causalrt.proof.command import run

        with shown_progress() as progress:
            code, text = run(arguments, on_progress=progress)
        _say(text)
        return code
    arguments.executor = arguments.executor or "onnxruntime"
    arguments.world_size = 1 if arguments.world_size is None else arguments.world_size
    arguments.time_index = arguments.time_index or "global"
    if arguments.emulate:
        with shown_progress() as progress:
            result = _compare_emulated(arguments, progress)
    elif arguments.dtype or arguments.collectives:
        raise ConfigError(
            "--dtype and --collectives are for --emulate: recordings are float32, and so are their replays"
        )
    else:
        from causalrt.proof.compare import compare_recorded

        with shown_progress() as progress:
            result = compare_recorded(
                arguments.recorded,
                executor=arguments.executor,
                world_size=arguments.world_size,
                head_plan=arguments.head_plan or "balanced",
                plugins=arguments.plugins == "on",
                time_index=arguments.time_index,
                cuda_graphs=arguments.cuda_graphs == "on",
                on_progress=progress,
            )
    if arguments.json:
        _say(json.dumps(result))
    else:
        if "emulated" in result:
            _say(f"{result['emulated']}; {result['collectives']} collectives, {result['precision']}")
        for name, error in result["max_abs_error"].items():
            _say(f"{name:8} {error:.2e}  at {result['worst'][name]}")
        for name, error in result.get("rms_error", {}).items():
            _say(f"{name:8} {error:.2e}  relative rms; eager's {result['eager_rms_error'][name]:.2e}")
        bound = (
            f"tolerance {result['tolerance']:.0e}"
            if "tolerance" in result
            else f"at most {result['eager_ratio']} x eager's rms"
        )
        verdict = "passed" if result["passed"] else "FAILED"
        _say(f"{verdict}: {result['executor']}, {result['world_size']} rank(s), {bound}")
    return 0 if result["passed"] else EXIT_FAILED


def _compare_emulated(arguments: argparse.Namespace, on_progress: Progress) -> dict[str, Any]:
    from causalrt.proof.compare import compare_emulated

    if arguments.executor not in FLAVOURS:
        raise ConfigError(
            f"--emulate is for --executor {' or '.join(FLAVOURS)}; {arguments.executor} runs here as it is"
        )
    return compare_emulated(
        arguments.recorded,
        executor=arguments.executor,
        world_size=arguments.world_size,
        head_plan=arguments.head_plan or "balanced",
        collectives=arguments.collectives or "engine",
        precision=arguments.dtype or "float32",
        plugins=arguments.plugins == "on",
        time_index=arguments.time_index,
        on_progress=on_progress,
    )


def _serve(arguments: argparse.Namespace) -> int:
    from causalrt.server.command import checked, run

    def started(url: str) -> None:
        _say(json.dumps({"url": url}) if arguments.json else f"serving at {url}", flush=True)

    from causalrt.tools.demo_request import ROWS

    faults = Faults()
    with faults:
        if arguments.bundle is not None and arguments.text_encoder is None:
            raise ConfigError(
                "a bundle's prompts need --text-encoder FOLDER; without a bundle the demo model is served"
            )
    with faults:
        if arguments.bundle is None and arguments.text_encoder is not None:
            raise ConfigError(
                "--text-encoder is a bundle's; name the bundle, or leave both out to serve the demo model"
            )
    with faults:
        if arguments.bundle is None and arguments.executor not in (None, *(executor for executor, _ in ROWS)):
            raise ConfigError(
                f"the demo model is not built for {arguments.executor}; leave --executor out, or name a bundle"
            )
    with faults:
        checked(arguments)
    faults.report()
    if arguments.bundle is not None:
        return run(arguments, version=__version__, on_start=started)
    from causalrt.tools.demo import served_demo

    with contextlib.ExitStack() as stack:
        with shown_progress() as progress:
            served = stack.enter_context(served_demo(on_progress=progress))
        vars(arguments).update(served)
        return run(arguments, version=__version__, on_start=started)


def _plan(arguments: argparse.Namespace) -> int:
    from causalrt.tools.plan.arguments import request_from_arguments
    from causalrt.tools.plan.command import check_request, run

    request, faults, config = request_from_arguments(arguments), Faults(), None
    arguments.head_plan = None  # `gathered` and `all` are no build options
    if arguments.dtype is None and request.gpu:
        arguments.dtype = "bfloat16"
    with faults:
        config = _config(arguments)
    with faults:
        check_request(request, config)
    faults.report()
    assert config is not None
    with shown_progress() as progress:
        run(request, config, write=_say, on_progress=progress)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from causalrt.measure.bench.arguments import request_from_arguments
    from causalrt.measure.bench.command import run

    request = request_from_arguments(arguments)

    def read_config() -> Config | None:
        if request.bundles:
            if arguments.recipe or arguments.set or arguments.dtype:
                raise ConfigError(
                    "bundles are what they were built as; leave --recipe, --set and --dtype out, or the bundles"
                )
            return None
        arguments.recipe = request.recipe
        arguments.world_size = arguments.head_plan = None
        _choose_dtype(arguments, arguments.executors or ())
        return _config(arguments)

    with shown_progress() as progress:
        run(request, read_config, write=_say, on_progress=progress)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from causalrt.tools.demo import row_name, run_demo
    from causalrt.tools.demo_request import request_from_arguments

    request = request_from_arguments(arguments)
    with shown_progress() as progress:
        result = run_demo(
            request, on_progress=progress, on_stage=lambda text: PrintableConsole(stderr=True).print(text)
        )
    code = 0 if result["passed"] else EXIT_FAILED
    if arguments.json:
        _say(json.dumps(result))
        return code
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("", "start s", "first ms", "chunk ms", "fps", "latents", "grey"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row_name(row["executor"], row["world_size"]),
            f"{row['load_s']:.1f}",
            f"{row['first_frame_ms']:.0f}",
            f"{row['median_chunk_ms']:.0f}",
            f"{row['frames_per_s']:.0f}",
            f"{row['latent_error']:.1e}",
            str(row["grey_levels"]),
        )
    PrintableConsole().print(table)
    first = result["rows"][0]
    _say(
        f"start: of the ranks; first: from the prompt to the first frames; chunk: the median.\nlatents, grey (levels, of 255): "
        f"the largest difference from {row_name(first['executor'], first['world_size'])}.\n"
        f"{'All rows agree' if result['passed'] else 'ROWS DISAGREE'}: at most {result['most_grey_levels']} grey level is "
        f"allowed. {result['total_s']:.0f} s in all, {result['build_s']:.0f} s of them building."
    )
    for path in result["files"]:
        _say(str(path))
    return code


def _doctor(arguments: argparse.Namespace) -> int:
    from causalrt.tools.doctor import examine
    from causalrt.tools.doctor_page import print_page

    found = examine()
    if arguments.json:
        _say(json.dumps(found))
    else:
        print_page(found, PrintableConsole(), version=__version__)
    return 0 if found["next"]["gpus_usable"] else EXIT_FAILED


def _gpu_day(arguments: argparse.Namespace) -> int:
    from causalrt.measure.gpu_day.arguments import request_from_arguments
    from causalrt.measure.gpu_day.command import run

    console, request = PrintableConsole(stderr=True), request_from_arguments(arguments)
    passed = run(request, version=__version__, write=_say, on_stage=lambda line: console.print(line, soft_wrap=True))
    return 0 if passed else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="causalrt", description="Causal video diffusion, compiled and in real time.")
    parser.add_argument("--version", action="version", version=f"causalrt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, summary: str, examples: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(function=function)
        made.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return made

    plans = ("balanced", "padded", "grouped")
    dtype: Any = {"type": lambda text: DTYPES.get(text, text), "choices": tuple(dict.fromkeys(DTYPES.values()))}
    timeout: Any = {"type": float, "help": "seconds after which a silent rank has failed (60 on GPUs, 600 on a CPU)"}
    made = command(
        "build",
        _build,
        "Compile a checkpoint into a bundle.",
        "  causalrt build --recipe wan_1_3b_480p --checkpoint self_forcing_dmd.pt --vae Wan2.1_VAE.pth \\\n"
        "      --world-size 8 --out bundle\n"
        "  causalrt build --recipe wan_1_3b_480p --checkpoint self_forcing_dmd.pt --world-size 8 \\\n"
        "      --executor tensorrt --out bundle\n"
        "  causalrt build --finish bundle\n"
        "  causalrt build --recipe wan_1_3b_480p --checkpoint self_forcing_dmd.pt --executor tensorrt_rtx --target sm89 \\\n"
        "      --out bundle\n"
        "  causalrt build --recipe wan_1_3b_480p --checkpoint wan/ --set video.window_frames=12 \\\n"
        "      --set video.sink_frames=3 --set sampler.steps=1000,500 --out bundle",
    )
    made.add_argument("--recipe", help=f"one of {', '.join(RECIPES)}")
    made.add_argument("--checkpoint", type=Path, help="Self-Forcing .pt, Wan or diffusers layout")
    made.add_argument(
        "--finish",
        type=Path,
        metavar="BUNDLE",
        help="instead of a checkpoint: build the TensorRT engines that this bundle lacks, for the GPU at hand; it takes the "
        "bundle's place, or goes to --out",
    )
    made.add_argument(
        "--prepare",
        action="store_true",
        help="leave TensorRT engines to --finish, on the machine that runs them; without a GPU, those of tensorrt always are",
    )
    made.add_argument(
        "--vae", type=Path, help="Wan2.1's VAE, its .pth or the diffusers layout; without it, latents only"
    )
    made.add_argument("--out", type=Path, help="folder of the bundle")
    made.add_argument("--world-size", type=int, help="ranks")
    made.add_argument("--head-plan", choices=plans, help="how attention is divided over ranks")
    made.add_argument(
        "--dtype", **dtype, help="of weights and activations, as fp32, bf16 or fp16 (fp32; bf16 for TensorRT)"
    )
    made.add_argument("--executor", action="append", choices=EXECUTORS, help="may be given again; eager always works")
    made.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="ARCH",
        help="GPU architecture to build TensorRT engines for, as sm80; may be given again; by default the GPU at hand",
    )
    made.add_argument(
        "--collectives",
        choices=("engine", "runtime"),
        default="engine",
        help="who exchanges between ranks under TensorRT: one engine for the whole step, or the runtime (engine)",
    )
    made.add_argument(
        "--frontend", choices=("onnx", "torch-tensorrt"), default="onnx", help="what hands the step to TensorRT (onnx)"
    )
    made.add_argument(
        "--plugins",
        choices=("on", "off", "auto"),
        default="auto",
        help="self-attention by the fused ops; auto is off until a GPU has measured them (auto)",
    )
    made.add_argument("--timing-cache", type=Path, help="TensorRT's measured kernel times, read and written")
    made.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override any field of the recipe"
    )
    made.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")

    made = command(
        "inspect",
        _inspect,
        "Verify a bundle and show what is in it.",
        "  causalrt inspect bundle\n  causalrt inspect bundle --json\n  causalrt inspect bundle --kernels --target sm80",
    )
    made.add_argument("bundle", type=Path)
    made.add_argument(
        "--kernels", action="store_true", help="compile the fused kernels: registers, shared memory, spills"
    )
    made.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="ARCH",
        help="with --kernels: GPU architecture, as sm80; may be given again (all that are known)",
    )

    made = command(
        "generate",
        _generate,
        "Generate a video, or its latents, from a prompt, or from the embeddings of one.",
        "  causalrt generate bundle --prompt 'a fox in the snow' --text-encoder Wan2.1-T2V-1.3B --out fox.mp4\n"
        "  causalrt generate bundle --prompt 'it runs' --text-encoder Wan2.1-T2V-1.3B --given fox.mp4 --out more.mp4\n"
        "  causalrt generate bundle --prompt-embeds prompt.safetensors --seed 1 --out latents.safetensors",
    )
    made.add_argument("bundle", type=Path)
    prompts = made.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="what to show; with --text-encoder")
    prompts.add_argument("--prompt-embeds", type=Path, help=".safetensors, .npy or .pt, [rows, text_dim]")
    made.add_argument("--text-encoder", type=Path, help="folder of umT5: Wan's released one, or the diffusers layout")
    made.add_argument("--text-device", default="cpu", help="where it computes: cpu or cuda:N (cpu)")
    made.add_argument("--out", required=True, type=Path, help=".mp4 or .safetensors (latents); given frames included")
    made.add_argument(
        "--given", type=Path, help="what the video begins with: latents as --out writes them, or an image or clip"
    )
    made.add_argument(
        "--given-part",
        choices=("first", "last"),
        help="use the first or the last frames of a clip that leaves no room for --chunks (by default it is refused)",
    )
    made.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help="colour behind transparent parts of an image or clip, in CSS, as black or #102030 (white)",
    )
    made.add_argument(
        "--switch",
        action="append",
        default=[],
        metavar="CHUNK=PROMPT",
        help="another prompt from this chunk on, given as the first one is; may be given again",
    )
    made.add_argument(
        "--switch-policy",
        choices=("keep", "recache", "flush"),
        default="keep",
        help="what becomes of history then: it stays, is computed again under the new prompt, or goes (keep)",
    )
    made.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    made.add_argument("--warm", action="store_true", help="then time the first frame of a second video, all being warm")
    made.add_argument(
        "--chunks", type=int, help="by default as many as the horizon holds; more with time_index=relative"
    )
    made.add_argument("--executor", choices=EXECUTORS, help="by default the best that the bundle was built for")
    made.add_argument("--device", choices=("cuda", "cpu"), help="by default GPUs, where each rank has one")
    made.add_argument(
        "--plugins", choices=("on", "off"), help="fused ops in eager and inductor (as the bundle was built)"
    )
    add_cuda_graphs(made)
    made.add_argument("--threads", type=int, help="CPU threads of each rank")
    made.add_argument("--timeout", **timeout)

    made = command(
        "compare",
        _compare,
        "Certify that a bundle computes what eager does, or replay a recorded rollout; exit 0 only if all of it agrees.",
        "  causalrt compare bundle --checkpoint self_forcing_dmd.pt --out certificate\n"
        "  causalrt compare --recorded tests/data/golden/B.safetensors --executor onnxruntime --world-size 8\n"
        "  causalrt compare --recorded tests/data/golden/B.safetensors --executor tensorrt_rtx --world-size 8 --emulate",
    )
    from causalrt.proof.command import add_arguments as add_certificate_arguments

    add_certificate_arguments(made)
    made.add_argument("--recorded", type=Path, help="recorded rollout (safetensors), to replay instead")
    made.add_argument(
        "--executor", choices=EXECUTORS, help="(the best that the bundle was built for; of recordings onnxruntime)"
    )
    made.add_argument("--world-size", type=int, help="ranks (those of the bundle; of recordings 1)")
    made.add_argument(
        "--head-plan", choices=plans, help="with --recorded: how attention is divided over ranks (balanced)"
    )
    made.add_argument("--plugins", choices=("on", "off"), help="with --recorded: self-attention by the fused ops (off)")
    made.add_argument(
        "--time-index",
        choices=get_args(TimeIndex),
        help="with --recorded: what rotary angles count time by; relative rotates keys when they are read (global)",
    )
    add_cuda_graphs(made)
    made.add_argument(
        "--emulate",
        action="store_true",
        help="TensorRT without a GPU: build its graphs, and run them with ONNX Runtime, all ranks in this process",
    )
    made.add_argument("--dtype", **dtype, help="with --emulate: of weights and activations (float32)")
    made.add_argument(
        "--collectives", choices=("engine", "runtime"), help="with --emulate: who exchanges between ranks (engine)"
    )

    from causalrt.server.command import add_arguments

    made = command(
        "serve",
        _serve,
        "Serve a bundle: video jobs, real-time sessions, and a page to try them.",
        "  causalrt serve\n"
        "  causalrt serve bundle --text-encoder Wan2.1-T2V-1.3B\n"
        "  causalrt serve bundle --text-encoder Wan2.1-T2V-1.3B --host 0.0.0.0 --tokens tokens.txt --spool /var/lib/causalrt",
    )
    made.add_argument("bundle", type=Path, nargs="?", help="by default the demo model, built for 2 ranks")
    made.add_argument(
        "--text-encoder", type=Path, help="folder of umT5 (Wan's released one, or the diffusers layout), or of words"
    )
    made.add_argument("--text-device", default="cpu", help="where it computes: cpu or cuda:N (cpu)")
    made.add_argument("--executor", choices=EXECUTORS, help="by default the best that the bundle was built for")
    made.add_argument("--device", choices=("cuda", "cpu"), help="by default GPUs, where each rank has one")
    add_cuda_graphs(made)
    made.add_argument("--threads", type=int, help="CPU threads of each rank")
    made.add_argument("--timeout", **timeout)
    add_arguments(made)

    from causalrt.tools.plan.arguments import add_arguments as add_plan_arguments

    made = command(
        "plan",
        _plan,
        "Predict latency, frames a second, memory and traffic of a recipe on GPUs, or on this machine once measured.",
        "  causalrt plan --recipe wan_1_3b_480p --gpu a800 --world-size 8\n"
        "  causalrt plan --recipe wan_1_3b_480p --gpu h100 --fused-ops on --vae shared --timeline timeline.png\n"
        "  causalrt plan --recipe bench_cpu --calibrate machine.json\n"
        "  causalrt plan --validate",
    )
    made.add_argument("--recipe", default="wan_1_3b_480p", help=f"one of {', '.join(RECIPES)} (wan_1_3b_480p)")
    made.add_argument("--dtype", **dtype, help="of weights and activations (bfloat16 with --gpu)")
    made.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override any field of the recipe"
    )
    add_plan_arguments(made)

    from causalrt.measure.bench.arguments import add_arguments as add_bench_arguments

    made = command(
        "bench",
        _bench,
        "Measure executors and numbers of ranks side by side: one JSON, one picture, one table.",
        "  causalrt bench\n"
        "  causalrt bench one-rank two-ranks --executors eager,onnxruntime --out measured\n"
        "  causalrt bench --recipe small --world-sizes 1,2 --repeats 9\n"
        "  causalrt bench --recipe wan_1_3b_480p --dtype bf16 --device cuda --executors eager,inductor",
    )
    add_bench_arguments(made)
    made.add_argument("--dtype", **dtype, help="with --recipe: of weights and activations (fp32; bf16 with TensorRT)")
    made.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="with --recipe: override any field of it"
    )

    made = command(
        "demo",
        _demo,
        "Make a video with the small model that ships with the package, by two executors on 1 to 8 ranks, and compare.",
        "  causalrt demo\n"
        "  causalrt demo --prompt 'a blue square bounces up and down slowly' --switch '4=a blue square moves left quickly'",
    )
    from causalrt.tools.demo_request import add_arguments as add_demo_arguments

    add_demo_arguments(made)
    from causalrt.measure.gpu_day.arguments import add_arguments as add_gpu_day_arguments

    made = command(
        "gpu-day",
        _gpu_day,
        "Try everything on a GPU that nobody has tried, within a time budget: one report, rewritten after each part.",
        "  causalrt gpu-day --budget 570 --out report\n"
        "  causalrt gpu-day --parts golden ranks\n"
        "  causalrt gpu-day --dry-run",
    )
    add_gpu_day_arguments(made)
    command(
        "doctor",
        _doctor,
        "Say what this machine can build and run, why not, and what to do next.",
        "  causalrt doctor\n  causalrt doctor --json\n\n"
        "exit code: 0, or 1 if this machine has NVIDIA GPUs and CUDA does not work on all of them; what else is missing does\n"
        "not change it",
    )
    return parser


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does, so that nothing is left half-written; a second one does not disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 a comparison failed or `doctor` found GPUs that do not work, 2 an error, 130
        interrupted, 141 the reader of the output has left.
    """
    arguments = _parser().parse_args(argv)
    if logging.lastResort is not None:  # it shows the warnings of commands that configure no logging
        logging.lastResort.setFormatter(PrintableFormatter())
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    before = None
    with contextlib.suppress(ValueError):  # not the main thread
        before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: int = arguments.function(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except CausalRTError as error:
        _say(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        _say("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return code


if __name__ == "__main__":
    sys.exit(main())
