"""One chunk step on one rank: the module that the eager executor runs and the exporter traces.

    x [S, 64] -> embed -> layers x { qkv, norm, rotate -> scatter_heads -> kv_attention -> gather_heads -> o,
                                     cross-attention, feed-forward } -> head -> flow [S, 64]

Operations that involve other rows are passed in as `StepOps`: eager uses real collectives and writes the KV slots in place; a
trace records functional ops. Shape letters are those of `transformer.py`; KV tensors are `[1, rows, heads * D]`, one pair for
each layer and shard.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from causalrt.config import Config
from causalrt.errors import ConfigError
from causalrt.layout import Layout
from causalrt.model.wan.relative_rope import RelativeRope
from causalrt.model.wan.rope import rope_tables
from causalrt.model.wan.transformer import AttentionWeights, Wan

KVPair = tuple[torch.Tensor, torch.Tensor]
KVTensors = Sequence[Sequence[KVPair]]
"""Pairs (k, v) by layer and shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOps:
    """The operations that involve other rows: the exchange between ranks, rotation and attention (see `causalrt.plugins`).

    `kv_attention_whole` is needed only where whole slots are bound. `fused`, if given, replaces rotation, packing, the
    exchange's order and self-attention by two ops.
    """

    all_to_all: Callable[[torch.Tensor], torch.Tensor]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    kv_attention: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
        tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ]
    kv_attention_whole: (
        Callable[
            [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
            tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        ]
        | None
    ) = None
    fused: "FusedOps | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedOps:
    """The two ops that make up the self-attention of a layer (signatures: `causalrt.plugins`).

    The second returns its output and the slots, with the current chunk written.
    """

    qk_norm_rope: Callable[..., torch.Tensor]
    rope_attention: Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor]]]


class Rotation(NamedTuple):
    """The rotary tables of one step.

    Attributes:
        cos: `[1, S, D / 2]`, for the rank's rows, which are rotated before the exchange.
        sin: `[1, S, D / 2]`.
        on_read: rank, cos and sin `[W * T, D / 2]` by slot row, if attention rotates queries and keys instead; empty otherwise.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    on_read: list[torch.Tensor]


class HeadExchange(nn.Module):
    """The two all-to-alls of a layer, without any arithmetic. A single rank exchanges and copies nothing."""

    scatter_index: torch.Tensor
    gather_index: torch.Tensor
    scatter_destinations: torch.Tensor

    def __init__(
        self, layout: Layout, head_dim: int, all_to_all: Callable[[torch.Tensor], torch.Tensor], *, fused: bool = False
    ) -> None:
        super().__init__()
        self.layout = layout
        self.head_dim = head_dim
        self.all_to_all = all_to_all
        self.register_buffer("scatter_index", torch.from_numpy(layout.scatter_index()).flatten(), persistent=False)
        self.register_buffer("gather_index", torch.from_numpy(layout.gather_index()), persistent=False)
        if fused:
            self.register_buffer(
                "scatter_destinations", torch.from_numpy(layout.scatter_destinations()), persistent=False
            )

    def swap_blocks(self, sent: torch.Tensor) -> torch.Tensor:
        """Exchange `[P, rows, D]` -> `[P, rows, D]`, block p to and from rank p; a single rank returns its input."""
        return sent if self.layout.world_size == 1 else self.all_to_all(sent)

    def own_rows(self, returned: torch.Tensor) -> torch.Tensor:
        """Reorder the returned rows `[P, gather_rows, D]` to `[S, H*D]`, this rank's tokens with all heads."""
        rows = returned.view(-1, self.head_dim)
        if self.layout.world_size > 1:
            rows = rows.index_select(0, self.gather_index)
        return rows.view(self.layout.local_tokens, -1)

    def scatter_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Exchange `[1, S, H*D]` x 3 in one collective.

        Returns for each shard q `[1, P*query_rows, h*D]`, and k and v `[1, N, h*D]`.

        Every rank calls it, in layer order. All blocks have the same size.
        """
        if self.layout.world_size == 1:
            return [(q, k, v)]
        ranks, rows = self.layout.world_size, self.layout.local_tokens
        stacked = torch.cat([q, k, v]).view(-1, self.head_dim)
        sent = stacked.index_select(0, self.scatter_index).view(ranks, -1, self.head_dim)
        received = self.all_to_all(sent)
        shards, start = [], 0
        for shard in self.layout.shards:
            parts = []
            for part_rows in (shard.query_rows, rows, rows):
                part = received[:, start : start + part_rows * shard.num_heads]
                parts.append(part.reshape(1, ranks * part_rows, shard.num_heads * self.head_dim))
                start += part_rows * shard.num_heads
            tokens = self.layout.num_tokens
            shards.append((parts[0], parts[1][:, :tokens], parts[2][:, :tokens]))
        return shards

    def gather_heads(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Exchange `[1, P*query_rows, h*D]` of each shard in one collective; return this rank's tokens, `[1, S, H*D]`."""
        if self.layout.world_size == 1:
            return outputs[0]
        ranks = self.layout.world_size
        sent = torch.cat([out.reshape(ranks, -1, self.head_dim) for out in outputs], dim=1)
        received = self.all_to_all(sent).view(-1, self.head_dim)
        return received.index_select(0, self.gather_index).view(1, self.layout.local_tokens, -1)


