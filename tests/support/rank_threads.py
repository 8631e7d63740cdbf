"""P ranks as P threads of one process, each with what an engine takes for its NCCL communicator."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from causalrt.proof import ranks
from causalrt.proof.ranks import ThreadGroup, run_threads, thread_group
from causalrt.runtime.collectives import CAPSULE_NAME, capsule
from support.tensorrt_stand_in import communicator_handle

Result = TypeVar("Result")


class NcclDouble:
    """A rank's communicator, as the stand-in engine sees it."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank, self.world_size = rank, group.world_size
        self.joined = 0
        self.exchanges = 0

    def join(self) -> None:
        self._group.show(self.rank, None, lambda shown: None)
        self.joined += 1

    def all_to_all(self, received: np.ndarray, sent: np.ndarray) -> None:
        assert len(sent) == self.world_size

        def take(shown: Sequence[np.ndarray]) -> None:
            for source, blocks in enumerate(shown):
                received[source] = blocks[self.rank]

        self._group.show(self.rank, sent, take)
        self.exchanges += 1


class ThreadCollectives(ranks.ThreadCollectives):
    """`Collectives` between threads."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        super().__init__(group, rank)
        self.nccl = NcclDouble(group, rank)
        self._handle = communicator_handle(self.nccl)

    def communicator(self) -> object:
        return capsule(self._handle, CAPSULE_NAME)


def run_ranks(world_size: int, work: Callable[[ThreadCollectives], Result]) -> list[Result]:
    """`work` on every rank, each in a thread; the results in rank order, or the error of the rank that failed first."""
    group, collectives = thread_group(world_size, ThreadCollectives)
    return run_threads(group, lambda rank: work(collectives[rank]))
