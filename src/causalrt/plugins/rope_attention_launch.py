"""The launches of `causalrt::rope_attention`, planned from shapes and types alone.

    ShardBlocks, form of the slots, multiprocessors --> plan --> attend (+ staging) --> [combine, where the keys are split]

Where the tiles alone leave multiprocessors idle, the keys are split into ranges and a second, small launch adds them up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from causalrt.errors import KernelError
from causalrt.plugins.kernel_launch import KernelLaunch, pointer_to
from causalrt.plugins.shard_blocks import MAX_HEAD_DIM, MAX_SHARDS, ShardBlocks
from causalrt.plugins.triton_flash import combine_splits_kernel
from causalrt.plugins.triton_rope_attention import rope_attention_kernel

MAX_KV_SPLITS = 8
MAX_OFFSET = 2**31 - 1
COUNT = "*i64"
COPY_ROWS = 64
POINTERS = ("k_slots_1", "v_slots_1", "rank", "cos", "sin", "log_sums")
"""Arguments that a launch can do without."""
UNRAISED_SHARED_BYTES = 48 * 1024
"""Shared memory that CUDA gives to a kernel whose limit has not been raised."""
SPLIT_COST_BLOCKS = 4
"""What a key range costs beside its keys (reading q, leaving and adding up a partial output), in key blocks: a guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How much one program takes.

    Attributes:
        block_m: query rows.
        block_n: key rows.
        num_warps: warps.
        num_stages: key blocks in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


FLOAT32_TILES = Tiles(block_m=64, block_n=16, num_warps=8, num_stages=1)
"""No tensor cores: for comparisons, not for speed."""


def tiles_for(capability: int, *, dtype: torch.dtype, head_dim: int, rotate: bool) -> Tiles:
    """Tiles for a compute capability (80, 90, 120).

    They are such that shared memory suffices (163, 227 and 99 KiB), and nothing spills in the low types with heads of 64 and
    128 channels; on no GPU have they been tuned. Rotation holds a block of keys and its table rows in registers, so it takes
    fewer queries or keys where operands of a product come from registers too.
    """
    if dtype == torch.float32:
        return FLOAT32_TILES
    hopper = 90 <= capability < 100
    if rotate and not hopper and head_dim <= 64:
        return Tiles(block_m=128, block_n=32, num_warps=8, num_stages=2)
    return Tiles(
        block_m=64 if rotate and not hopper else 128,
        block_n=64,
        num_warps=8,
        num_stages=3 if hopper or (capability < 90 and not rotate) else 2,
    )


def small_tiles_for(dtype: torch.dtype) -> Tiles:
    """Tiles for a kernel without rotation that is launched by somebody who may not raise its limit of shared memory.

    They need at most `UNRAISED_SHARED_BYTES` on every GPU, with heads of any size that the kernel takes. The query rows are
    those of the partial outputs too, which are float32 and pass through shared memory.
    """
    return FLOAT32_TILES if dtype == torch.float32 else Tiles(block_m=64, block_n=32, num_warps=4, num_stages=2)


def choose_kv_splits(*, num_tiles: int, key_blocks: int, num_multiprocessors: int) -> int:
    """Key ranges that make all waves of programs together shortest, at one program a multiprocessor."""

    def cost(splits: int) -> int:
        waves = math.ceil(num_tiles * splits / num_multiprocessors)
        return waves * (math.ceil(key_blocks / splits) + (SPLIT_COST_BLOCKS if splits > 1 else 0))

    return min(range(1, MAX_KV_SPLITS + 1), key=cost)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeAttentionBuffers:
    """What a call writes beside the slots.

    Attributes:
        out: `[P, gather_rows, D]`.
        parts: `[kv_splits, P, gather_rows, D]` float32, where the keys are split; empty otherwise.
        log_sums: `[kv_splits, P, gather_rows]` float32, where the keys are split; empty otherwise.
    """

    out: torch.Tensor
    parts: torch.Tensor
    log_sums: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeAttentionPlan:
    """The launches of one call.

    Attributes:
        attend: attention and the write of staging.
        combine: combines the results of the key ranges; None if there is only one range.
    """

    blocks: ShardBlocks
    dtype: torch.dtype
    kv_splits: int
    attend: KernelLaunch
    combine: KernelLaunch | None

    def buffers(self, device: torch.device | str) -> RopeAttentionBuffers:
        """Memory for the outputs; a caller may keep it for the next call."""
        shape = (self.blocks.world_size, self.blocks.gather_rows, self.blocks.head_dim)
        splits = self.kv_splits if self.combine else 0
        return RopeAttentionBuffers(
            out=torch.empty(shape, dtype=self.dtype, device=device),
            parts=torch.empty(splits, *shape, dtype=torch.float32, device=device),
            log_sums=torch.empty(splits, *shape[:2], dtype=torch.float32, device=device),
        )

    def run(
        self,
        received: torch.Tensor,
        slots: Sequence[torch.Tensor],
        kv_rows: torch.Tensor,
        rotation: Sequence[torch.Tensor],
        buffers: RopeAttentionBuffers,
    ) -> torch.Tensor:
        """`rope_attention_in_place` with the arguments of the op; the output is `buffers.out`."""
        inputs = (received, *slots, kv_rows, *rotation)
        if self.combine is None:
            self.attend.run(*inputs, buffers.out)
        else:
            self.attend.run(*inputs, buffers.parts, buffers.log_sums)
            self.combine.run(buffers.parts, buffers.log_sums, buffers.out)
        return buffers.out


