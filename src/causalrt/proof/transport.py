"""What the exchanges have moved: block p of what rank r has received is, bit for bit, the block that rank p sent to it."""

from collections.abc import Sequence

import torch

from causalrt.proof.runners import forwards_at
from causalrt.proof.watch import StepId, Trace, exchange_name


def check_transport(tapes: Sequence[Trace], places: Sequence[StepId], *, num_layers: int) -> tuple[int, list[str]]:
    """Blocks looked at, and those that did not come from where they should, named."""
    blocks, faults = 0, []
    for place in places:
        outputs = [forward.outputs for forward in forwards_at(tapes, place)]
        for name in map(exchange_name, range(2 * num_layers)):
            at = f"chunk {place[0]} {place[1]}, {name}"
            if any(f"{name} sent" not in found for found in outputs):
                faults.append(f"{at}: there was no such exchange")
                continue
            for rank, found in enumerate(outputs):
                for source, sender in enumerate(outputs):
                    got = found[f"{name} received"][source]
                    blocks += 1
                    if not _same(got, sender[f"{name} sent"][rank]):
                        origin = _origin(got, [other[f"{name} sent"] for other in outputs])
                        faults.append(f"{at}: rank {rank} has {origin} in the place of what rank {source} sent it")
    return blocks, faults


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _origin(block: torch.Tensor, sent: Sequence[torch.Tensor]) -> str:
    """Where a block comes from."""
    for source, blocks in enumerate(sent):
        for destination, other in enumerate(blocks):
            if _same(block, other):
                return f"what rank {source} sent rank {destination}"
    return "something that no rank sent"
