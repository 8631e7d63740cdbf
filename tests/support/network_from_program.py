"""A TensorRT network of a traced program, as far as our own ops go; every other op is a constant of its shape."""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram


def trt_dtype(trt: Any, dtype: torch.dtype) -> Any:
    return {
        torch.float32: trt.float32,
        torch.float16: trt.float16,
        torch.bfloat16: trt.bfloat16,
        torch.int64: trt.int64,
    }[dtype]


def make_network(trt: Any) -> Any:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def add_input(trt: Any, network: Any, name: str, value: torch.Tensor) -> Any:
    return network.add_input(name, trt_dtype(trt, value.dtype), tuple(value.shape))


def network_from_program(
    trt: Any, program: ExportedProgram, convert: Callable[[Any, Any, tuple[Any, ...], str], Any]
) -> Any:
    """Inputs are named after placeholders and outputs `output0`, `output1`..., as torch_tensorrt does.

    Args:
        trt: the TensorRT module.
        program: as traced.
        convert: called with the network, one of our ops, its arguments, and a name; returns ITensors.
    """
    network = make_network(trt)

    def constant(value: torch.Tensor) -> Any:
        zeros = network.add_constant(tuple(value.shape), np.zeros(tuple(value.shape), dtype=np.float32))
        return network.add_cast(zeros.get_output(0), trt_dtype(trt, value.dtype)).get_output(0)

    made: dict[torch.fx.Node, Any] = {}
    for node in program.module(check_guards=False).graph.nodes:
        if node.op == "placeholder":
            made[node] = add_input(trt, network, node.target, node.meta["val"])
        elif node.op == "call_function" and node.target is operator.getitem:
            made[node] = made[node.args[0]][node.args[1]]
        elif node.op == "call_function" and node.target.namespace == "causalrt":
            arguments = torch.fx.node.map_arg(node.args, lambda argument: made[argument])
            made[node] = convert(network, node.target, arguments, node.name)
        elif node.op == "call_function":
            value = node.meta["val"]
            made[node] = constant(value) if isinstance(value, torch.Tensor) else [constant(part) for part in value]
        elif node.op == "output":
            flat, _ = torch.utils._pytree.tree_flatten(node.args[0])
            for index, output in enumerate(flat):
                made[output].name = f"output{index}"
                network.mark_output(made[output])
    return network


def layers_of(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def kinds_of(network: Any) -> Counter[str]:
    return Counter(str(layer.type).removeprefix("LayerType.") for layer in layers_of(network))
