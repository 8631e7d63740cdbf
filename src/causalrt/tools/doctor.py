"""What this machine can build and run, and why not."""

import importlib
import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from causalrt.runtime.memory import available_bytes


def _probe(module: str) -> tuple[bool, str]:
    """(importable, version or reason)."""
    try:
        return True, str(importlib.import_module(module).__version__)
    except Exception as error:  # a broken native library raises whatever it likes
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def examine() -> dict[str, Any]:
    """The machine, and for each executor and builder whether it works here: `{"ok": bool, "detail": str}`."""
    memory = available_bytes()
    has_onnx, onnx_detail = _probe("onnxruntime")
    has_rtx, rtx_detail = _probe("tensorrt_rtx")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    both = {"onnxruntime", "onnxruntime-gpu"} <= {found.metadata["Name"] for found in metadata.distributions()}
    return {
        "machine": {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_available_gib": None if memory is None else round(memory / 2**30, 1),
            "gpus": gpus,
            "torch": torch.__version__,
        },
        "can": {
            "run eager on a CPU": {"ok": True, "detail": f"torch {torch.__version__}"},
            "build and run onnxruntime on a CPU": {
                "ok": has_onnx,
                "detail": onnx_detail
                + (" (onnxruntime and onnxruntime-gpu are both installed; they overwrite each other)" if both else ""),
            },
            "run several ranks on CPUs": {
                "ok": dist.is_available() and dist.is_gloo_available(),
                "detail": "gloo" if dist.is_gloo_available() else "this torch has no gloo; install one that has",
            },
            "run on GPUs": {
                "ok": False,
                "detail": (f"{len(gpus)} found, but " if gpus else "none found, and ")
                + "this version of CausalRT runs on CPUs only",
            },
            "build TensorRT engines": {
                "ok": False,
                "detail": "this version of CausalRT does not build them yet; "
                + (f"tensorrt-rtx {rtx_detail} is installed" if has_rtx else "tensorrt-rtx is not installed"),
            },
        },
    }
