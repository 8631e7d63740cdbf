"""The interface of an executor, and of what it is given.

An executor runs the three graphs of one rank (prompt, time, step). It owns no KV memory and knows no session: the caller
binds a view of a session's buffers once a chunk, then steps. Collectives are handed in, so that executors and the runtime that
drives them stay apart.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from causalrt.engines.tensor_names import KV_ROWS
from causalrt.model.wan.conditioning import Conditioning
from causalrt.model.wan.step import KVTensors

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONNX_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""Numbers of `onnx.TensorProto`, which ONNX's file format fixes; importing onnx would cost every rank a tenth of a second."""


class Collectives(Protocol):
    """Exchange between the ranks of one engine. Every rank calls each of them, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this rank."""

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Block p of `sent` `[P, rows, D]` goes to rank p; block p of `received` comes from rank p."""

    def communicator(self) -> object:
        """The ranks' NCCL communicator, as a PyCapsule named `ncclComm_t`, for an engine that exchanges by itself."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Local rows `[S, ...]` of every rank, in rank order `[P * S, ...]`, on rank 0; None elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionView:
    """What one step reads and writes of a session's buffers.

    Attributes:
        buffers_id: number of the buffers that all tensors lie in. Equal numbers mean equal addresses on this rank, and all
            ranks see the same numbers in the same order, so that CUDA graphs can be kept by them.
        step: number of the kind of step (`video.step_frames`).
        prompt: what `Executor.encode_prompt` returned, or a copy.
        kv: the filled prefix of the KV slots, or the slots whole (`Executor.whole_slots`); staging comes first.
        kv_rows: filled rows, staging included.
    """

    buffers_id: int
    step: int
    prompt: Conditioning
    kv: KVTensors
    kv_rows: int

    def slots(self) -> dict[str, torch.Tensor]:
        """Keys and values by their names in the step graph."""
        return {
            f"{kind}.{layer}.{shard}": tensor
            for layer, shards in enumerate(self.kv)
            for shard, pair in enumerate(shards)
            for kind, tensor in zip("kv", pair, strict=True)
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their names in the step graph."""
        return {**self.slots(), **self.prompt}


class StepBuffers(dict[str, torch.Tensor]):
    """Tensors that a step reads and writes beside the session's, by name, at addresses that stay."""

    def copy_from(self, x: torch.Tensor, time: Conditioning, *, first_frame: int, kv_rows: int) -> None:
        """Take over the inputs of the next step; numbers that the step does not read have no tensor."""
        for name, value in {"x": x, **time}.items():
            self[name].copy_(value, non_blocking=True)
        for name, number in (("first_frame", first_frame), (KV_ROWS, kv_rows)):
            if name in self:
                self[name].fill_(number)


class Executor(Protocol):
    """Runs the graphs of one rank. Executors derive from it to inherit the methods that do nothing by default.

    Attributes:
        device: device on which the executor computes, and which holds the tensors that it is given.
        whole_slots: whether it needs whole KV slots, `[1, heads, W * T, D]`, instead of the filled prefix
            `[1, rows, heads * D]`.
    """

    device: torch.device
    whole_slots: bool = False

    def encode_prompt(self, text: torch.Tensor) -> Conditioning:
        """Compute a prompt's conditioning from text embeddings `[text_len, text_dim]`; the caller keeps it for the session."""

    def embed_time(self, timestep: float) -> Conditioning:
        """Compute a timestep's conditioning; the caller keeps it."""

    def bind(self, view: SessionView) -> None:
        """Use this part of a session's buffers in all steps until the next call."""

    def warmed_up(self) -> None:
        """Take note that every kind of step has run once, and that there is time to save what was compiled."""
        return

    def graph_bytes(self) -> int:
        """GPU memory that the CUDA graphs of all sessions so far take, beside what torch's allocator holds."""
        return 0

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """Predict the flow `[S, 64]` of the rank's noisy rows `[S, 64]`, and write the staging slots.

        Args:
            x: noisy rows, `[S, 64]`.
            time: what `embed_time` returned.
            first_frame: where rotary angles count time from: the chunk's first frame in the video, or, where
                `video.time_index` is relative, the frames of history.

        Returns:
            The flow, valid until the next step.
        """
