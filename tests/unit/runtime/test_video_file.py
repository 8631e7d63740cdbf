"""Video files: what is written is what a decoder reads, at the right times; nothing is half-written; errors are typed."""

import contextlib
import json
import math
import re
import resource
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from causalrt.errors import ExecutorError, RequestError, VideoError
from causalrt.media.mp4_boxes import boxes
from causalrt.media.video_file import FragmentWriter, Mp4Writer, write_video

av = pytest.importorskip("av", reason="needs PyAV: pip install 'av>=18.1,<19'")

HEIGHT, WIDTH, FPS = 96, 128, 16
CHUNKS = (9, 12, 12)


def moving_pictures(count, height=HEIGHT, width=WIDTH):
    """A gradient in each colour that moves, uint8 [count, height, width, 3]."""
    y, x, t = np.mgrid[0:height, 0:width, 0:count].transpose(0, 3, 1, 2)
    red = 255 * x // width
    green = (255 * y // height + 3 * t) % 256
    blue = 128 + 127 * np.sin((x + y + 4 * t) / 20)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def chunked(frames):
    return np.split(frames, np.cumsum(CHUNKS)[:-1])


def decoded(source, *, broken_off=False):
    """(frames uint8 [T, h, w, 3], their times in seconds) of a file; of one that is broken off, as far as it can be read."""
    pictures, times = [], []
    with av.open(source) as container, contextlib.suppress(av.error.InvalidDataError if broken_off else ()):
        for frame in container.decode(video=0):
            assert frame.colorspace == 1  # BT.709, as the stream says
            pictures.append(frame.to_ndarray(format="rgb24"))
            times.append(frame.pts * frame.time_base)
    return np.stack(pictures), times


def psnr(one, other):
    return 10 * math.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2))


def write_whole(path, frames):
    with Mp4Writer(path, height=HEIGHT, width=WIDTH, fps=FPS) as writer:
        for chunk in chunked(frames):
            writer.write(torch.from_numpy(chunk))


@pytest.fixture(scope="module")
def frames():
    return moving_pictures(sum(CHUNKS))


def test_a_file_holds_the_frames_at_their_times(frames, tmp_path):
    write_whole(tmp_path / "video.mp4", frames)
    found, times = decoded(str(tmp_path / "video.mp4"))
    assert len(found) == len(frames)
    assert times == [Fraction(number, FPS) for number in range(len(frames))]
    assert psnr(found, frames) > 30
    assert psnr(found[1:], frames[:-1]) < psnr(found, frames) - 3  # each is itself and not its neighbour


def test_the_index_comes_first_and_nothing_else_is_left(frames, tmp_path):
    write_whole(tmp_path / "video.mp4", frames)
    names = [name for name, _ in boxes((tmp_path / "video.mp4").read_bytes())]
    assert names.index("moov") < names.index("mdat")
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe (Debian package ffmpeg)")
def test_ffprobe_agrees(frames, tmp_path):
    path = tmp_path / "video.mp4"
    write_whole(path, frames)
    flags = ["-v", "error", "-count_frames", "-show_streams", "-of", "json"]
    probed = subprocess.run(["ffprobe", *flags, path], capture_output=True, text=True, check=True)
    assert probed.stderr == ""
    (stream,) = json.loads(probed.stdout)["streams"]
    assert (stream["codec_name"], stream["pix_fmt"], stream["color_space"]) == ("h264", "yuv420p", "bt709")
    assert (stream["width"], stream["height"], stream["avg_frame_rate"]) == (WIDTH, HEIGHT, f"{FPS}/1")
    assert int(stream["nb_read_frames"]) == len(frames)
    assert float(stream["duration"]) == pytest.approx(len(frames) / FPS, abs=1e-3)  # MP4 counts it in ms


