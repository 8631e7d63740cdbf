"""`causalrt::attention` and `causalrt::kv_attention`: attention over token rows, and over the KV slots.

Shapes are `[1, rows, heads * D]`, with rows as the outer dimension, so that the filled prefix of the slots is a contiguous view
and attending over it needs no copy. `kv_attention` first writes the new chunk's rows to the staging slots, which come first.

`kv_attention` is functional, as tracing requires; `kv_attention_in_place` is the same op, writing to the caller's memory.
`kv_attention_whole` is for engines with static shapes only: it takes the whole slots, `[1, heads, rows, D]`, and the number of
filled rows as a tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F


def attend(q_BRC: torch.Tensor, k_BLC: torch.Tensor, v_BLC: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Compute softmax(q k^T / sqrt(D)) v without a mask, separately for each head (model_spec section 3).

    Args:
        q_BRC: queries `[1, R, heads * D]`.
        k_BLC: keys `[1, L, heads * D]`.
        v_BLC: values `[1, L, heads * D]`.
        num_heads: number of heads of q, k and v.

    Returns:
        `[1, R, heads * D]`.
    """
    q, k, v = (x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2) for x in (q_BRC, k_BLC, v_BLC))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def kv_attention_in_place(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_slots: torch.Tensor,
    v_slots: torch.Tensor,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kv_attention` that writes the new rows into `k_slots` and `v_slots` in place."""
    rows = k_new.shape[1]
    k_slots[:, :rows] = k_new
    v_slots[:, :rows] = v_new
    return attend(q, k_slots, v_slots, num_heads), k_slots, v_slots


@torch.library.custom_op("causalrt::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`attend` as an op that stays a single node in a trace."""
    return attend(q, k, v, num_heads).contiguous()


@attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("causalrt::kv_attention", mutates_args=())
def kv_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_slots: torch.Tensor,
    v_slots: torch.Tensor,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write the chunk's rows to staging, attend over the filled slots, and return the output and the slots.

    Args:
        q: `[1, R, heads * D]`, the query rows of one head shard.
        k_new: `[1, N, heads * D]`, rotated keys of the chunk.
        v_new: `[1, N, heads * D]`, values of the chunk.
        k_slots: `[1, L, heads * D]`, the filled prefix of the key slots, L >= N; its first N rows are staging.
        v_slots: `[1, L, heads * D]`, the same prefix of the value slots.
        num_heads: number of heads of the shard.
    """
    out, k, v = kv_attention_in_place(q, k_new, v_new, k_slots.clone(), v_slots.clone(), num_heads)
    return out.contiguous(), k, v


@kv_attention.register_fake
def _(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_slots: torch.Tensor,
    v_slots: torch.Tensor,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, torch.empty_like(k_slots), torch.empty_like(v_slots)


@torch.library.custom_op("causalrt::kv_attention_whole", mutates_args=())
def kv_attention_whole(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_slots: torch.Tensor,
    v_slots: torch.Tensor,
    kv_rows: torch.Tensor,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kv_attention` over whole slots, with heads as the outer dimension.

    Args:
        q: query rows `[1, R, heads * D]`.
        k_new: keys of the chunk `[1, N, heads * D]`.
        v_new: values of the chunk `[1, N, heads * D]`.
        k_slots: key slots `[1, heads, W * T, D]`; the first N rows are staging.
        v_slots: value slots `[1, heads, W * T, D]`.
        kv_rows: `[1]` int64, number of filled rows including staging; the other rows are not attended to.
        num_heads: number of heads of the shard.
    """
    rows, filled = k_new.shape[1], int(kv_rows)
    k, v = k_slots.clone(), v_slots.clone()
    for slots, new in ((k, k_new), (v, v_new)):
        slots[:, :, :rows] = new.view(1, rows, num_heads, -1).transpose(1, 2)
    k_prefix, v_prefix = (slots[:, :, :filled].transpose(1, 2).flatten(2) for slots in (k, v))
    return attend(q, k_prefix, v_prefix, num_heads).contiguous(), k, v


@kv_attention_whole.register_fake
def _(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_slots: torch.Tensor,
    v_slots: torch.Tensor,
    kv_rows: torch.Tensor,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, torch.empty_like(k_slots), torch.empty_like(v_slots)


def onnx_attention(op: Any, q: Any, k: Any, v: Any, num_heads: int) -> Any:
    """ONNX form: the standard Attention on `[1, rows, heads * D]`."""
    return op.Attention(q, k, v, q_num_heads=num_heads, kv_num_heads=num_heads)[0]


def onnx_kv_attention(op: Any, q: Any, k_new: Any, v_new: Any, k_slots: Any, v_slots: Any, num_heads: int) -> Any:
    """ONNX form: TensorScatter into staging (in place if input and output share a buffer), then Attention."""
    k = op.TensorScatter(k_slots, k_new, axis=1)
    v = op.TensorScatter(v_slots, v_new, axis=1)
    return onnx_attention(op, q, k, v, num_heads), k, v


def onnx_kv_attention_whole(
    op: Any, q: Any, k_new: Any, v_new: Any, k_slots: Any, v_slots: Any, kv_rows: Any, num_heads: int
) -> Any:
    """ONNX form: the same two ops with heads outermost; the filled rows are Attention's `nonpad_kv_seqlen`."""

    def heads_first(rows: Any) -> Any:
        return op.Transpose(op.Reshape(rows, op.Constant(value_ints=[0, 0, num_heads, -1])), perm=[0, 2, 1, 3])

    k = op.TensorScatter(k_slots, heads_first(k_new), axis=2)
    v = op.TensorScatter(v_slots, heads_first(v_new), axis=2)
    out = op.Attention(heads_first(q), k, v, None, None, None, kv_rows)[0]
    rows = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return rows, k, v
