"""What is in a bundle: sizes, layout, graphs, engines, bytes a rank."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.model.wan import num_parameters
from causalrt.runtime.memory import predict_memory
from causalrt.tools.inspect_engines import describe_engines


def inspect_bundle(path: Path) -> dict[str, Any]:
    """Verify a bundle and describe it, in plain JSON types.

    Raises:
        BundleError: it is damaged.
    """
    bundle = open_bundle(path)
    layout, config = bundle.layout, bundle.config
    return {
        "path": str(bundle.path),
        "executors": list(bundle.executors),
        "config": config.as_dict(),
        "parameters": num_parameters(config.model),
        "layout": {
            "tokens_per_chunk": layout.num_tokens,
            "local_tokens": layout.local_tokens,
            "kv_heads": layout.kv_heads,
            "rows_scattered_to_each_rank": layout.scatter_rows,
            "rows_gathered_to_each_rank": layout.gather_rows,
            "shares": [asdict(share) for share in layout.shares],
        },
        "bytes_per_rank": {name: asdict(predict_memory(config, name)) for name in bundle.executors},
        "graphs": _describe_graphs(bundle),
        "engines": describe_engines(bundle),
        "toolchain": dict(bundle.toolchain),
        "files": {file.name: file.stat().st_size for file in sorted(bundle.path.iterdir())},
    }


def _describe_graphs(bundle: Bundle) -> list[dict[str, Any]]:
    described = []
    for part in bundle.segments:
        model = onnx.load(bundle.path / part.file, load_external_data=False)
        ops = Counter(node.op_type for node in model.graph.node)
        described.append({"file": part.file, "exchange_after": part.sent is not None, "ops": dict(sorted(ops.items()))})
    return described
