"""A picture of the same video by several executors: a row each, a frame of each chunk, and how far a row is from the first.

    name    | frame of chunk 0 | of chunk 1 | ... | verdict

This module owns the picture alone; what rows are and what is said of them is the caller's affair.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

LABEL_WIDTH, VERDICT_WIDTH, HEADER, GAP = 100, 190, 28, 6
WIDEST = 16_000
"""Pixels of a picture."""
INK, QUIET, GOOD, BAD = "#1a1a1f", "#6b6b76", "#1b7a3d", "#b3261e"


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetRow:
    """One video.

    Attributes:
        name: what made it, one or two lines.
        frames: of each chunk, uint8 `[T, h, w, 3]`.
        verdict: what is to be said of it, one or two lines.
        agrees: whether that is good; None where there is nothing to compare.
    """

    name: str
    frames: Sequence[torch.Tensor]
    verdict: str
    agrees: bool | None


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> bytes:
    """A PNG of the last frame of each chunk, row under row, enlarged by whole pixels where there is room."""
    height, width, _ = rows[0].frames[0].shape[1:]
    chunks = len(rows[0].frames)
    scale = max(1, min(128 // height, 1100 // (chunks * (width + GAP))))
    shown = chunks_shown(chunks, (WIDEST - LABEL_WIDTH - VERDICT_WIDTH) // (scale * width + GAP))
    cell_height, cell_width = scale * height + GAP, scale * width + GAP
    top = HEADER * (1 + title.count("\n") + 1) + GAP
    size = LABEL_WIDTH + len(shown) * cell_width + VERDICT_WIDTH, top + len(rows) * cell_height + GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), title, fill=INK, font=ImageFont.load_default(16), spacing=8)
    font = ImageFont.load_default(14)
    for column, chunk in enumerate(shown):
        middle = LABEL_WIDTH + column * cell_width + scale * width / 2
        words = f"chunk {chunk}" if scale * width >= 60 else str(chunk)
        draw.text((middle, top - GAP), words, fill=QUIET, font=font, anchor="ms")
    for number, row in enumerate(rows):
        y = top + number * cell_height
        middle = y + scale * height / 2
        draw.multiline_text((GAP, middle), row.name, fill=INK, font=font, anchor="lm")
        for column, chunk in enumerate(shown):
            frame = row.frames[chunk][-1].numpy()
            sheet.paste(Image.fromarray(enlarged(frame, scale)), (LABEL_WIDTH + column * cell_width, y))
        ink = QUIET if row.agrees is None else GOOD if row.agrees else BAD
        place = LABEL_WIDTH + len(shown) * cell_width + GAP, middle
        draw.multiline_text(place, row.verdict, fill=ink, font=font, anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def chunks_shown(chunks: int, most: int) -> list[int]:
    """At most so many chunks, evenly spread, the first and the last among them."""
    if chunks <= most:
        return list(range(chunks))
    return [round(place * (chunks - 1) / (most - 1)) for place in range(most)]


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """`[..., h, w, 3]`, each pixel `scale` times in either direction."""
    return pixels.repeat(scale, axis=-3).repeat(scale, axis=-2)
