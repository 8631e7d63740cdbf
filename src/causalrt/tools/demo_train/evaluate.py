"""How well the demo model does what captions say: `python -m causalrt.tools.demo_train.evaluate FOLDER`.

Videos are made by a bundle's own executor, from captions that were held back in training, and judged from their pixels alone
(`judge.py`). FOLDER has what `demo_train` writes; the report says how many captions were shown right, and what went wrong.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from causalrt.config import override, recipe
from causalrt.export.build import build
from causalrt.model.block_dct import block_basis, decode_block
from causalrt.model.decode_state import pixels_from_signal
from causalrt.model.words import WordEncoder
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.tools.demo_train.judge import Seen, border_jump, look
from causalrt.tools.demo_train.world import Caption, split_captions


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One video, judged.

    Attributes:
        caption: what it should show; the last one, where the prompt was switched.
        seen: what it shows, from the switch on.
        at_borders: longest step of the shape's centre from a chunk to the next, in pixels.
        within: longest step elsewhere.
    """

    caption: Caption
    seen: Seen
    at_borders: float
    within: float

    @property
    def right(self) -> bool:
        """Colour, motion and speed are the caption's."""
        return self.seen.agrees(self.caption)


def frames_from_latents(latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Normalised latents `[F, 16, H, W]` from a video's start -> uint8 `[4 F - 3, 8 H, 8 W, 3]`, as a session's codec does."""
    basis = block_basis()
    blocks = [decode_block(latent * std.view(-1, 1, 1) + mean.view(-1, 1, 1), basis) for latent in latents]
    return pixels_from_signal(torch.cat([blocks[0].mean(0, keepdim=True), *blocks[1:]]).clamp(-1, 1))


def show(
    engine: Engine,
    words: WordEncoder,
    captions: Sequence[Caption],
    *,
    normal: tuple[torch.Tensor, torch.Tensor],
    seed: int,
    num_chunks: int = 7,
    judged_from: int = 0,
) -> tuple[Shown, torch.Tensor]:
    """A video by one caption, or by one for each chunk (a switch where they change), judged from a chunk on; and its frames."""
    said = [*captions, *[captions[-1]] * (num_chunks - len(captions))]
    latents = []
    with engine.session(words.encode(str(said[0])), seed=seed, num_chunks=num_chunks) as session:
        for chunk in range(num_chunks):
            if chunk and said[chunk] != said[chunk - 1]:
                session.switch_prompt(words.encode(str(said[chunk])))
            latents.append(next(session).latents)
    frames = frames_from_latents(torch.cat(latents), *normal)
    borders = [12 * chunk - 3 for chunk in range(1, num_chunks)]
    start = borders[judged_from - 1] if judged_from else 0
    at_borders, within = border_jump(frames, borders)
    return Shown(caption=said[-1], seen=look(frames[start:]), at_borders=at_borders, within=within), frames


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    from causalrt.tools.demo_train.command import CHECKPOINT, normal_values

    parser = argparse.ArgumentParser(prog="python -m causalrt.tools.demo_train.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100, help="held-back captions to try")
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--sheet", type=Path, help="write a picture of the first eight videos")
    given = parser.parse_args(arguments)
    config = override(recipe("demo"), {"build.world_size": "1"})
    words, console = WordEncoder.from_folder(given.folder, text_dim=config.model.text_dim), Console()
    normal = normal_values(config)
    _, held_back = split_captions()
    right = 0
    strips: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory(prefix="causalrt-demo-") as folder:
        bundle = build(config, checkpoint=given.folder / CHECKPOINT, out=Path(folder) / "bundle")
        with load(bundle, device="cpu") as engine:
            for seed, caption in enumerate(held_back[: given.count]):
                shown, frames = show(engine, words, [caption], normal=normal, seed=seed, num_chunks=given.chunks)
                right += shown.right
                if len(strips) < 8:
                    strips.append(torch.cat(list(frames[::6]), dim=1))
                if not shown.right:
                    seen = shown.seen
                    console.print(
                        f"{caption}: {seen.colour}, {seen.motion}, {seen.speed}, distance of what was said "
                        f"{seen.distances[caption.motion, caption.speed]:.2f}, least area {seen.present:.2f}",
                        highlight=False,
                    )
    console.print(f"{right} of {min(given.count, len(held_back))} right")
    if given.sheet is not None:
        from PIL import Image

        Image.fromarray(torch.cat(strips).numpy()).save(given.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
