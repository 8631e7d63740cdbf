"""`causalrt build`: compile a checkpoint into a bundle, or build the engines that a bundle lacks."""

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from causalrt.commands.output import say
from causalrt.config import Config
from causalrt.errors import ConfigError, Faults
from causalrt.options import (
    FUSED_OPS,
    INPUT,
    OUTPUT,
    Dtype,
    ExecutorName,
    HeadPlan,
    Json,
    Overrides,
    RecipeName,
    configured,
    default_dtype,
    flags,
)
from causalrt.tools.progress_bars import shown_progress

COMPILATION = Parameter(group=Group("Compilation", sort_key=2))
TENSORRT = Parameter(group=Group("TensorRT", sort_key=3))
EXAMPLES = """
causalrt build --recipe wan_1_3b_480p --checkpoint self_forcing_dmd.pt \\
    --vae Wan2.1_VAE.pth --world-size 8 --out bundle
causalrt build --recipe wan_1_3b_480p --checkpoint self_forcing_dmd.pt \\
    --world-size 8 --executor tensorrt --out bundle
causalrt build --finish bundle
causalrt build --recipe wan_1_3b_480p --checkpoint self_forcing_dmd.pt \\
    --executor tensorrt_rtx --target sm89 --out bundle
causalrt build --recipe wan_1_3b_480p --checkpoint wan/ \\
    --set video.window_frames=12 --set video.sink_frames=3 \\
    --set sampler.steps=1000,500 --out bundle
"""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """What to build, from what, and for what.

    Attributes:
        recipe: see `RecipeName`.
        checkpoint: Checkpoint of the transformer: a Self-Forcing .pt file, or a file or folder in Wan's or the diffusers
            layout.
        vae: VAE of Wan2.1, as its .pth file or in the diffusers layout; without one the bundle makes latents only.
        world_size: Number of ranks.
        head_plan: see `HeadPlan`.
        dtype: Type of weights and activations; bf16 with TensorRT by default, and otherwise the recipe's, which is fp32.
        executor: Executor that the bundle is compiled for; may be repeated. The eager executor runs every bundle.
        target: GPU architecture to build TensorRT engines for, for example sm80; may be repeated. By default it is the
            architecture of the GPU in this machine.
        overrides: see `Overrides`.
        prepare: Leave TensorRT engines to --finish on the machine that runs them. Without a GPU, engines of tensorrt always are
            left to it.
        collectives: What exchanges data between ranks under TensorRT: the engine, which then holds a whole step, or the
            runtime.
        frontend: What makes TensorRT's network.
        fused_ops: Compute self-attention with the fused ops. With auto they are off until they have been measured on a GPU.
        finish: Build the TensorRT engines that this bundle lacks, for the GPU in this machine. The result replaces the bundle,
            or goes to --out.
        timing_cache: File of measured kernel times that TensorRT reads and writes.
        out: Folder of the bundle.
        overwrite: Replace an existing bundle.
        json: see `Json`.
    """

    recipe: RecipeName | None = None
    checkpoint: Annotated[Path | None, Parameter(group=INPUT)] = None
    vae: Annotated[Path | None, Parameter(group=INPUT)] = None
    world_size: Annotated[int | None, COMPILATION] = None
    head_plan: Annotated[HeadPlan | None, COMPILATION] = None
    dtype: Annotated[Dtype | None, COMPILATION] = None
    executor: Annotated[tuple[ExecutorName, ...], COMPILATION] = ()
    target: Annotated[tuple[str, ...], TENSORRT, Parameter(metavar="ARCH")] = ()
    overrides: Overrides = ()
    prepare: Annotated[bool, TENSORRT] = False
    collectives: Annotated[Literal["engine", "runtime"], TENSORRT] = "engine"
    frontend: Annotated[Literal["onnx", "torch-tensorrt"], TENSORRT] = "onnx"
    fused_ops: Annotated[Literal["on", "off", "auto"], COMPILATION, FUSED_OPS] = "auto"
    finish: Annotated[Path | None, TENSORRT, Parameter(metavar="BUNDLE")] = None
    timing_cache: Annotated[Path | None, TENSORRT, Parameter(metavar="FILE")] = None
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    overwrite: Annotated[bool, Parameter(group=OUTPUT)] = False
    json: Json = False


