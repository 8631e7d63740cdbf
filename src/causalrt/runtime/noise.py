"""Where noise comes from: a seed, or recorded draws. Draw 0 of a chunk is its start, draw k follows denoising step k.

Noise depends on the seed, the chunk, the draw and the token's global index, never on the number of ranks: every rank draws
the whole chunk and keeps its rows.
"""

from dataclasses import dataclass

import numpy as np
import torch

from causalrt.errors import RequestError


@dataclass(frozen=True, slots=True)
class SeededNoise:
    """Counter-based noise (Philox): any draw can be made alone, in any order."""

    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise RequestError(f"seed must be a whole number in [0, 2**64), got {self.seed}")

    def draw(self, chunk: int, draw: int, shape: tuple[int, int]) -> torch.Tensor:
        """`[N, 64]` standard normal, float32."""
        bits = np.random.Philox(key=self.seed, counter=[0, 0, draw, chunk])
        return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True, slots=True)
class RecordedNoise:
    """Draws given by the caller: `[chunks, steps, N, 64]`, in token order."""

    draws: torch.Tensor

    def draw(self, chunk: int, draw: int, shape: tuple[int, int]) -> torch.Tensor:
        """`[N, 64]`, float32."""
        return self.draws[chunk, draw]


Noise = SeededNoise | RecordedNoise
