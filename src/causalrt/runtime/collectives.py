"""Collectives of one engine: nothing to exchange on one rank, torch.distributed on several.

Both count what they put on the wire and how long the caller waited, so that `rows exchanged` is observed and not computed
from the formula that it is checked against.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(slots=True)
class Traffic:
    """What a rank sent and waited for since the last `take`."""

    all_to_all_calls: int = 0
    rows_sent: int = 0
    wait_s: float = 0.0


class LocalCollectives:
    """One rank."""

    rank = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Never called: a step graph for one rank has no exchange."""
        raise AssertionError("one rank has nothing to exchange")

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """See `Collectives.gather`."""
        return rows

    def take_traffic(self) -> Traffic:
        """Nothing."""
        return Traffic()


class TorchCollectives:
    """The default process group of torch.distributed: gloo on CPUs, NCCL on GPUs."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        self._traffic = Traffic()

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """See `Collectives.all_to_all`."""
        start = time.perf_counter()
        dist.all_to_all_single(received, sent)
        traffic = self._traffic
        traffic.wait_s += time.perf_counter() - start
        traffic.all_to_all_calls += 1
        traffic.rows_sent += sent.shape[0] * sent.shape[1]

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """See `Collectives.gather`."""
        into = [torch.empty_like(rows) for _ in range(self._world_size)] if self.rank == 0 else None
        dist.gather(rows.contiguous(), into, dst=0)
        return None if into is None else torch.cat(into)

    def take_traffic(self) -> Traffic:
        """Traffic since the last call."""
        taken, self._traffic = self._traffic, Traffic()
        return taken
