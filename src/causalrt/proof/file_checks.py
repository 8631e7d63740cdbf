"""Checks of a bundle's files: tables and weight references in its graphs, tables in its engines' networks, and its weights.

A constant of a graph is identified as a table by its name, or by its type and shape if the exporter has renamed it. Other
constants (ones, scalars) are small, and are covered by the comparisons of values only.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from safetensors import safe_open

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH, WEIGHTS, Bundle, tensor_digest
from causalrt.engines.network_record import read_networks
from causalrt.engines.step_tables import check_constants, expected_constants
from causalrt.errors import BundleError
from causalrt.export.checkpoint import DIGESTS, converted_tensors, model_shapes, open_checkpoint
from causalrt.export.share_weights import PREFIX, weight_offsets
from causalrt.layout import layouts_from_config
from causalrt.proof.certificate import Certificate, Check, NotChecked, attempt

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
"""Operations whose inputs after the first are shapes, axes and the like rather than tables."""
MIN_ELEMENTS = 2


def check_files(certificate: Certificate, bundle: Bundle, checkpoint: Path | None) -> None:
    """Check a bundle's files, and its weights against a checkpoint if there is one; see `certify`."""

    def add(name: str, what: str, check: Callable[[], tuple[int, list[str]]], *, keep_empty: bool = False) -> int:
        result, fault = attempt(f"the check of {name}", check)
        count, faults = result or (0, [fault])
        if count or faults or keep_empty:
            certificate.checks.append(Check(name=name, count=count, found=f"{count} {what}", faults=tuple(faults)))
        return count

    add("hashes", "files as the manifest has them", lambda: (len(bundle.hashes), []))
    if graph_files(bundle):
        add("tables", "constants of graphs equal the tables of this version, bit for bit", lambda: check_tables(bundle))
        add("references", "references of graphs to weights", lambda: check_references(bundle))
    if len(bundle.unfinished) < len(bundle.engines):
        what = "constants of the networks that engines were built from equal the tables"
        add("networks", what, lambda: check_networks(bundle), keep_empty=True)
    if not add("weights", "weights are finite, and what the build wrote of them", lambda: check_digests(bundle)):
        why = "the weight file holds no digests (it was built by an earlier version)"
        certificate.not_checked.append(NotChecked(what="weights against what the build wrote", why=why))
    if checkpoint is not None:
        add("checkpoint", f"weights equal {checkpoint.name}", lambda: check_against_checkpoint(bundle, checkpoint))
    else:
        why = "no checkpoint was given; add --checkpoint FILE"
        certificate.not_checked.append(NotChecked(what="weights against a checkpoint", why=why))


def check_networks(bundle: Bundle) -> tuple[int, list[str]]:
    """Count the constants of engines' networks that equal a table, and name the tables that no constant equals."""
    count, faults = 0, []
    for flavour, record in bundle.engines.items():
        for target, files in record.targets.items():
            try:
                networks = read_networks(bundle, files)
            except BundleError as error:
                return 0, [str(error)]
            for step, names in enumerate(files.steps):
                for name, table in check_constants(bundle, step, [networks[name] for name in names]).items():
                    count += table["equal_constants"]
                    if not table["equal_constants"]:
                        at = f"{flavour} {target} {bundle.config.video.step_frames[step]}-frame step"
                        faults.append(f"{at}: no constant of the network equals the table {name}")
    return count, faults


def graph_files(bundle: Bundle) -> list[tuple[str, int]]:
    """Every step graph of the bundle, with the number of its step."""
    return [
        (part.file, number) for number, step in enumerate(bundle.steps) for part in (*step.segments, *step.tensorrt)
    ]


