"""The collectives between the ranks of an engine: torch.distributed, or nothing on a single rank.

They count the rows that are sent and the time that the caller waits, so that the amount of traffic is measured and can be
checked against the formula.
"""

import ctypes
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from causalrt.engines.base import Collectives
from causalrt.errors import ExecutorError

CAPSULE_NAME = b"ncclComm_t"
JOIN_TIMEOUT = timedelta(minutes=30)


def capsule(pointer: int, name: bytes) -> object:
    """A PyCapsule around a pointer; `name` must outlive it, and nothing is freed with it."""
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make(pointer, name, None)


@dataclass(slots=True)
class Traffic:
    """What a rank sent and waited for since the last `take`."""

    all_to_all_calls: int = 0
    rows_sent: int = 0
    wait_s: float = 0.0


class CountingCollectives(Collectives, Protocol):
    """`Collectives` that count their traffic."""

    def take_traffic(self) -> Traffic:
        """Traffic since the last call."""


class LocalCollectives:
    """The collectives of a single rank, which has no other to exchange with."""

    rank = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Never called: a step graph for one rank has no exchange."""
        raise AssertionError("one rank has nothing to exchange")

    def communicator(self) -> object:
        """Never called: an engine for one rank has no collective."""
        raise AssertionError("one rank has no communicator")

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """See `Collectives.gather`."""
        return rows

    def take_traffic(self) -> Traffic:
        """Return the traffic, which is always zero."""
        return Traffic()


def join_ranks(
    rendezvous: str | os.PathLike[str],
    rank: int,
    world_size: int,
    *,
    device: torch.device,
    timeout: timedelta = JOIN_TIMEOUT,
) -> None:
    """Join the ranks' processes in torch.distributed's default process group: gloo on CPUs, NCCL on GPUs.

    Args:
        rendezvous: path of an empty or missing file, the same for every rank. Unlike the URL of an `init_method`, it may have
            any characters.
        rank: number of this process.
        world_size: number of ranks.
        device: device of this rank.
        timeout: time limit for the ranks to find each other, and for every collective after that.
    """
    store = dist.FileStore(os.fspath(rendezvous), world_size)  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        device_id=device if on_gpu else None,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


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

    def communicator(self) -> object:
        """See `Collectives.communicator`: the communicator of torch's NCCL back end, which still owns it.

        Raises:
            ExecutorError: the back end is not NCCL, or this version of torch does not give access to its communicator.
        """
        if dist.get_backend() != "nccl":
            raise ExecutorError(f"an engine's collectives need NCCL, and the ranks were joined by {dist.get_backend()}")
        dist.barrier()  # the communicator is made by the first collective
        group = dist.group.WORLD
        assert group is not None
        backend = group._get_backend(torch.device("cuda"))
        pointer = backend._comm_ptr() if hasattr(backend, "_comm_ptr") else 0
        if not pointer:
            raise ExecutorError(
                f"torch {torch.__version__} does not give access to its NCCL communicator; install torch 2.9 or newer, "
                "or build with `--collectives runtime`"
            )
        return capsule(pointer, CAPSULE_NAME)

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        """See `Collectives.gather`."""
        into = [torch.empty_like(rows) for _ in range(self._world_size)] if self.rank == 0 else None
        dist.gather(rows.contiguous(), into, dst=0)
        return None if into is None else torch.cat(into)

    def take_traffic(self) -> Traffic:
        """Traffic since the last call."""
        taken, self._traffic = self._traffic, Traffic()
        return taken
