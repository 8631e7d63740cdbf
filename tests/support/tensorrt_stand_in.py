"""TensorRT's runtime API on a CPU: a module for the executor to import in TensorRT's place, since TensorRT runs on GPUs only.

    engine file:  header | the ONNX graph that TensorRT would have parsed, weights included
    execution:    the graph, run by ONNX Runtime on whatever lies at the addresses that the caller has set

Everything that the executor could get wrong before TensorRT computes anything is held to TensorRT's rules, and refused in
its way: False or None is returned, an error is logged, nothing is done. The rules: tensors are known by name and have
addresses, aligned; dynamic shapes lie in the context's profile, and are forgotten when it changes; no two contexts share a
profile; scratch memory is the caller's if it said so, and every execution overwrites it; an output that aliases an input has
its address; a graph with collectives has a communicator of its ranks; an engine is whole, of this version, and for this GPU.

The classes of `API` have no name that TensorRT's have not (`test_tensorrt_executor.py` holds that). The rest of the module
makes what they open: `write_engine`, and `Communicator` in the place of NCCL's.
"""

import ctypes
import enum
import itertools
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from causalrt.export.dist_collective import OP as DIST_COLLECTIVE
from causalrt.export.passes import PassContext
from causalrt.export.pipelines import STANDARD_OPS, apply
from causalrt.export.segment import cut_at_exchanges
from causalrt.plugins.all_to_all import ONNX_DOMAIN, ONNX_OP

__version__ = "0.0.0"

