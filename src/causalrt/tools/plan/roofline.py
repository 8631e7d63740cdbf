"""Seconds of a chunk step on a GPU of the table: a roofline that includes tiles, waves, launches and the exchange.

product      tiles [tm, tn] x ranges of k, one at a time on a multiprocessor: waves x the time of a tile; or its bytes
attention    query tiles of all groups in one launch (fused op), or a launch for each group; then waves x key blocks
pass         bytes over bandwidth
exchange     latency + bytes that a rank sends to others over the link (over the network, beyond one server)
kernel       a gap for each, or the launches of the host where these take longer and no CUDA graph hides them
"""

import functools
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.plugins.rope_attention_launch import SPLIT_COST_BLOCKS, choose_kv_splits, tiles_for
from causalrt.tools.ops.work import Attention, Exchange, Gemm, StepWork
from causalrt.tools.plan import assumptions as assumed
from causalrt.tools.plan.assumptions import Bound, Estimate
from causalrt.tools.plan.decode_work import chunk_decode_flops
from causalrt.tools.plan.hardware import GPUS, Gpu

Lowering = Literal["engine", "runtime", "eager"]
"""How a step runs: an engine that exchanges inside one CUDA graph; segments of an engine, between which the runtime exchanges;
torch op by op, without a graph."""
ELEMENT_BYTES = 2
SEGMENTS_A_LAYER = 3
"""A layer is cut at two all-to-alls and a cache write (docs/internal/chunk-walkthrough.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one chunk step by part; `idle_s` is the gaps between kernels, or the wait for the host."""

    gemm_s: float
    attention_s: float
    pass_s: float
    exchange_s: float
    idle_s: float

    @property
    def total_s(self) -> float:
        """Sum of the parts."""
        return self.gemm_s + self.attention_s + self.pass_s + self.exchange_s + self.idle_s


def waves(num_tiles: int, num_multiprocessors: int) -> int:
    """Rounds in which all tiles are done if a multiprocessor does one tile at a time."""
    return math.ceil(num_tiles / num_multiprocessors)


