"""The stream and the arena of memory that all ONNX Runtime sessions share on a GPU."""

import functools
from typing import Any

import onnxruntime as ort
import torch

from causalrt.errors import ExecutorError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_SAME_AS_REQUESTED = 1
"""`ArenaExtendStrategy` of ONNX Runtime; by default an arena grows to the next power of two."""


def cuda_providers(options: ort.SessionOptions, device: torch.device, **settings: str) -> list[Any]:
    """Complete the `options` of a session on a GPU and return its execution providers.

    Nodes for which CUDA has no kernel run on the CPU.

    Raises:
        ExecutorError: CUDA does not start, or the current stream is the default one.
    """
    handle, index = torch.cuda.current_stream(device).cuda_stream, device.index or 0
    if not handle:
        raise ExecutorError(
            f"onnxruntime cannot share the default stream of {device}: it takes the handle 0 for no stream, and would read its "
            "inputs before they are written; open and run it inside `with causalrt.engines.streams.own_stream(device):`"
        )
    try:
        _register_arena(CUDA, "Cuda", index)
    except RuntimeError as error:
        raise _cannot_start(str(error).splitlines()[0]) from error
    options.add_session_config_entry("session.use_env_allocators", "1")
    cuda = {"device_id": str(index), "user_compute_stream": str(handle), "use_tf32": "0", **settings}
    return [(CUDA, cuda), CPU]


def check_cuda(session: ort.InferenceSession) -> None:
    """Check that a session runs on the GPU.

    Raises:
        ExecutorError: it has fallen back to the CPU.
    """
    if CUDA not in session.get_providers():
        raise _cannot_start("it fell back to the CPU")


@functools.cache
def _register_arena(provider: str, memory: str, index: int) -> None:
    """Register the shared arena: with arenas of their own, sessions would each keep the most memory that they ever took."""
    where = ort.OrtMemoryInfo(memory, ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, index, ort.OrtMemType.DEFAULT)
    arena = ort.OrtArenaCfg({"arena_extend_strategy": _SAME_AS_REQUESTED})
    ort.create_and_register_allocator_v2(provider, where, {"device_id": str(index)}, arena)


def _cannot_start(why: str) -> ExecutorError:
    return ExecutorError(
        f"onnxruntime could not start CUDA ({why}); its CUDA or cuDNN libraries do not load here: install the onnxruntime-gpu "
        "that fits this CUDA, or load with device='cpu'"
    )
