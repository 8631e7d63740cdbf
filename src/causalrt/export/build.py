"""`build`: a checkpoint and a config in, a bundle out."""

import gc
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import WEIGHTS, new_bundle, write_manifest
from causalrt.engines.kinds import EXECUTORS, executor_kind
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import ConfigError, Faults
from causalrt.export.checkpoint import check_checkpoint, open_checkpoint, write_weights
from causalrt.export.options import CollectivesMode, FrontEnd, PluginsMode, Progress
from causalrt.model.vae_checkpoint import load_vae, vae_config_from_mapping
from causalrt.plugins.plugin_specs import MAX_HEAD_DIM

logger = logging.getLogger(__name__)

GRAPH_BYTES = 64 * 2**20
"""Disk that the graph files may take beside the weights; they hold tables and structure only."""


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
    plugins: PluginsMode = "auto",
    vae: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Compile a checkpoint into a bundle.

    Args:
        config: a recipe's config, overrides applied.
        checkpoint: Self-Forcing `.pt`, the bare Wan layout, or the diffusers layout (file or folder).
        out: the bundle's folder; appears whole or not at all.
        executors: what the bundle shall run on, among `EXECUTORS`; eager and inductor are always possible.
        targets: GPU architectures (`sm80`) to build TensorRT engines for; none is the GPU at hand.
        collectives: in TensorRT engines, whether the engine or the runtime exchanges between ranks.
        frontend: what makes TensorRT's network of the traced step.
        timing_cache: file with TensorRT's measured kernel times, read and written; by default one in the user's cache.
        plugins: whether self-attention is made of the fused ops: plugins for TensorRT, functions of standard ops for
            onnxruntime, and what eager and inductor run unless `load` is told otherwise. `auto` is off, for no GPU has measured
            them yet, and on where `video.time_index` is relative (for TensorRT then as standard ops).
        vae: Wan2.1's VAE, in its own layout or diffusers' (file or folder), or the file of a cosine transform
            (`model/block_dct.py`), so that the bundle makes pixels; None for latents.
        overwrite: replace a bundle that is there already.
        on_progress: told of each stage.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: the checkpoint or the VAE cannot be read, is not of this config, or holds values that are not finite.
        ConfigError: a combination of options cannot work.
        ExecutorError: an executor is unknown, or what it needs to build is missing here.
        BuildError: the bundle cannot be written, or a compiler refuses the graph.
    """
    faults = Faults()
    with faults:
        flavours = check_options(
            config.build.precision,
            executors=executors,
            targets=targets,
            collectives=collectives,
            frontend=frontend,
            timing_cache=timing_cache,
        )
    with faults:
        fused = fused_ops_wanted(plugins, config, [name for name in executors if name in FLAVOURS], frontend)
    faults.report()
    progress = on_progress or (lambda stage, done, total: None)
    opened = open_checkpoint(Path(checkpoint))
    check_checkpoint(opened, config.model)
    dtype = TORCH_DTYPES[config.build.precision]
    decoder = None if vae is None else _opened_vae(Path(vae), config)
    weight_bytes = sum(dtype.itemsize * math.prod(shape) for shape in opened.shapes.values())
    chosen = tuple(name for name in EXECUTORS if name == "eager" or name in executors)
    engine_sets = sum(len(found) for found in flavours.values()) * len(config.video.kinds_of_chunk)
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
        graphs: dict[str, Any] = {}
        engines: dict[str, Any] = {}
        if any(executor_kind(name).compiled for name in chosen):
            graphs = _write_graphs(config, folder, chosen, bool(flavours), collectives, frontend, progress, fused)
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
        for name, found in flavours.items():
            engines[name] = {"collectives": collectives, "frontend": frontend, "targets": {}}
            for target in found:
                engines[name]["targets"][target] = _build_target(
                    config, folder, graphs, name, target, frontend, timing_cache, progress, fused, decoder is not None
                )
        progress("hashes", 0, 1)
        write_manifest(
            folder,
            config=config,
            plugins=fused,
            vae=None if decoder is None else vae_config_from_mapping(decoder.config),
            executors=chosen,
            graphs=graphs,
            engines=engines,
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
) -> dict[str, list[str]]:
    """Check the options of a build; one error names everything that is wrong with them.

    Args:
        precision: of weights and activations; None if it is not known yet.
        executors: executors to build for.
        targets: GPU architectures of TensorRT engines.
        collectives: whether the `engine` or the `runtime` exchanges data between ranks.
        frontend: what makes TensorRT's network, `onnx` or `torch-tensorrt`.
        timing_cache: file of measured kernel times.

    Returns:
        The targets to build for, by TensorRT flavour.

    Raises:
        ConfigError: options do not go together, or several things are wrong.
        ExecutorError: an executor or a target is unknown, or TensorRT is missing here.
    """
    faults = Faults()
    for name in executors:
        with faults:
            executor_kind(name)
    flavours = {name: FLAVOURS[name] for name in executors if name in FLAVOURS}
    if not flavours:
        faults.report()
        if targets or frontend != "onnx" or collectives != "engine" or timing_cache is not None:
            raise ConfigError(
                "--target, --frontend, --collectives and --timing-cache are for TensorRT; add `--executor tensorrt_rtx` or "
                "`--executor tensorrt`"
            )
        return {}
    with faults:
        if timing_cache is not None and not any(flavour.timing_cache for flavour in flavours.values()):
            raise ConfigError(
                "--timing-cache is for `--executor tensorrt`: tensorrt_rtx measures nothing while it builds"
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
        from causalrt.export.torch_tensorrt import check_torch_tensorrt

        with faults:
            check_torch_tensorrt(tuple(flavours), collectives)
    wanted: list[str | None] = list(dict.fromkeys(target.lower() for target in targets)) or [None]
    checked: dict[str, list[str]] = {name: [] for name in flavours}
    for name, flavour in flavours.items():
        with faults:
            flavour.load()
            for target in wanted:
                with faults:
                    checked[name].append(flavour.check_target(target))
    faults.report()
    return checked


def fused_ops_wanted(mode: str, config: Config, flavours: Sequence[str], frontend: str) -> bool:
    """Whether the step is made with the fused ops.

    Args:
        mode: `on`, `off` or `auto`.
        config: of the bundle.
        flavours: of TensorRT, that engines are built with.
        frontend: of TensorRT.

    Raises:
        ConfigError: the mode is unknown, or something else that was asked for cannot be had with it.
    """
    relative = config.video.time_index == "relative"
    if mode not in get_args(PluginsMode):
        raise ConfigError(f"plugins must be {', '.join(get_args(PluginsMode))}, got {mode!r}")
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
    chosen: Sequence[str],
    tensorrt: bool,
    collectives: CollectivesMode,
    frontend: FrontEnd,
    progress: Progress,
    fused: bool,
) -> dict[str, Any]:
    """The ONNX files of every executor that wants some; the traced model is gone when this returns."""
    from causalrt.export.engine_files import write_engine_graphs
    from causalrt.export.onnx import runtime_graph, step_graph, write_segments, write_small_graphs
    from causalrt.export.trace import wan_from_file

    wan = wan_from_file(config, folder / WEIGHTS)
    write_small_graphs(wan, config, folder, progress)
    graphs: dict[str, Any] = {}
    for lone in config.video.kinds_of_chunk:
        prefix, key = ("lone-", "lone_") if lone else ("", "")
        segmented = None
        if "onnxruntime" in chosen:
            segmented = step_graph(wan, config, folder, progress, whole_slots=False, fused=fused, lone=lone)
            graphs[f"{key}segments"] = write_segments(
                runtime_graph(segmented, config), folder, f"{prefix}step", progress, at_cache_writes=False
            )
        if tensorrt and frontend == "onnx":
            graphs[f"{key}tensorrt"] = write_engine_graphs(
                wan, config, folder, progress, collectives=collectives, segmented=segmented, fused=fused, lone=lone
            )
        del segmented
    del wan
    gc.collect()
    return graphs


def _build_target(
    config: Config,
    folder: Path,
    graphs: dict[str, Any],
    name: str,
    target: str,
    frontend: FrontEnd,
    timing_cache: str | Path | None,
    progress: Progress,
    fused: bool,
    has_vae: bool,
) -> dict[str, Any]:
    from causalrt.export.engine_files import build_engines, default_timing_cache
    from causalrt.export.vae import build_vae_engines

    flavour = FLAVOURS[name]
    cache = Path(timing_cache) if timing_cache is not None else default_timing_cache(flavour, target)
    if frontend == "torch-tensorrt":
        from causalrt.export.torch_tensorrt import build_with_torch_tensorrt

        built = build_with_torch_tensorrt(config, folder, progress, flavour=flavour, target=target, timing_cache=cache)
    else:
        built = build_engines(
            config,
            folder,
            graphs["tensorrt"],
            progress,
            lone_parts=graphs.get("lone_tensorrt", ()),
            flavour=flavour,
            target=target,
            timing_cache=cache if flavour.timing_cache else None,
            fused=fused,
        )
    if has_vae:
        kept = cache if flavour.timing_cache else None
        built["vae"] = build_vae_engines(folder, progress, flavour=flavour, target=target, timing_cache=kept)
    return built
