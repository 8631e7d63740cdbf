"""Latents by formula: a truncated cosine transform of blocks of 3 colours x 4 frames x 8 x 8 pixels, 16 numbers each.

It stands in the place of a VAE in the demo model: the same scales (a latent is 8 x 8 pixels, the first one frame, each later
one four), the same streaming (9 frames for the first chunk of three latents, 12 for the others), and nothing learnt but the
mean and spread of each number. The transform is orthonormal; of its 768 numbers those 16 are kept in which the demo's clips
differ most.
"""

import math

import torch

CHANNELS = (
    *((0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 1)),
    *((0, 0, 1, 1), (0, 0, 2, 0), (0, 0, 0, 2), (2, 0, 0, 1), (2, 0, 1, 0), (0, 1, 0, 1), (0, 1, 1, 0), (1, 1, 0, 0)),
)
"""Frequencies over colours, frames, rows and columns, by latent channel."""
COLOURS, FRAMES, PIXELS = 3, 4, 8


def cosines(size: int) -> torch.Tensor:
    """`[size, size]` float64: the orthonormal DCT-II, a frequency a row."""
    frequency, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size) + 0.5
    scale = torch.full((size, 1), math.sqrt(2 / size), dtype=torch.float64)
    scale[0] = math.sqrt(1 / size)
    return scale * torch.cos(math.pi / size * frequency * place)


def block_basis() -> torch.Tensor:
    """`[16, 3, 4, 8, 8]` float32: what each latent channel stands for, orthonormal."""
    colours, frames, pixels = cosines(COLOURS), cosines(FRAMES), cosines(PIXELS)
    blocks = [torch.einsum("c,t,y,x->ctyx", colours[c], frames[t], pixels[y], pixels[x]) for c, t, y, x in CHANNELS]
    return torch.stack(blocks).float()


def encode_blocks(frames_T3HW: torch.Tensor) -> torch.Tensor:
    """1 + 4k frames in [-1, 1] to latents `[1 + k, 16, H / 8, W / 8]`, not normalised; the first counts four times."""
    first = frames_T3HW[:1].expand(FRAMES, -1, -1, -1)
    _, colours, height, width = frames_T3HW.shape
    sizes = -1, FRAMES, colours, height // PIXELS, PIXELS, width // PIXELS, PIXELS
    blocks = torch.cat([first, frames_T3HW[1:]]).reshape(sizes)
    return torch.einsum("ntchywx,zctyx->nzhw", blocks, block_basis())


def decode_block(latent_CHW: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """A latent as it was before normalisation to its four frames `[4, 3, 8H, 8W]`."""
    return torch.einsum("zhw,zctyx->tchywx", latent_CHW, basis).flatten(-2).flatten(-3, -2)
