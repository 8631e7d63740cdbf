"""Clips in the form that the model takes: tokens of chunks, the caption of each chunk, and the time of each chunk.

A clip consists of its video's first chunk, which is the sink, and five consecutive chunks, which follow at once or after a gap
of up to `MAX_GAP` chunks: so a model that is trained on six chunks has seen a sink that is far away. In some clips the motion
changes at the start of a chunk, as it does when a user switches the prompt.

Nothing determines the exact position in a first chunk, and the mean over all positions is no sensible picture. Where the model
is to generate the first chunk from pure noise, that noise is therefore passed as a wish, and the clip begins at the position
whose first chunk is nearest to it. Thus the noise determines the position.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from causalrt.config import Config
from causalrt.model.codecs.block_dct import FRAMES, encode_blocks
from causalrt.model.tokens import tokens_from_latents
from train_demo.world import BACKGROUND, COLOURS, SIZE, Caption, Mover, draw, masks, track

CHUNKS = 6
MAX_GAP = 36
GAP_SHARE, SWITCH_SHARE = 0.35, 0.4
TURNS_AGAIN = 1
"""Additional weight of clips with a turning shape: its heading depends on its position, which is the hardest to learn."""
STARTS = 64
"""Number of starts that are drawn for each kind of motion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """A batch of clips of K chunks of N tokens.

    Attributes:
        tokens: tokens `[B, K, N, 64]` of latents that are not normalised.
        captions: captions before and after the switch, by clip; they are equal in a clip without a switch.
        switched: whether a chunk follows the second caption, `[B, K]`.
        starts: time index of each chunk's first latent frame, `[B, K]`.
        counts: whether a chunk contributes to the loss, since its history is complete, `[B, K]`.
    """

    tokens: torch.Tensor
    captions: list[tuple[Caption, Caption]]
    switched: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    def first(self, count: int) -> "Clips":
        """Return the first `count` clips."""
        return Clips(
            tokens=self.tokens[:count],
            captions=self.captions[:count],
            switched=self.switched[:count],
            starts=self.starts[:count],
            counts=self.counts[:count],
        )


def frames_of(config: Config, chunk: int) -> int:
    """Return the number of pixel frames of a chunk of a video."""
    return FRAMES * config.video.chunk_frames - (FRAMES - 1) * (chunk == 0)


class Starts:
    """Possible starts of clips: for each shape and kind of motion some movers, and the first chunk that each produces."""

    def __init__(
        self, config: Config, every: Sequence[Caption], *, normal: tuple[torch.Tensor, torch.Tensor], seed: int = 0
    ) -> None:
        self.mean, self.std = (value.view(-1, 1, 1) for value in normal)
        rng, count = random.Random(seed), frames_of(config, 0)
        self._movers: dict[tuple[str, str, str], list[Mover]] = {}
        self._masks: dict[tuple[str, str, str], torch.Tensor] = {}  # [colours, STARTS, F, C, H, W]
        for caption in every:
            kind = _kind(caption)
            if kind in self._movers:
                continue
            self._movers[kind] = [Mover.start(rng, caption) for _ in range(STARTS)]
            videos = []
            for mover in self._movers[kind]:
                mover.step(caption)  # sets the heading that the caption asks for
                mask = masks(caption.shape, track([caption] * count, replace(mover)))
                videos.append(torch.einsum("ij,thw->itjhw", torch.eye(3), mask))
            encoded = [encode_blocks(video) for each in videos for video in each]
            stacked = torch.stack(encoded)
            self._masks[kind] = stacked.view(STARTS, 3, *stacked.shape[1:]).transpose(0, 1).contiguous()
        empty = 2 * torch.tensor(BACKGROUND).view(3, 1, 1) - 1
        self._empty = encode_blocks(empty.expand(count, 3, SIZE, SIZE))

    def firsts(self, caption: Caption) -> torch.Tensor:
        """Return the available first chunks, `[STARTS, F, C, H, W]`, not normalised."""
        difference = 2 * (torch.tensor(COLOURS[caption.colour]) - torch.tensor(BACKGROUND))
        shapes: torch.Tensor = torch.tensordot(difference, self._masks[_kind(caption)], dims=1)
        return self._empty + shapes

    def mover(self, caption: Caption, number: int) -> Mover:
        """Return a new mover, which produces the first chunk of this number."""
        return replace(self._movers[_kind(caption)][number])

    def nearest(self, firsts: torch.Tensor, wish: torch.Tensor) -> int:
        """Return the index of the chunk in `firsts` that is nearest to `wish`, which is normalised."""
        apart = (firsts - self.mean) / self.std - wish
        return int(apart.square().sum((1, 2, 3, 4)).argmin())


