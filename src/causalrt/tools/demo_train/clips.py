"""Clips as the model sees them: tokens of chunks, the caption of each chunk, and where each chunk lies in time.

A clip is its video's first chunk, the sink, and five chunks in a row, that follow at once or after a gap of up to `MAX_GAP`
chunks: so a model that is trained on six chunks knows a sink that is far away. In some clips the motion changes at a chunk's
start, as it does when a user switches the prompt.

A first chunk may lie anywhere, and noise alone does not say where: the mean of all places is no picture. So a clip whose first
chunk the model is to make from noise alone is given that noise as a wish, and begins where its first chunk is most like it.
Then noise does say where.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from causalrt.config import Config
from causalrt.model.block_dct import FRAMES, encode_blocks
from causalrt.runtime.requests import tokens_from_latents
from causalrt.tools.demo_train.world import Caption, Mover, draw, track, with_motion

CHUNKS = 6
MAX_GAP = 36
GAP_SHARE, SWITCH_SHARE = 0.35, 0.4
TURNS_AGAIN = 1
"""How much more often than others a clip is drawn that turns: its way depends on where it is, and is the hardest to learn."""
STARTS = 16
"""Starts that are tried for a wish where a clip cannot be moved about its canvas both ways."""


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
    config: Config, every: Sequence[Caption], rng: random.Random, wish: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[Caption, Caption], int, int]:
    """Latents `[K * F, C, H, W]` not normalised, the two captions, the chunk of the switch (or K), the gap."""
    caption = rng.choices(every, [1 + TURNS_AGAIN * caption.motion.startswith("turns") for caption in every])[0]
    other = with_motion(caption, rng.choice(every)) if rng.random() < SWITCH_SHARE else caption
    switch = CHUNKS if other == caption else rng.randrange(1, CHUNKS)
    gap = rng.randrange(1, MAX_GAP + 1) if rng.random() < GAP_SHARE else 0
    mover, shift = Mover.start(rng, caption), (0, 0)
    mover.step(caption)  # heads where the caption says
    if wish is not None:
        mover, shift = _likest(config, (caption, other), mover, wish, rng)
    parts = []
    for chunk in range(CHUNKS):
        said = caption if chunk < switch else other
        if chunk == 1:
            for _ in range(gap * frames_of(config, 1)):
                mover.step(caption)
        parts.append(draw(caption, track([said] * frames_of(config, chunk), mover)))
    return encode_blocks(torch.cat(parts)).roll(shift, (2, 3)), (caption, other), switch, gap


def _likest(
    config: Config, said: tuple[Caption, Caption], mover: Mover, wish: torch.Tensor, rng: random.Random
) -> tuple[Mover, tuple[int, int]]:
    """Of where a clip may begin, what makes its first chunk likest to `wish`: a start, and latents down and right.

    A clip that moves straight on may be moved about the canvas, one that bounces across its way; for one that turns, and for
    what one that bounces starts from, some more starts are drawn.
    """
    motions = [caption.motion for caption in said]
    turns = any(motion.startswith("turns") for motion in motions)
    rows = range(1 if turns or "bounces up and down" in motions else wish.shape[2])
    columns = range(1 if turns or "bounces sideways" in motions else wish.shape[3])
    movers = [mover]
    if len(rows) * len(columns) < wish[0, 0].numel():
        for _ in range(STARTS - 1):
            movers.append(Mover.start(rng, said[0]))
            movers[-1].step(said[0])
    count = frames_of(config, 0)
    tracks = torch.cat([track([said[0]] * count, replace(start)) for start in movers])
    frames = draw(said[0], tracks)
    firsts = torch.stack([encode_blocks(each) for each in frames.view(len(movers), count, *frames.shape[1:])])
    shifts = list(itertools.product(rows, columns))
    wishes = torch.stack([wish.roll((-down, -right), (2, 3)) for down, right in shifts])
    best = int((firsts.flatten(1) @ wishes.flatten(1).T).argmax())
    return movers[best // len(shifts)], shifts[best % len(shifts)]


def draw_clips(
    config: Config,
    every: Sequence[Caption],
    *,
    count: int,
    rng: random.Random,
    wishes: Sequence[torch.Tensor | None] | None = None,
) -> Clips:
    """Clips of captions drawn from `every`.

    Args:
        config: of the model.
        every: captions.
        count: clips.
        rng: where chance comes from.
        wishes: for each clip, latents `[F, C, H, W]` that its first chunk shall be like; None where it may lie anywhere.
    """
    tokens, captions, switched, starts, counts = [], [], [], [], []
    chunk_numbers = torch.arange(CHUNKS)
    for wish in [None] * count if wishes is None else wishes:
        latents, both, switch, gap = _clip(config, every, rng, wish)
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
