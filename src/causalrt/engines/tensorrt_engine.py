"""TensorRT engines in memory: deserialised for one device, with execution contexts and one scratch buffer for all of them.

An engine with a dynamic number of KV rows has an execution context for each optimisation profile, so that a CUDA graph that
was captured with one context stays valid when another is used. Contexts run one after another, on the current stream.
"""

import json
import logging
import mmap
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from causalrt.engines.tensorrt_flavour import Flavour, device_file_name, device_target
from causalrt.errors import ExecutorError
from causalrt.user_cache import cache_file, keep_in_cache, read_cache

logger = logging.getLogger(__name__)
KEPT_MESSAGES = 10


class EngineLoader:
    """Deserialises engines for one device, and gives all of them one scratch buffer."""

    def __init__(self, flavour: Flavour, device: torch.device, *, kernels_of: str = "") -> None:
        """`kernels_of` names a separate cache of compiled kernels, since only one process may write a file."""
        self._kernels_of = f"-{kernels_of}" if kernels_of else ""
        self.flavour, self.device = flavour, device
        self.trt = flavour.load()
        self.messages: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._logger = _make_logger(self.trt, self.messages)
        self._runtime = self.trt.Runtime(self._logger)
        self.kernels = self._open_kernel_cache()
        self._loaded: list[LoadedEngine] = []
        self._scratch: torch.Tensor | None = None
        self._cache: Any = None
        self._kept = b""
        self._suboptimal: set[str] = set()

    def _open_kernel_cache(self) -> Path | None:
        """Path of the kernels that were compiled on this model of GPU; None if engines come with their kernels."""
        if not self.flavour.compiles_late:
            return None
        device = device_file_name(self.device)  # kernels of one model of GPU do not serve another
        return cache_file("kernels", f"{self.flavour.name}-{self.trt.__version__}-{device}{self._kernels_of}.cache")

    def make_context(self, engine: Any) -> Any:
        """Make an execution context; kernels that the cache lacks are compiled now, or when their shapes first occur."""
        config = self.flavour.make_runtime_config(self.trt, engine)
        if self.kernels is not None:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._kept = read_cache(self.kernels)
                if self._kept and not self._cache.deserialize(self._kept):
                    logger.info("%s is of another environment and is replaced", self.kernels)
            config.set_runtime_cache(self._cache)
        context = engine.create_execution_context(config)
        if (
            context is not None
        ):  # engines are built with details for the inspector, whose annotations would slow each run
            context.nvtx_verbosity = self.trt.ProfilingVerbosity.NONE
        return context

    def keep_kernels(self) -> None:
        """Write newly compiled kernels to the cache, for the next start."""
        found = self._cache.serialize() if self.kernels is not None and self._cache is not None else None
        if self.kernels is not None and found is not None and (data := bytes(memoryview(found))) != self._kept:
            keep_in_cache(self.kernels, data)

    def load(self, path: Path, names: Mapping[str, str] | None = None, *, plugins: bool = False) -> "LoadedEngine":
        """Deserialise a file.

        Args:
            path: the engine.
            names: our name of each of its tensors; not needed for engines made from ONNX, whose tensors have our names.
            plugins: whether plugins write its KV slots.

        Raises:
            ExecutorError: the engine was made by another version or for another GPU, or is damaged; TensorRT's own message is
                included.
        """
        self.messages.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            validity, diagnosis = self.flavour.engine_validity(self.trt, self._runtime, data)
            engine = None if validity == "INVALID" else self._runtime.deserialize_cuda_engine(data)
        if validity == "SUBOPTIMAL" and diagnosis not in self._suboptimal:
            self._suboptimal.add(diagnosis)
            logger.warning(
                "%s finds %s, and perhaps other engines, suboptimal for this GPU (%s): they run, but may be slower than "
                "engines that are built for it; build the bundle again with this version and `--target %s`",
                *(self.flavour.name, path.name, diagnosis, device_target(self.device)),
            )
        if engine is None:
            reasons = [f"invalid engine: {diagnosis}", *self.messages] if validity == "INVALID" else self.messages
            raise ExecutorError(
                f"{self.flavour.name} {self.trt.__version__} cannot open {path.name} here: "
                f"{'; '.join(reasons) or 'it gave no reason'}; build the bundle again with this version, for "
                f"this GPU ({device_target(self.device)})"
            )
        loaded = LoadedEngine(self, path.name, engine, names or {}, plugins=plugins)
        self._loaded.append(loaded)
        return loaded

    def share_scratch(self) -> None:
        """Allocate one scratch buffer for all engines, once all are loaded."""
        size = max(engine.scratch_bytes for engine in self._loaded)
        self._scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        for engine in self._loaded:
            engine.set_scratch(self._scratch)
        logger.info("%d engines, %.1f MiB of scratch", len(self._loaded), size / 2**20)

    def stream(self) -> int:
        """The current stream's handle; on a GPU it must not be the default stream, on which TensorRT would wait."""
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self.device.type == "cuda" else 0


