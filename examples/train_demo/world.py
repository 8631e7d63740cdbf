"""The world that the demo model is trained on: clips of one coloured shape that moves as a caption says, drawn by formulas.

    "a red circle bounces sideways quickly"  ->  Caption  ->  track [T, 2] of the centre  ->  frames [T, 64, 64, 3]

A shape that moves leaves the canvas on one side and enters on the other. A shape that bounces reverses at the walls. A shape
that turns circles around the middle; it first has to reach the circle if the previous prompt was another one. Videos begin near
the middle, or at the top of the circle. Positions are (x, y) in pixels, with y downwards; a frame lasts a sixteenth of a
second. Everything is a function of a generator's seed.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SIZE = 64
"""Width and height of a frame in pixels."""
BACKGROUND = (0.10, 0.10, 0.13)
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "orange": (0.98, 0.52, 0.08),
    "purple": (0.60, 0.22, 0.85),
    "cyan": (0.15, 0.85, 0.90),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = (
    "moves right",
    "moves left",
    "moves up",
    "moves down",
    "bounces sideways",
    "bounces up and down",
    "turns clockwise",
    "turns counterclockwise",
)
SPEEDS = {"slowly": 0.75, "quickly": 1.5}
"""Speeds in pixels per frame."""
RADIUS = 9.0
"""Radius that determines the size of a shape: its area is that of a circle of this radius."""
WALLS = (RADIUS + 2.0, SIZE - RADIUS - 2.0)
TURN_RADIUS, TURN_PULL = 18.0, 8.0
"""Radius of the circle around the middle, and distance from it at which a shape heads towards it at 45 degrees, in pixels."""
NEAR, TURN_START = 8.0, 0.3
"""Spread of the start of videos: pixels from the middle or, for shapes that turn, radians from the top of the circle.

A first chunk has no history. If its position and heading were free, the noise would have to determine both, and a small model
predicts the mean of all possibilities, which is no sensible picture. If a video could start anywhere on the circle, its heading
would depend on the position, which rotary positions, being relative, reveal only by the canvas's edges."""
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """The colour, shape and motion of a clip."""

    colour: str
    shape: str
    motion: str
    speed: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} {self.speed}"

    @property
    def pixels_per_frame(self) -> float:
        """Speed in pixels per frame."""
        return SPEEDS[self.speed]


def captions() -> list[Caption]:
    """Return all possible captions."""
    every = itertools.product(COLOURS, SHAPES, MOTIONS, SPEEDS)
    return [Caption(colour=colour, shape=shape, motion=motion, speed=speed) for colour, shape, motion, speed in every]


def split_captions(*, held_back: int = 100, seed: int = 0) -> tuple[list[Caption], list[Caption]]:
    """Return (captions for training, captions held back), always the same for a seed."""
    every = captions()
    random.Random(seed).shuffle(every)
    return every[held_back:], every[:held_back]


@dataclass(slots=True)
class Mover:
    """Position and heading of a shape; `step` advances it by a frame."""

    x: float
    y: float
    dx: float
    dy: float

    @classmethod
    def start(cls, rng: random.Random, caption: Caption) -> "Mover":
        """Start near the middle or, if the shape turns, near the top of its circle; bouncing begins to the right or upwards."""
        angle = rng.uniform(-TURN_START, TURN_START)
        x, y = (SIZE / 2 + rng.uniform(-NEAR, NEAR) for _ in range(2))
        if caption.motion.startswith("turns"):
            x, y = SIZE / 2 + TURN_RADIUS * math.sin(angle), SIZE / 2 - TURN_RADIUS * math.cos(angle)
        return cls(x, y, 1.0, -1.0)

    def step(self, caption: Caption) -> None:
        """Advance by one frame, as the caption says."""
        kind, _, how = caption.motion.partition(" ")
        speed = caption.pixels_per_frame
        if kind == "moves":
            self.dx, self.dy = DIRECTIONS[how]
        elif kind == "turns":
            self.dx, self.dy = turn_heading(self.x, self.y, clockwise=how == "clockwise")
        elif how == "sideways":
            self.dx, self.dy = _bounce(self.x, self.dx), 0.0
        else:
            self.dx, self.dy = 0.0, _bounce(self.y, self.dy)
        self.x, self.y = (self.x + speed * self.dx) % SIZE, (self.y + speed * self.dy) % SIZE


def turn_heading(x: float, y: float, *, clockwise: bool) -> tuple[float, float]:
    """Return the heading as a unit vector: along the circle around the middle, and towards that circle."""
    out_x, out_y = x - SIZE / 2, y - SIZE / 2
    far = math.hypot(out_x, out_y) or 1.0
    out_x, out_y = out_x / far, out_y / far
    sign = 1.0 if clockwise else -1.0  # y points down, so this is as seen
    pull = min(1.0, max(-1.0, (TURN_RADIUS - far) / TURN_PULL))
    dx, dy = pull * out_x - sign * out_y, pull * out_y + sign * out_x
    length = math.hypot(dx, dy)
    return dx / length, dy / length


def _bounce(position: float, heading: float) -> float:
    """Return the heading after a possible reflection at a wall; between walls it is unchanged."""
    if position <= WALLS[0]:
        return 1.0
    if position >= WALLS[1]:
        return -1.0
    return 1.0 if heading >= 0 else -1.0


def track(captions_of_frames: Sequence[Caption], mover: Mover) -> torch.Tensor:
    """Return the centre in each frame, `[T, 2]`, beginning at `mover`, which is advanced."""
    places = []
    for caption in captions_of_frames:
        places.append((mover.x, mover.y))
        mover.step(caption)
    return torch.tensor(places)


def masks(shape: str, centres_T2: torch.Tensor) -> torch.Tensor:
    """Return masks `[T, 64, 64]`, 1 inside the shape and 0 outside, with a soft edge of two pixels; the canvas wraps around."""
    grid = torch.arange(SIZE) + 0.5
    dx, dy = ((grid - centre[:, None] + SIZE / 2) % SIZE - SIZE / 2 for centre in centres_T2.unbind(1))
    dx, dy = dx[:, None, :], dy[:, :, None]
    if shape == "circle":
        outside = (dx * dx + dy * dy).sqrt() - RADIUS
    elif shape == "square":
        outside = torch.maximum(dx.abs(), dy.abs()) - RADIUS * math.sqrt(math.pi) / 2
    else:  # equilateral, point up: distances to three sides, each r from the centre, area 3 sqrt(3) r^2
        inner = RADIUS * math.sqrt(math.pi / (3 * math.sqrt(3)))
        slope = (dx.abs() * math.sqrt(3) - dy) / 2
        outside = torch.maximum(dy.expand_as(slope), slope) - inner
    return (0.5 - outside / 2).clamp(0, 1)


def draw(caption: Caption, centres_T2: torch.Tensor) -> torch.Tensor:
    """Draw frames `[T, 3, 64, 64]` in [-1, 1]."""
    mask = masks(caption.shape, centres_T2)[:, None]
    colour, background = (torch.tensor(rgb).view(3, 1, 1) for rgb in (COLOURS[caption.colour], BACKGROUND))
    return 2 * (background + mask * (colour - background)) - 1
