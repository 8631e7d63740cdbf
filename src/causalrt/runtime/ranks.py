"""Starting, talking to, and ending the rank processes, from the caller's side.

One socket a rank; a command goes to every rank in the same order. A rank that dies closes its socket, which is seen at
once; one that hangs is seen when `timeout_s` has passed. Either way all ranks are killed and the caller gets one RankError.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from causalrt import errors
from causalrt.errors import CausalRTError, EngineClosedError, RankError
from causalrt.runtime.messages import Command, Done, Failed, Reply, receive, send

logger = logging.getLogger(__name__)
LOG_TAIL_LINES = 20


class RankPool:
    """P rank processes, warm until closed."""

    def __init__(self, world_size: int, *, timeout_s: float) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="causalrt-"))
        self._closed = False
        pairs = [socket.socketpair() for _ in range(world_size)]
        try:
            # The step's own threads are set by the load command; the environment keeps gloo on this host.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "causalrt.runtime.worker"),
                    *("--channels", ",".join(str(theirs.fileno()) for _, theirs in pairs)),
                    *("--folder", str(self._folder), "--parent", str(os.getpid())),
                ],
                pass_fds=[theirs.fileno() for _, theirs in pairs],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_WAIT_POLICY": "passive"},
                stdin=subprocess.DEVNULL,
                stderr=(self._folder / "start.log").open("wb"),
                start_new_session=True,
            )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise RankError(f"cannot start {world_size} rank processes: {error}") from error
        finally:
            for _, theirs in pairs:
                theirs.close()
        self._channels: list[Connection[Any, Any]] = [Connection(ours.detach()) for ours, _ in pairs]

    @property
    def closed(self) -> bool:
        """Whether the ranks have ended."""
        return self._closed

    @property
    def pids(self) -> list[int]:
        """Process numbers of the ranks."""
        return [int(line) for line in (self._folder / "pids").read_text().split()]

    def send(self, command: Command) -> None:
        """Give every rank a command.

        Raises:
            RankError: a rank is gone.
            EngineClosedError: the ranks were closed before.
        """
        if self._closed:
            raise EngineClosedError("the rank processes have ended; load the bundle again")
        for rank, channel in enumerate(self._channels):
            try:
                send(channel, command)
            except OSError:
                self._fail(rank, f"rank {rank} has died")

    def replies(self) -> Iterator[tuple[int, Reply]]:
        """Replies as they come, until every rank has sent `Done`; may be left and taken up again in between.

        Raises:
            RankError: a rank died, or nothing came for `timeout_s`.
            CausalRTError: the type that a rank raised, if it was one of ours.
        """
        waiting = {channel: rank for rank, channel in enumerate(self._channels)}
        while waiting:
            if self._closed:
                raise EngineClosedError("the rank processes have ended; load the bundle again")
            try:
                ready = wait(list(waiting), timeout=self.timeout_s)
            except KeyboardInterrupt:  # an answer would be left in the channel
                self.close(kill=True)
                raise
            if not ready:
                silent = sorted(waiting.values())
                self._fail(silent[0], f"ranks {silent} gave no answer within {self.timeout_s:g} s (timeout_s)")
            for channel in ready:
                assert isinstance(channel, Connection)
                rank = waiting[channel]
                try:
                    reply: Reply = receive(channel)
                except (EOFError, OSError):
                    self._fail(rank, f"rank {rank} has died")
                if isinstance(reply, Failed):
                    self._fail(rank, f"rank {rank} raised {reply.kind}: {reply.message}", reply)
                if isinstance(reply, Done):
                    del waiting[channel]
                yield rank, reply

    def _fail(self, rank: int, message: str, reply: Failed | None = None) -> NoReturn:
        tail = self._log_tail(rank)
        self.close(kill=True)
        own = getattr(errors, reply.kind, None) if reply else None
        if reply and isinstance(own, type) and issubclass(own, CausalRTError) and own is not RankError:
            raise own(reply.message)
        raise RankError(message + "; all ranks were ended, load the bundle again", rank=rank, log_tail=tail)

    def _log_tail(self, rank: int) -> str:
        lines: list[str] = []
        for name in ("start.log", f"rank{rank}.log"):
            try:
                lines += (self._folder / name).read_text(errors="replace").splitlines()
            except OSError:
                continue
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def close(self, *, kill: bool = False) -> None:
        """End the ranks: hang up and wait, or kill at once. Harmless when called again."""
        if self._closed:
            return
        self._closed = True
        for channel in self._channels:
            channel.close()
        try:
            if not kill:
                self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            logger.warning("rank processes did not end when asked to; killing them")
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
