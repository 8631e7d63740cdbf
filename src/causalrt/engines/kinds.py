"""The executors that there are, and the device that one of them will run on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from causalrt.errors import ExecutorError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorKind:
    """What is known of an executor before it is made.

    Attributes:
        devices: kinds of device that it runs on, the preferred one first.
        compiled: it runs what a build has put into the bundle for it; if not, the weights are all it needs.
        warms_up: it compiles or captures what it first meets, and is made to meet everything before it serves, on a CPU too.
    """

    devices: tuple[str, ...]
    compiled: bool
    warms_up: bool


EXECUTORS: Mapping[str, ExecutorKind] = {
    "eager": ExecutorKind(devices=("cuda", "cpu"), compiled=False, warms_up=False),
    "inductor": ExecutorKind(devices=("cuda", "cpu"), compiled=False, warms_up=True),
    "onnxruntime": ExecutorKind(devices=("cuda", "cpu"), compiled=True, warms_up=False),
    "tensorrt_rtx": ExecutorKind(devices=("cuda",), compiled=True, warms_up=True),
    "tensorrt": ExecutorKind(devices=("cuda",), compiled=True, warms_up=True),
}
"""By name, the one to prefer last."""


def executor_kind(name: str) -> ExecutorKind:
    """The kind of executor `name`.

    Raises:
        ExecutorError: there is none of that name; the known ones are listed.
    """
    if name not in EXECUTORS:
        raise ExecutorError(f"no executor {name!r}; this version has: {', '.join(EXECUTORS)}")
    return EXECUTORS[name]


def warms_up(name: str, device: str) -> bool:
    """Whether executor `name` runs every kind of step before it serves: on a GPU all do, where kernels are loaded lazily."""
    return device == "cuda" or executor_kind(name).warms_up


def choose_device(name: str, *, asked: str | None, world_size: int) -> str:
    """`cuda` or `cpu` for the ranks of executor `name`; without a wish, GPUs where there is one for each rank.

    Raises:
        ExecutorError: the executor does not run on the device asked for, or there are too few GPUs.
    """
    kind, gpus = executor_kind(name), torch.cuda.device_count()
    if asked not in (None, "cuda", "cpu"):
        raise ExecutorError(f"device must be cuda or cpu, got {asked!r}; rank r runs on GPU r")
    if asked is not None and asked not in kind.devices:
        raise ExecutorError(f"{name} runs on {' or '.join(kind.devices)}, not on {asked}")
    wanted = asked or next((device for device in kind.devices if device == "cpu" or gpus >= world_size), "cuda")
    if wanted == "cuda" and name == "onnxruntime" and not _onnxruntime_has_cuda():
        if asked == "cuda":
            raise ExecutorError("the onnxruntime installed here has no CUDA; install onnxruntime-gpu in its place")
        wanted = "cpu"
    if wanted == "cuda" and gpus < world_size:
        others = [other for other, its in EXECUTORS.items() if "cpu" in its.devices]
        raise ExecutorError(
            f"{name} needs a GPU for each of {world_size} rank(s), and torch sees {gpus} here; run it on a machine that has "
            f"them, or take an executor that runs on a CPU ({', '.join(others)})"
        )
    logger.info("%s on %s: %d GPUs for %d rank(s), %s asked for", name, wanted, gpus, world_size, asked or "no device")
    return wanted


def _onnxruntime_has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
