"""Constants of a bundle's graphs against what this version computes: rotary tables and packing indices, bit for bit.

Tables are told from other constants by name, or, where the exporter has given them a name of its own, by type and shape; a
constant that only says how to reshape or slice is none. What else a graph holds of its own (ones, scalars) is small, and is
covered by the comparisons of values alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH, WEIGHTS, Bundle
from causalrt.export.share_weights import PREFIX, weight_offsets
from causalrt.layout import layouts_from_config
from causalrt.tools.inspect_engines import expected_constants

Table = npt.NDArray[Any]
SHAPING = frozenset(
    (
        "Reshape",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Split",
        "Tile",
        "ConstantOfShape",
        "ReduceMean",
        "ReduceSum",
    )
)
"""Operations whose further inputs say how, and are no table."""
MIN_ELEMENTS = 2


def graph_files(bundle: Bundle) -> list[tuple[str, int]]:
    """Every step graph of the bundle, with the number of its step."""
    return [
        (part.file, number) for number, step in enumerate(bundle.steps) for part in (*step.segments, *step.tensorrt)
    ]


def check_tables(bundle: Bundle) -> tuple[dict[str, int], list[str]]:
    """Count the constants that equal each table, and describe each difference by file, table, row and value."""
    found: dict[str, int] = {}
    faults: list[str] = []
    for step, frames in enumerate(bundle.config.video.step_frames):
        tables = expected_constants(bundle, step)
        prefix = f"{frames}-frame step: " if step else ""
        files = [file for file, number in graph_files(bundle) if number == step]
        of_step: list[str] = []
        for file in files:
            for name, constant in _constants(onnx.load(bundle.path / file, load_external_data=False)):
                fitting = {
                    key: table
                    for key, table in tables.items()
                    if key == name
                    or (table.shape == constant.shape and table.dtype == constant.dtype and name not in tables)
                }
                equal = [key for key, table in fitting.items() if table.tobytes() == constant.tobytes()]
                if equal:
                    found[prefix + equal[0]] = found.get(prefix + equal[0], 0) + 1
                elif fitting:
                    closest = max(fitting, key=lambda key: _equal_elements(fitting[key], constant))
                    of_step.append(_difference(bundle, file, name, closest, fitting[closest], constant, step=step))
        missing = [
            key for key in tables if prefix + key not in found and not any(f" {key} " in fault for fault in of_step)
        ]
        faults += [*of_step, *(f"no graph holds the table {prefix}{key}" for key in missing if files)]
    return found, faults


def _equal_elements(table: Table, constant: Table) -> int:
    return int((table == constant).sum()) if table.shape == constant.shape else -1


def _constants(model: onnx.ModelProto) -> Iterator[tuple[str, Table]]:
    """Initializers that a graph holds itself, by name, those left out that only shape others."""
    readers: dict[str, list[bool]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append(place > 0 and node.op_type in SHAPING)
    for tensor in model.graph.initializer:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if external or tensor.name.startswith(PREFIX) or all(readers.get(tensor.name, [True])):
            continue
        constant = numpy_helper.to_array(tensor)
        if constant.size >= MIN_ELEMENTS:
            yield tensor.name, constant


def _difference(bundle: Bundle, file: str, name: str, key: str, table: Table, constant: Table, *, step: int) -> str:
    """Where a constant is not the table that it should be."""
    called = key if key == name else f"{key} (there called {name})"
    if table.shape != constant.shape or table.dtype != constant.dtype:
        return f"{file}: table {called} is {constant.dtype} {list(constant.shape)}, expected {table.dtype} {list(table.shape)}"
    bits = f"u{table.dtype.itemsize}"
    wrong = np.argwhere(np.ascontiguousarray(table).view(bits) != np.ascontiguousarray(constant).view(bits))
    first = tuple(int(i) for i in wrong[0])
    rows = sorted({int(index[0]) for index in wrong}) if table.ndim > 1 else []
    where = f"rows {_some(rows)}" if rows else f"entries {_some([int(index[0]) for index in wrong])}"
    layout = layouts_from_config(bundle.config)[step]
    if key == "scatter_index":
        rank, row = divmod(first[0], layout.scatter_rows)
        where += f" (row {row} of the block to rank {rank})"
    elif key == "gather_index":
        row, head = divmod(first[0], layout.num_heads)
        where += f" (local row {row}, head {head})"
    return f"{file}: table {called} differs in {where}: at {list(first)} got {constant[first]}, expected {table[first]}"


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


def check_references(bundle: Bundle) -> tuple[int, list[str]]:
    """Weights that graphs refer to, and references that are not to the tensor of that name in the weight file."""
    offsets = weight_offsets(bundle.path / WEIGHTS)
    files = [file for file in (PROMPT_GRAPH, TIME_GRAPH) if file in bundle.hashes]
    checked, faults = 0, []
    for file in (*files, *(file for file, _ in graph_files(bundle))):
        for tensor in onnx.load(bundle.path / file, load_external_data=False).graph.initializer:
            if not tensor.name.startswith(PREFIX):
                continue
            checked += 1
            name = tensor.name.removeprefix(PREFIX)
            place = {entry.key: entry.value for entry in tensor.external_data}
            expected = offsets.get(name)
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                faults.append(f"{file}: weight {name} is held by the graph itself, not by {WEIGHTS}")
            elif expected is None or _reference(place) != (WEIGHTS, *expected):
                faults.append(f"{file}: weight {name} refers to {dict(place)}, expected {WEIGHTS} at {expected}")
    return checked, faults


def _reference(place: Mapping[str, str]) -> tuple[str, int, int]:
    return place.get("location", ""), int(place.get("offset", -1)), int(place.get("length", -1))
