"""What is to be measured, as it was asked for: bundles of one model, given, or built of random weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from causalrt.config import BuildConfig, Config, override
from causalrt.control_groups import available_cpus
from causalrt.engines.bundle import VAE_WEIGHTS, WEIGHTS, Bundle, open_bundle
from causalrt.engines.kinds import executor_kind
from causalrt.errors import BundleError, ConfigError
from causalrt.export.build import build, fused_ops_wanted
from causalrt.export.options import PluginsMode
from causalrt.export.random_weights import random_weights
from causalrt.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A bundle, or one that is yet to be built of random weights.

    Attributes:
        path: its folder.
        config: of it.
        plugins: what its step is made of.
        bundle: the opened bundle; None if it will be built for the executors that are wanted.
    """

    path: Path
    config: Config
    plugins: bool
    bundle: Bundle | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """What was asked for; None is everything that there is.

    Attributes:
        executors: names.
        world_sizes: numbers of ranks.
        plugins: fused ops on, off or both, where a bundle leaves that open.
        cuda_graphs: on, off or both, for executors that capture.
        device: `cpu` or `cuda`.
        threads: of all ranks of a side together.
    """

    executors: Sequence[str] | None = None
    world_sizes: Sequence[int] | None = None
    plugins: str | None = None
    cuda_graphs: str = "on"
    device: str | None = None
    threads: int | None = None

    @property
    def chosen_device(self) -> str:
        """That of every side."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def all_threads(self) -> int:
        """To be divided among the ranks of a side."""
        return self.threads or available_cpus()


def bundles_of(paths: Sequence[Path], wishes: BenchRequest) -> list[Source]:
    """Given bundles, opened.

    Raises:
        BundleError: one is damaged, or none is for a number of ranks that is asked for.
        ConfigError: they are not of one model.
    """
    if len({path.absolute() for path in paths}) < len(paths):
        raise ConfigError(f"a bundle is given twice: {', '.join(map(str, paths))}; leave one out")
    opened = [open_bundle(path, verify=False) for path in paths]
    for other in opened[1:]:
        _check_same_work(opened[0], other)
    built_for = [bundle.config.build.world_size for bundle in opened]
    for ranks in wishes.world_sizes or ():
        if ranks not in built_for:
            raise BundleError(
                f"no bundle for {ranks} rank(s): those given were built for {', '.join(map(str, built_for))}; build one with "
                f"`--world-size {ranks}`, or leave it out of --world-sizes"
            )
    return [
        Source(path=bundle.path, config=bundle.config, plugins=bundle.fused_ops, bundle=bundle)
        for bundle in opened
        if wishes.world_sizes is None or bundle.config.build.world_size in wishes.world_sizes
    ]


def _check_same_work(one: Bundle, other: Bundle) -> None:
    neutral = BuildConfig()
    configs = [
        replace(bundle.config, build=replace(neutral, precision=bundle.config.build.precision))
        for bundle in (one, other)
    ]
    hashes = [[bundle.hashes.get(name) for name in (WEIGHTS, VAE_WEIGHTS)] for bundle in (one, other)]
    if configs[0] != configs[1] or hashes[0] != hashes[1]:
        raise ConfigError(
            f"{one.path} and {other.path} are not the same work: bundles that are compared differ in ranks and head plan "
            "alone; build them of one checkpoint with the same settings"
        )


def sources_of(config: Config, wishes: BenchRequest, folder: Path) -> list[Source]:
    """Bundles of a recipe, to be built in `folder`."""
    if wishes.chosen_device == "cuda":
        usual = sorted({1, max(1, torch.cuda.device_count())})
    else:
        usual = [1, 2] if wishes.all_threads > 1 else [1]
    mode: PluginsMode = "on" if wishes.plugins == "on" else "auto"
    fused = fused_ops_wanted(mode, config, (), "onnx")
    return [
        Source(
            path=folder / f"ranks{ranks}",
            config=override(config, {"build.world_size": str(ranks)}),
            plugins=fused,
            bundle=None,
        )
        for ranks in dict.fromkeys(wishes.world_sizes or usual)
    ]


def build_random(
    sources: Sequence[Source], wanted: Mapping[Path, Sequence[str]], folder: Path, *, seed: int, on_progress: Progress
) -> None:
    """Build bundles for the executors that are wanted of each, by path, of one set of random weights."""
    checkpoint = folder / "checkpoint.safetensors"
    model = sources[0].config.model
    save_file({f"model.{name}": tensor for name, tensor in random_weights(model, seed=seed)}, checkpoint)
    for source in sources:
        if names := wanted.get(source.path):
            build(
                source.config,
                checkpoint=checkpoint,
                out=source.path,
                executors=[name for name in dict.fromkeys(names) if executor_kind(name).compiled] or ["eager"],
                plugins="on" if source.plugins else "auto",
                on_progress=on_progress,
            )
    checkpoint.unlink()
