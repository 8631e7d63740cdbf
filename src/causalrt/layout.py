"""How tokens, heads, exchange blocks and KV slots are divided among ranks. Index arithmetic only, no tensors.

One self-attention on P ranks, S = ceil(N / P) local tokens, H heads of D channels (the example: 12 heads, 8 ranks)::

    rank r, after QKV:   q, k, v   [S, H, D]          its own tokens, all heads
      scatter_heads      ->        [P, rows, D]       block p goes to rank p: the q rows, k rows, v rows of p's shards
    rank r, attention:   shard 0   q [P*S, 1, D]      one whole head                   k, v [N, 1, D]
                         shard 1   q [P*293, 1, D]    half of the rows of another head k, v [N, 1, D]
      gather_heads       ->        [P, rows, D]       block p goes back to rank p
    rank r, output:      o         [S, H, D]          its own tokens, all heads

Every rank has the same shapes, and the packing index is the same constant on every rank, so one graph serves all of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from causalrt.config import Config, HeadPlanName

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShard:
    """Heads of a rank that attend with the same query rows.

    Attributes:
        num_heads: heads of this shard on one rank (keys and values are held whole for each of them).
        first_head: number of the first head that this shard, over all ranks, takes.
        split: ranks that divide the query rows of these heads among them; 1 means whole heads.
        query_rows: rows that a rank takes of each source rank's S, padding included: ceil(S / split).
    """

    num_heads: int
    first_head: int
    split: int
    query_rows: int

    def heads(self, rank: int) -> range:
        """Global head numbers of this shard on `rank`; numbers past the model's last head are padding."""
        start = self.first_head + rank // self.split * self.num_heads
        return range(start, start + self.num_heads)

    def rows(self, rank: int, local_tokens: int) -> range:
        """Local rows of every source rank that this shard computes on `rank`, padding left out."""
        member = rank % self.split
        return range(member * local_tokens // self.split, (member + 1) * local_tokens // self.split)


def plan_head_shards(
    name: HeadPlanName, *, num_heads: int, world_size: int, local_tokens: int
) -> tuple[HeadShard, ...]:
    """Divide attention over the ranks (design section 4).

    Args:
        name: `balanced` gives floor(H/P) whole heads to each rank and divides the rest by query rows; `padded` rounds the
            number of heads up to a multiple of P; `grouped` makes gcd(H, P) groups of heads and divides the query rows of each
            group among P/gcd ranks.
        num_heads: H, heads of the model.
        world_size: P, number of ranks.
        local_tokens: S, tokens of a rank.
    """

    def shard(heads: int, first_head: int, split: int) -> HeadShard:
        return HeadShard(
            num_heads=heads, first_head=first_head, split=split, query_rows=math.ceil(local_tokens / split)
        )

    if name == "padded":
        return (shard(math.ceil(num_heads / world_size), 0, 1),)
    if name == "grouped":
        groups = math.gcd(num_heads, world_size)
        return (shard(num_heads // groups, 0, world_size // groups),)
    whole, cut = divmod(num_heads, world_size)
    parts = [shard(whole, 0, 1)] if whole else []
    if cut:
        divisor = math.gcd(cut, world_size)
        parts.append(shard(cut // divisor, whole * world_size, world_size // divisor))
    return tuple(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Tokens, heads and exchange blocks of one chunk on `world_size` ranks.

    Attributes:
        world_size: P, number of ranks.
        num_tokens: N, tokens of a chunk.
        num_heads: H, heads of the model.
        shards: the head shards of every rank.
    """

    world_size: int
    num_tokens: int
    num_heads: int
    shards: tuple[HeadShard, ...]

    @property
    def local_tokens(self) -> int:
        """S = ceil(N / P): tokens of a rank, padding included."""
        return math.ceil(self.num_tokens / self.world_size)

    @property
    def scatter_rows(self) -> int:
        """Rows of D channels that one rank sends another in `scatter_heads` (q, k and v packed in one block)."""
        return sum(s.num_heads * (s.query_rows + 2 * self.local_tokens) for s in self.shards)

    @property
    def gather_rows(self) -> int:
        """Rows of D channels that one rank sends another in `gather_heads`."""
        return sum(s.num_heads * s.query_rows for s in self.shards)

    @property
    def kv_heads(self) -> int:
        """Heads whose keys and values a rank holds."""
        return sum(s.num_heads for s in self.shards)

    def with_tokens(self, num_tokens: int) -> "Layout":
        """The layout of a chunk of another length; every rank holds keys and values of the same heads, in the same shards."""
        rows = math.ceil(num_tokens / self.world_size)
        shards = tuple(replace(shard, query_rows=math.ceil(rows / shard.split)) for shard in self.shards)
        return replace(self, num_tokens=num_tokens, shards=shards)

    def tokens(self, rank: int) -> range:
        """Global tokens that `rank` holds, padding left out; empty for a rank past the end of the chunk."""
        start = min(rank * self.local_tokens, self.num_tokens)
        return range(start, min(start + self.local_tokens, self.num_tokens))

    def scatter_index(self) -> Index:
        """`[P, scatter_rows]`: for each row of each block, its index in the sender's q, k, v stacked as `[3 * S * H]`.

        A shard has its q rows first, then all k rows, then all v rows, with the head as the fast axis. Padding repeats the last
        row and the last head; what is computed for it is never read.
        """
        rows, heads = self.local_tokens, self.num_heads
        blocks = []
        for rank in range(self.world_size):
            parts = []
            for shard in self.shards:
                head = np.minimum(np.array(shard.heads(rank)), heads - 1)
                taken = shard.rows(rank, rows)
                query = np.minimum(taken.start + np.arange(shard.query_rows), rows - 1)
                every = np.arange(rows)
                for which, row in enumerate((query, every, every)):
                    parts.append((which * rows + row)[:, None] * heads + head[None, :])
            blocks.append(np.concatenate([part.ravel() for part in parts]))
        return np.stack(blocks).astype(np.int64)

    def scatter_destinations(self) -> npt.NDArray[np.int32]:
        """`[3, S, H, M]`: the inverse of `scatter_index`, which says where each row and head of q, k, v goes.

        Destinations are rows of the blocks stacked as `[P * scatter_rows]`, in ascending order; each occurs once in the whole
        table. M is the largest number of destinations of one row and head, and -1 fills the rest. Keys and values of a head
        that is split go to every rank that has a part of it, and padding repeats its source.
        """
        source = self.scatter_index().ravel()
        counts = np.bincount(source, minlength=3 * self.local_tokens * self.num_heads)
        by_source = np.argsort(source, kind="stable")
        first_of_source = np.repeat(np.cumsum(counts) - counts, counts)
        table = np.full((counts.size, counts.max()), -1, dtype=np.int32)
        table[source[by_source], np.arange(source.size) - first_of_source] = by_source
        return table.reshape(3, self.local_tokens, self.num_heads, -1)

    def gather_index(self) -> Index:
        """`[S * H]`: for each local row and head, its index in the received blocks stacked as `[P * gather_rows]`."""
        index = np.full((self.local_tokens, self.num_heads), -1, dtype=np.int64)
        for rank in range(self.world_size):
            place = rank * self.gather_rows
            for shard in self.shards:
                for offset, row in enumerate(shard.rows(rank, self.local_tokens)):
                    for column, head in enumerate(shard.heads(rank)):
                        if head < self.num_heads:
                            index[row, head] = place + offset * shard.num_heads + column
                place += shard.query_rows * shard.num_heads
        return index.ravel()


def layout_from_config(config: Config) -> Layout:
    """The layout of one chunk of `config`."""
    world_size = config.build.world_size
    shards = plan_head_shards(
        config.build.head_plan,
        num_heads=config.model.num_heads,
        world_size=world_size,
        local_tokens=math.ceil(config.tokens_per_chunk / world_size),
    )
    return Layout(
        world_size=world_size, num_tokens=config.tokens_per_chunk, num_heads=config.model.num_heads, shards=shards
    )


def layouts_from_config(config: Config) -> tuple[Layout, ...]:
    """Return the layout of each kind of step (`video.step_frames`)."""
    layout = layout_from_config(config)
    return tuple(layout.with_tokens(frames * config.tokens_per_frame) for frames in config.video.step_frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotPlan:
    """Where latent frames live in the KV slots of a head (design section 6).

    The filled slots are always a prefix::

        | staging: the current chunk | sink frames, pinned | ring of clean frames |
        0                            F                     F + sink               W          F = staging_frames

    The attended set is the reference's (model_spec section 5): the sink, the newest W - sink - F clean frames, and the current
    chunk. The order of keys does not matter to attention.

    A chunk that is shorter than staging lies in the first of its frames. Only the first chunk of a video may be shorter, and it
    has no history, so the filled slots are a prefix then too.
    """

    capacity_frames: int
    step_frames: tuple[int, ...]
    sink_frames: int

    @property
    def staging_frames(self) -> int:
        """F: slots of the current chunk, as many as the longest step has frames."""
        return max(self.step_frames)

    @property
    def ring_frames(self) -> int:
        """Slots of the ring."""
        return self.capacity_frames - self.sink_frames - self.staging_frames

    def valid_frames(self, history_frames: int, *, step: int = 0) -> int:
        """Filled slots, staging included, while a step runs after `history_frames` frames of history."""
        frames = self.step_frames[step]
        assert frames == self.staging_frames or not history_frames, (
            "a gap in staging: the filled slots would be no prefix"
        )
        return frames + min(history_frames, self.capacity_frames - self.staging_frames)

    def commits(self, history_frames: int, *, step: int = 0) -> Iterator[tuple[int, int]]:
        """(staging slot, history slot) of each frame to keep, once a chunk after `history_frames` frames is clean."""
        end = history_frames + self.step_frames[step]
        for frame in range(history_frames, end):
            if frame < self.sink_frames:
                yield frame - history_frames, self.staging_frames + frame
            elif frame >= end - self.ring_frames:
                slot = (frame - self.sink_frames) % self.ring_frames
                yield frame - history_frames, self.staging_frames + self.sink_frames + slot


def slots_from_config(config: Config) -> SlotPlan:
    """The slot plan of `config`. A sink that a short horizon cannot fill is cut to the length of the history."""
    video = config.video
    return SlotPlan(
        capacity_frames=video.capacity_frames,
        step_frames=video.step_frames,
        sink_frames=min(video.sink_frames, video.capacity_frames - max(video.step_frames)),
    )


def history_lengths(config: Config) -> list[int]:
    """Frames of history that step 0 may find within the horizon, in rising order.

    They are whole chunks after the video's first chunk, or whole chunks alone once a flush has dropped it.
    """
    video = config.video
    last = video.horizon_frames - video.chunk_frames
    starts = {0, video.frames_at(0) % video.chunk_frames}
    return sorted(frames for start in starts for frames in range(start, last + 1, video.chunk_frames))
