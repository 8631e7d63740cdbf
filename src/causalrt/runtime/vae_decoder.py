"""The decoder from its caller's side: a process beside the ranks that turns latents into frames, for any number of sessions."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from causalrt.runtime import interrupts
from causalrt.runtime.fair_lock import FairLock
from causalrt.runtime.messages import (
    CloseCommand,
    DecodeCommand,
    Done,
    EncodeCommand,
    Encoded,
    Frames,
    LoadVaeCommand,
    Refused,
    Reply,
    ResumeCommand,
    SaveCommand,
    VaeCommand,
)
from causalrt.runtime.ranks import RankPool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A chunk's frames and where the time went.

    Attributes:
        frames: uint8 `[T, 8H, 8W, 3]`.
        decode_ms: what the decoder took.
        queue_ms: the wait for what other sessions had decoded.
    """

    frames: torch.Tensor
    decode_ms: float
    queue_ms: float


class VaeDecoder:
    """The decoder's process. Threads take turns, first come, first served.

    Attributes:
        free_bytes: what its own device could still give once it was loaded; None on the host.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._lock = FairLock()
        self._pool = RankPool(1, timeout_s=timeout_s, role="decoder")
        self.free_bytes: int | None = None

    def start(self, command: LoadVaeCommand) -> None:
        """Have it load, without waiting for that.

        Raises:
            RankError: the process failed to start.
        """
        self._pool.send(command)

    def wait_started(self, *, at_least_s: float) -> None:
        """Return when it is ready, for which it has so many seconds however short `timeout_s` is.

        Raises:
            ExecutorError: the executor's way of running it is missing here.
            RankError: the process failed to start, or raised.
        """
        *_, (_, done) = self._pool.replies(at_least_s=at_least_s)
        assert isinstance(done, Done)
        self.free_bytes = done.free_bytes

    @property
    def pid(self) -> int:
        """Process number."""
        return self._pool.pids[0]

    def dead_processes(self) -> list[str]:
        """See `RankPool.dead_processes`."""
        return self._pool.dead_processes()

    def silent_s(self) -> float:
        """See `RankPool.silent_s`."""
        return self._pool.silent_s()

    def decode(self, session: int, latents: torch.Tensor) -> Decoded:
        """The next frames of a session's video, whose first latents begin it.

        Args:
            session: its number.
            latents: `[F, 16, H, W]`, normalised.

        Raises:
            RequestError: values that are not finite; the session's place in its video is as it was.
            CapacityError: no memory for the session, whose place in its video is lost.
            RankError: the process died, hung or raised.
            EngineClosedError: it has ended.
        """
        asked = time.perf_counter()
        with self._turn():
            started = time.perf_counter()
            frames, _ = self._run(DecodeCommand(session=session, latents=latents))
        assert isinstance(frames, Frames)
        return Decoded(frames=frames.frames, decode_ms=frames.decode_ms, queue_ms=1e3 * (started - asked))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents `[1 + k, 16, H, W]` of 1 + 4k frames (`causalrt.model.codecs.wan_vae.encode`).

        Raises:
            RequestError: wrong shape, type, number of frames, or values.
            CapacityError: no memory for them.
            RankError: the process died, hung or raised.
            EngineClosedError: it has ended.
        """
        with self._turn():
            encoded, _ = self._run(EncodeCommand(frames=frames))
        assert isinstance(encoded, Encoded)
        return encoded.latents

    def save(self, session: int, folder: Path) -> None:
        """Write a session's place in its video to a snapshot's folder.

        Raises:
            RequestError: it cannot be written.
            RankError: the process died, hung or raised.
        """
        with self._turn():
            self._run(SaveCommand(session=session, folder=folder))

    def resume(self, session: int, folder: Path, *, frame: int, files: Mapping[str, str]) -> None:
        """Open a session where `save` has left it, after `frame` latents; `files` are the sha256 of the folder's files.

        Raises:
            RequestError: the snapshot is damaged, or of another VAE.
            CapacityError: no memory for the session.
            RankError: the process died, hung or raised.
        """
        with self._turn():
            self._run(ResumeCommand(session=session, folder=folder, frame=frame, files=files))

    def close_session(self, session: int) -> None:
        """Free its caches."""
        with self._turn():
            self._run(CloseCommand(session=session))

    def close(self) -> None:
        """End the process; one that is at work is killed, and whoever waits for it gets an EngineClosedError."""
        if self._pool.is_ours:
            with self._lock.after_ending(self._pool.kill):
                self._pool.close()

    def end(self) -> None:
        """End the process at once and free its channel; nobody may be talking to it."""
        self._pool.close(kill=True)

    def kill(self) -> None:
        """End the process at once, from any thread."""
        self._pool.kill()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        self._pool.check_owner()  # before the lock, which a thread of the owner may have held at the fork
        with interrupts.deferred(), self._lock:
            yield

    def _run(self, command: VaeCommand) -> list[Reply]:
        """What it answers. A conversation that breaks off ends the process: its answers would be left in the channel."""
        try:
            self._pool.send(command)
            replies = [reply for _, reply in self._pool.replies()]
        except BaseException:
            self._pool.close(kill=True)
            raise
        for reply in replies:
            if isinstance(reply, Refused):
                raise reply.error()
        return replies
