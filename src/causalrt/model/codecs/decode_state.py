"""The state of a session's video decoder: the interface that its caller sees, whatever computes the frames.

    open() -> decode(latents of chunk 0) -> decode(latents of chunk 1) -> ...
                       |                              ^
                       +-> snapshot() ... restore() --+

This module owns the checks, the count of latents, the format of snapshots, and the conversion to pixels; `wan_vae.py` and
`engines/vae.py` own the caches and the computation.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch

from causalrt.errors import RequestError

CONFIG_KEY = "vae_config"
"""Key in the header of a weight file that holds the config as JSON, for every codec."""
LATENT_FRAMES = "latent_frames"
"""Key of a snapshot that holds the number of decoded latents."""


def cache_name(index: int) -> str:
    """Return the name of a cache, in snapshots and as an input of the exported graphs."""
    return f"cache.{index:02d}"


class DecodeState(ABC):
    """The decoder state of one session. Calls must not overlap; different sessions are independent of each other.

    Attributes:
        latent_frames: number of latents decoded so far.
    """

    def __init__(self, *, channels: int, dtype: torch.dtype, latent_size: tuple[int, int] | None) -> None:
        self.latent_frames = 0
        self._channels, self._dtype, self._latent_size = channels, dtype, latent_size
        self._fixed_size = latent_size
        self._failed = False

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next frames of the video, uint8 `[T, 8H, 8W, 3]`, on the device of the decoder.

        Args:
            latents: `[F, C, H, W]`, normalised, as the transformer returns them. F is free; H and W must not change within a
                video.

        Raises:
            RequestError: the latents have the wrong shape or type or are not finite (the state is then unchanged); or an
                earlier call failed half way, and no snapshot has been restored since.
        """
        return torch.cat([pixels_from_signal(frames) for frames in self._decode(latents)])

    def decode_float(self, latents: torch.Tensor) -> torch.Tensor:
        """Like `decode`, but return float32 `[T, 3, 8H, 8W]` in [-1, 1]."""
        return torch.cat([frames.to(torch.float32, copy=True) for frames in self._decode(latents)])

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return the state as tensors for a safetensors file: `latent_frames`, and the caches if a latent was decoded.

        The tensors may be those of the state itself: do not write to them.
        """
        self._check_whole()
        caches = self._caches() if self.latent_frames else []
        return {LATENT_FRAMES: torch.tensor([self.latent_frames]), **{cache_name(i): c for i, c in enumerate(caches)}}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Return to the point where a snapshot was taken, by this state or by another one of the same VAE.

        The state may keep the tensors: do not write to them afterwards.

        Raises:
            RequestError: the snapshot is of another VAE, size or precision; the state is unchanged.
        """
        latent_frames, caches = self._check_snapshot(dict(snapshot))
        self._failed = True
        if caches:
            self._latent_size = (caches[0].shape[3], caches[0].shape[4])
            self._set_caches(caches)
        else:
            self._latent_size = self._fixed_size
            self._clear_caches()
        self.latent_frames, self._failed = latent_frames, False

    @abstractmethod
    def _decode_each(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the frames `[T, 3, 8H, 8W]` in [-1, 1] of each latent, and count it in `latent_frames`.

        The frames are valid until the next are requested.
        """

    @abstractmethod
    def _cache_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return the shapes of the caches for this size of a latent."""

    @abstractmethod
    def _caches(self) -> list[torch.Tensor]:
        """Return the caches as contiguous tensors that will not be written to."""

    @abstractmethod
    def _set_caches(self, caches: list[torch.Tensor]) -> None:
        """Take over checked caches from any device, without ever writing to them."""

    @abstractmethod
    def _clear_caches(self) -> None:
        """Return to the state before the first latent."""

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        self._check_latents(latents)
        self._check_whole()
        self._failed = True  # until all frames have been computed
        self._latent_size = (latents.shape[2], latents.shape[3])
        yield from self._decode_each(latents)
        self._failed = False

    def _check_whole(self) -> None:
        if self._failed:
            raise RequestError("an earlier call broke down half way; restore a snapshot, or open another state")

    def _check_latents(self, latents: torch.Tensor) -> None:
        height, width = self._latent_size or ("H", "W")
        shape = tuple(latents.shape)
        fits = len(shape) == 4 and shape[1] == self._channels and latents.numel() > 0
        if not fits or self._latent_size not in (None, shape[2:]) or not latents.is_floating_point():
            raise RequestError(
                f"latents to decode must be floating [F, {self._channels}, {height}, {width}], "
                f"got {latents.dtype} {list(shape)}"
            )
        if not latents.isfinite().all():
            raise RequestError(
                "latents to decode must be finite, got NaN or infinity; nothing was decoded of this chunk"
            )

    def _check_snapshot(self, snapshot: dict[str, torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
        counted = snapshot.pop(LATENT_FRAMES, torch.tensor([-1]))
        latent_frames = int(counted) if counted.numel() == 1 and counted.dtype == torch.int64 else -1
        first = snapshot.get(cache_name(0), torch.empty(0))
        size = (first.shape[3], first.shape[4]) if first.dim() == 5 else (0, 0)
        shapes = self._cache_shapes(size) if latent_frames > 0 else []
        wanted = {cache_name(i): (shape, self._dtype) for i, shape in enumerate(shapes)}
        found = {name: (tuple(cache.shape), cache.dtype) for name, cache in snapshot.items()}
        if latent_frames < 0 or found != wanted or (wanted and self._fixed_size not in (None, size)):
            raise RequestError(
                f"the snapshot is not of this VAE at this size in {self._dtype}: it counts {latent_frames} latents of size "
                f"{list(size)} and has {len(found)} caches, wanted {len(wanted)}"
            )
        return latent_frames, [snapshot[name] for name in wanted]


def pixels_from_signal(signal: torch.Tensor) -> torch.Tensor:
    """Convert `[T, 3, height, width]` in [-1, 1] to uint8 `[T, height, width, 3]`, rounding to nearest."""
    return ((signal.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
