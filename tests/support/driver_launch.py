"""A kernel launched as an engine launches it: PTX that the driver compiles, a flat list of arguments, no Triton and no torch.

    PTX -> cuModuleLoadDataEx -> cuModuleGetFunction -> cuFuncSetAttribute (shared memory) -> cuLaunchKernel

What is handed over is packed by the types that the kernel's entry declares in the PTX. The current CUDA context is used, which
torch has made once a tensor lies on the device.
"""

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import torch

LIBRARY = "libcuda.so.1"
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_
ERROR_LOG_BUFFER, ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6  # CU_JIT_
LOG_BYTES = 16384

CTYPES = {
    **dict.fromkeys(("u64", "b64"), ctypes.c_uint64),
    **dict.fromkeys(("u32", "b32"), ctypes.c_uint32),
    "s64": ctypes.c_int64,
    "s32": ctypes.c_int32,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}
"""Types of parameters by their name in PTX; a pointer is a u64."""

POINTER = ctypes.c_void_p
PROTOTYPES = {
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuModuleLoadDataEx": [ctypes.POINTER(POINTER), POINTER, ctypes.c_uint, ctypes.POINTER(ctypes.c_int), POINTER],
    "cuModuleUnload": [POINTER],
    "cuModuleGetFunction": [ctypes.POINTER(POINTER), POINTER, ctypes.c_char_p],
    "cuFuncSetAttribute": [POINTER, ctypes.c_int, ctypes.c_int],
    "cuLaunchKernel": [POINTER, *[ctypes.c_uint] * 7, POINTER, ctypes.POINTER(POINTER), ctypes.POINTER(POINTER)],
}


def parameter_types(ptx: str, name: str) -> list[type]:
    """The types that the entry `name` takes, in order."""
    entry = re.search(rf"\.entry {re.escape(name)}\(([^)]*)\)", ptx)
    if entry is None:
        raise ValueError(f"the PTX has no entry {name}")
    kinds = re.findall(r"\.param \.(\w+)", entry[1])
    unknown = [kind for kind in kinds if kind not in CTYPES]
    if unknown or len(kinds) != entry[1].count(".param"):
        raise ValueError(f"{name} takes parameters that are not packed here: {unknown or entry[1]}")
    return [CTYPES[kind] for kind in kinds]


def pack(types: Sequence[type], arguments: Sequence[torch.Tensor | int | float]) -> list[Any]:
    """The arguments as values of these types; a tensor is its address."""
    if len(types) != len(arguments):
        raise ValueError(f"the kernel takes {len(types)} arguments, got {len(arguments)}")
    packed = []
    for number, (kind, argument) in enumerate(zip(types, arguments, strict=True)):
        is_float, value = kind in (ctypes.c_float, ctypes.c_double), argument
        if isinstance(argument, torch.Tensor):
            if kind is not ctypes.c_uint64:
                raise TypeError(f"argument {number} is a tensor, and the kernel takes {kind.__name__}")
            value = argument.data_ptr()
        elif isinstance(argument, bool) or is_float != isinstance(argument, float):
            raise TypeError(f"argument {number} is {argument!r}, and the kernel takes {kind.__name__}")
        packed.append(kind(value))
        if not is_float and packed[-1].value != value:
            raise OverflowError(f"argument {number} is {value}, which is no {kind.__name__}")
    return packed


class DriverError(RuntimeError):
    """The driver refused a call."""


class Kernel:
    """One entry of a PTX module; unloaded with the object."""

    def __init__(self, ptx: str, name: str, *, shared_bytes: int, library: Any = None) -> None:
        """Have the driver compile it for the current context's device.

        Args:
            ptx: a module.
            name: its entry.
            shared_bytes: dynamic shared memory that a launch may ask for.
            library: the driver; None loads it.
        """
        self._module, self._function = POINTER(), POINTER()
        self._driver = ctypes.CDLL(LIBRARY) if library is None else library
        for function, types in PROTOTYPES.items():
            getattr(self._driver, function).argtypes = types
            getattr(self._driver, function).restype = ctypes.c_int
        self.types = parameter_types(ptx, name)
        self._load(ptx)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        self._call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)

    def launch(
        self,
        arguments: Sequence[torch.Tensor | int | float],
        *,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
    ) -> None:
        """Queue one launch on a stream (`torch.cuda.Stream.cuda_stream`); nothing is waited for."""
        values = pack(self.types, arguments)
        addresses = (POINTER * len(values))(*(ctypes.addressof(value) for value in values))
        self._call("cuLaunchKernel", self._function, *grid, *block, shared_bytes, stream, addresses, None)

    def _load(self, ptx: str) -> None:
        log = ctypes.create_string_buffer(LOG_BYTES)
        options = (ctypes.c_int * 2)(ERROR_LOG_BUFFER, ERROR_LOG_BUFFER_SIZE_BYTES)
        values = (POINTER * 2)(ctypes.addressof(log), LOG_BYTES)
        image = ctypes.create_string_buffer(ptx.encode())
        try:
            self._call("cuModuleLoadDataEx", ctypes.byref(self._module), image, 2, options, values)
        except DriverError as error:
            raise DriverError(f"{error}: {log.value.decode(errors='replace')}") from None

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code:
            message = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(message))
            raise DriverError(f"{function}: error {code}, {(message.value or b'unknown').decode()}")

    def __del__(self) -> None:
        if self._module:
            self._driver.cuModuleUnload(self._module)
