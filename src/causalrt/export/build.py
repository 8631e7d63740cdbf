"""`build`: a checkpoint and a config in, a bundle out."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from causalrt.config import Config
from causalrt.engines.base import EXECUTORS, TORCH_DTYPES
from causalrt.engines.bundle import WEIGHTS, new_bundle, write_manifest
from causalrt.errors import ConfigError
from causalrt.export.checkpoint import check_checkpoint, open_checkpoint, write_weights

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

GRAPH_BYTES = 64 * 2**20
"""Disk that the graph files may take beside the weights; they hold tables and structure only."""


def build(
    config: Config,
    *,
    checkpoint: str | Path,
    out: str | Path,
    executors: Sequence[str] = ("onnxruntime",),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Compile a checkpoint into a bundle.

    Args:
        config: a recipe's config, overrides applied.
        checkpoint: Self-Forcing `.pt`, the bare Wan layout, or the diffusers layout (file or folder).
        out: the bundle's folder; appears whole or not at all.
        executors: what the bundle shall run on, among `EXECUTORS`; eager is always possible.
        overwrite: replace a bundle that is there already.
        on_progress: told of each stage.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: the checkpoint cannot be read, is not of this config, or holds values that are not finite.
        ConfigError: an executor is unknown, or cannot run the config's precision.
        BuildError: the bundle cannot be written.
    """
    unknown = set(executors) - set(EXECUTORS)
    if unknown:
        raise ConfigError(f"no executor {', '.join(sorted(unknown))}; this version has: {', '.join(EXECUTORS)}")
    if "onnxruntime" in executors and config.build.precision != "float32":
        raise ConfigError(
            f"onnxruntime on a CPU runs float32 only, and build.precision is {config.build.precision}; "
            "build with `--set build.precision=float32`, or with `--executor eager`"
        )
    progress = on_progress or (lambda stage, done, total: None)
    opened = open_checkpoint(Path(checkpoint))
    check_checkpoint(opened, config.model)
    dtype = TORCH_DTYPES[config.build.precision]
    weight_bytes = sum(dtype.itemsize * math.prod(shape) for shape in opened.shapes.values())
    chosen = tuple(name for name in EXECUTORS if name == "eager" or name in executors)
    with new_bundle(Path(out), overwrite=overwrite, needed_bytes=weight_bytes + GRAPH_BYTES) as folder:
        write_weights(
            opened,
            config.model,
            dtype=dtype,
            out=folder / WEIGHTS,
            on_progress=lambda done, total: progress("weights", done, total),
        )
        graphs = {}
        if "onnxruntime" in chosen:
            from causalrt.export.onnx import write_onnx_graphs

            graphs = write_onnx_graphs(config, folder, progress)
        write_manifest(folder, config=config, executors=chosen, graphs=graphs)
    logger.info("bundle written to %s", out)
    return Path(out)