REQUIRED = ("recipe", "checkpoint", "out")
WITH_FINISH = ("finish", "timing_cache", "out", "overwrite", "json")
"""The options that go together with `--finish`, which takes everything else from the bundle."""


def build(request: BuildRequest = BuildRequest()) -> int:
    """Compile a checkpoint into a bundle."""
    start = time.perf_counter()
    path = _compile(request) if request.finish is None else _finish(request, request.finish)
    return _report(path, time.perf_counter() - start, as_json=request.json)


def _compile(request: BuildRequest) -> Path:
    missing = [name for name in REQUIRED if getattr(request, name) is None]
    if missing:
        raise ConfigError(
            f"build needs {flags(missing)}; or give --finish BUNDLE alone, to build the engines that a bundle lacks"
        )
    from causalrt.export.build import build

    assert request.checkpoint is not None
    assert request.out is not None
    config = _checked_config(request, request.checkpoint)
    default = ("onnxruntime",) if config.build.precision == "float32" else ("eager",)
    with shown_progress() as progress:
        return build(
            config,
            checkpoint=request.checkpoint,
            out=request.out,
            executors=request.executor or default,
            targets=request.target,
            collectives=request.collectives,
            frontend=request.frontend,
            timing_cache=request.timing_cache,
            fused_ops=request.fused_ops,
            vae=request.vae,
            prepare=request.prepare,
            overwrite=request.overwrite,
            on_progress=progress,
        )


def _checked_config(request: BuildRequest, checkpoint: Path) -> Config:
    """The config of a request, after everything that can be checked before the build."""
    from causalrt.export.build import check_options
    from causalrt.export.checkpoint import open_checkpoint

    assert request.recipe is not None
    config, faults = None, Faults()
    dtype = request.dtype or default_dtype(request.overrides, request.executor)
    build = {"world_size": request.world_size, "head_plan": request.head_plan, "precision": dtype}
    with faults:
        config = configured(request.recipe, request.overrides, **build)
    with faults:
        check_options(
            dtype if config is None else config.build.precision,
            executors=request.executor,
            targets=request.target,
            collectives=request.collectives,
            frontend=request.frontend,
            timing_cache=request.timing_cache,
            prepare=request.prepare,
        )
    with faults:
        open_checkpoint(checkpoint)
    faults.report()
    assert config is not None
    return config


def _finish(request: BuildRequest, bundle: Path) -> Path:
    from causalrt.export.finish import finish_build

    unneeded = [
        field.name
        for field in fields(request)
        if field.name not in WITH_FINISH and getattr(request, field.name) != field.default
    ]
    if unneeded:
        raise ConfigError(f"--finish builds what the bundle was prepared for; leave {flags(unneeded)} out")
    with shown_progress() as progress:
        return finish_build(
            bundle,
            out=request.out,
            timing_cache=request.timing_cache,
            overwrite=request.overwrite,
            on_progress=progress,
        )


def _report(path: Path, seconds: float, *, as_json: bool) -> int:
    from causalrt.engines.bundle import how_to_finish, open_bundle

    bundle = open_bundle(path, verify=False)
    size, config = sum(bundle.sizes.values()), bundle.config
    if as_json:
        found = {"bundle": str(path), "seconds": seconds, "bytes": size, "config": config.as_dict()}
        say(json.dumps(found | {"unfinished": list(bundle.unfinished)}))
        return 0
    done = "prepared" if bundle.unfinished else "built"
    say(
        f"{path}: {done} in {seconds:.1f} s for {config.build.world_size} rank(s), in {config.build.precision}, "
        f"{size / 2**20:,.1f} MiB"
    )
    if bundle.unfinished:
        say(f"its {' and '.join(bundle.unfinished)} engines are not built: copy the folder, and {how_to_finish(path)}")
    return 0
