"""What the caller tells the ranks and what they answer. Every rank gets every command, in the same order."""

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
    """Open the bundle and start an executor; the first command, answered by `Done`.

    Attributes:
        bundle: its folder, verified by the caller.
        digest: of the manifest that the caller verified.
        executor: its name.
        device: `cpu` or `cuda`; rank r takes GPU r.
        fused_ops: run self-attention by the fused ops.
        cuda_graphs: capture steps, where the executor can.
        num_threads: CPU threads of each rank.
        timeout_s: of a collective; the caller's own time-out on answers is the shorter one.
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
    """Start a session; a rank whose memory does not hold it answers `Refused` before `Done`."""

    session: int
    text: torch.Tensor
    noise: Noise


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkCommand:
    """Generate a session's next chunk: rank 0 answers `Latents`, then every rank `Done`.

    `frame` is where in the video the caller takes the chunk to begin; a rank that is elsewhere fails. `draw_next` has the ranks
    draw the first noise of the chunk that follows.
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
    """Write a session to a snapshot's folder; `Refused` comes before `Done` if that fails. Ranks and decoder take it."""

    session: int
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeCommand:
    """Take a session up from a snapshot's folder, as `SaveCommand` left it; a rank's is open already, and new.

    `frame` is where in the video the snapshot was taken, `files` the sha256 of each file; other files are refused.
    """

    session: int
    folder: Path
    frame: int
    files: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageCommand:
    """Say what the rank has used so far, waits since they were last begun to be counted; then count them, or no more."""

    count_waits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CloseCommand:
    """Free a session; `opened` is False if a rank refused to open it, and then some ranks do not know it."""

    session: int
    opened: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckExchangesCommand:
    """Send the canary through every kind of exchange of a step (`runtime/canary.py`); `Done` says what arrived."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadVaeCommand:
    """Open the bundle's VAE; the first command to the decoder's process, answered by `Done`.

    Attributes:
        bundle: its folder, verified by the caller.
        digest: of the manifest that the caller verified.
        executor: whose way of running graphs is taken.
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
    """Decode a session's next latents `[F, 16, H, W]`, its first ones included: answered by `Frames`, then `Done`."""

    session: int
    latents: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeCommand:
    """Encode frames, uint8 `[T, height, width, 3]`: answered by `Encoded`, then `Done`."""

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
    """A chunk's frames, uint8 `[T, 8H, 8W, 3]`, which travel as plain bytes; `decode_ms` is what the decoder took."""

    frames: torch.Tensor
    decode_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Latents `[F, 16, H, W]` of frames that the caller gave."""

    latents: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """What was asked for cannot be done, a `CausalRTError` of type `kind`; who says so is as it was, and goes on."""

    kind: str
    message: str

    def error(self) -> errors.CausalRTError:
        """To raise where the request came from."""
        made: errors.CausalRTError = getattr(errors, self.kind)(self.message)
        return made


def out_of_memory(who: str, error: BaseException) -> Refused:
    """Refuse a session that does not fit, by the error of the library that found no memory."""
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
        pid: number of the process that answers.
        times: of a chunk.
        records: what the chunk's forwards computed, where that was asked for.
        kv_rows_moved: rows of one head that the session has moved to history.
        free_bytes: what the rank's own device can still give, once it has loaded; None on the host.
        graph_bytes: what the CUDA graphs of one session take there.
        usage: what the rank has used, where that was asked for.
        exchanges: what the canary found on this rank.
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
