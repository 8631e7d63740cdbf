"""Turns initializers that are weights into references to the bundle's weight file, which stores each weight once."""

import json
import struct
from pathlib import Path

import onnx_ir as ir

from causalrt.export.passes import PassContext

PREFIX = "wan."
"""Prefix of weight initializers (the traced module's model attribute); the rest is the weight's name in the file."""


def weight_offsets(weights: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of each tensor in a safetensors file.

    The file consists of 8 bytes of header length, the JSON header and the data.
    """
    with weights.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    return {
        name: (8 + header_bytes + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def share_weights_pass(model: ir.Model, context: PassContext) -> int:
    """Turn every initializer that is a weight into a reference to `context.weights`, in the same folder as the graph.

    Returns:
        The number of weights.

    Raises:
        RuntimeError: an initializer with the model's prefix is not in the file, because an earlier pass renamed it.
    """
    weights = context.weights
    assert weights is not None
    offsets = weight_offsets(weights)
    hits = 0
    for name, value in model.graph.initializers.items():
        if not name.startswith(PREFIX):
            continue
        tensor = value.const_value
        if tensor is None or name.removeprefix(PREFIX) not in offsets:
            raise RuntimeError(f"initializer {name} is not a tensor of {weights.name}")
        offset, length = offsets[name.removeprefix(PREFIX)]
        assert tensor.nbytes == length
        value.const_value = ir.ExternalTensor(
            weights.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=weights.parent,
        )
        hits += 1
    return hits
