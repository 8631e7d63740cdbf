"""Describe a bundle: sizes, layout, graphs, engines, memory of a rank, and on request its compiled kernels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from causalrt.engines.bundle import Bundle, how_to_finish, open_bundle
from causalrt.model.wan.transformer import num_parameters
from causalrt.plugins.ptx import default_cache
from causalrt.progress import Progress
from causalrt.runtime.memory import decoder_memory, rank_memory
from causalrt.tools.inspect_engines import describe_engines
from causalrt.tools.inspect_kernels import describe_kernels, targets_from_names


def inspect_bundle(
    path: Path, *, kernels: Sequence[str] | None = None, on_progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Verify a bundle and describe it in plain JSON types.

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
    layout, config = bundle.layout, bundle.config
    found = {
        "path": str(bundle.path),
        "executors": list(bundle.executors),
        "plugins": "on" if bundle.fused_ops else "off",
        "vae": None if bundle.vae is None else bundle.vae.to_mapping(),
        "config": config.as_dict(),
        "parameters": num_parameters(config.model),
        "layout": {
            "tokens_per_chunk": layout.num_tokens,
            "local_tokens": layout.local_tokens,
            "kv_heads": layout.kv_heads,
            "rows_scattered_to_each_rank": layout.scatter_rows,
            "rows_gathered_to_each_rank": layout.gather_rows,
            "balanced": [asdict(shard) for shard in layout.shards],
        },
        "bytes_per_rank": {name: asdict(rank_memory(bundle, name)) for name in bundle.executors},
        "decoder_bytes": {name: asdict(decoder_memory(bundle, name)) for name in bundle.executors if bundle.vae},
        "graphs": _describe_graphs(bundle),
        "engines": describe_engines(bundle),
        "unfinished": {
            name: {"targets": list(bundle.engines[name].wanted), "to_do": how_to_finish(bundle.path)}
            for name in bundle.unfinished
        },
        "toolchain": dict(bundle.toolchain),
        "files": {file.name: file.stat().st_size for file in sorted(bundle.path.iterdir())},
    }
    if targets is not None:
        found["kernels"] = describe_kernels(config, targets=targets, cache=default_cache(), on_progress=on_progress)
    return found


def _describe_graphs(bundle: Bundle) -> list[dict[str, Any]]:
    described = []
    for part in bundle.steps[0].segments:
        model = onnx.load(bundle.path / part.file, load_external_data=False)
        ops = Counter(node.op_type for node in model.graph.node)
        described.append({"file": part.file, "exchange_after": part.sent is not None, "ops": dict(sorted(ops.items()))})
    return described
