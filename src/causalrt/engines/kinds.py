"""The executors: what each of them runs on and needs, and the device that one of them will take."""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal, get_args

import torch

from causalrt.config import Precision
from causalrt.errors import ExecutorError
from causalrt.install_hint import install_package

logger = logging.getLogger(__name__)


PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPE_OPTIONS: Mapping[Precision, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorKind:
    """Properties of an executor that are known before it is made.

    Attributes:
        devices: kinds of device that it runs on, the preferred one first.
        graphs: the graphs of each kind of step that it runs, a field of `StepGraphs`; None if it needs the weights alone.
        precisions: precisions that it supports, by kind of device; a missing entry means all of them.
        copies_weights: kinds of device on which it holds a copy of the weights for each kind of step.
        attention_scratch: it holds queries, keys and values, or all scores, of an attention beside the other activations.
        decoder_activations: activations of the VAE's decoder alive at once, in units of its widest one. In eager on a CPU 14 to
            18 were seen, which others are taken to need, and in ONNX Runtime 41 to 52, since it unfolds each input of a
            convolution in three dimensions.
        warms_up: whether it compiles or captures on first use, and so runs every kind of step before it serves, even on a CPU.
    """

    devices: tuple[str, ...] = ("cuda", "cpu")
    graphs: Literal["segments", "tensorrt"] | None = None
    precisions: Mapping[str, tuple[Precision, ...]] = field(default_factory=dict)
    copies_weights: tuple[str, ...] = ()
    attention_scratch: bool = False
    decoder_activations: int = 16
    warms_up: bool = False

    @property
    def compiled(self) -> bool:
        """Whether it runs what a build has put into the bundle for it."""
        return self.graphs is not None


_TENSORRT = ExecutorKind(
    devices=("cuda",),
    graphs="tensorrt",
    precisions=dict.fromkeys(("cuda", "cpu"), ("bfloat16", "float16")),  # in which it has fused attention kernels
    copies_weights=("cuda", "cpu"),
    warms_up=True,
)
EXECUTORS: Mapping[str, ExecutorKind] = {
    "eager": ExecutorKind(),
    "inductor": ExecutorKind(warms_up=True),
    "onnxruntime": ExecutorKind(
        graphs="segments",
        precisions={"cpu": ("float32",)},
        copies_weights=("cuda",),
        attention_scratch=True,
        decoder_activations=45,
    ),
    "tensorrt_rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
}
"""Executors by name; the one to prefer comes last."""


def executor_kind(name: str) -> ExecutorKind:
    """Look up an executor by name.

    Raises:
        ExecutorError: the name is unknown; the known ones are listed.
    """
    if name not in EXECUTORS:
        raise ExecutorError(f"no executor {name!r}; this version has: {', '.join(EXECUTORS)}")
    return EXECUTORS[name]


def warms_up(name: str, device: str) -> bool:
    """Whether an executor runs every kind of step before it serves; on a GPU all do, since kernels are loaded lazily."""
    return device == "cuda" or executor_kind(name).warms_up


def precision_fault(name: str, precision: Precision, device: str) -> str | None:
    """Why an executor does not run a precision on a kind of device, and what to build instead; None if it does."""
    kind = executor_kind(name)
    allowed = kind.precisions.get(device, PRECISIONS)
    if precision in allowed:
        return None
    where = "" if len(kind.precisions) > 1 else f" on a {'CPU' if device == 'cpu' else 'GPU'}"
    options = " or ".join(f"`--dtype {DTYPE_OPTIONS[found]}`" for found in allowed)
    return f"{name}{where} runs {' and '.join(allowed)} only, and this is {precision}; build it with {options}"


def choose_device(name: str, *, asked: str | None, world_size: int) -> str:
    """Choose `cuda` or `cpu` for the ranks of an executor; by default GPUs, if there is one for each rank.

    Raises:
        ExecutorError: the executor does not run on that device, there are too few GPUs, or ONNX Runtime is missing.
    """
    kind, gpus = executor_kind(name), torch.cuda.device_count()
    if asked not in (None, "cuda", "cpu"):
        raise ExecutorError(f"device must be cuda or cpu, got {asked!r}; rank r runs on GPU r")
    if asked is not None and asked not in kind.devices:
        raise ExecutorError(f"{name} runs on {' or '.join(kind.devices)}, not on {asked}")
    wanted = asked or next((device for device in kind.devices if device == "cpu" or gpus >= world_size), "cuda")
    if name == "onnxruntime":
        spec = importlib.util.find_spec("onnxruntime")
        if spec is None or spec.origin is None:  # None: a folder that the removal of one of two distributions has left
            raise ExecutorError(
                _onnxruntime_is_missing("not found" if spec is None else "only a part of its files is left")
            )
        fault = onnxruntime_gpu_fault() if wanted == "cuda" else None
        if fault and asked == "cuda":
            raise ExecutorError(fault)
        if fault:
            logger.warning("%d GPU(s) are left unused, for onnxruntime runs on the CPU: %s", gpus, fault)
            wanted = "cpu"
    if wanted == "cuda" and gpus < world_size:
        others = [other for other, its in EXECUTORS.items() if "cpu" in its.devices]
        raise ExecutorError(
            f"{name} needs a GPU for each of {world_size} rank(s), and torch sees {gpus} here; run it on a machine that has "
            f"them, or take an executor that runs on a CPU ({', '.join(others)})"
        )
    logger.info("%s on %s: %d GPUs for %d rank(s), %s asked for", name, wanted, gpus, world_size, asked or "no device")
    return wanted


def onnxruntime_gpu_fault() -> str | None:
    """Why the installed ONNX Runtime cannot use a GPU, and what to do about it; None if it can.

    Several distributions contain the module `onnxruntime` and overwrite each other's files. If that has happened and CUDA
    still works, a warning is logged.

    Raises:
        ExecutorError: ONNX Runtime cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExecutorError(_onnxruntime_is_missing(str(error))) from error
    mixed, reinstall = _onnxruntime_owners()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"the onnxruntime installed here has no CUDA; {mixed}`{reinstall}`"
    if mixed:
        logger.warning("%s`%s`", mixed, reinstall)
    theirs, ours = onnxruntime.cuda_version.partition(".")[0], (torch.version.cuda or "").partition(".")[0]
    if theirs and ours and theirs != ours:
        return f"onnxruntime is for CUDA {theirs}, torch for CUDA {ours}; install a torch for CUDA {theirs}, or take inductor"
    return None


def _onnxruntime_owners() -> tuple[str, str]:
    owners = sorted(set(metadata.packages_distributions().get("onnxruntime", ())))
    mixed = f"{' and '.join(owners)} overwrite each other's files; " if len(owners) > 1 else ""
    remove = f"pip uninstall -y {' '.join(owners)} && " if owners else ""
    return mixed, remove + install_package("onnxruntime-gpu")


def _onnxruntime_is_missing(reason: str) -> str:
    mixed, reinstall = _onnxruntime_owners()
    return f"onnxruntime cannot be imported here ({reason}); {mixed}`{reinstall}`"
