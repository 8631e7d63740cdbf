"""Two transformations that let ONNX Runtime's CPU run a graph that was written for TensorRT on P GPUs.

    emulate_ranks        one rank's step with DistCollective       ->  all ranks' steps in one graph of standard ops

        x ... sent -> DistCollective -> received ...                   r0.x ... r0.sent -> Split -+-> Concat -> r0.received ...
                                                                       r1.x ... r1.sent -> Split -+-> Concat -> r1.received ...

    emulate_precision    bfloat16 or float16 throughout            ->  float32 throughout, every low value rounded

        a -> Op -> b                                                   a -> Op -> b:wide -> Cast -> b:low -> Cast -> b

What is left is the graph's own structure, constants and weights: nothing is traced or computed anew. Neither
transformation changes its argument. They know ONNX alone, not the model.
"""

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

from causalrt.export.dist_collective import OP as DIST_COLLECTIVE
from causalrt.plugins.all_to_all import ONNX_DOMAIN

LOW_TYPES = (TensorProto.BFLOAT16, TensorProto.FLOAT16)


def rank_name(rank: int, name: str) -> str:
    """Name of rank `rank`'s own copy of a value; a missing optional input stays missing."""
    return f"r{rank}.{name}" if name else ""


def emulate_ranks(model: onnx.ModelProto, world_size: int) -> onnx.ModelProto:
    """One graph that does the work of all ranks, exchanges included.

    Args:
        model: the step of one rank; its exchanges are DistCollectives over `world_size` ranks, or there are none.
        world_size: P.

    Returns:
        A graph whose inputs and outputs are those of every rank, as `r0.x`, `r1.x` ...; initializers are shared.

    Raises:
        ValueError: several ranks and no exchange, an exchange that is no all-to-all over P ranks, or an op of our own
            domain that is none.
    """
    graph, hits = model.graph, 0
    constants = {tensor.name for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []

    def own(rank: int, name: str) -> str:
        return name if name in constants else rank_name(rank, name)

    for node in graph.node:
        if node.domain == ONNX_DOMAIN:
            _check_exchange(node, world_size)
            nodes += _exchange(node, world_size)
            hits += 1
            continue
        for rank in range(world_size):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = rank_name(rank, node.name)
            copy.input[:] = [own(rank, name) for name in node.input]
            copy.output[:] = [rank_name(rank, name) for name in node.output]
            nodes.append(copy)
    if world_size > 1 and not hits:
        raise ValueError(f"the graph has no {DIST_COLLECTIVE}; lower its exchanges first (lower_exchanges_pass)")
    return _model_like(
        model,
        nodes,
        inputs=list(_values_of_ranks(graph.input, world_size)),
        outputs=list(_values_of_ranks(graph.output, world_size)),
        initializers=list(graph.initializer),
        values=list(_values_of_ranks(graph.value_info, world_size)),
    )


def _check_exchange(node: onnx.NodeProto, world_size: int) -> None:
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    wanted = {"collective_operation": b"all_to_all", "reduce_op": b"none", "root": -1, "nb_rank": world_size}
    if node.op_type != DIST_COLLECTIVE or settings != wanted:
        raise ValueError(f"{node.op_type} {node.name!r} is no all-to-all over {world_size} rank(s): it has {settings}")


def _exchange(node: onnx.NodeProto, world_size: int) -> Iterator[onnx.NodeProto]:
    """Block p of what rank r receives is block r of what rank p sent."""
    (sent,), (received,) = node.input, node.output
    ranks = range(world_size)

    def block(source: int, destination: int) -> str:
        return f"{rank_name(source, received)}.to.{destination}"

    for rank in ranks:
        name, blocks = f"{rank_name(rank, received)}.split", [block(rank, destination) for destination in ranks]
        yield helper.make_node("Split", [rank_name(rank, sent)], blocks, name=name, axis=0, num_outputs=world_size)
    for rank in ranks:
        name, blocks = f"{rank_name(rank, received)}.concat", [block(source, rank) for source in ranks]
        yield helper.make_node("Concat", blocks, [rank_name(rank, received)], name=name, axis=0)


def _values_of_ranks(values: "list[onnx.ValueInfoProto]", world_size: int) -> Iterator[onnx.ValueInfoProto]:
    for rank in range(world_size):
        for value in values:
            copy = onnx.ValueInfoProto()
            copy.CopyFrom(value)
            copy.name = rank_name(rank, value.name)
            yield copy


def emulate_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float32, with every value that was bfloat16 or float16 rounded to that type as it arises.

    This is what a strongly typed engine computes, up to the order of its sums and what its fused kernels round or keep
    inside: each op reads low values, computes in float32 and rounds what it returns. Graph inputs and outputs become
    float32; inputs are rounded on arrival, weights are read as they are stored.

    Raises:
        ValueError: the type of a value is not known, or an op holds a low constant in an attribute.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    low = [tensor.name for tensor in graph.initializer if tensor.data_type in LOW_TYPES]
    nodes = [helper.make_node("Cast", [name], [f"{name}:wide"], to=TensorProto.FLOAT) for name in low]
    renamed = {name: f"{name}:wide" for name in low}
    for value in graph.input:
        if kinds[value.name] in LOW_TYPES:
            renamed[value.name] = f"{value.name}:rounded"
            nodes += _rounded(value.name, renamed[value.name], kinds[value.name])
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        _widen_attributes(copy)
        after: list[onnx.NodeProto] = []
        for index, name in enumerate(node.output):
            if name and name not in kinds:
                raise ValueError(f"the type of {name!r} ({node.op_type}) is not known; give the graph its value_info")
            if name and kinds[name] in LOW_TYPES:
                copy.output[index] = f"{name}:wide"
                after += _rounded(f"{name}:wide", name, kinds[name])
        nodes += [copy, *after]
    return _model_like(
        model,
        nodes,
        inputs=[_widened(value) for value in graph.input],
        outputs=[_widened(value) for value in graph.output],
        initializers=list(graph.initializer),
        values=[value for value in graph.value_info if kinds[value.name] not in LOW_TYPES],
    )


def _rounded(source: str, target: str, kind: int) -> list[onnx.NodeProto]:
    """`target` is `source` rounded to `kind`, both float32."""
    return [
        helper.make_node("Cast", [source], [f"{target}:low"], to=kind),
        helper.make_node("Cast", [f"{target}:low"], [target], to=TensorProto.FLOAT),
    ]


def _widen_attributes(node: onnx.NodeProto) -> None:
    """A Cast to a low type, or its like, is one to float32; rounding follows it."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in LOW_TYPES:
            attribute.i = TensorProto.FLOAT
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in LOW_TYPES:
            raise ValueError(f"{node.op_type} {node.name!r} holds a low constant; make it an initializer")


def _widened(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    if copy.type.tensor_type.elem_type in LOW_TYPES:
        copy.type.tensor_type.elem_type = TensorProto.FLOAT
    return copy


def _model_like(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    *,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto],
    values: list[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    assert not model.functions
    assert not any(attribute.HasField("g") or attribute.graphs for node in nodes for attribute in node.attribute)
    graph = helper.make_graph(nodes, model.graph.name, inputs, outputs, initializer=initializers, value_info=values)
    opsets = [opset for opset in model.opset_import if opset.domain != ONNX_DOMAIN]
    return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
