"""`finish_build`: builds the engines of a bundle that was prepared on another machine, from its graphs and weights alone.

    build    checkpoint -> weights, graphs -> engines              on a machine with the GPU
    build    checkpoint -> weights, graphs                         on any machine
    finish                 weights, graphs -> engines              on the machine with the GPU, without the checkpoint

Both functions build engines with `build_flavour`.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from causalrt.config import Config
from causalrt.engines.bundle import (
    MANIFEST,
    VAE_WEIGHTS,
    WEIGHTS,
    Bundle,
    new_bundle,
    open_bundle,
    unchanged,
    write_manifest,
)
from causalrt.engines.kinds import EXECUTORS
from causalrt.engines.step_record import FlavourEngines, StepGraphs
from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour
from causalrt.engines.toolchain import toolchain_versions
from causalrt.errors import BundleError, ConfigError, ExecutorError, Faults
from causalrt.progress import Progress

logger = logging.getLogger(__name__)

BUILDERS = ("tensorrt-rtx", "tensorrt")
"""Packages of the toolchain that build engines; all others are used only to prepare a bundle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A prepared bundle, from which engines are built.

    Attributes:
        folder: folder with the weights and the graphs.
        config: the bundle's config.
        steps: the graphs of each kind of step.
        fused: whether self-attention uses the fused ops.
        has_vae: whether the bundle also has graphs of a VAE.
    """

    folder: Path
    config: Config
    steps: Sequence[StepGraphs]
    fused: bool
    has_vae: bool


def finish_build(
    bundle: str | Path,
    *,
    out: str | Path | None = None,
    timing_cache: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Build the engines that a bundle lacks, without the checkpoint.

    Args:
        bundle: folder of a bundle that `build` left unfinished.
        out: folder of the finished bundle; by default it replaces the unfinished one atomically. If anything fails, the
            unfinished bundle is left unchanged and can be finished later.
        timing_cache: file with TensorRT's measured kernel times, read and written; by default a file in the user's cache.
        overwrite: whether to replace another bundle at `out`.
        on_progress: called at the start and the end of each stage.

    Returns:
        The finished bundle's folder.

    Raises:
        BundleError: the bundle is damaged or complete, has no engines to build, was prepared by another version of CausalRT, or
            was replaced during the build.
        ConfigError: a timing cache was given, but none of the bundle's TensorRT flavours uses one.
        ExecutorError: TensorRT or a GPU is missing, or the bundle was not prepared for this GPU.
        BuildError: the bundle cannot be written, or TensorRT rejects a graph.
    """
    progress = on_progress or (lambda stage, done, total: None)
    source = open_bundle(Path(bundle))
    targets = _targets_here(source, timing_cache)
    warn_of_unlisted(targets)
    target = source.path if out is None else Path(out).absolute()
    in_place = os.path.realpath(target) == os.path.realpath(source.path)
    if in_place:
        _check_nothing_else(source)
    engine_sets = sum(map(len, targets.values())) * len(source.config.video.step_frames)
    weight_bytes = source.sizes[WEIGHTS] + source.sizes.get(VAE_WEIGHTS, 0)
    needed_bytes = sum(source.sizes.values()) + engine_sets * weight_bytes
    with new_bundle(target, overwrite=in_place or overwrite, needed_bytes=needed_bytes) as folder, unchanged(source):
        for name in source.sizes:
            # Copied rather than linked: onnx does not read weights from a file with more than one hard link.
            shutil.copyfile(source.path / name, folder / name)
        prepared = Prepared(
            folder=folder,
            config=source.config,
            steps=source.steps,
            fused=source.fused_ops,
            has_vae=source.vae is not None,
        )
        engines = {
            name: build_flavour(prepared, name, source.engines[name], found, timing_cache, progress)
            for name, found in targets.items()
        }
        progress("hashes", 0, 1)
        built = {name: version for name, version in toolchain_versions().items() if name in BUILDERS}
        write_manifest(
            folder,
            config=source.config,
            fused_ops=source.fused_ops,
            vae=source.vae,
            executors=tuple(name for name in EXECUTORS if name in source.executors or name in engines),
            steps=source.steps,
            engines={name: record.as_record() for name, record in source.engines.items()} | engines,
            toolchain={**source.toolchain, **built},
        )
        progress("hashes", 1, 1)
    logger.info("bundle finished at %s", target)
    return Path(bundle if out is None else out)


