"""The differences between the two TensorRTs, which no other module knows.

| flavour        | builds                                     | runs on                      | timing cache | plugins |
|----------------|--------------------------------------------|------------------------------|--------------|---------|
| `tensorrt_rtx` | anywhere, without a GPU, for named targets | the targets it was built for | none needed  | no      |
| `tensorrt`     | on a GPU, for GPUs of that kind            | that kind                    | yes          | yes     |

NVIDIA lists these GPU architectures (`Flavour.listed`):

- TensorRT-RTX: the support matrices of 1.0 to 1.4 have compute capabilities 7.5, 8.6, 8.9 and 12.0, and that of 1.5 adds 12.1.
  Never 8.0, although the builder of 1.7 accepts it, and never 9.0 or 10.0.
- TensorRT: DistCollective, which exchanges between ranks, needs 8.0 or later (Multi-Device Inference, TensorRT 11.0 and 11.1).
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from causalrt.errors import ExecutorError
from causalrt.install_hint import install_extra


@dataclass(frozen=True, kw_only=True, slots=True)
class Flavour:
    """One of the two TensorRTs.

    Attributes:
        name: name of the executor.
        module: Python module to import.
        extra: extra of this package that installs it.
        targets: GPU architectures that it builds for without a GPU; if empty, it builds for the GPU of this machine.
        listed: GPU architectures that NVIDIA lists as supported.
        timing_cache: whether measured kernel times can be kept for the next build.
        plugins: whether it has a plugin registry.
        compiles_late: whether kernels are compiled on the GPU that runs the engine, for which its runtime has settings.
    """

    name: str
    module: str
    extra: str
    targets: tuple[str, ...]
    listed: tuple[str, ...]
    timing_cache: bool
    plugins: bool
    compiles_late: bool

    def load(self) -> Any:
        """Import the module.

        Raises:
            ExecutorError: it is not installed, or does not load.
        """
        try:
            return importlib.import_module(self.module)
        except Exception as error:  # the loader raises various errors for a missing shared library
            raise ExecutorError(
                f"{self.name} needs the Python module {self.module}, which does not import here "
                f"({type(error).__name__}: {error}); install it with `{install_extra(self.extra)}`"
            ) from error

    def check_target(self, target: str | None) -> str:
        """Check a GPU architecture, as `sm80`, and return the one to build for.

        Raises:
            ExecutorError: this machine cannot build for it.
        """
        if self.targets:
            if target not in self.targets:
                wanted = "no --target was given" if target is None else f"{target} is not among them"
                raise ExecutorError(
                    f"{self.name} builds for {', '.join(self.targets)}, and {wanted}; A100 and A800 are sm80, RTX 4090 and L40 "
                    f"sm89, RTX 5090 sm120{' (for H100 and H200, take executor tensorrt)' if target == 'sm90' else ''}"
                )
            return target
        if not torch.cuda.is_available():
            raise ExecutorError(
                f"{self.name} builds engines only on the GPU that runs them, and torch sees none here; copy the bundle to a "
                "machine that has one, and finish it there"
            )
        here = device_target(torch.device("cuda", 0))
        if target not in (None, here):
            raise ExecutorError(
                f"{self.name} builds for the GPU of this machine, which is {here}, not for {target}; leave the engines to a "
                "machine that has such a GPU with `--prepare`"
            )
        return here

    def builds_here(self) -> bool:
        """Whether this machine has the GPU that a build of engines needs, if it needs one."""
        return bool(self.targets) or torch.cuda.is_available()

    def check_later_target(self, target: str) -> str:
        """Check a GPU architecture that another machine is to build for.

        Raises:
            ExecutorError: no machine can build for it.
        """
        if self.targets:
            return self.check_target(target)
        if target not in self.listed:
            raise ExecutorError(f"{self.name} builds for {', '.join(self.listed)}, and {target} is not among them")
        return target

    def unlisted(self, target: str) -> str | None:
        """A warning about an architecture that NVIDIA does not list; None if it does."""
        if target in self.listed:
            return None
        return (
            f"NVIDIA does not list {target} as supported by {self.name}, so the GPU may refuse the engines; the documented way "
            f"is `--executor {recommended_executor(target)}`"
        )

    def configure_build(self, trt: Any, config: Any, target: str) -> None:
        """Configure a builder for engines that run on `target` and that CUDA graphs can capture.

        By default TensorRT-RTX may allocate memory while an engine runs, which no CUDA graph can capture.
        """
        if self.targets:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        if self.compiles_late:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    def engine_validity(self, trt: Any, runtime: Any, data: Any) -> tuple[str, str]:
        """Ask the runtime about a serialised engine before it is opened, which only `tensorrt_rtx` supports.

        Returns:
            The name of the `EngineValidity`, and the names of the diagnostics behind it.
        """
        if not self.compiles_late:
            return "VALID", ""
        validity, found = runtime.get_engine_validity(data)
        kinds = trt.EngineInvalidityDiagnostics.__members__
        return validity.name, ", ".join(name for name, kind in kinds.items() if found & kind.value) or "no diagnosis"

    def make_runtime_config(self, trt: Any, engine: Any) -> Any:
        """Configure a context for scratch memory of the caller and for CUDA graphs of the caller."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.compiles_late:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the executor captures the whole step itself
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return config


FLAVOURS: Mapping[str, Flavour] = {
    "tensorrt_rtx": Flavour(
        name="tensorrt_rtx",
        module="tensorrt_rtx",
        extra="tensorrt-rtx",
        targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        listed=("sm75", "sm86", "sm89", "sm120", "sm121"),
        timing_cache=False,
        plugins=False,
        compiles_late=True,
    ),
    "tensorrt": Flavour(
        name="tensorrt",
        module="tensorrt",
        extra="gpu",
        targets=(),
        listed=("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
        timing_cache=True,
        plugins=True,
        compiles_late=False,
    ),
}


def recommended_executor(target: str) -> str:
    """The executor to build for a GPU architecture, as `sm80`: `inductor` where NVIDIA lists neither TensorRT."""
    return next((name for name, flavour in FLAVOURS.items() if target in flavour.listed), "inductor")


def device_target(device: torch.device) -> str:
    """The architecture of a GPU, as `sm80`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def device_file_name(device: torch.device) -> str:
    """The model of a GPU, such as `NVIDIA-H200`, for use in file names; `cpu` for the CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"\W+", "-", name)
