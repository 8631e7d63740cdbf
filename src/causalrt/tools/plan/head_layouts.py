"""What a rank attends for and exchanges, by head layout: the three that can be built, and one for comparison.

balanced, padded, grouped two all-to-alls a layer                           `causalrt.layout`
gathered            one all-gather of K and V a layer; every rank keeps the whole cache, and attends for its own rows
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from causalrt.config import Config, HeadPlanName
from causalrt.layout import layouts_from_config

LayoutName = Literal["balanced", "padded", "grouped", "gathered"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Heads of a rank that attend with the same query rows: `num_heads` x `rows`, padding included."""

    num_heads: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLayout:
    """One self-attention layer on one rank.

    Attributes:
        name: of the layout.
        world_size: P.
        local_tokens: S.
        num_tokens: N.
        groups: what a rank attends for.
        exchanged_rows: rows of D channels that a rank sends each rank, by collective call; empty on one rank.
        kv_heads: heads whose keys and values a rank holds.
    """

    name: LayoutName
    world_size: int
    local_tokens: int
    num_tokens: int
    groups: tuple[Group, ...]
    exchanged_rows: tuple[int, ...]
    kv_heads: int


def head_layout(config: Config, name: LayoutName, *, step: int = 0) -> HeadLayout:
    """The layout of one kind of step of `config` on `config.build.world_size` ranks."""
    plan: HeadPlanName = "balanced" if name == "gathered" else name
    layout = layouts_from_config(replace(config, build=replace(config.build, head_plan=plan)))[step]
    ranks, rows, heads = layout.world_size, layout.local_tokens, layout.num_heads
    groups: tuple[Group, ...]
    exchanged: tuple[int, ...]
    if name == "gathered":
        groups, exchanged, kv_heads = (Group(num_heads=heads, rows=rows),), (2 * heads * rows,), heads
    else:
        groups = tuple(Group(num_heads=s.num_heads, rows=ranks * s.query_rows) for s in layout.shards)
        exchanged, kv_heads = (layout.scatter_rows, layout.gather_rows), layout.kv_heads
    return HeadLayout(
        name=name,
        world_size=ranks,
        local_tokens=rows,
        num_tokens=layout.num_tokens,
        groups=groups,
        exchanged_rows=exchanged if ranks > 1 else (),
        kv_heads=kv_heads,
    )
