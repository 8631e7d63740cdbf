"""Starting, talking to, and ending the rank processes, from the caller's side.

There is one socket for each rank, and every rank gets the same commands in the same order. When a rank dies, its socket closes,
which is detected at once; a rank that hangs is detected after `timeout_s`. In both cases all ranks are killed and the caller
gets one RankError.

The caller's only child is the supervisor (`worker.py`), which forks the ranks and reaps them, so none is left as a zombie.
"""

import logging
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import IO, Any, Literal, NoReturn

from causalrt import errors
from causalrt.child_python import python_command, python_environment
from causalrt.errors import CausalRTError, EngineClosedError, ForkError, RankError
from causalrt.runtime.messages import Command, Done, Failed, Reply, VaeCommand, packed, receive

logger = logging.getLogger(__name__)
LOG_TAIL_LINES = 40
LOG_TAIL_BYTES = 2**16
START_S = 120.0
"""Seconds that the ranks may take to import, load weights and prepare graphs, even if `timeout_s` is shorter."""
WARM_START_S = 1800.0
"""The same for an executor that compiles when it is loaded."""
HANG_UP_S = 5.0
"""Seconds that the ranks may take to end by themselves, and the supervisor to end them."""
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",  # gloo stays on this host
    "OMP_WAIT_POLICY": "passive",  # the load command sets the number of threads
    # An engine is handed NCCL's communicator by its address, and a non-blocking one may not be complete by then. torch decides
    # for one by itself where a process group is made for a device (torch 2.7.0).
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "0",
}
ENVIRONMENT: Mapping[str, Mapping[str, str]] = {
    "rank": _ENVIRONMENT,
    # Under NVIDIA's MPS, kernels of rank 0 go before those of a decoder that shares its GPU; otherwise it means nothing.
    "decoder": _ENVIRONMENT | {"CUDA_MPS_CLIENT_PRIORITY": "1"},
}
CAUSE_S = 0.2
"""Seconds to look, once a rank has failed, for another rank whose earlier failure was the cause."""
_FAR_ENDS_OPEN = threading.Lock()
"""Held while this process has the ranks' ends of new channels open, and during forks. A child that inherited such an end would
keep it open, and the death of a rank would go unnoticed."""
os.register_at_fork(
    before=_FAR_ENDS_OPEN.acquire, after_in_parent=_FAR_ENDS_OPEN.release, after_in_child=_FAR_ENDS_OPEN.release
)


def _hang_up(channel: "Connection[Any, Any]") -> None:
    """Close a channel. The rank notices even if a forked process holds a copy of this end."""
    ours = socket.socket(fileno=channel.fileno())
    ours.shutdown(socket.SHUT_RDWR)
    ours.detach()
    channel.close()


