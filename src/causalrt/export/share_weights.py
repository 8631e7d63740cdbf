"""Pass: initializers that are weights become references into the bundle's weight file, so that weights are stored once."""

import json
import struct
from pathlib import Path

import onnx_ir as ir

PREFIX = "wan."
"""Where the traced modules keep the model; the rest of an initializer's name is the weight's name in the file."""


def weight_offsets(weights: Path) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of each tensor in a safetensors file: 8 bytes of header length, the JSON header, the data."""
    with weights.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    return {
        name: (8 + header_bytes + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def share_weights_pass(model: ir.Model, weights: Path) -> ir.Model:
    """Refer to `weights` (a file that will stand beside the graph) instead of holding them; a lossless pass.

    Raises:
        RuntimeError: no initializer was a weight, or one has lost its name to another pass.
    """
    offsets = weight_offsets(weights)
    hits = 0
    for name, value in model.graph.initializers.items():
        if not name.startswith(PREFIX):
            continue
        tensor = value.const_value
        if tensor is None or name.removeprefix(PREFIX) not in offsets:
            raise RuntimeError(f"initializer {name} is no tensor of {weights.name}")
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
    if not hits:
        raise RuntimeError("share_weights_pass found no weights; are the modules traced under another name?")
    return model
