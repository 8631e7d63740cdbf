"""What an executor is, what it needs from its caller, and how one is made.

An executor runs the three graphs of one rank (prompt, time, step). It owns no KV memory and knows no session: the caller
binds the filled prefix of a session's KV slots once a chunk, then steps. Collectives are handed in, so that executors and
the runtime that drives them stay apart.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from causalrt.engines.bundle import Bundle
from causalrt.engines.kinds import executor_kind
from causalrt.model.wan.step import KVPair, KVTensors

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONNX_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""`onnx.TensorProto`'s numbers, which ONNX's file format fixes; to import onnx would take every rank a tenth of a second."""


class Collectives(Protocol):
    """Exchange between the ranks of one engine. Every rank calls each of them, in the same order."""

    @property
    def rank(self) -> int:
        """This rank."""

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Block p of `sent` `[P, rows, D]` goes to rank p; block p of `received` comes from rank p."""

    def communicator(self) -> object:
        """The ranks' NCCL communicator, as a PyCapsule named `ncclComm_t`, for an engine that exchanges by itself."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Local rows `[S, ...]` of every rank, in rank order `[P * S, ...]`, on rank 0; None elsewhere."""


class Executor(Protocol):
    """Runs the graphs of one rank.

    Attributes:
        device: where the executor computes, and where the tensors it is given live.
        whole_slots: it wants KV slots whole, `[1, heads, W * T, D]`, and not the filled prefix `[1, rows, heads * D]`.
    """

    device: torch.device
    whole_slots: bool

    def encode_prompt(self, text: torch.Tensor) -> list[KVPair]:
        """`[text_len, text_dim]` -> per layer (k, v), `[1, text_len, C]`; the caller keeps them for the session."""

    def embed_time(self, timestep: float) -> KVPair:
        """Timestep -> (e `[C]`, e0 `[6, C]`); the caller keeps them."""

    def bind(self, kv: KVTensors, cross_kv: Sequence[KVPair], *, kv_rows: int, memory: int, step: int = 0) -> None:
        """Use these KV slots (views into the session's memory) and this prompt until bound again.

        Args:
            kv: the filled prefix, or the slots whole (`whole_slots`); staging comes first.
            cross_kv: what `encode_prompt` returned, or a copy.
            kv_rows: filled rows, staging included.
            memory: number of the memory that `kv` and `cross_kv` lie in. Equal numbers mean equal addresses on this rank, and
                all ranks give the same numbers in the same order: by them CUDA graphs are found again.
            step: number of the kind of step to run (`video.step_frames`).
        """

    def warmed_up(self) -> None:
        """Every kind of step has been run once; there is time to keep what that took."""

    def graph_bytes(self) -> int:
        """Memory of the GPU that the CUDA graphs of all sessions so far take, beside what torch's allocator holds."""

    def step(self, x: torch.Tensor, e: torch.Tensor, e0: torch.Tensor, first_frame: int) -> torch.Tensor:
        """Flow `[S, 64]` of the rank's noisy rows `[S, 64]`; valid until the next step. Writes the staging slots."""


def make_executor(
    name: str,
    bundle: Bundle,
    collectives: Collectives,
    *,
    num_threads: int,
    device: torch.device,
    plugins: bool,
    cuda_graphs: bool = True,
) -> Executor:
    """The executor `name` over an opened bundle, with its weights loaded.

    `plugins` has eager and inductor run self-attention by the fused ops of `causalrt.plugins`; the others run what was built.
    `cuda_graphs` has inductor and TensorRT capture a step on a GPU.

    Raises:
        ExecutorError: unknown name, or something that it needs is missing here or in the bundle.
    """
    executor_kind(name)
    if name == "eager":
        from causalrt.engines.eager import EagerExecutor

        return EagerExecutor(bundle, collectives, device=device, plugins=plugins)
    if name == "inductor":
        from causalrt.engines.inductor import InductorExecutor

        return InductorExecutor(
            bundle, collectives, num_threads=num_threads, device=device, plugins=plugins, cuda_graphs=cuda_graphs
        )
    if name == "onnxruntime":
        from causalrt.engines.onnxruntime import OnnxRuntimeExecutor

        return OnnxRuntimeExecutor(bundle, collectives, num_threads=num_threads, device=device)
    from causalrt.engines.tensorrt import TensorRTExecutor
    from causalrt.engines.tensorrt_flavour import FLAVOURS

    return TensorRTExecutor(FLAVOURS[name], bundle, collectives, device=device, cuda_graphs=cuda_graphs)
