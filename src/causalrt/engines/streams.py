"""The stream of this process on a GPU, to which executors queue all work from whatever thread."""

import contextlib
import threading

import torch

_lock = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def own_stream(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Have this thread queue its work on the process's own stream while the block runs; do nothing on a CPU.

    Executors are opened and run inside such a block. Every thread of the process gets the same stream, so what one thread has
    queued is done before what another one queues afterwards. On the default stream TensorRT would wait for the whole
    device in each step, and ONNX Runtime would queue its work on a stream of its own that nothing waits for.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    with _lock:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = _streams[device]
    chosen: contextlib.AbstractContextManager[None] = torch.cuda.stream(stream)
    return chosen