class RankPool:
    """P rank processes, or the one process of the decoder, until closed."""

    def __init__(self, world_size: int, *, timeout_s: float, role: Literal["rank", "decoder"] = "rank") -> None:
        self._role = role
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._owner = os.getpid()
        self._closed = False
        self._pids: dict[int, int] = {}
        self._channels_lock = threading.Lock()
        # Files without a name: a cleaner of the temporary folder cannot remove them, and nothing is left behind.
        self._logs: list[IO[bytes]] = []
        limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        pairs: list[tuple[socket.socket, socket.socket]] = []
        _FAR_ENDS_OPEN.acquire()
        try:
            pairs.extend(socket.socketpair() for _ in range(world_size))
            self._logs.extend(tempfile.TemporaryFile() for _ in range(1 + world_size))  # noqa: SIM115
            start_log, *rank_logs = self._logs
            channels, logs = [theirs.fileno() for _, theirs in pairs], [log.fileno() for log in rank_logs]
            self._process = subprocess.Popen(
                [
                    *(*python_command("causalrt.runtime.worker"), "--role", role),
                    *("--channels", ",".join(map(str, channels)), "--logs", ",".join(map(str, logs))),
                    *("--parent", str(self._owner)),
                ],
                pass_fds=[*channels, *logs],
                env=python_environment(**ENVIRONMENT[role]),
                stdin=subprocess.DEVNULL,
                stderr=start_log,
                start_new_session=True,
            )
        except OSError as error:
            for ours, _ in pairs:
                ours.close()
            self._close_logs()
            raise RankError(f"cannot start {world_size} {role} process(es): {error}") from error
        finally:
            for _, theirs in pairs:
                theirs.close()
            _FAR_ENDS_OPEN.release()
        # A rank that hangs before it has read a command, or in the middle of an answer, must not hang the caller.
        for ours, _ in pairs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._channels: list[Connection[Any, Any]] = [Connection(ours.detach()) for ours, _ in pairs]
        self._waiting: dict[Connection[Any, Any], int] = {}  # ranks that have not sent `Done` yet, by channel
        self._heard = 0.0  # when the command was sent, or the last reply came

    @property
    def pids(self) -> list[int]:
        """Process numbers of the ranks; known once they have answered a command."""
        self.check_open()
        return [self._pids[rank] for rank in range(self.world_size)]

    def dead_processes(self) -> list[str]:
        """Names of the processes that are known to have ended; none while all of them live, however slow they are.

        A process that ends closes its end of its channel, and the supervisor is a child of this process. This method
        opens no file, raises nothing, and may be called from any thread, also after `close`.
        """
        supervisor_ended = self._process.poll() is not None
        poller = select.poll()
        with self._channels_lock:  # otherwise `close` could free a descriptor here, and a new file could get its number
            for channel in self._channels:
                poller.register(channel, 0)  # a hang-up is always reported
            hung_up = {descriptor for descriptor, _ in poller.poll(0)}
            dead = [self._name(rank) for rank, channel in enumerate(self._channels) if channel.fileno() in hung_up]
            if supervisor_ended and not self._channels:
                dead = [self._name(rank) for rank in range(self.world_size)]
        if supervisor_ended:
            dead.append(f"the process that started the {self._role if self._role == 'decoder' else 'ranks'}")
        return dead

    @property
    def is_ours(self) -> bool:
        """Whether this process started the ranks, rather than one that it was forked from."""
        return self._owner == os.getpid()

    def check_owner(self) -> None:
        """Raise ForkError in a process that was forked from the one that started the ranks."""
        if not self.is_ours:
            raise ForkError(
                f"the engine belongs to process {self._owner}, and this is process {os.getpid()}, which was forked from it; "
                "load an engine in this process, or start it with multiprocessing's `spawn` method and load one there"
            )

    def check_open(self) -> None:
        """Raise EngineClosedError if the ranks have ended, and ForkError if they are another process's."""
        self.check_owner()
        if self._closed:
            raise EngineClosedError(f"the {self._role} processes have ended; load the bundle again")

    def send(self, command: Command | VaeCommand) -> None:
        """Send a command to every rank.

        Raises:
            RankError: a rank is gone.
            EngineClosedError: the ranks were closed before.
        """
        self.check_open()
        self._waiting = {channel: rank for rank, channel in enumerate(self._channels)}
        self._heard = time.monotonic()
        parts = packed(command)  # once, since a prompt's embeddings are megabytes
        for rank, channel in enumerate(self._channels):
            try:
                for part in parts:
                    channel.send_bytes(part)
            except BlockingIOError:
                self._fail_silent([rank], self.timeout_s)
            except OSError:
                self._fail(rank, None)

    def replies(self, *, at_least_s: float = 0.0) -> Iterator[tuple[int, Reply]]:
        """Yield replies as they come, until every rank has sent `Done`. The iteration may be paused and resumed.

        Args:
            at_least_s: seconds that the ranks have for this answer, even if `timeout_s` is shorter.

        Raises:
            RankError: a rank died, or nothing came for `timeout_s`.
            CausalRTError: the type that a rank raised, if it was one of ours.
        """
        waiting = self._waiting
        timeout_s = max(self.timeout_s, at_least_s)
        while waiting:
            self.check_open()
            ready = wait(list(waiting), timeout=timeout_s)
            if not ready:
                self._fail_silent(sorted(waiting.values()), timeout_s)
            for channel in ready:
                assert isinstance(channel, Connection)
                rank = waiting[channel]
                try:
                    reply: Reply = receive(channel)
                except BlockingIOError:
                    self._fail_silent([rank], timeout_s)
                except (EOFError, OSError):
                    self._fail(rank, None)
                self._heard = time.monotonic()
                if isinstance(reply, Failed):
                    self._fail(rank, reply)
                if isinstance(reply, Done):
                    self._pids[rank] = reply.pid
                    del waiting[channel]
                yield rank, reply

    def silent_s(self) -> float:
        """Seconds since the ranks last sent something while one of them owes an answer; 0.0 if none does.

        This method never waits and may be called from any thread. A rank whose answer is still unread owes none.
        """
        answered = select.poll()
        with self._channels_lock:
            heard, waiting = self._heard, [channel for channel in self._channels if channel in self._waiting]
            for channel in waiting:
                answered.register(channel, select.POLLIN)
            owing = len(waiting) - len(answered.poll(0))
        return time.monotonic() - heard if owing else 0.0

    def _name(self, *ranks: int) -> str:
        if self._role == "decoder":
            return "the decoder"
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"

    def _fail_silent(self, ranks: Sequence[int], timeout_s: float) -> NoReturn:
        tail = self._log_tail(ranks)
        self.close(kill=True)
        raise RankError(
            f"{self._name(*ranks)} gave no answer within {timeout_s:g} s (timeout_s); "
            "all ranks were ended, load the bundle again, with a longer timeout_s if a chunk takes so long",
            rank=ranks[0] if len(ranks) == 1 else None,
            log_tail=tail,
        )

    def _fail(self, rank: int, failed: Failed | None) -> NoReturn:
        """Raise the error of a rank that reported that it `failed`, or of one that died without a report (None)."""
        self.check_open()  # another thread may have ended the ranks
        rank, failed = self._first_failure(rank, failed)
        tail = self._log_tail([rank])
        self.close(kill=True)
        own = getattr(errors, failed.kind, None) if failed else None
        if failed and isinstance(own, type) and issubclass(own, CausalRTError) and own is not RankError:
            raise own(failed.message)
        what = f"raised {failed.kind}: {failed.message}" if failed else "has died"
        raise RankError(
            f"{self._name(rank)} {what}; all ranks were ended, load the bundle again", rank=rank, log_tail=tail
        )

    def _first_failure(self, rank: int, failed: Failed | None) -> tuple[int, Failed | None]:
        """Of the ranks that have failed by now, the one that died, or otherwise the one that raised first.

        The collectives of the others fail as a consequence, and their reports may be read first.
        """
        failures = {rank: failed}
        others = {channel: other for other, channel in enumerate(self._channels) if other != rank}
        while others and (ready := wait(list(others), timeout=CAUSE_S)):
            for channel in ready:
                assert isinstance(channel, Connection)
                try:
                    reply: Reply | None = receive(channel)
                except (EOFError, OSError):
                    reply = None
                if reply is None or isinstance(reply, Failed):
                    failures[others.pop(channel)] = reply
        return min(failures.items(), key=lambda item: item[1].at if item[1] else 0.0)

    def _log_tail(self, ranks: Sequence[int]) -> str:
        lines: list[str] = []
        start_log, *rank_logs = self._logs
        for log in (start_log, *(rank_logs[rank] for rank in ranks)):
            start = max(0, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES)
            lines += os.pread(log.fileno(), LOG_TAIL_BYTES, start).decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _close_logs(self) -> None:
        for log in self._logs:
            log.close()

    def close(self, *, kill: bool = False) -> None:
        """End the ranks: close the channels and wait, or kill at once. Calling it again has no effect."""
        if not self._channels or not self.is_ours:
            return
        self._closed = True
        with self._channels_lock:
            channels, self._channels = self._channels, []
        for channel in channels:
            _hang_up(channel)
        try:
            if not kill:
                self._process.wait(timeout=HANG_UP_S)
        except subprocess.TimeoutExpired:
            logger.warning("rank processes did not end when asked to; killing them")
        finally:
            self.kill()
            self._close_logs()

    def kill(self) -> None:
        """End the ranks at once, from any thread. A thread that waits for an answer gets an EngineClosedError."""
        if not self.is_ours:
            return
        self._closed = True
        self._process.terminate()
        try:
            self._process.wait(timeout=HANG_UP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