def _kind(caption: Caption) -> tuple[str, str, str]:
    return caption.shape, caption.motion, caption.speed


def _draw_caption(every: Sequence[Caption], rng: random.Random) -> Caption:
    return rng.choices(every, [1 + TURNS_AGAIN * caption.motion.startswith("turns") for caption in every])[0]


def draw_firsts(
    config: Config,
    starts: Starts,
    every: Sequence[Caption],
    *,
    rng: random.Random,
    wishes: Sequence[torch.Tensor | None],
) -> Clips:
    """Draw clips that consist of the first chunk alone; arguments as in `draw_clips`."""
    captions, tokens = [], []
    for wish in wishes:
        caption = _draw_caption(every, rng)
        captions.append((caption, caption))
        firsts = starts.firsts(caption)
        number = rng.randrange(STARTS) if wish is None else starts.nearest(firsts, wish)
        tokens.append(tokens_from_latents(firsts[number], config))
    once = torch.zeros(len(tokens), 1, dtype=torch.int64)
    return Clips(
        tokens=torch.stack(tokens)[:, None], captions=captions, switched=once.bool(), starts=once, counts=~once.bool()
    )


def _clip(
    config: Config, starts: Starts | None, every: Sequence[Caption], rng: random.Random, wish: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[Caption, Caption], int, int]:
    """Return latents `[K * F, C, H, W]`, not normalised, the two captions, the chunk of the switch (or K), and the gap."""
    caption = _draw_caption(every, rng)
    alike = [c for c in every if (c.colour, c.shape) == (caption.colour, caption.shape)]
    other = _draw_caption(alike, rng) if rng.random() < SWITCH_SHARE else caption
    switch = CHUNKS if other == caption else rng.randrange(1, CHUNKS)
    gap = rng.randrange(1, MAX_GAP + 1) if rng.random() < GAP_SHARE else 0
    if wish is None or starts is None:
        mover = Mover.start(rng, caption)
        mover.step(caption)  # sets the heading that the caption asks for
    else:
        mover = starts.mover(caption, starts.nearest(starts.firsts(caption), wish))
    parts = []
    for chunk in range(CHUNKS):
        said = caption if chunk < switch else other
        if chunk == 1:
            for _ in range(gap * frames_of(config, 1)):
                mover.step(caption)
        parts.append(draw(caption, track([said] * frames_of(config, chunk), mover)))
    return encode_blocks(torch.cat(parts)), (caption, other), switch, gap


def draw_clips(
    config: Config,
    starts: Starts | None,
    every: Sequence[Caption],
    *,
    rng: random.Random,
    wishes: Sequence[torch.Tensor | None],
) -> Clips:
    """Draw clips of captions from `every`.

    Args:
        config: config of the model.
        starts: possible starts for the captions of `every`; None if there are no wishes.
        every: captions to draw from.
        rng: source of randomness.
        wishes: for each clip, normalised latents `[F, C, H, W]` that its first chunk is to resemble, or None for any position.
    """
    tokens, captions, switched, indices, counts = [], [], [], [], []
    chunk_numbers = torch.arange(CHUNKS)
    for wish in wishes:
        latents, both, switch, gap = _clip(config, starts, every, rng, wish)
        chunks = latents.view(CHUNKS, -1, *latents.shape[1:])
        tokens.append(torch.stack([tokens_from_latents(chunk, config) for chunk in chunks]))
        captions.append(both)
        switched.append(chunk_numbers >= switch)
        indices.append(config.video.chunk_frames * (chunk_numbers + gap * (chunk_numbers > 0)))
        # After a gap, the next two chunks lack the history that a window would hold.
        counts.append((chunk_numbers == 0) | (chunk_numbers > 2) if gap else torch.ones(CHUNKS, dtype=torch.bool))
    return Clips(
        tokens=torch.stack(tokens),
        captions=captions,
        switched=torch.stack(switched),
        starts=torch.stack(indices),
        counts=torch.stack(counts),
    )
