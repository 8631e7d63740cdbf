"""Represents the fused ops in ONNX: a node of our own domain per call, and one function of standard ops that defines it.

    causalrt::qk_norm_rope     ->  qk_norm_rope (q, k, v, ..., destinations) {num_heads, eps, out_rows}     node, each call
                                   = RMSNormalization, RotaryEmbedding, Gather ...                          function, once
    causalrt::rope_attention   ->  rope_attention_2 (received, k_slots_0, ..., kv_rows) {num_tokens, ...}   for 2 shards
                                   = Slice, TensorScatter, Attention ...

A runtime without plugins expands the functions; for a runtime with plugins, `plugin_nodes` removes them. The names of nodes,
inputs and attributes are those of the plugins (`plugins/plugin_specs.py`). A function is valid only for the sizes of its calls,
which are the same in all layers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from onnxscript.values import Opset
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from causalrt.export.passes import PassContext
from causalrt.plugins.all_to_all import ONNX_DOMAIN
from causalrt.plugins.onnx_rope_attention import onnx_rope_attention
from causalrt.plugins.plugin_specs import QK_NORM_ROPE, rope_attention_spec
from causalrt.plugins.qk_norm_rope import onnx_qk_norm_rope
from causalrt.plugins.shard_blocks import MAX_SHARDS, blocks_from_shares

ROTATION = ("rank", "cos", "sin")
ROTATED = "_rotated"
"""Suffix of a `rope_attention` that rotates cached keys when it reads them; no plugin has such a name."""

FIXED_TYPES = {"kv_rows": "tensor(int64)", "rank": "tensor(int64)", "destinations": "tensor(int32)"}
FIXED_TYPES |= {"cos": "tensor(float)", "sin": "tensor(float)"}
"""Types of the inputs that do not have the type of the rows."""

OWN_OPSET = 1
Translations = Mapping[Callable[..., Any], Callable[..., Any]]
Translate = Callable[[ExportedProgram, Sequence[str], Sequence[str]], ir.Model]
"""Translates (program, input names, output names) to ONNX, with fused ops expanded into standard ops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeForm:
    """The signature of a fused op's node.

    Attributes:
        inputs: names of the inputs.
        num_outputs: number of outputs.
        attributes: types of the attributes, by name.
    """

    inputs: tuple[str, ...]
    num_outputs: int
    attributes: Mapping[str, type]


def _node_forms() -> Iterator[tuple[str, NodeForm]]:
    for spec in (QK_NORM_ROPE, *(rope_attention_spec(num_shards=n + 1, split=False) for n in range(MAX_SHARDS))):
        form = NodeForm(inputs=spec.inputs, num_outputs=spec.num_outputs, attributes=spec.attributes)
        yield spec.name, form
        if spec is not QK_NORM_ROPE:
            yield spec.name + ROTATED, replace(form, inputs=(*spec.inputs, *ROTATION))


NODE_FORMS: Mapping[str, NodeForm] = dict(_node_forms())
"""Node signatures by op type."""


