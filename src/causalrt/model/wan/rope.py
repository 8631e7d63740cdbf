"""Causal-RoPE SP tables: rotary angles from a global time index, constant for every rank and every chunk.

The angles of a token are concat(temporal[first_frame + frame in chunk], spatial[y, x]); only the temporal part depends on the
chunk (design section 5, model_spec section 4). They are computed in float64 and stored in float32.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from causalrt.config import Config
from causalrt.layout import Layout


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return how many channel pairs of a head rotate by time, row and column: (22, 21, 21) for head_dim 128."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def angles(positions: npt.ArrayLike, pairs: int) -> npt.NDArray[np.float64]:
    """Return `[len(positions), pairs]`: position times 10000^(-j / pairs), where `pairs` is the axis' own number of pairs."""
    frequencies = 10000.0 ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    return np.outer(np.asarray(positions, dtype=np.float64), frequencies)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeTables:
    """Constants of the step graph, for P ranks, S local tokens, and pt, py, px pairs per axis.

    Attributes:
        temporal: angles by global time index, `[horizon, pt]`.
        spatial: angles by the token's row and column, `[P, S, py + px]`.
        frame_in_chunk: frame of each token within the chunk, `[P, S]` int64; padding tokens repeat the chunk's last token.
    """

    temporal: npt.NDArray[np.float64]
    spatial: npt.NDArray[np.float64]
    frame_in_chunk: npt.NDArray[np.int64]

    def constants(self) -> dict[str, torch.Tensor]:
        """Return the tables as tensors that a step graph holds as constants."""
        named = {
            f"{axis}_{name}": torch.from_numpy(function(table)).float()
            for axis, table in (("temporal", self.temporal), ("spatial", self.spatial))
            for name, function in (("cos", np.cos), ("sin", np.sin))
        }
        return named | {"frame_in_chunk": torch.from_numpy(self.frame_in_chunk)}


def rope_tables(config: Config, layout: Layout) -> RopeTables:
    """Compute the tables for every rank of `layout`; (frame, y, x) follow from the global token index, not a rank's offset."""
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
