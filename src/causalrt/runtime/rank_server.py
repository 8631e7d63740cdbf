"""The work of a rank: it holds an executor and the sessions' memory, and runs the commands that every rank gets."""

import logging
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from causalrt.engines.base import TORCH_DTYPES, Executor
from causalrt.engines.bundle import Bundle, reopen_bundle
from causalrt.engines.kinds import warms_up
from causalrt.engines.make import make_executor
from causalrt.engines.streams import own_stream
from causalrt.errors import RequestError
from causalrt.runtime.canary import check_exchanges
from causalrt.runtime.collectives import LocalCollectives, TorchCollectives, join_ranks
from causalrt.runtime.memory import (
    check_device_memory,
    device_free_bytes,
    is_out_of_memory,
    predict_memory,
    rank_memory,
)
from causalrt.runtime.messages import (
    CheckExchangesCommand,
    ChunkCommand,
    CloseCommand,
    Command,
    Done,
    InitialChunkCommand,
    Latents,
    LoadCommand,
    OpenCommand,
    PromptCommand,
    Refused,
    ResumeCommand,
    SaveCommand,
    UsageCommand,
    out_of_memory,
    send,
)
from causalrt.runtime.rollout import Rollout
from causalrt.runtime.session_buffers import SessionBufferPool
from causalrt.runtime.snapshot import rank_file
from causalrt.runtime.usage import Usage, WaitCounter
from causalrt.runtime.warm_up import warm_up

logger = logging.getLogger("causalrt.worker")


class RankServer:
    """Runs the commands on one rank."""

    def __init__(self, rank: int, world_size: int, rendezvous: str, channel: "Connection[Any, Any]") -> None:
        self._rank, self._world_size = rank, world_size
        self._rendezvous = rendezvous
        self._channel = channel
        self._sessions: dict[int, Rollout] = {}
        self._bundle: Bundle
        self._executor: Executor
        self._collectives: LocalCollectives | TorchCollectives
        self._buffers: SessionBufferPool
        self._waits: WaitCounter

    def run(self, command: Command) -> Done:
        """Run a command and return its last answer."""
        match command:
            case LoadCommand():
                return self._load(command)
            case OpenCommand():
                try:
                    self._open(command)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    logger.warning("no memory for session %d: %s", command.session, error)
                    send(self._channel, out_of_memory(f"rank {self._rank}", error))
            case ChunkCommand():
                rollout = self._sessions[command.session]
                times, records = rollout.chunk(
                    command.index,
                    frame=command.frame,
                    context_pass=command.context_pass,
                    record=command.record,
                    draw_next=command.draw_next,
                    deliver=lambda rows, times: send(self._channel, Latents(rows=rows, times=times)),
                )
                return Done(times=times, records=tuple(records), kv_rows_moved=rollout.slots.rows_moved)
            case InitialChunkCommand():
                records = self._sessions[command.session].take_initial(command.rows, record=command.record)
                return Done(records=tuple(records))
            case PromptCommand():
                self._sessions[command.session].switch_prompt(command.text, command.policy)
            case SaveCommand() | ResumeCommand():
                rollout, path = self._sessions[command.session], command.folder / rank_file(self._rank)
                try:
                    if isinstance(command, SaveCommand):
                        rollout.save(path)
                    else:
                        rollout.load(path, frame=command.frame, sha256=command.files[path.name])
                except RequestError as error:
                    send(self._channel, Refused(kind=type(error).__name__, message=str(error)))
            case UsageCommand():
                return Done(usage=self._usage(command))
            case CheckExchangesCommand():
                config = self._bundle.config
                dtype = TORCH_DTYPES[config.build.precision]
                return Done(
                    exchanges=check_exchanges(self._collectives, config, dtype=dtype, device=self._executor.device)
                )
            case CloseCommand():
                closed = self._sessions.pop(command.session, None)
                if closed is not None:
                    self._buffers.give_back(closed.buffers, opened=command.opened)
                if not command.opened:
                    del closed
                    torch.cuda.empty_cache()  # for the decoder, whose process may share the GPU
        return Done()

    def _open(self, command: OpenCommand) -> None:
        buffers = self._buffers.take()
        try:
            self._sessions[command.session] = Rollout(
                self._executor,
                self._collectives,
                self._bundle.config,
                self._bundle.layout,
                text=command.text,
                noise=command.noise,
                buffers=buffers,
            )
        except BaseException:
            self._buffers.give_back(buffers, opened=False)
            raise

    def _load(self, command: LoadCommand) -> Done:
        torch.set_num_threads(command.num_threads)
        device = torch.device(command.device, self._rank) if command.device == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        own_stream(device).__enter__()  # until the process ends
        self._bundle = reopen_bundle(command.bundle, command.digest)
        if device.type == "cuda":
            check_device_memory(rank_memory(self._bundle, command.executor, device="cuda"), device)
        if self._world_size > 1:
            join_ranks(
                self._rendezvous,
                self._rank,
                self._world_size,
                device=device,
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
            fused_ops=command.fused_ops,
            cuda_graphs=command.cuda_graphs,
        )
        self._buffers = SessionBufferPool(self._executor, self._bundle.config, self._bundle.layout)
        self._waits = WaitCounter(device)
        if warms_up(command.executor, device.type):
            warm_up(self._executor, self._collectives, self._bundle.config, self._bundle.layout, self._buffers)
        logger.info("rank %d of %d ready: %s on %s", self._rank, self._world_size, command.executor, device)
        free_bytes, graph_bytes = device_free_bytes(device), self._executor.graph_bytes()
        if free_bytes is not None:  # the next session reuses the buffers and graphs of the warm-up's session
            kept = predict_memory(self._bundle.config, command.executor).session_bytes + graph_bytes
            free_bytes += self._buffers.num_free * kept
        return Done(free_bytes=free_bytes, graph_bytes=graph_bytes)

    def _usage(self, command: UsageCommand) -> Usage:
        device, waits = self._executor.device, self._waits.end()
        if command.count_waits:
            self._waits.begin()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Usage(peak_device_bytes=peak, device_waits=waits)
