"""Splits the query rows of a single-head attention into several heads, which share the one key head.

    q [1, 1, R, D], k [1, 1, L, D]  ->  q [1, g, R / g, D], k [1, 1, L, D]          g: smallest divisor of R above 1, usually 2

TensorRT-RTX 1.7 has a fused kernel for a single head only if R x L is large (found by experiment: 2344 x 4680 is rejected and
4680 x 4680 is accepted; two heads are accepted at any size), and on P ranks a shard often has a single head. Both reshapes are
views that move no data.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from causalrt.export.passes import PassContext, replace_nodes


def split_single_heads_pass(model: onnx.ModelProto, context: PassContext) -> int:
    """Split the query rows of every Attention with a single query head.

    Returns:
        The number of attentions that were split, possibly 0.
    """
    graph = model.graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    nodes: list[onnx.NodeProto] = []
    hits = 0
    for node in graph.node:
        if node.op_type != "Attention" or node.domain:
            nodes.append(node)
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        query = [size.dim_value for size in types[node.input[0]].shape.dim]
        flat = len(query) == 3
        heads = attributes["q_num_heads"].i if flat else query[1]
        rows, dim = (query[1], query[2]) if flat else (query[2], query[3])
        groups = next((g for g in range(2, rows + 1) if rows % g == 0), 1) if heads == 1 else 1
        if groups == 1:
            nodes.append(node)
            continue
        masks = ("is_causal" in attributes and attributes["is_causal"].i) or any(node.input[3:4])
        assert not masks, "a mask refers to query rows by their index, which the split changes"
        name = f"single_head.{hits}"
        shape = [1, groups, rows // groups, dim]
        kind = types[node.input[0]].elem_type
        graph.value_info.append(helper.make_tensor_value_info(f"{name}.q", kind, shape))
        split = _constant(graph, f"{name}.split", shape)
        whole = _constant(graph, f"{name}.whole", query)
        inputs, output = list(node.input), node.output[0]
        nodes.append(helper.make_node("Reshape", [inputs[0], split], [f"{name}.q"], name=f"{name}.q"))
        inputs[0] = f"{name}.q"
        if flat:
            axis = _constant(graph, f"{name}.axis", [1])
            for index in (1, 2):
                nodes.append(
                    helper.make_node("Unsqueeze", [inputs[index], axis], [f"{name}.{index}"], name=f"{name}.{index}")
                )
                inputs[index] = f"{name}.{index}"
        attended = helper.make_node("Attention", inputs, [f"{name}.out"], name=node.name)
        kept = [value for key, value in attributes.items() if key not in ("q_num_heads", "kv_num_heads")]
        attended.attribute.extend(kept)
        nodes.append(attended)
        nodes.append(helper.make_node("Reshape", [f"{name}.out", whole], [output], name=f"{name}.whole"))
        hits += 1
    replace_nodes(graph, nodes)
    return hits


def _constant(graph: onnx.GraphProto, name: str, values: list[int]) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
    return name
