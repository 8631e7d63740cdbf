"""Types that the decoders of pictures and clips share: a picture with its time, and damage to a file."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from PIL import Image

from causalrt.errors import RequestError

MAX_PIXELS = 2**26
"""Most pixels of a picture (8192 x 8192). A small file can hold gigabytes of pixels, so this is checked before decoding."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a file.

    Attributes:
        start: time in seconds at which it is shown; 0 for the first picture.
        duration: seconds for which it is shown, until the next one; 0 for a still picture.
        image: returns the upright RGB picture; not called for pictures that are skipped.
        pixel_aspect: width of a pixel divided by its height.
    """

    start: Fraction
    duration: Fraction
    image: Callable[[], Image.Image]
    pixel_aspect: Fraction = Fraction(1)


class Damage(Exception):  # noqa: N818 (it ends reading; what was read before remains valid)
    """A file is damaged or truncated at this point; everything before it is good."""


def check_size(width: int, height: int) -> None:
    """Refuse pictures that would take gigabytes, before they are decoded.

    Raises:
        RequestError: the picture has more than `MAX_PIXELS` pixels.
    """
    if width * height > MAX_PIXELS:
        raise RequestError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down first")


def over(background: Colour, image: Image.Image) -> Image.Image:
    """Composite an RGB or RGBA image over a background colour; return it as RGB."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
