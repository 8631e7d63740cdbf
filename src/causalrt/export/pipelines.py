"""The pass pipelines of all lowerings, in execution order.

| pipeline | applied to | numerics-preserving | numerics-changing |
|---|---|---|---|
| `SHARE_WEIGHTS` | every translated graph (`onnx_ir`) | `share_weights_pass` | |
| `ONNXRUNTIME_FLOAT32` | a step for ONNX Runtime in float32, before it is cut | | `fuse_attention_pass` |
| `STANDARD_OPS` | a step whose fused ops do not become plugins | `expand_functions_pass` | |
| `TENSORRT_SEGMENTS` | a step for TensorRT, before it is cut | `split_single_heads_pass` | `scale_queries_pass` |
| `TENSORRT_ENGINE` | a step in one engine | `split_single_heads_pass`, `lower_exchanges_pass` | `scale_queries_pass` |
| `TENSORRT_PLUGINS` | a saved part of a step with fused ops, on the GPU that it is built for | | `use_plugins_pass` |

Every pass has the signature `(graph, PassContext) -> hits`, modifies the graph in place and returns the number of places that
it changed. Passes that preserve numerics leave every value bit-identical; the others change the order or the rounding of
sums. Cutting a step into segments (`segment.py`) comes last and is not a pass, because it turns one graph into several.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from causalrt.export.dist_collective import lower_exchanges_pass
from causalrt.export.fuse_attention import fuse_attention_pass
from causalrt.export.passes import PassContext
from causalrt.export.plugin_functions import expand_functions_pass
from causalrt.export.plugin_nodes import use_plugins_pass
from causalrt.export.scale_queries import scale_queries_pass
from causalrt.export.share_weights import share_weights_pass
from causalrt.export.split_single_heads import split_single_heads_pass

logger = logging.getLogger(__name__)

Pass = Callable[[Any, PassContext], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """The passes of one lowering; those that preserve numerics run first."""

    preserving: tuple[Pass, ...] = ()
    changing: tuple[Pass, ...] = ()


SHARE_WEIGHTS = Pipeline(preserving=(share_weights_pass,))
ONNXRUNTIME_FLOAT32 = Pipeline(changing=(fuse_attention_pass,))
STANDARD_OPS = Pipeline(preserving=(expand_functions_pass,))
TENSORRT_SEGMENTS = Pipeline(preserving=(split_single_heads_pass,), changing=(scale_queries_pass,))
TENSORRT_ENGINE = Pipeline(preserving=(split_single_heads_pass, lower_exchanges_pass), changing=(scale_queries_pass,))
TENSORRT_PLUGINS = Pipeline(changing=(use_plugins_pass,))


def apply(pipeline: Pipeline, model: Any, context: PassContext) -> None:
    """Run all passes of a pipeline over `model`, in place, and log the number of hits of each.

    Raises:
        RuntimeError: a pass did not have the number of hits required for this graph.
        BuildError: a fused node has no plugin, or does not match the declaration of its plugin.
    """
    for run in (*pipeline.preserving, *pipeline.changing):
        due = _hits_due(run, model, context)
        hits = run(model, context)
        logger.debug("%s: %d hits", run.__name__, hits)
        if hits not in due:
            wanted = f"{due.start} at least" if len(due) > 1 else str(due.start)
            raise RuntimeError(
                f"{run.__name__} had {hits} hits and must have {wanted}: the traced graph does not have the form that this "
                "pass looks for; install the versions of torch and onnxscript that CausalRT names, or report it"
            )


def _hits_due(run: Pass, model: Any, context: PassContext) -> range:
    layers, shards = context.num_layers, context.num_shards
    if run is fuse_attention_pass:  # one function holds the self-attention of all layers
        return _exactly(layers + shards * (1 if model.functions else layers))
    if run is scale_queries_pass:
        return _exactly(layers * (1 if context.plugins else 1 + shards))
    if run is lower_exchanges_pass:
        return _exactly(2 * layers if context.world_size > 1 else 0)
    return range(1 if run in (share_weights_pass, use_plugins_pass) else 0, sys.maxsize)


def _exactly(hits: int) -> range:
    return range(hits, hits + 1)
