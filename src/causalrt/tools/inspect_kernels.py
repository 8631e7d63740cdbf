"""Compile the fused kernels of a layer at a bundle's sizes, for GPUs that this machine need not have.

    Config, target --> launches of a layer --> cache or compiler --> registers, shared memory, spills, blocks that fit

| kernel                                     | launched                                                |
|--------------------------------------------|---------------------------------------------------------|
| `qk_norm_rope`                             | always                                                  |
| `rope_attention_N`                         | for N shards, over one range of keys                    |
| `rope_attention_split_N`, `combine_splits` | instead of it, where ranges of keys fill the GPU better |

The names and launches are those of the plugins (`plugin_specs`), which bind all rows of the KV slots. Eager and inductor bind
only the rows that are filled, so that strides differ, and the ranges of keys are chosen for fewer rows. With
`video.time_index=relative`, attention rotates what it reads, which no plugin does. Otherwise its plugin has a second
tactic with smaller tiles; TensorRT uses the faster one, and nothing else launches it.

The best number of key ranges depends on the number of multiprocessors, which a target does not determine. `GPUS` names one GPU
for each target; if this machine has a GPU of that target, its number is used.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.tensorrt_flavour import device_target
from causalrt.errors import ConfigError, KernelError
from causalrt.layout import Layout, layout_from_config
from causalrt.plugins.kernel_launch import KernelLaunch, require_triton
from causalrt.plugins.plugin_specs import COMBINE_SPLITS, QK_NORM_ROPE, rope_attention_spec
from causalrt.plugins.ptx import TARGETS, CompiledKernel, cached_kernel, compile_kernel
from causalrt.plugins.shard_blocks import blocks_from_shares
from causalrt.plugins.tensorrt_plugin import THREADS_PER_WARP
from causalrt.progress import Progress

STAGE = "kernels"
"""Name of the compilation in progress reports."""

KIB = 1024
SCHEDULERS, REGISTERS_OF_SCHEDULER, REGISTER_UNIT = 4, 16384, 8
SHARED_RESERVED_BYTES, SHARED_UNIT_BYTES = 1024, 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU with the limits of a multiprocessor (CUDA's technical specifications by compute capability).

    Attributes:
        target: compute capability, such as 80.
        name: product name.
        num_multiprocessors: number of multiprocessors.
        shared_bytes: shared memory of a multiprocessor.
        max_warps: most warps on a multiprocessor.
        max_blocks: most blocks on a multiprocessor.
    """

    target: int
    name: str
    num_multiprocessors: int
    shared_bytes: int
    max_warps: int
    max_blocks: int


GPUS: Mapping[int, Gpu] = {
    gpu.target: gpu
    for gpu in (
        Gpu(target=80, name="A100", num_multiprocessors=108, shared_bytes=164 * KIB, max_warps=64, max_blocks=32),
        Gpu(target=90, name="H100 SXM", num_multiprocessors=132, shared_bytes=228 * KIB, max_warps=64, max_blocks=32),
        Gpu(target=120, name="RTX 5090", num_multiprocessors=170, shared_bytes=100 * KIB, max_warps=48, max_blocks=24),
    )
}
"""The GPU that kernels are planned for if this machine has none of that target, by target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedKernel:
    """A kernel that a layer launches.

    Attributes:
        name: name of its plugin.
        gpu: GPU that it is planned for.
        kv_splits: number of key ranges.
        rotate: whether it rotates the keys that it reads.
        small_tiles: whether it is the second tactic of its plugin.
        launch: the launch, or the error if there is none.
    """

    name: str
    gpu: Gpu
    kv_splits: int
    rotate: bool
    launch: KernelLaunch | KernelError
    small_tiles: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledFacts:
    """A compiled kernel: its launch, the resources of a thread and of a block, and the PTX."""

    grid: Sequence[int]
    warps: int
    threads: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    blocks_per_multiprocessor: int
    ptx_version: str
    ptx_bytes: int
    cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelReport:
    """A kernel of a layer on one target; `compiled` is a message if it cannot be compiled."""

    kernel: str
    target: str
    gpu: str
    multiprocessors: int
    kv_splits: int
    rotate: bool
    small_tiles: bool
    compiled: CompiledFacts | str

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types in one level; `unavailable` is the message of a kernel that cannot be compiled."""
        found = asdict(self)
        compiled = found.pop("compiled")
        return found | ({"unavailable": compiled} if isinstance(compiled, str) else compiled)


