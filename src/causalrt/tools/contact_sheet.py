"""A picture that shows the same video from several executors: one row each, with one frame of each chunk and a verdict.

    name    | frame of chunk 0 | of chunk 1 | ... | verdict

This module owns only the picture; the caller decides what the rows are and what their verdicts say.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

LABEL_WIDTH, VERDICT_WIDTH, HEADER, GAP = 100, 190, 28, 6
CELL, WIDEST = 128, 2_200
"""Sizes in pixels: small frames are enlarged to about `CELL`, and chunks are left out to keep the picture within `WIDEST`."""
INK, QUIET, GOOD, BAD = "#1a1a1f", "#6b6b76", "#1b7a3d", "#b3261e"


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetRow:
    """The video of one executor.

    Attributes:
        name: name of the executor, in one or two lines.
        frames: frames of each chunk, uint8 `[T, h, w, 3]`.
        verdict: result of the comparison, in one or two lines.
        agrees: whether the comparison passed; None if there is nothing to compare with.
    """

    name: str
    frames: Sequence[torch.Tensor]
    verdict: str
    agrees: bool | None


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> bytes:
    """Draw a PNG with the last frame of each chunk, or of some chunks of a long video, enlarged by whole pixels."""
    height, width, _ = rows[0].frames[0].shape[1:]
    chunks = len(rows[0].frames)
    scale = max(1, CELL // height)
    shown = chunks_shown(chunks, max(2, (WIDEST - LABEL_WIDTH - VERDICT_WIDTH) // (scale * width + GAP)))
    cell_height, cell_width = scale * height + GAP, scale * width + GAP
    top = HEADER * (1 + title.count("\n") + 1) + GAP
    title_font = ImageFont.load_default(16)
    title_width = max(math.ceil(title_font.getlength(line)) for line in title.split("\n")) + 2 * GAP
    width_of_rows = LABEL_WIDTH + len(shown) * cell_width + VERDICT_WIDTH
    size = max(width_of_rows, title_width), top + len(rows) * cell_height + GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), title, fill=INK, font=title_font, spacing=8)
    font = ImageFont.load_default(14)
    for column, chunk in enumerate(shown):
        middle = LABEL_WIDTH + column * cell_width + scale * width / 2
        draw.text((middle, top - GAP), f"chunk {chunk}", fill=QUIET, font=font, anchor="ms")
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
    """At most `most` chunks, evenly spaced, including the first and the last."""
    if chunks <= most:
        return list(range(chunks))
    return [round(place * (chunks - 1) / (most - 1)) for place in range(most)]


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Repeat each pixel of `[..., h, w, 3]` `scale` times in both directions."""
    return pixels.repeat(scale, axis=-3).repeat(scale, axis=-2)