def check_tables(bundle: Bundle) -> tuple[int, list[str]]:
    """Count the constants that equal a table, and describe each difference by file, table, row and value."""
    count, faults = 0, []
    for step, frames in enumerate(bundle.config.video.step_frames):
        tables = expected_constants(bundle, step)
        files = [file for file, number in graph_files(bundle) if number == step]
        found: list[str] = []
        wrong: list[str] = []
        for file in files:
            for name, constant in _constants(onnx.load(bundle.path / file, load_external_data=False)):
                fitting = {key: table for key, table in tables.items() if _may_be(key, table, name, constant, tables)}
                equal = [key for key, table in fitting.items() if table.tobytes() == constant.tobytes()]
                if equal:
                    found.append(equal[0])
                elif fitting:
                    closest = max(fitting, key=lambda key: _equal_elements(fitting[key], constant))
                    wrong.append(_difference(bundle, file, name, closest, fitting[closest], constant, step=step))
        missing = [key for key in tables if key not in found and not any(f" {key} " in fault for fault in wrong)]
        of_step = f"{frames}-frame step: " if step else ""
        faults += [*wrong, *(f"no graph holds the table {of_step}{key}" for key in missing if files)]
        count += len(found)
    return count, faults


def _may_be(key: str, table: Table, name: str, constant: Table, tables: Mapping[str, Table]) -> bool:
    """Whether a constant can be identified as the table `key`: by its name, or else by type and shape."""
    return key == name or (name not in tables and table.shape == constant.shape and table.dtype == constant.dtype)


def _equal_elements(table: Table, constant: Table) -> int:
    return int((table == constant).sum()) if table.shape == constant.shape else -1


def _constants(model: onnx.ModelProto) -> Iterator[tuple[str, Table]]:
    """Constants that a graph holds itself, by name, without those that only reshape or slice other values."""
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
    """Describe where a constant differs from the table that it should equal."""
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
    """Count the references of graphs to weights, and describe those that do not lead to the tensor of that name."""
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


def check_digests(bundle: Bundle) -> tuple[int, list[str]]:
    """Count the weights that have a digest, and describe those that are missing, not finite, or not what the build wrote."""
    checked, faults = 0, []
    with safe_open(bundle.path / WEIGHTS, framework="pt") as file:
        digests = json.loads((file.metadata() or {}).get(DIGESTS, "{}"))
        held = set(file.keys())
        for name in model_shapes(bundle.config.model):
            if name not in held:
                faults.append(f"{WEIGHTS}: {name} is missing")
                continue
            tensor = file.get_tensor(name)
            bad = int((~tensor.isfinite()).sum())
            if bad:
                faults.append(f"{WEIGHTS}: {name} holds {bad} values that are not finite")
            if digests and name not in digests:
                faults.append(f"{WEIGHTS}: {name} has no digest, though others have")
            elif digests:
                checked += 1
                if tensor_digest(tensor) != digests[name]:
                    faults.append(f"{WEIGHTS}: {name} is not what the build wrote (its sha256 differs)")
    return checked, faults


def check_against_checkpoint(bundle: Bundle, checkpoint: Path) -> tuple[int, list[str]]:
    """Compare every weight with what the loader reads from the checkpoint, and describe those that differ.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has other sizes than the bundle.
    """
    dtype, faults, checked = TORCH_DTYPES[bundle.config.build.precision], [], 0
    with safe_open(bundle.path / WEIGHTS, framework="pt") as file:
        for name, expected in converted_tensors(open_checkpoint(checkpoint), bundle.config.model, dtype=dtype):
            checked += 1
            got = file.get_tensor(name)
            if torch.equal(got, expected):
                continue
            if got.shape != expected.shape or got.dtype != expected.dtype:
                fault = f"is {got.dtype} {list(got.shape)}, the checkpoint's is {list(expected.shape)}"
            else:
                wrong = (got != expected).nonzero()
                first = tuple(wrong[0].tolist())
                fault = (
                    f"differs from {checkpoint.name} in {len(wrong)} of {got.numel()} values: at {list(first)} "
                    f"got {float(got[first]):.7g}, expected {float(expected[first]):.7g}"
                )
            faults.append(f"{WEIGHTS}: {name} {fault}")
    return checked, faults
