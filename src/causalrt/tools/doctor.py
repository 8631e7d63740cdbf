"""What this machine can build and run, why not, and what to do next.

No probe ends the examination: a library that does not import, a driver that is too old and a GPU that fails are all findings.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
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
from causalrt.tools.advice import advise
from causalrt.tools.gpus import Gpu, driver_version, find_gpus, first_sentence, mps_state, needed_driver

Result = TypeVar("Result")
EXTRAS = {
    "video": ("diffusers", "ftfy", "tokenizers", "transformers"),
    "serve": ("fastapi", "prometheus-client", "python-multipart", "uvicorn", "websockets"),
    "proof": ("matplotlib", "polygraphy"),
}
"""The distributions of optional extras that no entry of `can` stands for."""
SHARED_MEMORY = "/dev/shm"


def examine() -> dict[str, Any]:
    """Examine this machine; CUDA is not started in this process.

    Returns:
        `machine`: the host and its software. `gpus`: `driver`, what torch counts, those that CUDA shows, and why it does not
        start. `extras`: the distributions that each optional extra lacks. `can`: for each executor and builder, whether it
        works here (`{"ok": bool, "detail": str}`). `next`: see `advise`.
    """
    gpus = find_gpus()
    found = {
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
        "can": _abilities(gpus.working),
    }
    return {**found, "next": advise(found)}


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


def _abilities(gpus: Sequence[Gpu]) -> dict[str, dict[str, Any]]:
    return {
        "run eager": _answer(True, "on the CPU" + (" and on GPUs" if gpus else "")),
        "run inductor": _inductor(bool(gpus)),
        "run fused ops on GPUs": _fused_ops(bool(gpus)),
        "build and run onnxruntime": _onnxruntime(bool(gpus)),
        "run several ranks on CPUs": _answer(
            dist.is_available() and dist.is_gloo_available(),
            "gloo" if dist.is_gloo_available() else "this torch has no gloo; install one that has",
        ),
        "run several ranks on GPUs": _ranks_on_gpus(len(gpus)),
        **{f"build {name} engines": _tensorrt(flavour, bool(gpus)) for name, flavour in FLAVOURS.items()},
        **{f"run {name} engines": _run_tensorrt(flavour, gpus) for name, flavour in FLAVOURS.items()},
        "build engines by torch-tensorrt": _torch_tensorrt(),
    }


def _answer(ok: bool, detail: str) -> dict[str, Any]:
    return {"ok": ok, "detail": detail}


def _ranks_on_gpus(gpus: int) -> dict[str, Any]:
    if gpus < 2:
        return _answer(False, f"each rank needs a GPU of its own, and CUDA has {gpus or 'none'} here")
    nccl = dist.is_nccl_available()
    return _answer(nccl, f"{gpus} GPUs, {'NCCL' if nccl else 'but this torch has no NCCL; install one that has'}")


def _inductor(gpu: bool) -> dict[str, Any]:
    on_cpu = _answer_of(_check_can_compile)
    if not gpu:
        return on_cpu
    on_gpu = _answer_of(_check_can_launch)
    if on_gpu["ok"] and not on_cpu["ok"]:
        return _answer(True, f"on GPUs alone: {on_cpu['detail']}")
    return on_gpu


def _fused_ops(gpu: bool) -> dict[str, Any]:
    return _answer_of(_check_can_launch) if gpu else _answer(False, "CUDA has no GPU here")


def _check_can_launch() -> str:
    require_triton_launches()
    return f"Triton {_version('triton')}, {c_compiler()}"


def _check_can_compile() -> str:
    from causalrt.engines.inductor import check_can_compile  # imports the compiler, which may be damaged

    return check_can_compile()


def _cpp_compiler() -> str | None:
    from causalrt.engines.inductor import cpp_compiler

    return cpp_compiler()


def _answer_of(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return _answer(True, check())
    except CausalRTError as error:
        return _answer(False, str(error))
    except Exception as error:
        return _answer(False, _reason(error))


def _onnxruntime(gpu: bool) -> dict[str, Any]:
    ok, detail = _probe("onnxruntime")
    try:
        fault = onnxruntime_gpu_fault()
    except CausalRTError as error:
        return _answer(False, str(error))
    except Exception as error:
        return _answer(False, _reason(error))
    if not gpu:
        return _answer(ok, f"{detail}, on the CPU only")
    return _answer(ok, f"{detail}, on GPUs" if fault is None else f"{detail}, on the CPU only: {fault}")


def _tensorrt(flavour: Flavour, gpu: bool) -> dict[str, Any]:
    try:
        version = str(flavour.load().__version__)
    except CausalRTError as error:
        return _answer(False, str(error))
    except AttributeError:  # a folder of that name, without the library
        return _answer(False, f"the module {flavour.module} is incomplete: it has no version")
    if flavour.plugins and numpy_breaks_plugins(version):
        version += (
            f", without plugins: before 11.2 it cannot make them under numpy {numpy.__version__}; pip install "
            "'tensorrt-cu13>=11.2,<12'"
        )
    if not flavour.targets and not gpu:
        return _answer(False, f"{version}, but it builds only on a machine with the target GPU")
    return _answer(True, f"{version}, for {', '.join(flavour.targets) or 'the GPU here'}")


def _run_tensorrt(flavour: Flavour, gpus: Sequence[Gpu]) -> dict[str, Any]:
    if not gpus:
        return _answer(False, "CUDA has no GPU here")
    built = _tensorrt(flavour, gpu=True)
    others = [gpu.target for gpu in gpus if flavour.targets and gpu.target not in flavour.targets]
    if built["ok"] and others:
        return _answer(
            False, f"this GPU is {others[0]}, and {flavour.name} has {', '.join(flavour.targets)}; take tensorrt"
        )
    return built


def _torch_tensorrt() -> dict[str, Any]:
    if importlib.util.find_spec("torch_tensorrt") is None:
        return _answer(False, f"torch_tensorrt is not installed; `{install_extra('torch-tensorrt')}`")
    return _answer(*_probe("torch_tensorrt"))


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


def _probe(module: str) -> tuple[bool, str]:
    """(importable, version or reason)."""
    try:
        return True, str(importlib.import_module(module).__version__)
    except Exception as error:  # a broken native library raises whatever it likes
        return False, _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_sentence(error)}" if str(error) else f"{type(error).__name__}"


def _tried(probe: Callable[[], Result]) -> Result | None:
    try:
        return probe()
    except Exception:
        return None
