"""`finish_build`: the engines of a bundle that was prepared where they could not be built, from its graphs and weights alone.

    build    checkpoint -> weights, graphs -> engines              on a machine with the GPU
    build    checkpoint -> weights, graphs                         on any machine
    finish                 weights, graphs -> engines              on the machine with the GPU, without the checkpoint

Both ways build engines by `build_flavour`.
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
"""Packages of the toolchain that build engines; all others have done their work when a bundle is prepared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What engines are built from.

    Attributes:
        folder: holds the weights and the graphs.
        config: of the bundle.
        steps: the graphs of each kind of step.
        fused: self-attention is made of the fused ops.
        has_vae: there are graphs of a VAE too.
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
    """Build the engines that a bundle lacks; the checkpoint is not needed.

    Args:
        bundle: folder of a bundle that `build` has left unfinished.
        out: folder of the finished bundle; by default it takes the place of the unfinished one, in one step. If anything goes
            wrong, the unfinished one stays as it is and can be finished again.
        timing_cache: file with TensorRT's measured kernel times, read and written; by default one in the user's cache.
        overwrite: replace another bundle that is at `out`.
        on_progress: called with each stage.

    Returns:
        The finished bundle's folder.

    Raises:
        BundleError: the bundle is damaged or complete, has no engines to build, was prepared by another version of CausalRT, or
            was replaced meanwhile.
        ConfigError: the timing cache is for another TensorRT.
        ExecutorError: TensorRT or a GPU is missing, or the GPU is not one that the bundle was prepared for.
        BuildError: the bundle cannot be written, or TensorRT refuses a graph.
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
            # Copied and not linked: onnx reads no weights from a file that has a second hard link.
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
    """The architectures to build for, by flavour, everything having been refused that would fail later."""
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
    """The front end `torch-tensorrt`; no other line of the build imports it."""
    from causalrt.export import torch_tensorrt

    return torch_tensorrt


def check_timing_cache(timing_cache: str | Path | None, names: tuple[str, ...]) -> None:
    """Refuse a timing cache where nothing is measured.

    Raises:
        ConfigError: no flavour among `names` has one.
    """
    if timing_cache is not None and not any(FLAVOURS[name].timing_cache for name in names):
        raise ConfigError("--timing-cache is for `--executor tensorrt`: tensorrt_rtx measures nothing while it builds")


def warn_of_unlisted(targets: Mapping[str, tuple[str, ...]]) -> None:
    """Log a warning for each architecture, by flavour, that NVIDIA does not list for it."""
    for name, found in targets.items():
        for target in found:
            if (said := FLAVOURS[name].unlisted(target)) is not None:
                logger.warning("%s", said)


def _check_nothing_else(source: Bundle) -> None:
    """The finished folder takes the place of this one, so it must hold nothing that would be lost."""
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
    """Build the engines of a flavour for `targets` into a prepared folder; what the manifest says of them.

    Raises:
        BuildError: TensorRT refused a graph, or its process died.
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