def _targets_here(source: Bundle, timing_cache: str | Path | None) -> dict[str, tuple[str, ...]]:
    """Architectures to build for, by flavour; anything that would make the build fail later is rejected first."""
    if not source.unfinished:
        built = [f"{name} for {', '.join(record.targets)}" for name, record in source.engines.items()]
        raise BundleError(
            f"{source.path} is complete, with engines of {' and '.join(built)}; there is nothing to finish"
            if built
            else f"{source.path} was built without TensorRT, so it has no engines to finish; build with `--executor tensorrt`"
        )
    here, there = toolchain_versions().get("causalrt"), source.toolchain.get("causalrt")
    if here and there and here != there:  # a source tree that is not installed has no version
        raise BundleError(
            f"{source.path} was prepared by CausalRT {there}, and this is {here}; finish it with the version that prepared it, "
            "or prepare it again with this one"
        )
    faults = Faults()
    targets = {}
    for name in source.unfinished:
        with faults:
            targets[name] = _targets_of(source, name)
    with faults:
        check_timing_cache(timing_cache, source.unfinished)
    faults.report()
    return targets


def _targets_of(source: Bundle, name: str) -> tuple[str, ...]:
    flavour, record = FLAVOURS[name], source.engines[name]
    flavour.load()
    if record.frontend == "torch-tensorrt":
        torch_tensorrt_frontend().check_torch_tensorrt((name,), record.collectives)
    if flavour.targets:
        return tuple(flavour.check_target(target) for target in record.wanted or (None,))
    here = flavour.check_target(None)
    if record.wanted and here not in record.wanted:
        raise ExecutorError(
            f"{source.path} was prepared for {', '.join(record.wanted)}, and the GPU here is {here}; finish it on such a GPU, "
            f"or prepare it again with `--target {here}`"
        )
    return (here,)


def torch_tensorrt_frontend() -> ModuleType:
    """Import the `torch-tensorrt` front end; the build imports it nowhere else."""
    from causalrt.export import torch_tensorrt

    return torch_tensorrt


def check_timing_cache(timing_cache: str | Path | None, names: tuple[str, ...]) -> None:
    """Reject a timing cache for flavours that measure nothing.

    Raises:
        ConfigError: a timing cache is given, and no flavour among `names` uses one.
    """
    if timing_cache is not None and not any(FLAVOURS[name].timing_cache for name in names):
        raise ConfigError("--timing-cache is for `--executor tensorrt`: tensorrt_rtx measures nothing while it builds")


def warn_of_unlisted(targets: Mapping[str, tuple[str, ...]]) -> None:
    """Log a warning for each architecture that NVIDIA does not list for its TensorRT flavour."""
    for name, found in targets.items():
        for target in found:
            if (said := FLAVOURS[name].unlisted(target)) is not None:
                logger.warning("%s", said)


def _check_nothing_else(source: Bundle) -> None:
    """Reject a bundle folder with other files, which would be lost when the finished folder replaces it."""
    others = sorted(path.name for path in source.path.iterdir() if path.name not in (MANIFEST, *source.sizes))
    if others:
        raise BundleError(
            f"{source.path} holds files that are not part of the bundle: {', '.join(others)}; move them elsewhere, or finish "
            "it to another folder with `--out`"
        )


def build_flavour(
    prepared: Prepared,
    name: str,
    record: FlavourEngines,
    targets: tuple[str, ...],
    timing_cache: str | Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Build the engines of a flavour for `targets` in the prepared folder, and return their record for the manifest.

    Raises:
        BuildError: TensorRT rejected a graph, or its process died.
        ExecutorError: TensorRT is not installed.
    """
    return {
        "collectives": record.collectives,
        "frontend": record.frontend,
        "targets": {
            target: _build_target(
                prepared,
                flavour=FLAVOURS[name],
                target=target,
                frontend=record.frontend,
                timing_cache=timing_cache,
                progress=progress,
            )
            for target in targets
        },
    }


def _build_target(
    prepared: Prepared,
    *,
    flavour: Flavour,
    target: str,
    frontend: str,
    timing_cache: str | Path | None,
    progress: Progress,
) -> dict[str, Any]:
    from causalrt.export.engine_files import build_engines, default_timing_cache
    from causalrt.export.vae import build_vae_engines

    config, folder = prepared.config, prepared.folder
    cache = Path(timing_cache) if timing_cache is not None else default_timing_cache(flavour, target)
    built: dict[str, Any]
    if frontend == "torch-tensorrt":
        built = torch_tensorrt_frontend().build_with_torch_tensorrt(
            config, folder, progress, flavour=flavour, target=target, timing_cache=cache
        )
    else:
        built = build_engines(
            config,
            folder,
            prepared.steps,
            progress,
            flavour=flavour,
            target=target,
            timing_cache=cache if flavour.timing_cache else None,
            fused=prepared.fused,
        )
    if prepared.has_vae:
        kept = cache if flavour.timing_cache else None
        built["vae"] = build_vae_engines(folder, progress, flavour=flavour, target=target, timing_cache=kept)
    return built
