"""`causalrt::qk_norm_rope`: what stands between the QKV projection and the first all-to-all, in one pass over memory.

    q, k [S, C] -> RMS norm over C, weight -> rotate adjacent channel pairs of each head --+
    v    [S, C] ---------------------------------------------------------------------------+--> rows [P * scatter_rows, D]
                                               in the order in which `scatter_heads` sends them (layout.py)

The exchange order is `destinations`: for each row and head of the input, where it goes. The kernel scatters by it; the
reference and the ONNX form invert it and gather (in a graph it is a constant, so that is done once, when the graph is
loaded). With one rank the rows are those of q, then of k, then of v, unmoved.

Statistics, weight and rotation are float32 whatever the type of the rows, and each value is rounded once, at the end.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from causalrt.errors import OperandError
from causalrt.plugins.kernel_launch import MAX_PLANS, KernelLaunch, require_triton
from causalrt.plugins.rotate import rotate_pairs_real


def qk_norm_rope_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
    num_heads: int,
    eps: float,
    out_rows: int,
) -> torch.Tensor:
    """The reference, in plain torch.

    Args:
        q: `[S, C]`, C = H * D; rows may lie apart, as those of a packed `[S, 3 * C]` do.
        k: `[S, C]`.
        v: `[S, C]`.
        norm_q: `[C]`.
        norm_k: `[C]`.
        cos: `[1, S, D / 2]`, float32, shared by all heads.
        sin: `[1, S, D / 2]`, float32.
        destinations: `[3, S, H, M]` int32, rows of the output, -1 for none (`Layout.scatter_destinations`).
        num_heads: H.
        eps: added to the mean square.
        out_rows: P * scatter_rows.

    Returns:
        `[P * scatter_rows, D]` in the dtype of `q`.
    """

    def rotated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
        return rotate_pairs_real(normed[None], cos, sin, num_heads)[0].to(x.dtype)

    stacked = torch.cat([rotated(q, norm_q), rotated(k, norm_k), v])
    return stacked.view(-1, q.shape[1] // num_heads).index_select(0, sources(destinations, out_rows))


def sources(destinations: torch.Tensor, out_rows: int) -> torch.Tensor:
    """`[out_rows]`: Invert `destinations`: for each row of the output, its place in q, k, v stacked as `[3 * S * H]`."""
    source = torch.arange(destinations[..., 0].numel(), device=destinations.device)
    index = source.new_zeros(out_rows + 1)
    index[destinations.flatten().long() % len(index)] = source.repeat_interleave(destinations.shape[3])  # -1: the last
    return index[:out_rows]


def write_rows(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
    eps: float,
) -> None:
    """The Triton kernel, into `out`; on a CPU it is interpreted, and only where the process was started for that.

    Args:
        out: `[P * scatter_rows, D]`; every element is written.
        q: `[S, C]`, as in `qk_norm_rope_rows`.
        k: `[S, C]`.
        v: `[S, C]`.
        norm_q: `[C]`.
        norm_k: `[C]`.
        cos: `[1, S, D / 2]`, float32.
        sin: `[1, S, D / 2]`, float32.
        destinations: `[3, S, H, M]` int32, rows of `out`, -1 for none (`Layout.scatter_destinations`).
        eps: added to the mean square.

    Raises:
        OperandError: shapes, types or strides do not fit together.
        KernelError: no Triton here, or CPU tensors in a process that does not interpret.
    """
    check_operands(out, q, k, v, norm_q, norm_k, cos, sin, destinations)
    launch = _plan(destinations.shape, out.shape[1], q.dtype, eps, (q.stride(0), k.stride(0), v.stride(0)))
    launch.run(q, k, v, norm_q, norm_k, cos, sin, destinations, out)


@functools.lru_cache(MAX_PLANS)  # a step calls the op once a layer, with the same shapes
def _plan(
    destinations_shape: torch.Size, head_dim: int, dtype: torch.dtype, eps: float, row_strides: tuple[int, int, int]
) -> KernelLaunch:
    require_triton()
    from causalrt.plugins.qk_norm_rope_launch import plan

    _, num_rows, num_heads, num_places = destinations_shape
    return plan(
        num_rows=num_rows,
        num_heads=num_heads,
        head_dim=head_dim,
        num_places=num_places,
        dtype=dtype,
        eps=eps,
        row_strides=row_strides,
    )


def check_operands(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
) -> None:
    """The kernel sees addresses alone: what is wrong here would be read or written out of bounds there."""
    if destinations.ndim != 4 or destinations.shape[0] != 3 or out.ndim != 2:
        raise OperandError(
            f"destinations must be [3, S, H, M] and out [rows, D], got {[*destinations.shape]} and {[*out.shape]}"
        )
    _, rows, heads, _ = destinations.shape
    dim = out.shape[1]
    if dim % 2:
        raise OperandError(f"heads must have an even number of channels (rotary pairs), got {dim}")
    row, weight, table = [rows, heads * dim], [heads * dim], [1, rows, dim // 2]
    operands = {
        "q": (q, row, q.dtype),
        "k": (k, row, q.dtype),
        "v": (v, row, q.dtype),
        "norm_q": (norm_q, weight, norm_q.dtype),
        "norm_k": (norm_k, weight, norm_k.dtype),
        "cos": (cos, table, torch.float32),
        "sin": (sin, table, torch.float32),
        "destinations": (destinations, [*destinations.shape], torch.int32),
        "out": (out, [*out.shape], out.dtype),
    }
    for name, (tensor, shape, dtype) in operands.items():
        if [*tensor.shape] != shape or tensor.dtype != dtype:
            raise OperandError(
                f"{name} must be {shape} {dtype}, as destinations, out and q have it, "
                f"got {[*tensor.shape]} {tensor.dtype}"
            )
        rows_apart = name in "qkv" and tensor.stride(1) == 1
        if not rows_apart and not tensor.is_contiguous():
            raise OperandError(f"{name} has strides {tensor.stride()}: hand over a contiguous tensor")


@torch.library.custom_op("causalrt::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
    num_heads: int,
    eps: float,
    out_rows: int,
) -> torch.Tensor:
    """`qk_norm_rope_rows` as an op that a trace keeps whole; the kernel on CUDA, the reference elsewhere."""
    return qk_norm_rope_rows(q, k, v, norm_q, norm_k, cos, sin, destinations, num_heads, eps, out_rows)


@qk_norm_rope.register_kernel("cuda")
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
    num_heads: int,
    eps: float,
    out_rows: int,
) -> torch.Tensor:
    out = q.new_empty(out_rows, q.shape[1] // num_heads)
    write_rows(out, q, k, v, norm_q, norm_k, cos, sin, destinations, eps)
    return out


@qk_norm_rope.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    destinations: torch.Tensor,
    num_heads: int,
    eps: float,
    out_rows: int,
) -> torch.Tensor:
    return q.new_empty(out_rows, q.shape[1] // num_heads)


def onnx_qk_norm_rope(
    op: Any,
    q: Any,
    k: Any,
    v: Any,
    norm_q: Any,
    norm_k: Any,
    cos: Any,
    sin: Any,
    destinations: Any,
    num_heads: int,
    eps: float,
    out_rows: int,
) -> Any:
    """ONNX form: RMSNormalization and RotaryEmbedding in float32 between casts, then one Gather for q, k and v."""
    head_rows = op.Constant(value_ints=[-1, q.shape[-1] // num_heads])

    def wide(x: Any) -> Any:
        return x if x.dtype == cos.dtype else op.Cast(x, to=cos.dtype)

    def rotated(x: Any, weight: Any) -> Any:
        normed = op.RMSNormalization(wide(x), wide(weight), axis=-1, epsilon=eps, stash_type=cos.dtype)
        batch = op.Unsqueeze(normed, op.Constant(value_ints=[0]))
        rotated = op.Reshape(op.RotaryEmbedding(batch, cos, sin, interleaved=1, num_heads=num_heads), head_rows)
        return rotated if x.dtype == cos.dtype else op.Cast(rotated, to=x.dtype)

    stacked = op.Concat(rotated(q, norm_q), rotated(k, norm_k), op.Reshape(v, head_rows), axis=0)
    return op.Gather(stacked, _onnx_sources(op, destinations, out_rows), axis=0)


def _onnx_sources(op: Any, destinations: Any, out_rows: int) -> Any:
    """`sources` in standard ops."""
    from onnx_ir import DataType  # here alone: a rank would load it, and sympy with it, for nothing

    def constant(*values: int) -> Any:
        return op.Constant(value_ints=values)

    *source_shape, places = (int(size) for size in destinations.shape)
    count = places * math.prod(source_shape)
    flat = op.Reshape(op.Cast(destinations, to=DataType.INT64), constant(-1))
    numbered = op.Range(op.Constant(value_int=0), op.Constant(value_int=count), op.Constant(value_int=1))
    length = max(out_rows + 1, count)  # TensorRT wants no more indices than there are elements
    index = op.ScatterElements(
        op.Expand(constant(0), constant(length)),
        op.Mod(flat, constant(length)),
        op.Div(numbered, constant(places)),
        axis=0,
    )
    return op.Slice(index, constant(0), constant(out_rows), constant(0))
