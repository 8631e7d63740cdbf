"""Describe the TensorRT engines of a bundle from the networks that they were built from, and, on a GPU, by the inspector."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from causalrt.engines.bundle import Bundle
from causalrt.engines.network_record import NetworkRecord, read_networks, working_bytes
from causalrt.engines.step_record import TargetEngines
from causalrt.engines.tensorrt_engine import EngineLoader
from causalrt.engines.tensorrt_flavour import FLAVOURS, device_target
from causalrt.errors import ExecutorError
from causalrt.layout import layouts_from_config
from causalrt.model.wan.conditioning import is_prompt_name
from causalrt.model.wan.relative_rope import RelativeRope
from causalrt.model.wan.rope import rope_tables
from causalrt.runtime.memory import predict_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """The engines of one kind of step together: counts of layers, attentions and exchanges, and `check_constants`."""

    frames: int
    engines: int
    layers: Mapping[str, int]
    self_attentions: int
    cross_attentions: int
    decomposable_attentions: int
    self_attentions_with_lengths: int
    cache_updates: int
    plugins: Mapping[str, int]
    collectives_in_engine: int
    collectives_at_runtime: int
    ranks_of_collectives: Sequence[int]
    constants: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """Size and digest of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """The engines of a bundle for one flavour of TensorRT and one target; `inspector` may be `unavailable` with a reason."""

    flavour: str
    target: str
    collectives: str
    frontend: str
    version: str
    files: Mapping[str, EngineFile]
    steps: Sequence[StepReport]
    bytes_per_rank: Mapping[str, int]
    builder_memory: Mapping[str, int] | None
    inspector: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def describe_engines(bundle: Bundle) -> list[EngineReport]:
    """Describe the engines of every flavour and target of a bundle.

    Raises:
        BundleError: the file that describes the engines is not one that a build writes.
    """
    return [
        _describe(bundle, flavour, target, files)
        for flavour, record in bundle.engines.items()
        for target, files in record.targets.items()
    ]


def _describe(bundle: Bundle, flavour: str, target: str, files: TargetEngines) -> EngineReport:
    networks, record = read_networks(bundle, files), bundle.engines[flavour]
    return EngineReport(
        flavour=flavour,
        target=target,
        collectives=record.collectives,
        frontend=record.frontend,
        version=files.version,
        files={
            name: EngineFile(bytes=(bundle.path / name).stat().st_size, sha256=bundle.hashes[name])
            for name in files.engine_files
        },
        steps=[
            describe_step(bundle, step, [networks[name] for name in names]) for step, names in enumerate(files.steps)
        ],
        bytes_per_rank=_bytes_per_rank(bundle, flavour, files, networks),
        builder_memory=_builder_memory(networks.values()),
        inspector=inspect_on_gpu(bundle, flavour, target, files),
    )


def describe_step(bundle: Bundle, step: int, networks: list[NetworkRecord]) -> StepReport:
    """Describe the engines of one kind of step together."""
    attentions = [attention for network in networks for attention in network.attentions]
    own = [attention for attention in attentions if not is_prompt_name(attention.key_source)]
    ranks = [collective.ranks for network in networks for collective in network.collectives]
    layers, plugins = Counter[str](), Counter[str]()
    for network in networks:
        layers.update(network.layers)
        plugins.update(network.plugins)
    return StepReport(
        frames=bundle.config.video.step_frames[step],
        engines=len(networks),
        layers=dict(sorted(layers.items())),
        self_attentions=len(own),
        cross_attentions=len(attentions) - len(own),
        decomposable_attentions=sum(attention.decomposable for attention in attentions),
        self_attentions_with_lengths=sum(attention.has_lengths for attention in own),
        cache_updates=sum(network.cache_updates for network in networks),
        plugins=dict(sorted(plugins.items())),
        collectives_in_engine=len(ranks),
        collectives_at_runtime=sum(part.sent is not None for part in bundle.steps[step].tensorrt),
        ranks_of_collectives=sorted(set(ranks)),
        constants=check_constants(bundle, step, networks),
    )


def expected_constants(bundle: Bundle, step: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """The constant tables of a step, by name: rotary angles of the global time index, and the exchange's packing."""
    layout, config = layouts_from_config(bundle.config)[step], bundle.config
    if config.video.time_index == "relative" and config.slot_rows == config.tokens_per_chunk:
        # A step that has only staging uses no table that depends on `first_frame`, so the exporter evaluates the lookup once.
        slots = RelativeRope(config)(torch.zeros(1, dtype=torch.int64))
        rotary = dict(zip(("slot_cos", "slot_sin"), slots, strict=True))
    elif config.video.time_index == "relative":
        rotary = {name: table for name, table in RelativeRope(config).named_buffers() if table.is_floating_point()}
    else:
        rotary = dict(rope_tables(config, layout).constants())
    tables = {name: table.numpy() for name, table in rotary.items()}
    if bundle.fused_ops:
        tables["scatter_destinations"] = layout.scatter_destinations()
    elif layout.world_size > 1:
        tables["scatter_index"] = layout.scatter_index().ravel()
    if layout.world_size > 1:
        tables["gather_index"] = layout.gather_index()
    return tables


def check_constants(bundle: Bundle, step: int, networks: list[NetworkRecord]) -> dict[str, dict[str, Any]]:
    """For each table its shape, type, size, and how many constants of the networks equal it, bit for bit."""
    digests = Counter(constant.sha256 for network in networks for constant in network.constants)
    return {
        name: {
            "shape": list(table.shape),
            "dtype": str(table.dtype),
            "bytes": table.nbytes,
            "equal_constants": digests[hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()],
        }
        for name, table in expected_constants(bundle, step).items()
    }


def _builder_memory(networks: Collection[NetworkRecord]) -> dict[str, int] | None:
    """Memory of all engines by TensorRT's builder, which share activations and scratch; None if it did not report any."""
    reported = [asdict(network.memory) for network in networks if network.memory is not None]
    if len(reported) < len(networks):
        return None
    shared = ("activation_bytes", "scratch_bytes")
    return {name: (max if name in shared else sum)(memory[name] for memory in reported) for name in reported[0]}


def _bytes_per_rank(
    bundle: Bundle, flavour: str, files: TargetEngines, networks: Mapping[str, NetworkRecord]
) -> dict[str, int]:
    """Bytes of one rank with one session; the activations are an estimate if the builder did not report them."""
    # Step 0 is bound to as much of the slots as any other step, or to more.
    sessions = [networks[name] for name in (files.prompt, files.time, *files.steps[0])]
    inputs = {entry.name: entry for network in sessions for entry in network.inputs}
    rows = bundle.config.slot_rows

    def total(belongs: Callable[[str], bool]) -> int:
        return sum(entry.num_bytes(dynamic_size=rows) for name, entry in inputs.items() if belongs(name))

    working = working_bytes(networks, files, bundle)
    activations = (
        {"activation_bytes_estimated": predict_memory(bundle.config, flavour).activation_bytes}
        if working is None
        else {"activation_bytes": working}
    )
    return {
        "weights_bytes": sum(network.weight_bytes for network in networks.values()),
        "constants_bytes": sum(network.constant_bytes for network in networks.values()),
        "kv_bytes": total(lambda name: name.startswith(("k.", "v."))),
        "cross_kv_bytes": total(is_prompt_name),
        **activations,
    }


def inspect_on_gpu(bundle: Bundle, flavour: str, target: str, files: TargetEngines) -> dict[str, Any]:
    """What TensorRT's inspector reports about each engine, or why it is unavailable on this machine."""
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
