"""What the decoders hand over: a picture, when it is shown, and what is wrong with a file that breaks off."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from PIL import Image

from causalrt.errors import RequestError

MAX_PIXELS = 2**26
"""Of one picture, 8192 x 8192 for example. A small file can hold gigabytes of pixels; it is refused before they are decoded."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a file.

    Attributes:
        start: when it is first shown, in seconds; the first picture's is 0.
        duration: how long, in seconds; each begins where the one before ends. A still picture's is 0.
        image: gives the picture: RGB, upright. Not called for pictures that are left out.
        pixel_aspect: width by height of one of its pixels.
    """

    start: Fraction
    duration: Fraction
    image: Callable[[], Image.Image]
    pixel_aspect: Fraction = Fraction(1)


class Damage(Exception):  # noqa: N818 (it ends a reading; what was read until then counts)
    """A file is damaged or cut off here; what came before it was good."""


def check_size(width: int, height: int) -> None:
    """Refuse pictures that would take gigabytes, before they are decoded.

    Raises:
        RequestError: there are more than `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise RequestError(f"it has {width} x {height} pixels, of at most {MAX_PIXELS:,}; scale it down first")


def over(background: Colour, image: Image.Image) -> Image.Image:
    """An RGB or RGBA image as RGB, over a colour where it is transparent."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
