"""Cases of `rope_attention` at the sizes of a recipe: the fused op in four forms, and `scaled_dot_product_attention`.

Forms: slots `whole` or `prefix` (see `causalrt.plugins.rope_attention`); `-rotated` where attention rotates. All sets of
operands of a case hold the same values in other memory, so every output of every call is compared with one reference, in
float64. Staging, and rows of whole slots past `kv_rows`, are NaN before a kernel is checked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.layout import Layout, layout_from_config
from causalrt.measure.kernel_bench.cases import OTHERS, Random, WrongResultError, element_bytes, interpreted, require
from causalrt.measure.kernel_bench.timing import Call, Captured, Facts, Output, Work
from causalrt.plugins.rope_attention import query_tokens, rope_attention_in_place, run_kernel, shard_parts
from causalrt.plugins.rope_attention_launch import RopeAttentionPlan, Tiles, plan, tiles_for
from causalrt.plugins.rotate import rotate_pairs_real
from causalrt.plugins.shard_blocks import ShardBlocks, blocks_from_shares

OUTPUT_ERRORS = {torch.float32: 6e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest allowed error, relative to the largest value."""

QUERIES = 1024
"""Query rows that a reference computes at a time."""

FORMS = ("whole", "prefix", "whole-rotated", "prefix-rotated")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Parts = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""q, k, v of each shard, `[1, heads, rows, D]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """Operands of `rope_attention` in one form."""

    received: torch.Tensor
    slots: list[torch.Tensor]
    kv_rows: torch.Tensor
    rotation: list[torch.Tensor]

    def clone(self) -> "Slots":
        """Copy the operands to other memory."""
        received, kv_rows = self.received.clone(), self.kv_rows.clone()
        slots, rotation = ([x.clone() for x in part] for part in (self.slots, self.rotation))
        return Slots(received=received, slots=slots, kv_rows=kv_rows, rotation=rotation)


class RopeAttention:
    """The attention of one layer on one rank, with all shards, over a number of filled slot rows."""

    def __init__(self, config: Config, kv_rows: int) -> None:
        self.layout: Layout = layout_from_config(config)
        self.head_plan, self.world_size = config.build.head_plan, config.build.world_size
        self.dtype, self.kv_rows, self.slot_rows = TORCH_DTYPES[config.build.precision], kv_rows, config.slot_rows
        self.heads = [shard.num_heads for shard in self.layout.shards]
        self.splits = [shard.split for shard in self.layout.shards]
        self.num_tokens = config.tokens_per_chunk
        self.blocks: ShardBlocks = blocks_from_shares(
            (self.world_size, self.layout.scatter_rows, config.model.head_dim),
            num_tokens=self.num_tokens,
            num_heads=self.heads,
            splits=self.splits,
        )

    @property
    def query_rows(self) -> list[int]:
        """Query rows of each shard, from all source ranks."""
        return [self.world_size * shard.query_rows for shard in self.blocks.shards]

    @property
    def work(self) -> Work:
        """Two products; q, keys, values and output are moved once, and staging is written."""
        dim, size = self.blocks.head_dim, element_bytes(self.dtype)
        queries = sum(heads * rows for heads, rows in zip(self.heads, self.query_rows, strict=True))
        keys = sum(self.heads) * (self.kv_rows + self.num_tokens)
        return Work(num_bytes=2 * (queries + keys) * dim * size, flops=4 * queries * self.kv_rows * dim)

    # -- operands

    def operands(self, random: Random) -> dict[str, Slots]:
        """Random operands by form, with the same values in each."""
        dim, rows = self.blocks.head_dim, self.slot_rows
        received = random(self.world_size, self.layout.scatter_rows, dim)
        whole, prefix = [], []
        for heads in self.heads:
            for _ in "kv":
                values = random(1, heads, rows, dim)
                values[:, :, self.kv_rows :] = math.nan
                whole.append(values)
                tokens = values.transpose(1, 2).flatten(2)
                prefix.append(tokens.contiguous()[:, : self.kv_rows])
        angle = 10 * random(rows, dim // 2, dtype=torch.float32)
        rotation = [torch.tensor([self.world_size - 1], device=random.device), angle.cos(), angle.sin()]
        kv_rows = torch.tensor([self.kv_rows], device=random.device)
        made = {}
        for form in FORMS:
            slots = whole if form.startswith("whole") else prefix
            tables = rotation if form.endswith("rotated") else []
            made[form] = Slots(received=received, slots=slots, kv_rows=kv_rows, rotation=tables)
        return made

    def heads_slow(self, given: Slots) -> Parts:
        """q, k, v of each shard from whole slots, contiguous, rotated where attention rotates."""
        parts = []
        pairs = zip(self.blocks.shards, given.slots[::2], given.slots[1::2], strict=True)
        for shard, k_slots, v_slots in pairs:
            q, *new = shard_parts(given.received, self.blocks, shard)
            heads = shard.num_heads
            k, v = (
                torch.cat([chunk, old[:, :, self.num_tokens : self.kv_rows].transpose(1, 2).flatten(2)], dim=1)
                for chunk, old in zip(new, (k_slots, v_slots), strict=True)
            )
            if given.rotation:
                rank, cos, sin = given.rotation
                tokens = query_tokens(rank, self.blocks, shard)
                q = rotate_pairs_real(q, cos[None, tokens], sin[None, tokens], heads)
                k = rotate_pairs_real(k, cos[None, : self.kv_rows], sin[None, : self.kv_rows], heads)
            q, k, v = (x.reshape(1, x.shape[1], heads, -1).transpose(1, 2).contiguous() for x in (q, k, v))
            parts.append((q, k, v))
        return parts

    def reference(self, given: Slots) -> list[torch.Tensor]:
        """The output of each shard in float64, `[heads, rows, D]`, head by head and few queries at a time."""
        outputs = []
        for q, k, v in self.heads_slow(given):
            out = torch.empty_like(q[0], dtype=torch.float64)
            for head in range(q.shape[1]):
                keys, values = k[0, head].double(), v[0, head].double()
                for start in range(0, q.shape[2], QUERIES):
                    rows = slice(start, start + QUERIES)
                    scores = q[0, head, rows].double() @ keys.T / math.sqrt(q.shape[3])
                    out[head, rows] = scores.softmax(-1) @ values
            outputs.append(out)
        return outputs

    # -- sides

    def kernel(self, given: Slots) -> Call:
        """A call of the fused op in place, or of its kernel in Triton's interpreter."""
        op = run_kernel if interpreted() else rope_attention_in_place
        rest = (self.heads, self.splits, self.num_tokens)
        return lambda: op(given.received, given.slots, given.kv_rows, given.rotation, *rest)

    def plan(
        self, form: str, facts: Facts, *, tiles: Tiles | None = None, kv_splits: int | None = None
    ) -> RopeAttentionPlan:
        """Plan the launches of a form, with the tiles and ranges of keys of the op or with others."""
        whole, rotate = form.startswith("whole"), form.endswith("rotated")
        default = tiles_for(facts.capability, dtype=self.dtype, head_dim=self.blocks.head_dim, rotate=rotate)
        return plan(
            self.blocks,
            dtype=self.dtype,
            slot_rows=self.slot_rows if whole else self.kv_rows,
            whole_slots=whole,
            rotate=rotate,
            tiles=tiles or default,
            num_multiprocessors=facts.multiprocessors,
            kv_splits=kv_splits,
        )

    def planned(self, given: Slots, made: RopeAttentionPlan) -> Call:
        """A call that makes the launches of a plan."""

        def call() -> Output:
            buffers = made.buffers(given.received.device)
            return made.run(given.received, given.slots, given.kv_rows, given.rotation, buffers)

        return call

    def sdpa(self, parts: Parts, backend: SDPBackend) -> Call:
        """A call of `scaled_dot_product_attention` for each shard of `heads_slow`."""

        def call() -> Output:
            with sdpa_kernel(backend):
                return tuple(F.scaled_dot_product_attention(*part) for part in parts)

        return call

    # -- checks

    def by_shard(self, out: Output) -> list[torch.Tensor]:
        """Split the output of a kernel or of SDPA by shard, `[heads, rows, D]`."""
        if isinstance(out, tuple):
            return [x[0] for x in out]
        parts = []
        for shard, rows in zip(self.blocks.shards, self.query_rows, strict=True):
            part = out[:, shard.out_start : shard.out_start + shard.query_rows * shard.num_heads]
            parts.append(part.reshape(rows, shard.num_heads, -1).transpose(0, 1))
        return parts

    def check(self, name: str, captured: Captured, reference: Sequence[torch.Tensor], *, kernel: bool) -> float:
        """The largest error of all outputs."""
        limit = OUTPUT_ERRORS[self.dtype] * (1.0 if kernel else OTHERS)
        largest = max(float(want.abs().max()) for want in reference)
        worst = 0.0
        for output in captured.outputs:
            for got, want in zip(self.by_shard(output), reference, strict=True):
                error = float((got.double() - want).abs().max()) / largest
                worst = max(worst, require(error, limit, f"rope_attention over {self.kv_rows} rows, {name}"))
        return worst

    def poison(self, given: Slots) -> None:
        """Fill staging with NaN, so that reading it before it is written shows."""
        for tensor in given.slots:
            tensor[..., : self.num_tokens, :] = math.nan

    def check_slots(self, name: str, given: Slots, before: Slots) -> None:
        """Raise WrongResultError unless staging holds the chunk, and the history behind it is unchanged."""
        for number, (tensor, old) in enumerate(zip(given.slots, before.slots, strict=True)):
            shard = self.blocks.shards[number // 2]
            _, *new = shard_parts(given.received, self.blocks, shard)
            chunk = new[number % 2]
            if tensor.dim() == 4:
                chunk = chunk.reshape(1, self.num_tokens, shard.num_heads, -1).transpose(1, 2)
            history = (x[..., self.num_tokens :, :].nan_to_num(12345.0) for x in (tensor, old))
            if not torch.equal(tensor[..., : self.num_tokens, :], chunk) or not torch.equal(*history):
                raise WrongResultError(f"rope_attention over {self.kv_rows} rows, {name}: slots {number} are wrong")
