"""Converts released checkpoints to one plain weight file.

    .pt / .safetensors / folder -> open_checkpoint -> Checkpoint (lazy, reference names) -> write_weights -> one file

This module is responsible for the names, shapes and values of the weights; `checkpoint_source.py` opens the files. Resident
memory stays at the size of the converted weights, because the pages of each source tensor are released after its conversion.

Reference names are those of the released Self-Forcing file without `model.` (model_spec section 8).
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from causalrt.atomic_files import atomic_file
from causalrt.config import ModelConfig
from causalrt.engines.bundle import tensor_digest
from causalrt.errors import BuildError, CheckpointError
from causalrt.export.checkpoint_source import StoredTensor, stored_tensors

DIGESTS = "causalrt-weights"
"""The only metadata key of the weight file (several would be written in arbitrary order): JSON, the sha256 per tensor."""
KeyLayout = Literal["self_forcing", "wan", "diffusers"]

_log = logging.getLogger(__name__)

_WRAPPER_PARTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_DIFFUSERS_MARK = "condition_embedder."

# Maps diffusers modules to reference modules; names of block modules omit `blocks.<i>.`.
_DIFFUSERS_MODULES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_DIFFUSERS_BLOCK_MODULES = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
} | {
    f"{theirs}.{their_part}": f"{ours}.{part}"
    for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for their_part, part in (
        *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")),
        *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
    )
}

# Maps fields of ModelConfig to the tensor that shows them, its rank and the dimension.
_SIZE_SOURCES = {
    "dim": ("patch_embedding.weight", 5, 0),
    "ffn_dim": ("blocks.0.ffn.0.weight", 2, 0),
    "freq_dim": ("time_embedding.0.weight", 2, 1),
    "text_dim": ("text_embedding.0.weight", 2, 1),
    "latent_channels": ("patch_embedding.weight", 5, 1),
    "patch_height": ("patch_embedding.weight", 5, 3),
    "patch_width": ("patch_embedding.weight", 5, 4),
}


class Checkpoint:
    """Tensors of an opened checkpoint under reference names, read on demand.

    Attributes:
        path: file or folder that was opened.
        layout: `diffusers`, `self_forcing` (a generator key or the prefix `model.`), or `wan` (bare names).
        shapes: shape of every tensor, by reference name.
        dtypes: element type of every tensor, by reference name.
    """

    def __init__(self, path: Path, *, layout: KeyLayout, stored: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.layout: KeyLayout = layout
        self.shapes: Mapping[str, tuple[int, ...]] = {name: entry.shape for name, entry in stored.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: entry.dtype for name, entry in stored.items()}
        self._stored = stored

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored; callers must not modify it, because it is a view of the mapped file."""
        return self._stored[name].read()

    def release(self, name: str) -> None:
        """Release the resident pages of a tensor; reading it again loads them from the file.

        A safetensors file is mapped anew for each `tensor` call, and unmapped with the last reference to the returned tensor.
        A legacy `.pt` stays in memory as long as the checkpoint does, so this method does nothing for it.
        """
        self._stored[name].release()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a released checkpoint lazily and give its tensors their reference names.

    Args:
        path: a Self-Forcing or Wan `.pt`/`.pth`, a `.safetensors` file, a `.safetensors.index.json`, or a folder that contains
            either of the last two directly or in `transformer/`.

    Raises:
        CheckpointError: the path is not a checkpoint, is damaged, incomplete or ambiguous, or contains code.
    """
    stored, generator = stored_tensors(path)
    diffusers = any(_DIFFUSERS_MARK in key for key in stored)
    origin: dict[str, str] = {}
    prefixed = False
    for key in stored:
        bare = ".".join(part for part in key.split(".") if part not in _WRAPPER_PARTS)
        prefixed |= bare.startswith("model.")
        name = bare.removeprefix("model.")
        name = _reference_from_diffusers(name) if diffusers else name
        if name in origin:
            raise CheckpointError(f"{path}: the keys {origin[name]!r} and {key!r} are both the tensor {name!r}")
        origin[name] = key
    layout: KeyLayout = "diffusers" if diffusers else "self_forcing" if generator or prefixed else "wan"
    _log.info("checkpoint %s: layout %s, %d tensors", path, layout, len(origin))
    return Checkpoint(path, layout=layout, stored={name: stored[origin[name]] for name in sorted(origin)})


def _reference_from_diffusers(name: str) -> str:
    """Convert a diffusers name to the reference name; unknown names stay unchanged and are later reported as extra."""
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name, flags=re.DOTALL)
    if match is None:
        return name
    block, module, leaf = (group or "" for group in match.groups())
    table = _DIFFUSERS_BLOCK_MODULES if block else _DIFFUSERS_MODULES
    return block + table.get(module, module) + leaf


def model_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, by reference name (model_spec section 8)."""
    d = model.dim
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, *columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, *columns)
        shapes[f"{name}.bias"] = (rows,)

    linear("patch_embedding", d, model.latent_channels, 1, model.patch_height, model.patch_width)
    linear("text_embedding.0", d, model.text_dim)
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, model.freq_dim)
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    for i in range(model.num_layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, d)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", d, d)
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{norm}.weight"] = (d,)
        linear(f"{block}.norm3", d)
        linear(f"{block}.ffn.0", model.ffn_dim, d)
        linear(f"{block}.ffn.2", d, model.ffn_dim)
    shapes["head.modulation"] = (1, 2, d)
    linear("head.head", model.patch_features, d)
    return shapes


