"""Starting, talking to, and ending the rank processes, from the caller's side.

One socket a rank; a command goes to every rank in the same order. A rank that dies closes its socket, which is seen
at once; one that hangs is seen when `timeout_s` has passed. Either way all ranks are killed and the caller gets one
RankError.

The caller's only child is the keeper (`worker.py`), which forks the ranks and reaps them: none is left as a zombie.
"""

import logging
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NoReturn

from causalrt import errors
from causalrt.errors import CausalRTError, EngineClosedError, RankError
from causalrt.runtime.messages import Command, Done, Failed, Reply, VaeCommand, receive, send

logger = logging.getLogger(__name__)
LOG_TAIL_LINES = 40
START_S = 120.0
"""How long the ranks may take to import, load weights and prepare graphs, however short `timeout_s` is."""
WARM_START_S = 1800.0
"""The same with an executor that compiles what it runs."""
HANG_UP_S = 5.0
"""How long the ranks may take to end by themselves, and the keeper to end them."""
CAUSE_S = 0.2
"""How long to look, once a rank has failed, for one that failed before it and took it along."""


class RankPool:
    """P rank processes, or the decoder's one; warm until closed."""

    def __init__(self, world_size: int, *, timeout_s: float, role: Literal["rank", "decoder"] = "rank") -> None:
        self._role = role
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._owner = os.getpid()
        self._folder = Path(tempfile.mkdtemp(prefix="causalrt-"))
        self._closed = False
        limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        pairs: list[tuple[socket.socket, socket.socket]] = []
        try:
            pairs.extend(socket.socketpair() for _ in range(world_size))
            # Modules are found where the caller finds them, and not in its working directory (-P). The step's own threads
            # are set by the load command; the environment keeps gloo on this host.
            with (self._folder / "start.log").open("wb") as log:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "causalrt.runtime.worker"),
                        *("--role", role, "--channels", ",".join(str(theirs.fileno()) for _, theirs in pairs)),
                        *("--folder", str(self._folder), "--parent", str(self._owner)),
                    ],
                    pass_fds=[theirs.fileno() for _, theirs in pairs],
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                        "GLOO_SOCKET_IFNAME": "lo",
                        "OMP_WAIT_POLICY": "passive",
                    },
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            for ours, _ in pairs:
                ours.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise RankError(f"cannot start {world_size} {role} process(es): {error}") from error
        finally:
            for _, theirs in pairs:
                theirs.close()
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
        return [int((self._folder / f"rank{rank}.pid").read_text()) for rank in range(self.world_size)]

    def check_open(self) -> None:
        """Raise EngineClosedError if the ranks have ended."""
        if self._closed:
            raise EngineClosedError(f"the {self._role} processes have ended; load the bundle again")

    def send(self, command: Command | VaeCommand) -> None:
        """Give every rank a command.

        Raises:
            RankError: a rank is gone.
            EngineClosedError: the ranks were closed before.
        """
        self.check_open()
        self._waiting = {channel: rank for rank, channel in enumerate(self._channels)}
        self._heard = time.monotonic()
        for rank, channel in enumerate(self._channels):
            try:
                send(channel, command)
            except BlockingIOError:
                self._fail_silent([rank], self.timeout_s)
            except OSError:
                self._fail(rank, None)

    def replies(self, *, at_least_s: float = 0.0) -> Iterator[tuple[int, Reply]]:
        """Replies as they come, until every rank has sent `Done`; may be left and taken up again in between.

        Args:
            at_least_s: time that the ranks have for this answer, however short `timeout_s` is.

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
                    del waiting[channel]
                yield rank, reply

    def dead_processes(self) -> list[str]:
        """Names of the processes that have ended: a rank's socket is hung up by its end alone."""
        hung_up = select.poll()
        ranks = dict(enumerate(self._channels))
        try:
            for channel in ranks.values():
                hung_up.register(channel, 0)
            descriptors = {descriptor for descriptor, _ in hung_up.poll(0)}
            dead = [self._name(rank) for rank, channel in ranks.items() if channel.fileno() in descriptors]
        except (OSError, ValueError):  # the ranks are being ended
            dead = []
        return dead + ([f"the keeper of {self._role} processes"] if self._process.poll() is not None else [])

    def silent_s(self) -> float:
        """Seconds since the ranks were last heard of, while one of them owes an answer; 0.0 if none does.

        Never waits, and may be called from any thread. A rank whose answer lies unread in its channel owes none.
        """
        heard, waiting, answered = self._heard, list(self._waiting), select.poll()
        try:
            for channel in waiting:
                answered.register(channel, select.POLLIN)
            owing = len(waiting) - len(answered.poll(0))
        except (OSError, ValueError):  # the ranks are being ended
            return 0.0
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
            "all ranks were ended, load the bundle again",
            rank=ranks[0] if len(ranks) == 1 else None,
            log_tail=tail,
        )

    def _fail(self, rank: int, failed: Failed | None) -> NoReturn:
        """Raise for a rank that said that it `failed`, or that died without a word (None)."""
        self.check_open()  # it was another thread that ended the ranks
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
        """Of the ranks that have failed by now, the one that died, or else the one that raised first.

        The collectives of the others fail right after it, and their word may be read first.
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
        for name in ("start.log", *(f"rank{rank}.log" for rank in ranks)):
            try:
                lines += (self._folder / name).read_text(errors="replace").splitlines()
            except OSError:
                continue
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def close(self, *, kill: bool = False) -> None:
        """End the ranks: hang up and wait, or kill at once. Harmless when called again."""
        if not self._channels or self._owner != os.getpid():  # a fork of the caller has no say over them
            return
        self._closed = True
        channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()
        try:
            if not kill:
                self._process.wait(timeout=HANG_UP_S)
        except subprocess.TimeoutExpired:
            logger.warning("rank processes did not end when asked to; killing them")
        finally:
            self.kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End the ranks at once, from any thread; one that waits for an answer gets an EngineClosedError."""
        self._closed = True
        self._process.terminate()
        try:
            self._process.wait(timeout=HANG_UP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
