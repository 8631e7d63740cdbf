"""Traces `ChunkStep` with torch.export into the step graph; our custom ops stay single nodes.

The weights are the tensors of the written weight file, memory-mapped rather than copied. One graph serves every chunk, in one
of two forms:

- over the filled prefix of the KV slots, `[1, rows, heads * D]`, with rows as the only dynamic size (segments);
- over the whole KV slots, `[1, heads, W * T, D]`, with the number of filled rows as an input tensor and every size static (one
  engine).

With fused ops, self-attention consists of two of them, and the number of filled rows is an input tensor in both forms. Each
kind of step is traced separately. A step other than 0 generates a video's first chunk, which has no history, so its filled
prefix consists of its own rows.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.export import Dim, ExportedProgram

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.layout import layouts_from_config
from causalrt.model.wan.step import ChunkStep, FusedOps, StepOps
from causalrt.model.wan.transformer import PromptGraph, TimeGraph, Wan, wan_from_weights
from causalrt.plugins.all_to_all import all_to_all
from causalrt.plugins.attention import attention, kv_attention, kv_attention_whole
from causalrt.plugins.qk_norm_rope import qk_norm_rope
from causalrt.plugins.rope_attention import attend_to_copies
from causalrt.plugins.rotate import rotate

TRACED_OPS = StepOps(
    all_to_all=all_to_all,
    rotate=rotate,
    attention=attention,
    kv_attention=kv_attention,
    kv_attention_whole=kv_attention_whole,
)


FUSED_OPS = replace(TRACED_OPS, fused=FusedOps(qk_norm_rope=qk_norm_rope, rope_attention=attend_to_copies))


def wan_from_file(config: Config, weights: Path) -> Wan:
    """The model over a written weight file."""
    return wan_from_weights(config.model, load_file(weights))


def step_arguments(config: Config, *, whole_slots: bool = False, fused: bool = False, step: int = 0) -> tuple[Any, ...]:
    """Example arguments of `ChunkStep.forward`; all tensors are distinct because torch.export merges identical objects."""
    layout, m = layouts_from_config(config)[step], config.model
    dtype = TORCH_DTYPES[config.build.precision]
    rows = layout.num_tokens if step and not whole_slots else config.slot_rows

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def slots(heads: int) -> torch.Tensor:
        return empty(1, heads, rows, m.head_dim) if whole_slots else empty(1, rows, heads * m.head_dim)

    layers = range(m.num_layers)
    arguments = (
        empty(layout.local_tokens, m.patch_features),
        empty(m.dim),
        empty(6, m.dim),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        [[(slots(shard.num_heads), slots(shard.num_heads)) for shard in layout.shards] for _ in layers],
        [(empty(1, m.text_len, m.dim), empty(1, m.text_len, m.dim)) for _ in layers],
    )
    return (*arguments, torch.full((1,), rows, dtype=torch.int64)) if whole_slots or fused else arguments


def trace_step(
    wan: Wan, config: Config, *, whole_slots: bool = False, fused: bool = False, step: int = 0
) -> ExportedProgram:
    """Trace one chunk step of one rank, over the filled prefix of the KV slots or over the whole slots."""
    video = config.video
    arguments = step_arguments(config, whole_slots=whole_slots, fused=fused, step=step)
    dynamic = None
    if not whole_slots and not step and video.capacity_frames > video.chunk_frames:
        rows = Dim("kv_rows", min=config.tokens_per_chunk, max=video.capacity_frames * config.tokens_per_frame)
        kv = [[({1: rows}, {1: rows}) for _ in layer] for layer in arguments[5]]
        cross_kv = [(None, None) for _ in arguments[6]]
        dynamic = (None, None, None, None, None, kv, cross_kv, *([None] if fused else []))
    module = ChunkStep(wan, config, layouts_from_config(config)[step], FUSED_OPS if fused else TRACED_OPS).eval()
    return torch.export.export(module, arguments, dynamic_shapes=dynamic)


def _like(wan: Wan, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=wan.patch_embedding.weight.dtype)


def trace_prompt(wan: Wan) -> ExportedProgram:
    """Trace the prompt graph."""
    return torch.export.export(PromptGraph(wan).eval(), (_like(wan, wan.config.text_len, wan.config.text_dim),))


def trace_time(wan: Wan) -> ExportedProgram:
    """Trace the time graph."""
    return torch.export.export(TimeGraph(wan).eval(), (_like(wan, wan.config.freq_dim),))
