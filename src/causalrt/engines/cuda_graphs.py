"""CUDA graphs of a step: captured once for each set of session buffers and number of KV rows, and replayed afterwards.

A graph holds addresses, not tensors, and stays valid while the same tensors lie there. Graphs are kept under keys that are the
same on every rank, and not under addresses: a capture runs the step's collectives twice and a replay runs them once, so ranks
that decided differently would wait for each other forever.
"""

import logging
from collections.abc import Callable

import torch

from causalrt.errors import ExecutorError

logger = logging.getLogger(__name__)
Key = tuple[int, int, int]
"""Number of the session's buffers, number of the step, and rows of the filled prefix (0 where one graph serves all of them)."""


class CudaGraphs:
    """Captures work as CUDA graphs and replays it. On a CPU, or when switched off, it runs the work directly.

    All graphs are kept. Their number is that of session buffers, which `max_sessions` bounds, times that of KV lengths.

    Attributes:
        enabled: whether work is captured.
        held_bytes: GPU memory that the driver took for the graphs captured so far, without the pool.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self._device = device
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.held_bytes = 0
        self._addresses: dict[int, tuple[int, ...]] = {}
        # Graphs run one after another and so share the memory of one pool, which torch keeps by the stream it was taken on.
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._side = torch.cuda.Stream(device) if self.enabled else None  # type: ignore[no-untyped-call]

    def bind(self, buffers_id: int, addresses: tuple[int, ...]) -> None:
        """Record where the buffers of this number lie; drop the graphs of other buffers that had the number."""
        if self._addresses.get(buffers_id, addresses) != addresses:
            for key in [key for key in self._graphs if key[0] == buffers_id]:
                del self._graphs[key]
        self._addresses[buffers_id] = addresses

    def run(self, key: Key, work: Callable[[], None]) -> None:
        """Do `work`: run and capture it under a new key, replay it under a known one.

        Collective: `work` may contain collectives, since every rank sees the same keys in the same order. It must read and
        write memory at fixed addresses only, must give the same result when run twice, must leave nothing in memory that it
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
        """GPU memory in use beside what torch's allocator holds."""
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
