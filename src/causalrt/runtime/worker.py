"""The rank processes: `python -m causalrt.runtime.worker` imports everything once and forks one process a rank.

Each rank serves commands from its own socket until the caller closes it, and writes what it logs to a file of its own,
whose tail explains a failure. The process that forked them stays as their keeper: it reaps them, ends them when told to,
and ends them and removes their folder when the caller has gone without a word. When the keeper dies, the kernel ends
the ranks.
"""

import argparse
import ctypes
import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from causalrt.engines.base import Executor, make_executor
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.kinds import executor_kind
from causalrt.runtime.collectives import LocalCollectives, TorchCollectives
from causalrt.runtime.memory import check_device_memory, predict_memory
from causalrt.runtime.messages import (
    ChunkCommand,
    CloseCommand,
    Command,
    Done,
    Failed,
    GivenCommand,
    Latents,
    LoadCommand,
    OpenCommand,
    PromptCommand,
    receive,
    send,
)
from causalrt.runtime.rollout import Rollout
from causalrt.runtime.session_memory import SessionMemories
from causalrt.runtime.warm_up import warm_up

logger = logging.getLogger("causalrt.worker")
PR_SET_PDEATHSIG = 1
KEEPER_SIGNALS = {signal.SIGCHLD, signal.SIGTERM}
ORPHAN_CHECK_S = 0.5


class RankServer:
    """Executes commands on one rank."""

    def __init__(self, rank: int, world_size: int, folder: Path, channel: "Connection[Any, Any]") -> None:
        self._rank, self._world_size = rank, world_size
        self._folder = folder
        self._channel = channel
        self._sessions: dict[int, Rollout] = {}
        self._bundle: Bundle
        self._executor: Executor
        self._collectives: LocalCollectives | TorchCollectives
        self._memories: SessionMemories

    def serve(self) -> int:
        """Answer commands until the caller hangs up (0) or one of them raises (1)."""
        while True:
            try:
                command: Command = receive(self._channel)
            except EOFError:
                return 0
            try:
                send(self._channel, self._run(command))
            except Exception as error:
                logger.exception("rank %d failed", self._rank)
                send(self._channel, Failed(kind=type(error).__name__, message=str(error)))
                return 1

    def _run(self, command: Command) -> Done:
        match command:
            case LoadCommand():
                self._load(command)
            case OpenCommand():
                self._sessions[command.session] = Rollout(
                    self._executor,
                    self._collectives,
                    self._bundle.config,
                    self._bundle.layout,
                    text=command.text,
                    noise=command.noise,
                    memory=self._memories.take(),
                )
            case ChunkCommand():
                rollout = self._sessions[command.session]
                times, records = rollout.chunk(
                    command.index,
                    refresh=command.refresh,
                    record=command.record,
                    deliver=lambda rows, times: send(self._channel, Latents(rows=rows, times=times)),
                )
                return Done(times=times, records=tuple(records), kv_rows_moved=rollout.slots.rows_moved)
            case GivenCommand():
                given = self._sessions[command.session].take_given(command.rows, record=command.record)
                return Done(records=tuple(given))
            case PromptCommand():
                self._sessions[command.session].switch_prompt(command.text, command.policy)
            case CloseCommand():
                closed = self._sessions.pop(command.session, None)
                if closed is not None:
                    self._memories.give_back(closed.memory)
        return Done()

    def _load(self, command: LoadCommand) -> None:
        torch.set_num_threads(command.num_threads)
        device = torch.device(command.device, self._rank) if command.device == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(stream)  # on the default one, TensorRT would wait for the device
        self._bundle = open_bundle(command.bundle, verify=False)
        if device.type == "cuda":
            check_device_memory(predict_memory(self._bundle.config, command.executor, device="cuda"), device)
        if self._world_size > 1:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                device_id=device if device.type == "cuda" else None,
                init_method=f"file://{self._folder / 'rendezvous'}",
                rank=self._rank,
                world_size=self._world_size,
                timeout=timedelta(seconds=command.timeout_s),
            )
            self._collectives = TorchCollectives()
        else:
            self._collectives = LocalCollectives()
        self._executor = make_executor(
            command.executor,
            self._bundle,
            self._collectives,
            num_threads=command.num_threads,
            device=device,
            plugins=command.plugins,
        )
        self._memories = SessionMemories(self._executor, self._bundle.config, self._bundle.layout)
        if executor_kind(command.executor).warms_up:
            warm_up(self._executor, self._bundle.config, self._bundle.layout, self._memories)
        logger.info("rank %d of %d ready: %s on %s", self._rank, self._world_size, command.executor, device)


def _die_with_keeper(keeper: int) -> None:
    """Have the kernel kill this process when the keeper ends, however it ends.

    Not for the keeper itself: the signal comes when the parent's *thread* ends, and the caller may load in one that does.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)


def _run_rank(rank: int, descriptors: list[int], folder: Path, keeper: int) -> int:
    _die_with_keeper(keeper)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, KEEPER_SIGNALS)
    for other, descriptor in enumerate(descriptors):
        if other != rank:
            os.close(descriptor)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    try:
        return RankServer(rank, len(descriptors), folder, Connection(descriptors[rank])).serve()
    except OSError:
        logger.info("rank %d: the caller is gone", rank)
        return 0


def _keep(ranks: set[int], *, parent: int, folder: Path) -> None:
    """Reap the ranks until all have ended. Their folder is the caller's to remove, unless nobody will ask for a log."""
    all_hung_up = True
    while ranks:
        told = signal.sigtimedwait(KEEPER_SIGNALS, ORPHAN_CHECK_S)
        if os.getppid() != parent or (told is not None and told.si_signo == signal.SIGTERM):
            for pid in ranks:  # not reaped yet, so the numbers are still theirs
                os.kill(pid, signal.SIGKILL)
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ranks.remove(pid)
            all_hung_up &= status == 0
    if all_hung_up or os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Fork the ranks and keep them; `--channels` are inherited socket descriptors, one a rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, KEEPER_SIGNALS)
    descriptors = [int(d) for d in arguments.channels.split(",")]
    assert threading.active_count() == 1, "a fork needs a single thread"
    here, ranks = os.getpid(), set[int]()
    for rank in range(len(descriptors)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _run_rank(rank, descriptors, arguments.folder, here)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.add(pid)
    for descriptor in descriptors:
        os.close(descriptor)
    _keep(ranks, parent=arguments.parent, folder=arguments.folder)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a caller's close() waits for this, and unloading torch would take a third of a second
