"""Which frames of a clip a video begins with."""

from pathlib import Path

import pytest
import torch

from causalrt import override, recipe, write_video
from causalrt.errors import RequestError
from causalrt.tools.arguments import GenerateRequest
from causalrt.tools.generate import _read_clip

pytest.importorskip("av", reason="needs PyAV: pip install 'av>=18.1,<19'")


@pytest.fixture(scope="module")
def config():
    return override(recipe("tiny"), {"video.horizon_frames": "12"})


@pytest.fixture
def clip(config, tmp_path):
    def written(count):
        size = (config.video.pixel_height, config.video.pixel_width, 3)
        levels = 4 * torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *size)
        write_video(tmp_path / "clip.mp4", levels)
        return tmp_path / "clip.mp4"

    return written


def numbers(path: Path, config, **options):
    frames = _read_clip(GenerateRequest(Path("bundle"), out=Path("out.mp4"), **options), path, config)
    return [round(level / 4) for level in frames.float().mean((1, 2, 3)).tolist()]


@pytest.mark.parametrize("part", [None, "last", "first"])
def test_whole_chunks_of_a_clip_are_given(part, clip, config, caplog):
    """25 frames are 7 latents: two chunks of three, which are 21 frames."""
    begin = 0 if part == "first" else 4
    assert numbers(clip(25), config, given_part=part) == list(range(begin, begin + 21))
    assert f"of its 25 frames the {part or 'last'} 21 are given" in caplog.text


@pytest.mark.parametrize(("chunks", "count"), [(None, 33), (1, 33), (2, 21)])
@pytest.mark.parametrize("part", ["first", "last"])
def test_of_a_longer_clip_as_much_is_given_as_leaves_room(part, chunks, count, clip, config):
    begin = 0 if part == "first" else 60 - count
    assert numbers(clip(60), config, given_part=part, chunks=chunks) == list(range(begin, begin + count))


@pytest.mark.parametrize("count", [45, 60])
def test_a_clip_as_long_as_the_horizon_is_refused(count, clip, config):
    with pytest.raises(RequestError, match=r"is a clip that fills the bundle's horizon of 45 frames, 2\.81 s"):
        numbers(clip(count), config)


def test_a_rollout_without_an_end_continues_any_clip(clip, config):
    endless = override(config, {"video.time_index": "relative"})
    assert numbers(clip(60), endless) == list(range(15, 60))
