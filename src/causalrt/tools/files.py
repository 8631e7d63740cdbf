"""Files of commands: they read prompt embeddings and latents, and write latents, reports and folders of results."""

import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from causalrt.atomic_files import atomic_file
from causalrt.errors import CheckpointError, PromptError, RequestError
from causalrt.model.torch_archive import TorchArchive
from causalrt.regular_files import regular_file

PROMPT_KEY = "prompt_embeds"


def read_prompt_embeds(path: Path) -> torch.Tensor:
    """Read embeddings `[rows, text_dim]` from a file; a leading batch dimension of 1 is dropped.

    Args:
        path: `.safetensors` (one tensor, or the one named `prompt_embeds`), `.npy`, or `.pt` holding one tensor. Code in a
            file is never run.

    Raises:
        PromptError: the file cannot be read, or does not hold one tensor.
    """
    if path.suffix not in (".safetensors", ".npy", ".pt"):
        raise PromptError(f"{path}: prompt embeddings come as .safetensors, .npy or .pt")
    try:
        regular_file(path)
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if PROMPT_KEY not in tensors and len(tensors) != 1:
                raise PromptError(f"{path} holds {sorted(tensors)}; name the one to use {PROMPT_KEY!r}")
            embeds = tensors.get(PROMPT_KEY, next(iter(tensors.values())))
        elif path.suffix == ".npy":
            embeds = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            embeds = torch.load(path, weights_only=True, map_location="cpu")
            if zipfile.is_zipfile(path):
                TorchArchive(path).check_all()
    except PromptError:
        raise
    except CheckpointError as error:
        raise PromptError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise PromptError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the parsers of numpy and torch raise errors of many types
        raise PromptError(f"{path} holds no plain tensor ({type(error).__name__}: {error})") from error
    if not isinstance(embeds, torch.Tensor):
        raise PromptError(f"{path} must hold one tensor, got {type(embeds).__name__}")
    return embeds[0] if embeds.dim() == 3 and embeds.shape[0] == 1 else embeds


def read_latents(path: Path) -> torch.Tensor:
    """Read latents `[frames, 16, H, W]` from a safetensors file, as `write_latents` writes it.

    Raises:
        RequestError: the file cannot be read, or holds no latents.
    """
    try:
        return load_file(regular_file(path))["latents"]
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read: {error}; give a safetensors file") from error
    except KeyError:
        raise RequestError(f"{path} holds no tensor 'latents'; give a file that `causalrt generate` wrote") from None


def check_writable(path: Path) -> None:
    """Check that a result can be written, before the work that makes it begins.

    Raises:
        RequestError: the folder is missing or not writable, or the path is a folder or a device.
    """
    parent = path.absolute().parent
    if (path.exists() and not path.is_file()) or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RequestError(f"cannot write {path}: choose a file in an existing, writable folder")


def check_writable_in(folder: Path, names: Iterable[str]) -> None:
    """Check that files can be written in a folder that may not exist yet; nothing is created.

    Raises:
        RequestError: the folder cannot be created or written to, or a folder or a device has one of the names.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RequestError(
            f"cannot write to {folder}: {there} is no folder that can be written to; choose another folder with --out"
        )
    if folder.is_dir():
        for name in names:
            check_writable(folder / name)


def make_folder(folder: Path) -> None:
    """Create the folder of results, unless it exists.

    Raises:
        RequestError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error


def write_latents(path: Path, latents: torch.Tensor, metadata: dict[str, str]) -> None:
    """Write latents `[frames, 16, H, W]` as safetensors, atomically; equal latents give equal bytes."""
    data = save({"latents": latents.contiguous()}, metadata)
    write_whole(path, _with_sorted_header(data))


def _with_sorted_header(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library writes in a different order each time."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the data must begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file atomically.

    Raises:
        RequestError: it cannot be written; an earlier file of that name is unchanged.
    """
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(contents)
    except OSError as error:
        raise RequestError(f"writing {path} failed, nothing there has changed: {error}") from error
