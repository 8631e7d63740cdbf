"""Decodes still and animated pictures with Pillow into pictures that are upright, opaque and in sRGB."""

from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from causalrt.errors import RequestError
from causalrt.media.colour import UNSPECIFIED, image_to_srgb
from causalrt.media.picture import MAX_PIXELS, Colour, Damage, Picture, check_size, over
from causalrt.media.pyav import pyav

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM")
ANIMATED = ("PNG", "GIF", "WEBP", "AVIF")  # pages of a TIFF or pictures of an MPO are not an animation
SHORTEST_MS, UNSET_MS = 10, 100  # browsers show a GIF frame of at most 10 ms for 100 ms
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError)


def opened_image(file: BinaryIO, *, is_tga: bool) -> Image.Image | None:
    """Open an image without decoding it; return None if Pillow does not recognise the contents of the file.

    Args:
        file: a seekable file, which must stay open as long as the image is used.
        is_tga: whether the file may be a TGA, a format without a signature.

    Raises:
        RequestError: the image has too many pixels.
        Damage: the image is damaged before its first pixel.
    """
    file.seek(0)
    Image.init()
    try:
        image = Image.open(file, formats=(*FORMATS, "TGA") if is_tga else FORMATS)
    except UnidentifiedImageError:
        return None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"it has more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except DECODING_ERRORS as error:
        raise Damage(str(error)) from error
    check_size(*image.size)
    return image


def still_pictures(image: Image.Image, file: BinaryIO, background: Colour) -> Iterator[Picture]:
    """Decode the pictures of an image in order; a still picture has duration 0.

    Raises:
        RequestError: the pixel format or the colours are not supported.
        Damage: a picture is damaged or truncated.
    """
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    first = int(
        count > 1 and bool(getattr(image, "default_image", False))
    )  # skip the fallback for viewers without animation
    start = Fraction(0)
    tags = _colour_tags(image, file)
    for number in range(first, count):
        try:
            image.seek(number)
            image.load()
            upright = ImageOps.exif_transpose(image)
        except DECODING_ERRORS as error:
            raise Damage(str(error)) from error
        duration = Fraction(0)
        if count > 1:
            shown_ms = Fraction(image.info.get("duration") or 0)
            duration = (shown_ms if shown_ms > SHORTEST_MS else Fraction(UNSET_MS)) / 1000
        shown = over(background, _in_srgb(upright, tags))
        yield Picture(start=start, duration=duration, image=shown.copy)
        start += duration


def _in_srgb(image: Image.Image, tags: tuple[int, int]) -> Image.Image:
    """Convert an image of any mode to RGB or RGBA in sRGB."""
    if image.mode.startswith("I;16"):
        image = _in_8_bits(image)
    if image.mode in ("I", "F"):
        raise RequestError(
            f"its pixels ({image.mode}: 32 bits each) have no agreed black and white; convert it to 8 or 16 bits"
        )
    profile = image.info.get("icc_profile")
    if profile:
        return _through_profile(image, profile)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image_to_srgb(image.convert(mode), primaries=tags[0], transfer=tags[1])


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey levels to mode L, or to LA if one level stands for transparency."""
    levels = np.asarray(image)
    grey = (levels >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(levels == transparent, 0, 255).astype(np.uint8)], axis=-1))


def _through_profile(image: Image.Image, icc: bytes) -> Image.Image:
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(icc))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        converted = ImageCms.profileToProfile(
            image.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, KeyError) as error:
        raise RequestError(f"its ICC colour profile cannot be used ({error}); convert it to sRGB first") from error
    assert converted is not None  # it is None only for in-place conversion
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _colour_tags(image: Image.Image, file: BinaryIO) -> tuple[int, int]:
    """Return the primaries and transfer with which a PNG or AVIF is tagged; Pillow does not report them."""
    if image.format not in ("PNG", "AVIF") or image.info.get("icc_profile"):
        return UNSPECIFIED, UNSPECIFIED
    av = pyav()
    position = file.tell()
    try:
        file.seek(0)
        with av.open(file, options={"max_pixels": str(MAX_PIXELS)}) as container:
            context = container.streams.video[0].codec_context
            return context.color_primaries, context.color_trc
    except (av.FFmpegError, IndexError):
        return UNSPECIFIED, UNSPECIFIED
    finally:
        file.seek(position)
