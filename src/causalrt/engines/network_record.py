"""Records of the networks that engines were built from (`export/engine_network.describe_network`), checked when read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from causalrt.engines.bundle import REBUILD, Bundle
from causalrt.engines.step_record import StepPart, TargetEngines
from causalrt.engines.tensor_names import is_callers
from causalrt.errors import BundleError
from causalrt.plain import from_plain

DTYPE_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4}
MEMORY_LINES = {
    "Total Activation Memory": "activation_bytes",
    "Max Scratch Memory": "scratch_bytes",
    "Total Weights Memory": "weights_bytes",
    "Total Device Persistent Memory": "device_persistent_bytes",
    "Total Host Persistent Memory": "host_persistent_bytes",
}
"""INFO lines of TensorRT's builder about the memory that an engine takes -> fields of `EngineMemory`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """An input or output of a network; a dynamic size is -1."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["FLOAT", "HALF", "BF16", "INT64", "INT32"]

    def num_bytes(self, *, dynamic_size: int) -> int:
        """Size of the tensor in memory where each dynamic size is `dynamic_size`."""
        return DTYPE_BYTES[self.dtype] * math.prod(dynamic_size if size < 0 else size for size in self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRecord:
    """An attention: where its keys come from, whether TensorRT may decompose it, and whether it takes their number as input."""

    key_source: str
    decomposable: bool
    has_lengths: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """Bytes that an engine takes, as TensorRT's builder reported them.

    Attributes:
        activation_bytes: device memory of one inference beside its inputs and outputs, which the executor allocates once for
            all engines.
        scratch_bytes: the part of it that is the work space of the largest layer.
        weights_bytes: weights in device memory.
        device_persistent_bytes: what each execution context holds in device memory.
        host_persistent_bytes: what each execution context holds in host memory.
    """

    activation_bytes: int
    scratch_bytes: int
    weights_bytes: int
    device_persistent_bytes: int
    host_persistent_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveRecord:
    """A collective of a network, and how many ranks take part in it."""

    ranks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantRecord:
    """A constant of a network that is not a weight."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRecord:
    """The contents of a network.

    Attributes:
        layers: number of layers by kind.
        attentions: each of them.
        collectives: each of them.
        constants: those that are not weights.
        weight_bytes: bytes of the weights.
        cache_updates: in-place writes of KV slots.
        plugins: number of plugins by name.
        inputs: each of them.
        outputs: each of them.
        memory: memory of the engine; None if its builder did not report it.
    """

    layers: Mapping[str, int]
    attentions: tuple[AttentionRecord, ...]
    collectives: tuple[CollectiveRecord, ...]
    constants: tuple[ConstantRecord, ...]
    weight_bytes: int
    cache_updates: int
    plugins: Mapping[str, int]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    memory: EngineMemory | None = None

    @property
    def constant_bytes(self) -> int:
        """Bytes of all constants together."""
        return sum(constant.bytes for constant in self.constants)


def read_networks(bundle: Bundle, files: TargetEngines) -> dict[str, NetworkRecord]:
    """Read the record of each of the transformer's engines, by engine file.

    Raises:
        BundleError: the file is not one that a build writes.
    """
    path = bundle.path / files.networks
    try:
        networks = from_plain(Mapping[str, Any], json.loads(path.read_text()), files.networks)
        return {name: from_plain(NetworkRecord, networks.get(name), name) for name in files.engine_files}
    except (ValueError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is not a record of the engines: {error}; {REBUILD}") from error


def working_bytes(networks: Mapping[str, NetworkRecord], files: TargetEngines, bundle: Bundle) -> int | None:
    """Device memory that the executor holds beside weights and sessions: scratch, and the buffers of each kind of step.

    None if the builder did not report the memory of one of the engines.
    """
    memories = [network.memory for network in networks.values()]
    known = [memory for memory in memories if memory is not None]
    if len(known) < len(memories):
        return None
    buffers = sum(
        _buffer_bytes([networks[name] for name in names], step.tensorrt)
        for names, step in zip(files.steps, bundle.steps, strict=True)
    )
    scratch = max(memory.activation_bytes for memory in known)
    return scratch + sum(memory.device_persistent_bytes for memory in known) + buffers


def _buffer_bytes(step: Sequence[NetworkRecord], parts: Sequence[StepPart]) -> int:
    """Bytes of a step's tensors that are not the session's; each is allocated once, however many engines use it."""
    callers = {written for part in parts for written in part.writes}
    tensors = {tensor.name: tensor for network in step for tensor in (*network.inputs, *network.outputs)}
    own = [tensor for name, tensor in tensors.items() if not is_callers(name) and name not in callers]
    return sum(tensor.num_bytes(dynamic_size=0) for tensor in own)
