"""Code shared by the passes over exported graphs: the context passed to each of them, and replacing a graph's nodes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from causalrt.config import Config
from causalrt.layout import layout_from_config


@dataclass(frozen=True, kw_only=True, slots=True)
class PassContext:
    """Facts about a graph and its target that a pass cannot read from the graph.

    Attributes:
        weights: the weight file, which will be in the same folder as the graph.
        head_dim: channels of an attention head.
        num_layers: layers of the model.
        num_shards: head shards of a layer.
        world_size: number of ranks.
        plugins: whether self-attention stays in fused nodes, which become plugins.
        capability: compute capability of the GPU that plugins are compiled for, such as 80.
        num_multiprocessors: number of multiprocessors of that GPU.
    """

    weights: Path | None = None
    head_dim: int = 0
    num_layers: int = 0
    num_shards: int = 1
    world_size: int = 1
    plugins: bool = False
    capability: int = 0
    num_multiprocessors: int = 0


def step_context(config: Config, *, plugins: bool = False) -> PassContext:
    """Create the context for passes over a step graph of `config`."""
    return PassContext(
        head_dim=config.model.head_dim,
        num_layers=config.model.num_layers,
        num_shards=len(layout_from_config(config).shards),
        world_size=config.build.world_size,
        plugins=plugins,
    )


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace the nodes of `graph` by `nodes`, which may include nodes of the graph itself."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
