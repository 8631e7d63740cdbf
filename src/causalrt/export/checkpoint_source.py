"""Opens checkpoint files, which are treated as untrusted input, and reads their tensors lazily by the keys in the file.

Code in a file is never executed, an index may name only files in its own folder, and tensors stay on disk until they are read.
`checkpoint.py` interprets the keys.
"""

import ctypes
import functools
import json
import logging
import mmap
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from causalrt.errors import CheckpointError
from causalrt.model.torch_archive import TorchArchive
from causalrt.regular_files import regular_file

_log = logging.getLogger(__name__)

_INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in its file: `read` maps it into memory, and `release` drops the pages that became resident."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    release: Callable[[], None]


def stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], bool]:
    """All tensors of a file or folder by their keys, and whether the tensors were nested under a generator key.

    Raises:
        CheckpointError: the path is not a checkpoint, is damaged, incomplete or ambiguous, or contains code.
    """
    if path.is_dir():
        return _open_folder(path), False
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give a .pt or .safetensors file, or a folder with safetensors")
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_shards(path, _shards_from_index(path)), False
    if _is_safetensors(path):
        return _open_safetensors(path), False
    return _open_torch(path)


def _open_torch(path: Path) -> tuple[dict[str, StoredTensor], bool]:
    """All tensors of a torch file by their keys, and whether the tensors were nested under a generator key."""
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    if not mapped:
        _log.warning("%s is a legacy torch file, which cannot be mapped: all of it is read into memory", path)
    try:
        top: Any = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except Exception as error:  # a malicious or damaged file can make the unpickler raise anything
        code = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code is not None:
            raise CheckpointError(
                f"{path} holds code ({code[1] or code[2]}), which was not executed; only tensors are read. "
                "Save the state dict alone: torch.save(model.state_dict(), path)"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint; nothing in it was executed: {reason}") from None

    generators = [key for key in ("generator_ema", "generator") if isinstance(top, Mapping) and key in top]
    if generators:
        _log.info("%s: reading %s of the top keys %s", path, generators[0], sorted(map(str, top)))
    state = top[generators[0]] if generators else top
    wanted = "a state dict, bare or under the key generator_ema or generator"
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} must hold {wanted}, got {type(state).__name__}")
    wrong = sorted(repr(key) for key, value in state.items() if not (isinstance(key, str) and _is_dense(value)))
    if wrong:
        raise CheckpointError(f"{path} must hold {wanted}; these entries are no dense tensors: {', '.join(wrong)}")
    archive = TorchArchive(path) if mapped else None
    ranges = list(_mapped_ranges(path)) if mapped else []
    stored = {key: _stored_from_torch(value.detach(), ranges, archive) for key, value in state.items()}
    return stored, bool(generators)


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _stored_from_torch(
    tensor: torch.Tensor, ranges: list[tuple[int, int, int]], archive: TorchArchive | None
) -> StoredTensor:
    """Create an entry that releases only pages mapped from the file; dropped anonymous pages would read as zeros."""
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + (last + 1) * tensor.element_size()
    offsets = [start - low + offset for low, high, offset in ranges if low <= start and end <= high]
    in_file = tensor.numel() > 0 and bool(offsets)

    def read() -> torch.Tensor:
        if in_file and archive is not None:
            archive.check_at(offsets[0])
        elif archive is not None:
            archive.check_all()
        return tensor

    return StoredTensor(
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        read=read,
        release=functools.partial(_drop_pages, start, end) if in_file else lambda: None,
    )


def _mapped_ranges(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (first address, end, offset in the file) for each mapping of the file in this process; none except on Linux."""
    if sys.platform != "linux":
        return
    target = str(path.resolve())
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == target:
            low, high = fields[0].split("-")
            yield int(low, 16), int(high, 16), int(fields[2], 16)


def _drop_pages(start: int, end: int) -> None:
    """Drop the resident pages that overlap [start, end); clean file pages are reloaded when they are read again."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = start - start % mmap.PAGESIZE
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(mmap.MADV_DONTNEED)) != 0:
        _log.debug("madvise: %s", os.strerror(ctypes.get_errno()))


def _is_safetensors(path: Path) -> bool:
    """Whether the suffix is .safetensors, or a JSON header follows 8 bytes of header length."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            views = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not iterable)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    return {
        key: StoredTensor(
            shape=tuple(view.shape),
            dtype=view.dtype,
            read=functools.partial(_read_safetensors, path, key),
            release=lambda: None,
        )
        for key, view in views.items()
    }


def _read_safetensors(path: Path, key: str) -> torch.Tensor:
    """Read a tensor as a view of its own mapping, so that its resident pages are freed with the view."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} changed while it was read: {error}") from None


def _open_folder(folder: Path) -> dict[str, StoredTensor]:
    for place in (folder, folder / "transformer"):
        indexes = sorted(place.glob(f"*{_INDEX_SUFFIX}"))
        shards = _shards_from_index(indexes[0]) if len(indexes) == 1 else {}
        singles = sorted(file for file in place.glob("*.safetensors") if file.name not in shards.values())
        if len(indexes) + len(singles) > 1:
            names = ", ".join(file.name for file in (*indexes, *singles))
            raise CheckpointError(
                f"{place} holds more than one checkpoint ({names}): give the file instead of the folder"
            )
        if indexes:
            return _open_shards(indexes[0], shards)
        if singles:
            return _open_safetensors(singles[0])
    raise CheckpointError(f"no .safetensors and no {_INDEX_SUFFIX} in {folder} or its transformer/")


def _shards_from_index(index: Path) -> dict[str, str]:
    """Map tensor keys to shard file names, which must be plain names of files in the folder of the index."""
    try:
        plain = json.loads(regular_file(index).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not readable JSON: {error}") from None
    shards = plain.get("weight_map") if isinstance(plain, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} must hold a weight_map from tensor names to file names")
    outside = sorted({shard for shard in shards.values() if not re.fullmatch(r"[\w.-]+\.safetensors", shard)})
    if outside:
        raise CheckpointError(
            f"{index}: a shard must be the plain name of a .safetensors file beside it, got {outside}"
        )
    return shards


def _open_shards(index: Path, shards: Mapping[str, str]) -> dict[str, StoredTensor]:
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}")
    stored: dict[str, StoredTensor] = {}
    held: set[tuple[str, str]] = set()
    for name in names:
        shard = _open_safetensors(index.parent / name)
        stored.update(shard)
        held.update((key, name) for key in shard)
    astray = sorted(f"{key} ({name})" for key, name in held ^ set(shards.items()))
    if astray:
        raise CheckpointError(f"{index} and its shards disagree on where these tensors are: {', '.join(astray)}")
    return stored
