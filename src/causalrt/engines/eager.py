"""The eager executor: the model's own modules, run by torch op by op. All other executors are compared with it.

It binds prefix views of the KV slots, writes staging in place and keeps the prompt's keys and values, as every executor
does, so that others can be faster by compilation alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from safetensors.torch import load_file

from causalrt.engines.base import Collectives, Executor, SessionView
from causalrt.engines.bundle import WEIGHTS, Bundle
from causalrt.layout import layouts_from_config
from causalrt.model.wan.conditioning import TIME_NAMES, Conditioning, prompt_argument, prompt_names, time_arguments
from causalrt.model.wan.step import ChunkStep, FusedOps, KVPair, KVTensors, StepOps
from causalrt.model.wan.transformer import PromptGraph, TimeGraph, sinusoid, wan_from_weights
from causalrt.plugins.attention import attend, kv_attention_in_place
from causalrt.plugins.qk_norm_rope import qk_norm_rope
from causalrt.plugins.rope_attention import attend_in_place
from causalrt.plugins.rotate import rotate_pairs

FUSED_OPS = FusedOps(qk_norm_rope=qk_norm_rope, rope_attention=attend_in_place)


class EagerExecutor(Executor):
    """Runs the model's own modules."""

    def __init__(
        self,
        bundle: Bundle,
        collectives: Collectives,
        *,
        device: torch.device,
        fused_ops: bool = False,
        ops: StepOps | None = None,
    ) -> None:
        self.device = device
        self._wan = wan_from_weights(bundle.config.model, load_file(bundle.path / WEIGHTS, device=str(device)))
        self._dtype = self._wan.patch_embedding.weight.dtype
        self._freq_dim = bundle.config.model.freq_dim
        self._prompt, self._time = PromptGraph(self._wan), TimeGraph(self._wan)
        self._collectives = collectives
        ops = ops or StepOps(
            all_to_all=self._all_to_all, rotate=rotate_pairs, attention=attend, kv_attention=kv_attention_in_place
        )
        if ops.fused is None and (fused_ops or bundle.config.video.time_index == "relative"):
            ops = replace(ops, fused=FUSED_OPS)
        self._steps = [
            ChunkStep(self._wan, bundle.config, layout, ops).eval().to(device)
            for layout in layouts_from_config(bundle.config)
        ]
        self._bound = self._steps[0]
        self._rank = torch.tensor([collectives.rank], device=device)
        self._first_frame = torch.zeros(1, dtype=torch.int64, device=device)
        self._kv_rows = torch.zeros(1, dtype=torch.int64, device=device)
        self._kv: KVTensors = ()
        self._cross_kv: Sequence[KVPair] = ()

    def _all_to_all(self, sent: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(sent)
        self._collectives.all_to_all(received, sent)
        return received

    @torch.inference_mode()
    def encode_prompt(self, text: torch.Tensor) -> Conditioning:
        """See `Executor.encode_prompt`."""
        pairs = self._prompt(text.to(self.device, self._dtype))
        tensors = [tensor for pair in pairs for tensor in pair]
        return dict(zip(prompt_names(len(pairs)), tensors, strict=True))

    @torch.inference_mode()
    def embed_time(self, timestep: float) -> Conditioning:
        """See `Executor.embed_time`."""
        features = sinusoid(timestep, self._freq_dim).to(self.device, self._dtype)
        return dict(zip(TIME_NAMES, self._time(features), strict=True))

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`."""
        self._bound = self._steps[view.step]
        self._kv, self._cross_kv = view.kv, prompt_argument(view.prompt)
        self._kv_rows.fill_(view.kv_rows)

    @torch.inference_mode()
    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        self._first_frame.fill_(first_frame)
        numbers = self._rank, self._first_frame
        flow: torch.Tensor
        flow, _ = self._bound(
            x.to(self._dtype), *time_arguments(time), *numbers, self._kv, self._cross_kv, self._kv_rows
        )
        return flow
