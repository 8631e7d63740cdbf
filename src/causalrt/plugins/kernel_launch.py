"""A Triton kernel launch as data: torch launches it, the interpreter runs it, or `ptx.py` compiles it ahead of time.

The plan of a kernel (`*_launch.plan`) derives the launch from shapes and types alone, without tensors or a device::

    plan(shapes, types) -> KernelLaunch --+-> run(tensors)                         CUDA, or Triton's interpreter
                                          +-> ptx.compile_kernel(launch, target)   PTX, for a plugin of an engine

This module does not import Triton, so that the ops can be registered without it; call `require_triton` before importing a plan
or a kernel.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from causalrt.errors import ExecutorError, KernelError
from causalrt.install_hint import install_package

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
MAX_PLANS = 1024
"""Maximum number of plans that an op caches: one per number of KV rows, kind of step and device; no bundle needs more."""


def require_triton() -> None:
    """Raise unless Triton is installed.

    Raises:
        KernelError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise KernelError(
            "the fused kernels, and executor inductor on a GPU, need Triton, which is not installed: "
            f"`{install_package('triton')}` on Linux, or run executor eager without plugins"
        )


def require_triton_launches() -> None:
    """Raise unless Triton can launch kernels on a GPU, for which it compiles a launcher in C.

    Raises:
        KernelError: Triton is not installed.
        ExecutorError: there is no C compiler.
    """
    require_triton()
    if c_compiler() is None:
        named = os.environ.get("CC")
        missing = "neither gcc nor clang is here" if named is None else f"CC is {named!r}, which is no program here"
        raise ExecutorError(
            f"Triton needs a C compiler to launch kernels on a GPU, and {missing}; install gcc, set CC to the path of a "
            "compiler, or run executor eager without plugins"
        )


def c_compiler() -> str | None:
    """The C compiler that Triton would use (`triton/runtime/build.py`); None if there is none."""
    named = os.environ.get("CC")
    return shutil.which("gcc") or shutil.which("clang") if named is None else shutil.which(named)


launches_checked = functools.cache(require_triton_launches)
"""Cached so that launches do not search PATH; errors are not cached, so a compiler installed later is found."""


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to `dtype`, such as `*bf16`.

    Raises:
        KernelError: our kernels do not support `dtype`.
    """
    if dtype not in TRITON_TYPES:
        raise KernelError(f"no kernel takes {dtype}: convert to one of {', '.join(map(str, TRITON_TYPES))}")
    return f"*{TRITON_TYPES[dtype]}"


def is_interpreted(kernel: Any) -> bool:
    """Whether a `triton.jit` function is interpreted, because TRITON_INTERPRET=1 was set when it was defined."""
    return type(kernel).__name__ == "InterpretedFunction"


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelLaunch:
    """A kernel with everything that a launch needs except the addresses.

    Attributes:
        kernel: the `triton.jit` function.
        signature: the kernel's run-time arguments, in order, with Triton's names of their types (`*bf16`, `i32`, `fp32`).
        constexprs: the kernel's compile-time arguments, and None for each run-time argument that this launch omits.
        grid: number of programs along x, y and z.
        num_warps: number of warps per program.
        num_stages: depth of the kernel's software pipelines.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, int | float | bool | None]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        names = list(self.kernel.arg_names)
        assert [name for name in names if name not in self.constexprs] == list(self.signature), (names, self.signature)
        assert set(self.constexprs) <= set(names), self.constexprs

    def run(self, *arguments: torch.Tensor | int | float) -> None:
        """Launch on CUDA tensors, or interpret on CPU tensors in a process that was started with TRITON_INTERPRET=1.

        The kernel is launched on the tensors' device, even if it is not the current one, and on that device's current stream.

        Args:
            *arguments: run-time arguments as in `signature`. Tensors are passed by address; the plan determines shapes and
                strides.

        Raises:
            KernelError: the tensors are on a CPU in a process that does not interpret, or on several devices.
            ExecutorError: the launch requires a C compiler, and none was found.
        """
        devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
        on: AbstractContextManager[object] = nullcontext()
        if not is_interpreted(self.kernel):
            if len(devices) != 1 or next(iter(devices)).type != "cuda":
                raise KernelError(
                    f"{self.kernel.__name__} is given tensors on {', '.join(sorted(map(str, devices)))}, and runs on one CUDA "
                    "device; to interpret it on a CPU, start the process with TRITON_INTERPRET=1"
                )
            launches_checked()
            on = torch.cuda.device(next(iter(devices)))  # Triton launches on the current device
        named = dict(zip(self.signature, arguments, strict=True))
        with on:
            self.kernel[self.grid](**named, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages)