class ChunkStep(nn.Module):
    """One forward of the transformer over a rank's rows of one chunk at one noise level.

    The rotary tables and packing indices are constants, whereas `rank` and `first_frame` are inputs, so one graph serves every
    rank and every chunk. With `video.time_index=relative`, the slots hold normalised but unrotated keys.
    """

    frame_in_chunk: torch.Tensor
    temporal_cos: torch.Tensor
    temporal_sin: torch.Tensor
    spatial_cos: torch.Tensor
    spatial_sin: torch.Tensor
    unit_cos: torch.Tensor
    unit_sin: torch.Tensor

    def __init__(self, wan: Wan, config: Config, layout: Layout, ops: StepOps) -> None:
        super().__init__()
        self.wan = wan
        self.ops = ops
        self.layout = layout
        self.num_heads = config.model.num_heads
        self.eps = config.model.eps
        self.exchange = HeadExchange(layout, config.model.head_dim, ops.all_to_all, fused=ops.fused is not None)
        self.relative_rope = RelativeRope(config) if config.video.time_index == "relative" else None
        if self.relative_rope is None:
            constants = rope_tables(config, layout).constants()
        elif ops.fused is not None:
            unit = torch.ones(1, layout.local_tokens, config.model.head_dim // 2)
            constants = {"unit_cos": unit, "unit_sin": torch.zeros_like(unit)}
        else:
            raise ConfigError(
                "video.time_index is relative: keys are rotated when they are read, and only the fused ops do that; run the "
                "step with them (StepOps.fused), or build with `--set video.time_index=global`"
            )
        for name, table in constants.items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        e0: torch.Tensor,
        rank: torch.Tensor,
        first_frame: torch.Tensor,
        kv: KVTensors,
        cross_kv: Sequence[KVPair],
        kv_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[list[KVPair]]]:
        """Predict the flow of the rank's rows.

        Args:
            x: noisy rows in token order, `[S, 64]`.
            e: time embedding, `[C]`.
            e0: projection of the time embedding, `[6, C]`.
            rank: number of this rank, `[1]` int64.
            first_frame: `[1]` int64, frame of the video at which the chunk begins; with `video.time_index=relative`, number of
                frames of history.
            kv: filled prefix of the KV slots; its first N rows are staging, to which the step writes.
            cross_kv: (k, v) of each layer, `[1, text_len, C]`.
            kv_rows: `[1]` int64, number of filled rows; needed if `kv` holds whole slots, `[1, heads, W * T, D]`, and by fused
                ops.

        Returns:
            The flow `[S, 64]`, and the KV slots with the current chunk written.
        """
        rotation = self.rotations(rank, first_frame)
        x = self.wan.patch_embedding(x)
        written = []
        for block, layer_kv, layer_cross in zip(self.wan.layers(), kv, cross_kv, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + e0).unbind(1)
            attended, layer_written = self.self_attention(
                block.self_attn, block.modulate(x, shift1, scale1), rotation, layer_kv, kv_rows
            )
            x = x + gate1 * attended
            x = x + self.cross_attention(block.cross_attn, block.norm3(x), layer_cross)
            x = x + gate2 * block.ffn(block.modulate(x, shift2, scale2))
            written.append(layer_written)
        return self.wan.head(x, e), written

    def rotations(self, rank: torch.Tensor, first_frame: torch.Tensor) -> Rotation:
        """Return the angles for rotation before the exchange and on reading the slots; only one of the two is used."""
        if self.relative_rope is None:
            return Rotation(*self.rotation(rank, first_frame), on_read=[])
        return Rotation(self.unit_cos, self.unit_sin, on_read=[rank, *self.relative_rope(first_frame)])

    def rotation(self, rank: torch.Tensor, first_frame: torch.Tensor) -> KVPair:
        """Return (cos, sin), `[1, S, D / 2]` each, of the rank's tokens at their global time index."""
        frames = self.frame_in_chunk.index_select(0, rank)[0] + first_frame
        cos, sin = (
            torch.cat([temporal.index_select(0, frames)[None], spatial.index_select(0, rank)], dim=-1)
            for temporal, spatial in (
                (self.temporal_cos, self.spatial_cos),
                (self.temporal_sin, self.spatial_sin),
            )
        )
        return cos, sin

    def self_attention(
        self,
        weights: AttentionWeights,
        y: torch.Tensor,
        rotation: Rotation,
        kv: Sequence[KVPair],
        kv_rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[KVPair]]:
        """Map `[S, C]` to `[S, C]`: rotate locally, then compute attention shard by shard, each for its heads and rows."""
        if self.ops.fused is not None:
            return self.fused_self_attention(self.ops.fused, weights, y, rotation, kv, kv_rows)
        cos, sin, _ = rotation
        q = self.ops.rotate(weights.norm_q(weights.q(y))[None], cos, sin, self.num_heads)
        k = self.ops.rotate(weights.norm_k(weights.k(y))[None], cos, sin, self.num_heads)
        outputs, written = [], []
        scattered = self.exchange.scatter_heads(q, k, weights.v(y)[None])
        for shard, (q_rows, k_rows, v_rows), (k_slots, v_slots) in zip(self.layout.shards, scattered, kv, strict=True):
            rows, heads = (q_rows, k_rows, v_rows), shard.num_heads
            if k_slots.dim() == 3:
                out, k_slots, v_slots = self.ops.kv_attention(*rows, k_slots, v_slots, heads)
            else:
                assert self.ops.kv_attention_whole is not None
                assert kv_rows is not None
                out, k_slots, v_slots = self.ops.kv_attention_whole(*rows, k_slots, v_slots, kv_rows, heads)
            outputs.append(out)
            written.append((k_slots, v_slots))
        return weights.o(self.exchange.gather_heads(outputs).squeeze(0)), written

    def fused_self_attention(
        self,
        fused: FusedOps,
        weights: AttentionWeights,
        y: torch.Tensor,
        rotation: Rotation,
        kv: Sequence[KVPair],
        kv_rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[KVPair]]:
        """Compute `self_attention` by two fused ops, which need `kv_rows` however the slots are bound."""
        assert kv_rows is not None
        exchange, shards = self.exchange, self.layout.shards
        norms = (weights.norm_q.weight, weights.norm_k.weight)
        tables = (rotation.cos, rotation.sin, exchange.scatter_destinations)
        numbers = (self.num_heads, self.eps, self.layout.world_size * self.layout.scatter_rows)
        rows = fused.qk_norm_rope(weights.q(y), weights.k(y), weights.v(y), *norms, *tables, *numbers)
        received = exchange.swap_blocks(rows.view(self.layout.world_size, -1, exchange.head_dim))
        slots = [tensor for pair in kv for tensor in pair]
        heads, splits = [shard.num_heads for shard in shards], [shard.split for shard in shards]
        attended, written = fused.rope_attention(
            received, slots, kv_rows, rotation.on_read, heads, splits, self.layout.num_tokens
        )
        pairs = list(zip(written[::2], written[1::2], strict=True))
        return weights.o(exchange.own_rows(exchange.swap_blocks(attended))), pairs

    def cross_attention(self, weights: AttentionWeights, y: torch.Tensor, kv: KVPair) -> torch.Tensor:
        """Map `[S, C]` to `[S, C]` over all text rows, including padding; it is local, since every rank holds the text."""
        q = weights.norm_q(weights.q(y))[None]
        out: torch.Tensor = weights.o(self.ops.attention(q, *kv, self.num_heads).squeeze(0))
        return out