class LoadedEngine:
    """An engine with one execution context for each optimisation profile, and the addresses of its tensors.

    Tensors are addressed by our names, which `_own` maps to the engine's names.

    Attributes:
        names: names of all its tensors.
        inputs: names of the tensors that it reads.
    """

    def __init__(
        self, loader: EngineLoader, file: str, engine: Any, names: Mapping[str, str], *, plugins: bool
    ) -> None:
        self._loader, self._file, self._engine = loader, file, engine
        trt = loader.trt
        found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        if names and set(names) != set(found):
            raise ExecutorError(
                f"{file} has the tensors {', '.join(found)}, and the bundle names {', '.join(names)}; build the bundle again"
            )
        self._own = {names.get(own, own): own for own in found}
        self.names = list(self._own)
        self.inputs = [name for name, own in self._own.items() if engine.get_tensor_mode(own) == trt.TensorIOMode.INPUT]
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
            trt.DataType.INT32: torch.int32,
        }
        self._shapes = {name: tuple(engine.get_tensor_shape(own)) for name, own in self._own.items()}
        self._dtypes = {name: types[engine.get_tensor_dtype(own)] for name, own in self._own.items()}
        self._dynamic = [name for name in self.inputs if -1 in self._shapes[name]]
        self._contexts = [self._make_context(index) for index in range(max(1, engine.num_optimization_profiles))]
        self._profiles = {self._profile_rows(index): index for index in range(len(self._contexts))}
        self._context = self._contexts[0]
        self._capturable: list[Any] = []
        outputs = {name: own for name, own in self._own.items() if name not in self.inputs}
        aliased = {name: engine.get_aliased_input_tensor(own) for name, own in outputs.items()}
        self._aliases = {name: names.get(source, source) for name, source in aliased.items()}
        if plugins:  # TensorRT reports what its layers write in place, but not what plugins do
            self._aliases |= {name: name.removesuffix(".written") for name in outputs if name.endswith(".written")}

    def _make_context(self, profile: int) -> Any:
        context = self._loader.make_context(self._engine)
        if context is None:
            raise ExecutorError(f"{self._file}: no execution context: {'; '.join(self._loader.messages)}")
        if profile and not context.set_optimization_profile_async(profile, self._loader.stream()):
            raise ExecutorError(f"{self._file}: no optimisation profile {profile}: {'; '.join(self._loader.messages)}")
        return context

    def _profile_rows(self, index: int) -> int:
        """Rows of the KV slots that a profile is for; 0 if all shapes are static."""
        if not self._dynamic:
            return 0
        most = self._engine.get_tensor_profile_shape(self._own[self._dynamic[0]], index)[2]
        return int(tuple(most)[1])

    @property
    def scratch_bytes(self) -> int:
        """Device memory that one inference needs beside its tensors."""
        return int(self._engine.device_memory_size_v2)

    def set_scratch(self, scratch: torch.Tensor) -> None:
        """Use this memory, which all engines may share, since their contexts run one after another."""
        for context in self._contexts:
            context.set_device_memory(scratch.data_ptr(), scratch.numel())

    def set_communicator(self, capsule: object) -> None:
        """Hand over the NCCL communicator. Collective: returns when every rank has called it."""
        for context in self._contexts:
            if not context.set_communicator(capsule):
                raise ExecutorError(f"{self._file} refused the NCCL communicator: {'; '.join(self._loader.messages)}")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and type of each input and output."""
        return ((name, self._shapes[name], self._dtypes[name]) for name in self.names)

    def empty(self, name: str) -> torch.Tensor:
        """Allocate a tensor of static shape."""
        shape = self._shapes[name]
        assert -1 not in shape, name
        return torch.empty(shape, dtype=self._dtypes[name], device=self._loader.device)

    def select_profile(self, kv_rows: int) -> None:
        """Use the context that was made for this many rows of the KV slots."""
        if not self._dynamic:
            return
        if kv_rows not in self._profiles:
            raise ExecutorError(f"{self._file} has profiles for {sorted(self._profiles)} KV rows, not for {kv_rows}")
        self._context = self._contexts[self._profiles[kv_rows]]

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the address of every tensor; an output that aliases an input must have the input's memory.

        TensorRT gets no sizes, so it would read past the end of memory that is smaller than a tensor: sizes are checked here.
        """
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            assert tensor.is_contiguous(), name
            assert tensor.dtype == self._dtypes[name], name
            if -1 not in self._shapes[name] and shape != self._shapes[name]:
                raise ExecutorError(f"{self._file}: {name} is {list(self._shapes[name])}, got {list(shape)}")
            source = self._aliases.get(name)
            if source is not None and tensors[source].data_ptr() != tensor.data_ptr():
                raise ExecutorError(f"{self._file}: {name} updates {source} in place and was given memory of its own")
            if source is None and name.endswith(".written") and name not in self.inputs:
                raise ExecutorError(f"{self._file}: {name} is not updated in place; build the bundle again")
            if name in self._dynamic and not self._context.set_input_shape(self._own[name], shape):
                raise ExecutorError(
                    f"{self._file}: shape {list(shape)} of {name} was refused: {'; '.join(self._loader.messages)}"
                )
            if not self._context.set_tensor_address(self._own[name], tensor.data_ptr()):
                raise ExecutorError(f"{self._file}: address of {name} was refused: {'; '.join(self._loader.messages)}")

    def check_capturable(self) -> None:
        """Check that a CUDA graph can capture this engine with the shapes that are bound.

        Only `tensorrt_rtx` can tell. Each context is asked once, in the run before its first capture.

        Raises:
            ExecutorError: it cannot be captured; the message says how to run without CUDA graphs.
        """
        context = self._context
        if not self._loader.flavour.compiles_late or context in self._capturable:
            return
        if not context.is_stream_capturable(self._loader.stream()):
            raise ExecutorError(
                f"no CUDA graph can capture {self._file}; build the bundle again with this version, or run without CUDA "
                "graphs: `--cuda-graphs off` on the command line, `cuda_graphs=False` in `causalrt.load`"
            )
        self._capturable.append(context)

    def enqueue(self) -> None:
        """Queue one inference on the current stream."""
        if not self._context.execute_async_v3(self._loader.stream()):
            raise ExecutorError(f"{self._file} failed: {'; '.join(self._loader.messages) or 'TensorRT gave no reason'}")

    def run_alone(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Queue one inference with fresh outputs."""
        outputs = {name: self.empty(name) for name in self.names if name not in inputs}
        self.bind({**inputs, **outputs})
        self.enqueue()
        return outputs

    def information(self) -> dict[str, Any]:
        """The engine inspector's view, layer by layer."""
        trt = self._loader.trt
        text = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return {"scratch_bytes": self.scratch_bytes, **json.loads(text)}


def _make_logger(trt: Any, messages: deque[str]) -> Any:
    """A logger that passes TensorRT's messages to `logging`, and keeps errors for the exception that follows."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)
                logger.error("%s", message)
            elif severity <= trt.ILogger.WARNING:
                logger.warning("%s", message)

    return Logger()
