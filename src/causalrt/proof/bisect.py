"""The first layer at which a side leaves eager, told from the residual stream."""

from collections.abc import Sequence
from typing import Any

import torch

from causalrt.layout import Layout
from causalrt.proof.errors import Comparison, TensorError, tensor_error
from causalrt.proof.runners import forwards_at
from causalrt.proof.segments import describe
from causalrt.proof.watch import StepId, Trace, residual_name


def bisect_eager(
    reference: Sequence[Trace], tapes: Sequence[Trace], places: Sequence[StepId], layout: Layout, *, tolerance: float
) -> dict[str, Any] | None:
    """Where eager on P ranks leaves eager on one, forward by forward; None if it does not."""
    for place in places:
        (one,), every = forwards_at(reference, place), forwards_at(tapes, place)
        for number, expected in enumerate(one.residuals):
            got = torch.cat([forward.residuals[number] for forward in every])[: len(expected)]
            error = tensor_error(residual_name(number), expected, got, tolerance=tolerance)
            if not error:
                local = every[0].residuals[number].shape[0]
                return _found(error, place, rank=error.index[0] // local if error.index else 0)
        got = torch.cat([forward.outputs["flow"] for forward in every])[: len(one.outputs["flow"])]
        error = tensor_error("flow", one.outputs["flow"], got, tolerance=tolerance)
        if not error:
            return _found(error, place, rank=error.index[0] // layout.local_tokens if error.index else 0)
    return None


def _found(error: TensorError, place: StepId, *, rank: int) -> dict[str, Any]:
    return {
        "chunk": place[0],
        "forward": place[1],
        "rank": rank,
        "segment": "eager on several ranks",
        "value": error.name,
        "part": describe(error.name),
        "made_by": "what comes after the last residual value that agrees with one rank's",
        "operations": [],
        "agreed_before": [],
    }


def bisect_step(comparison: Comparison) -> dict[str, Any] | None:
    """The first exchange or slot of a chunk step that leaves eager, where segments by themselves do not."""
    wrong = comparison.first_wrong
    if wrong is None:
        return None
    value = str(wrong.where["value"])
    if value.startswith(("k.", "v.")):
        kind, layer, shard = value.split(".")
        value = f"layer {layer} KV slots {kind} of shard {shard}"
    return {
        **wrong.where,
        "segment": "the executor as it runs",
        "part": describe(value),
        "made_by": "what the executor does around its graphs",
        "operations": [],
        "agreed_before": [],
    }
