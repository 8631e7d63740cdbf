"""Tensors in released files, which are untrusted: they are mapped, never run as code, and checked against the model.

`umt5_checkpoint.py` and `vae_checkpoint.py` interpret the names of the tensors.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from causalrt.errors import CheckpointError
from causalrt.model.torch_archive import TorchArchive
from causalrt.regular_files import regular_file

_FLOATING = (torch.bfloat16, torch.float16, torch.float32)


class Stored(Protocol):
    """A tensor, or a reference to one in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tensor."""


def map_tensors(path: Path, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """Map a file and return views of its tensors; the mapping lasts as long as any of them.

    Args:
        path: a safetensors file or a torch file.
        verify: whether to read all of a torch file and compare it with its checksums; safetensors files have none.

    Raises:
        CheckpointError: the file is not a regular one, is damaged, or contains code or anything else but tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(regular_file(path))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    try:
        state: Any = torch.load(regular_file(path), weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # a malicious or damaged file can make the unpickler raise anything
        code = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code is not None:
            raise CheckpointError(
                f"{path} holds code ({code[1] or code[2]}), which was not executed; take the released file"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is damaged or no torch file that can be mapped; nothing was executed: {reason}"
        ) from None
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and _is_dense(value) for key, value in state.items()
    ):
        raise CheckpointError(f"{path} must hold a plain dict of tensors by name, got {type(state).__name__}")
    if verify:
        TorchArchive(path).check_all()
    return {key: value.detach() for key, value in state.items()}


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def check_tensors(
    path: Path, stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], *, fault: str
) -> None:
    """Check that a file has exactly the tensors of these names and shapes, and that all are floating-point.

    Raises:
        CheckpointError: the message has `path` and `fault`, and lists every missing, unexpected or misshapen tensor.
    """
    groups = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "extra": sorted(stored.keys() - wanted.keys()),
        "misshapen": [
            f"{key} (got {stored[key].dtype} {list(stored[key].shape)}, wanted floating {list(wanted[key])})"
            for key in sorted(wanted.keys() & stored.keys())
            if tuple(stored[key].shape) != wanted[key] or stored[key].dtype not in _FLOATING
        ],
    }
    if any(groups.values()):
        lines = [f"  {group} ({len(keys)}): {', '.join(keys)}" for group, keys in groups.items() if keys]
        raise CheckpointError(f"{path} {fault}:\n" + "\n".join(lines))
