"""Clips as the model sees them: tokens of chunks, the caption of each chunk, and where each chunk lies in time.

A clip is its video's first chunk, the sink, and five chunks in a row, that follow at once or after a gap of up to `MAX_GAP`
chunks: so a model that is trained on six chunks knows a sink that is far away. In some clips the motion changes at a chunk's
start, as it does when a user switches the prompt.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from causalrt.config import Config
from causalrt.model.block_dct import FRAMES, encode_blocks
from causalrt.runtime.requests import tokens_from_latents
from causalrt.tools.demo_train.world import Caption, Mover, draw, track, with_motion

CHUNKS = 6
MAX_GAP = 36
GAP_SHARE, SWITCH_SHARE = 0.35, 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """A batch; K chunks of N tokens.

    Attributes:
        tokens: `[B, K, N, 64]`, of latents that are not normalised.
        captions: before and after the switch, by clip; the same two where there is none.
        switched: `[B, K]`, whether a chunk goes by the second one.
        starts: `[B, K]`, time index of each chunk's first latent frame.
        counts: `[B, K]`, whether a chunk's history is whole, so that it can be learnt from.
    """

    tokens: torch.Tensor
    captions: list[tuple[Caption, Caption]]
    switched: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    def first(self, count: int) -> "Clips":
        """The first so many."""
        return Clips(
            tokens=self.tokens[:count],
            captions=self.captions[:count],
            switched=self.switched[:count],
            starts=self.starts[:count],
            counts=self.counts[:count],
        )


def frames_of(config: Config, chunk: int) -> int:
    """Pixel frames of a chunk of a video."""
    return FRAMES * config.video.chunk_frames - (FRAMES - 1) * (chunk == 0)


def _clip(
    config: Config, every: Sequence[Caption], rng: random.Random
) -> tuple[torch.Tensor, tuple[Caption, Caption], int, int]:
    """Latents `[K * F, C, H, W]` not normalised, the two captions, the chunk of the switch (or K), the gap."""
    caption = rng.choice(every)
    other = with_motion(caption, rng.choice(every)) if rng.random() < SWITCH_SHARE else caption
    switch = CHUNKS if other == caption else rng.randrange(1, CHUNKS)
    gap = rng.randrange(1, MAX_GAP + 1) if rng.random() < GAP_SHARE else 0
    mover = Mover.start(rng, caption)
    mover.step(caption)  # heads where the caption says
    parts = []
    for chunk in range(CHUNKS):
        said = caption if chunk < switch else other
        if chunk == 1:
            for _ in range(gap * frames_of(config, 1)):
                mover.step(caption)
        parts.append(draw(caption, track([said] * frames_of(config, chunk), mover)))
    return encode_blocks(torch.cat(parts)), (caption, other), switch, gap


def draw_clips(config: Config, every: Sequence[Caption], *, count: int, rng: random.Random) -> Clips:
    """`count` of them."""
    tokens, captions, switched, starts, counts = [], [], [], [], []
    chunk_numbers = torch.arange(CHUNKS)
    for _ in range(count):
        latents, both, switch, gap = _clip(config, every, rng)
        chunks = latents.view(CHUNKS, -1, *latents.shape[1:])
        tokens.append(torch.stack([tokens_from_latents(chunk, config) for chunk in chunks]))
        captions.append(both)
        switched.append(chunk_numbers >= switch)
        starts.append(config.video.chunk_frames * (chunk_numbers + gap * (chunk_numbers > 0)))
        # After a gap the next two chunks lack the history that a window would hold.
        counts.append((chunk_numbers == 0) | (chunk_numbers > 2) if gap else torch.ones(CHUNKS, dtype=torch.bool))
    return Clips(
        tokens=torch.stack(tokens),
        captions=captions,
        switched=torch.stack(switched),
        starts=torch.stack(starts),
        counts=torch.stack(counts),
    )
