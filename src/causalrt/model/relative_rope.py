"""Rotary tables by KV slot, in time relative to the current chunk: for attention that turns keys when it reads them.

Attention sees differences of positions alone, so time may count from anywhere, as long as queries and keys agree; counted from
the current chunk it stays small however long the rollout is::

    slot         | staging: the chunk | sink frames        | ring of clean frames   |
    frame        | f, f+1 .. f+F-1    | 0, 1 ..            | the newest before f    |      f = first_frame
    table time   | 0, 1 .. F-1        | -f, 1-f ..         | -1, -2 .. in any order |

A sink's time is large and negative; the angles are float64 up to the cosine, so that costs no accuracy. Keys keep no angle in
the slots, and no table has an end: the horizon of `rope_tables` does not bound such a rollout.
"""

import numpy as np
import numpy.typing as npt
import torch

from causalrt.config import Config
from causalrt.layout import SlotPlan, slots_from_config
from causalrt.model.rope import angles, axis_pairs


def slot_frames(plan: SlotPlan, first_frame: int) -> npt.NDArray[np.int64]:
    """Global time index of the frame in each filled slot, while the chunk at `first_frame` is generated."""
    staging = first_frame + np.arange(plan.chunk_frames)
    sink = np.arange(min(plan.sink_frames, first_frame))
    place = np.arange(plan.valid_frames(first_frame) - len(staging) - len(sink))
    newest = first_frame - 1
    behind = (newest - plan.sink_frames - place) % max(plan.ring_frames, 1)
    return np.concatenate([staging, sink, newest - behind]).astype(np.int64)


def relative_tables(config: Config, first_frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), `[W * T, D / 2]` float32, by slot row; rows of unfilled slots are as at time 0."""
    plan, tokens = slots_from_config(config), config.tokens_per_frame
    pt, py, px = axis_pairs(config.model.head_dim)
    times = np.zeros(plan.capacity_frames, dtype=np.int64)
    filled = slot_frames(plan, first_frame)
    times[: len(filled)] = filled - first_frame
    y, x = np.divmod(np.arange(tokens), config.grid_width)
    temporal, spatial = angles(times, pt), np.concatenate([angles(y, py), angles(x, px)], axis=1)

    def table(function: np.ufunc) -> torch.Tensor:
        by_frame, by_place = (torch.from_numpy(function(angle)).float() for angle in (temporal, spatial))
        parts = (by_frame[:, None].expand(-1, tokens, -1), by_place[None].expand(len(times), -1, -1))
        return torch.cat(parts, dim=-1).flatten(0, 1)

    return table(np.cos), table(np.sin)
