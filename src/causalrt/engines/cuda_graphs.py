"""CUDA graphs of a step: captured once for each set of addresses, replayed afterwards.

A graph holds addresses, not tensors. It stays right for as long as the same memory means the same things, so it is kept under
the addresses that it was captured with; memory that is freed and handed out again to the next session finds its graph again.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)
MAX_GRAPHS = 64


class CudaGraphs:
    """Graphs by key, the least recently used one dropped first. On a CPU, or when switched off, work is simply run."""

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self._device = device
        self.enabled = enabled and device.type == "cuda"
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        # They run one after another, and can share memory: that of one pool, which torch keeps by the stream it was taken on.
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._side = torch.cuda.Stream(device) if self.enabled else None  # type: ignore[no-untyped-call]

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
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
            self._graphs.move_to_end(key)
            graph.replay()
            return
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):  # lazy set-up (workspaces, compilation, communicators) must not be captured
            work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            work()
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        logger.info("captured CUDA graph %d", len(self._graphs))
        graph.replay()
