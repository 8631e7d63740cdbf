"""What is in a bundle's TensorRT engines: told from the networks that they were built from, and, on a GPU, by themselves."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from causalrt.engines.bundle import REBUILD, Bundle
from causalrt.engines.step_record import TargetEngines
from causalrt.engines.tensorrt_engine import EngineLoader
from causalrt.engines.tensorrt_flavour import FLAVOURS, device_target
from causalrt.errors import BundleError, ExecutorError
from causalrt.model.rope import rope_tables
from causalrt.runtime.memory import predict_memory

DTYPE_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4}


def describe_engines(bundle: Bundle) -> list[dict[str, Any]]:
    """Every flavour and target of a bundle, in plain JSON types.

    Raises:
        BundleError: the file that says what is in the engines is not one that a build writes.
    """
    found = []
    for flavour, record in bundle.engines.items():
        for target, files in record.targets.items():
            networks = _read_networks(bundle, files)
            found.append(
                {
                    "flavour": flavour,
                    "target": target,
                    "collectives": record.collectives,
                    "frontend": record.frontend,
                    "version": files.version,
                    "files": {
                        name: {"bytes": (bundle.path / name).stat().st_size, "sha256": bundle.hashes[name]}
                        for name in files.engine_files
                    },
                    "step": describe_step(bundle, [networks[name] for name in files.step]),
                    "bytes_per_rank": _bytes_per_rank(bundle, flavour, networks),
                    "inspector": inspect_on_gpu(bundle, flavour, target, files),
                }
            )
    return found


def _read_networks(bundle: Bundle, files: TargetEngines) -> dict[str, dict[str, Any]]:
    """What the build wrote of each engine's network, by engine file."""
    path = bundle.path / files.networks
    try:
        networks = json.loads(path.read_text())
        for name in files.engine_files:
            described = networks[name]
            for attention in described["attentions"]:
                attention["key_source"].startswith(""), attention["has_lengths"], attention["decomposable"]
            for constant in described["constants"]:
                constant["sha256"].lower(), int(constant["bytes"])
            for entry in described["inputs"]:
                DTYPE_BYTES[entry["dtype"]], entry["name"].lower(), [int(size) for size in entry["shape"]]
            dict(described["layers"]), int(described["weight_bytes"]), int(described["cache_updates"])
            [int(collective["ranks"]) for collective in described["collectives"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{path} does not say what is in the engines ({type(error).__name__}: {error}); {REBUILD}"
        ) from error
    return dict(networks)


def describe_step(bundle: Bundle, networks: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The step's engines, taken together."""
    attentions = [attention for network in networks for attention in network["attentions"]]
    own = [attention for attention in attentions if not attention["key_source"].startswith("cross_k.")]
    collectives = [collective for network in networks for collective in network["collectives"]]
    exchanges = sum(part.sent is not None for part in bundle.engine_parts)
    layers: Counter[str] = Counter()
    for network in networks:
        layers.update(network["layers"])
    return {
        "engines": len(networks),
        "layers": dict(sorted(layers.items())),
        "self_attentions": len(own),
        "cross_attentions": len(attentions) - len(own),
        "decomposable_attentions": sum(a["decomposable"] for a in attentions),
        "self_attentions_with_lengths": sum(a["has_lengths"] for a in own),
        "cache_updates": sum(network["cache_updates"] for network in networks),
        "collectives_in_engine": len(collectives),
        "collectives_at_runtime": exchanges,
        "ranks_of_collectives": sorted({collective["ranks"] for collective in collectives}),
        "constants": check_constants(bundle, networks),
    }


def expected_constants(bundle: Bundle) -> dict[str, np.ndarray[Any, Any]]:
    """The tables that a step folds in, by name: rotary angles of the global time index, and the exchange's packing."""
    layout = bundle.layout
    tables = {name: table.numpy() for name, table in rope_tables(bundle.config, layout).constants().items()}
    if layout.world_size > 1:
        tables["scatter_index"] = layout.scatter_index().ravel()
        tables["gather_index"] = layout.gather_index()
    return tables


def check_constants(bundle: Bundle, networks: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each table its shape, type, size, and how many constants of the networks equal it, bit for bit."""
    digests = Counter(constant["sha256"] for network in networks for constant in network["constants"])
    return {
        name: {
            "shape": list(table.shape),
            "dtype": str(table.dtype),
            "bytes": table.nbytes,
            "equal_constants": digests[hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()],
        }
        for name, table in expected_constants(bundle).items()
    }


def _bytes_per_rank(bundle: Bundle, flavour: str, networks: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of one rank with one session; the activations are an estimate, which only a GPU can replace."""
    inputs = {entry["name"]: entry for network in networks.values() for entry in network["inputs"]}
    predicted = predict_memory(bundle.config, flavour)
    rows = bundle.config.slot_rows

    def total(*prefixes: str) -> int:
        named = [entry for name, entry in inputs.items() if name.startswith(prefixes)]
        shapes = [[rows if size < 0 else size for size in entry["shape"]] for entry in named]
        kinds = [DTYPE_BYTES[entry["dtype"]] for entry in named]
        return sum(size * int(np.prod(shape)) for size, shape in zip(kinds, shapes, strict=True))

    return {
        "weights_bytes": sum(network["weight_bytes"] for network in networks.values()),
        "constants_bytes": sum(c["bytes"] for network in networks.values() for c in network["constants"]),
        "kv_bytes": total("k.", "v."),
        "cross_kv_bytes": total("cross_k.", "cross_v."),
        "activation_bytes_estimated": predicted.activation_bytes,
    }


def inspect_on_gpu(bundle: Bundle, flavour: str, target: str, files: TargetEngines) -> dict[str, Any]:
    """The engine inspector's view of each engine, or why it cannot be had here."""
    if not torch.cuda.is_available():
        return {"unavailable": "an engine can be opened only on a GPU, and torch sees none here"}
    device = torch.device("cuda", 0)
    if device_target(device) != target:
        return {"unavailable": f"the engines are for {target}, and this GPU is {device_target(device)}"}
    try:
        loader = EngineLoader(FLAVOURS[flavour], device)
        return {name: loader.load(bundle.path / name).information() for name in files.engine_files}
    except ExecutorError as error:
        return {"unavailable": str(error)}
