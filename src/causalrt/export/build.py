"""`build`: compiles a checkpoint and a config into a bundle."""

import gc
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import WEIGHTS, new_bundle, write_manifest
from causalrt.engines.kinds import EXECUTORS, executor_kind
from causalrt.engines.step_record import FlavourEngines, StepGraphs, StepPart
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import ConfigError, Faults
from causalrt.export.checkpoint import check_checkpoint, open_checkpoint, write_weights
from causalrt.export.finish import (
    Prepared,
    build_flavour,
    check_timing_cache,
    torch_tensorrt_frontend,
    warn_of_unlisted,
)
from causalrt.export.options import CollectivesMode, FrontEnd, FusedOpsMode
from causalrt.model.codecs.registry import load_vae, vae_config_from_mapping
from causalrt.plugins.shard_blocks import MAX_HEAD_DIM
from causalrt.progress import Progress

logger = logging.getLogger(__name__)

GRAPH_BYTES = 64 * 2**20
"""Bytes of disk reserved for the graph files, which contain only tables and structure, not the weights."""


class EnginePlan(NamedTuple):
    """The targets of a flavour's engines, and whether they are built now or later.

    Attributes:
        targets: GPU architectures; for engines that are built later, an empty tuple means any architecture.
        later: whether the engines are left to `finish_build` on another machine.
    """

    targets: tuple[str, ...]
    later: bool


