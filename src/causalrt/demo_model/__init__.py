"""The model that ships with the package, as files; its card is `README.md` beside them.

    checkpoint.safetensors   the transformer of the recipe `demo`, in the layout of Self-Forcing's release
    codec.safetensors        the cosine transform in a VAE's place (`model/codecs/block_dct.py`)
    words.safetensors        the table of words in a text encoder's place (`model/text/words.py`)

`python -m train_demo` makes them.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

CHECKPOINT, CODEC = "checkpoint.safetensors", "codec.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoFiles:
    """Where they lie.

    Attributes:
        checkpoint: for `build(checkpoint=)`.
        codec: for `build(vae=)`.
        words: the folder of `words.safetensors`, for `load(text_encoder=)`.
    """

    checkpoint: Path
    codec: Path
    words: Path


def demo_files() -> DemoFiles:
    """The shipped files."""
    folder = Path(str(files(__name__)))
    return DemoFiles(checkpoint=folder / CHECKPOINT, codec=folder / CODEC, words=folder)
