"""Reads a picture or a clip as frames of a given size and rate.

file -> stills (Pillow) | clips (PyAV) -> pictures with times -> resampled in time -> cropped to the centre and scaled -> frames
"""

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageColor

from causalrt.codec_geometry import WAN21
from causalrt.errors import RequestError
from causalrt.media.clips import clip_pictures
from causalrt.media.colour import Pixels
from causalrt.media.picture import Colour, Damage, Picture
from causalrt.media.stills import opened_image, still_pictures
from causalrt.regular_files import open_regular_file

BACKGROUND = "white"
TGA_SUFFIXES = (".tga", ".icb", ".vda", ".vst")

Part = Literal["first", "last"]
_log = logging.getLogger(__name__)


def read_frames(
    path: str | Path,
    *,
    height: int,
    width: int,
    max_frames: int,
    fps: int | Fraction = WAN21.fps,
    background: str = BACKGROUND,
    part: Part = "first",
) -> torch.Tensor:
    """Read a picture or a clip as frames, uint8 `[T, height, width, 3]` in sRGB, T at most `max_frames`.

    Pictures are upright and respect the aspect ratio of their pixels; each is cropped to the centre and scaled.
    A clip is sampled by its timestamps. Colours other than those of sRGB and BT.709 are converted, and HDR is tone-mapped.
    A warning is logged if a clip is resampled or cut, is shorter than `max_frames`, or is damaged; the part before the damage
    is used.

    Args:
        path: a regular file; URLs and patterns are not interpreted.
        height: height of the frames in pixels.
        width: width of the frames in pixels.
        max_frames: most frames to return. A still picture gives one.
        fps: frames per second.
        background: CSS colour shown where a picture is transparent, such as `white` or `#102030`.
        part: whether the first or the last frames of a longer clip are used.

    Raises:
        RequestError: an argument is invalid, or the file cannot be read.
        ExecutorError: PyAV is not installed.
    """
    path = Path(path)
    if part not in ("first", "last"):
        raise RequestError(f"part must be 'first' or 'last', got {part!r}")
    for name, value in (("height", height), ("width", width), ("max_frames", max_frames), ("fps", fps)):
        if not value > 0:
            raise RequestError(f"{name} must be positive, got {value}")
    colour = _colour(background)
    sampler = _Sampler(height=height, width=width, max_frames=max_frames, fps=Fraction(fps), part=part)
    damage = None
    try:
        with contextlib.closing(_pictures(path, colour, max_hdr_side=2 * max(height, width))) as pictures:
            try:
                for picture in pictures:
                    if sampler.add(picture):
                        break
            except Damage as error:
                damage = str(error)
    except OSError as error:
        raise RequestError(f"{path} cannot be read as an image or a video: {error.strerror or error}") from error
    except RequestError as error:
        raise RequestError(f"{path} cannot be read as an image or a video: {error}") from error
    if damage is not None and not sampler.num_pictures:
        raise RequestError(
            f"{path} cannot be read as an image or a video: it is damaged or truncated at its first picture ({damage}); "
            "give an undamaged file"
        )
    remarks = sampler.remarks()
    if damage is not None:
        remarks.insert(
            0,
            f"is damaged or truncated after {sampler.num_pictures} pictures, {float(sampler.seconds):.2f} s ({damage}): "
            "only the part before that is used",
        )
    if remarks:
        _log.warning("%s %s", path, "; ".join(remarks))
    return sampler.stacked()


def _pictures(path: Path, background: Colour, *, max_hdr_side: int) -> Generator[Picture]:
    with open_regular_file(path) as file:
        image = opened_image(file, is_tga=path.suffix.lower() in TGA_SUFFIXES)
        if image is not None:
            yield from still_pictures(image, file, background)
        else:
            yield from clip_pictures(file, background, max_hdr_side=max_hdr_side)


def _colour(text: str) -> Colour:
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise RequestError(f"background must be a colour such as white or #102030, got {text!r}") from None
    return red, green, blue


@dataclass(kw_only=True)
class _Sampler:
    """Resamples pictures to a constant rate: frame k is the picture shown at the middle of its interval, (k + 1/2) / fps."""

    height: int
    width: int
    max_frames: int
    fps: Fraction
    part: Part

    def __post_init__(self) -> None:
        self.frames: deque[Pixels] = deque(maxlen=self.max_frames)
        self._latest: Picture
        self.num_pictures = self.total = self._repeated = self._dropped = 0
        self.seconds = Fraction(0)

    def add(self, picture: Picture) -> bool:
        """Add a picture as often as it is sampled; return whether no more pictures are needed."""
        self.num_pictures += 1
        self.seconds = picture.start + picture.duration
        end = max(0, ceil(self.seconds * self.fps - Fraction(1, 2)))
        count, self.total = end - self.total, end
        self._dropped += count == 0
        self._repeated += max(0, count - 1)
        wanted = self.max_frames - (len(self.frames) if self.part == "first" else 0)
        if min(count, wanted) > 0:
            self.frames.extend(itertools.repeat(self._fitted(picture), min(count, wanted)))
        self._latest = picture
        return self.part == "first" and self.total > self.max_frames

    def stacked(self) -> torch.Tensor:
        """Return the frames: at least one, also for a still picture or a clip shorter than half a frame."""
        return torch.from_numpy(np.stack(self.frames or [self._fitted(self._latest)]))

    def remarks(self) -> list[str]:
        """Return remarks on how the frames differ from the clip, for a warning."""
        found: list[str] = []
        if not self.seconds:
            return found
        if self._dropped or self._repeated:
            rate = float(self.num_pictures / self.seconds)
            found.append(f"has {rate:.4g} pictures a second, resampled to {float(self.fps):.4g}")
        if self.total > self.max_frames:
            found.append(f"is longer than the {self.max_frames} frames that are taken, its {self.part} ones")
        elif self.total < self.max_frames:
            found.append(
                f"lasts {float(self.seconds):.4g} s and gives {self.total} frames, fewer than the {self.max_frames} wanted"
            )
        return found

    def _fitted(self, picture: Picture) -> Pixels:
        """Crop a picture to the centre with the aspect ratio of the frames, and scale it."""
        image = picture.image()
        shape = Fraction(self.width, self.height) / picture.pixel_aspect
        wide, high = min(Fraction(image.width), image.height * shape), min(Fraction(image.height), image.width / shape)
        left, top = float((image.width - wide) / 2), float((image.height - high) / 2)
        box = (left, top, left + float(wide), top + float(high))
        return np.asarray(image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box))
