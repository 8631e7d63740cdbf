"""The vocabulary of the demo model: the words of its captions, and common synonyms."""

import torch

from causalrt.model.text.words import WordEncoder
from train_demo.world import COLOURS, MOTIONS, SHAPES, SPEEDS

FILLERS = ("a", "an", "and", "is", "it", "that", "the", "there", "then", "to", "which", "in", "on", "of")
SYNONYMS = {
    "circle": ("ball", "disc", "disk", "dot"),
    "square": ("box", "block"),
    "moves": ("move", "moving", "goes", "going", "slides", "sliding", "flies", "drifts"),
    "bounces": ("bounce", "bouncing"),
    "turns": ("turn", "turning", "orbits", "orbiting", "circles", "circling"),
    "sideways": ("horizontally",),
    "up down": ("vertically",),
    "up": ("upward", "upwards"),
    "down": ("downward", "downwards"),
    "right": ("rightward", "rightwards"),
    "left": ("leftward", "leftwards"),
    "counterclockwise": ("anticlockwise",),
    "slowly": ("slow", "gently"),
    "quickly": ("quick", "fast"),
    "purple": ("violet",),
    "cyan": ("turquoise",),
}


def word_encoder(*, text_dim: int, text_len: int, seed: int = 0) -> WordEncoder:
    """Make the encoder with random rows, which the seed determines; they are not trained, just as UMT5 is not."""
    said = " ".join((*COLOURS, *SHAPES, *MOTIONS, *SPEEDS)).split()
    plain = [word for word in dict.fromkeys(said) if word not in FILLERS]
    words: dict[str, tuple[int, ...]] = {word: (row,) for row, word in enumerate(plain)}
    for meant, others in SYNONYMS.items():
        words |= dict.fromkeys(others, tuple(row for part in meant.split() for row in words[part]))
    words |= dict.fromkeys(FILLERS, ())
    table = torch.randn(len(plain), text_dim, generator=torch.Generator().manual_seed(seed))
    return WordEncoder(table, words, max_tokens=text_len)
