"""The fused ops as plugins of an engine, declared as data.

    PluginSpec --checked here--> derived (tensorrt_plugin) --> registered under `causalrt`, found by name

| plugin                   | inputs                                                        | outputs                       |
|--------------------------|---------------------------------------------------------------|-------------------------------|
| `qk_norm_rope`           | q, k, v, norm_q, norm_k, cos, sin, destinations               | out                           |
| `rope_attention_N`       | received, k and v slots of each of N shards, kv_rows          | out, the slots                |
| `rope_attention_split_N` | the same                                                      | parts, log_sums, the slots    |
| `combine_splits`         | parts, log_sums                                               | out                           |

A plugin has one kernel and a fixed number of tensors, so each number of shards is a plugin of its own, and where the keys are
split into ranges, adding them up is another. Slots are whole, `[1, heads, rows, D]`, and written in place; rotation comes
before. Names of tensors are those of the kernel's parameters: what an engine hands over is in that order.

This module knows shapes, types and launches. What TensorRT makes of them is in `tensorrt_plugin`.
"""

import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from causalrt.errors import KernelError, OperandError
from causalrt.plugins.kernel_launch import KernelLaunch, pointer_to
from causalrt.plugins.qk_norm_rope import check_operands as check_qk_norm_rope
from causalrt.plugins.shard_blocks import blocks_from_shares

ATTRIBUTE_TYPES = (int, float)
RESERVED_NAMES = frozenset({"aot", "outputs", "stream", "tactic"})
"""Names that have a meaning of their own: `aot` to TensorRT's ONNX parser, the others to its plugin functions."""

DTYPE_FROM_ONNX = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
"""Types of an output that no input has, by their number in ONNX."""

LARGE_TILES, SMALL_TILES = 1, 2
"""Tactics of the attention plugins. The small tiles fit into the shared memory that every kernel may take: if TensorRT launches
plugins without raising their limit, the large ones fail when they are timed, which should leave the small ones."""

MAX_SHARDS = 2
"""Shares that the attention kernel takes at once."""

MAX_HEAD_DIM = 128
"""Channels of a head that it takes: tiles of more do not fit into shared memory."""

Attributes = Mapping[str, Any]
Dims = Mapping[str, Sequence[Any]]
"""Dimensions of each input: numbers, or symbols that know `+ - * //` with the symbol on the left."""

Tensors = Mapping[str, torch.Tensor]
"""Tensors without data (device `meta`): shapes and types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """An output that is written anew.

    Attributes:
        name: of the kernel's parameter.
        dtype: its type, from the types of the inputs and the attributes.
        shape: its dimensions, from those of the inputs and the attributes.
    """

    name: str
    dtype: Callable[[Mapping[str, torch.dtype], Attributes], torch.dtype]
    shape: Callable[[Dims, Attributes], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginSpec:
    """A plugin with one kernel.

    Attributes:
        name: without the namespace.
        inputs: names of the kernel's first parameters.
        outputs: the kernel's other parameters.
        in_place: inputs that are outputs too; they come after `outputs`.
        attributes: names and types, in the order in which they are handed over.
        launch: the launch, from inputs, attributes, compute capability and tactic.
        tactics: positive numbers of the ways to compute it, among which TensorRT takes the fastest; none where there is one.

    Raises:
        KernelError: TensorRT would not take it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    in_place: tuple[str, ...]
    attributes: Mapping[str, type]
    launch: Callable[[Tensors, Attributes, int, int], KernelLaunch]
    tactics: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [*self.inputs, *(output.name for output in self.outputs), *self.attributes]
        for name in (self.name, *names):
            if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED_NAMES:
                raise KernelError(f"plugin {self.name!r}: {name!r} cannot be a name; take another identifier")
        if len(set(names)) < len(names):
            raise KernelError(f"plugin {self.name!r}: inputs, outputs and attributes share a name: {names}; rename one")
        if not self.inputs or not self.outputs:
            raise KernelError(f"plugin {self.name!r}: inputs are {self.inputs}, outputs {self.outputs}; it needs both")
        if len(set(self.in_place)) < len(self.in_place) or not set(self.in_place) <= set(self.inputs):
            raise KernelError(
                f"plugin {self.name!r}: in_place is {self.in_place}; take each once, out of the inputs {self.inputs}"
            )
        for name, kind in self.attributes.items():
            if kind not in ATTRIBUTE_TYPES:
                wanted = ", ".join(allowed.__name__ for allowed in ATTRIBUTE_TYPES)
                raise KernelError(f"plugin {self.name!r}: attribute {name!r} is of type {kind}; take one of {wanted}")

        if any(tactic < 1 for tactic in self.tactics):
            raise KernelError(f"plugin {self.name!r}: tactics are {self.tactics}; take positive numbers")

    @property
    def num_outputs(self) -> int:
        """Outputs as the engine counts them."""
        return len(self.outputs) + len(self.in_place)

    def plan(self, inputs: Tensors, attributes: Attributes, capability: int, tactic: int = 0) -> KernelLaunch:
        """The launch, whose parameters are the inputs, then the outputs that are written anew.

        Args:
            inputs: by name.
            attributes: by name.
            capability: compute capability, such as 80.
            tactic: one of `tactics`; 0 where there are none, or for the first.

        Raises:
            OperandError: shapes or types do not fit together.
            KernelError: the kernel does not take them.
        """
        launch = self.launch(inputs, attributes, capability, tactic)
        assert list(launch.signature) == [*self.inputs, *(output.name for output in self.outputs)], launch.signature
        dtypes = {name: tensor.dtype for name, tensor in inputs.items()}
        dtypes |= {output.name: output.dtype(dtypes, attributes) for output in self.outputs}
        for name, kind in launch.signature.items():
            if pointer_to(dtypes[name]) != kind:
                raise OperandError(f"{self.name}: {name} is {dtypes[name]}, and the kernel takes {kind.lstrip('*')}")
        return launch


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
        raise OperandError(f"kv_splits is {number}; take rope_attention without split for one range of keys")
    return number


def _out_shape(dims: Dims, given: Attributes) -> tuple[Any, ...]:
    return (dims["received"][0], given["gather_rows"], dims["received"][2])


def rope_attention_spec(*, num_shards: int, split: bool) -> PluginSpec:
    """The plugin that attends for `num_shards` shards, over one range of keys or (`split`) several."""
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
    from causalrt.plugins.rope_attention_launch import plan, tiles_for

    parts, log_sums = inputs["parts"], inputs["log_sums"]
    if parts.ndim != 4 or log_sums.shape != parts.shape[:3]:
        raise OperandError(
            f"parts must be [splits, P, rows, D] and log_sums its first three, got {[*parts.shape]} and {[*log_sums.shape]}"
        )
    kv_splits, world_size, rows, head_dim = parts.shape
    dtype = _combined_dtype({}, attributes)
    # Rows are rows: one shard of one head has as many.
    blocks = blocks_from_shares(
        (world_size, 3 * rows, head_dim), num_tokens=world_size * rows, num_heads=[1], splits=[1]
    )
    launch = plan(
        blocks,
        dtype=dtype,
        slot_rows=blocks.num_tokens,
        whole_slots=True,
        rotate=False,
        tiles=tiles_for(capability, dtype=dtype, head_dim=blocks.head_dim, rotate=False),
        num_multiprocessors=1,
        kv_splits=_kv_splits(kv_splits),
    ).combine
    assert launch is not None
    return launch


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
