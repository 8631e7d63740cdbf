"""Describe a bundle: sizes, layout, graphs, engines, memory of a rank, and on request its compiled kernels."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from causalrt.engines.bundle import Bundle, how_to_finish, open_bundle
from causalrt.model.wan.transformer import num_parameters
from causalrt.plugins.ptx import default_cache
from causalrt.progress import Progress
from causalrt.runtime.memory import decoder_memory, rank_memory
from causalrt.tools.inspect_engines import EngineReport, describe_engines
from causalrt.tools.inspect_kernels import KernelReport, describe_kernels, targets_from_names


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphReport:
    """A segment of a step for ONNX Runtime: its file, whether an exchange follows, and the number of ops by type."""

    file: str
    exchange_after: bool
    ops: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleReport:
    """What a bundle contains.

    Attributes:
        bundle: the bundle.
        parameters: number of parameters of the transformer.
        bytes_per_rank: predicted memory of a rank, by executor.
        decoder_bytes: predicted memory of the decoder, by executor.
        graphs: the graphs of a step for ONNX Runtime.
        engines: the engines of TensorRT.
        kernels: the compiled kernels, or None if they were not requested.
    """

    bundle: Bundle
    parameters: int
    bytes_per_rank: Mapping[str, Mapping[str, int]]
    decoder_bytes: Mapping[str, Mapping[str, int]]
    graphs: Sequence[GraphReport]
    engines: Sequence[EngineReport]
    kernels: Sequence[KernelReport] | None

    @property
    def has_all_constants(self) -> bool:
        """Whether every table that a step must contain is a constant of its engines."""
        steps = [step for engines in self.engines for step in engines.steps]
        return all(table["equal_constants"] for step in steps for table in step.constants.values())

    @property
    def layout(self) -> dict[str, int]:
        """Sizes of the sequence-parallel layout."""
        layout = self.bundle.layout
        return {
            "tokens_per_chunk": layout.num_tokens,
            "local_tokens": layout.local_tokens,
            "kv_heads": layout.kv_heads,
            "rows_scattered_to_each_rank": layout.scatter_rows,
            "rows_gathered_to_each_rank": layout.gather_rows,
        }

    @property
    def files(self) -> dict[str, int]:
        """Bytes of each file."""
        return {file.name: file.stat().st_size for file in sorted(self.bundle.path.iterdir())}

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        bundle = self.bundle
        found: dict[str, Any] = {
            "path": str(bundle.path),
            "executors": list(bundle.executors),
            "plugins": "on" if bundle.fused_ops else "off",
            "vae": None if bundle.vae is None else bundle.vae.to_mapping(),
            "config": bundle.config.as_dict(),
            "parameters": self.parameters,
            "layout": {**self.layout, "balanced": [asdict(shard) for shard in bundle.layout.shards]},
            "bytes_per_rank": self.bytes_per_rank,
            "decoder_bytes": self.decoder_bytes,
            "graphs": [asdict(graph) for graph in self.graphs],
            "engines": [engines.as_dict() for engines in self.engines],
            "unfinished": {
                name: {"targets": list(bundle.engines[name].wanted), "to_do": how_to_finish(bundle.path)}
                for name in bundle.unfinished
            },
            "toolchain": dict(bundle.toolchain),
            "files": self.files,
        }
        if self.kernels is not None:
            found["kernels"] = [kernel.as_dict() for kernel in self.kernels]
        return found


def inspect_bundle(
    path: Path, *, kernels: Sequence[str] | None = None, on_progress: Progress = lambda *_: None
) -> BundleReport:
    """Verify a bundle and describe it.

    Args:
        path: folder of the bundle.
        kernels: targets such as `sm80` to compile the fused kernels for; an empty sequence is all, and None leaves kernels out.
        on_progress: called if kernels must be compiled.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: a target is unknown.
        KernelError: kernels are requested, and Triton is not installed.
    """
    targets = None if kernels is None else targets_from_names(kernels)
    bundle = open_bundle(path)
    return BundleReport(
        bundle=bundle,
        parameters=num_parameters(bundle.config.model),
        bytes_per_rank={name: asdict(rank_memory(bundle, name)) for name in bundle.executors},
        decoder_bytes={name: asdict(decoder_memory(bundle, name)) for name in bundle.executors if bundle.vae},
        graphs=_describe_graphs(bundle),
        engines=describe_engines(bundle),
        kernels=None
        if targets is None
        else describe_kernels(bundle.config, targets=targets, cache=default_cache(), on_progress=on_progress),
    )


def _describe_graphs(bundle: Bundle) -> list[GraphReport]:
    described = []
    for part in bundle.steps[0].segments:
        model = onnx.load(bundle.path / part.file, load_external_data=False)
        ops = Counter(node.op_type for node in model.graph.node)
        described.append(
            GraphReport(file=part.file, exchange_after=part.sent is not None, ops=dict(sorted(ops.items())))
        )
    return described