def targets_from_names(names: Sequence[str]) -> tuple[int, ...]:
    """Parse targets such as `sm80`; without any, all known targets.

    Raises:
        ConfigError: a target is unknown.
    """
    known = {f"sm{target}": target for target in TARGETS}
    for name in names:
        if name not in known:
            raise ConfigError(f"no kernels are compiled for {name!r}; take some of {', '.join(known)}, or none for all")
    return tuple(dict.fromkeys(known[name] for name in names)) or TARGETS


def describe_kernels(
    config: Config, *, targets: Sequence[int], cache: Path, on_progress: Progress = lambda *_: None
) -> list[KernelReport]:
    """Describe every kernel of a layer for every target.

    Args:
        config: config whose layout, head size, precision and slot rows determine the kernels.
        targets: compute capabilities out of `TARGETS`.
        cache: folder of compiled kernels (`ptx.default_cache()`).
        on_progress: called if kernels must be compiled.

    Raises:
        KernelError: Triton is not installed, or the cache cannot be read or written. The report of a kernel that cannot be
            compiled has the message instead.
    """
    require_triton()
    planned = [kernel for target in targets for kernel in plan_kernels(config, gpu_from_target(target))]
    found = []
    try:
        cached = [_from_cache(kernel, cache) for kernel in planned]
        num_missing, num_done = cached.count(None), 0
        for kernel, result in zip(planned, cached, strict=True):
            if result is not None:
                found.append(_entry(kernel, result, cached=True))
                continue
            on_progress(STAGE, num_done, num_missing)
            found.append(_entry(kernel, _compile(kernel, cache), cached=False))
            num_done += 1
            on_progress(STAGE, num_done, num_missing)
    except OSError as error:
        raise KernelError(
            f"compiled kernels cannot be kept in {cache}: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return found


def gpu_from_target(target: int) -> Gpu:
    """The GPU of this machine if it is of that target, and otherwise the one in `GPUS`."""
    gpu = GPUS[target]
    if torch.cuda.is_available() and device_target(torch.device("cuda", 0)) == f"sm{target}":
        here = torch.cuda.get_device_properties(0)
        return replace(gpu, name=here.name, num_multiprocessors=here.multi_processor_count)
    return gpu


def plan_kernels(config: Config, gpu: Gpu) -> list[PlannedKernel]:
    """The kernels of one layer, as the ops and the plugins plan them.

    Raises:
        KernelError: Triton is not installed.
    """
    require_triton()
    layout = layout_from_config(config)
    qk_norm_rope = _plan_qk_norm_rope(config, layout)
    first = PlannedKernel(name=QK_NORM_ROPE.name, gpu=gpu, kv_splits=1, rotate=False, launch=qk_norm_rope)
    return [first, *_plan_rope_attention(config, layout, gpu, rotate=config.video.time_index == "relative")]


def _plan_qk_norm_rope(config: Config, layout: Layout) -> KernelLaunch:
    from causalrt.plugins.qk_norm_rope_launch import plan

    model = config.model
    return plan(
        num_rows=layout.local_tokens,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        num_places=layout.scatter_destinations().shape[3],
        dtype=TORCH_DTYPES[config.build.precision],
        eps=model.eps,
        row_strides=(model.dim,) * 3,
    )


def _plan_rope_attention(config: Config, layout: Layout, gpu: Gpu, *, rotate: bool) -> list[PlannedKernel]:
    from causalrt.plugins.rope_attention_launch import RopeAttentionPlan, Tiles, plan, small_tiles_for, tiles_for

    shards, dtype = layout.shards, TORCH_DTYPES[config.build.precision]
    blocks = blocks_from_shares(
        (layout.world_size, layout.scatter_rows, config.model.head_dim),
        num_tokens=layout.num_tokens,
        num_heads=[shard.num_heads for shard in shards],
        splits=[shard.split for shard in shards],
    )

    large = tiles_for(gpu.target, dtype=dtype, head_dim=blocks.head_dim, rotate=rotate)
    small = small_tiles_for(dtype)
    tactics = [large] if rotate or small == large else [large, small]

    def with_tiles(tiles: Tiles, kv_splits: int | None) -> RopeAttentionPlan:
        return plan(
            blocks,
            dtype=dtype,
            slot_rows=config.slot_rows,
            whole_slots=True,
            rotate=rotate,
            tiles=tiles,
            num_multiprocessors=gpu.num_multiprocessors,
            kv_splits=kv_splits,
        )

    def planned(
        name: str, kv_splits: int, launch: KernelLaunch | KernelError, tiles: Tiles | None = None
    ) -> PlannedKernel:
        return PlannedKernel(
            name=name,
            gpu=gpu,
            kv_splits=kv_splits,
            rotate=rotate,
            launch=launch,
            small_tiles=tiles is not None and tiles != large,
        )

    whole, split = (rope_attention_spec(num_shards=len(shards), split=split).name for split in (False, True))
    try:
        best = with_tiles(large, None)
    except KernelError as error:
        return [planned(whole, 1, error)]
    found = [planned(whole, 1, with_tiles(tiles, 1).attend, tiles) for tiles in tactics]
    if best.combine is not None:
        kv_splits = best.kv_splits
        found += [planned(split, kv_splits, with_tiles(tiles, kv_splits).attend, tiles) for tiles in tactics]
        found.append(planned(COMBINE_SPLITS.name, kv_splits, best.combine))
    return found


def _from_cache(kernel: PlannedKernel, cache: Path) -> CompiledKernel | KernelError | None:
    """The cached kernel or its error; None if it must be compiled."""
    if isinstance(kernel.launch, KernelError):
        return kernel.launch
    try:
        return cached_kernel(kernel.launch, target=kernel.gpu.target, cache=cache)
    except KernelError as error:
        return error


def _compile(kernel: PlannedKernel, cache: Path) -> CompiledKernel | KernelError:
    assert isinstance(kernel.launch, KernelLaunch)
    try:
        return compile_kernel(kernel.launch, target=kernel.gpu.target, cache=cache)
    except KernelError as error:
        return error


def _entry(kernel: PlannedKernel, compiled: CompiledKernel | KernelError, *, cached: bool) -> KernelReport:
    return KernelReport(
        kernel=kernel.name,
        target=f"sm{kernel.gpu.target}",
        gpu=kernel.gpu.name,
        multiprocessors=kernel.gpu.num_multiprocessors,
        kv_splits=kernel.kv_splits,
        rotate=kernel.rotate,
        small_tiles=kernel.small_tiles,
        compiled=str(compiled) if isinstance(compiled, KernelError) else _facts(kernel, compiled, cached=cached),
    )


def _facts(kernel: PlannedKernel, compiled: CompiledKernel, *, cached: bool) -> CompiledFacts:
    assert isinstance(kernel.launch, KernelLaunch)
    version = re.search(r"^\.version (\S+)", compiled.ptx, re.MULTILINE)
    assert version is not None
    return CompiledFacts(
        grid=list(kernel.launch.grid),
        warps=compiled.num_warps,
        threads=THREADS_PER_WARP * compiled.num_warps,
        registers=compiled.registers,
        shared_bytes=compiled.shared_bytes,
        spill_bytes=compiled.spill_bytes,
        blocks_per_multiprocessor=blocks_per_multiprocessor(compiled, kernel.gpu),
        ptx_version=version[1],
        ptx_bytes=len(compiled.ptx),
        cached=cached,
    )


def blocks_per_multiprocessor(compiled: CompiledKernel, gpu: Gpu) -> int:
    """Blocks that a multiprocessor runs at the same time, by the rules of `cuda_occupancy.h`; 0 if one block does not fit.

    Each of four schedulers has a quarter of the registers, which are allocated in units of eight for each thread. A block takes
    1 KiB of shared memory beside its own.
    """
    registers_of_warp = THREADS_PER_WARP * REGISTER_UNIT * math.ceil(compiled.registers / REGISTER_UNIT)
    warps = min(gpu.max_warps, SCHEDULERS * (REGISTERS_OF_SCHEDULER // registers_of_warp))
    shared_units = math.ceil((compiled.shared_bytes + SHARED_RESERVED_BYTES) / SHARED_UNIT_BYTES)
    return min(warps // compiled.num_warps, gpu.shared_bytes // (shared_units * SHARED_UNIT_BYTES), gpu.max_blocks)
