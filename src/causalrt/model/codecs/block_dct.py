"""A codec without learnt weights: a truncated cosine transform of blocks of 3 colours x 4 frames x 8 x 8 pixels.

It replaces the VAE in the demo model. Its scales are those of the VAE (a latent covers 8 x 8 pixels; the first latent is one
frame, each later one four), and so is its streaming (9 frames for the first chunk of three latents, 12 for the others), but
only the mean and spread of each channel are learnt. The transform is orthonormal; of the 768 coefficients of a block, it keeps
the 16 in which the clips of the demo differ most.

    codec.safetensors   tensor `basis` [16, 3, 4, 8, 8]; the header holds the class, and the mean and spread of each channel

Blocks are independent of each other: the only state of a decoder is whether the first latent, which is one frame, was decoded.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import nn

from causalrt.atomic_files import atomic_file
from causalrt.codec_geometry import WAN21
from causalrt.errors import CheckpointError
from causalrt.model.codecs.decode_state import CONFIG_KEY, DecodeState
from causalrt.model.codecs.protocol import CacheSlot
from causalrt.model.stored_tensors import check_tensors

CLASS_NAME = "BlockDct"

CHANNELS = (
    *((0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 1)),
    *((0, 0, 1, 1), (0, 0, 2, 0), (0, 0, 0, 2), (2, 0, 0, 1), (2, 0, 1, 0), (0, 1, 0, 1), (0, 1, 1, 0), (1, 1, 0, 0)),
)
"""Frequencies over colours, frames, rows and columns of each latent channel."""
COLOURS, FRAMES, PIXELS = 3, 4, 8


def cosines(size: int) -> torch.Tensor:
    """The orthonormal DCT-II as `[size, size]` float64, with one frequency per row."""
    frequency, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size) + 0.5
    scale = torch.full((size, 1), math.sqrt(2 / size), dtype=torch.float64)
    scale[0] = math.sqrt(1 / size)
    return scale * torch.cos(math.pi / size * frequency * place)


@functools.cache
def block_basis() -> torch.Tensor:
    """The basis functions of the latent channels, `[16, 3, 4, 8, 8]` float32, orthonormal."""
    colours, frames, pixels = cosines(COLOURS), cosines(FRAMES), cosines(PIXELS)
    blocks = [torch.einsum("c,t,y,x->ctyx", colours[c], frames[t], pixels[y], pixels[x]) for c, t, y, x in CHANNELS]
    return torch.stack(blocks).float()


def encode_blocks(frames_T3HW: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    """Encode 1 + 4k frames in [-1, 1] to latents `[1 + k, 16, H / 8, W / 8]`, not normalised.

    The first frame is repeated to fill a block of four.
    """
    first = frames_T3HW[:1].expand(FRAMES, -1, -1, -1)
    rows, columns = (size // PIXELS for size in frames_T3HW.shape[2:])
    blocks = torch.cat([first, frames_T3HW[1:]]).reshape(-1, FRAMES, COLOURS, rows, PIXELS, columns, PIXELS)
    return torch.einsum("ntchywx,zctyx->nzhw", blocks, block_basis() if basis is None else basis)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDctConfig:
    """Mean and spread of each channel, by which latents are normalised."""

    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim or not all(map(math.isfinite, values)):
                raise CheckpointError(f"{CLASS_NAME} has {name} of {self.z_dim} finite values, got {list(values)}")
        if not all(value > 0 for value in self.latents_std):
            raise CheckpointError(f"{CLASS_NAME} has latents_std that are positive, got {list(self.latents_std)}")

    @property
    def class_name(self) -> str:
        """See `CodecConfig.class_name`."""
        return CLASS_NAME

    @property
    def z_dim(self) -> int:
        """Number of channels of a latent."""
        return len(CHANNELS)

    @property
    def decoder_dim(self) -> int:
        """Number of channels at full resolution in the decoder, which are the colours themselves."""
        return COLOURS

    @classmethod
    def from_mapping(cls, plain: Mapping[str, Any]) -> Self:
        """Make the config from the parsed header of a weight file.

        Raises:
            CheckpointError: a value is missing or impossible.
        """
        values = {}
        for name in ("latents_mean", "latents_std"):
            given = plain.get(name)
            if not isinstance(given, list | tuple) or not all(type(value) in (int, float) for value in given):
                raise CheckpointError(f"{CLASS_NAME} has {name} of {len(CHANNELS)} numbers, got {given!r:.200}")
            values[name] = tuple(map(float, given))
        if unknown := sorted(plain.keys() - values.keys() - {"_class_name"}):
            raise CheckpointError(f"{CLASS_NAME} has no {', '.join(map(str, unknown))}")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return the config as JSON values."""
        constants = {"latents_mean": list(self.latents_mean), "latents_std": list(self.latents_std)}
        return {"_class_name": CLASS_NAME, **constants}


