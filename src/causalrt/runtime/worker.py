"""The rank processes: `python -m causalrt.runtime.worker` imports everything once and forks one process for each rank.

Each rank serves commands from its own socket until the caller closes it, and writes what it logs to a file of its own,
whose tail explains a failure. The process that forked them stays as their supervisor: it reaps them, and ends them on SIGTERM
or when the caller has died. When the supervisor dies, the kernel ends the ranks. The decoder's process is of the same kind,
with a supervisor of its own.
"""

import argparse
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from causalrt.runtime.messages import Failed, receive, send
from causalrt.runtime.rank_server import RankServer
from causalrt.runtime.vae_server import VaeServer

logger = logging.getLogger("causalrt.worker")
PR_SET_PDEATHSIG = 1
SUPERVISOR_SIGNALS = {signal.SIGCHLD, signal.SIGTERM}
ORPHAN_CHECK_S = 0.5


Server = RankServer | VaeServer


def serve(server: Server, channel: "Connection[Any, Any]", name: str) -> int:
    """Answer commands until the caller hangs up (0) or one of them raises (1)."""
    while True:
        try:
            command: Any = receive(channel)
        except EOFError:
            return 0
        try:
            send(channel, server.run(command))
        except Exception as error:
            logger.exception("%s failed", name)
            send(channel, Failed(kind=type(error).__name__, message=str(error)))
            return 1


def _die_with_supervisor(supervisor: int) -> None:
    """Have the kernel kill this process when the supervisor ends, however it ends.

    The supervisor cannot use this for itself: the signal comes when the parent's *thread* ends, and the thread of the caller
    that loads an engine may end before the engine does.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)


def _run_rank(role: str, rank: int, descriptors: list[int], log: int, rendezvous: str, supervisor: int) -> int:
    _die_with_supervisor(supervisor)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISOR_SIGNALS)
    for other, descriptor in enumerate(descriptors):
        if other != rank:
            os.close(descriptor)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    channel: Connection[Any, Any] = Connection(descriptors[rank])
    name = role if role == "decoder" else f"rank {rank}"
    server = VaeServer(channel) if role == "decoder" else RankServer(rank, len(descriptors), rendezvous, channel)
    try:
        return serve(server, channel, name)
    except OSError:
        logger.info("%s: the caller is gone", name)
        return 0


def _supervise(ranks: set[int], *, parent: int) -> None:
    """Reap the ranks until all have ended."""
    ended = False
    while ranks:
        received = signal.sigtimedwait(SUPERVISOR_SIGNALS, ORPHAN_CHECK_S)
        if os.getppid() != parent or (received is not None and received.si_signo == signal.SIGTERM):
            ended = True
            for pid in ranks:  # not reaped yet, so the numbers are still theirs
                os.kill(pid, signal.SIGKILL)
        while ranks:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ranks.remove(pid)
    if ended and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # processes that the ranks have started, such as a compiler, are in the same group


def main() -> int:
    """Fork the ranks and supervise them; `--channels` and `--logs` are inherited descriptors, one for each rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels", required=True)
    parser.add_argument("--logs", required=True)
    parser.add_argument("--role", choices=("rank", "decoder"), required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISOR_SIGNALS)
    descriptors, logs = ([int(d) for d in given.split(",")] for given in (arguments.channels, arguments.logs))
    # The ranks find each other through a file without a name, which no other process can find, read or remove.
    rendezvous = f"/proc/self/fd/{os.memfd_create('causalrt-rendezvous')}"
    assert threading.active_count() == 1, "a fork needs a single thread"
    gc.freeze()  # no rank's garbage collection needs to go through what was imported, or to copy its pages
    here, ranks = os.getpid(), set[int]()
    for rank in range(len(descriptors)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _run_rank(arguments.role, rank, descriptors, logs[rank], rendezvous, here)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.add(pid)
    for descriptor in descriptors:
        os.close(descriptor)
    _supervise(ranks, parent=arguments.parent)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a caller's close() waits for this, and unloading torch would take a third of a second
