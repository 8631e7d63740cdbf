"""`causalrt::rope_attention`: everything between the two all-to-alls of a layer, for all of a rank's shards at once.

    received [P, scatter_rows, D] --+--> k, v of the chunk --> slots, rows [0, N): staging
                                    +--> q --> attend over staging and history --> out [P, gather_rows, D]
    slots, rows [N, kv_rows): history ---------^

`shard_blocks` draws the blocks. Slots come as k and v of each shard in turn, token by token `[1, rows, heads * D]` or heads
slow `[1, heads, rows, D]`. Rows past `kv_rows` are neither read nor written.

Rotation in here, where the caller hands over `rotation` (rank, cos, sin): q arrives and k is kept as they were normalised,
and both are rotated when they are read. cos and sin `[rows, D / 2]`, float32, have a row for each slot row, whether or not all
slots are bound; the first N are the chunk's tokens, so queries take theirs there too. Only differences of angles matter, so
time may count from any origin near the chunk (`causalrt.model.wan.relative_rope`), and no rollout is too long. Without it,
`rotation` is empty and q and k arrive rotated.

This module owns the op and its meaning in eager torch. Its ONNX form is in `onnx_rope_attention`, the kernel in
`triton_rope_attention`.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from causalrt.errors import OperandError
from causalrt.plugins.attention import attend
from causalrt.plugins.kernel_launch import MAX_PLANS, require_triton
from causalrt.plugins.rotate import rotate_pairs_real
from causalrt.plugins.shard_blocks import ShardBlocks, ShardRows, blocks_from_shares

if TYPE_CHECKING:  # it imports Triton
    from causalrt.plugins.rope_attention_launch import RopeAttentionPlan


def shard_parts(received: torch.Tensor, blocks: ShardBlocks, shard: ShardRows) -> Iterator[torch.Tensor]:
    """The rows of q `[1, P * query_rows, heads * D]`, then of k and v `[1, N, heads * D]`."""
    ranks, width = blocks.world_size, shard.num_heads * blocks.head_dim
    starts = (shard.q_start, shard.k_start, shard.v_start)
    lengths = (shard.query_rows, blocks.local_tokens, blocks.local_tokens)
    for start, rows in zip(starts, lengths, strict=True):
        part = received[:, start : start + rows * shard.num_heads].reshape(1, ranks * rows, width)
        yield part if start == shard.q_start else part[:, : blocks.num_tokens]


def rope_attention_rows(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    blocks: ShardBlocks,
) -> torch.Tensor:
    """Write the chunk to staging, attend for every shard; the slots are written in place.

    Args:
        received: `[P, scatter_rows, D]`.
        slots: k and v of each shard, in either form.
        kv_rows: `[1]` int64, filled rows, staging included; at least N.
        rotation: empty, or rank `[1]` int64, cos and sin `[rows, D / 2]` float32.
        blocks: where the shards lie.

    Returns:
        `[P, gather_rows, D]`.
    """
    filled, outputs = int(kv_rows), []
    for shard, k_slots, v_slots in zip(blocks.shards, slots[::2], slots[1::2], strict=True):
        q, k_new, v_new = shard_parts(received, blocks, shard)
        k, v = (_write_and_read(*pair, shard, filled) for pair in ((k_slots, k_new), (v_slots, v_new)))
        if rotation:
            rank, cos, sin = rotation
            tokens = query_tokens(rank, blocks, shard)
            q = rotate_pairs_real(q, cos[None, tokens], sin[None, tokens], shard.num_heads)
            k = rotate_pairs_real(k, cos[None, :filled], sin[None, :filled], shard.num_heads)
        outputs.append(attend(q, k, v, shard.num_heads).reshape(blocks.world_size, -1, blocks.head_dim))
    return torch.cat(outputs, dim=1)


def _write_and_read(slots: torch.Tensor, new: torch.Tensor, shard: ShardRows, filled: int) -> torch.Tensor:
    """Write `new` to staging; `[1, filled, heads * D]`."""
    rows = new.shape[1]
    if slots.dim() == 3:
        slots[:, :rows] = new
        return slots[:, :filled]
    slots[:, :, :rows] = new.view(1, rows, shard.num_heads, -1).transpose(1, 2)
    return slots[:, :, :filled].transpose(1, 2).flatten(2)


def query_tokens(rank: torch.Tensor, blocks: ShardBlocks, shard: ShardRows) -> torch.Tensor:
    """`[P * query_rows]`: the chunk's token that each query row is; padding repeats the last."""
    first = rank % shard.split * blocks.local_tokens // shard.split
    place, source = query_places(blocks, shard, rank.device)
    return (source + (first + place).clamp(max=blocks.local_tokens - 1)).clamp(max=blocks.num_tokens - 1)


