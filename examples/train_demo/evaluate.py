"""Measures how well the demo model follows captions: `python -m train_demo.evaluate [FOLDER]`.

Videos are generated as users generate them, from captions held back from training, and judged by their pixels alone
(`judge.py`). FOLDER holds what `demo_train` writes, and defaults to the shipped files. The report gives the number of captions
that were shown correctly, and what went wrong with the others.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from causalrt.config import override
from causalrt.demo_model import CHECKPOINT, CODEC, demo_files
from causalrt.errors import CausalRTError, ConfigError
from causalrt.export.build import build
from causalrt.owned_paths import TemporaryFolder
from causalrt.recipes import recipe
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.terminal import PrintableConsole
from train_demo.judge import JUMP, Seen, border_jump, look
from train_demo.world import Caption, split_captions


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A generated video, to be judged.

    Attributes:
        frames: frames of the video, uint8 `[T, 64, 64, 3]`.
        borders: frames at which a chunk begins, except the first.
    """

    frames: torch.Tensor
    borders: list[int]

    def seen(self, first_chunk: int = 0, end_chunk: int | None = None) -> Seen:
        """Judge some of the video's chunks."""
        starts = [0, *self.borders, len(self.frames)]
        return look(self.frames[starts[first_chunk] : starts[-1 if end_chunk is None else end_chunk]])

    def jumps(self) -> tuple[float, float]:
        """Return (longest step of the shape's centre between chunks, step that few others exceed), in pixels."""
        return border_jump(self.frames, self.borders)

    @property
    def smooth(self) -> bool:
        """Return whether no chunk begins with a jump."""
        at_borders, within = self.jumps()
        return at_borders <= within + JUMP


def show(
    engine: Engine, caption: Caption, *, seed: int, num_chunks: int = 7, switches: Mapping[int, Caption] | None = None
) -> Shown:
    """Generate a video for a caption, which changes at the chunks that `switches` names."""
    parts = []
    with engine.session(str(caption), seed=seed, num_chunks=num_chunks) as session:
        for chunk in range(num_chunks):
            if switches and chunk in switches:
                session.switch_prompt(str(switches[chunk]))
            frames = next(session).frames
            assert frames is not None
            parts.append(frames)
    return Shown(frames=torch.cat(parts), borders=list(itertools.accumulate(map(len, parts)))[:-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m train_demo.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=demo_files().words)
    parser.add_argument("--count", type=int, default=100, help="held-back captions to try")
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--sheet", type=Path, help="write a picture of the first eight videos")
    given = parser.parse_args(arguments)
    try:
        return _evaluate(given)
    except CausalRTError as error:
        PrintableConsole(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 1


def _evaluate(given: argparse.Namespace) -> int:
    config, console = override(recipe("demo"), {"build.world_size": "1"}), PrintableConsole()
    _, held_back = split_captions()
    for name, least, most in (("count", 1, len(held_back)), ("chunks", 2, config.video.horizon_chunks)):
        if not least <= getattr(given, name) <= most:
            raise ConfigError(f"--{name} must be from {least} to {most}, got {getattr(given, name)}")
    right, smooth, strips = 0, 0, list[torch.Tensor]()
    with TemporaryFolder("demo") as folder:
        source = given.folder
        bundle = build(config, checkpoint=source / CHECKPOINT, vae=source / CODEC, out=folder / "bundle")
        with load(bundle, device="cpu", text_encoder=source) as engine:
            for seed, caption in enumerate(held_back[: given.count]):
                shown = show(engine, caption, seed=seed, num_chunks=given.chunks)
                seen = shown.seen()
                agrees, is_smooth = seen.agrees(caption), shown.smooth
                right += agrees
                smooth += is_smooth
                if len(strips) < 8:
                    strips.append(torch.cat(list(shown.frames[::6]), dim=1))
                if not (agrees and is_smooth):
                    distance, (at_borders, within) = seen.distances[caption.motion, caption.speed], shown.jumps()
                    console.print(
                        f"{caption}: {seen.colour}, {seen.motion}, {seen.speed}; {distance:.2f} from what was said; area "
                        f"{seen.area[0]:.2f} to {seen.area[1]:.2f}; longest step {at_borders:.1f} pixels at borders, "
                        f"{within:.1f} elsewhere",
                        highlight=False,
                        soft_wrap=True,
                    )
    console.print(f"{right} of {given.count} right; {smooth} without a jump at a chunk's border", highlight=False)
    if given.sheet is not None:
        from PIL import Image

        Image.fromarray(torch.cat(strips).numpy()).save(given.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
