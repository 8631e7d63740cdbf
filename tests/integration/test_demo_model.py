"""What the shipped model shows, told from its pixels: captions, chunk borders, switches, a long window, all ranks alike."""

import itertools
import random

import pytest
import torch

from causalrt import build, load, override, recipe
from causalrt.demo_model import demo_files
from train_demo.evaluate import Shown, show
from train_demo.world import Caption, split_captions

_, HELD_BACK = split_captions()
DEFAULT = 20
"""Captions of the default run; the slow one has all hundred."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    files = demo_files()
    bundle = build(
        override(recipe("demo"), {"build.world_size": "1"}),
        checkpoint=files.checkpoint,
        vae=files.codec,
        out=tmp_path_factory.mktemp("demo") / "bundle",
    )
    with load(bundle, executor="onnxruntime", device="cpu", text_encoder=files.words) as found:
        yield found


def share_right(engine, captions: list[Caption]) -> tuple[float, list[Shown]]:
    shown = [show(engine, caption, seed=seed) for seed, caption in enumerate(captions)]
    right = sum(each.seen().agrees(caption) for each, caption in zip(shown, captions, strict=True))
    return right / len(captions), shown


def test_colour_and_motion_are_right_in_captions_that_were_held_back(engine):
    right, shown = share_right(engine, HELD_BACK[:DEFAULT])
    assert right >= 0.8
    assert sum(each.smooth for each in shown) >= 0.9 * len(shown)


@pytest.mark.slow
def test_all_hundred_captions_that_were_held_back(engine):
    right, shown = share_right(engine, HELD_BACK)
    assert right >= 0.8
    assert sum(each.smooth for each in shown) >= 0.9 * len(shown)


def told_apart(before: Caption, after: Caption) -> bool:
    """The same shape in motions that no stretch of a video is like both of: what moves may be on its way to a wall."""
    kinds = {caption.motion.split()[0] for caption in (before, after)}
    same = (before.colour, before.shape) == (after.colour, after.shape)
    return same and before.motion != after.motion and kinds != {"moves", "bounces"}


def test_a_switch_at_chunk_3_changes_the_motion_by_chunk_4(engine):
    rng, right, tried = random.Random(0), 0, 10
    pairs = [pair for pair in itertools.product(HELD_BACK, repeat=2) if told_apart(*pair)]
    for seed, (before, after) in enumerate(rng.sample(pairs, tried)):
        shown = show(engine, before, seed=seed, switches={3: after})
        later = shown.seen(4)
        right += shown.seen(0, 3).fits(before) and later.fits(after) and not later.fits(before)
    assert right >= 0.8 * tried


def test_a_rolling_window_with_a_sink_holds_over_40_chunks(engine):
    video = engine.config.video
    assert (video.window_frames, video.sink_frames) == (12, 3)  # of 120 frames
    for seed, caption in enumerate(HELD_BACK[:3]):
        shown = show(engine, caption, seed=seed, num_chunks=40)
        for first in range(0, 40, 8):
            assert shown.seen(first, first + 8).agrees(caption), (str(caption), first, shown.seen(first, first + 8))
        assert shown.smooth


def frames_of(executor: str, ranks: int, folder) -> torch.Tensor:
    files = demo_files()
    bundle = build(
        override(recipe("demo"), {"build.world_size": str(ranks)}),
        checkpoint=files.checkpoint,
        vae=files.codec,
        out=folder / f"{executor}-{ranks}",
        executors=[executor],
    )
    with load(bundle, executor=executor, device="cpu", text_encoder=files.words) as found:
        return show(found, HELD_BACK[0], seed=0).frames


def largest_difference(ways, folder) -> int:
    frames = [frames_of(executor, ranks, folder) for executor, ranks in ways]
    return max(int((each.short() - frames[0].short()).abs().max()) for each in frames[1:])


def test_executors_on_1_and_2_ranks_give_the_same_frames(tmp_path):
    ways = list(itertools.product(["eager", "onnxruntime"], [1, 2]))
    assert largest_difference(ways, tmp_path) <= 1


@pytest.mark.slow
def test_executors_on_8_ranks_give_the_same_frames(tmp_path):
    assert largest_difference([("eager", 1), ("eager", 8), ("onnxruntime", 8)], tmp_path) <= 1
