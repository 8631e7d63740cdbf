"""The streaming decoder's two graphs under ONNX Runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from causalrt.engines.base import ONNX_TYPES
from causalrt.engines.bundle import FIRST_GRAPH, NEXT_GRAPH
from causalrt.engines.onnxruntime_cuda import CPU, check_cuda, cuda_providers
from causalrt.engines.vae import GraphTensor, GraphVae, missing_graphs
from causalrt.errors import BundleError, ExecutorError

_TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(float16)": torch.float16,
}


class OnnxVae(GraphVae):
    """The decoder of a bundle, for any number of sessions."""

    def __init__(self, folder: Path, *, device: str | torch.device = "cpu", num_threads: int = 1) -> None:
        """Load the graphs.

        Args:
            folder: a bundle's.
            device: a CPU or a GPU.
            num_threads: of each graph, on a CPU.

        Raises:
            BundleError: the bundle has no such graphs.
            ExecutorError: ONNX Runtime cannot run them here.
        """
        device = torch.device(device)
        if missing := missing_graphs(folder):
            raise BundleError(f"{folder} lacks {', '.join(missing)}; build the bundle with `--vae FILE`")
        self._graphs = [_open(folder / name, device, num_threads) for name in (FIRST_GRAPH, NEXT_GRAPH)]
        self._options = ort.RunOptions()
        if device.type == "cuda":
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        super().__init__(
            device,
            inputs=_tensors(self._graphs[1].get_inputs()),
            outputs=[_tensors(graph.get_outputs()) for graph in self._graphs],
        )

    def bind(self, graph: int, memory: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """See `GraphVae.bind`."""
        session = self._graphs[graph]
        binding = session.io_binding()
        for name, tensor in memory.items():
            bind = binding.bind_output if name in self.outputs[graph] else binding.bind_input
            kind, sizes = ONNX_TYPES[tensor.dtype], list(tensor.shape)
            bind(name, self.device.type, self.device.index or 0, kind, sizes, tensor.data_ptr())
        return lambda: session.run_with_iobinding(binding, self._options)


def _open(path: Path, device: torch.device, num_threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # two graphs, of which one rests
    on_gpu = device.type == "cuda"
    providers = cuda_providers(options, device, cudnn_conv_use_max_workspace="0") if on_gpu else [CPU]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime has a class for every status, and no common one
        raise ExecutorError(
            f"onnxruntime {ort.__version__} cannot run {path.name} on {device}: {str(error).splitlines()[0]}; "
            "on a CPU, build the VAE in float32"
        ) from error
    if on_gpu:
        check_cuda(session)
    return session


def _tensors(values: list[Any]) -> dict[str, GraphTensor]:
    return {value.name: GraphTensor(shape=tuple(value.shape), dtype=_TORCH_TYPES[value.type]) for value in values}
