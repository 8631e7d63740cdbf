"""The list of TensorRT plugins: the fused ops, each declared as a `PluginSpec`.

| plugin                   | inputs                                                        | outputs                       |
|--------------------------|---------------------------------------------------------------|-------------------------------|
| `qk_norm_rope`           | q, k, v, norm_q, norm_k, cos, sin, destinations               | out                           |
| `rope_attention_N`       | received, k and v slots of each of N shards, kv_rows          | out, the slots                |
| `rope_attention_split_N` | the same                                                      | parts, log_sums, the slots    |
| `combine_splits`         | parts, log_sums                                               | out                           |

A plugin has one kernel and a fixed number of tensors. Therefore each number of shards has its own plugin, and combining the
results of key ranges is a separate plugin. KV slots are bound whole, `[1, heads, rows, D]`, and written in place; the attention
plugins expect rotated queries and keys. Tensors have the names and the order of the kernel's parameters.

`tensorrt_plugin` derives plugin classes from these specs and registers them in the namespace `causalrt`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from causalrt.errors import OperandError
from causalrt.plugins.kernel_launch import KernelLaunch
from causalrt.plugins.plugin_spec import Attributes, Dims, OutputSpec, PluginSpec, Tensors
from causalrt.plugins.qk_norm_rope import check_operands as check_qk_norm_rope
from causalrt.plugins.shard_blocks import MAX_SHARDS, blocks_from_shares

DTYPE_FROM_ONNX = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
"""Output types that `combine_splits` supports, by their ONNX number."""

LARGE_TILES, SMALL_TILES = 1, 2
"""Tactics of the attention plugins. The small tiles fit into the shared memory that every kernel may use: if TensorRT launches
plugins without raising that limit, the large tiles fail when they are timed, and the small ones remain."""


def _dtype_of(name: str) -> Callable[[Mapping[str, torch.dtype], Attributes], torch.dtype]:
    return lambda dtypes, _: dtypes[name]


def _float32(dtypes: Mapping[str, torch.dtype], attributes: Attributes) -> torch.dtype:
    return torch.float32


# ---- qk_norm_rope


def _launch_qk_norm_rope(inputs: Tensors, attributes: Attributes, capability: int, tactic: int) -> KernelLaunch:
    from causalrt.plugins.qk_norm_rope_launch import plan

    q, destinations = inputs["q"], inputs["destinations"]
    num_heads = attributes["num_heads"]
    if destinations.ndim != 4 or destinations.shape[2] != num_heads or q.ndim != 2 or q.shape[1] % num_heads:
        raise OperandError(
            f"qk_norm_rope of {num_heads} heads takes q [S, heads * D] and destinations [3, S, heads, M], "
            f"got {[*q.shape]} and {[*destinations.shape]}"
        )
    head_dim = q.shape[1] // num_heads
    check_qk_norm_rope(q.new_empty(attributes["out_rows"], head_dim), **inputs)
    return plan(
        num_rows=q.shape[0],
        num_heads=num_heads,
        head_dim=head_dim,
        num_places=destinations.shape[3],
        dtype=q.dtype,
        eps=attributes["eps"],
        row_strides=(q.shape[1],) * 3,
    )


QK_NORM_ROPE = PluginSpec(
    name="qk_norm_rope",
    inputs=("q", "k", "v", "norm_q", "norm_k", "cos", "sin", "destinations"),
    outputs=(
        OutputSpec(
            name="out",
            dtype=_dtype_of("q"),
            shape=lambda dims, given: (given["out_rows"], dims["q"][1] // given["num_heads"]),
        ),
    ),
    in_place=(),
    attributes={"num_heads": int, "eps": float, "out_rows": int},
    launch=_launch_qk_norm_rope,
)


# ---- rope_attention


def _launch_attend(
    inputs: Tensors, attributes: Attributes, capability: int, tactic: int, slots: Sequence[str]
) -> KernelLaunch:
    from causalrt.plugins.rope_attention_launch import plan, small_tiles_for, tiles_for

    received = inputs["received"]
    first = inputs[slots[0]]
    if received.ndim != 3 or first.ndim != 4:
        raise OperandError(
            f"received must be [P, rows, D] and slots [1, heads, rows, D], got {[*received.shape]} and {[*first.shape]}"
        )
    heads = [inputs[name].shape[1] for name in slots[::2]]
    for number, name in enumerate(slots):
        wanted = [1, heads[number // 2], first.shape[2], received.shape[2]]
        if [*inputs[name].shape] != wanted:
            raise OperandError(
                f"{name} must be {wanted}, as received and {slots[0]} have it, got {[*inputs[name].shape]}"
            )
    if inputs["kv_rows"].numel() != 1:
        raise OperandError(f"kv_rows must hold one number, got {[*inputs['kv_rows'].shape]}")
    splits = [attributes[f"split_{number}"] for number in range(len(heads))]
    blocks = blocks_from_shares(received.shape, num_tokens=attributes["num_tokens"], num_heads=heads, splits=splits)
    if attributes["gather_rows"] != blocks.gather_rows:
        raise OperandError(f"gather_rows is {attributes['gather_rows']}, and these shards have {blocks.gather_rows}")
    if tactic == SMALL_TILES:
        tiles = small_tiles_for(received.dtype)
    else:
        tiles = tiles_for(capability, dtype=received.dtype, head_dim=blocks.head_dim, rotate=False)
    return plan(
        blocks,
        dtype=received.dtype,
        slot_rows=first.shape[2],
        whole_slots=True,
        rotate=False,
        tiles=tiles,
        num_multiprocessors=1,
        kv_splits=_kv_splits(attributes["kv_splits"]) if "kv_splits" in attributes else 1,
    ).attend


def _kv_splits(number: int) -> int:
    if number < 2:
        raise OperandError(f"kv_splits is {number}; use the rope_attention plugin without split for one range of keys")
    return number


def _out_shape(dims: Dims, given: Attributes) -> tuple[Any, ...]:
    return (dims["received"][0], given["gather_rows"], dims["received"][2])


def rope_attention_spec(*, num_shards: int, split: bool) -> PluginSpec:
    """The attention plugin for `num_shards` head shards, over one range of keys, or over several if `split` is set."""
    slots = tuple(f"{kind}_slots_{number}" for number in range(num_shards) for kind in "kv")
    out = OutputSpec(name="out", dtype=_dtype_of("received"), shape=_out_shape)
    parts = OutputSpec(
        name="out", dtype=_float32, shape=lambda dims, given: (given["kv_splits"], *_out_shape(dims, given))
    )
    log_sums = OutputSpec(
        name="log_sums", dtype=_float32, shape=lambda dims, given: (given["kv_splits"], *_out_shape(dims, given)[:2])
    )
    numbers = ["num_tokens", "gather_rows", *(f"split_{number}" for number in range(num_shards))]
    return PluginSpec(
        name=f"rope_attention_split_{num_shards}" if split else f"rope_attention_{num_shards}",
        inputs=("received", *slots, "kv_rows"),
        outputs=(parts, log_sums) if split else (out,),
        in_place=slots,
        attributes=dict.fromkeys([*numbers, "kv_splits"] if split else numbers, int),
        launch=lambda inputs, given, capability, tactic: _launch_attend(inputs, given, capability, tactic, slots),
        tactics=(LARGE_TILES, SMALL_TILES),
    )


def _launch_combine(inputs: Tensors, attributes: Attributes, capability: int, tactic: int) -> KernelLaunch:
    from causalrt.plugins.rope_attention_launch import plan_combine

    parts, log_sums = inputs["parts"], inputs["log_sums"]
    if parts.ndim != 4 or log_sums.shape != parts.shape[:3]:
        raise OperandError(
            f"parts must be [splits, P, rows, D] and log_sums [splits, P, rows], got {[*parts.shape]} and {[*log_sums.shape]}"
        )
    kv_splits, world_size, rows, head_dim = parts.shape
    return plan_combine(
        rows=world_size * rows, head_dim=head_dim, splits=_kv_splits(kv_splits), dtype=_combined_dtype({}, attributes)
    )


def _combined_dtype(dtypes: Mapping[str, torch.dtype], attributes: Attributes) -> torch.dtype:
    number = attributes["dtype"]
    if number not in DTYPE_FROM_ONNX:
        raise OperandError(f"dtype is {number}; take ONNX's number of a type, one of {DTYPE_FROM_ONNX}")
    return DTYPE_FROM_ONNX[number]


COMBINE_SPLITS = PluginSpec(
    name="combine_splits",
    inputs=("parts", "log_sums"),
    outputs=(OutputSpec(name="out", dtype=_combined_dtype, shape=lambda dims, _: tuple(dims["parts"])[1:]),),
    in_place=(),
    attributes={"dtype": int},
    launch=_launch_combine,
)

SPECS: tuple[PluginSpec, ...] = (
    QK_NORM_ROPE,
    *(
        rope_attention_spec(num_shards=number, split=split)
        for number in range(1, MAX_SHARDS + 1)
        for split in (False, True)
    ),
    COMBINE_SPLITS,
)
