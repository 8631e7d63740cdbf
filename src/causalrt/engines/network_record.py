"""What a build wrote of an engine's network (`export/engine_network.describe_network`), as types, checked when it is read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from causalrt.engines.bundle import REBUILD, Bundle
from causalrt.engines.step_record import StepPart, TargetEngines, expect
from causalrt.engines.tensor_names import is_callers
from causalrt.errors import BundleError

DTYPE_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4}
MEMORY_LINES = {
    "Total Activation Memory": "activation_bytes",
    "Max Scratch Memory": "scratch_bytes",
    "Total Weights Memory": "weights_bytes",
    "Total Device Persistent Memory": "device_persistent_bytes",
    "Total Host Persistent Memory": "host_persistent_bytes",
}
"""INFO lines of TensorRT's builder that say how much memory an engine takes -> fields of `EngineMemory`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """An input or output of a network; a dynamic size is -1."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def num_bytes(self, *, dynamic_size: int) -> int:
        """Size of the tensor in memory where each dynamic size is `dynamic_size`."""
        return DTYPE_BYTES[self.dtype] * math.prod(dynamic_size if size < 0 else size for size in self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRecord:
    """An attention: where its keys come from, whether it may be decomposed, whether it was given their number."""

    key_source: str
    decomposable: bool
    has_lengths: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """What TensorRT's builder said of an engine's memory, in bytes.

    Attributes:
        activation_bytes: device memory of one inference beside its inputs and outputs; the executor provides it once for
            all engines.
        scratch_bytes: the part of it that the hungriest layer works in.
        weights_bytes: weights in device memory.
        device_persistent_bytes: what each execution context holds in device memory.
        host_persistent_bytes: likewise in host memory.
    """

    activation_bytes: int
    scratch_bytes: int
    weights_bytes: int
    device_persistent_bytes: int
    host_persistent_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRecord:
    """What is in a network.

    Attributes:
        layers: number by kind.
        attentions: each of them.
        collective_ranks: ranks of each collective.
        constant_digests: sha256 of each constant that is no weight.
        constant_bytes: of these together.
        weight_bytes: of the weights.
        cache_updates: in-place writes of KV slots.
        plugins: number by name.
        inputs: each of them.
        outputs: each of them.
        memory: of the engine; None if its builder did not say.
    """

    layers: Mapping[str, int]
    attentions: tuple[AttentionRecord, ...]
    collective_ranks: tuple[int, ...]
    constant_digests: tuple[str, ...]
    constant_bytes: int
    weight_bytes: int
    cache_updates: int
    plugins: Mapping[str, int]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    memory: EngineMemory | None


def read_networks(bundle: Bundle, files: TargetEngines) -> dict[str, NetworkRecord]:
    """What the build wrote of the network of each of the transformer's engines, by engine file.

    Raises:
        BundleError: the file is not one that a build writes.
    """
    path = bundle.path / files.networks
    try:
        networks = expect(dict, json.loads(path.read_text()), files.networks)
        return {name: parse_network(networks.get(name), name) for name in files.engine_files}
    except (ValueError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} does not say what is in the engines: {error}; {REBUILD}") from error


def working_bytes(networks: Mapping[str, NetworkRecord], files: TargetEngines, bundle: Bundle) -> int | None:
    """Device memory that the executor holds beside weights and sessions: scratch, and the buffers of each kind of step.

    None if the builder did not say what one of the engines takes.
    """
    memories = [network.memory for network in networks.values()]
    told = [memory for memory in memories if memory is not None]
    if len(told) < len(memories):
        return None
    buffers = sum(
        _buffer_bytes([networks[name] for name in names], step.tensorrt)
        for names, step in zip(files.steps, bundle.steps, strict=True)
    )
    scratch = max(memory.activation_bytes for memory in told)
    return scratch + sum(memory.device_persistent_bytes for memory in told) + buffers


def _buffer_bytes(step: Sequence[NetworkRecord], parts: Sequence[StepPart]) -> int:
    """Bytes of the tensors of a step that are not the session's; each is allocated once, whoever writes or reads it."""
    callers = {written for part in parts for written in part.writes}
    tensors = {tensor.name: tensor for network in step for tensor in (*network.inputs, *network.outputs)}
    own = [tensor for name, tensor in tensors.items() if not is_callers(name) and name not in callers]
    return sum(tensor.num_bytes(dynamic_size=0) for tensor in own)


def parse_network(plain: Any, at: str) -> NetworkRecord:
    """The record of one engine's network.

    Raises:
        TypeError: something is missing or of a wrong type.
    """
    expect(dict, plain, at)

    def entries(key: str) -> list[Mapping[str, Any]]:
        return [expect(dict, entry, f"{at}.{key}") for entry in expect(list, plain.get(key), f"{at}.{key}")]

    constants = entries("constants")
    return NetworkRecord(
        layers=_counts(plain.get("layers"), f"{at}.layers"),
        attentions=tuple(
            AttentionRecord(
                key_source=expect(str, entry.get("key_source"), f"{at}.attentions"),
                decomposable=expect(bool, entry.get("decomposable"), f"{at}.attentions"),
                has_lengths=expect(bool, entry.get("has_lengths"), f"{at}.attentions"),
            )
            for entry in entries("attentions")
        ),
        collective_ranks=tuple(
            expect(int, entry.get("ranks"), f"{at}.collectives") for entry in entries("collectives")
        ),
        constant_digests=tuple(expect(str, entry.get("sha256"), f"{at}.constants") for entry in constants),
        constant_bytes=sum(expect(int, entry.get("bytes"), f"{at}.constants") for entry in constants),
        weight_bytes=expect(int, plain.get("weight_bytes"), f"{at}.weight_bytes"),
        cache_updates=expect(int, plain.get("cache_updates"), f"{at}.cache_updates"),
        plugins=_counts(plain.get("plugins"), f"{at}.plugins"),
        inputs=tuple(_parse_tensor(entry, f"{at}.inputs") for entry in entries("inputs")),
        outputs=tuple(_parse_tensor(entry, f"{at}.outputs") for entry in entries("outputs")),
        memory=_parse_memory(plain.get("memory"), f"{at}.memory"),
    )


def _parse_memory(plain: Any, at: str) -> EngineMemory | None:
    if plain is None:
        return None
    counts = _counts(plain, at)
    names = [field.name for field in fields(EngineMemory)]
    return EngineMemory(**{name: expect(int, counts.get(name), f"{at}.{name}") for name in names})


def _counts(plain: Any, at: str) -> dict[str, int]:
    return {name: expect(int, count, at) for name, count in expect(dict, plain, at).items()}


def _parse_tensor(plain: Mapping[str, Any], at: str) -> TensorRecord:
    shape = tuple(expect(int, size, at) for size in expect(list, plain.get("shape"), at))
    dtype = expect(str, plain.get("dtype"), at)
    if dtype not in DTYPE_BYTES:
        raise TypeError(f"{at}: type {dtype!r} is not known")
    return TensorRecord(name=expect(str, plain.get("name"), at), shape=shape, dtype=dtype)
