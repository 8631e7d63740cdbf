"""CUDA graphs of a step: captured once for each memory and number of KV rows, replayed afterwards.

A graph holds addresses, not tensors, and stays right for as long as the same memory means the same things. It is kept under a
key that is the same on every rank, and not under its addresses: a capture runs the step's collectives twice and a replay once,
so ranks that decided differently would wait for each other for ever.
"""

import logging
from collections.abc import Callable

import torch

from causalrt.errors import ExecutorError

logger = logging.getLogger(__name__)
Key = tuple[int, int, int]
"""Number of the session's memory, number of the step, and rows of the filled prefix (0 where one graph serves all of them)."""


class CudaGraphs:
    """Graphs by key. On a CPU, or when switched off, work is simply run.

    Every graph is kept: there are as many as session memories times KV lengths, and the memories are bounded (`max_sessions`).

    Attributes:
        enabled: work is captured.
        held_bytes: memory of the GPU that the driver took for the graphs captured so far; the pool is not part of it.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self._device = device
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.held_bytes = 0
        self._addresses: dict[int, tuple[int, ...]] = {}
        # They run one after another, and can share memory: that of one pool, which torch keeps by the stream it was taken on.
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._side = torch.cuda.Stream(device) if self.enabled else None  # type: ignore[no-untyped-call]

    def bind(self, memory: int, addresses: tuple[int, ...]) -> None:
        """Say where the memory of this number lies; graphs of another one that had the number are dropped."""
        if self._addresses.get(memory, addresses) != addresses:
            for key in [key for key in self._graphs if key[0] == memory]:
                del self._graphs[key]
        self._addresses[memory] = addresses

    def run(self, key: Key, work: Callable[[], None]) -> None:
        """Do `work`: on a new key run it, then capture it; on a known one replay.

        Collective: `work` may hold collectives, for every rank sees the same keys in the same order. It must read and write
        memory at fixed addresses only, must give the same result when run twice, must leave nothing in memory that it
        allocates (the graphs share it), and must not wait for the device.
        """
        side = self._side
        if side is None:
            work()
            return
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):  # lazy set-up (workspaces, compilation, communicators) must not be captured
            work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        before = self._driver_bytes()
        graph = self._capture(work, side)
        self._graphs[key] = graph
        graph.replay()
        self.held_bytes += max(0, self._driver_bytes() - before)
        logger.info("captured CUDA graph %d, %.1f MiB in all", len(self._graphs), self.held_bytes / 2**20)

    def _driver_bytes(self) -> int:
        """What is taken of the GPU beside the memory that torch's allocator holds."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def _capture(self, work: Callable[[], None], side: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        failure: BaseException | None = None
        # A capture that fails leaves torch on the side stream, and ends in an error of its own that hides the first.
        with torch.cuda.stream(torch.cuda.current_stream(self._device)):
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    try:
                        work()
                    except BaseException as error:
                        failure = error
                        raise
            except Exception as error:
                cause = failure or error
                if not isinstance(cause, Exception):
                    raise cause from None
                raise ExecutorError(
                    f"the step cannot be captured as a CUDA graph ({type(cause).__name__}: {cause}); run it without: "
                    "`--cuda-graphs off` on the command line, or `causalrt.load(..., cuda_graphs=False)`"
                ) from cause
        return graph