MAGIC = b"stand-in engine\n"
ALIGNMENT = 64
"""TensorRT wants 256 bytes. torch gives 512 on a GPU and 64 on a CPU: an address that is less aligned is no tensor's start."""
CAPSULE_NAME = b"ncclComm_t"


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BF16 = 7
    INT64 = 8


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class EngineValidity(enum.Enum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.Enum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class Dims:
    """A shape: a sequence, but no tuple."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> int:
        return self._sizes[index]


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR: ClassVar = Severity.INTERNAL_ERROR
    ERROR: ClassVar = Severity.ERROR
    WARNING: ClassVar = Severity.WARNING
    INFO: ClassVar = Severity.INFO
    VERBOSE: ClassVar = Severity.VERBOSE

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


TYPES = {
    TensorProto.FLOAT: (DataType.FLOAT, np.float32),
    TensorProto.INT64: (DataType.INT64, np.int64),
    TensorProto.INT32: (DataType.INT32, np.int32),
}
"""What a graph can hold here: float32 where a real engine has bfloat16, so that errors can be held against float32's."""


def write_engine(graph: Path, out: Path, *, profiles: tuple[int, ...], target: str, version: str = __version__) -> None:
    """What a build would write: the graph with its weights, and the dynamic size of each optimisation profile.

    A plugin does what the ONNX function of its name says.
    """
    parsed = onnx.load(graph)
    plugins = bool(parsed.functions)
    apply(STANDARD_OPS, parsed, PassContext())
    model = parsed.SerializeToString()
    header = {"version": version, "target": target, "profiles": list(profiles), "bytes": len(model), "plugins": plugins}
    out.write_bytes(MAGIC + json.dumps(header).encode() + b"\n" + model)


def device_target() -> str:
    """The GPU that is pretended to be here."""
    major, minor = torch.cuda.get_device_capability(0)
    return f"sm{major}{minor}"


class Communicator(Protocol):
    """One rank's end of what NCCL would do; its handle goes into the capsule that `set_communicator` is given."""

    rank: int
    world_size: int
    joined: int

    def join(self) -> None:
        """Wait until every rank has called this."""

    def all_to_all(self, received: np.ndarray, sent: np.ndarray) -> None:
        """Equal blocks along the first dimension, block p of `sent` to rank p."""


COMMUNICATORS: "weakref.WeakValueDictionary[int, Communicator]" = weakref.WeakValueDictionary()
_handles = itertools.count(0x1000, 0x100)


def communicator_handle(communicator: Communicator) -> int:
    """A number to know it by, which a capsule can hold."""
    handle = next(_handles)
    COMMUNICATORS[handle] = communicator
    return handle


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        self.logger = logger

    def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
        """As TensorRT does, it looks at the header alone."""
        fault = _header_fault(bytes(memoryview(buffer)))
        return (EngineValidity.VALID, 0) if fault is None else (EngineValidity.INVALID, fault[0].value)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "ICudaEngine | None":
        data = bytes(memoryview(serialized_engine))
        fault = _header_fault(data)
        if fault is not None:
            self.logger.log(ILogger.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({fault[1]})")
            return None
        header, model = _split(data)
        if len(model) != header["bytes"]:
            self.logger.log(
                ILogger.ERROR,
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion plan.header.size == "
                "blobSize failed.)",
            )
            return None
        return ICudaEngine(
            self.logger, onnx.ModelProto.FromString(model), header["profiles"], plugins=header["plugins"]
        )


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    header, _, model = data.removeprefix(MAGIC).partition(b"\n")
    return json.loads(header), model


def _header_fault(data: bytes) -> tuple[EngineInvalidityDiagnostics, str] | None:
    kinds = EngineInvalidityDiagnostics
    if not data.startswith(MAGIC):
        return kinds.MALFORMED_ENGINE, "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed."
    header, _ = _split(data)
    if header["version"] != __version__:
        return kinds.VERSION_MISMATCH, f"The engine was built with version {header['version']}, this is {__version__}."
    if header["target"] != device_target():
        return kinds.UNSUPPORTED_CC, f"The engine was built for {header['target']}, this GPU is {device_target()}."
    return None


class ICudaEngine:
    """The graph, cut at its collectives into pieces, each with a session."""

    def __init__(self, logger: ILogger, model: onnx.ModelProto, profiles: list[int], *, plugins: bool) -> None:
        self._logger, self._profiles, self._plugins = logger, profiles, plugins
        graph = model.graph
        self._inputs, self._outputs = (
            {value.name: value for value in values} for values in (graph.input, graph.output)
        )
        self._values = self._inputs | self._outputs
        self._updates = {
            node.output[0]: node.input[0]
            for node in graph.node
            if node.op_type == "TensorScatter" and node.input[0] in self._inputs and node.output[0] in self._outputs
        }
        self._ranks = {_ranks(node) for node in graph.node if node.op_type == DIST_COLLECTIVE}
        assert len(self._ranks) <= 1
        self._ops = [node.op_type for node in graph.node]
        for node in graph.node:
            if node.op_type == DIST_COLLECTIVE:
                node.op_type = ONNX_OP
                del node.attribute[:]
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        cut = cut_at_exchanges(model)
        self._pieces = [
            (ort.InferenceSession(piece.model.SerializeToString(), options, ["CPUExecutionProvider"]), piece)
            for piece in cut
        ]
        self._carried, self._scratch_bytes = _places_of_carried(cut, set(self._values))
        self._profile_users: weakref.WeakValueDictionary[int, IExecutionContext] = weakref.WeakValueDictionary()

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._profiles))

    @property
    def device_memory_size_v2(self) -> int:
        return self._scratch_bytes

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(_shape(self._values[name]))

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._values[name].type.tensor_type.elem_type][0]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        """Smallest, best and largest: the same, as the build makes them."""
        assert name in self._inputs
        rows = self._profiles[profile_index] if self._profiles else -1
        return [Dims(tuple(rows if size == -1 else size for size in _shape(self._inputs[name])))] * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """Of a layer: TensorRT says nothing of what plugins write in place."""
        return None if self._plugins else self._updates.get(name)

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: "IRuntimeConfig") -> "IExecutionContext":
        return IExecutionContext(self, runtime_config)

    def create_engine_inspector(self) -> "EngineInspector":
        return EngineInspector(self)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(-1 if size.dim_param else size.dim_value for size in value.type.tensor_type.shape.dim)


