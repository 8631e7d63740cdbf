"""Replaces the standard Attention op, which materialises the full score matrix, with ONNX Runtime's MultiHeadAttention.

    Attention (q, k, v) {q_num_heads, kv_num_heads}  ->  com.microsoft.MultiHeadAttention (q, k, v) {num_heads}

Tensors are `[1, rows, heads * D]`. On a CPU, MultiHeadAttention processes the keys in blocks that fit the cache, and it has
float32 kernels only. The score matrix of the 1.3B model on one rank would take 7.3 GiB. TensorRT does not have this op.
"""

import onnx
from onnx import helper

from causalrt.export.passes import PassContext

RUNTIME_DOMAIN = "com.microsoft"
RUNTIME_OP = "MultiHeadAttention"


def fuse_attention_pass(model: onnx.ModelProto, context: PassContext) -> int:
    """Replace every Attention that computes plain softmax(q k^T / sqrt(D)) v, in the graph and in its functions.

    Returns:
        The number of attentions replaced. Their results differ in the last bits because the order of summation changes.
    """
    hits = 0
    for body in (model.graph, *model.functions):
        here = sum(_replace(node) for node in body.node)
        if here and body is not model.graph:
            _import(body)
        hits += here
    if hits:
        _import(model)
    return hits


def _import(body: onnx.ModelProto | onnx.FunctionProto) -> None:
    if RUNTIME_DOMAIN not in [opset.domain for opset in body.opset_import]:
        body.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))


def _replace(node: onnx.NodeProto) -> bool:
    if node.op_type != "Attention" or node.domain or any(node.input[3:]) or any(node.output[1:]):
        return False
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    heads, kv_heads = (attributes.pop(f"{kind}_num_heads", 0) for kind in ("q", "kv"))
    if heads != kv_heads or not heads or any(attributes.values()):
        return False
    node.op_type, node.domain = RUNTIME_OP, RUNTIME_DOMAIN
    del node.attribute[:], node.input[3:], node.output[1:]
    node.attribute.append(helper.make_attribute("num_heads", heads))
    return True
