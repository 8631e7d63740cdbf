"""Examines what this machine can build and run, what is missing, and what to do next.

No probe ends the examination: a library that does not import, a driver that is too old and a GPU that fails are findings.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist

from causalrt.control_groups import available_cpus, cpu_quota, memory_limits
from causalrt.engines.kinds import onnxruntime_gpu_fault
from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour
from causalrt.errors import CausalRTError
from causalrt.install_hint import install_extra
from causalrt.plugins.kernel_launch import c_compiler, require_triton_launches
from causalrt.plugins.tensorrt_plugin import numpy_breaks_plugins
from causalrt.runtime.memory import available_bytes
from causalrt.tools.advice import Ability, advise
from causalrt.tools.gpus import Gpu, driver_version, find_gpus, first_sentence, mps_state, needed_driver

Result = TypeVar("Result")
EXTRAS = {
    "video": ("diffusers", "ftfy", "tokenizers", "transformers"),
    "serve": ("fastapi", "prometheus-client", "python-multipart", "uvicorn", "websockets"),
    "proof": ("matplotlib", "polygraphy"),
}
"""The distributions of the optional extras that `can` does not cover."""
SHARED_MEMORY = "/dev/shm"


def examine() -> dict[str, Any]:
    """Examine this machine without starting CUDA in this process.

    Returns:
        Plain JSON types. `machine`: the host and its software. `gpus`: the driver, what torch counts, what CUDA shows, and why
        it does not start. `extras`: the distributions that each optional extra lacks. `can`: whether each executor and builder
        works here (`{"ok": bool, "detail": str}`). `next`: see `advise`.
    """
    gpus = find_gpus()
    abilities = _abilities(gpus.working)
    found: dict[str, Any] = {
        "machine": _machine(),
        "gpus": {
            "driver": _tried(driver_version),
            "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "torch_cuda": torch.version.cuda,
            "needed_driver": needed_driver(torch.version.cuda),
            "counted": gpus.counted,
            "fault": gpus.fault,
            "found": [
                {
                    "index": gpu.index,
                    "name": gpu.name,
                    "target": gpu.target,
                    "free_gib": _gib(gpu.free_bytes),
                    "total_gib": _gib(gpu.total_bytes),
                    "fault": gpu.fault,
                }
                for gpu in gpus.found
            ],
            "without_peer_access": gpus.without_peer_access,
            "nccl": _tried(_nccl_version),
            "mps": _tried(mps_state),
        },
        "extras": {extra: [name for name in names if not _is_installed(name)] for extra, names in EXTRAS.items()},
        "can": {name: {"ok": ability.ok, "detail": ability.detail} for name, ability in abilities.items()},
    }
    return {**found, "next": advise(found["machine"], found["gpus"], abilities)}


def _machine() -> dict[str, Any]:
    limit = min((most for most, _ in memory_limits()), default=None)
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_quota": cpu_quota(),
        "threads": available_cpus(),
        "memory_limit_gib": _gib(limit),
        "memory_available_gib": _gib(available_bytes()),
        "shared_memory_gib": _tried(lambda: _gib(shutil.disk_usage(SHARED_MEMORY).total)),
        "c_compiler": c_compiler(),
        "cpp_compiler": _tried(_cpp_compiler),
        "ffmpeg": shutil.which("ffmpeg"),
        "pyav": _version("av"),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _abilities(gpus: Sequence[Gpu]) -> Mapping[str, Ability]:
    return {
        "run eager": Ability(ok=True, detail="on the CPU" + (" and on GPUs" if gpus else "")),
        "run inductor": _inductor(bool(gpus)),
        "run fused ops on GPUs": _fused_ops(bool(gpus)),
        "build and run onnxruntime": _onnxruntime(bool(gpus)),
        "run several ranks on CPUs": Ability(
            ok=dist.is_available() and dist.is_gloo_available(),
            detail="gloo" if dist.is_gloo_available() else "this torch has no gloo; install one that has",
        ),
        "run several ranks on GPUs": _ranks_on_gpus(len(gpus)),
        **{f"build {name} engines": _tensorrt(flavour, bool(gpus)) for name, flavour in FLAVOURS.items()},
        **{f"run {name} engines": _run_tensorrt(flavour, gpus) for name, flavour in FLAVOURS.items()},
        "build engines by torch-tensorrt": _torch_tensorrt(),
    }


def _ranks_on_gpus(gpus: int) -> Ability:
    if gpus < 2:
        return Ability(ok=False, detail=f"each rank needs a GPU of its own, and CUDA has {gpus or 'none'} here")
    if dist.is_nccl_available():
        return Ability(ok=True, detail=f"{gpus} GPUs, NCCL")
    detail = f"{gpus} GPUs, but this torch has no NCCL; install one that has"
    return Ability(ok=False, detail=detail, problem=f"one rank only: {detail}")


def _inductor(gpu: bool) -> Ability:
    found = on_cpu = _tried_ability(_check_can_compile)
    if gpu:
        found = _tried_ability(_check_can_launch)
        if found.ok and not on_cpu.ok:
            return Ability(ok=True, detail=f"on GPUs alone: {on_cpu.detail}")
    return found if found.ok else replace(found, problem=f"inductor does not run: {found.detail}")


def _fused_ops(gpu: bool) -> Ability:
    return _tried_ability(_check_can_launch) if gpu else Ability(ok=False, detail="CUDA has no GPU here")


def _check_can_launch() -> str:
    require_triton_launches()
    return f"Triton {_version('triton')}, {c_compiler()}"


def _check_can_compile() -> str:
    from causalrt.engines.inductor import check_can_compile  # imports the compiler, which may be damaged

    return check_can_compile()


def _cpp_compiler() -> str | None:
    from causalrt.engines.inductor import cpp_compiler

    return cpp_compiler()


def _tried_ability(check: Callable[[], str]) -> Ability:
    try:
        return Ability(ok=True, detail=check())
    except CausalRTError as error:
        return Ability(ok=False, detail=str(error))
    except Exception as error:
        return Ability(ok=False, detail=_reason(error))


def _onnxruntime(gpu: bool) -> Ability:
    found = _imported("onnxruntime")
    try:
        fault = onnxruntime_gpu_fault()
    except Exception as error:
        found = Ability(ok=False, detail=str(error) if isinstance(error, CausalRTError) else _reason(error))
    if not found.ok:
        return replace(found, problem=f"onnxruntime: {found.detail}")
    if not gpu:
        return replace(found, detail=f"{found.detail}, on the CPU only")
    if fault is None:
        return replace(found, detail=f"{found.detail}, on GPUs", on_gpus=True)
    detail = f"{found.detail}, on the CPU only: {fault}"
    return Ability(ok=True, detail=detail, problem=f"onnxruntime leaves the GPUs unused: {detail}")


def _tensorrt(flavour: Flavour, gpu: bool) -> Ability:
    try:
        version = str(flavour.load().__version__)
    except CausalRTError as error:
        return Ability(ok=False, detail=str(error))
    except AttributeError:  # a folder of that name, without the library
        return Ability(ok=False, detail=f"the module {flavour.module} is incomplete: it has no version")
    lacks_plugins = flavour.plugins and numpy_breaks_plugins(version)
    if lacks_plugins:
        version += (
            f", without plugins: before 11.2 it cannot make them under numpy {numpy.__version__}; pip install "
            "'tensorrt-cu13>=11.2,<12'"
        )
    if not flavour.targets and not gpu:
        detail = f"{version}, but it builds only on a machine with the target GPU"
        return Ability(ok=False, detail=detail, problem=f"tensorrt: {detail}" if lacks_plugins else None)
    detail = f"{version}, for {', '.join(flavour.targets) or 'the GPU here'}"
    return Ability(ok=True, detail=detail, problem=f"tensorrt: {detail}" if lacks_plugins else None)


def _run_tensorrt(flavour: Flavour, gpus: Sequence[Gpu]) -> Ability:
    if not gpus:
        return Ability(ok=False, detail="CUDA has no GPU here")
    built = replace(_tensorrt(flavour, gpu=True), problem=None)
    others = [gpu.target for gpu in gpus if flavour.targets and gpu.target not in flavour.targets]
    if built.ok and others:
        targets = ", ".join(flavour.targets)
        return Ability(ok=False, detail=f"this GPU is {others[0]}, and {flavour.name} has {targets}; take tensorrt")
    return built


def _torch_tensorrt() -> Ability:
    if importlib.util.find_spec("torch_tensorrt") is None:
        return Ability(ok=False, detail=f"torch_tensorrt is not installed; `{install_extra('torch-tensorrt')}`")
    return _imported("torch_tensorrt")


def _nccl_version() -> str | None:
    if not dist.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 1)


def _is_installed(distribution: str) -> bool:
    return _version(distribution) is not None


def _version(distribution: str) -> str | None:
    return _tried(lambda: metadata.version(distribution))


def _imported(module: str) -> Ability:
    # A broken native library may raise anything.
    return _tried_ability(lambda: str(importlib.import_module(module).__version__))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_sentence(error)}" if str(error) else f"{type(error).__name__}"


def _tried(probe: Callable[[], Result]) -> Result | None:
    try:
        return probe()
    except Exception:
        return None