def _ranks(node: onnx.NodeProto) -> int:
    """Of a DistCollective, which must be an all-to-all of the kind that TensorRT knows."""
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    ranks = settings.pop("nb_rank")
    assert node.domain == ONNX_DOMAIN
    assert settings == {"collective_operation": b"all_to_all", "reduce_op": b"none", "root": -1}
    return int(ranks)


def _places_of_carried(cut: list[Any], own: set[str]) -> tuple[dict[str, tuple[int, tuple[int, ...], int]], int]:
    """Where in scratch memory each value lies that passes from piece to piece: (offset, shape, ONNX type); bytes in all."""
    places: dict[str, tuple[int, tuple[int, ...], int]] = {}
    end = ALIGNMENT
    for piece in cut:
        for value in (*piece.model.graph.output, *piece.model.graph.input):
            if value.name not in own and value.name not in places:
                shape, kind = _shape(value), value.type.tensor_type.elem_type
                places[value.name] = end, shape, kind
                end += -(-int(np.prod(shape)) * np.dtype(TYPES[kind][1]).itemsize // ALIGNMENT) * ALIGNMENT
    return places, end


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def create_runtime_cache(self) -> "IRuntimeCache":
        return IRuntimeCache()

    def set_runtime_cache(self, cache: "IRuntimeCache") -> bool:
        assert isinstance(cache, IRuntimeCache)
        return True

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        assert isinstance(strategy, ExecutionContextAllocationStrategy)
        self._strategy = strategy


class IRuntimeCache:
    """Kernels that were compiled when contexts were made: here, that some were."""

    def deserialize(self, blob: bytes) -> bool:
        return bytes(blob) == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels"


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        return json.dumps({"Layers": self._engine._ops, "Bindings": list(self._engine._values)})


class IExecutionContext:
    nvtx_verbosity = ProfilingVerbosity.DETAILED

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine = engine
        self._addresses = dict.fromkeys(engine._values, 0)
        self._shapes = {name: _shape(value) for name, value in engine._inputs.items()}
        self._scratch = (0, 0)
        if config._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            self._own = np.empty(engine.device_memory_size_v2, np.uint8)
            self._scratch = self._own.ctypes.data, self._own.nbytes
        self._communicator: Communicator | None = None
        self._profile = -1
        if 0 not in engine._profile_users:  # the first context is given the first profile, any other has to ask
            self._profile = 0
            engine._profile_users[0] = self

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        users = self._engine._profile_users
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._refuse("setOptimizationProfileAsync", f"There is no optimization profile {profile_index}.")
        if users.get(profile_index, self) is not self:
            return self._refuse(
                "setOptimizationProfileAsync",
                f"Profile {profile_index} has been chosen by another IExecutionContext. Use another profileIndex.",
            )
        users.pop(self._profile, None)
        users[profile_index] = self
        self._profile = profile_index
        self._shapes = {name: _shape(value) for name, value in self._engine._inputs.items()}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._shapes:
            return self._refuse("setInputShape", f"Given invalid tensor name: {name}.")
        if self._profile < 0:
            return self._refuse("setInputShape", "No optimization profile has been chosen.")
        (wanted, *_), given = self._engine.get_tensor_profile_shape(name, self._profile), tuple(shape)
        if tuple(wanted) != given:
            return self._refuse(
                "setInputShape",
                f"Set dimension {list(given)} for tensor {name} does not satisfy any optimization profiles. Valid range for "
                f"profile {self._profile}: {list(wanted)}..{list(wanted)}.",
            )
        self._shapes[name] = given
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert isinstance(memory, int)
        if name not in self._addresses:
            return self._refuse("setTensorAddress", f"Given invalid tensor name: {name}.")
        if memory % ALIGNMENT:
            return self._refuse("setTensorAddress", f"Address {memory:#x} of tensor {name} is not aligned.")
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses[name]

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = memory, size

    def set_communicator(self, communicator: object) -> bool:
        found = COMMUNICATORS.get(_capsule_pointer(communicator))
        if found is None:
            return self._refuse("setCommunicator", "The communicator is no ncclComm_t.")
        if self._engine._ranks != {found.world_size}:
            return self._refuse("setCommunicator", f"The communicator is of {found.world_size} ranks.")
        found.join()
        self._communicator = found
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        assert isinstance(stream, int)
        return not self._not_ready()

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int)
        reason = self._not_ready()
        if reason:
            return self._refuse("enqueueV3", reason)
        scratch, engine = self._scratch[0], self._engine
        ctypes.memset(scratch, 0xFF, engine.device_memory_size_v2)  # NaN: what others have left there is nobody's
        for session, piece in engine._pieces:
            binding = session.io_binding()
            for value in piece.model.graph.input:
                binding.bind_input(value.name, "cpu", 0, *self._memory(value.name))
            for value in piece.model.graph.output:
                binding.bind_output(value.name, "cpu", 0, *self._memory(value.name))
            session.run_with_iobinding(binding)
            if piece.sent is not None and piece.received is not None:
                assert self._communicator is not None
                self._communicator.all_to_all(self._array(piece.received), self._array(piece.sent))
        return True

    def _not_ready(self) -> str:
        """Why it cannot run, or nothing."""
        engine = self._engine
        if self._profile < 0:
            return "No optimization profile has been chosen."
        for name, shape in self._shapes.items():
            if -1 in shape:
                return f"The shape of input tensor {name} is not fully specified. Call setInputShape before enqueue/execute."
        for name, address in self._addresses.items():
            if not address:
                kind = "input" if name in engine._inputs else "output"
                return f"Address is not set for {kind} tensor {name}. Call setTensorAddress before enqueue/execute."
        if not self._scratch[0] or self._scratch[1] < engine.device_memory_size_v2:
            return f"Device memory of {engine.device_memory_size_v2} bytes is needed, {self._scratch[1]} were set."
        for output, source in engine._updates.items():
            if self._addresses[output] != self._addresses[source]:
                return f"Output {output} aliases input {source} and must have its address."
        if engine._ranks and self._communicator is None:
            return "The engine has collectives and no communicator is set."
        return ""

    def _memory(self, name: str) -> tuple[Any, list[int], int]:
        """(type, shape, address)."""
        engine = self._engine
        if name in engine._carried:
            offset, shape, kind = engine._carried[name]
            return TYPES[kind][1], list(shape), self._scratch[0] + offset
        value = engine._values[name]
        shape = self._shapes.get(engine._updates.get(name, name), _shape(value))
        assert -1 not in shape, name
        return TYPES[value.type.tensor_type.elem_type][1], list(shape), self._addresses[name]

    def _array(self, name: str) -> np.ndarray:
        kind, shape, address = self._memory(name)
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return np.frombuffer((ctypes.c_byte * size).from_address(address), kind).reshape(shape)

    def _refuse(self, method: str, why: str) -> bool:
        self._engine._logger.log(
            ILogger.ERROR,
            f"IExecutionContext::{method}: Error Code 3: API Usage Error (Parameter check failed. {why})",
        )
        return False


def _capsule_pointer(capsule: object) -> int:
    """What a PyCapsule of the right name holds, or 0; anything else is a TypeError, as it is to a binding."""
    if type(capsule).__name__ != "PyCapsule":
        raise TypeError(f"set_communicator(): incompatible function arguments: {capsule!r}")
    is_valid, pointer = ctypes.pythonapi.PyCapsule_IsValid, ctypes.pythonapi.PyCapsule_GetPointer
    is_valid.argtypes = pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    pointer.restype = ctypes.c_void_p
    return pointer(capsule, CAPSULE_NAME) or 0 if is_valid(capsule, CAPSULE_NAME) else 0


API: Mapping[str, Any] = {
    made.__name__: made
    for made in (
        *(DataType, TensorIOMode, EngineValidity, EngineInvalidityDiagnostics, ExecutionContextAllocationStrategy),
        *(CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy, LayerInformationFormat, ProfilingVerbosity),
        *(ILogger, Dims, Runtime, ICudaEngine, IRuntimeConfig, EngineInspector, IExecutionContext),
    )
}
"""What is TensorRT's."""