def query_places(
    blocks: ShardBlocks, shard: ShardRows, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[P * query_rows]` twice: of each query row, its place among its source's rows, and its source's first token."""
    row = torch.arange(blocks.world_size * shard.query_rows, device=device)
    return row % shard.query_rows, row // shard.query_rows * blocks.local_tokens


@torch.library.custom_op("causalrt::rope_attention_in_place", mutates_args=("slots",))
def rope_attention_in_place(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> torch.Tensor:
    """`rope_attention` with the chunk written into `slots` themselves, as executors want it; returns the output alone."""
    blocks = blocks_from_shares(received.shape, num_tokens=num_tokens, num_heads=num_heads, splits=splits)
    return rope_attention_rows(received, slots, kv_rows, rotation, blocks)


@rope_attention_in_place.register_fake
def _(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> torch.Tensor:
    blocks = blocks_from_shares(received.shape, num_tokens=num_tokens, num_heads=num_heads, splits=splits)
    return received.new_empty(blocks.world_size, blocks.gather_rows, blocks.head_dim)


def attend_in_place(
    received: torch.Tensor, slots: Sequence[torch.Tensor], *rest: Any
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """`rope_attention_in_place`; (output, the slots)."""
    return rope_attention_in_place(received, slots, *rest), slots


@rope_attention_in_place.register_kernel("cuda")
def _(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> torch.Tensor:
    return run_kernel(received, slots, kv_rows, rotation, num_heads, splits, num_tokens)


def run_kernel(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> torch.Tensor:
    """`rope_attention_in_place` by the Triton kernel: on CUDA, or interpreted where the process was started for that.

    Raises:
        OperandError: shapes, types or strides do not fit together.
        KernelError: no Triton here, shapes that the kernel does not take, or CPU tensors in a process that does not interpret.
    """
    blocks = _blocks(received.shape, num_tokens, tuple(num_heads), tuple(splits))
    check_operands(received, slots, kv_rows, rotation, blocks)
    whole = slots[0].dim() == 4
    made = _plan(blocks, received.dtype, received.device, slots[0].shape[2 if whole else 1], whole, bool(rotation))
    return made.run(received, slots, kv_rows, rotation, made.buffers(received.device))


# A step calls the op once a layer: what follows from shapes and types alone is worked out once.


@functools.lru_cache(MAX_PLANS)
def _blocks(
    received_shape: torch.Size, num_tokens: int, num_heads: tuple[int, ...], splits: tuple[int, ...]
) -> ShardBlocks:
    return blocks_from_shares(received_shape, num_tokens=num_tokens, num_heads=num_heads, splits=splits)


@functools.lru_cache(MAX_PLANS)
def _plan(
    blocks: ShardBlocks, dtype: torch.dtype, device: torch.device, slot_rows: int, whole_slots: bool, rotate: bool
) -> "RopeAttentionPlan":
    require_triton()
    from causalrt.plugins.rope_attention_launch import plan, tiles_for

    capability, multiprocessors = _device_facts(device)
    return plan(
        blocks,
        dtype=dtype,
        slot_rows=slot_rows,
        whole_slots=whole_slots,
        rotate=rotate,
        tiles=tiles_for(capability, dtype=dtype, head_dim=blocks.head_dim, rotate=rotate),
        num_multiprocessors=multiprocessors,
    )


def check_operands(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    blocks: ShardBlocks,
) -> None:
    """The kernel sees addresses alone: what is wrong here would be read or written out of bounds there."""
    if len(slots) != 2 * len(blocks.shards) or slots[0].dim() not in (3, 4) or len(rotation) not in (0, 3):
        raise OperandError(
            f"slots must be k and v of {len(blocks.shards)} shards, of 3 or 4 dimensions, and rotation rank, cos and sin or "
            f"nothing, got {[[*tensor.shape] for tensor in slots]} and {len(rotation)} tensors"
        )
    whole = slots[0].dim() == 4
    rows, dim = slots[0].shape[2 if whole else 1], blocks.head_dim
    operands = {"received": (received, [*received.shape], received.dtype), "kv_rows": (kv_rows, [1], torch.int64)}
    for number, tensor in enumerate(slots):
        heads = blocks.shards[number // 2].num_heads
        shape = [1, heads, rows, dim] if whole else [1, rows, heads * dim]
        operands[f"slots {number}"] = (tensor, shape, received.dtype)
    if rotation:
        rank, cos, sin = rotation
        table = [max(len(cos), rows), dim // 2]
        operands |= {"rank": (rank, [1], torch.int64)}
        operands |= {"cos": (cos, table, torch.float32), "sin": (sin, table, torch.float32)}
    for name, (tensor, shape, dtype) in operands.items():
        if [*tensor.shape] != shape or tensor.dtype != dtype:
            raise OperandError(f"{name} must be {shape} {dtype}, got {[*tensor.shape]} {tensor.dtype}")
        if not tensor.is_contiguous():
            raise OperandError(f"{name} has strides {tensor.stride()}: hand over a contiguous tensor")


def _device_facts(device: torch.device) -> tuple[int, int]:
    """Compute capability (80, 90, 120) and multiprocessors; those of an A100 for a CPU that interprets."""
    if device.type != "cuda":
        return 80, 108
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


@torch.library.custom_op("causalrt::rope_attention", mutates_args=())
def rope_attention(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> list[torch.Tensor]:
    """The op as a trace keeps it: returns the output, then the slots with the chunk written, and writes no input.

    Args:
        received: `[P, scatter_rows, D]`, what `scatter_heads` brought.
        slots: k and v of each shard in turn: `[1, rows, heads * D]`, or `[1, heads, rows, D]`.
        kv_rows: `[1]` int64, filled rows, staging included; at least N.
        rotation: empty, or rank `[1]` int64, cos and sin `[rows, D / 2]` float32.
        num_heads: heads of each shard.
        splits: for each shard, the ranks that divide its query rows.
        num_tokens: N, tokens of the chunk.
    """
    written = [tensor.clone() for tensor in slots]
    blocks = blocks_from_shares(received.shape, num_tokens=num_tokens, num_heads=num_heads, splits=splits)
    return [rope_attention_rows(received, written, kv_rows, rotation, blocks), *written]


@rope_attention.register_kernel("cuda")
def _(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> list[torch.Tensor]:
    written = [tensor.clone() for tensor in slots]
    return [run_kernel(received, written, kv_rows, rotation, num_heads, splits, num_tokens), *written]


@rope_attention.register_fake
def _(
    received: torch.Tensor,
    slots: Sequence[torch.Tensor],
    kv_rows: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> list[torch.Tensor]:
    blocks = blocks_from_shares(received.shape, num_tokens=num_tokens, num_heads=num_heads, splits=splits)
    out = received.new_empty(blocks.world_size, blocks.gather_rows, blocks.head_dim)
    return [out, *(torch.empty_like(tensor) for tensor in slots)]


def attend_to_copies(*arguments: Any) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """`rope_attention`; (output, the written copies of the slots)."""
    out, *written = rope_attention(*arguments)
    return out, written