def infer_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Infer fields of `ModelConfig` from the tensor shapes; `num_heads` and `text_len` cannot be inferred.

    A field is omitted if its tensor is missing or does not have the expected rank.
    """
    sizes = {
        field: checkpoint.shapes[name][dim]
        for field, (name, rank, dim) in _SIZE_SOURCES.items()
        if len(checkpoint.shapes.get(name, ())) == rank
    }
    blocks = [int(match[1]) for name in checkpoint.shapes if (match := re.match(r"blocks\.(\d{1,9})\.", name))]
    if blocks:
        sizes["num_layers"] = max(blocks) + 1
    return sizes


def check_checkpoint(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Check the checkpoint against the config: the model sizes first, then every tensor.

    Raises:
        CheckpointError: sizes differ (the error lists them all, with the flags that set them), or tensors are missing, extra or
            misshapen (the error lists them all).
    """
    differing = [
        f"  {field}: checkpoint {size}, recipe {getattr(model, field)}; --set model.{field}={size}"
        for field, size in sorted(infer_sizes(checkpoint).items())
        if size != getattr(model, field)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path} holds a model of other sizes (num_heads and text_len cannot be derived from weights):\n"
            + "\n".join(differing)
        )
    wanted = model_shapes(model)
    held = checkpoint.shapes
    groups = {
        "missing": sorted(wanted.keys() - held.keys()),
        "extra": sorted(held.keys() - wanted.keys()),
        "misshapen": [
            f"{name} (got {_typed(held[name], checkpoint.dtypes[name])}, wanted floating {list(wanted[name])})"
            for name in sorted(wanted.keys() & held.keys())
            if held[name] != wanted[name] or not checkpoint.dtypes[name].is_floating_point
        ],
    }
    if any(groups.values()):
        lines = [f"  {group} ({len(names)}): {', '.join(names)}" for group, names in groups.items() if names]
        raise CheckpointError(f"{checkpoint.path} does not hold the model of the recipe:\n" + "\n".join(lines))


def _typed(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def write_weights(
    checkpoint: Checkpoint,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    out: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Convert the checkpoint to a single safetensors file of one type, in the order and shapes that the step reads.

    Names and shapes are those of the reference, with two exceptions. `patch_embedding.weight` is flattened to
    [dim, patch_features]. The rows of `head.head`, which the reference orders (dy, dx, channel) with channel fastest, are
    stored as (channel, dy, dx) with dx fastest, so that a token's features have the same order at the model's output as at its
    input.

    Args:
        checkpoint: the opened checkpoint.
        model: sizes that its tensors must have.
        dtype: type of every tensor written, including norms and modulations.
        out: file to write; it is written under a temporary name beside it first.
        on_progress: called with (tensors done, total number of tensors).

    Raises:
        CheckpointError: the checkpoint is not of this model, or has values that are not finite or do not fit `dtype` (the error
            lists every bad tensor).
        BuildError: the file cannot be written.
    """
    check_checkpoint(checkpoint, model)
    names = list(model_shapes(model))
    converted: dict[str, torch.Tensor] = {}
    digests: dict[str, str] = {}
    bad: list[str] = []
    for done, name in enumerate(names, start=1):
        tensor, fault = _convert(checkpoint.tensor(name), name, model, dtype)
        checkpoint.release(name)
        if fault:
            bad.append(f"  {name}: {fault}")
            converted.clear()
        elif not bad:
            converted[name] = tensor
            digests[name] = tensor_digest(tensor)
        if on_progress is not None:
            on_progress(done, len(names))
    if bad:
        raise CheckpointError(f"{checkpoint.path} cannot be written as {dtype}:\n" + "\n".join(bad))

    try:
        with atomic_file(out) as partial:
            save_file(converted, partial, metadata={DIGESTS: json.dumps(digests)})
    except (SafetensorError, OSError) as error:
        size_mib = sum(tensor.nbytes for tensor in converted.values()) / 2**20
        raise BuildError(f"cannot write the weights ({size_mib:.0f} MiB) to {out}: {error}") from error


def converted_tensors(
    checkpoint: Checkpoint, model: ModelConfig, *, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for every tensor that `write_weights` writes, one at a time.

    Raises:
        CheckpointError: the checkpoint is not of this model.
    """
    check_checkpoint(checkpoint, model)
    for name in model_shapes(model):
        yield name, _convert(checkpoint.tensor(name), name, model, dtype)[0]
        checkpoint.release(name)


def _convert(source: torch.Tensor, name: str, model: ModelConfig, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    """Convert a tensor, in new storage, to the form that is written; also return what is wrong with its values, or ""."""
    if name == "patch_embedding.weight":
        source = source.flatten(1)
    elif name in ("head.head.weight", "head.head.bias"):
        rows = source.reshape(model.patch_height, model.patch_width, model.latent_channels, *source.shape[1:])
        source = rows.movedim(2, 0).flatten(0, 2)
    tensor = torch.empty(source.shape, dtype=dtype).copy_(source)
    # The conversion keeps NaN and Inf and turns overflow into Inf, so one pass without temporaries detects all three.
    if all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist()):
        return tensor, ""
    num_bad = int((~source.isfinite()).sum())
    num_overflowing = int((~tensor.isfinite()).sum()) - num_bad
    faults = ((num_bad, "not finite"), (num_overflowing, f"too large for {dtype}"))
    return tensor, ", ".join(f"{count} of {tensor.numel()} values {what}" for count, what in faults if count)
