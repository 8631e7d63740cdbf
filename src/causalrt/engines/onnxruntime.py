"""The ONNX Runtime executor: a step's segments, on a CPU or on a GPU, bound once to buffers that the executor owns.

    segment 0 -> all_to_all -> segment 1 -> all_to_all -> ... -> flow

Every tensor between segments has one buffer for the life of the executor, whose address the bindings hold. The KV slots are
the session's: their filled prefix is bound as input and, at the same address, as output, so that staging is written in place.
On a CPU all ONNX Runtime sessions of the process share one pool of threads. On a GPU they share a stream and an arena of memory
(`onnxruntime_cuda.py`), and no run waits for the GPU.
"""

import functools
import re
from collections.abc import Mapping

import onnxruntime as ort
import torch

from causalrt.engines.base import ONNX_TYPES, TORCH_DTYPES, Collectives, Executor, SessionView, StepBuffers
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH, Bundle
from causalrt.engines.onnxruntime_cuda import CPU, check_cuda, cuda_providers
from causalrt.engines.tensor_names import is_callers
from causalrt.errors import ExecutorError
from causalrt.model.wan.conditioning import Conditioning
from causalrt.model.wan.transformer import sinusoid

_TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
}


@functools.cache
def _start_thread_pool(num_threads: int) -> None:
    """Start the pool of the process; later calls change nothing."""
    ort.set_global_thread_pool_sizes(num_threads, 1)


def _version(text: str) -> tuple[int, ...]:
    """Major and minor version; text that is no version counts as the oldest."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


class _Segment:
    """An ONNX Runtime session with its bindings."""

    def __init__(
        self,
        path: str,
        device: torch.device,
        sent: str | None = None,
        received: str | None = None,
        *,
        prepack: bool = True,
        own_threads: int | None = None,
    ) -> None:
        options = ort.SessionOptions()
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if own_threads is None:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = own_threads
            options.add_session_config_entry(
                "session.intra_op.allow_spinning", "0"
            )  # only one of many sessions runs at a time
        options.log_severity_level = 2
        self._device = device
        providers = cuda_providers(options, device) if device.type == "cuda" else [CPU]
        self.session = ort.InferenceSession(path, options, providers=providers)
        if device.type == "cuda":
            check_cuda(self.session)
        self.binding = self.session.io_binding()
        self.sent, self.received = sent, received
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self._options = ort.RunOptions()
        if device.type == "cuda":
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, name: str, tensor: torch.Tensor, *, output: bool) -> None:
        """Bind the memory of `tensor`, which must be contiguous and must outlive the binding."""
        assert tensor.is_contiguous()
        bind = self.binding.bind_output if output else self.binding.bind_input
        kind, index = self._device.type, self._device.index or 0
        bind(name, kind, index, ONNX_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())

    def empty(self, name: str) -> torch.Tensor:
        """Allocate an input or output of static shape."""
        value = self.inputs.get(name) or self.outputs[name]
        return torch.empty(value.shape, dtype=_TORCH_TYPES[value.type], device=self._device)

    def run(self) -> None:
        """Run on what is bound; on a GPU, only queue the run."""
        self.session.run_with_iobinding(self.binding, self._options)

    def run_alone(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run with fresh outputs."""
        outputs = {name: self.empty(name) for name in self.outputs}
        for name, tensor in inputs.items():
            self.bind(name, tensor, output=False)
        for name, tensor in outputs.items():
            self.bind(name, tensor, output=True)
        self.run()
        return outputs


class OnnxRuntimeExecutor(Executor):
    """Runs the bundle's ONNX graphs.

    With `own_threads` each ONNX Runtime session has threads of its own, for a process that also opens other sessions: once a
    process has the shared pool, it can open no session that does not use it.
    """

    def __init__(
        self,
        bundle: Bundle,
        collectives: Collectives,
        *,
        num_threads: int,
        device: torch.device,
        own_threads: bool = False,
    ) -> None:
        self.device = device
        built_with = bundle.toolchain.get("onnxruntime", "0.0")
        if _version(ort.__version__) < _version(built_with):
            raise ExecutorError(
                f"the bundle was built with onnxruntime {built_with}, here is {ort.__version__}; "
                "install that version or newer, or build the bundle again here"
            )
        if not own_threads:
            _start_thread_pool(num_threads)
        segment = functools.partial(_Segment, own_threads=num_threads if own_threads else None)
        self._dtype = TORCH_DTYPES[bundle.config.build.precision]
        self._freq_dim = bundle.config.model.freq_dim
        self._collectives = collectives
        folder = bundle.path
        self._prompt = segment(str(folder / PROMPT_GRAPH), device)
        self._time = segment(str(folder / TIME_GRAPH), device)
        self._steps = [
            self._open_step(
                # Packed weights are a copy. Steps other than 0 run once a video, and read them where the file is mapped.
                [
                    segment(str(folder / part.file), device, part.sent, part.received, prepack=number == 0)
                    for part in step.segments
                ]
            )
            for number, step in enumerate(bundle.steps)
        ]
        self._segments, self._buffers = self._steps[0]
        self._bound: dict[str, torch.Tensor] = {}
        self._kv_rows = 0

    def _open_step(self, segments: list[_Segment]) -> tuple[list[_Segment], StepBuffers]:
        """Allocate and bind what passes between segments; KV slots and the prompt are bound by `bind`."""
        buffers = StepBuffers()
        for segment in segments:
            for output, values in ((False, segment.inputs), (True, segment.outputs)):
                for name in values:
                    if is_callers(name):
                        continue
                    if name not in buffers:
                        buffers[name] = segment.empty(name)
                    segment.bind(name, buffers[name], output=output)
            if segment.sent is not None:
                assert segment.received is not None
                buffers[segment.received] = torch.empty_like(buffers[segment.sent])
        buffers["rank"].fill_(self._collectives.rank)
        return segments, buffers

    def encode_prompt(self, text: torch.Tensor) -> Conditioning:
        """See `Executor.encode_prompt`."""
        return self._prompt.run_alone({"text": text.to(self.device, self._dtype)})

    def embed_time(self, timestep: float) -> Conditioning:
        """See `Executor.embed_time`."""
        return self._time.run_alone({"sinusoid": sinusoid(timestep, self._freq_dim).to(self.device, self._dtype)})

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`."""
        self._segments, self._buffers = self._steps[view.step]
        self._bound = view.tensors()  # kept, since the bindings hold addresses only
        self._kv_rows = view.kv_rows
        for segment in self._segments:
            for name in filter(is_callers, segment.inputs):
                segment.bind(name, self._bound[name], output=False)
            for name in filter(is_callers, segment.outputs):
                segment.bind(name, self._bound[name.removesuffix(".written")], output=True)

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        buffers = self._buffers
        buffers.copy_from(x, time, first_frame=first_frame, kv_rows=self._kv_rows)
        for segment in self._segments:
            segment.run()
            if segment.sent is not None and segment.received is not None:
                self._collectives.all_to_all(buffers[segment.received], buffers[segment.sent])
        return buffers["flow"]
