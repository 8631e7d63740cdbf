"""`causalrt::all_to_all`: the exchange of equal blocks, as an op that marks where the step graph is cut.

The op cannot be executed. It appears only in traced graphs, where the lowering replaces it by a cut between segments or by
TensorRT's DistCollective; the eager executor never calls it.
"""

from typing import Any

import torch

ONNX_DOMAIN = "causalrt"
ONNX_OP = "AllToAll"


@torch.library.custom_op("causalrt::all_to_all", mutates_args=())
def all_to_all(blocks: torch.Tensor) -> torch.Tensor:
    """Send block p of `[P, rows, D]` to rank p; receive `[P, rows, D]`, block p from rank p."""
    raise NotImplementedError(
        "causalrt::all_to_all only marks a cut in a traced graph; run the graph through an executor"
    )


@all_to_all.register_fake
def _(blocks: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(blocks)


def onnx_all_to_all(op: Any, blocks: Any) -> Any:
    """ONNX form: an op of our own domain, which is replaced before the graph is executed."""
    return op.AllToAll(blocks)
