"""Copies of a bundle that are damaged in one place, their manifest written again so that every hash is right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from causalrt.engines.bundle import MANIFEST, WEIGHTS, file_digest, record_digest
from causalrt.export.share_weights import weight_offsets

Change = Callable[[np.ndarray[Any, Any]], None]


def copy_of(bundle: Path, target: Path) -> Path:
    return Path(shutil.copytree(bundle, target))


def hash_again(bundle: Path) -> Path:
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in manifest["files"]:
        file = bundle / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    manifest["digest"] = record_digest(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    return bundle


def change_constant(bundle: Path, file: str, wanted: Callable[[onnx.TensorProto], bool], change: Change) -> str:
    """Change the one constant of a graph that is wanted; its name."""
    model = onnx.load(bundle / file, load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if wanted(tensor)]
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, bundle / file)
    hash_again(bundle)
    return tensor.name


def hold_weight(bundle: Path, file: str, name: str, change: Change) -> None:
    """Put a weight into a graph itself, changed; the weight file stays as it is."""
    model = onnx.load(bundle / file, load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == f"wan.{name}"]
    array = weight(bundle, name).reshape(tuple(tensor.dims)).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, bundle / file)
    hash_again(bundle)


def weight(bundle: Path, name: str) -> np.ndarray[Any, Any]:
    offset, length = weight_offsets(bundle / WEIGHTS)[name]
    return np.frombuffer((bundle / WEIGHTS).read_bytes()[offset : offset + length], dtype=np.float32)


def change_weight(bundle: Path, name: str, change: Change) -> None:
    """Change a weight in the weight file, whose header stays as it is."""
    array, (offset, _) = weight(bundle, name).copy(), weight_offsets(bundle / WEIGHTS)[name]
    change(array)
    with (bundle / WEIGHTS).open("r+b") as file:
        file.seek(offset)
        file.write(array.tobytes())
    hash_again(bundle)
