"""Wan's video VAE as a streaming decoder: latents in, frames out; each session keeps the decoder's caches.

    latent 0    -> FirstFrame ->  1 frame    fills all caches but those of the two time convolutions, which stay zero
    latent 1, 2 -> NextFrame  ->  4 frames each, reads the caches and returns new ones
    latent 3... -> NextFrame  ->  4 frames each

A first chunk of 3 latents therefore gives 9 frames, and a later one 12, bit for bit what diffusers decodes from the whole video
at once. A cache holds the last two inputs of a causal convolution, `[1, C, 2, h, w]`, with zeros for inputs before the first.
The decoder of diffusers takes its caches as an argument, so the module holds no state, and any number of sessions can share it.

This module computes the steps, keeps their state in eager PyTorch, and encodes. `vae_checkpoint.py` reads weights,
`decode_state.py` is the interface that a session sees, and `engines/vae.py` runs the same two steps as exported graphs.

Shapes: F latents, T frames, H and W the sizes of a latent; a frame has 8H x 8W pixels.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from causalrt.codec_geometry import WAN21
from causalrt.model.codecs.decode_state import DecodeState
from causalrt.model.codecs.protocol import CacheSlot
from causalrt.model.codecs.vae_checkpoint import (
    VaeConfig,
    config_from_tensors,
    diffusers_from_wan,
    wan_vae_from_tensors,
)

CACHED_FRAMES = 2


def cache_slots(config: VaeConfig, *, latent_height: int, latent_width: int) -> list[CacheSlot]:
    """Return the decoder's caches, in the order in which it fills them."""
    height, width = latent_height, latent_width

    def slot(channels: int, *, skips_first: bool = False) -> CacheSlot:
        return CacheSlot(shape=(1, channels, CACHED_FRAMES, height, width), skips_first=skips_first)

    stages = [config.decoder_dim * mult for mult in reversed(config.dim_mult)]
    slots = [slot(config.z_dim), *[slot(stages[0])] * 4]
    channels = stages[0]
    for index, out in enumerate(stages):
        for _ in range(config.num_res_blocks + 1):
            slots += [slot(channels), slot(out)]
            channels = out
        if index < len(config.temperal_downsample):
            if config.temperal_downsample[-1 - index]:
                slots.append(slot(out, skips_first=True))
            height, width, channels = 2 * height, 2 * width, out // 2
    return [*slots, slot(channels)]


class Doubled(nn.Module):
    """Upsamples by repeating each pixel in both directions.

    This equals `nearest-exact` at a scale of 2, but needs neither a float32 copy nor an index.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[N, C, h, w]` to `[N, C, 2h, 2w]`."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _lean_decoder(decoder: nn.Module) -> nn.Module:
    """Copy diffusers' decoder over the same parameters, with `Doubled` in place of its upsampling."""
    lean = copy.deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})
    for name, module in list(lean.named_modules()):
        if isinstance(module, nn.Upsample):
            assert (module.mode, module.scale_factor) == ("nearest-exact", (2.0, 2.0))
            lean.set_submodule(name, Doubled())
    return lean


