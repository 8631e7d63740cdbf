"""What a build wrote of an engine's network (`export/engine_network.describe_network`), as types, checked when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from causalrt.engines.step_record import expect

DTYPE_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """An input of a network; a dynamic size is -1."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRecord:
    """An attention: where its keys come from, whether it may be decomposed, whether it was given their number."""

    key_source: str
    decomposable: bool
    has_lengths: bool


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
    )


def _counts(plain: Any, at: str) -> dict[str, int]:
    return {name: expect(int, count, at) for name, count in expect(dict, plain, at).items()}


def _parse_tensor(plain: Mapping[str, Any], at: str) -> TensorRecord:
    shape = tuple(expect(int, size, at) for size in expect(list, plain.get("shape"), at))
    dtype = expect(str, plain.get("dtype"), at)
    if dtype not in DTYPE_BYTES:
        raise TypeError(f"{at}: type {dtype!r} is not known")
    return TensorRecord(name=expect(str, plain.get("name"), at), shape=shape, dtype=dtype)
