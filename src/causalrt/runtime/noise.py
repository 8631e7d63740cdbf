"""Sources of noise: a seed, or recorded draws. Draw 0 of a chunk is its start; draw k is added after denoising step k.

Noise depends on the seed, the chunk, the draw and the token's global index, but not on the number of ranks: every rank draws
the whole chunk and keeps its own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from causalrt.config import Config
from causalrt.errors import RequestError


@dataclass(frozen=True, slots=True)
class SeededNoise:
    """Counter-based noise (Philox), whose draws do not depend on the order in which they are made."""

    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise RequestError(f"seed must be a whole number in [0, 2**64), got {self.seed}")

    def draw(self, chunk: int, draw: int, shape: tuple[int, int]) -> torch.Tensor:
        """Draw `[N, 64]`, standard normal, float32."""
        bits = np.random.Philox(key=self.seed, counter=[0, 0, draw, chunk])
        return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True, slots=True)
class RecordedNoise:
    """Draws of the caller, `[steps, N, 64]` in token order for each chunk; N is that of the chunk."""

    draws: Sequence[torch.Tensor] | torch.Tensor

    def draw(self, chunk: int, draw: int, shape: tuple[int, int]) -> torch.Tensor:
        """Return the recorded draw, `[N, 64]` float32."""
        return self.draws[chunk][draw]


Noise = SeededNoise | RecordedNoise


def checked_noise(
    config: Config, noise: Sequence[torch.Tensor] | torch.Tensor, *, num_chunks: int, num_given: int
) -> RecordedNoise:
    """Check and copy a caller's noise for `num_chunks` chunks after `num_given` chunks of initial latents.

    Raises:
        RequestError: not a tensor `[steps, N, 64]` for each chunk.
    """
    frames = config.video.frames_of_chunks(num_chunks, first_chunk=num_given)
    steps, features = len(config.sampler.steps), config.model.patch_features
    wanted = [[steps, count * config.tokens_per_frame, features] for count in frames]
    found = [list(draws.shape) for draws in noise]
    if found != wanted:
        at = next((k for k, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
        fault = (
            f"{len(found)} chunks, not {len(wanted)}" if at is None else f"{found[at]} for chunk {at}, not {wanted[at]}"
        )
        raise RequestError(f"noise must be a tensor [steps, N, 64] for each chunk, got {fault}")
    return RecordedNoise(tuple(draws.detach().to("cpu", torch.float32, copy=True).contiguous() for draws in noise))
