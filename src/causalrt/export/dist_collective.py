"""Turns all-to-alls into TensorRT's DistCollective, so that a single engine contains the whole step."""

import onnx
from onnx import helper

from causalrt.export.passes import PassContext
from causalrt.export.segment import is_exchange

OP = "DistCollective"


def lower_exchanges_pass(model: onnx.ModelProto, context: PassContext) -> int:
    """Replace every AllToAll by a DistCollective over all ranks, which exchanges equal blocks along the first dimension.

    Returns:
        The number of collectives.
    """
    hits = 0
    for node in filter(is_exchange, model.graph.node):
        node.op_type = OP
        node.attribute.extend(
            [
                helper.make_attribute("collective_operation", "all_to_all"),
                helper.make_attribute("reduce_op", "none"),
                helper.make_attribute("root", -1),
                helper.make_attribute("nb_rank", context.world_size),
            ]
        )
        hits += 1
    return hits