class BlockDct(nn.Module):
    """The transform in a given type and on a given device, as `load_vae` returns it.

    Attributes:
        config: mean and spread of the channels, as a mapping.
    """

    def __init__(self, config: BlockDctConfig, basis: torch.Tensor) -> None:
        super().__init__()
        self.config = config.to_mapping()
        self.basis = nn.Parameter(basis, requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the transform computes."""
        return self.basis.dtype

    @property
    def device(self) -> torch.device:
        """Device on which the transform computes."""
        return self.basis.device

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """Map `[1, 16, H, W]`, not normalised, to frames `[1, 3, 4, 8H, 8W]`, not clamped."""
        _, _, height, width = blocks.shape
        rows = blocks.permute(0, 2, 3, 1) @ self.basis.flatten(1)  # TensorRT has no transposed convolution in bfloat16
        frames = rows.view(1, height, width, COLOURS, FRAMES, PIXELS, PIXELS).permute(0, 3, 4, 1, 5, 2, 6)
        return frames.reshape(1, COLOURS, FRAMES, PIXELS * height, PIXELS * width)


class _BlockDecoder(nn.Module):
    """The part that both steps share."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, codec: BlockDct) -> None:
        super().__init__()
        config = BlockDctConfig.from_mapping(codec.config)
        self.wan = codec  # the prefix of all weights, which `share_weights_pass` expects
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            self.register_buffer(name, torch.tensor(values, device=codec.device).view(1, -1, 1, 1))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode a normalised latent to its four frames in float32."""
        return self.wan.decode((latent.float() * self.std + self.mean).to(self.wan.dtype)).float()


class FirstBlock(_BlockDecoder):
    """The step of a video's first latent: one frame, the mean of the four frames of its block."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Map `[1, 16, H, W]` to `[1, 3, 1, 8H, 8W]` in [-1, 1]."""
        return self.decode(latent).mean(2, keepdim=True).clamp(-1.0, 1.0).to(self.wan.dtype)


class NextBlock(_BlockDecoder):
    """The step of every later latent of a video."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Map `[1, 16, H, W]` to `[1, 3, 4, 8H, 8W]` in [-1, 1]."""
        return self.decode(latent).clamp(-1.0, 1.0).to(self.wan.dtype)


class BlockDecoder:
    """The decoder in eager PyTorch, shared by any number of sessions.

    Attributes:
        codec: the transform.
        first: step of a video's first latent.
        next: step of each later latent.
    """

    def __init__(self, codec: BlockDct) -> None:
        self.codec, self.first, self.next = codec, FirstBlock(codec).eval(), NextBlock(codec).eval()

    def warmed_up(self) -> None:
        """See `Decoder.warmed_up`; there is nothing to keep."""

    def open(self) -> DecodeState:
        """Start a video; its size is taken from the first latents."""
        return BlockDecodeState(self)


class BlockDecodeState(DecodeState):
    """A session's number of decoded latents, which is all the state that this codec has."""

    def __init__(self, decoder: BlockDecoder) -> None:
        super().__init__(channels=len(CHANNELS), dtype=decoder.codec.dtype, latent_size=None)
        self._decoder = decoder

    def _decode_each(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        for latent in latents.to(self._decoder.codec.device).unbind(0):
            step = self._decoder.next if self.latent_frames else self._decoder.first
            self.latent_frames += 1
            yield step(latent.unsqueeze(0))[0].transpose(0, 1)

    def _cache_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        return []

    def _caches(self) -> list[torch.Tensor]:
        return []

    def _set_caches(self, caches: list[torch.Tensor]) -> None:
        return

    def _clear_caches(self) -> None:
        return


class BlockDctCodec:
    """The cosine transform as a registered codec."""

    geometry = WAN21

    def config(self, plain: Mapping[str, Any]) -> BlockDctConfig:
        """See `VideoCodec.config`."""
        return BlockDctConfig.from_mapping(plain)

    def recognises(self, stored: Mapping[str, torch.Tensor]) -> bool:
        """See `VideoCodec.recognises`. Files of this codec always have a config."""
        return False

    def from_release(
        self, path: Path, stored: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], BlockDctConfig]:
        """See `VideoCodec.from_release`."""
        raise CheckpointError(
            f"{path} has no config in its header, and a {CLASS_NAME} needs one; train the demo model again"
        )

    def load(
        self,
        path: Path,
        stored: Mapping[str, torch.Tensor],
        config: BlockDctConfig,
        *,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> BlockDct:
        """See `VideoCodec.load`."""
        check_tensors(path, stored, {"basis": tuple(block_basis().shape)}, fault=f"is no {CLASS_NAME}")
        basis = stored["basis"].to(device=device, dtype=dtype)
        if not basis.isfinite().all():
            raise CheckpointError(f"{path} has values that are not finite in {dtype}: basis")
        return BlockDct(config, basis).eval()

    def cache_slots(self, config: BlockDctConfig, *, latent_height: int, latent_width: int) -> list[CacheSlot]:
        """See `VideoCodec.cache_slots`; this codec has none."""
        return []

    def first_step(self, vae: BlockDct) -> nn.Module:
        """See `VideoCodec.first_step`."""
        return FirstBlock(vae)

    def next_step(self, vae: BlockDct) -> nn.Module:
        """See `VideoCodec.next_step`."""
        return NextBlock(vae)

    def decoder(self, vae: BlockDct) -> BlockDecoder:
        """See `VideoCodec.decoder`."""
        return BlockDecoder(vae)

    def encode(self, vae: BlockDct, signal: torch.Tensor) -> torch.Tensor:
        """See `VideoCodec.encode`."""
        return encode_blocks(signal, vae.basis)


def write_block_dct(path: Path, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Atomically write the file that `load_vae` reads.

    Args:
        path: path of the file, which should end in `.safetensors`.
        mean: mean of each of the 16 channels of latents that are not normalised.
        std: standard deviation of each of these channels.

    Raises:
        CheckpointError: there are not 16 finite values, a spread is not positive, or the file cannot be written.
    """
    config = BlockDctConfig(latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std)))
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(save({"basis": block_basis()}, {CONFIG_KEY: dumps(config.to_mapping())}))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; choose a writable folder") from error
