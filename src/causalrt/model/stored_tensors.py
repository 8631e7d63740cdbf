"""Tensors in released files, as hostile input: mapped, never run as code, and held against what a model wants.

What their names mean is the affair of `umt5_checkpoint.py` and `vae_checkpoint.py`.
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
    """A tensor, or where one lies."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""


def map_tensors(path: Path, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """Views of a new mapping of a file, which lasts as long as the last of them.

    Args:
        path: a safetensors file, or a torch file.
        verify: read all of a torch file to compare it with its checksums; safetensors files have none.

    Raises:
        CheckpointError: not a regular file, damaged, or holding code or anything else but tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(regular_file(path))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    try:
        state: Any = torch.load(regular_file(path), weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # whatever a hostile or damaged file makes the unpickler raise
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
    """Refuse a file whose tensors are not those of these names and shapes, floating ones.

    Raises:
        CheckpointError: `path` and `fault`, and every name that is missing, extra or misshapen.
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
