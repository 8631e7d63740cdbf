"""Cuts a step graph into segments, between which the runtime runs the collectives.

    step graph:  embed . qkv . pack -> AllToAll -> unpack -> TensorScatter -> attend . pack -> AllToAll -> o . ffn . qkv ...
    segments:    [ 0              ]            [ 1                                       ]            [ 2
    at writes:   [ 0              ]            [ 1      ]                 [ 2             ]            [ 3

The graph is cut at the all-to-alls. For a runtime that cannot write the KV slots in place (TensorRT, whose cache update
requires static shapes), it is also cut at the cache writes: the segment before such a cut writes the chunk's keys and values
directly into the staging buffer, to which its output is bound, and the next segment reads the filled prefix.

A value that a later segment reads is kept in memory owned by the runtime. Work that depends only on graph inputs (such as a
layer's modulation) goes to the segment that reads its result, not to the first segment that could compute it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx
import onnx.utils

from causalrt.plugins.all_to_all import ONNX_DOMAIN, ONNX_OP


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A piece of the step graph, and the exchange or cache writes that follow it.

    Attributes:
        model: the segment's graph; inputs and outputs keep their names from the step graph.
        sent: the output to exchange after the segment has run, or None if no exchange follows.
        received: the name under which later segments read the result of the exchange.
        writes: maps each output that is written to the staging buffer to the name under which later segments read the slots
            that contain it.
    """

    model: onnx.ModelProto
    sent: str | None = None
    received: str | None = None
    writes: dict[str, str] = field(default_factory=dict)


def is_exchange(node: onnx.NodeProto) -> bool:
    """Whether a node is an all-to-all."""
    return node.domain == ONNX_DOMAIN and node.op_type == ONNX_OP


def is_cache_write(node: onnx.NodeProto) -> bool:
    """Whether a node writes to the KV slots."""
    return node.domain == "" and node.op_type == "TensorScatter"


def cut_at_exchanges(model: onnx.ModelProto, *, at_cache_writes: bool = False) -> list[Segment]:
    """Cut a graph into segments, in execution order; a graph without a place to cut becomes a single segment."""

    def is_border(node: onnx.NodeProto) -> bool:
        return is_exchange(node) or (at_cache_writes and is_cache_write(node))

    graph = model.graph
    place = _assign_segments(graph, is_border)
    count = 1 + max((place[node.output[0]] + 1 for node in graph.node if is_border(node)), default=0)
    if count == 1:
        return [Segment(model=model)]
    initializers = {tensor.name for tensor in graph.initializer}
    written = {node.output[0] for node in graph.node if is_border(node) and is_cache_write(node)}
    results = {value.name for value in graph.output} - written
    segments = []
    for index in range(count):
        here = [node for node in graph.node if place[node.output[0]] == index]
        inside = [node for node in here if not is_border(node)]
        made = {name for node in inside for name in node.output if name}
        outside = [node for node in graph.node if is_border(node) or place[node.output[0]] != index]
        wanted = {name for node in outside for name in node.input} | results
        read = dict.fromkeys(name for node in inside for name in node.input if name)
        inputs = [name for name in read if name not in made and name not in initializers]
        outputs = [name for node in inside for name in node.output if name in wanted]
        exchanges = [node for node in here if is_exchange(node)]
        writes = {node.input[1]: node.output[0] for node in here if is_border(node) and is_cache_write(node)}
        assert len(exchanges) <= 1
        assert {*writes, *(node.input[0] for node in exchanges)} <= set(outputs)
        segments.append(
            Segment(
                model=onnx.utils.Extractor(model).extract_model(inputs, outputs),
                sent=exchanges[0].input[0] if exchanges else None,
                received=exchanges[0].output[0] if exchanges else None,
                writes=writes,
            )
        )
    return segments


def _assign_segments(graph: onnx.GraphProto, is_border: Callable[[onnx.NodeProto], bool]) -> dict[str, int]:
    """Map every value, by name, to its segment: after the borders it depends on, and in the segment of its first reader.

    A border belongs to the segment that it ends.
    """
    earliest: dict[str, int] = {}
    for node in graph.node:
        fed = max((earliest.get(name, 0) for name in node.input), default=0)
        for name in node.output:
            earliest[name] = fed + 1 if is_border(node) else fed
    readers: dict[str, int] = {}
    place: dict[str, int] = {}
    for node in reversed(graph.node):
        if is_border(node):
            here = earliest[node.output[0]] - 1
        else:
            here = min((readers[name] for name in node.output if name in readers), default=earliest[node.output[0]])
        for name in node.output:
            place[name] = here
        for name in node.input:
            readers[name] = min(readers.get(name, here), here)
    return place
