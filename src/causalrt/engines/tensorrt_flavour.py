"""What differs between the two TensorRTs, and nothing else knows of it.

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
        name: of the executor.
        module: what is imported.
        extra: the extra of this package that brings it.
        targets: GPU architectures that it builds for without having one; none means that it builds for the GPU at hand.
        listed: GPU architectures that NVIDIA lists as supported.
        timing_cache: measured kernel times can be kept for the next build.
        plugins: it has a plugin registry.
        compiles_late: engines are finished on the GPU that runs them; its runtime has settings for that.
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
        except Exception as error:  # a missing shared library is whatever the loader makes of it
            raise ExecutorError(
                f"{self.name} needs the Python module {self.module}, which does not import here "
                f"({type(error).__name__}: {error}); install it with `{install_extra(self.extra)}`"
            ) from error

    def check_target(self, target: str | None) -> str:
        """The architecture to build for, as `sm80`.

        Raises:
            ExecutorError: it cannot be built for here.
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
                f"{self.name} builds for the GPU at hand, which is {here}, not for {target}; leave the engines to a machine "
                "that has such a GPU with `--prepare`"
            )
        return here

    def builds_here(self) -> bool:
        """Whether this machine has the GPU that a build of engines needs, if it needs one."""
        return bool(self.targets) or torch.cuda.is_available()

    def check_later_target(self, target: str) -> str:
        """The architecture to build for on another machine.

        Raises:
            ExecutorError: it cannot be built for there either.
        """
        if self.targets:
            return self.check_target(target)
        if target not in self.listed:
            raise ExecutorError(f"{self.name} builds for {', '.join(self.listed)}, and {target} is not among them")
        return target

    def unlisted(self, target: str) -> str | None:
        """What there is to say of an architecture that engines are built for although NVIDIA does not list it."""
        if target in self.listed:
            return None
        return (
            f"NVIDIA does not list {target} as supported by {self.name}, so the GPU may refuse the engines; the documented way "
            f"is `--executor {recommended_executor(target)}`"
        )

    def configure_build(self, trt: Any, config: Any, target: str) -> None:
        """Set what every engine for `target` needs of a builder config.

        TensorRT-RTX may otherwise allocate memory while an engine runs, which a CUDA graph cannot capture.
        """
        if self.targets:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        if self.compiles_late:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    def engine_validity(self, trt: Any, runtime: Any, data: Any) -> tuple[str, str]:
        """What the runtime says of a serialised engine before it is opened; only `tensorrt_rtx` can be asked.

        Returns:
            The name of the `EngineValidity`, and the names of the diagnostics behind it.
        """
        if not self.compiles_late:
            return "VALID", ""
        validity, found = runtime.get_engine_validity(data)
        kinds = trt.EngineInvalidityDiagnostics.__members__
        return validity.name, ", ".join(name for name, kind in kinds.items() if found & kind.value) or "no diagnosis"

    def make_runtime_config(self, trt: Any, engine: Any) -> Any:
        """For a context whose scratch memory is the caller's, and whose kernels are compiled before they are wanted again."""
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
    """The executor to build for a GPU architecture, as `sm80`.

    It is `inductor`, which needs no build, where NVIDIA lists neither TensorRT.
    """
    return next((name for name, flavour in FLAVOURS.items() if target in flavour.listed), "inductor")


def device_target(device: torch.device) -> str:
    """The architecture of a GPU, as `sm80`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def device_file_name(device: torch.device) -> str:
    """The model of a GPU as a part of a file's name, such as `NVIDIA-H200`; `cpu` for the CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"\W+", "-", name)
