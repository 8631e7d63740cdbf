"""Operands of `qk_norm_rope` on random layouts, and what it must give, in float64."""

import math
from typing import NamedTuple

import torch

from causalrt.layout import Layout, plan_head_shards

# Worst error of a value, relative to the length of its channel pair (rotation keeps it, single channels may cancel):
# half a step of the type, and what float32 adds to it before the one rounding.
# Below the smallest normal float16, steps do not shrink any more.
SMALLEST_LENGTH = 2**-14


class Case(NamedTuple):
    plan: str
    num_heads: int
    world_size: int
    num_tokens: int
    head_dim: int
    scale: float = 1.0
    eps: float = 1e-6


# Cut heads with an odd S, more ranks than heads, padded heads, groups of heads, one rank.
CASES = [
    Case("balanced", 12, 8, 35, 16),
    Case("balanced", 5, 7, 1, 64),
    Case("padded", 5, 4, 26, 24, scale=300.0),
    Case("grouped", 6, 4, 37, 32, scale=1e-3),
    Case("balanced", 3, 1, 7, 128, eps=1e-2),
]


class Operands(NamedTuple):
    """As the op takes them, and the exchange order from the receiver's side."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norm_q: torch.Tensor
    norm_k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    destinations: torch.Tensor
    num_heads: int
    eps: float
    out_rows: int
    scatter_index: torch.Tensor

    @property
    def arguments(self):
        return self[:-1]


def operands(case, dtype, seed=0):
    """Fresh operands; rows of q and of k are parts of longer ones, and what lies between them is not a number."""
    local_tokens = math.ceil(case.num_tokens / case.world_size)
    sizes = {"num_heads": case.num_heads, "world_size": case.world_size}
    shards = plan_head_shards(case.plan, **sizes, local_tokens=local_tokens)
    layout = Layout(**sizes, num_tokens=case.num_tokens, shards=shards)
    width = case.num_heads * case.head_dim
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    columns = []
    for gap in (3, 5, 0):
        apart = torch.full((local_tokens, width + gap), math.nan, dtype=dtype)
        columns.append(apart[:, :width].copy_(randn(local_tokens, width) * case.scale))
    columns[0][0] = 0  # a row without direction
    angle = randn(1, local_tokens, case.head_dim // 2) * 100
    return Operands(
        *columns,
        *(randn(width).to(dtype) for _ in "qk"),
        angle.cos(),
        angle.sin(),
        torch.from_numpy(layout.scatter_destinations()),
        case.num_heads,
        case.eps,
        case.world_size * layout.scatter_rows,
        torch.from_numpy(layout.scatter_index()).flatten(),
    )


def in_float64(given):
    """`[P * scatter_rows, D]`: the definition, spelled out."""
    cos, sin = (table.double().transpose(0, 1) for table in (given.cos, given.sin))  # [S, 1, D / 2]

    def turned(x, weight):
        x, weight = x.double(), weight.double()
        normed = x / (x.square().mean(1, keepdim=True) + given.eps).sqrt() * weight
        even, odd = normed.view(len(x), given.num_heads, -1, 2).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(1)

    stacked = torch.stack([turned(given.q, given.norm_q), turned(given.k, given.norm_k), given.v.double()])
    return stacked.view(-1, 2 * cos.shape[-1])[given.scatter_index]


def check(got, given, tolerance):
    """Every value of `got` is written and is within `tolerance` of its channel pair; returns the worst error."""
    want = in_float64(given)
    assert got.shape == want.shape
    assert not got.isnan().any(), f"{int(got.isnan().sum())} of {got.numel()} values were never written"
    is_v = given.scatter_index >= 2 * given.q.shape[0] * given.num_heads
    assert torch.equal(got[is_v].double(), want[is_v]), "v is not moved as it is"
    length = want.unflatten(1, (-1, 2)).norm(dim=-1).clamp(min=SMALLEST_LENGTH).repeat_interleave(2, dim=1)
    errors = (got.double() - want).abs() / length
    at = divmod(int(errors.argmax()), want.shape[1])
    assert errors[at] <= tolerance, f"at {at}: {got[at]}, wanted {want[at]}; error {errors[at]:.3e} > {tolerance:.3e}"
    return errors[at].item()