def fused_translations(opset: int, *, as_nodes: bool) -> Translations:
    """ONNX forms of the fused ops: nodes of our own domain, or the standard ops that such a node represents."""
    _register_schemas()
    op, own = Opset("", opset), Opset(ONNX_DOMAIN, OWN_OPSET)

    def qk_norm_rope(
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
        tensors = (q, k, v, norm_q, norm_k, cos, sin, destinations)
        if not as_nodes:
            return onnx_qk_norm_rope(op, *tensors, num_heads, eps, out_rows)
        return own.qk_norm_rope(*tensors, num_heads=num_heads, eps=eps, out_rows=out_rows)

    def rope_attention(
        received: Any,
        slots: Sequence[Any],
        kv_rows: Any,
        rotation: Sequence[Any],
        num_heads: Sequence[int],
        splits: Sequence[int],
        num_tokens: int,
    ) -> Any:
        if not as_nodes:
            return onnx_rope_attention(op, received, slots, kv_rows, rotation, num_heads, splits, num_tokens)
        shape = [int(size) for size in received.shape]
        blocks = blocks_from_shares(shape, num_tokens=num_tokens, num_heads=num_heads, splits=splits)
        numbers = {"num_tokens": num_tokens, "gather_rows": blocks.gather_rows}
        numbers |= {f"split_{number}": split for number, split in enumerate(splits)}
        name = _rope_attention_name(len(splits), rotation)
        return getattr(own, name)(received, *slots, kv_rows, *rotation, **numbers)

    ops = torch.ops.causalrt
    return {ops.qk_norm_rope.default: qk_norm_rope, ops.rope_attention.default: rope_attention}


def add_functions(model: ir.Model, program: ExportedProgram, translate: Translate) -> int:
    """Add a function to `model` for each kind of fused node that it contains.

    Args:
        model: the translation of `program`, with fused ops as nodes.
        program: a program that calls the fused ops.
        translate: translates the single call from which a function is made.

    Returns:
        The number of functions; 0 for a program without fused ops.
    """
    first: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        name = _node_name(node)
        if name is not None:
            first.setdefault(name, node)
    for name, node in first.items():
        model.functions[ONNX_DOMAIN, name, ""] = _function(name, node, translate)
    return len(first)


def check_fused_nodes(model: onnx.ModelProto, *, num_layers: int) -> None:
    """Check that every layer of a step has both fused ops.

    Raises:
        RuntimeError: a layer lacks a fused op; the error lists the nodes found.
    """
    counts = Counter(node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN)
    found = {name: counts[name] for name in NODE_FORMS if counts[name]}
    if len(found) != 2 or set(found.values()) != {num_layers}:
        raise RuntimeError(f"each of {num_layers} layers must have qk_norm_rope and rope_attention, found {found}")


def expand_functions_pass(model: onnx.ModelProto, context: PassContext) -> int:
    """Replace calls of the graph's functions by the functions' bodies, and infer the types of the new values.

    Returns:
        The number of functions, possibly 0.
    """
    hits = len(model.functions)
    if hits:
        model.CopyFrom(onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model)))
    return hits


def _node_name(node: fx.Node) -> str | None:
    ops = torch.ops.causalrt
    if node.target is ops.qk_norm_rope.default:
        return QK_NORM_ROPE.name
    if node.target is ops.rope_attention.default:
        _received, _slots, _kv_rows, rotation, _heads, splits, _num_tokens = node.args
        return _rope_attention_name(len(splits), rotation)  # type: ignore[arg-type]
    return None


def _rope_attention_name(num_shards: int, rotation: Sequence[Any]) -> str:
    return rope_attention_spec(num_shards=num_shards, split=False).name + (ROTATED if rotation else "")


class _OneCall(nn.Module):
    """Module that makes a single call of an op, with the op's tensors as inputs."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        arguments = fx.node.map_arg(self.node.args, lambda _: next(given))
        return self.node.target(*arguments)  # type: ignore[operator]


def _function(name: str, node: fx.Node, translate: Translate) -> ir.Function:
    form = NODE_FORMS[name]
    tensors = [_example(leaf) for leaf in tree_leaves(node.args) if isinstance(leaf, fx.Node)]
    program = torch.export.export(_OneCall(node), tuple(tensors))
    outputs = [f"output_{number}" for number in range(form.num_outputs)]
    graph = translate(program, form.inputs, outputs).graph
    for value in tuple(graph.initializers.values()):  # ONNX functions have no initializers
        constant = ir.node("Constant", [], {"value": value.const_value}, name=value.name)
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
    graph.initializers.clear()
    for made in graph:
        for value in made.outputs:
            value.shape = None  # the number of slot rows can differ between calls
    attributes = [ir.Attr(key, ir.AttributeType.UNDEFINED, None) for key in form.attributes]
    return ir.Function(ONNX_DOMAIN, name, "", graph=graph, attributes=attributes)


def _example(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return torch.zeros(shape, dtype=value.dtype)


def _register_schemas() -> None:
    """Register schemas of the fused nodes with onnx; the exporter looks up the schema of every node that it writes."""
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kinds = {int: onnx.defs.OpSchema.AttrType.INT, float: onnx.defs.OpSchema.AttrType.FLOAT}
    values = ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Any float")
    for name, form in NODE_FORMS.items():
        if not onnx.defs.has(name, domain=ONNX_DOMAIN):
            onnx.defs.register_schema(
                onnx.defs.OpSchema(
                    name,
                    ONNX_DOMAIN,
                    OWN_OPSET,
                    inputs=[parameter(key, FIXED_TYPES.get(key, "T")) for key in form.inputs],
                    outputs=[parameter(f"output_{number}", "T") for number in range(form.num_outputs)],
                    type_constraints=[values],
                    attributes=[
                        attribute(key, kinds[kind], "", required=True) for key, kind in form.attributes.items()
                    ],
                )
            )
