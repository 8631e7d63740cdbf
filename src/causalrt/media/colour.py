"""Converts the colours of files to the sRGB of frames.

    YUV frame (PyAV) -> matrix by tag or size -> RGB
        BT.601/709 primaries       -> unchanged, as in players
        BT.2020 or P3 primaries    -> swscale, to BT.709 primaries
        PQ or HLG (HDR)            -> light, 1.0 = 203 cd/m2 (BT.2408) -> BT.709 primaries -> highlights compressed -> sRGB

Anything else is refused with its name rather than shown in wrong colours. Numbers are those of ITU-T H.273.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from causalrt.errors import RequestError
from causalrt.media.pyav import pyav

RGB, BT709, UNSPECIFIED, BT2020, DISPLAY_P3, SRGB, PQ, HLG = 0, 1, 2, 9, 12, 13, 16, 18

# By number; None needs no conversion. The others of H.273 are refused.
PRIMARIES: dict[int, str | None] = {
    **dict.fromkeys((BT709, UNSPECIFIED, 4, 5, 6, 7, 22)),
    BT2020: "BT.2020",
    11: "DCI-P3",
    DISPLAY_P3: "Display P3",
}
TRANSFERS: dict[int, str | None] = {
    **dict.fromkeys((BT709, UNSPECIFIED, 4, 5, 6, 7, 11, 12, SRGB, 14, 15)),
    PQ: "PQ",
    HLG: "HLG",
}
MATRICES: dict[int, str | None] = dict.fromkeys((RGB, BT709, UNSPECIFIED, 4, 5, 6, 7, BT2020))
REFUSED = {
    "primaries": {8: "generic film", 10: "CIE XYZ"},
    "transfer": {8: "linear light", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428"},
    "matrix": {
        8: "YCgCo",
        10: "BT.2020 constant luminance",
        11: "SMPTE 2085",
        14: "ICtCp",
        15: "IPT-C2 (Dolby Vision)",
    },
}

REFERENCE_WHITE = 203.0  # cd/m2 of HDR reference white (ITU-R BT.2408), which becomes 1.0
HLG_PEAK = 1000.0  # cd/m2 of the display for which HLG's system gamma is 1.2 (ITU-R BT.2100)
KNEE = 0.5  # light up to this level is unchanged; brighter light approaches 1.0

# Matrices from linear light in other primaries to BT.709 primaries.
TO_BT709 = {
    BT2020: [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    DISPLAY_P3: [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]],
}
Pixels = npt.NDArray[np.uint8]
Wide = npt.NDArray[np.uint16]


def check_colour(*, primaries: int, transfer: int, matrix: int = UNSPECIFIED) -> None:
    """Refuse colours that cannot be converted to sRGB; the arguments are numbers of H.273.

    Raises:
        RequestError: they cannot be converted.
    """
    tags = {"primaries": (primaries, PRIMARIES), "transfer": (transfer, TRANSFERS), "matrix": (matrix, MATRICES)}
    refused = [
        f"{REFUSED[kind].get(number, f'number {number}')} {kind}"
        for kind, (number, known) in tags.items()
        if number not in known
    ]
    if transfer in (PQ, HLG) and PRIMARIES.get(primaries) and primaries not in TO_BT709:
        refused.append(f"{PRIMARIES[primaries]} primaries in {TRANSFERS[transfer]}")
    if refused:
        raise RequestError(f"colours with {', '.join(refused)} are not supported; convert it to BT.709 or sRGB first")


def image_from_frame(frame: Any, reformatter: Any, *, max_hdr_side: int) -> Image.Image:
    """Convert a frame to an RGB or RGBA image in sRGB.

    Args:
        frame: a frame of PyAV; its colour tags are trusted, and without a matrix tag its size selects BT.601 or BT.709.
        reformatter: PyAV's `VideoReformatter`, one for all frames of a clip, since its wide-gamut tables take seconds to build.
        max_hdr_side: limit in pixels to which the shorter side of an HDR picture is scaled down before conversion.

    Raises:
        RequestError: the colours cannot be converted.
    """
    library = pyav().video.reformatter
    spaces, flags = library.Colorspace, library.Interpolation
    primaries, transfer, matrix = frame.color_primaries, frame.color_trc, frame.colorspace
    check_colour(primaries=primaries, transfer=transfer, matrix=matrix)
    # Without accurate rounding, chroma loses one level in each round of writing and reading.
    exact = flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
    options = {"interpolation": exact, "dst_color_range": library.ColorRange.JPEG}
    if matrix == UNSPECIFIED and not frame.format.is_rgb:
        # The rule of mpv.
        options["src_colorspace"] = spaces.ITU709 if frame.width >= 1280 or frame.height > 576 else spaces.ITU601
    if transfer in (PQ, HLG):
        scale = min(1.0, max_hdr_side / min(frame.width, frame.height))
        size = {"width": max(1, round(frame.width * scale)), "height": max(1, round(frame.height * scale))}
        wide = reformatter.reformat(frame, format="rgb48le", **size, **options).to_ndarray()
        return Image.fromarray(srgb_from_hdr(wide, primaries=primaries, transfer=transfer))
    if PRIMARIES[primaries]:
        options |= {"dst_color_primaries": BT709, "dst_color_trc": transfer if transfer != UNSPECIFIED else BT709}
        if transfer == UNSPECIFIED:
            frame.color_trc = BT709
    has_alpha = any(part.is_alpha for part in frame.format.components) or frame.format.has_palette
    return Image.fromarray(reformatter.reformat(frame, format="rgba" if has_alpha else "rgb24", **options).to_ndarray())


def image_to_srgb(image: Image.Image, *, primaries: int, transfer: int) -> Image.Image:
    """Convert a still RGB or RGBA image with these primaries and this transfer to sRGB."""
    check_colour(primaries=primaries, transfer=transfer)
    if transfer not in (PQ, HLG) and not PRIMARIES[primaries]:
        return image
    frame = pyav().VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")
    frame.color_primaries, frame.color_trc, frame.colorspace = primaries, transfer, RGB
    converted = image_from_frame(frame, pyav().video.reformatter.VideoReformatter(), max_hdr_side=max(image.size))
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


def srgb_from_hdr(coded: Wide, *, primaries: int, transfer: int) -> Pixels:
    """Convert PQ or HLG, uint16 `[h, w, 3]`, to sRGB, uint8; reference white becomes 233, highlights are brighter."""
    levels = np.linspace(0, 1, 65536)
    if transfer == PQ:
        light = np.take(_light_from_pq(levels).astype(np.float32), coded)
    else:
        scene = np.take(_scene_from_hlg(levels).astype(np.float32), coded)
        luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = HLG_PEAK / REFERENCE_WHITE * scene * (luminance**0.2)[..., None]
    if primaries in TO_BT709:
        light = light @ np.array(TO_BT709[primaries], np.float32).T
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    compressed = KNEE + (1 - KNEE) * (1 - np.exp(-(brightest - KNEE) / (1 - KNEE)))
    light = np.clip(light * np.where(brightest > KNEE, compressed / brightest, 1), 0, 1)
    gamma = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    srgb: Pixels = np.rint(255 * gamma).astype(np.uint8)
    return srgb


def _light_from_pq(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    power = levels ** (1 / 78.84375)
    return (
        10000
        / REFERENCE_WHITE
        * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    )


def _scene_from_hlg(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(levels <= 0.5, levels**2 / 3, (np.exp((levels - 0.55991073) / 0.17883277) + 0.28466892) / 12)
