"""What a video codec provides to the builder, the executors and the decoder process.

A codec is one module of this folder and one entry in `registry.CODECS`. It never sees sessions, files of a bundle or executors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from causalrt.codec_geometry import CodecGeometry
from causalrt.model.codecs.decode_state import DecodeState


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSlot:
    """A state tensor of the decoder.

    Attributes:
        shape: its shape.
        skips_first: the step of the first latent does not write it, so it starts as zeros.
    """

    shape: tuple[int, ...]
    skips_first: bool


class CodecConfig(Protocol):
    """Sizes and constants of a codec, as they stand in a weight file's header and in a bundle's manifest."""

    @property
    def class_name(self) -> str:
        """Key of the codec in `registry.CODECS`."""

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""

    @property
    def decoder_dim(self) -> int:
        """Channels at full resolution in the decoder, which its memory is estimated from."""

    @property
    def latents_mean(self) -> tuple[float, ...]:
        """Mean of each latent channel, which is subtracted from encoded latents."""

    @property
    def latents_std(self) -> tuple[float, ...]:
        """Standard deviation of each latent channel, by which encoded latents are divided."""

    def to_mapping(self) -> dict[str, Any]:
        """The config as JSON values."""


class Decoder(Protocol):
    """A loaded streaming decoder, for any number of sessions."""

    def open(self) -> DecodeState:
        """The start of a video."""

    def warmed_up(self) -> None:
        """Called once both kinds of step have run, so that compiled kernels can be kept."""


class VideoCodec(Protocol):
    """A kind of codec. `vae` is always the module that `load` has returned.

    The module has a `config` (a mapping that `config` parses), a `dtype` and a `device`.
    """

    @property
    def geometry(self) -> CodecGeometry:
        """Scales, frames of the first latent, and frame rate."""

    def config(self, plain: Mapping[str, Any]) -> CodecConfig:
        """Parse a config.

        Raises:
            CheckpointError: a value is missing or impossible.
        """

    def recognises(self, stored: Mapping[str, torch.Tensor]) -> bool:
        """Whether a file without a config holds this codec, judged by the names of its tensors."""

    def from_release(
        self, path: Path, stored: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], CodecConfig]:
        """The tensors under the names that `load` wants, and the config that their shapes show.

        Raises:
            CheckpointError: they are not this codec's.
        """

    def load(
        self,
        path: Path,
        stored: Mapping[str, torch.Tensor],
        config: Any,
        *,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> Any:
        """The module with these tensors; `path` is for messages.

        Raises:
            CheckpointError: a tensor is missing, left over, of a wrong shape or not finite.
            ExecutorError: a library that the codec needs is not installed.
        """

    def cache_slots(self, config: Any, *, latent_height: int, latent_width: int) -> list[CacheSlot]:
        """The state tensors of one session, in the order in which the steps take and return them."""

    def first_step(self, vae: Any) -> nn.Module:
        """Module to trace: the first latent -> frames, and the state tensors that it writes."""

    def next_step(self, vae: Any) -> nn.Module:
        """Module to trace: a later latent and the state tensors -> frames and the new state tensors."""

    def decoder(self, vae: Any) -> Decoder:
        """The decoder in eager PyTorch."""

    def encode(self, vae: Any, signal: torch.Tensor) -> torch.Tensor:
        """Frames `[T, 3, height, width]` in [-1, 1] -> latents `[F, C, H, W]` that are not normalised.

        Raises:
            RequestError: the codec has no encoder.
        """