def test_a_file_appears_when_it_is_complete(frames, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_text("earlier")
    with Mp4Writer(path, height=HEIGHT, width=WIDTH, fps=FPS) as writer:
        writer.write(frames)
        assert path.read_text() == "earlier"
    assert len(decoded(str(path))[0]) == len(frames)


def test_an_exception_leaves_nothing(frames, tmp_path):
    def interrupted():
        with Mp4Writer(tmp_path / "video.mp4", height=HEIGHT, width=WIDTH, fps=FPS) as writer:
            writer.write(frames)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.parametrize("kind", ["file", "fragments"])
def test_a_video_lasts_as_long_as_its_frames(kind, count, tmp_path):
    path = tmp_path / "video.mp4"
    if kind == "file":
        write_video(path, moving_pictures(count))
    else:
        writer = FragmentWriter(height=HEIGHT, width=WIDTH, fps=FPS)
        path.write_bytes(b"".join([writer.header, *writer.write(moving_pictures(count)), *writer.close()]))
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        durations = [packet.duration * packet.time_base for packet in packets]
    assert durations == [Fraction(1, FPS)] * count


@pytest.mark.parametrize("frames", [np.zeros((HEIGHT, WIDTH, 3), np.uint8), [[0]], torch.zeros(2, HEIGHT, WIDTH, 3)])
def test_what_are_no_frames_is_refused_and_not_written(frames, tmp_path):
    with pytest.raises(RequestError, match="frames must be"):
        write_video(tmp_path / "video.mp4", frames)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["write", "close"])
