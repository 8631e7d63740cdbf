"""A self-test of the exchange: each rank sends rows that encode where they come from and where they belong.

    element (row, channel) of the block from rank s to rank d   =   ((s * P + d) * rows + row) * D + channel

A low precision cannot hold that number, so it is sent digit by digit, in one exchange each: a digit below 128 is exact in every
type that a bundle computes in. The digits that arrive are combined and compared with the expected number. Where they differ,
they still tell which rank sent the row to which.
"""

import math
from dataclasses import dataclass

import torch

from causalrt.config import Config
from causalrt.layout import layouts_from_config
from causalrt.runtime.collectives import CountingCollectives

BASE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeCheck:
    """The result of one rank for one kind of exchange.

    Attributes:
        rank: the rank that received.
        name: `scatter_heads` or `gather_heads`, with the step's frames if it is not step 0.
        rows: rows of each block.
        fault: description of the first row that arrived in a wrong place; empty if there is none.
    """

    rank: int
    name: str
    rows: int
    fault: str


def check_exchanges(
    collectives: CountingCollectives, config: Config, *, dtype: torch.dtype, device: torch.device
) -> tuple[ExchangeCheck, ...]:
    """Test every kind of exchange of a step. Collective: every rank calls it, between chunks."""
    checks = []
    for step, layout in enumerate(layouts_from_config(config)):
        if layout.world_size == 1:
            continue
        suffix = f" of a {config.video.step_frames[step]}-frame step" if step else ""
        for name, rows in (("scatter_heads", layout.scatter_rows), ("gather_heads", layout.gather_rows)):
            shape = (layout.world_size, rows, config.model.head_dim)
            fault = _exchange(collectives, shape, dtype=dtype, device=device)
            checks.append(ExchangeCheck(rank=collectives.rank, name=name + suffix, rows=rows, fault=fault))
    collectives.take_traffic()
    return tuple(checks)


def _exchange(
    collectives: CountingCollectives, shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device
) -> str:
    """Exchange all digits; a description of the first wrong value, or an empty text."""
    world_size, rows, dim = shape
    own, block = torch.tensor(collectives.rank), torch.arange(rows * dim).view(rows, dim)
    others = torch.arange(world_size)[:, None, None]
    to_others = (own * world_size + others) * rows * dim + block
    from_others = (others * world_size + own) * rows * dim + block
    arrived = torch.zeros(shape, dtype=torch.float64)
    for digit in range(math.ceil(math.log(world_size**2 * rows * dim, BASE))):
        sent = (to_others // BASE**digit % BASE).to(device, dtype)
        received = torch.full_like(sent, torch.nan)
        collectives.all_to_all(received, sent)
        arrived += received.double().cpu() * BASE**digit
    wrong = (arrived != from_others).nonzero()
    if not len(wrong):
        return ""
    source, row, channel = wrong[0].tolist()
    return (
        f"rank {collectives.rank} expected row {row}, channel {channel} of what rank {source} sends it, and got "
        f"{_origin(float(arrived[source, row, channel]), shape)} ({len(wrong):,} of {arrived.numel():,} values are wrong)"
    )


def _origin(value: float, shape: tuple[int, int, int]) -> str:
    """Describe where a value was sent from."""
    world_size, rows, dim = shape
    if not 0 <= value < world_size**2 * rows * dim or value != int(value):
        return f"{value}, which no rank has sent"
    pair, place = divmod(int(value), rows * dim)
    source, destination = divmod(pair, world_size)
    row, channel = divmod(place, dim)
    return f"row {row}, channel {channel} of what rank {source} sends rank {destination}"
