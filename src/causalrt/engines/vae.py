"""The streaming decoder's two graphs under ONNX Runtime, bound once to memory that a session owns.

    first:  latent           -> frames, caches A
    next:   latent, caches A -> frames, caches B
    next:   latent, caches B -> frames, caches A

A session has two sets of caches and three bindings; nothing is allocated or bound from chunk to chunk. (A graph may write a
cache before it has read the old one, so one set does not do.) The two time convolutions' caches of set A start as zeros, and
the first graph does not write them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from onnx import TensorProto

from causalrt.errors import BundleError, ExecutorError
from causalrt.model.decode_state import DecodeState, cache_name

FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS = "vae-first.onnx", "vae-next.onnx", "vae.safetensors"
LATENT, FRAMES = "latent", "frames"
WRITTEN = ".written"
"""Ending of the name of a cache that a graph makes."""

_ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
}
_TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(float16)": torch.float16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTensor:
    """An input or output of a graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> torch.Tensor:
        """Memory for it."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class OnnxVae:
    """The decoder of a bundle, for any number of sessions.

    Attributes:
        device: where it computes.
        latent: what it takes, one latent.
        caches: what a session keeps, twice.
    """

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
        self.device = torch.device(device)
        missing = [name for name in (FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise BundleError(f"{folder} lacks {', '.join(missing)}; build the bundle with a VAE")
        self.first, self.next = (_open(folder / name, self.device, num_threads) for name in (FIRST_GRAPH, NEXT_GRAPH))
        inputs = _tensors(self.next.get_inputs())
        self.latent = inputs.pop(LATENT)
        self.caches = [inputs[cache_name(index)] for index in range(len(inputs))]
        self.outputs = [_tensors(graph.get_outputs()) for graph in (self.first, self.next)]

    def open(self) -> DecodeState:
        """The start of a video; memory for both sets of caches is taken here."""
        return OnnxDecodeState(self)


def _open(path: Path, device: torch.device, num_threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # two graphs, of which one rests
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        settings = {"device_id": str(device.index or 0), "user_compute_stream": str(stream), "use_tf32": "0"}
        providers.insert(0, ("CUDAExecutionProvider", settings))
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime has a class for every status, and no common one
        raise ExecutorError(
            f"onnxruntime {ort.__version__} cannot run {path.name} on {device}: {str(error).splitlines()[0]}; "
            "on a CPU, build the VAE in float32"
        ) from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ExecutorError(
            "onnxruntime could not start CUDA: install the onnxruntime-gpu that fits, or take device='cpu'"
        )
    return session


def _tensors(values: list[Any]) -> dict[str, GraphTensor]:
    return {value.name: GraphTensor(shape=tuple(value.shape), dtype=_TORCH_TYPES[value.type]) for value in values}


class OnnxDecodeState(DecodeState):
    """Two sets of caches, and bindings that hold their addresses."""

    def __init__(self, vae: OnnxVae) -> None:
        _, channels, height, width = vae.latent.shape
        super().__init__(channels=channels, dtype=vae.caches[0].dtype, latent_size=(height, width))
        self._vae = vae
        self._current = 0
        self._latent = vae.latent.empty(vae.device)
        self._frames = [outputs[FRAMES].empty(vae.device) for outputs in vae.outputs]
        self._sets = [[cache.empty(vae.device) for cache in vae.caches] for _ in range(2)]
        self._bindings = [
            self._bind(vae.first, read=None, written=0),
            self._bind(vae.next, read=0, written=1),
            self._bind(vae.next, read=1, written=0),
        ]
        self._options = ort.RunOptions()
        if vae.device.type == "cuda":
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._clear_caches()

    def _bind(self, graph: Any, *, read: int | None, written: int) -> Any:
        binding, device = graph.io_binding(), self._vae.device
        outputs = self._vae.outputs[0 if read is None else 1]
        memory = {LATENT: self._latent, FRAMES: self._frames[0 if read is None else 1]}
        for index, _ in enumerate(self._vae.caches):
            if read is not None:
                memory[cache_name(index)] = self._sets[read][index]
            if cache_name(index) + WRITTEN in outputs:
                memory[cache_name(index) + WRITTEN] = self._sets[written][index]
        for name, tensor in memory.items():
            bind = binding.bind_output if name in outputs else binding.bind_input
            kind, sizes = _ONNX_TYPES[tensor.dtype], list(tensor.shape)
            bind(name, device.type, device.index or 0, kind, sizes, tensor.data_ptr())
        return binding

    def _decode_each(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        for latent in latents.unbind(0):
            self._latent[0].copy_(latent)
            if self.latent_frames:
                self._vae.next.run_with_iobinding(self._bindings[1 + self._current], self._options)
                self._current = 1 - self._current
                frames = self._frames[1]
            else:
                self._vae.first.run_with_iobinding(self._bindings[0], self._options)
                frames = self._frames[0]
            self.latent_frames += 1
            yield frames[0].transpose(0, 1)

    def _cache_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        return [cache.shape for cache in self._vae.caches]

    def _caches(self) -> list[torch.Tensor]:
        return [cache.clone() for cache in self._sets[self._current]]

    def _set_caches(self, caches: list[torch.Tensor]) -> None:
        self._current = 0
        for own, cache in zip(self._sets[0], caches, strict=True):
            own.copy_(cache)

    def _clear_caches(self) -> None:
        self._current = 0
        for index, cache in enumerate(self._sets[0]):
            if cache_name(index) + WRITTEN not in self._vae.outputs[0]:
                cache.zero_()