def gemm_tiles(gemm: Gemm, tile: tuple[int, int]) -> int:
    """Number of tiles of the output."""
    return math.ceil(gemm.m / tile[0]) * math.ceil(gemm.n / tile[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMachine:
    """A GPU of the table, and how a step runs on it.

    Attributes:
        gpu: the GPU.
        lowering: how the step runs (see `Lowering`).
        fused_ops: whether self-attention is one launch for all groups, its keys split where there are few tiles.
        vae: sizes of the VAE.
    """

    gpu: Gpu
    lowering: Lowering = "engine"
    fused_ops: bool = False
    vae: VaeConfig = field(default_factory=VaeConfig)

    @property
    def name(self) -> str:
        """Name of the GPU."""
        return self.gpu.name

    def step_time(self, work: StepWork, bound: Bound, *, slot_rows: int) -> StepTime:
        """Seconds of one chunk step.

        Args:
            work: work of one rank.
            bound: kind of assumptions.
            slot_rows: rows of the KV slots as they are bound. It is not known whether an engine over whole slots skips rows
                that are not filled; the worst assumptions are that it does not.
        """
        whole = self.lowering == "engine" and bound == "worst"
        attentions = [replace(a, keys=slot_rows) if whole and a.over_slots else a for a in work.attentions]
        inner = [a for a in attentions if a.over_slots]
        launches = [tuple(inner)] if self.fused_ops else [(a,) for a in inner]
        launches += [(a,) for a in attentions if not a.over_slots]
        attention_s = sum(launch[0].count * self.attention_seconds(launch, bound) for launch in launches)
        kernels = sum(gemm.count for gemm in work.gemms) + work.calls + sum(launch[0].count for launch in launches)
        exchange_s = sum(e.count * self.exchange_seconds(e, work.layout.world_size, bound) for e in work.exchanges)
        bandwidth = self._memory_rate(bound)
        eager = self.lowering == "eager"
        moved = [(op.count, 2 * op.elements if eager else op.fused_elements) for op in work.passes]
        kernels += sum(count for count, elements in moved if elements)
        pass_s = sum(count * elements * ELEMENT_BYTES / bandwidth for count, elements in moved)
        if self.lowering == "runtime" and work.exchanges:
            cuts = SEGMENTS_A_LAYER * work.exchanges[0].count
            received = work.layout.world_size * work.exchanges[0].rows * work.exchanges[0].head_dim
            kernels += cuts
            pass_s += work.exchanges[0].count * 2 * received * ELEMENT_BYTES / bandwidth
        parts = {
            "gemm_s": sum(gemm.count * self.gemm_seconds(gemm, bound) for gemm in work.gemms),
            "attention_s": attention_s,
            "pass_s": pass_s,
            "exchange_s": exchange_s,
        }
        idle_s = kernels * assumed.KERNEL_GAP_S.at(bound)
        if eager:
            host_s = (work.ops + work.calls) * assumed.HOST_LAUNCH_S.at(bound)
            idle_s = max(idle_s, host_s - sum(parts.values()))
        return StepTime(**parts, idle_s=idle_s)

    def gemm_seconds(self, gemm: Gemm, bound: Bound) -> float:
        """Seconds of one product with its fastest tiles."""
        rate = self.gpu.tensor_tflops * 1e12 * assumed.REACHED[self.gpu.architecture].gemm.at(bound)
        rate /= self.gpu.num_multiprocessors
        bandwidth = self._memory_rate(bound)
        times = []
        for (tile, reached), splits in itertools.product(
            assumed.TILE_EFFICIENCY.items(), range(1, assumed.MOST_K_SPLITS + 1)
        ):
            rounds = waves(gemm_tiles(gemm, tile) * splits, self.gpu.num_multiprocessors)
            compute_s = rounds * 2 * tile[0] * tile[1] * math.ceil(gemm.k / splits) / (rate * reached)
            # Ranges of k leave partial sums in float32 that are written and read.
            sums_s = 0.0 if splits == 1 else 8 * gemm.m * gemm.n * splits / bandwidth
            times.append(compute_s + sums_s)
        return max(min(times), gemm.elements * ELEMENT_BYTES / bandwidth)

    def attention_seconds(self, launch: tuple[Attention, ...], bound: Bound) -> float:
        """Seconds of one launch for these heads and rows, all of which have the same number of keys."""
        first = launch[0]
        tiles = tiles_for(self.gpu.capability, dtype=torch.bfloat16, head_dim=first.head_dim, rotate=False)
        rate = self.gpu.tensor_tflops * 1e12 * assumed.REACHED[self.gpu.architecture].attention.at(bound)
        rate /= self.gpu.num_multiprocessors
        num_tiles = sum(a.num_heads * math.ceil(a.rows / tiles.block_m) for a in launch)
        blocks = math.ceil(first.keys / tiles.block_n)
        splits = 1
        if self.fused_ops and first.over_slots:
            splits = choose_kv_splits(
                num_tiles=num_tiles, key_blocks=blocks, num_multiprocessors=self.gpu.num_multiprocessors
            )
        rounds = waves(num_tiles * splits, self.gpu.num_multiprocessors)
        block_flops = 4 * tiles.block_m * tiles.block_n * first.head_dim
        depth = math.ceil(blocks / splits) + (SPLIT_COST_BLOCKS if splits > 1 else 0)
        moved = sum(2 * (a.rows + a.keys) * a.num_heads * a.head_dim for a in launch) * ELEMENT_BYTES
        return max(rounds * depth * block_flops / rate, moved / self._memory_rate(bound))

    def exchange_seconds(self, exchange: Exchange, world_size: int, bound: Bound) -> float:
        """Seconds of one collective call."""
        gpu = self.gpu
        block = exchange.rows * exchange.head_dim * ELEMENT_BYTES
        near = min(world_size, gpu.gpus_per_server) - 1
        seconds = near * block / (gpu.link_gbs * 1e9 * assumed.LINK_FRACTION[gpu.link].at(bound))
        latency = assumed.LINK_LATENCY_S[gpu.link].at(bound)
        if far := world_size - 1 - near:
            latency = max(latency, assumed.NETWORK_LATENCY_S.at(bound))
            seconds = max(seconds, far * block / (gpu.network_gbs * 1e9 * assumed.NETWORK_FRACTION.at(bound)))
        return latency + seconds

    def decode_seconds(
        self, bound: Bound, *, latent_size: tuple[int, int], latent_frames: int, first_chunk: bool
    ) -> float:
        """Seconds to decode one chunk on one GPU."""
        flops = chunk_decode_flops(
            self.vae,
            latent_height=latent_size[0],
            latent_width=latent_size[1],
            latent_frames=latent_frames,
            first_chunk=first_chunk,
        )
        return flops / (self.gpu.tensor_tflops * 1e12 * decode_fraction(self.gpu).at(bound))

    def bound_seconds(self, work: StepWork) -> float:
        """Lower bound for any software: seconds of the busiest of tensor cores, memory and link at the makers' figures."""
        block = sum(e.count * e.rows * e.head_dim for e in work.exchanges) * ELEMENT_BYTES
        weights = sum(gemm.count * gemm.n * gemm.k for gemm in work.gemms)
        cache = sum(2 * a.count * a.num_heads * a.keys * a.head_dim for a in work.attentions)
        near = min(work.layout.world_size, self.gpu.gpus_per_server) - 1
        far = work.layout.world_size - 1 - near
        return max(
            work.flops / (self.gpu.tensor_tflops * 1e12),
            (weights + cache) * ELEMENT_BYTES / (self.gpu.memory_gbs * 1e9),
            near * block / (self.gpu.link_gbs * 1e9),
            far * block / (self.gpu.network_gbs * 1e9),
        )

    def _memory_rate(self, bound: Bound) -> float:
        return self.gpu.memory_gbs * 1e9 * assumed.MEMORY.at(bound)


@functools.cache
def decode_fraction(gpu: Gpu) -> Estimate:
    """Fraction of the tensor rate that the VAE decoder reaches, from one published time for the architecture."""
    measured = assumed.MEASURED_DECODES.get(gpu.architecture)
    if measured is None:
        measured = assumed.MEASURED_DECODES["ampere" if gpu.architecture == "blackwell_rtx" else "hopper"]
    flops = chunk_decode_flops(
        VaeConfig(),
        latent_height=measured.latent_height,
        latent_width=measured.latent_width,
        latent_frames=measured.latent_frames,
        first_chunk=True,
    )
    reached = flops / measured.seconds / (GPUS[measured.gpu].tensor_tflops * 1e12)
    spread = assumed.DECODE_SPREAD
    return Estimate(best=reached * (1 + spread), nominal=reached, worst=reached * (1 - spread))