class _LatentDecoder(nn.Module):
    """The part that both steps share: the weights that decoding needs, and the constants."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        config = VaeConfig.from_mapping(vae.config)
        # All weights need one common prefix, as `share_weights_pass` expects; the VAE itself cannot be it, as it holds its
        # encoder too.
        self.wan = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": _lean_decoder(vae.decoder)})
        self.dtype: torch.dtype = vae.dtype
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            self.register_buffer(name, torch.tensor(values, device=vae.device).view(1, -1, 1, 1))

    def decode(self, latent: torch.Tensor, cache: list[Any], *, first: bool) -> torch.Tensor:
        """Decode a normalised latent to frames in [-1, 1]; replace entries of `cache`, without writing to their tensors."""
        signal = (latent.float() * self.std + self.mean).to(self.dtype).unsqueeze(2)
        hidden = self.wan["post_quant_conv"](signal)
        frames: torch.Tensor = self.wan["decoder"](hidden, feat_cache=cache, feat_idx=[0], first_chunk=first)
        return frames.clamp(-1.0, 1.0)


class FirstFrame(_LatentDecoder):
    """The step of a video's first latent.

    It has no past, and skips the two time convolutions, which double the number of frames.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        slots = cache_slots(VaeConfig.from_mapping(vae.config), latent_height=1, latent_width=1)
        self.skips = [slot.skips_first for slot in slots]

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Map `[1, C, H, W]` to a frame `[1, 3, 1, 8H, 8W]` in [-1, 1], and the caches except those that stay zero."""
        cache: list[Any] = [None] * len(self.skips)
        frames = self.decode(latent, cache, first=True)
        filled = [past for past, skipped in zip(cache, self.skips, strict=True) if not skipped]
        return frames, [F.pad(past, (0, 0, 0, 0, CACHED_FRAMES - 1, 0)) for past in filled]


class NextFrame(_LatentDecoder):
    """The step of every later latent of a video."""

    def forward(self, latent: torch.Tensor, caches: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Map `[1, C, H, W]` and the caches to frames `[1, 3, 4, 8H, 8W]` in [-1, 1], and the next caches."""
        cache = list(caches)
        return self.decode(latent, cache, first=False), cache


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute float32 convolutions of this process in full float32; on a GPU, cuDNN defaults to TF32.

    The decoders of `onnxruntime` do not use TF32 either, so eager and ONNX Runtime agree on a GPU as they do on a CPU.
    """
    # `allow_tf32` is deprecated: torch warns about it.
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


class StreamingDecoder:
    """The decoder's weights, shared by any number of sessions.

    Attributes:
        config: config of the VAE.
        dtype: type in which the decoder computes.
        device: device of the VAE, where it must stay as long as the decoder exists.
    """

    def __init__(self, vae: Any) -> None:
        self.config = VaeConfig.from_mapping(vae.config)
        self.dtype: torch.dtype = vae.dtype
        self.device: torch.device = vae.device
        self.first, self.next = FirstFrame(vae).eval(), NextFrame(vae).eval()

    def warmed_up(self) -> None:
        """See `Decoder.warmed_up`; there is nothing to keep."""

    def open(self) -> DecodeState:
        """Start a video; its size is taken from the first latents."""
        return EagerDecodeState(self)


class EagerDecodeState(DecodeState):
    """Caches as torch returns them. None is ever written to, so a snapshot need not copy them."""

    def __init__(self, decoder: StreamingDecoder) -> None:
        super().__init__(channels=decoder.config.z_dim, dtype=decoder.dtype, latent_size=None)
        self._decoder = decoder
        self._cache: list[torch.Tensor] = []

    def _decode_each(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        for latent in latents.to(self._decoder.device).unbind(0):
            with exact_convolutions():  # ends before the caller gets the frames
                if self.latent_frames:
                    frames = self._decoder.next.decode(latent.unsqueeze(0), self._cache, first=False)
                else:
                    frames, filled = self._decoder.first(latent.unsqueeze(0))
                    self._cache = self._with_zeros(filled)
            self.latent_frames += 1
            yield frames[0].transpose(0, 1)

    def _with_zeros(self, filled: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return all caches after the first latent, given those that it has filled."""
        height, width = filled[0].shape[3:]
        slots, given = cache_slots(self._decoder.config, latent_height=height, latent_width=width), iter(filled)
        return [filled[0].new_zeros(slot.shape) if slot.skips_first else next(given) for slot in slots]

    def _cache_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        height, width = latent_size
        return [s.shape for s in cache_slots(self._decoder.config, latent_height=height, latent_width=width)]

    def _caches(self) -> list[torch.Tensor]:
        return [cache.contiguous() for cache in self._cache]

    def _set_caches(self, caches: list[torch.Tensor]) -> None:
        self._cache = [cache.to(self._decoder.device) for cache in caches]

    def _clear_caches(self) -> None:
        self._cache = []


def _posterior_mode(vae: Any, signal_T3HW: torch.Tensor) -> torch.Tensor:
    """Return the mode of the encoder's posterior for checked frames, `[1 + k, C, height / 8, width / 8]`."""
    signal = signal_T3HW.transpose(0, 1).unsqueeze(0)
    cache: list[Any] = [None] * sum(isinstance(module, nn.Conv3d) for module in vae.encoder.modules())
    starts = [0, *range(1, signal.shape[2], WAN21.frames_per_latent)]
    steps = [signal[:, :, start : start + (WAN21.frames_per_latent if start else 1)] for start in starts]
    with exact_convolutions():
        hidden = torch.cat([vae.encoder(step, feat_cache=cache, feat_idx=[0]) for step in steps], dim=2)
        mode: torch.Tensor = vae.quant_conv(hidden)[0, : vae.config["z_dim"]]
    return mode.transpose(0, 1)


class WanCodec:
    """Wan2.1's VAE as a registered codec."""

    geometry = WAN21

    def config(self, plain: Mapping[str, Any]) -> VaeConfig:
        """See `VideoCodec.config`."""
        return VaeConfig.from_mapping(plain)

    def recognises(self, stored: Mapping[str, torch.Tensor]) -> bool:
        """See `VideoCodec.recognises`."""
        return "decoder.conv1.weight" in stored

    def from_release(
        self, path: Path, stored: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], VaeConfig]:
        """See `VideoCodec.from_release`."""
        converted = diffusers_from_wan(path, stored)
        return converted, config_from_tensors(path, converted)

    def load(
        self,
        path: Path,
        stored: Mapping[str, torch.Tensor],
        config: VaeConfig,
        *,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> Any:
        """See `VideoCodec.load`."""
        return wan_vae_from_tensors(path, stored, config, dtype=dtype, device=device)

    def cache_slots(self, config: VaeConfig, *, latent_height: int, latent_width: int) -> list[CacheSlot]:
        """See `VideoCodec.cache_slots`."""
        return cache_slots(config, latent_height=latent_height, latent_width=latent_width)

    def first_step(self, vae: Any) -> nn.Module:
        """See `VideoCodec.first_step`."""
        return FirstFrame(vae)

    def next_step(self, vae: Any) -> nn.Module:
        """See `VideoCodec.next_step`."""
        return NextFrame(vae)

    def decoder(self, vae: Any) -> StreamingDecoder:
        """See `VideoCodec.decoder`."""
        return StreamingDecoder(vae)

    def encode(self, vae: Any, signal: torch.Tensor) -> torch.Tensor:
        """See `VideoCodec.encode`; the latents are the mode of the posterior."""
        return _posterior_mode(vae, signal)
