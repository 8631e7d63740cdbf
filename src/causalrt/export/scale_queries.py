"""Moves the factor 1 / sqrt(D) from Attention to its queries.

TensorRT's parser multiplies both queries and keys by the square root of the scale, which costs a pass over all cached keys
at every step, and rounds twice. This pass multiplies only the queries, in float32, and sets the scale of Attention to 1.
"""

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from causalrt.export.passes import PassContext, replace_nodes


def scale_queries_pass(model: onnx.ModelProto, context: PassContext) -> int:
    """Multiply the queries of every Attention by 1 / sqrt(head_dim).

    Returns:
        The number of attentions. The last bit of a query element may change.
    """
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    name = "attention_scale"
    nodes, hits = [], 0
    for node in graph.node:
        if node.op_type == "Attention" and node.domain == "":
            assert not any(attribute.name == "scale" for attribute in node.attribute)
            query = node.input[0]
            kind = types[query]
            wide, scaled = f"{query}.{hits}.wide", f"{query}.{hits}.scaled"
            if kind == TensorProto.FLOAT:
                nodes.append(helper.make_node("Mul", [query, name], [scaled], name=scaled))
            else:
                nodes += [
                    helper.make_node("Cast", [query], [wide], name=wide, to=TensorProto.FLOAT),
                    helper.make_node("Mul", [wide, name], [f"{wide}.scaled"], name=f"{wide}.scaled"),
                    helper.make_node("Cast", [f"{wide}.scaled"], [scaled], name=scaled, to=kind),
                ]
            node.input[0] = scaled
            node.attribute.append(helper.make_attribute("scale", 1.0))
            hits += 1
        nodes.append(node)
    replace_nodes(graph, nodes)
    if hits:
        graph.initializer.append(
            numpy_helper.from_array(np.array(1 / math.sqrt(context.head_dim), dtype=np.float32), name)
        )
    return hits
