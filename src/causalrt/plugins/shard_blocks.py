"""Where the rows of each shard lie in the blocks of the two all-to-alls, as numbers that a kernel is compiled with.

Block p of what a rank receives comes from rank p; block p of what it sends back goes there. Rows of D channels::

    received [P, scatter_rows, D]  | shard 0: q rows, k rows, v rows | shard 1: q rows, k rows, v rows |
    output   [P, gather_rows, D]   | shard 0: q rows                 | shard 1: q rows                 |

Row slow, head fast. q has `query_rows` rows for each head, k and v have S. It is what `Layout` says (the layout is made from
heads and ranks, this from what an op is called with), with the offsets worked out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from causalrt.errors import OperandError

MAX_SHARDS = 2
"""Head shards that the attention kernel takes in one launch."""

MAX_HEAD_DIM = 128
"""Channels of a head that the attention kernel takes at most; tiles of more do not fit into shared memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRows:
    """One shard's rows within a block; offsets in rows of D channels.

    Attributes:
        num_heads: heads of the shard on one rank.
        split: ranks that divide the query rows of these heads among them.
        query_rows: query rows of each head that come from one source rank, padding included.
        q_start: first q row in a received block.
        k_start: first k row.
        v_start: first v row.
        out_start: first row in a block that is sent back.
    """

    num_heads: int
    split: int
    query_rows: int
    q_start: int
    k_start: int
    v_start: int
    out_start: int

    def first_row(self, rank: int, local_tokens: int) -> int:
        """First local row of every source rank that this shard computes on `rank`."""
        return rank % self.split * local_tokens // self.split


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBlocks:
    """The blocks of a chunk's exchange; see the module."""

    world_size: int
    num_tokens: int
    head_dim: int
    shards: tuple[ShardRows, ...]

    @property
    def local_tokens(self) -> int:
        """S = ceil(N / P)."""
        return math.ceil(self.num_tokens / self.world_size)

    @property
    def scatter_rows(self) -> int:
        """Rows of a received block."""
        return sum(shard.num_heads * (shard.query_rows + 2 * self.local_tokens) for shard in self.shards)

    @property
    def gather_rows(self) -> int:
        """Rows of a block that is sent back."""
        return sum(shard.num_heads * shard.query_rows for shard in self.shards)


def blocks_from_shares(
    received_shape: Sequence[int], *, num_tokens: int, num_heads: Sequence[int], splits: Sequence[int]
) -> ShardBlocks:
    """The blocks that arrive as a tensor of `received_shape`.

    Args:
        received_shape: `[P, scatter_rows, D]`.
        num_tokens: N, tokens of the chunk.
        num_heads: heads of each shard on one rank.
        splits: for each shard, the ranks that divide its query rows.

    Raises:
        OperandError: the shards do not make up blocks of that shape.
    """
    world_size, rows, head_dim = received_shape
    local_tokens = math.ceil(num_tokens / world_size)
    shards, start, out_start = [], 0, 0
    for heads, split in zip(num_heads, splits, strict=True):
        query_rows = math.ceil(local_tokens / split)
        k_start = start + heads * query_rows
        v_start = k_start + heads * local_tokens
        shards.append(
            ShardRows(
                num_heads=heads,
                split=split,
                query_rows=query_rows,
                q_start=start,
                k_start=k_start,
                v_start=v_start,
                out_start=out_start,
            )
        )
        start = v_start + heads * local_tokens
        out_start += heads * query_rows
    blocks = ShardBlocks(world_size=world_size, num_tokens=num_tokens, head_dim=head_dim, shards=tuple(shards))
    if rows != blocks.scatter_rows:
        raise OperandError(
            f"received has blocks of {rows} rows, but {num_tokens} tokens on {world_size} ranks, shards of "
            f"{list(num_heads)} heads and query rows divided by {list(splits)} make {blocks.scatter_rows}; "
            "take both from one Layout"
        )
    return blocks
