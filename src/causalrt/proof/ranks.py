"""Ranks as threads of one process, so that what they exchange can be recorded, and replaced."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from causalrt.errors import ExecutorError
from causalrt.runtime.collectives import Traffic

Result = TypeVar("Result")
Ranked = TypeVar("Ranked")
WAIT_S = 600.0
"""A rank that the others wait for longer than this has failed."""


class ThreadGroup:
    """A barrier at which the ranks share objects. A rank that fails breaks it for all."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=WAIT_S)
        self._shown: list[Any] = [None] * world_size

    def show(self, rank: int, thing: Any, use: Callable[[Sequence[Any]], Any]) -> Any:
        """Call `use` with what every rank has shown; no rank continues before all have done so."""
        self._shown[rank] = thing
        self._barrier.wait()
        try:
            return use(self._shown)
        finally:
            self._barrier.wait()

    def break_up(self) -> None:
        """End every wait with an error."""
        self._barrier.abort()


class ThreadCollectives:
    """`Collectives` between threads."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.rank = rank
        self._group = group
        self._traffic = Traffic()

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """See `Collectives.all_to_all`."""
        assert received.shape == sent.shape
        assert received.is_contiguous()
        assert sent.is_contiguous()

        def take(shown: Sequence[torch.Tensor]) -> None:
            for source, blocks in enumerate(shown):
                received[source].copy_(blocks[self.rank])

        self._group.show(self.rank, sent, take)
        self._traffic.all_to_all_calls += 1
        self._traffic.rows_sent += sent.shape[0] * sent.shape[1]

    def communicator(self) -> object:
        """Threads have no communicator.

        Raises:
            ExecutorError: always.
        """
        raise ExecutorError(
            "an engine that exchanges by itself needs rank processes, each with a GPU; use `causalrt.load`"
        )

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """See `Collectives.gather`."""
        gathered: torch.Tensor | None = self._group.show(
            self.rank, rows, lambda shown: torch.cat(list(shown)) if self.rank == 0 else None
        )
        return gathered

    def take_traffic(self) -> Traffic:
        """Traffic since the last call."""
        taken, self._traffic = self._traffic, Traffic()
        return taken


def thread_group(world_size: int, make: Callable[[ThreadGroup, int], Ranked]) -> tuple[ThreadGroup, list[Ranked]]:
    """A group of ranks, and the collectives that `make` returns for each of them."""
    group = ThreadGroup(world_size)
    return group, [make(group, rank) for rank in range(world_size)]


def run_threads(group: ThreadGroup, work: Callable[[int], Result]) -> list[Result]:
    """Run `work` on every rank, each in a thread of its own; returns the results in rank order.

    Raises:
        BaseException: the error of the rank that failed first.
    """
    results: list[Any] = [None] * group.world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)
            group.break_up()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(group.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
