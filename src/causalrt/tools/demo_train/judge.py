"""What a clip shows, told from its pixels alone: the colour, and which of the motions the centre's track is most like.

    frames [T, 64, 64, 3] -> centres [T, 2] -> way in STRIDE frames -> for each motion and speed, how far from it

The canvas goes round, so centres are circular means, and displacements the shortest way round.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from causalrt.tools.demo_train.world import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SIZE,
    SPEEDS,
    WALLS,
    Caption,
    turn_heading,
)

STRIDE, SMOOTHED = 8, 4
"""Frames over which a displacement is taken, and a place averaged: fewer show the codec's own roughness, more cut corners."""
FARTHEST = 0.5
"""A motion is none of those known if it is farther than this from the nearest, in units of its speed."""
TIE = 0.15
"""In a short clip, motions that are so close to each other cannot be told apart."""
BESIDE = 4.0
"""Pixels past a wall at which a shape no longer bounces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a clip shows.

    Attributes:
        colour: the nearest of the palette.
        motion: the nearest one; None if none is near.
        speed: likewise.
        distances: of every (motion, speed), root mean square over time, in units of the speed.
        present: the least visible frame's share of the shape's nominal area.
    """

    colour: str
    motion: str | None
    speed: str | None
    distances: dict[tuple[str, str], float]
    present: float

    def agrees(self, caption: Caption) -> bool:
        """Colour, motion and speed are the caption's, and the shape was there all the time."""
        said = (caption.colour, caption.motion, caption.speed)
        return (self.colour, self.motion, self.speed) == said and self.present > 0.5

    def fits(self, caption: Caption) -> bool:
        """Nothing of a short clip speaks against the caption: a shape that has met no wall may move on or bounce."""
        own, nearest = self.distances[caption.motion, caption.speed], min(self.distances.values())
        return self.colour == caption.colour and self.present > 0.5 and own <= min(FARTHEST, nearest + TIE)


def weights_of(frames_THW3: torch.Tensor) -> torch.Tensor:
    """`[T, H, W]`: how far each pixel is from the background."""
    background = torch.tensor(BACKGROUND)
    weights: torch.Tensor = (frames_THW3.float() / 255 - background).abs().amax(-1)
    return torch.where(weights > 0.12, weights, torch.zeros(()))


def centres(frames_THW3: torch.Tensor) -> torch.Tensor:
    """`[T, 2]`: x and y of the shape in each frame, on a canvas that goes round."""
    weights = weights_of(frames_THW3)
    turn = 2 * math.pi / SIZE * (torch.arange(SIZE) + 0.5)
    found = []
    for axis in (1, 2):
        along = weights.sum(axis)
        angle = torch.atan2((along * turn.sin()).sum(1), (along * turn.cos()).sum(1))
        found.append(angle % (2 * math.pi) * SIZE / (2 * math.pi))
    return torch.stack(found, dim=1)


def steps(centres_T2: torch.Tensor) -> torch.Tensor:
    """`[T - 1, 2]`: from each frame to the next, the shortest way round, in pixels."""
    return (centres_T2.diff(dim=0) + SIZE / 2) % SIZE - SIZE / 2


def look(frames_THW3: torch.Tensor) -> Seen:
    """Judge a clip of uint8 `[T, 64, 64, 3]`."""
    places = centres(frames_THW3)
    distances = {(m, s): _distance(places, m, SPEEDS[s]) for m, s in itertools.product(MOTIONS, SPEEDS)}
    nearest = min(distances, key=lambda pair: distances[pair])
    motion, speed = nearest if distances[nearest] <= FARTHEST else (None, None)
    weights = weights_of(frames_THW3)
    inside = weights > 0.7 * weights.amax()
    rgb = frames_THW3[inside].float().mean(0) / 255 if inside.any() else torch.tensor(BACKGROUND)
    colour = min(COLOURS, key=lambda name: float((rgb - torch.tensor(COLOURS[name])).square().sum()))
    area = (weights > 0.2).float().sum((1, 2)).min() / (math.pi * 81)
    return Seen(colour=colour, motion=motion, speed=speed, distances=distances, present=float(area))


def border_jump(frames_THW3: torch.Tensor, borders: list[int]) -> tuple[float, float]:
    """(largest step of the centre from the frame before a border to that at it, largest step elsewhere), in pixels."""
    lengths = steps(centres(frames_THW3)).norm(dim=1)
    at = torch.zeros(len(lengths), dtype=torch.bool)
    at[[border - 1 for border in borders]] = True
    return float(lengths[at].max()), float(lengths[~at].max())


def _distance(places: torch.Tensor, motion: str, speed: float) -> float:
    walked = steps(places).cumsum(0).unfold(0, SMOOTHED, 1).mean(-1)
    moved = (walked[STRIDE:] - walked[:-STRIDE]) / STRIDE
    kind, _, how = motion.partition(" ")
    if kind == "moves":
        errors = (moved - speed * torch.tensor(DIRECTIONS[how])).norm(dim=1)
    elif kind == "turns":
        between = places[(STRIDE + SMOOTHED) // 2 :].tolist()
        headings = [turn_heading(x, y, clockwise=how == "clockwise") for x, y in between[: len(moved)]]
        errors = (moved - speed * torch.tensor(headings)).norm(dim=1)
    else:
        along = 0 if how == "sideways" else 1
        # A turn at a wall is shorter than its speed says: the median is of what lies between.
        errors = torch.hypot((moved[:, along].abs() - speed).abs().median(), moved[:, 1 - along])
        past = torch.maximum(WALLS[0] - BESIDE - places[:, along], places[:, along] - WALLS[1] - BESIDE).clamp(min=0)
        errors = errors + past[: len(errors)] / BESIDE * speed
    return float(errors.square().mean().sqrt()) / speed
