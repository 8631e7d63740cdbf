"""The commands from the caller to the ranks, and their replies. Every rank gets every command, in the same order."""

import os
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from causalrt import errors
from causalrt.runtime.canary import ExchangeCheck
from causalrt.runtime.noise import Noise
from causalrt.runtime.rollout import ChunkTimes, StepRecord, SwitchPolicy
from causalrt.runtime.usage import Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadCommand:
    """Open the bundle and start an executor. This is the first command; the answer is `Done`.

    Attributes:
        bundle: folder of the bundle, which the caller has verified.
        digest: digest of the manifest that the caller has verified.
        executor: name of the executor.
        device: `cpu` or `cuda`; rank r takes GPU r.
        fused_ops: run self-attention by the fused ops.
        cuda_graphs: capture steps, where the executor can.
        num_threads: CPU threads of each rank.
        timeout_s: time limit of a collective; the caller's time limit on answers is shorter.
    """

    bundle: Path
    digest: str
    executor: str
    device: str
    fused_ops: bool
    cuda_graphs: bool
    num_threads: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenCommand:
    """Start a session. A rank with too little memory answers `Refused` before `Done`."""

    session: int
    text: torch.Tensor
    noise: Noise


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkCommand:
    """Generate a session's next chunk: rank 0 answers `Latents`, then every rank `Done`.

    `frame` is the latent frame at which the caller expects the chunk to begin; a rank that is elsewhere fails. With `draw_next`
    the ranks also draw the first noise of the following chunk.
    """

    session: int
    index: int
    frame: int
    context_pass: bool
    record: bool
    draw_next: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialChunkCommand:
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
class SaveCommand:
    """Write a session to a snapshot's folder; for ranks and decoder. If that fails, `Refused` comes before `Done`."""

    session: int
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeCommand:
    """Restore a session from a snapshot's folder. On a rank, the session was just opened.

    `frame` is the latent frame at which the snapshot was taken; `files` has the sha256 of each file.
    """

    session: int
    folder: Path
    frame: int
    files: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageCommand:
    """Report what the rank has used, including the waits counted so far, and start or stop counting waits."""

    count_waits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CloseCommand:
    """Free a session. `opened` is False if some rank refused to open it, so that other ranks may not know it."""

    session: int
    opened: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckExchangesCommand:
    """Run the self-test of every kind of exchange (`runtime/canary.py`); `Done` has the results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadVaeCommand:
    """Open the bundle's VAE. This is the first command to the decoder's process; the answer is `Done`.

    Attributes:
        bundle: its folder, verified by the caller.
        digest: of the manifest that the caller verified.
        executor: name of the executor that runs the decoder.
        device: `cpu` or `cuda:N`.
        num_threads: CPU threads.
    """

    bundle: Path
    digest: str
    executor: str
    device: str
    num_threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCommand:
    """Decode a session's next latents `[F, 16, H, W]`; the answers are `Frames` and `Done`."""

    session: int
    latents: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeCommand:
    """Encode frames, uint8 `[T, height, width, 3]`; the answers are `Encoded` and `Done`."""

    frames: torch.Tensor


Command = (
    LoadCommand
    | OpenCommand
    | InitialChunkCommand
    | ChunkCommand
    | PromptCommand
    | SaveCommand
    | ResumeCommand
    | UsageCommand
    | CheckExchangesCommand
    | CloseCommand
)
VaeCommand = LoadVaeCommand | DecodeCommand | EncodeCommand | SaveCommand | ResumeCommand | CloseCommand


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """A chunk's latents `[N, 64]` and the times so far, from rank 0, before the context pass."""

    rows: torch.Tensor
    times: ChunkTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """A chunk's frames, uint8 `[T, 8H, 8W, 3]`, which are sent as plain bytes, and the decoder's time."""

    frames: torch.Tensor
    decode_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Latents `[F, 16, H, W]` of the caller's frames."""

    latents: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The command was refused with a `CausalRTError` of type `kind`; the process is unchanged and continues."""

    kind: str
    message: str

    def error(self) -> errors.CausalRTError:
        """The error to raise in the caller's process."""
        made: errors.CausalRTError = getattr(errors, self.kind)(self.message)
        return made


def out_of_memory(who: str, error: BaseException) -> Refused:
    """The refusal of a session that does not fit, made from the out-of-memory error of a library."""
    reason = str(error).strip().partition("\n")[0]
    return Refused(
        kind=errors.CapacityError.__name__,
        message=f"{who} has no memory for a further session ({reason}); close one that is open, and load with a smaller "
        "max_sessions",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The command has ended on this rank.

    Attributes:
        pid: process number of the rank.
        times: times of the chunk.
        records: what each forward of the chunk computed, if requested.
        kv_rows_moved: rows of one head that the session has moved to history.
        free_bytes: free memory of the rank's device after loading; None on the host.
        graph_bytes: memory of the CUDA graphs of one session.
        usage: what the rank has used of its device, if requested.
        exchanges: results of the exchange self-test.
    """

    pid: int = field(default_factory=os.getpid)
    times: ChunkTimes | None = None
    records: tuple[StepRecord, ...] = ()
    kv_rows_moved: int = 0
    free_bytes: int | None = None
    graph_bytes: int = 0
    usage: Usage | None = None
    exchanges: tuple[ExchangeCheck, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The command raised on this rank; the rank ends. `at` orders the failures of several ranks on one host."""

    kind: str
    message: str
    at: float = field(default_factory=time.monotonic)


Reply = Latents | Frames | Encoded | Refused | Done | Failed


def packed(message: Command | VaeCommand | Reply) -> list[bytes | memoryview]:
    """The bytes of a message, in the parts in which `send` sends them.

    Tensors are sent by value: `Connection.send` would hand them over through shared memory and a listener of its own.
    """
    pixels: list[bytes | memoryview] = []
    if isinstance(message, Frames):  # 14 MB a chunk at 832x480, which pickle would copy
        pixels.append(message.frames.contiguous().view(-1).numpy().data)
        message = replace(message, frames=torch.empty(0, *message.frames.shape[1:], dtype=torch.uint8))
    return [pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL), *pixels]


def send(channel: "Connection[Any, Any]", message: Command | VaeCommand | Reply) -> None:
    """Send a message to the process at the other end."""
    for part in packed(message):
        channel.send_bytes(part)


def receive(channel: "Connection[Any, Any]") -> Any:
    """The next message; the channel is a private socket pair between a caller and its own child.

    Raises:
        EOFError: the other side has ended.
    """
    message = pickle.loads(channel.recv_bytes())
    if isinstance(message, Frames):
        height, width, channels = message.frames.shape[1:]
        pixels = torch.frombuffer(bytearray(channel.recv_bytes()), dtype=torch.uint8)
        message = replace(message, frames=pixels.view(-1, height, width, channels))
    return message
