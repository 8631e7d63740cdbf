"""The step graph: one trace of `ChunkStep` by torch.export, with our ops kept whole.

Weights are the tensors of the written weight file, mapped and not copied. Sizes are static but for the rows of the KV
slots' filled prefix, so one graph serves every chunk.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.export import Dim, ExportedProgram

from causalrt.config import Config
from causalrt.layout import layout_from_config
from causalrt.model.step import ChunkStep, StepOps
from causalrt.model.wan import PromptGraph, TimeGraph, Wan, wan_from_weights
from causalrt.plugins.all_to_all import all_to_all
from causalrt.plugins.attention import attention, kv_attention
from causalrt.plugins.rotate import rotate

TRACED_OPS = StepOps(all_to_all=all_to_all, rotate=rotate, attention=attention, kv_attention=kv_attention)


def wan_from_file(config: Config, weights: Path) -> Wan:
    """The model over a written weight file."""
    return wan_from_weights(config.model, load_file(weights))


def step_arguments(config: Config) -> tuple[Any, ...]:
    """Example arguments of `ChunkStep.forward`, all distinct tensors: torch.export merges inputs that are one object."""
    layout, m = layout_from_config(config), config.model
    rows = config.video.capacity_frames * config.tokens_per_frame
    kv = [
        [
            (torch.empty(1, rows, share.num_heads * m.head_dim), torch.empty(1, rows, share.num_heads * m.head_dim))
            for share in layout.shares
        ]
        for _ in range(m.num_layers)
    ]
    cross_kv = [(torch.empty(1, m.text_len, m.dim), torch.empty(1, m.text_len, m.dim)) for _ in range(m.num_layers)]
    return (
        torch.empty(layout.local_tokens, m.patch_features),
        torch.empty(m.dim),
        torch.empty(6, m.dim),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        kv,
        cross_kv,
    )


def trace_step(wan: Wan, config: Config) -> ExportedProgram:
    """Trace one chunk step of one rank."""
    video = config.video
    arguments = step_arguments(config)
    dynamic = None
    if video.capacity_frames > video.chunk_frames:
        rows = Dim("kv_rows", min=config.tokens_per_chunk, max=video.capacity_frames * config.tokens_per_frame)
        kv = [[({1: rows}, {1: rows}) for _ in layer] for layer in arguments[5]]
        dynamic = (None, None, None, None, None, kv, [(None, None) for _ in arguments[6]])
    step = ChunkStep(wan, config, layout_from_config(config), TRACED_OPS).eval()
    return torch.export.export(step, arguments, dynamic_shapes=dynamic)


def trace_prompt(wan: Wan) -> ExportedProgram:
    """Trace the prompt graph."""
    return torch.export.export(PromptGraph(wan).eval(), (torch.empty(wan.config.text_len, wan.config.text_dim),))


def trace_time(wan: Wan) -> ExportedProgram:
    """Trace the time graph."""
    return torch.export.export(TimeGraph(wan).eval(), (torch.empty(wan.config.freq_dim),))
