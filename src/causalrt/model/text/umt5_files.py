"""The files of a released text encoder, which are not trusted.

    folder/models_t5_umt5-xxl-enc-bf16.pth      google/umt5-xxl/tokenizer.json    layout wan
    folder/text_encoder/config.json, model.*    tokenizer/tokenizer.json          layout diffusers
    folder/config.json, model.*                 tokenizer.json                    layout transformers: one folder for both

Nothing is downloaded, no code in a file is run, an index may name only files beside it, and tensors stay on disk until they are
read. `umt5_checkpoint.py` interprets their names.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from causalrt.errors import CheckpointError
from causalrt.model.stored_tensors import map_tensors
from causalrt.regular_files import regular_file

EncoderLayout = Literal["wan", "diffusers", "transformers"]

_WAN_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFiles:
    """Paths of the parts of a text encoder. `config` is None for Wan's layout, whose sizes are inferred from its tensors."""

    layout: EncoderLayout
    weights: Path
    config: Path | None
    tokenizer: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a file. `mapped` is a view of the file, whose pages are read on access."""

    file: Path
    key: str
    mapped: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.mapped.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tensor in the file."""
        return self.mapped.dtype


def find_encoder_files(folder: Path) -> EncoderFiles:
    """Find the files of the first layout whose weights exist.

    Raises:
        CheckpointError: there are no weights, or no config or tokenizer beside them; every place that was searched is listed.
    """
    places: tuple[tuple[EncoderLayout, Path, tuple[str, ...], Path], ...] = (
        ("wan", folder, (_WAN_FILE,), folder / "google" / "umt5-xxl"),
        ("diffusers", folder / "text_encoder", (_INDEX, _SINGLE), folder / "tokenizer"),
        ("transformers", folder, (_INDEX, _SINGLE), folder),
    )
    for layout, place, names, tokenizer in places:
        weights = next((place / name for name in names if (place / name).is_file()), None)
        if weights is None:
            continue
        config = None if layout == "wan" else place / "config.json"
        files = EncoderFiles(layout=layout, weights=weights, config=config, tokenizer=tokenizer / "tokenizer.json")
        lacking = [str(file) for file in (files.config, files.tokenizer) if file is not None and not file.is_file()]
        if lacking:
            raise CheckpointError(
                f"{folder} holds the text encoder {weights.name} ({layout} layout) but lacks {', '.join(lacking)}; "
                "copy what is missing from the release"
            )
        return files
    looked = "\n".join(
        f"  {' or '.join(str(place / name) for name in names)}, with {tokenizer / 'tokenizer.json'} ({layout} layout)"
        for layout, place, names, tokenizer in places
    )
    raise CheckpointError(f"no text encoder in {folder}; looked for:\n{looked}")


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """Open every tensor of a `.pth` file, a safetensors file, or a sharded one (by its index), under its own key.

    Raises:
        CheckpointError: the files are damaged or incomplete, or contain code or anything else but tensors.
    """
    files = _shards_from_index(path) if path.name == _INDEX else [path]
    return {
        key: StoredTensor(file=file, key=key, mapped=tensor)
        for file in files
        for key, tensor in map_tensors(file).items()
    }


def _shards_from_index(index: Path) -> list[Path]:
    """Return the files that an index names; each must be a plain name beside it."""
    try:
        weight_map = json.loads(regular_file(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        strange = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} must map tensor names to file names under weight_map: {error!r}") from None
    if strange:
        raise CheckpointError(
            f"{index}: a shard must be the plain name of a .safetensors file beside it, got {strange}"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}")
    return [index.parent / name for name in names]
