"""What the caller tells the ranks and what they answer. Every rank gets every command, in the same order."""

import pickle
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from causalrt.runtime.noise import Noise
from causalrt.runtime.rollout import ChunkTimes, StepRecord, SwitchPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadCommand:
    """Open the bundle and start an executor; the first command, answered by `Done`.

    Attributes:
        bundle: its folder, verified by the caller.
        executor: its name.
        device: `cpu` or `cuda`; rank r takes GPU r.
        plugins: run the fused ops.
        num_threads: CPU threads of each rank.
        timeout_s: of a collective; the caller's own time-out on answers is the shorter one.
    """

    bundle: Path
    executor: str
    device: str
    plugins: bool
    num_threads: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenCommand:
    """Start a session."""

    session: int
    text: torch.Tensor
    noise: Noise


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkCommand:
    """Generate a session's next chunk: rank 0 answers `Latents`, then every rank `Done`."""

    session: int
    index: int
    refresh: bool
    record: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenCommand:
    """Make clean rows `[N, 64]` a session's next chunk of history, before it generates."""

    session: int
    rows: torch.Tensor
    record: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCommand:
    """Change a session's prompt from its next chunk on."""

    session: int
    text: torch.Tensor
    policy: SwitchPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class CloseCommand:
    """Free a session."""

    session: int


Command = LoadCommand | OpenCommand | GivenCommand | ChunkCommand | PromptCommand | CloseCommand


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """A chunk's latents `[N, 64]` and the times so far, from rank 0, before the refresh."""

    rows: torch.Tensor
    times: ChunkTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The command has ended on this rank."""

    times: ChunkTimes | None = None
    records: tuple[StepRecord, ...] = ()
    kv_rows_moved: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The command raised on this rank; the rank ends. `at` orders the failures of several ranks on one host."""

    kind: str
    message: str
    at: float = field(default_factory=time.monotonic)


Reply = Latents | Done | Failed


def send(channel: "Connection[Any, Any]", message: Command | Reply) -> None:
    """Send by value. `Connection.send` would hand tensors over through shared memory and a listener of its own."""
    channel.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(channel: "Connection[Any, Any]") -> Any:
    """The next message; the channel is a private socket pair between a caller and its own child.

    Raises:
        EOFError: the other side has ended.
    """
    return pickle.loads(channel.recv_bytes())
