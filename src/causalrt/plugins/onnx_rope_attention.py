"""The ONNX form of `causalrt::rope_attention`: standard ops of opset 24, for a runtime without plugins.

There is one Attention per shard, as in the unfused graph. Slots `[1, rows, heads * D]` are attended to entirely, so they must
have `kv_rows` rows. For slots `[1, heads, rows, D]`, `kv_rows` is Attention's `nonpad_kv_seqlen`, and unfilled rows must
be finite.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from causalrt.plugins.rope_attention import query_places
from causalrt.plugins.shard_blocks import ShardBlocks, ShardRows, blocks_from_shares

FLOAT32 = ir.DataType.FLOAT


def onnx_rope_attention(
    op: Any,
    received: Any,
    slots: Sequence[Any],
    kv_rows: Any,
    rotation: Sequence[Any],
    num_heads: Sequence[int],
    splits: Sequence[int],
    num_tokens: int,
) -> list[Any]:
    """`rope_attention` in standard ops, with the same arguments and results as the op."""
    shape = [int(size) for size in received.shape]
    blocks = blocks_from_shares(shape, num_tokens=num_tokens, num_heads=num_heads, splits=splits)
    outputs, written = [], []
    for shard, k_slots, v_slots in zip(blocks.shards, slots[::2], slots[1::2], strict=True):
        whole = len(k_slots.shape) == 4
        q, k_new, v_new = _shard_parts(op, received, blocks, shard, whole=whole)
        k, v = (op.TensorScatter(old, new, axis=2 if whole else 1) for old, new in ((k_slots, k_new), (v_slots, v_new)))
        written += [k, v]
        if rotation:
            q_tables, k_tables = _tables(op, rotation, blocks, shard, filled_rows=None if whole else kv_rows)
            q, k = (
                _rotate(op, x, tables, shard, received.dtype, whole=whole)
                for x, tables in ((q, q_tables), (k, k_tables))
            )
        if whole:
            out = op.Transpose(op.Attention(q, k, v, None, None, None, kv_rows)[0], perm=[0, 2, 1, 3])
        else:
            out = op.Attention(q, k, v, q_num_heads=shard.num_heads, kv_num_heads=shard.num_heads)[0]
        outputs.append(op.Reshape(out, op.Constant(value_ints=[blocks.world_size, -1, blocks.head_dim])))
    return [op.Concat(*outputs, axis=1) if len(outputs) > 1 else outputs[0], *written]


def _shard_parts(op: Any, received: Any, blocks: ShardBlocks, shard: ShardRows, *, whole: bool) -> list[Any]:
    """Extract q, k and v of a shard, without padding tokens, in the layout of the slots."""

    def sliced(x: Any, axis: int, start: int, stop: int) -> Any:
        bounds = (op.Constant(value_ints=[value]) for value in (start, stop, axis))
        return op.Slice(x, *bounds)

    parts: list[Any] = []
    for start, rows in (
        (shard.q_start, shard.query_rows),
        (shard.k_start, blocks.local_tokens),
        (shard.v_start, blocks.local_tokens),
    ):
        part = sliced(received, 1, start, start + rows * shard.num_heads)
        tail = [shard.num_heads, blocks.head_dim] if whole else [shard.num_heads * blocks.head_dim]
        part = op.Reshape(part, op.Constant(value_ints=[1, blocks.world_size * rows, *tail]))
        if parts and blocks.world_size * rows > blocks.num_tokens:
            part = sliced(part, 1, 0, blocks.num_tokens)
        parts.append(op.Transpose(part, perm=[0, 2, 1, 3]) if whole else part)
    return parts


def _tables(
    op: Any, rotation: Sequence[Any], blocks: ShardBlocks, shard: ShardRows, *, filled_rows: Any | None
) -> tuple[list[Any], list[Any]]:
    """(cos, sin) `[1, rows, D / 2]` of the query rows, and of the slot rows (only of the filled ones if given)."""
    rank, *tables = rotation

    def constant(values: torch.Tensor | int) -> Any:
        return op.Constant(value_ints=torch.as_tensor(values).reshape(-1).tolist())

    place, source = query_places(blocks, shard)
    member = op.Mod(rank, constant(shard.split))
    first = op.Div(op.Mul(member, constant(blocks.local_tokens)), constant(shard.split))
    local = op.Min(op.Add(constant(place), first), constant(blocks.local_tokens - 1))
    token = op.Min(op.Add(constant(source), local), constant(blocks.num_tokens - 1))
    batch = constant(0)
    of_queries = [op.Unsqueeze(op.Gather(table, token, axis=0), batch) for table in tables]
    if filled_rows is not None:
        tables = [op.Slice(table, batch, filled_rows, batch) for table in tables]
    return of_queries, [op.Unsqueeze(table, batch) for table in tables]


def _rotate(op: Any, x: Any, tables: Sequence[Any], shard: ShardRows, dtype: Any, *, whole: bool) -> Any:
    """Apply the standard RotaryEmbedding in float32, independent of the precision of `x`."""
    float32 = dtype == FLOAT32
    heads = {} if whole else {"num_heads": shard.num_heads}
    rotated = op.RotaryEmbedding(x if float32 else op.Cast(x, to=FLOAT32), *tables, interleaved=1, **heads)
    return rotated if float32 else op.Cast(rotated, to=dtype)
