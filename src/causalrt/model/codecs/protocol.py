"""The interface that a video codec provides to the builder, the executors and the decoder process.

A codec is one module of this folder and one entry in `registry.CODECS`. It knows nothing of sessions, bundles or executors.
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
        skips_first: whether the step of the first latent leaves it unwritten, so that it starts as zeros.
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
        """Number of channels of a latent."""

    @property
    def decoder_dim(self) -> int:
        """Number of channels at full resolution in the decoder, from which its memory use is estimated."""

    @property
    def latents_mean(self) -> tuple[float, ...]:
        """Mean of each latent channel, which is subtracted from encoded latents."""

    @property
    def latents_std(self) -> tuple[float, ...]:
        """Standard deviation of each latent channel, by which encoded latents are divided."""

    def to_mapping(self) -> dict[str, Any]:
        """Return the config as JSON values."""


class Decoder(Protocol):
    """A loaded streaming decoder, shared by any number of sessions."""

    def open(self) -> DecodeState:
        """Start a video."""

    def warmed_up(self) -> None:
        """Take note that both kinds of step have run, so that compiled kernels can be kept."""


class VideoCodec(Protocol):
    """A kind of codec. In its methods, `vae` is always the module that `load` returned.

    The module has a `config` (a mapping that `config` parses), a `dtype` and a `device`.
    """

    @property
    def geometry(self) -> CodecGeometry:
        """Scales, number of frames of the first latent, and frame rate."""

    def config(self, plain: Mapping[str, Any]) -> CodecConfig:
        """Parse a config.

        Raises:
            CheckpointError: a value is missing or impossible.
        """

    def recognises(self, stored: Mapping[str, torch.Tensor]) -> bool:
        """Return whether a file without a config holds this codec, judging by the names of its tensors."""

    def from_release(
        self, path: Path, stored: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], CodecConfig]:
        """Return the tensors under the names that `load` expects, and the config inferred from their shapes.

        Raises:
            CheckpointError: the tensors do not belong to this codec.
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
        """Make the module from these tensors; `path` is for error messages.

        Raises:
            CheckpointError: a tensor is missing, unexpected, of a wrong shape or not finite.
            ExecutorError: a library that the codec needs is not installed.
        """

    def cache_slots(self, config: Any, *, latent_height: int, latent_width: int) -> list[CacheSlot]:
        """Return the state tensors of one session, in the order in which the steps take and return them."""

    def first_step(self, vae: Any) -> nn.Module:
        """Return the module to trace for the first latent: latent -> frames, and the state tensors that it writes."""

    def next_step(self, vae: Any) -> nn.Module:
        """Return the module to trace for a later latent: latent and state tensors -> frames and new state tensors."""

    def decoder(self, vae: Any) -> Decoder:
        """Return the decoder in eager PyTorch."""

    def encode(self, vae: Any, signal: torch.Tensor) -> torch.Tensor:
        """Encode frames `[T, 3, height, width]` in [-1, 1] to latents `[F, C, H, W]` that are not normalised.

        Raises:
            RequestError: the codec has no encoder.
        """
