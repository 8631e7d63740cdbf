"""The registered codecs by name, and what they have in common: loading, encoding, and the size of a session's state.

The name is the `_class_name` of the config in a weight file's header; a file without a config is recognised by its tensors.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from causalrt.codec_geometry import CodecGeometry
from causalrt.errors import CheckpointError, RequestError
from causalrt.model.codecs import block_dct, vae_checkpoint, wan_vae
from causalrt.model.codecs.protocol import CodecConfig, Decoder, VideoCodec
from causalrt.model.codecs.vae_checkpoint import find_vae_files, read_config
from causalrt.model.stored_tensors import map_tensors

CODECS: dict[str, VideoCodec] = {
    block_dct.CLASS_NAME: block_dct.BlockDctCodec(),
    vae_checkpoint.CLASS_NAME: wan_vae.WanCodec(),
}


def _codec_of_mapping(plain: Mapping[str, Any]) -> VideoCodec:
    """Return the codec that a config names, or else Wan's, which reports an unknown or missing name."""
    return CODECS.get(str(plain.get("_class_name")), CODECS[vae_checkpoint.CLASS_NAME])


def codec_of(vae: Any) -> VideoCodec:
    """Return the codec of a module that `load_vae` returned."""
    return _codec_of_mapping(vae.config)


def vae_config_from_mapping(plain: object) -> CodecConfig:
    """Parse the config of any registered codec.

    Raises:
        CheckpointError: the config is of an unknown kind of VAE, or has an impossible value.
    """
    if not isinstance(plain, Mapping):
        raise CheckpointError(f"a VAE's config must be a JSON object, got {type(plain).__name__}")
    return _codec_of_mapping(plain).config(plain)


def load_vae(path: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """Load a codec from local files, in eval mode. Nothing is downloaded.

    On the CPU, weights of type `dtype` stay in the mapped file, which must not be modified as long as the VAE exists.

    Args:
        path: a folder of a release in either layout, its `vae/` folder, the weight file, or a bundle's `vae.safetensors`.
        dtype: type of every parameter.
        device: device of the parameters.

    Raises:
        CheckpointError: the file is missing or damaged, contains code, or is of no registered codec; or tensors are wrong or
            not finite, in which case every bad tensor is listed.
        ExecutorError: a library that the codec needs is not installed.
    """
    files = find_vae_files(path)
    stored: Mapping[str, torch.Tensor] = map_tensors(files.weights)
    if files.layout == "wan":
        fallback = CODECS[vae_checkpoint.CLASS_NAME]
        codec = next((codec for codec in CODECS.values() if codec.recognises(stored)), fallback)
        stored, config = codec.from_release(files.weights, stored)
    else:
        config = vae_config_from_mapping(read_config(files))
    return vae_from_tensors(files.weights, stored, config, dtype=dtype, device=device)


def vae_from_tensors(
    path: Path,
    stored: Mapping[str, torch.Tensor],
    config: CodecConfig,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Any:
    """Make the module that `load_vae` returns from tensors that are already mapped; see `VideoCodec.load`."""
    return CODECS[config.class_name].load(path, stored, config, dtype=dtype, device=device)


def eager_decoder(vae: Any) -> Decoder:
    """Return the streaming decoder of a loaded codec, in eager PyTorch."""
    return codec_of(vae).decoder(vae)


def cache_bytes(config: CodecConfig, *, latent_height: int, latent_width: int, dtype: torch.dtype) -> int:
    """Return the size in bytes of one session's state: 1801 MiB for Wan2.1 at 832x480 pixels in bfloat16.

    While a frame is decoded, each state tensor in turn exists twice; `engines/vae.py` keeps two sets of the state tensors.
    """
    slots = CODECS[config.class_name].cache_slots(config, latent_height=latent_height, latent_width=latent_width)
    return sum(prod(slot.shape) for slot in slots) * dtype.itemsize


@torch.no_grad()
def encode(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Encode frames to normalised latents, as the transformer takes them.

    Args:
        vae: module that `load_vae` returned. Its state is not modified, so several threads may call this at once.
        frames: an image or a clip of 1 + 4k frames: uint8 `[T, height, width, 3]`, or floating-point `[T, 3, height, width]` in
            [-1, 1].

    Returns:
        float32 `[1 + k, C, height / 8, width / 8]`.

    Raises:
        RequestError: the frames have the wrong shape, type, number or values.
    """
    codec = codec_of(vae)
    config = codec.config(vae.config)
    signal = _signal_from_frames(frames, codec.geometry).to(vae.device, vae.dtype)
    mode = codec.encode(vae, signal).float()
    mean, std = (mode.new_tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return (mode - mean) / std


def _signal_from_frames(frames: torch.Tensor, geometry: CodecGeometry) -> torch.Tensor:
    """Check frames, and return them as floating-point `[T, 3, height, width]` in [-1, 1]."""
    pixels = frames.dtype == torch.uint8
    channels = 3 if pixels else 1
    if frames.dim() != 4 or frames.shape[channels] != 3 or not (pixels or frames.is_floating_point()):
        raise RequestError(
            "frames to encode must be uint8 [T, height, width, 3] or floating [T, 3, height, width], "
            f"got {frames.dtype} {list(frames.shape)}"
        )
    signal = frames.float().permute(0, 3, 1, 2) / 127.5 - 1.0 if pixels else frames
    num_frames, _, height, width = signal.shape
    if not geometry.fills_latents(num_frames):
        raise RequestError(f"a clip to encode must have 1 + 4k frames (1, 5, 9, ...), got {num_frames}; leave some out")
    if not height or not width or height % geometry.pixels_per_latent or width % geometry.pixels_per_latent:
        raise RequestError(
            f"frames to encode must have multiples of {geometry.pixels_per_latent} pixels, got {height}x{width}; resize them"
        )
    if not pixels and not ((signal >= -1.0) & (signal <= 1.0)).all():
        raise RequestError(
            "floating frames to encode must lie in [-1, 1], got others or NaN; divide pixels by 127.5, less 1"
        )
    return signal
