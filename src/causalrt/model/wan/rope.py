"""Causal-RoPE SP tables: rotary angles from a global time index, the same constants for every rank and every chunk.

A token's row is concat(temporal[first_frame + frame in chunk], spatial[y, x]); only the temporal part depends on the chunk
(design section 5, model_spec section 4). Built in float64, kept in float32.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from causalrt.config import Config
from causalrt.layout import Layout


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs of a head that rotate by time, by row and by column: (22, 21, 21) for head_dim 128."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def angles(positions: npt.ArrayLike, pairs: int) -> npt.NDArray[np.float64]:
    """`[len(positions), pairs]`: position times 10000^(-j / pairs); the divisor is the axis' own width."""
    frequencies = 10000.0 ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    return np.outer(np.asarray(positions, dtype=np.float64), frequencies)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeTables:
    """Constants of the step graph; P ranks, S local tokens, pairs per axis pt, py, px.

    Attributes:
        temporal: `[horizon, pt]` angles by global time index.
        spatial: `[P, S, py + px]` angles by the token's row and column.
        frame_in_chunk: `[P, S]`, int64; padding tokens repeat the chunk's last token.
    """

    temporal: npt.NDArray[np.float64]
    spatial: npt.NDArray[np.float64]
    frame_in_chunk: npt.NDArray[np.int64]

    def constants(self) -> dict[str, torch.Tensor]:
        """The tables as the tensors that a step graph folds in."""
        named = {
            f"{axis}_{name}": torch.from_numpy(function(table)).float()
            for axis, table in (("temporal", self.temporal), ("spatial", self.spatial))
            for name, function in (("cos", np.cos), ("sin", np.sin))
        }
        return named | {"frame_in_chunk": torch.from_numpy(self.frame_in_chunk)}


def rope_tables(config: Config, layout: Layout) -> RopeTables:
    """Tables for every rank of `layout`; (frame, y, x) come from the global token index, never from a rank's offset."""
    pt, py, px = axis_pairs(config.model.head_dim)
    padded = np.arange(layout.world_size * layout.local_tokens).reshape(layout.world_size, layout.local_tokens)
    token = np.minimum(padded, layout.num_tokens - 1)
    frame, place = np.divmod(token, config.tokens_per_frame)
    y, x = np.divmod(place, config.grid_width)
    spatial = np.concatenate([angles(y.ravel(), py), angles(x.ravel(), px)], axis=1)
    return RopeTables(
        temporal=angles(np.arange(config.video.horizon_frames), pt),
        spatial=spatial.reshape(*token.shape, py + px),
        frame_in_chunk=frame.astype(np.int64),
    )
