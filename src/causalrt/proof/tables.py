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


def graph_files(bundle: Bundle) -> list[tuple[str, bool]]:
    """Every step graph of the bundle, and whether it is of a lone first frame."""
    chunks = [(part.file, False) for part in (*bundle.segments, *bundle.engine_parts)]
    return chunks + [(part.file, True) for part in (*bundle.lone_segments, *bundle.lone_engine_parts)]


def check_tables(bundle: Bundle) -> tuple[dict[str, int], list[str]]:
    """How many constants equal each table, and what is wrong, named by file, table, row and value."""
    found: dict[str, int] = {}
    faults: list[str] = []
    per_set = {lone: expected_constants(bundle, lone=lone) for lone in bundle.config.video.kinds_of_chunk}
    for file, lone in graph_files(bundle):
        tables = per_set[lone]
        model = onnx.load(bundle.path / file, load_external_data=False)
        for name, constant in _constants(model):
            fitting = {
                key: table
                for key, table in tables.items()
                if key == name
                or (table.shape == constant.shape and table.dtype == constant.dtype and name not in tables)
            }
            equal = [key for key, table in fitting.items() if table.tobytes() == constant.tobytes()]
            if equal:
                key = f"{'lone ' if lone else ''}{equal[0]}"
                found[key] = found.get(key, 0) + 1
            elif fitting:
                closest = max(fitting, key=lambda key: _equal_elements(fitting[key], constant))
                faults.append(_difference(bundle, file, name, closest, fitting[closest], constant, lone=lone))
    for lone, tables in per_set.items():
        if any(kind == lone for _, kind in graph_files(bundle)):
            keys = [f"{'lone ' if lone else ''}{name}" for name in tables]
            faults += [
                f"no graph holds the table {key}" for key in keys if key not in found and not _named(faults, key)
            ]
    return found, faults


def _named(faults: list[str], key: str) -> bool:
    return any(f" {key.removeprefix('lone ')} " in fault for fault in faults)


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


def _difference(bundle: Bundle, file: str, name: str, key: str, table: Table, constant: Table, *, lone: bool) -> str:
    """Where a constant is not the table that it should be."""
    called = key if key == name else f"{key} (there called {name})"
    if table.shape != constant.shape or table.dtype != constant.dtype:
        return f"{file}: table {called} is {constant.dtype} {list(constant.shape)}, expected {table.dtype} {list(table.shape)}"
    bits = f"u{table.dtype.itemsize}"
    wrong = np.argwhere(np.ascontiguousarray(table).view(bits) != np.ascontiguousarray(constant).view(bits))
    first = tuple(int(i) for i in wrong[0])
    rows = sorted({int(index[0]) for index in wrong}) if table.ndim > 1 else []
    where = f"rows {_some(rows)}" if rows else f"entries {_some([int(index[0]) for index in wrong])}"
    layout = layouts_from_config(bundle.config)[lone]
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
