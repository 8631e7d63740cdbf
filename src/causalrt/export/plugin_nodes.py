"""Turns the fused nodes of a step into TensorRT plugins and splits the keys into ranges where that uses the GPU better.

    rope_attention_2 (received, slots, kv_rows)  ->  rope_attention_split_2 {kv_splits}  ->  parts, log_sums
                                                     combine_splits (parts, log_sums)    ->  the output

TensorRT's parser prefers a function in the file to a plugin of the same name, so the functions are removed. The parser also
silently ignores missing attributes of a plugin node, so nodes are checked here against the plugins' declarations.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

import onnx
import torch
from onnx import helper

from causalrt.errors import BuildError
from causalrt.export.passes import PassContext, replace_nodes
from causalrt.export.plugin_functions import NODE_FORMS
from causalrt.plugins.all_to_all import ONNX_DOMAIN, ONNX_OP
from causalrt.plugins.plugin_spec import PluginSpec
from causalrt.plugins.plugin_specs import COMBINE_SPLITS, DTYPE_FROM_ONNX, SPECS, rope_attention_spec
from causalrt.plugins.shard_blocks import blocks_from_shares

SPEC_BY_NAME = {spec.name: spec for spec in SPECS}


def use_plugins_pass(model: onnx.ModelProto, context: PassContext) -> int:
    """Replace the fused nodes of a step graph with static shapes by nodes for which TensorRT finds plugins.

    Returns:
        The number of fused nodes.

    Raises:
        BuildError: a fused node has no plugin, or does not match the declaration of its plugin.
    """
    types = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.value_info)}
    types |= {tensor.name: _type_of(tensor) for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    hits = 0
    for node in model.graph.node:
        if node.domain != ONNX_DOMAIN or node.op_type not in NODE_FORMS:
            nodes.append(node)
            continue
        _check(node)
        nodes.extend(_plugins_of(node, types, context))
        hits += 1
    replace_nodes(model.graph, nodes)
    del model.functions[:]
    return hits


def count_plugins(model: onnx.ModelProto) -> dict[str, int]:
    """Number of plugin nodes in a graph, by plugin name."""
    return dict(
        Counter(node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN and node.op_type != ONNX_OP)
    )


def _type_of(tensor: onnx.TensorProto) -> onnx.TypeProto.Tensor:
    return helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type


def _check(node: onnx.NodeProto) -> None:
    spec = SPEC_BY_NAME.get(node.op_type)
    if spec is None:
        raise BuildError(
            f"{node.name}: there is no plugin {node.op_type}; build with `--plugins off`, or for onnxruntime"
        )
    attributes = {attribute.name for attribute in node.attribute}
    counts = (len(node.input), len(node.output))
    if attributes != set(spec.attributes) or counts != (len(spec.inputs), spec.num_outputs):
        raise BuildError(
            f"{node.name} has {counts[0]} inputs, {counts[1]} outputs and the attributes {sorted(attributes)}; the plugin "
            f"{spec.name} declares {len(spec.inputs)}, {spec.num_outputs} and {sorted(spec.attributes)}; build again with "
            "one version of CausalRT"
        )


def _plugins_of(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto.Tensor],
    context: PassContext,
) -> Iterator[onnx.NodeProto]:
    """Yield the node itself, or the two nodes that replace it if the keys are split."""
    kv_splits = 1
    if node.op_type.startswith("rope_attention"):
        kv_splits = _kv_splits(node, types, context)
    if kv_splits == 1:
        yield node
        return
    out, *slots = node.output
    spec = _split_spec(node)
    parts = [f"{out}.parts", f"{out}.log_sums"]
    split = helper.make_node(spec.name, list(node.input), [*parts, *slots], name=node.name, domain=ONNX_DOMAIN)
    split.attribute.extend(node.attribute)
    split.attribute.append(helper.make_attribute("kv_splits", kv_splits))
    yield split
    name = f"{node.name}.combine"
    dtype = types[node.input[0]].elem_type
    yield helper.make_node(COMBINE_SPLITS.name, parts, [out], name=name, domain=ONNX_DOMAIN, dtype=dtype)


def _split_spec(node: onnx.NodeProto) -> PluginSpec:
    return rope_attention_spec(num_shards=len(SPEC_BY_NAME[node.op_type].in_place) // 2, split=True)


def _kv_splits(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto.Tensor], context: PassContext) -> int:
    from causalrt.plugins.rope_attention_launch import plan, tiles_for

    spec = SPEC_BY_NAME[node.op_type]
    named = dict(zip(spec.inputs, node.input, strict=True))
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    shapes = {key: [size.dim_value for size in types[name].shape.dim] for key, name in named.items()}
    slots = [shapes[name] for name in spec.in_place[::2]]
    blocks = blocks_from_shares(
        shapes["received"],
        num_tokens=numbers["num_tokens"],
        num_heads=[shape[1] for shape in slots],
        splits=[numbers[f"split_{number}"] for number in range(len(slots))],
    )
    dtype = DTYPE_FROM_ONNX.get(types[named["received"]].elem_type, torch.float32)
    return plan(
        blocks,
        dtype=dtype,
        slot_rows=slots[0][2],
        whole_slots=True,
        rotate=False,
        tiles=tiles_for(context.capability, dtype=dtype, head_dim=blocks.head_dim, rotate=False),
        num_multiprocessors=context.num_multiprocessors,
    ).kv_splits
