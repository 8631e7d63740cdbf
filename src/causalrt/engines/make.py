"""Makes the executor of a bundle by name; the library of an executor is imported only when it is needed."""

import torch

from causalrt.engines.base import Collectives, Executor
from causalrt.engines.bundle import Bundle
from causalrt.engines.kinds import executor_kind


def make_executor(
    name: str,
    bundle: Bundle,
    collectives: Collectives,
    *,
    num_threads: int,
    device: torch.device,
    fused_ops: bool,
    cuda_graphs: bool = True,
) -> Executor:
    """Load the weights or graphs of a bundle into an executor.

    Args:
        name: name of the executor.
        bundle: opened bundle.
        collectives: exchange between the ranks.
        num_threads: number of threads of a rank on a CPU.
        device: device of this rank.
        fused_ops: eager and inductor run self-attention by the fused ops of `causalrt.plugins`; the others run what was built.
        cuda_graphs: whether inductor and TensorRT capture a step on a GPU.

    Raises:
        ExecutorError: the name is unknown, or something that the executor needs is missing here or in the bundle.
    """
    executor_kind(name)
    if name == "eager":
        from causalrt.engines.eager import EagerExecutor

        return EagerExecutor(bundle, collectives, device=device, fused_ops=fused_ops)
    if name == "inductor":
        from causalrt.engines.inductor import InductorExecutor

        return InductorExecutor(
            bundle, collectives, num_threads=num_threads, device=device, fused_ops=fused_ops, cuda_graphs=cuda_graphs
        )
    if name == "onnxruntime":
        from causalrt.engines.onnxruntime import OnnxRuntimeExecutor

        return OnnxRuntimeExecutor(bundle, collectives, num_threads=num_threads, device=device)
    from causalrt.engines.tensorrt import TensorRTExecutor
    from causalrt.engines.tensorrt_flavour import FLAVOURS

    return TensorRTExecutor(FLAVOURS[name], bundle, collectives, device=device, cuda_graphs=cuda_graphs)
