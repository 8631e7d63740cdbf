"""What an executor is, what it needs from its caller, and how one is found by name.

An executor runs the three graphs of one rank (prompt, time, step). It owns no KV memory and knows no session: the caller
binds the filled prefix of a session's KV slots once a chunk, then steps. Collectives are handed in, so that executors and
the runtime that drives them stay apart.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from causalrt.engines.bundle import Bundle
from causalrt.errors import ExecutorError
from causalrt.model.step import KVPair, KVTensors

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Collectives(Protocol):
    """Exchange between the ranks of one engine. Every rank calls each of them, in the same order."""

    @property
    def rank(self) -> int:
        """This rank."""

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Block p of `sent` `[P, rows, D]` goes to rank p; block p of `received` comes from rank p."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Local rows `[S, ...]` of every rank, in rank order `[P * S, ...]`, on rank 0; None elsewhere."""


class Executor(Protocol):
    """Runs the graphs of one rank."""

    def encode_prompt(self, text: torch.Tensor) -> list[KVPair]:
        """`[text_len, text_dim]` -> per layer (k, v), `[1, text_len, C]`; the caller keeps them for the session."""

    def embed_time(self, timestep: float) -> KVPair:
        """Timestep -> (e `[C]`, e0 `[6, C]`); the caller keeps them."""

    def bind(self, kv: KVTensors, cross_kv: Sequence[KVPair]) -> None:
        """Use these KV slots (filled prefix, views into the session's memory) and this prompt until bound again."""

    def step(self, x: torch.Tensor, e: torch.Tensor, e0: torch.Tensor, first_frame: int) -> torch.Tensor:
        """Flow `[S, 64]` of the rank's noisy rows `[S, 64]`; valid until the next step. Writes the staging slots."""


EXECUTORS = ("eager", "onnxruntime")


def make_executor(name: str, bundle: Bundle, collectives: Collectives, *, num_threads: int) -> Executor:
    """The executor `name` over an opened bundle, with its weights loaded.

    Raises:
        ExecutorError: unknown name, or something that it needs is missing here or in the bundle.
    """
    if name == "eager":
        from causalrt.engines.eager import EagerExecutor

        return EagerExecutor(bundle, collectives)
    if name == "onnxruntime":
        from causalrt.engines.onnxruntime import OnnxRuntimeExecutor

        return OnnxRuntimeExecutor(bundle, collectives, num_threads=num_threads)
    raise ExecutorError(f"no executor {name!r}; this version has: {', '.join(EXECUTORS)}")