def build(
    config: Config,
    *,
    checkpoint: str | Path,
    out: str | Path,
    executors: Sequence[str] = ("onnxruntime",),
    targets: Sequence[str] = (),
    collectives: CollectivesMode = "engine",
    frontend: FrontEnd = "onnx",
    timing_cache: str | Path | None = None,
    fused_ops: FusedOpsMode = "auto",
    vae: str | Path | None = None,
    prepare: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Compile a checkpoint into a bundle.

    `tensorrt` builds its engines on the GPU that will run them. Without a GPU, the bundle is written without these engines,
    with a warning, and `finish_build` adds them on the machine that has the GPU. Other executors can run the bundle as it is.

    Args:
        config: config of a recipe, with overrides applied.
        checkpoint: a Self-Forcing `.pt`, the bare Wan layout, or the diffusers layout (file or folder).
        out: folder of the bundle; it appears only once the bundle is complete.
        executors: executors to build for, from `EXECUTORS`; eager and inductor can always run the bundle.
        targets: GPU architectures (such as `sm80`) to build TensorRT engines for; by default that of the local GPU.
        collectives: whether the `engine` or the `runtime` runs the all-to-alls of TensorRT engines.
        frontend: the front end that turns the traced step into a TensorRT network.
        timing_cache: file with TensorRT's measured kernel times, read and written; by default a file in the user's cache.
        fused_ops: whether self-attention uses the fused ops: plugins for TensorRT, functions of standard ops for onnxruntime,
            and the default of eager and inductor, which `load` can override. `auto` is on if `video.time_index` is relative
            (for TensorRT as standard ops), and otherwise off, because they have not been measured on any GPU yet.
        vae: Wan2.1's VAE, in its own or the diffusers layout (file or folder), or the file of a cosine transform
            (`model/codecs/block_dct.py`), for a bundle that outputs pixels; None for latents.
        prepare: whether to leave all TensorRT engines to `finish_build` even if this machine has a GPU.
        overwrite: whether to replace an existing bundle.
        on_progress: called at the start and the end of each stage.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: the checkpoint or the VAE cannot be read, does not match the config, or has values that are not finite.
        ConfigError: the options cannot be combined.
        ExecutorError: an executor is unknown, or software or hardware that its build requires is missing.
        BuildError: the bundle cannot be written, or a compiler rejects the graph.
    """
    faults = Faults()
    with faults:
        plans = check_options(
            config.build.precision,
            executors=executors,
            targets=targets,
            collectives=collectives,
            frontend=frontend,
            timing_cache=timing_cache,
            prepare=prepare,
        )
    with faults:
        fused = fused_ops_wanted(fused_ops, config, [name for name in executors if name in FLAVOURS], frontend)
    faults.report()
    progress = on_progress or (lambda stage, done, total: None)
    warn_of_unlisted({name: plan.targets for name, plan in plans.items()})
    later = [name for name, plan in plans.items() if plan.later]
    if later and not prepare:
        logger.warning(
            "torch sees no GPU here, so the %s engines are left for `causalrt build --finish` on the GPU that will run them",
            " and ".join(later),
        )
    opened = open_checkpoint(Path(checkpoint))
    check_checkpoint(opened, config.model)
    dtype = TORCH_DTYPES[config.build.precision]
    decoder = None if vae is None else _opened_vae(Path(vae), config)
    weight_bytes = sum(dtype.itemsize * math.prod(shape) for shape in opened.shapes.values())
    chosen = tuple(name for name in EXECUTORS if name == "eager" or name in executors)
    here = {name: plan.targets for name, plan in plans.items() if not plan.later}
    engine_sets = sum(map(len, here.values())) * len(config.video.step_frames)
    if decoder is not None:
        weight_bytes += sum(parameter.nbytes for parameter in decoder.parameters())
    needed_bytes = weight_bytes * (1 + engine_sets) + GRAPH_BYTES
    with new_bundle(Path(out), overwrite=overwrite, needed_bytes=needed_bytes) as folder:
        write_weights(
            opened,
            config.model,
            dtype=dtype,
            out=folder / WEIGHTS,
            on_progress=lambda done, total: progress("weights", done, total),
        )
        steps = [StepGraphs() for _ in config.video.step_frames]
        if any(executor_kind(name).compiled for name in chosen):
            steps = _write_graphs(
                config,
                folder,
                progress,
                chosen=chosen,
                tensorrt=bool(plans) and frontend == "onnx",
                collectives=collectives,
                fused=fused,
            )
        if decoder is not None:
            from causalrt.export.vae import write_vae

            video = config.video
            write_vae(
                decoder,
                folder,
                progress,
                latent_height=video.latent_height,
                latent_width=video.latent_width,
                graphs=any(executor_kind(name).compiled for name in chosen),
            )
        records = {
            name: FlavourEngines(collectives=collectives, frontend=frontend, targets={}, wanted=plan.targets)
            for name, plan in plans.items()
        }
        prepared = Prepared(folder=folder, config=config, steps=steps, fused=fused, has_vae=decoder is not None)
        built = {
            name: build_flavour(prepared, name, records[name], found, timing_cache, progress)
            for name, found in here.items()
        }
        progress("hashes", 0, 1)
        write_manifest(
            folder,
            config=config,
            fused_ops=fused,
            vae=None if decoder is None else vae_config_from_mapping(decoder.config),
            executors=tuple(name for name in chosen if name not in later),
            steps=steps,
            engines={name: record.as_record() for name, record in records.items()} | built,
        )
        progress("hashes", 1, 1)
    logger.info("bundle written to %s", out)
    return Path(out)


def _opened_vae(path: Path, config: Config) -> Any:
    from causalrt.export.vae import check_vae

    vae = load_vae(path, dtype=TORCH_DTYPES[config.build.precision])
    check_vae(vae, config)
    return vae


def check_options(
    precision: str | None,
    *,
    executors: Sequence[str],
    targets: Sequence[str],
    collectives: str,
    frontend: str,
    timing_cache: str | Path | None,
    prepare: bool = False,
) -> dict[str, EnginePlan]:
    """Check the options of a build and report all problems in one error.

    Args:
        precision: type of weights and activations; None if it is not known yet.
        executors: executors to build for.
        targets: GPU architectures of TensorRT engines.
        collectives: whether the `engine` or the `runtime` exchanges data between ranks.
        frontend: the front end that creates the TensorRT network, `onnx` or `torch-tensorrt`.
        timing_cache: file of measured kernel times.
        prepare: whether to leave all engines to `finish_build`.

    Returns:
        The plan of the engines to build, by TensorRT flavour.

    Raises:
        ConfigError: the options cannot be combined, or there are several problems.
        ExecutorError: an executor or a target is unknown, or TensorRT is not installed.
    """
    faults = Faults()
    for name in executors:
        with faults:
            executor_kind(name)
    flavours = {name: FLAVOURS[name] for name in executors if name in FLAVOURS}
    if not flavours:
        faults.report()
        if targets or frontend != "onnx" or collectives != "engine" or timing_cache is not None or prepare:
            raise ConfigError(
                "--target, --frontend, --collectives, --timing-cache and --prepare are for TensorRT; add "
                "`--executor tensorrt_rtx` or `--executor tensorrt`"
            )
        return {}
    here = tuple(name for name, flavour in flavours.items() if not prepare and flavour.builds_here())
    with faults:
        check_timing_cache(timing_cache, tuple(flavours))
        if timing_cache is not None and "tensorrt" not in here:
            raise ConfigError(
                "--timing-cache is for the machine that builds the engines; give it to `causalrt build --finish` there"
            )
    for option, value, choices in (
        ("collectives", collectives, ("engine", "runtime")),
        ("frontend", frontend, ("onnx", "torch-tensorrt")),
    ):
        with faults:
            if value not in choices:
                raise ConfigError(f"{option} must be {' or '.join(choices)}, got {value!r}")
    with faults:
        if precision == "float32":
            raise ConfigError(
                "TensorRT has fused attention kernels in bfloat16 and float16 only, and build.precision is float32; "
                "build with `--dtype bf16` or `--dtype fp16`"
            )
    if frontend == "torch-tensorrt":
        with faults:
            torch_tensorrt_frontend().check_torch_tensorrt(here, collectives)
    named = list(dict.fromkeys(target.lower() for target in targets))
    checked: dict[str, list[str]] = {name: [] for name in flavours}
    for name, flavour in flavours.items():
        with faults:
            if name in here:
                flavour.load()
            for target in named:
                with faults:
                    check = flavour.check_target if name in here else flavour.check_later_target
                    checked[name].append(check(target))
            if not named and (name in here or flavour.targets):
                checked[name].append(flavour.check_target(None))
    faults.report()
    return {name: EnginePlan(tuple(found), later=name not in here) for name, found in checked.items()}


def fused_ops_wanted(mode: str, config: Config, flavours: Sequence[str], frontend: str) -> bool:
    """Whether the step uses the fused ops.

    Args:
        mode: `on`, `off` or `auto`.
        config: the bundle's config.
        flavours: TensorRT flavours that engines are built for.
        frontend: the front end that creates the TensorRT network.

    Raises:
        ConfigError: the mode is unknown, or cannot be combined with the other options.
    """
    relative = config.video.time_index == "relative"
    if mode not in get_args(FusedOpsMode):
        raise ConfigError(f"fused_ops must be {', '.join(get_args(FusedOpsMode))}, got {mode!r}")
    if relative and mode == "off":
        raise ConfigError("video.time_index=relative is what the fused ops do; leave `--plugins` out")
    if relative and frontend != "onnx":
        raise ConfigError(
            f"video.time_index=relative is for `--frontend onnx`; {frontend} has no converter for its ops"
        )
    if mode == "on":
        if relative and flavours:
            raise ConfigError(
                "no TensorRT plugin rotates keys when it reads them; build with `--plugins auto`, which takes standard ops "
                "for that, or with `--set video.time_index=global`"
            )
        if flavours and config.model.head_dim > MAX_HEAD_DIM:
            raise ConfigError(
                f"plugins take heads of {MAX_HEAD_DIM} channels at most, got {config.model.head_dim}; build with "
                "`--plugins off`"
            )
        without = [name for name in flavours if not FLAVOURS[name].plugins]
        if without:
            raise ConfigError(f"{without[0]} has no plugins; build with `--plugins off`, or with `--executor tensorrt`")
        if frontend != "onnx":
            raise ConfigError(
                f"--plugins on is for `--frontend onnx`; {frontend} has converters for the ops without plugins"
            )
    return relative or mode == "on"


def _write_graphs(
    config: Config,
    folder: Path,
    progress: Progress,
    *,
    chosen: Sequence[str],
    tensorrt: bool,
    collectives: CollectivesMode,
    fused: bool,
) -> list[StepGraphs]:
    """Write the ONNX files that the chosen executors need; the traced model is freed before this returns."""
    from causalrt.export.engine_files import write_engine_graphs
    from causalrt.export.onnx import runtime_graph, step_graph, step_prefix, write_segments, write_small_graphs
    from causalrt.export.trace import wan_from_file

    wan = wan_from_file(config, folder / WEIGHTS)
    write_small_graphs(wan, config, folder, progress)
    steps = []
    for step in range(len(config.video.step_frames)):
        segments: tuple[StepPart, ...] = ()
        engine_parts: tuple[StepPart, ...] = ()
        segmented = None
        if any(executor_kind(name).graphs == "segments" for name in chosen):
            segmented = step_graph(wan, config, folder, progress, whole_slots=False, fused=fused, step=step)
            name = f"{step_prefix(config, step)}step"
            segments = write_segments(runtime_graph(segmented, config), folder, name, progress, at_cache_writes=False)
        if tensorrt:
            engine_parts = write_engine_graphs(
                wan, config, folder, progress, collectives=collectives, segmented=segmented, fused=fused, step=step
            )
        steps.append(StepGraphs(segments=segments, tensorrt=engine_parts))
        del segmented
    del wan
    gc.collect()
    return steps
