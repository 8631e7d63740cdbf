"""Loads UMT5 encoder weights of any supported release into transformers' module.

    wan           token_embedding  blocks.<i>.norm1  attn.q  pos_embedding.embedding  ffn.gate.0  ffn.fc1  ffn.fc2  norm
    transformers  shared           encoder.block.<i>.layer.0.layer_norm  ...SelfAttention.q  ...DenseReluDense.wi_0  ...

This module handles the names, sizes and memory of the weights; `umt5_files.py` opens the files. The module is built on the meta
device and then given its tensors: on the CPU, those of the requested type stay views of the mapped file; the others are copied
a few at a time, from short-lived mappings, whose pages are released with them.
"""

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from causalrt.errors import CheckpointError, ExecutorError
from causalrt.install_hint import install_extra
from causalrt.model.stored_tensors import check_tensors, map_tensors
from causalrt.model.text.umt5_files import EncoderFiles, EncoderLayout, StoredTensor, open_weights

_TIED = "encoder.embed_tokens.weight"  # transformers' second name of shared.weight
# Pages that were read are released with their mapping. A new mapping costs 20 ms with 242 tensors; eight tensors are 3 % of the
# weights.
_TENSORS_PER_MAPPING = 8

# Module of transformers -> module of Wan's file; names within a block lack their `encoder.block.<i>.` and `blocks.<i>.`.
_WAN_MODULES = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def video_library(name: str) -> Any:
    """Import a library of the extra `video`.

    Raises:
        ExecutorError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExecutorError(
            f"encoding text needs {name}, which cannot be imported ({error}); {install_extra('video')}"
        ) from error


def load_encoder(files: EncoderFiles, *, dtype: torch.dtype, device: torch.device, text_dim: int | None) -> Any:
    """Load a `UMT5EncoderModel` in eval mode with the weights of `files`, all of type `dtype`, on `device`.

    Args:
        files: paths of the encoder's files.
        dtype: type of every parameter.
        device: device of the parameters.
        text_dim: required width of the embeddings; None accepts any.

    Raises:
        CheckpointError: the files are unreadable, contain code, or are not a UMT5 encoder of that width; every bad tensor is
            listed.
        ExecutorError: transformers is not installed.
    """
    stored = open_weights(files.weights)
    if _TIED in stored:
        tied = stored.pop(_TIED)
        stored.setdefault("shared.weight", tied)
    sizes = infer_sizes({key: entry.shape for key, entry in stored.items()}, files.layout)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty_encoder(**sizes).state_dict().items()}
    stored_as = {stored_key(name, files.layout): shape for name, shape in wanted.items()}
    check_tensors(files.weights, stored, stored_as, fault="is no whole UMT5 encoder")
    if text_dim is not None and sizes["d_model"] != text_dim:
        raise CheckpointError(
            f"{files.weights} makes embeddings of width {sizes['d_model']}, but the model wants text_dim {text_dim}; "
            "take the text encoder that the model was trained with"
        )
    model = empty_encoder(**sizes, **({} if files.config is None else _settings_from_config(files.config, sizes)))
    state = _loaded({name: stored[stored_key(name, files.layout)] for name in wanted if name != _TIED}, dtype, device)
    model.load_state_dict(state | {_TIED: state["shared.weight"]}, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def empty_encoder(**config: float) -> Any:
    """Make a `UMT5EncoderModel` on the meta device from fields of `UMT5Config`, which default to Wan's values."""
    transformers = video_library("transformers")
    with torch.device("meta"):
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**config))


def stored_key(name: str, layout: EncoderLayout) -> str:
    """Return the key under which a layout stores the parameter that transformers calls `name`."""
    name = "shared.weight" if name == _TIED else name
    match = re.fullmatch(r"(?:encoder\.block\.(\d+)\.)?(.+)\.weight", name)
    if layout != "wan" or match is None:
        return name
    block, module = match.groups()
    return ("" if block is None else f"blocks.{block}.") + _WAN_MODULES[module] + ".weight"


def infer_sizes(shapes: Mapping[str, tuple[int, ...]], layout: EncoderLayout) -> dict[str, int]:
    """Infer fields of `UMT5Config` from the first block that has the tensors; a missing one defaults to that of umt5-xxl.

    The later check of every tensor against these sizes reports what is missing here.
    """
    prefix = "blocks." if layout == "wan" else "encoder.block."

    def matrix(name: str, *usual: int) -> tuple[int, ...]:
        end = stored_key(f"{name}.weight", layout).removeprefix(f"{prefix}0")
        found = (shape for key, shape in shapes.items() if key.endswith(end) and len(shape) == 2 and all(shape))
        return next(found, usual)

    vocab_size, d_model = matrix("shared", 256384, 4096)
    num_buckets, num_heads = matrix("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", 32, 64)
    inner, _ = matrix("encoder.block.0.layer.0.SelfAttention.q", 4096, 4096)
    d_ff, _ = matrix("encoder.block.0.layer.1.DenseReluDense.wi_0", 10240, 4096)
    blocks = {key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)}
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": max(1, inner // num_heads),
        "d_ff": d_ff,
        "num_layers": len(blocks) or 24,
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
    }


def _settings_from_config(path: Path, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the settings that tensors cannot show; check that the sizes in `config.json` agree with those of the tensors."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold the configuration of a UMT5 encoder, got {type(config).__name__}")
    wanted = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", **sizes}
    wrong = [f"{key} {config[key]!r}, wanted {want!r}" for key, want in wanted.items() if config.get(key, want) != want]
    settings = {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
    for key, default in settings.items():
        settings[key] = value = config.get(key, default)
        if type(value) is not type(default) or not 0 < value < 2**31:
            wrong.append(f"{key} {value!r}, wanted a positive {type(default).__name__}")
    if wrong:
        raise CheckpointError(f"{path} does not describe the UMT5 encoder beside it: {'; '.join(wrong)}")
    return settings


def _loaded(stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Return tensors of the requested type and device: the view itself if it fits, else a copy from a short-lived mapping."""
    state = {name: entry.mapped for name, entry in stored.items()}
    copied = [name for name, entry in stored.items() if entry.dtype != dtype or device.type != "cpu"]
    for first in range(0, len(copied), _TENSORS_PER_MAPPING):
        mappings: dict[Path, dict[str, torch.Tensor]] = {}
        for name in copied[first : first + _TENSORS_PER_MAPPING]:
            entry = stored[name]
            if entry.file not in mappings:
                mappings[entry.file] = map_tensors(entry.file, verify=False)  # already verified by `open_weights`
            state[name] = mappings[entry.file][entry.key].to(device=device, dtype=dtype)
    return state
