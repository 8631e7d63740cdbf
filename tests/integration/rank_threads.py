"""P ranks as P threads of one process: what they exchange, and how they are run."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from tensorrt_stand_in import communicator_handle

from causalrt.runtime.collectives import CAPSULE_NAME, Traffic, capsule

Result = TypeVar("Result")
WAIT_S = 60.0


class Meeting:
    """Where ranks show each other what they have. One that fails breaks it up for all."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=WAIT_S)
        self._shown: list[Any] = [None] * world_size

    def show(self, rank: int, thing: Any, use: Callable[[Sequence[Any]], Any]) -> Any:
        """`use` what all ranks have shown; nobody goes on before everybody has."""
        self._shown[rank] = thing
        self._barrier.wait()
        try:
            return use(self._shown)
        finally:
            self._barrier.wait()

    def break_up(self) -> None:
        self._barrier.abort()


class NcclDouble:
    """A rank's communicator, as the stand-in engine sees it."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank, self.world_size = rank, meeting.world_size
        self.joined = 0
        self.exchanges = 0

    def join(self) -> None:
        self._meeting.show(self.rank, None, lambda shown: None)
        self.joined += 1

    def all_to_all(self, received: np.ndarray, sent: np.ndarray) -> None:
        assert len(sent) == self.world_size

        def take(shown: Sequence[np.ndarray]) -> None:
            for source, blocks in enumerate(shown):
                received[source] = blocks[self.rank]

        self._meeting.show(self.rank, sent, take)
        self.exchanges += 1


class ThreadCollectives:
    """`Collectives` between threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank = rank
        self._meeting = meeting
        self._traffic = Traffic()
        self.nccl = NcclDouble(meeting, rank)
        self._handle = communicator_handle(self.nccl)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        assert received.shape == sent.shape
        assert received.is_contiguous()
        assert sent.is_contiguous()

        def take(shown: Sequence[torch.Tensor]) -> None:
            for source, blocks in enumerate(shown):
                received[source].copy_(blocks[self.rank])

        self._meeting.show(self.rank, sent, take)
        self._traffic.all_to_all_calls += 1
        self._traffic.rows_sent += sent.shape[0] * sent.shape[1]

    def communicator(self) -> object:
        return capsule(self._handle, CAPSULE_NAME)

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        return self._meeting.show(self.rank, rows, lambda shown: torch.cat(list(shown)) if self.rank == 0 else None)

    def take_traffic(self) -> Traffic:
        taken, self._traffic = self._traffic, Traffic()
        return taken


def run_ranks(world_size: int, work: Callable[[ThreadCollectives], Result]) -> list[Result]:
    """`work` on every rank, each in a thread; the results in rank order, or the error of the rank that failed first."""
    meeting = Meeting(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadCollectives(meeting, rank))
        except BaseException as error:
            errors.append(error)
            meeting.break_up()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
