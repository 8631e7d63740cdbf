"""Adds our custom ops as layers of a TensorRT network, equivalent to what the ONNX parser and our passes produce.

The arguments are the TensorRT module, the network being built, a name for the layers and the op's own arguments as ITensors
(shapes: `causalrt.plugins`). Every size is static. The ONNX front end does not use this module.
"""

import math
from typing import Any

import numpy as np


def add_rotate(trt: Any, network: Any, name: str, x: Any, cos: Any, sin: Any, num_heads: int) -> Any:
    """Add `causalrt::rotate`, which rotates adjacent pairs of channels in float32, between casts."""
    wide = _cast(trt, network, f"{name}.wide", _heads_first(network, f"{name}.heads", x, num_heads), trt.float32)
    layer = network.add_rotary_embedding(wide, cos, sin, True, 0)  # 0: all channels of a head rotate
    layer.name = name
    turned = _cast(trt, network, f"{name}.narrow", layer.get_output(0), x.dtype)
    return _rows_first(network, f"{name}.rows", turned)


def add_attention(trt: Any, network: Any, name: str, q: Any, k: Any, v: Any, num_heads: int) -> Any:
    """Add `causalrt::attention`; its rows are tokens."""
    keys, values = (_heads_first(network, f"{name}.{kind}", x, num_heads) for kind, x in (("k", k), ("v", v)))
    return _attend(trt, network, name, q, keys, values, num_heads, None)


def add_kv_attention_whole(
    trt: Any,
    network: Any,
    name: str,
    q: Any,
    k_new: Any,
    v_new: Any,
    k_slots: Any,
    v_slots: Any,
    kv_rows: Any,
    num_heads: int,
) -> tuple[Any, Any, Any]:
    """Add `causalrt::kv_attention_whole`: one in-place linear write per cache at row 0, then attention over the filled rows."""
    start = _constant(network, f"{name}.start", np.zeros(1, dtype=np.int32))
    written = []
    for kind, slots, new in (("k", k_slots, k_new), ("v", v_slots, v_new)):
        rows = _heads_first(network, f"{name}.{kind}", new, num_heads)
        layer = network.add_kv_cache_update(slots, rows, start, trt.KVCacheMode.LINEAR)
        layer.name = f"{name}.{kind}.written"
        written.append(layer.get_output(0))
    lengths = _cast(trt, network, f"{name}.lengths", kv_rows, trt.int32)
    keys, values = written
    return _attend(trt, network, name, q, keys, values, num_heads, lengths), keys, values


def add_all_to_all(trt: Any, network: Any, name: str, blocks: Any) -> Any:
    """Add `causalrt::all_to_all`; it has one block per rank, so the number of blocks is the world size."""
    ranks = blocks.shape[0]
    layer = network.add_dist_collective(
        blocks, trt.CollectiveOperation.ALL_TO_ALL, trt.ReduceOperation.NONE, -1, np.arange(ranks, dtype=np.int64)
    )
    layer.num_ranks = ranks
    layer.name = name
    return layer.get_output(0)


def _attend(
    trt: Any, network: Any, name: str, q: Any, keys: Any, values: Any, num_heads: int, lengths: Any | None
) -> Any:
    """Add an attention that must run as a fused kernel; queries `[1, R, heads * D]`, keys and values `[1, heads, L, D]`.

    Like the ONNX passes, this multiplies the queries by 1 / sqrt(D) in float32 (`scale_queries`), and splits the rows of a
    single head into several heads (`split_single_heads`).
    """
    queries = _heads_first(network, f"{name}.q", q, num_heads)
    shape = tuple(queries.shape)
    groups = next((g for g in range(2, shape[2] + 1) if shape[2] % g == 0), 1) if num_heads == 1 else 1
    if groups > 1:
        queries = _reshape(network, f"{name}.split", queries, (1, groups, shape[2] // groups, shape[3]))
    scale = _constant(network, f"{name}.scale", np.full((1, 1, 1, 1), 1 / math.sqrt(shape[3]), dtype=np.float32))
    wide = _cast(trt, network, f"{name}.wide", queries, trt.float32)
    product = network.add_elementwise(wide, scale, trt.ElementWiseOperation.PROD)
    product.name = f"{name}.scaled"
    scaled = _cast(trt, network, f"{name}.narrow", product.get_output(0), q.dtype)
    softmax, no_mask = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    attention = network.add_attention_v2(scaled, keys, values, softmax, no_mask)
    attention.name = name
    attention.decomposable = False
    if lengths is not None:
        attention.key_value_lengths = lengths
    out = attention.get_output(0)
    if groups > 1:
        out = _reshape(network, f"{name}.whole", out, shape)
    return _rows_first(network, f"{name}.rows", out)


def _heads_first(network: Any, name: str, x: Any, num_heads: int) -> Any:
    """`[1, R, heads * D]` -> `[1, heads, R, D]`."""
    _, rows, channels = tuple(x.shape)
    layer = network.add_shuffle(x)
    layer.reshape_dims = (1, rows, num_heads, channels // num_heads)
    layer.second_transpose = (0, 2, 1, 3)
    layer.name = name
    return layer.get_output(0)


def _rows_first(network: Any, name: str, x: Any) -> Any:
    """`[1, heads, R, D]` -> `[1, R, heads * D]`."""
    _, heads, rows, channels = tuple(x.shape)
    layer = network.add_shuffle(x)
    layer.first_transpose = (0, 2, 1, 3)
    layer.reshape_dims = (1, rows, heads * channels)
    layer.name = name
    return layer.get_output(0)


def _reshape(network: Any, name: str, x: Any, shape: tuple[int, ...]) -> Any:
    layer = network.add_shuffle(x)
    layer.reshape_dims = shape
    layer.name = name
    return layer.get_output(0)


def _cast(trt: Any, network: Any, name: str, x: Any, dtype: Any) -> Any:
    if x.dtype == dtype:
        return x
    layer = network.add_cast(x, dtype)
    layer.name = name
    return layer.get_output(0)


def _constant(network: Any, name: str, values: Any) -> Any:
    layer = network.add_constant(values.shape, values)  # the binding keeps the array alive as long as the network
    layer.name = name
    return layer.get_output(0)
