"""The caller's side of the decoder: a process beside the ranks that turns latents into frames, for any number of sessions."""

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
    """A chunk's frames and times.

    Attributes:
        frames: uint8 `[T, 8H, 8W, 3]`.
        decode_ms: milliseconds that the decoder took.
        queue_ms: milliseconds spent waiting for other sessions.
    """

    frames: torch.Tensor
    decode_ms: float
    queue_ms: float


class VaeDecoder:
    """The decoder's process. It serves one thread after another, first come, first served.

    Attributes:
        free_bytes: free memory of its own device after loading; None on the host.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._lock = FairLock()
        self._pool = RankPool(1, timeout_s=timeout_s, role="decoder")
        self.free_bytes: int | None = None

    def start(self, command: LoadVaeCommand) -> None:
        """Start loading, without waiting for the end.

        Raises:
            RankError: the process failed to start.
        """
        self._pool.send(command)

    def wait_started(self, *, at_least_s: float) -> None:
        """Wait until the decoder is loaded, for at least `at_least_s` seconds even if `timeout_s` is shorter.

        Raises:
            ExecutorError: a library that the decoder's executor needs is missing.
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
        """Decode the next latents of a session's video; its first call begins the video.

        Args:
            session: number of the session.
            latents: `[F, 16, H, W]`, normalised.

        Raises:
            RequestError: values are not finite; the session can continue.
            CapacityError: there is too little memory; the decoder has lost the session's state.
            RankError: the process died, hung or raised.
            EngineClosedError: the process has ended.
        """
        asked = time.perf_counter()
        with self._turn():
            started = time.perf_counter()
            frames, _ = self._run(DecodeCommand(session=session, latents=latents))
        assert isinstance(frames, Frames)
        return Decoded(frames=frames.frames, decode_ms=frames.decode_ms, queue_ms=1e3 * (started - asked))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents `[1 + k, 16, H, W]` of 1 + 4k frames (`causalrt.model.codecs.registry.encode`).

        Raises:
            RequestError: wrong shape, type, number of frames, or values.
            CapacityError: there is too little memory.
            RankError: the process died, hung or raised.
            EngineClosedError: the process has ended.
        """
        with self._turn():
            encoded, _ = self._run(EncodeCommand(frames=frames))
        assert isinstance(encoded, Encoded)
        return encoded.latents

    def save(self, session: int, folder: Path) -> None:
        """Write the decoder's state of a session to a snapshot's folder.

        Raises:
            RequestError: the file cannot be written.
            RankError: the process died, hung or raised.
        """
        with self._turn():
            self._run(SaveCommand(session=session, folder=folder))

    def resume(self, session: int, folder: Path, *, frame: int, files: Mapping[str, str]) -> None:
        """Restore a session that `save` has written after `frame` latents; `files` maps the folder's files to their sha256.

        Raises:
            RequestError: the snapshot is damaged, or belongs to another VAE.
            CapacityError: there is too little memory for the session.
            RankError: the process died, hung or raised.
        """
        with self._turn():
            self._run(ResumeCommand(session=session, folder=folder, frame=frame, files=files))

    def close_session(self, session: int) -> None:
        """Free a session's caches."""
        with self._turn():
            self._run(CloseCommand(session=session))

    def close(self) -> None:
        """End the process. If it is busy, it is killed, and the thread that waits for it gets an EngineClosedError."""
        if self._pool.is_ours:
            with self._lock.after_ending(self._pool.kill):
                self._pool.close()

    def end(self) -> None:
        """End the process at once and free its channel, while no other thread talks to it."""
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
        """Run a command and return the replies. If that is interrupted, end the process, since replies would stay unread."""
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
