"""What this machine can build and run, and why not."""

import importlib
import importlib.util
import os
import platform
import sys
from typing import Any

import torch
import torch.distributed as dist

from causalrt.engines.inductor import check_can_compile
from causalrt.engines.kinds import onnxruntime_gpu_fault
from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour, device_target
from causalrt.errors import ExecutorError
from causalrt.install_hint import install_extra, install_package
from causalrt.runtime.control_groups import available_cpus, cpu_quota, memory_limits
from causalrt.runtime.memory import available_bytes


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 1)


def _probe(module: str) -> tuple[bool, str]:
    """(importable, version or reason)."""
    try:
        return True, str(importlib.import_module(module).__version__)
    except Exception as error:  # a broken native library raises whatever it likes
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def examine() -> dict[str, Any]:
    """The machine, and for each executor and builder whether it works here: `{"ok": bool, "detail": str}`."""
    memory = available_bytes()
    limit = min((most for most, _ in memory_limits()), default=None)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "cpu_quota": cpu_quota(),
            "threads": available_cpus(),
            "memory_limit_gib": _gib(limit),
            "memory_available_gib": _gib(memory),
            "gpus": [f"{name} ({device_target(torch.device('cuda', i))})" for i, name in enumerate(gpus)],
            "torch": torch.__version__,
        },
        "can": {
            "run eager": {"ok": True, "detail": "on the CPU" + (" and on GPUs" if gpus else "")},
            "run inductor": _inductor(bool(gpus)),
            "build and run onnxruntime": _onnxruntime(),
            "run several ranks on CPUs": {
                "ok": dist.is_available() and dist.is_gloo_available(),
                "detail": "gloo" if dist.is_gloo_available() else "this torch has no gloo; install one that has",
            },
            "run several ranks on GPUs": {
                "ok": len(gpus) > 1 and dist.is_nccl_available(),
                "detail": f"{len(gpus)} GPUs, " + ("NCCL" if dist.is_nccl_available() else "this torch has no NCCL"),
            },
            **{f"build {name} engines": _tensorrt(flavour, bool(gpus)) for name, flavour in FLAVOURS.items()},
            **{f"run {name} engines": _run_tensorrt(flavour, bool(gpus)) for name, flavour in FLAVOURS.items()},
            "build engines by torch-tensorrt": _torch_tensorrt(),
        },
    }


def _answer(ok: bool, detail: str) -> dict[str, Any]:
    return {"ok": ok, "detail": detail}


def _inductor(gpu: bool) -> dict[str, Any]:
    if gpu and not importlib.util.find_spec("triton"):
        return _answer(False, f"triton is not installed; `{install_package('triton')}`")
    try:
        return _answer(True, check_can_compile())
    except ExecutorError as error:
        return _answer(gpu, f"on GPUs alone: {error}" if gpu else str(error))


def _onnxruntime() -> dict[str, Any]:
    ok, detail = _probe("onnxruntime")
    try:
        fault = onnxruntime_gpu_fault()
    except ExecutorError as error:
        return _answer(False, str(error))
    if not torch.cuda.device_count():
        return _answer(ok, f"{detail}, on the CPU only")
    return _answer(ok, f"{detail}, on GPUs" if fault is None else f"{detail}, on the CPU only: {fault}")


def _tensorrt(flavour: Flavour, gpu: bool) -> dict[str, Any]:
    try:
        version = flavour.load().__version__
    except ExecutorError as error:
        return _answer(False, str(error))
    if not flavour.targets and not gpu:
        return _answer(False, f"{version}, but it builds only on a machine with the target GPU")
    return _answer(True, f"{version}, for {', '.join(flavour.targets) or 'the GPU at hand'}")


def _run_tensorrt(flavour: Flavour, gpu: bool) -> dict[str, Any]:
    if not gpu:
        return _answer(False, "no GPU here")
    built = _tensorrt(flavour, gpu)
    here = device_target(torch.device("cuda", 0))
    if built["ok"] and flavour.targets and here not in flavour.targets:
        return _answer(False, f"this GPU is {here}, and {flavour.name} has {', '.join(flavour.targets)}; take tensorrt")
    return built


def _torch_tensorrt() -> dict[str, Any]:
    if importlib.util.find_spec("torch_tensorrt") is None:
        return _answer(False, f"torch_tensorrt is not installed; `{install_extra('torch-tensorrt')}`")
    return _answer(*_probe("torch_tensorrt"))
