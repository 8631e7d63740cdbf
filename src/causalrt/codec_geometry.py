"""How the latents of a video codec map to pixels and frames.

These few numbers stand on the lowest floor because the configuration, the planner, media files and the server need them without
importing a model. A codec in `model/codecs/` says which geometry it has.

    latents   0         1             2
    frames    0       1 2 3 4       5 6 7 8       with `first_frames=1` and `frames_per_latent=4`
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecGeometry:
    """Scales and frame rate of a codec.

    Attributes:
        latent_channels: channels of a latent.
        pixels_per_latent: rows and columns of pixels that a latent covers in each direction.
        frames_per_latent: frames of every latent after the first.
        first_frames: frames of a video's first latent.
        fps: frames a second at which decoded videos play.
    """

    latent_channels: int
    pixels_per_latent: int
    frames_per_latent: int
    first_frames: int
    fps: int

    def frames_of(self, latents: int, *, first: bool = True) -> int:
        """Frames of consecutive latents, of which `first` says whether they begin the video."""
        return self.frames_per_latent * latents - (self.frames_per_latent - self.first_frames) * first

    def latents_of(self, frames: int) -> int:
        """The fewest latents from the start of a video that hold so many frames."""
        return 1 + max(0, -(-(frames - self.first_frames) // self.frames_per_latent))

    def whole_latents(self, frames: int) -> int:
        """The latents that the first `frames` frames of a clip fill completely."""
        return 1 + (frames - self.first_frames) // self.frames_per_latent if frames >= self.first_frames else 0

    def fills_latents(self, frames: int) -> bool:
        """Whether a clip of so many frames encodes to latents without a rest."""
        return frames >= self.first_frames and (frames - self.first_frames) % self.frames_per_latent == 0


WAN21 = CodecGeometry(latent_channels=16, pixels_per_latent=8, frames_per_latent=4, first_frames=1, fps=16)
"""Wan2.1's VAE, the decoders that replace it, and the demo's cosine codec."""
