"""Bundles of the `tiny` recipe with random weights, and what tests ask of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from causalrt import Config, build, override, recipe
from causalrt.export.random_weights import random_weights

Bundles = Callable[..., Path]
"""`bundles(world_size, {"video.window_frames": "9"})`, the second argument optional."""


def tiny_config(world_size: int = 1, changes: dict[str, str] | None = None) -> Config:
    return override(recipe("tiny"), {"build.world_size": str(world_size), **(changes or {})})


def write_checkpoint(config: Config, path: Path) -> Path:
    save_file({f"model.{name}": tensor for name, tensor in random_weights(config.model, seed=0)}, path)
    return path


def bundle_factory(folder: Path, *, executor: str = "eager", vae: Path | None = None) -> Bundles:
    """Builds bundles for an executor, each of them once."""
    built: dict[Config, Path] = {}

    def bundles(world_size: int = 1, changes: dict[str, str] | None = None) -> Path:
        config = tiny_config(world_size, changes)
        if config not in built:
            weights = write_checkpoint(config, folder / f"{len(built)}.safetensors")
            out = folder / f"bundle-{len(built)}"
            built[config] = build(config, checkpoint=weights, out=out, executors=[executor], vae=vae)
        return built[config]

    return bundles


def prompt(seed: int = 0, rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, tiny_config().model.text_dim, generator=torch.Generator().manual_seed(seed))


def num_steps(count: int) -> dict[str, str]:
    """The override for a schedule of so many denoising steps, which is what makes a chunk last."""
    return {"sampler.steps": ",".join(str(1000 - i) for i in range(count))}
