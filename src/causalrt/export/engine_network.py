"""Completes a parsed TensorRT network, describes its contents and checks them.

Everything is read from the network before the build, because an engine can be opened only on a GPU.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from causalrt.engines.tensor_names import KV_ROWS
from causalrt.errors import BuildError


def finish_attentions(trt: Any, network: Any) -> None:
    """Set the attention inputs that the parser drops, and remove the multiplications that it adds.

    Every attention over KV slots gets the number of filled rows (`nonpad_kv_seqlen`, which the parser drops). Every attention
    also reads its queries and keys directly: the parser multiplies both by the square root of Attention's scale, which is 1 at
    this point (`scale_queries_pass`), and multiplying all cached keys would cost a pass over them at every step.
    """
    producers = {layer.get_output(i).name: layer for layer in layers(network) for i in range(layer.num_outputs)}
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    rows = None
    for attention in attentions(trt, network):
        for index in (0, 1):
            product = producers.get(attention.get_input(index).name)
            if product is not None and product.type == trt.LayerType.ELEMENTWISE:
                if not _is_one(trt, product.get_input(1), producers):
                    raise BuildError(
                        f"TensorRT's parser multiplies input {index} of {attention.name} by something that is not 1; take the "
                        "TensorRT version that this version of CausalRT names, or report it"
                    )
                attention.set_input(index, product.get_input(0))
        keys = producers.get(attention.get_input(1).name)
        while keys is not None and keys.type in (trt.LayerType.CAST, trt.LayerType.ROTARY_EMBEDDING):
            keys = producers.get(keys.get_input(0).name)  # skip the rotation of cached keys when they are read
        if keys is not None and keys.type == trt.LayerType.KV_CACHE_UPDATE:
            rows = rows or network.add_cast(inputs[KV_ROWS], trt.int32).get_output(0)
            attention.key_value_lengths = rows


def _is_one(trt: Any, tensor: Any, producers: dict[str, Any]) -> bool:
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in (trt.LayerType.CAST, trt.LayerType.SHUFFLE, trt.LayerType.UNSQUEEZE):
        layer = producers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.CONSTANT:
        return False
    layer.__class__ = trt.IConstantLayer
    return bool(np.all(np.asarray(layer.weights).astype(np.float32) == 1))


def layers(network: Any) -> Iterator[Any]:
    """Iterate over the layers of a network in order."""
    return (network.get_layer(i) for i in range(network.num_layers))


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Iterate over the attentions of a network; the layer list holds only their input layers, which refer to them."""
    for layer in layers(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def describe_network(trt: Any, network: Any) -> dict[str, Any]:
    """Describe a network in plain JSON types: layers by kind, attentions, collectives, constants, inputs and outputs.

    The names of plugins cannot be read from a network; the caller that inserted them adds them to the description.
    """
    constants, weight_bytes = [], 0
    collectives, cache_updates = [], 0
    for layer in layers(network):
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            output = layer.get_output(0)
            size = _bytes(trt, output)
            if output.dtype in (trt.bfloat16, trt.float16):
                weight_bytes += size
            elif np.prod(tuple(output.shape)) > 1:
                values = np.ascontiguousarray(layer.weights)
                constants.append(
                    {
                        "name": output.name,
                        "shape": list(output.shape),
                        "dtype": str(values.dtype),
                        "bytes": values.nbytes,
                        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
                    }
                )
        elif layer.type == trt.LayerType.DIST_COLLECTIVE:
            tensor = layer.get_input(0)
            collectives.append({"name": layer.name, "ranks": layer.num_ranks, "shape": list(tensor.shape)})
        elif layer.type == trt.LayerType.KV_CACHE_UPDATE:
            cache_updates += 1
    tensors = {
        "inputs": [network.get_input(i) for i in range(network.num_inputs)],
        "outputs": [network.get_output(i) for i in range(network.num_outputs)],
    }
    kinds = Counter(str(layer.type).removeprefix("LayerType.") for layer in layers(network))
    return {
        "layers": dict(sorted(kinds.items())),
        "attentions": _describe_attentions(trt, network),
        "collectives": collectives,
        "cache_updates": cache_updates,
        "plugins": {},
        "constants": constants,
        "weight_bytes": weight_bytes,
        **{
            kind: [
                {"name": t.name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("DataType.")} for t in found
            ]
            for kind, found in tensors.items()
        },
    }


def _describe_attentions(trt: Any, network: Any) -> list[dict[str, Any]]:
    producers = {layer.get_output(i).name: layer for layer in layers(network) for i in range(layer.num_outputs)}
    described = []
    for attention in attentions(trt, network):
        key = source = attention.get_input(1)
        while source.name in producers:
            source = producers[source.name].get_input(0)
        described.append(
            {
                "name": attention.name,
                "query": list(attention.get_input(0).shape),
                "key": list(key.shape),
                "key_source": source.name,
                "decomposable": bool(attention.decomposable),
                "has_lengths": attention.key_value_lengths is not None,
            }
        )
    return described


def check_network(description: dict[str, Any], *, expected: dict[str, int], onnx_file: str) -> None:
    """Reject a network that does not match the step graph; `expected` may omit plugins if there are none.

    Raises:
        BuildError: an attention may be decomposed (and thus run without a fused kernel), or the layer counts differ.
    """
    loose = [attention["name"] for attention in description["attentions"] if attention["decomposable"]]
    found = {
        "attentions": len(description["attentions"]),
        "lengths": sum(attention["has_lengths"] for attention in description["attentions"]),
        "collectives": len(description["collectives"]),
        "cache_updates": description["cache_updates"],
        "plugins": description["layers"].get("PLUGIN_V3", 0),
    }
    expected = {"plugins": 0, **expected}
    if loose or found != expected:
        raise BuildError(
            f"TensorRT's parser made something else of {onnx_file} than it says: found {found}, expected {expected}"
            + (f", decomposable: {', '.join(loose)}" if loose else "")
            + "; take the TensorRT version that this version of CausalRT names, or report it with that file"
        )


def _bytes(trt: Any, tensor: Any) -> int:
    count = int(np.prod(tuple(tensor.shape)))
    return count * int(tensor.dtype.itemsize)
