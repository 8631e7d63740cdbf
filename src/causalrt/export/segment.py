"""Cut a step graph at its all-to-alls into segments: the lowering for runtime collectives.

    step graph:  embed . qkv . pack -> AllToAll -> attend . pack -> AllToAll -> o . ffn . qkv . pack -> ... -> flow
    segments:    [ 0              ]            [ 1             ]            [ 2                    ]

A value that a later segment reads is carried in memory that the runtime owns. Work that only graph inputs feed (a layer's
modulation, say) goes to the segment that reads it, not to the first one that could.
"""

from dataclasses import dataclass

import onnx
import onnx.utils

from causalrt.plugins.all_to_all import ONNX_DOMAIN, ONNX_OP


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A piece of the step graph, and the exchange that follows it.

    Attributes:
        model: its graph; inputs and outputs keep their names in the step graph.
        sent: the output to exchange when it has run, or None after the last segment.
        received: the name under which later segments read what the exchange brought.
    """

    model: onnx.ModelProto
    sent: str | None
    received: str | None


def is_exchange(node: onnx.NodeProto) -> bool:
    """Whether a node is an all-to-all."""
    return node.domain == ONNX_DOMAIN and node.op_type == ONNX_OP


def cut_exchanges_pass(model: onnx.ModelProto) -> list[Segment]:
    """Segments in the order in which they run; one, the whole graph, if it has no exchange. A lossless pass."""
    graph = model.graph
    exchanges = [node for node in graph.node if is_exchange(node)]
    if not exchanges:
        return [Segment(model=model, sent=None, received=None)]
    place = _assign_segments(graph)
    segments = []
    for index in range(len(exchanges) + 1):
        inside = [node for node in graph.node if place[node.output[0]] == index and not is_exchange(node)]
        made = {name for node in inside for name in node.output if name}
        outside = [node for node in graph.node if is_exchange(node) or place[node.output[0]] != index]
        wanted = {name for node in outside for name in node.input} | {value.name for value in graph.output}
        initializers = {tensor.name for tensor in graph.initializer}
        read = dict.fromkeys(name for node in inside for name in node.input if name)
        inputs = [name for name in read if name not in made and name not in initializers]
        outputs = [name for node in inside for name in node.output if name in wanted]
        exchange = exchanges[index] if index < len(exchanges) else None
        assert exchange is None or exchange.input[0] in outputs
        segments.append(
            Segment(
                model=onnx.utils.Extractor(model).extract_model(inputs, outputs),
                sent=exchange.input[0] if exchange else None,
                received=exchange.output[0] if exchange else None,
            )
        )
    return segments


def _assign_segments(graph: onnx.GraphProto) -> dict[str, int]:
    """Segment of every value, by name: after the exchanges that feed it, and no sooner than its first reader needs it."""
    earliest: dict[str, int] = {}
    for node in graph.node:
        fed = max((earliest.get(name, 0) for name in node.input), default=0)
        for name in node.output:
            earliest[name] = fed + 1 if is_exchange(node) else fed
    readers: dict[str, int] = {}
    place: dict[str, int] = {}
    for node in reversed(graph.node):
        if is_exchange(node):
            here = earliest[node.output[0]] - 1
        else:
            here = min((readers[name] for name in node.output if name in readers), default=earliest[node.output[0]])
        for name in node.output:
            place[name] = here
        for name in node.input:
            readers[name] = min(readers.get(name, here), here)
    return place
