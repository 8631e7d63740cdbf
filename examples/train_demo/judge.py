"""Recognises from the pixels of a clip the colour, and the motion and speed that are nearest to the track of the centre.

    frames [T, 64, 64, 3] -> centres [T, 2] -> displacement over STRIDE frames -> distance from each motion and speed

The canvas wraps around, so centres are circular means, and displacements are the shortest ones across its edges.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from train_demo.world import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    RADIUS,
    SIZE,
    SPEEDS,
    WALLS,
    Caption,
    turn_heading,
)

STRIDE, SMOOTHED = 8, 4
"""Number of frames over which displacements are taken and positions averaged.

With fewer, the codec's own noise shows; with more, corners of the track are cut.
"""
FARTHEST = 0.5
"""Distance from the nearest motion, in units of its speed, above which a clip shows none of the known motions."""
TIE = 0.15
"""Difference of distance below which motions cannot be told apart in a short clip."""
BESIDE = 4.0
"""Distance past a wall, in pixels, at which a shape no longer bounces."""
LEAST_COLOUR = 0.9
"""Smallest share of the frames that must have the colour."""
LEAST_AREA, MOST_AREA = 0.5, 1.6
"""Limits of the area as a share of the shape's own: below is no complete shape, above is more than one."""
USUAL = 0.95
"""Quantile of the steps within chunks with which steps between chunks are compared: a single jump excuses no others."""
JUMP = 1.0
"""Pixels by which a step must exceed those to count as a jump; the codec alone causes 0.6 of a pixel of noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a clip shows.

    Attributes:
        colour: colour of the palette to which most frames are nearest.
        colour_share: share of the frames that have this colour.
        motion: nearest motion; None if none is near.
        speed: speed of the nearest motion; None if none is near.
        distances: distance from every (motion, speed), root mean square over time, in units of the speed.
        area: (smallest, largest) area in any frame, as a share of the shape's own.
    """

    colour: str
    colour_share: float
    motion: str | None
    speed: str | None
    distances: dict[tuple[str, str], float]
    area: tuple[float, float]

    def agrees(self, caption: Caption) -> bool:
        """Return whether colour, motion and speed are the caption's, and a single shape was visible all the time."""
        return self.shows(caption.colour) and (self.motion, self.speed) == (caption.motion, caption.speed)

    def fits(self, caption: Caption) -> bool:
        """Return whether a short clip is consistent with the caption: a shape that met no wall may move on or bounce."""
        own, nearest = self.distances[caption.motion, caption.speed], min(self.distances.values())
        return self.shows(caption.colour) and own <= min(FARTHEST, nearest + TIE)

    def shows(self, colour: str) -> bool:
        """Return whether a single shape of this colour was visible all the time."""
        least, most = self.area
        whole = least > LEAST_AREA and most < MOST_AREA
        return self.colour == colour and self.colour_share >= LEAST_COLOUR and whole


def weights_of(frames_THW3: torch.Tensor) -> torch.Tensor:
    """Return how far each pixel is from the background, `[T, H, W]`."""
    background = torch.tensor(BACKGROUND)
    weights: torch.Tensor = (frames_THW3.float() / 255 - background).abs().amax(-1)
    return torch.where(weights > 0.12, weights, torch.zeros(()))


def centres(frames_THW3: torch.Tensor) -> torch.Tensor:
    """Return x and y of the shape's centre in each frame, `[T, 2]`, on a canvas that wraps around."""
    weights = weights_of(frames_THW3)
    turn = 2 * math.pi / SIZE * (torch.arange(SIZE) + 0.5)
    found = []
    for axis in (1, 2):
        along = weights.sum(axis)
        angle = torch.atan2((along * turn.sin()).sum(1), (along * turn.cos()).sum(1))
        found.append(angle % (2 * math.pi) * SIZE / (2 * math.pi))
    return torch.stack(found, dim=1)


def steps(centres_T2: torch.Tensor) -> torch.Tensor:
    """Return the shortest displacement from each frame to the next, `[T - 1, 2]`, in pixels, on a canvas that wraps around."""
    return (centres_T2.diff(dim=0) + SIZE / 2) % SIZE - SIZE / 2


def look(frames_THW3: torch.Tensor) -> Seen:
    """Judge a clip of uint8 `[T, 64, 64, 3]`."""
    places = centres(frames_THW3)
    distances = {(m, s): _distance(places, m, SPEEDS[s]) for m, s in itertools.product(MOTIONS, SPEEDS)}
    nearest = min(distances, key=lambda pair: distances[pair])
    motion, speed = nearest if distances[nearest] <= FARTHEST else (None, None)
    weights = weights_of(frames_THW3)
    seen = colours(frames_THW3, weights)
    colour = max(COLOURS, key=seen.count)
    area = (weights > 0.2).float().sum((1, 2)) / (math.pi * RADIUS * RADIUS)
    return Seen(
        colour=colour,
        colour_share=seen.count(colour) / len(seen),
        motion=motion,
        speed=speed,
        distances=distances,
        area=(float(area.min()), float(area.max())),
    )


def colours(frames_THW3: torch.Tensor, weights: torch.Tensor) -> list[str]:
    """Return the colour of the palette that is nearest to the shape, for each frame."""
    inside = (weights > 0.7 * weights.amax((1, 2), keepdim=True))[..., None]
    rgb = (frames_THW3.float() / 255 * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    names = list(COLOURS)
    apart = torch.cdist(rgb, torch.tensor([COLOURS[name] for name in names]))
    return [names[nearest] for nearest in apart.argmin(1).tolist()]


def border_jump(frames_THW3: torch.Tensor, borders: list[int]) -> tuple[float, float]:
    """Return the longest step of the centre across a border, and the `USUAL` quantile of all other steps, in pixels.

    A border is the first frame of a chunk; the step is the one from the frame before it.
    """
    lengths = steps(centres(frames_THW3)).norm(dim=1)
    at = torch.zeros(len(lengths), dtype=torch.bool)
    at[[border - 1 for border in borders]] = True
    return float(lengths[at].max()), float(lengths[~at].quantile(USUAL))


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
        before = places[0, along] + walked[: -2 * STRIDE, along]
        # Compare one stride and two, on one heading: a shape that stands still beside a wall may be where one stride leads.
        apart = []
        for frames in (STRIDE, 2 * STRIDE):
            there = places[0, along] + walked[frames : len(before) + frames, along]
            ways = torch.stack([_between_walls(before + heading * speed * frames) for heading in (1, -1)])
            apart.append((ways - there) / STRIDE)
        errors = torch.hypot(torch.stack(apart).square().mean(0).sqrt().amin(0), moved[: len(before), 1 - along])
        past = torch.maximum(WALLS[0] - BESIDE - places[:, along], places[:, along] - WALLS[1] - BESIDE).clamp(min=0)
        errors = errors + past[: len(errors)] / BESIDE * speed
    return float(errors.square().mean().sqrt()) / speed


def _between_walls(way: torch.Tensor) -> torch.Tensor:
    """Return the positions that a shape between reflecting walls has, given its path without walls."""
    span = WALLS[1] - WALLS[0]
    return WALLS[0] + span - ((way - WALLS[0]) % (2 * span) - span).abs()