def plan(
    blocks: ShardBlocks,
    *,
    dtype: torch.dtype,
    slot_rows: int,
    whole_slots: bool,
    rotate: bool,
    tiles: Tiles,
    num_multiprocessors: int,
    kv_splits: int | None = None,
) -> RopeAttentionPlan:
    """The launches for one rank.

    Args:
        blocks: where the shards lie.
        dtype: of received, slots and output.
        slot_rows: rows of the slots as they are bound.
        whole_slots: slots are `[1, heads, rows, D]`; otherwise `[1, rows, heads * D]`.
        rotate: q and k are rotated when they are read.
        tiles: see `tiles_for`.
        num_multiprocessors: of the device.
        kv_splits: key ranges; None chooses.

    Raises:
        KernelError: the kernel does not take these shapes.
    """
    _check(blocks, slot_rows=slot_rows)
    world_size, head_dim = blocks.world_size, blocks.head_dim
    num_tiles = sum(
        shard.num_heads * math.ceil(world_size * shard.query_rows / tiles.block_m) for shard in blocks.shards
    )
    if kv_splits is None:
        kv_splits = choose_kv_splits(
            num_tiles=num_tiles,
            key_blocks=math.ceil(slot_rows / tiles.block_n),
            num_multiprocessors=num_multiprocessors,
        )
    padded_dim = max(32 if rotate else 16, 1 << (head_dim - 1).bit_length())
    constexprs: dict[str, int | float | bool | None] = {
        "WORLD_SIZE": world_size,
        "NUM_TOKENS": blocks.num_tokens,
        "LOCAL_TOKENS": blocks.local_tokens,
        "HEAD_DIM": head_dim,
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "KV_SPLITS": kv_splits,
        "ROTATE": rotate,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": padded_dim,
        "BLOCK_ROWS": COPY_ROWS,
        "STAGES": tiles.num_stages,
    }
    value, table = pointer_to(dtype), pointer_to(torch.float32)
    signature = {"received": value}
    for number in range(MAX_SHARDS):
        shard = blocks.shards[number] if number < len(blocks.shards) else None
        heads = shard.num_heads if shard else 0
        constexprs |= {
            f"HEADS_{number}": heads,
            f"SPLIT_{number}": shard.split if shard else 1,
            f"QUERY_ROWS_{number}": shard.query_rows if shard else 0,
            f"ROW_STRIDE_{number}": head_dim if whole_slots else heads * head_dim,
            f"HEAD_STRIDE_{number}": slot_rows * head_dim if whole_slots else head_dim,
        }
        if shard:
            signature |= {f"k_slots_{number}": value, f"v_slots_{number}": value}
    signature["kv_rows"] = COUNT
    if rotate:
        signature |= {"rank": COUNT, "cos": table, "sin": table}
    signature |= {"out": table, "log_sums": table} if kv_splits > 1 else {"out": value}
    absent = {name: None for name in POINTERS if name not in signature}
    num_copies = sum(math.ceil(blocks.num_tokens * shard.num_heads / COPY_ROWS) for shard in blocks.shards)
    attend = KernelLaunch(
        kernel=rope_attention_kernel,
        signature=signature,
        constexprs=constexprs | absent,
        grid=(num_tiles * kv_splits + num_copies, 1, 1),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    combine = None
    if kv_splits > 1:
        combine = plan_combine(rows=world_size * blocks.gather_rows, head_dim=head_dim, splits=kv_splits, dtype=dtype)
    return RopeAttentionPlan(blocks=blocks, dtype=dtype, kv_splits=kv_splits, attend=attend, combine=combine)


def plan_combine(*, rows: int, head_dim: int, splits: int, dtype: torch.dtype) -> KernelLaunch:
    """Plan the launch that combines the partial outputs of several key ranges.

    Args:
        rows: number of output rows.
        head_dim: channels of a row.
        splits: number of key ranges.
        dtype: type of the output.

    Raises:
        KernelError: the rows have too many channels, or there are too many of them.
    """
    _check_head_dim(head_dim)
    _check_size("partial outputs", MAX_KV_SPLITS * rows * head_dim)
    block_rows = 16
    parts = pointer_to(torch.float32)
    return KernelLaunch(
        kernel=combine_splits_kernel,
        signature={"parts": parts, "log_sums": parts, "out": pointer_to(dtype)},
        constexprs={
            "NUM_ROWS": rows,
            "HEAD_DIM": head_dim,
            "KV_SPLITS": splits,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        },
        grid=(math.ceil(rows / block_rows), 1, 1),
        num_warps=4,
        num_stages=1,
    )


def _check(blocks: ShardBlocks, *, slot_rows: int) -> None:
    if len(blocks.shards) > MAX_SHARDS:
        raise KernelError(
            f"the kernel takes {MAX_SHARDS} shards at most, got {len(blocks.shards)}; use another head_plan"
        )
    if slot_rows < blocks.num_tokens:
        raise KernelError(f"slots of {slot_rows} rows cannot stage a chunk of {blocks.num_tokens} tokens")
    _check_head_dim(blocks.head_dim)
    heads = max(shard.num_heads for shard in blocks.shards)
    sizes = {
        "received": blocks.world_size * blocks.scatter_rows * blocks.head_dim,
        "slots": slot_rows * heads * blocks.head_dim,
        "partial outputs": MAX_KV_SPLITS * blocks.world_size * blocks.gather_rows * blocks.head_dim,
    }
    for name, size in sizes.items():
        _check_size(name, size)


def _check_head_dim(head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise KernelError(
            f"the kernel takes heads of {MAX_HEAD_DIM} channels at most, got {head_dim}; build with `--plugins off` and "
            "`video.time_index=global`"
        )


def _check_size(name: str, size: int) -> None:
    if size > MAX_OFFSET:
        raise KernelError(
            f"{name} would hold {size} values, and the kernel counts to {MAX_OFFSET}; use more ranks or a shorter window"
        )
