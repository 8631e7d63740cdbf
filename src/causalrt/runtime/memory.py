"""Memory of one rank, predicted from the config before anything is allocated."""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from causalrt.config import Config
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import OutOfMemoryError
from causalrt.layout import layout_from_config
from causalrt.model.wan import num_parameters

CONTROL_GROUP = Path("/sys/fs/cgroup")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank with one session.

    Attributes:
        weights_bytes: parameters.
        kv_bytes: KV slots of the session.
        cross_kv_bytes: keys and values of its prompt.
        activation_bytes: the largest set of activations alive at once, exchange buffers included (an estimate).
        attention_bytes: scratch of self-attention; ONNX Runtime's standard Attention holds every score.
    """

    weights_bytes: int
    kv_bytes: int
    cross_kv_bytes: int
    activation_bytes: int
    attention_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(asdict(self).values())


def predict_memory(config: Config, executor: str, *, device: str = "cpu") -> Memory:
    """Bytes that one rank of `config` will hold under `executor` on a kind of device, with one session open.

    A lone first frame's step has the same weights. Engines hold a copy of their own, and so does ONNX Runtime on a GPU.
    """
    copies = executor in FLAVOURS or (executor == "onnxruntime" and device == "cuda")
    weight_sets = len(config.video.kinds_of_chunk) if copies else 1
    layout, model = layout_from_config(config), config.model
    size = ELEMENT_BYTES[config.build.precision]
    slots = config.slot_rows
    widest = max(6 * model.dim, model.ffn_dim + 2 * model.dim)
    exchange = 2 * layout.world_size * layout.scatter_rows * model.head_dim if layout.world_size > 1 else 0
    scores = max(s.num_heads * layout.world_size * s.query_rows for s in layout.shares) * slots
    return Memory(
        weights_bytes=num_parameters(model) * size * weight_sets,
        kv_bytes=2 * model.num_layers * layout.kv_heads * slots * model.head_dim * size,
        cross_kv_bytes=2 * model.num_layers * model.text_len * model.dim * size,
        activation_bytes=(layout.local_tokens * widest + exchange) * size,
        attention_bytes=scores * size if executor == "onnxruntime" else 0,
    )


def available_bytes() -> int | None:
    """Memory that this host, or the control group that holds this process to less, can still give; None if neither says."""
    limits = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        most, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        limits.append(most - used + int(counts["inactive_file"]))  # file cache counts as used, and gives way
    return min(limits, default=None)


def check_memory(memory: Memory, *, ranks: int, shared_weights: bool) -> None:
    """Refuse what does not fit on this host.

    Args:
        memory: of one rank.
        ranks: on this host.
        shared_weights: ranks map the weights' file and share its pages (eager); onnxruntime packs a copy for each.

    Raises:
        OutOfMemoryError: with the parts, and what to do.
    """
    available = available_bytes()
    needed = memory.total_bytes * ranks - (memory.weights_bytes * (ranks - 1) if shared_weights else 0)
    if available is not None and needed > available:
        raise OutOfMemoryError(_does_not_fit(memory, f"{ranks} rank(s) need", needed, available, "host"))


def check_device_memory(memory: Memory, device: torch.device) -> None:
    """Refuse what does not fit on a rank's own GPU.

    Raises:
        OutOfMemoryError: with the parts, and what to do.
    """
    available, _ = torch.cuda.mem_get_info(device)
    if memory.total_bytes > available:
        raise OutOfMemoryError(_does_not_fit(memory, f"{device} needs", memory.total_bytes, available, "GPU"))


def _does_not_fit(memory: Memory, who: str, needed: int, available: int, place: str) -> str:
    parts = ", ".join(f"{name.removesuffix('_bytes')} {value / 2**30:.2f}" for name, value in asdict(memory).items())
    return (
        f"{who} {needed / 2**30:.2f} GiB here and {available / 2**30:.2f} are free (GiB a rank: {parts}); "
        f"use fewer latent frames (`--set video.window_frames=...`), a smaller precision, or a larger {place}"
    )
