"""Rotary tables by KV slot, in time relative to the current chunk, for attention that rotates keys when it reads them.

Attention depends only on differences of positions, so the origin of time is arbitrary, as long as queries and keys agree.
Relative to the current chunk, times stay small however long the rollout is, and keys in the slots are stored unrotated::

    slot         | staging: the chunk | sink frames              | ring of clean frames   |
    frame        | f, f+1 .. f+F-1    | 0, 1 ..                  | the newest before f    |      f = history_frames
    time         | 0, 1 .. F-1        | 0 - min(f, reach), 1 - . | -1, -2 .. in any order |      reach = horizon - F

The distance of the sink would grow without bound. It stops at its value in the last chunk of the horizon, so no query sees the
sink at a greater distance than the model was trained for; sink frames keep their distances to each other. Up to that chunk,
attention equals that with `rope_tables`.

The contents of a slot follow from `history_frames` and the slot plan, so the step graph itself computes the tables, once per
step.
"""

import numpy as np
import torch
from torch import nn

from causalrt.config import Config
from causalrt.layout import slots_from_config
from causalrt.model.wan.rope import angles, axis_pairs


class RelativeRope(nn.Module):
    """The constant tables, and their lookup in a step. There are W slots of T rows; pairs per axis are pt, py, px.

    `temporal_*` are `[times, pt]` for times from -reach on, `spatial_*` are `[W, T, py + px]`, the same for each slot; angles
    are float64 up to the cosine. The time of a slot is computed from `staging_time`, `sink_frame` and `ring_phase`.
    """

    temporal_cos: torch.Tensor
    temporal_sin: torch.Tensor
    spatial_cos: torch.Tensor
    spatial_sin: torch.Tensor
    staging_time: torch.Tensor
    sink_frame: torch.Tensor
    ring_phase: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.plan = plan = slots_from_config(config)
        self.reach = config.video.horizon_frames - config.video.chunk_frames
        pt, py, px = axis_pairs(config.model.head_dim)
        times = np.arange(-self.reach, max(plan.staging_frames, plan.sink_frames))
        y, x = np.divmod(np.arange(config.tokens_per_frame), config.grid_width)
        spatial = np.tile(np.concatenate([angles(y, py), angles(x, px)], axis=1), (plan.capacity_frames, 1, 1))
        constants = {
            f"{axis}_{name}": torch.from_numpy(function(table)).float()
            for axis, table in (("temporal", angles(times, pt)), ("spatial", spatial))
            for name, function in (("cos", np.cos), ("sin", np.sin))
        }
        constants["staging_time"] = torch.arange(plan.staging_frames)
        constants["sink_frame"] = torch.arange(plan.sink_frames)
        constants["ring_phase"] = (-1 - plan.sink_frames - torch.arange(plan.ring_frames)) % max(plan.ring_frames, 1)
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

    def forward(self, history_frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin), `[W * T, D / 2]` float32, by slot row; angles of unfilled slots are meaningless.

        Args:
            history_frames: `[1]` int64, number of frames that the slots have received before the current chunk.
        """
        place = self.slot_times(history_frames) + self.reach
        cos, sin = (
            torch.cat(
                [temporal.index_select(0, place)[:, None].expand(-1, spatial.shape[1], -1), spatial], dim=-1
            ).flatten(0, 1)
            for temporal, spatial in (
                (self.temporal_cos, self.spatial_cos),
                (self.temporal_sin, self.spatial_sin),
            )
        )
        return cos, sin

    def slot_times(self, history_frames: torch.Tensor) -> torch.Tensor:
        """Return the time of the frame in each slot, `[W]` int64; it is within the table for unfilled slots too."""
        times = [self.staging_time]
        if self.plan.sink_frames:
            times.append(self.sink_frame - history_frames.clamp(max=self.reach))
        if self.plan.ring_frames:
            times.append(-1 - (history_frames + self.ring_phase) % self.plan.ring_frames)
        return torch.cat(times)