def test_a_full_disk_leaves_nothing(when, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, HEIGHT, WIDTH, 3), dtype=np.uint8)
    writer = Mp4Writer(tmp_path / "video.mp4", height=HEIGHT, width=WIDTH, fps=FPS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if when == "close":
        writer.write(noise)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))  # the kernel refuses bytes past it, as a full disk does
    try:
        with pytest.raises(VideoError, match="no file was left"):
            getattr(writer, when)(*[noise] if when == "write" else [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    writer.close()  # harmless
    with pytest.raises(RequestError, match="closed"):
        writer.write(noise)


def test_halves_of_killed_writers_are_removed_and_those_of_others_are_not(frames, tmp_path):
    path = tmp_path / "video.mp4"
    killed = tmp_path / ".video.mp4.0123456789ab.partial"
    killed.write_bytes(b"half")
    with Mp4Writer(path, height=HEIGHT, width=WIDTH, fps=FPS) as first:
        first.write(frames[:2])
        assert not killed.exists()
        with Mp4Writer(path, height=HEIGHT, width=WIDTH, fps=FPS) as second:
            second.write(frames[:4])
        first.write(frames[2:3])
    assert len(decoded(str(path))[0]) == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_needs_a_frame_and_a_folder(tmp_path):
    writer = Mp4Writer(tmp_path / "video.mp4", height=HEIGHT, width=WIDTH, fps=FPS)
    with pytest.raises(RequestError, match="at least one"):
        writer.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RequestError, match="existing, writable folder"):
        Mp4Writer(tmp_path / "missing" / "video.mp4", height=HEIGHT, width=WIDTH, fps=FPS)


def test_fragments_come_without_lag(frames):
    writer = FragmentWriter(height=HEIGHT, width=WIDTH, fps=FPS)
    assert [name for name, _ in boxes(writer.header)] == ["ftyp", "moov"]
    given = come = 0
    for chunk in chunked(frames):
        names = [name for fragment in writer.write(chunk) for name, _ in boxes(fragment)]
        assert names == ["moof", "mdat"] * (len(names) // 2)
        given += len(chunk)
        come += len(names) // 2
        assert come == given
    assert writer.close() == []


def test_fragments_hold_the_frames_at_their_times(frames, tmp_path):
    writer = FragmentWriter(height=HEIGHT, width=WIDTH, fps=FPS)
    path = tmp_path / "video.mp4"
    fragments = [fragment for chunk in chunked(frames) for fragment in writer.write(chunk)]
    path.write_bytes(b"".join([writer.header, *fragments, *writer.close()]))
    found, times = decoded(str(path))
    assert times == [Fraction(number, FPS) for number in range(len(frames))]
    assert psnr(found, frames) > 28


def test_a_stream_that_breaks_off_is_a_video_so_far(frames, tmp_path):
    writer = FragmentWriter(height=HEIGHT, width=WIDTH, fps=FPS)
    first, second, _ = (b"".join(writer.write(chunk)) for chunk in chunked(frames))
    path = tmp_path / "video.mp4"
    path.write_bytes(writer.header + first + second[: len(second) // 2])
    found, _ = decoded(str(path), broken_off=True)
    assert CHUNKS[0] < len(found) < CHUNKS[0] + CHUNKS[1]
    assert psnr(found[: CHUNKS[0]], frames[: CHUNKS[0]]) > 28


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe (Debian package ffmpeg)")
@pytest.mark.parametrize("fps", [16, 24, Fraction(30000, 1001)])
def test_ffprobe_finds_nothing_wrong_with_fragments(frames, fps, tmp_path):
    writer = FragmentWriter(height=HEIGHT, width=WIDTH, fps=fps)
    path = tmp_path / "video.mp4"
    fragments = [fragment for chunk in chunked(frames) for fragment in writer.write(chunk)]
    path.write_bytes(b"".join([writer.header, *fragments, *writer.close()]))
    flags = ["-v", "warning", "-count_frames", "-show_streams", "-show_packets", "-of", "json"]
    probed = subprocess.run(["ffprobe", *flags, path], capture_output=True, text=True, check=True)
    assert probed.stderr == ""
    found = json.loads(probed.stdout)
    (stream,) = found["streams"]
    assert int(stream["nb_read_frames"]) == len(frames)
    assert Fraction(stream["avg_frame_rate"]) == fps
    times = [Fraction(packet["pts"]) * Fraction(stream["time_base"]) for packet in found["packets"]]
    assert times == [number / Fraction(fps) for number in range(len(frames))]
    keys = [number for number, packet in enumerate(found["packets"]) if packet["flags"].startswith("K")]
    assert keys == [number for number in (0, round(2 * fps)) if number < len(frames)]


@pytest.mark.parametrize(("height", "width", "level"), [(96, 128, "0a"), (480, 832, "1e"), (720, 1280, "1f")])
def test_the_codec_string_is_the_decoders(height, width, level, tmp_path):
    writer = FragmentWriter(height=height, width=width, fps=FPS)
    assert re.fullmatch("avc1[.][0-9a-f]{6}", writer.codec)
    assert writer.mime == f'video/mp4; codecs="{writer.codec}"'
    path = tmp_path / "video.mp4"
    path.write_bytes(b"".join([writer.header, *writer.write(moving_pictures(3, height, width)), *writer.close()]))
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        assert stream.codec_context.profile == "High"
        assert writer.codec == f"avc1.6400{level}"
        assert stream.codec_context.extradata[1:4].hex() == writer.codec[5:]


@pytest.mark.parametrize("kind", ["file", "fragments"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 95}, "height of a video must be even"),
        ({"width": 127}, "width of a video must be even"),
        ({"width": 0}, "width of a video must be even"),
        ({"height": 16386}, "height of a video must be even"),
        ({"fps": 0}, "fps must be"),
    ],
)
def test_impossible_pictures_are_refused(kind, changes, message, tmp_path):
    picture = {"height": HEIGHT, "width": WIDTH, "fps": FPS, **changes}
    with pytest.raises(RequestError, match=message):
        FragmentWriter(**picture) if kind == "fragments" else Mp4Writer(tmp_path / "video.mp4", **picture)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, HEIGHT, WIDTH, 3), "must be uint8, got float32"),
        (np.zeros((2, WIDTH, HEIGHT, 3), np.uint8), r"must be \[T, 96, 128, 3\], got \[2, 128, 96, 3\]"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), r"must be \[T, 96, 128, 3\]"),
        ([[0]], "must be uint8, got list"),
    ],
)
def test_wrong_frames_are_refused_and_the_rest_goes_on(frames, message, tmp_path):
    fragments = FragmentWriter(height=HEIGHT, width=WIDTH, fps=FPS)
    with Mp4Writer(tmp_path / "video.mp4", height=HEIGHT, width=WIDTH, fps=FPS) as whole:
        for writer in (whole, fragments):
            with pytest.raises(RequestError, match=message):
                writer.write(frames)
            writer.write(moving_pictures(2))
    fragments.close()
    with pytest.raises(RequestError, match="closed"):
        fragments.write(moving_pictures(2))
    assert len(decoded(str(tmp_path / "video.mp4"))[0]) == 2


def test_frames_need_not_be_contiguous(frames, tmp_path):
    planes = torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()
    with Mp4Writer(tmp_path / "video.mp4", height=HEIGHT, width=WIDTH, fps=FPS) as writer:
        writer.write(planes.permute(1, 2, 3, 0))
    assert psnr(decoded(str(tmp_path / "video.mp4"))[0], frames) > 30


def test_without_pyav_an_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ExecutorError, match="pip install 'av"):
        Mp4Writer(tmp_path / "video.mp4", height=HEIGHT, width=WIDTH, fps=FPS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"\0\0\0\x07ftyp", b"\0\0\0\x20moov1234", b"\0\0"])
def test_what_is_no_row_of_boxes_is_refused(data):
    with pytest.raises(VideoError, match="is incomplete"):
        list(boxes(data))
