"""The work of decoding one latent frame: the convolutions of Wan's VAE decoder, and their multiplications."""

from collections.abc import Iterator
from dataclasses import dataclass

from causalrt.model.codecs.vae_checkpoint import VaeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """A convolution with `frames x height x width` outputs of `out_channels`, each from `taps` positions of `in_channels`."""

    in_channels: int
    out_channels: int
    taps: int
    frames: int
    height: int
    width: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        pixels = self.frames * self.height * self.width
        return 2 * pixels * self.in_channels * self.out_channels * self.taps


CUBE, SQUARE, COLUMN = 27, 9, 3
"""Taps of the kernels: 3 x 3 x 3; 3 x 3 in one frame; 3 frames of one pixel."""


def decode_convolutions(vae: VaeConfig, *, latent_height: int, latent_width: int, first: bool) -> list[Convolution]:
    """List the convolutions for one latent frame; the products of attention are listed as convolutions of one tap."""
    return list(_convolutions(vae, latent_height, latent_width, first=first))


def _convolutions(vae: VaeConfig, height: int, width: int, *, first: bool) -> Iterator[Convolution]:
    frames = 1

    def conv(in_channels: int, out_channels: int, taps: int) -> Convolution:
        return Convolution(
            in_channels=in_channels, out_channels=out_channels, taps=taps, frames=frames, height=height, width=width
        )

    def residual(in_channels: int, out_channels: int) -> Iterator[Convolution]:
        yield conv(in_channels, out_channels, CUBE)
        yield conv(out_channels, out_channels, CUBE)
        if in_channels != out_channels:
            yield conv(in_channels, out_channels, 1)

    stages = [vae.decoder_dim * mult for mult in reversed(vae.dim_mult)]
    channels = stages[0]
    yield conv(vae.z_dim, vae.z_dim, 1)
    yield conv(vae.z_dim, channels, CUBE)
    yield from residual(channels, channels)
    yield conv(channels, 3 * channels, 1)
    yield conv(2 * height * width, channels, 1)  # one head over the frame's pixels: scores, and their sums of values
    yield conv(channels, channels, 1)
    yield from residual(channels, channels)
    for index, out in enumerate(stages):
        for _ in range(vae.num_res_blocks + 1):
            yield from residual(channels, out)
            channels = out
        if index < len(vae.temperal_downsample):
            if vae.temperal_downsample[-1 - index] and not first:
                yield conv(out, 2 * out, COLUMN)
                frames *= 2
            height, width, channels = 2 * height, 2 * width, out // 2
            yield conv(out, channels, SQUARE)
    yield conv(channels, 3, CUBE)


def decode_flops(vae: VaeConfig, *, latent_height: int, latent_width: int, first: bool = False) -> int:
    """Multiplications and additions for one latent frame."""
    convolutions = decode_convolutions(vae, latent_height=latent_height, latent_width=latent_width, first=first)
    return sum(conv.flops for conv in convolutions)


def chunk_decode_flops(
    vae: VaeConfig, *, latent_height: int, latent_width: int, latent_frames: int, first_chunk: bool
) -> int:
    """Multiplications and additions for a chunk of latents; the first chunk of a video begins with its first latent."""
    first, later = (
        decode_flops(vae, latent_height=latent_height, latent_width=latent_width, first=first)
        for first in (True, False)
    )
    return first_chunk * first + (latent_frames - first_chunk) * later


def decode_weights(vae: VaeConfig) -> int:
    """Number of weights of the decoder's convolutions (2 x channels too many, for products of attention over one pixel)."""
    convolutions = decode_convolutions(vae, latent_height=1, latent_width=1, first=False)
    return sum(conv.in_channels * conv.out_channels * conv.taps for conv in convolutions)
