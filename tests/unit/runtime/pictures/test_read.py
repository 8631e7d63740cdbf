"""Pictures and clips of every kind that users have: what is read is what a viewer shows, or one error says why not."""

import functools
import io
import logging
import os
import shutil
import struct
import subprocess
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import causalrt
from causalrt.errors import RequestError
from causalrt.media.clips import _orientation

av = pytest.importorskip("av", reason="needs PyAV: pip install 'av>=18.1,<19'")
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg (Debian package ffmpeg)")

HEIGHT, WIDTH = 64, 96
RED, GREEN, BLUE, GREY = (220, 40, 30), (30, 200, 60), (40, 50, 210), (150, 150, 150)
BACKGROUND = (16, 32, 48)


def corners(height=HEIGHT, width=WIDTH, colours=(RED, GREEN, BLUE, GREY)):
    """Quarters in four colours: top left, top right, bottom left, bottom right."""
    picture = np.empty((height, width, 3), np.uint8)
    for number, colour in enumerate(colours):
        down, right = divmod(number, 2)
        picture[down * height // 2 : (down + 1) * height // 2, right * width // 2 : (right + 1) * width // 2] = colour
    return picture


def colours_of(frame):
    """The colours in the middle of the four quarters."""
    height, width = frame.shape[:2]
    return [tuple(frame[y * height // 4, x * width // 4].tolist()) for y in (1, 3) for x in (1, 3)]


def read(path, *, height=HEIGHT, width=WIDTH, max_frames=1, **options):
    frames = causalrt.read_frames(path, height=height, width=width, max_frames=max_frames, **options)
    assert frames.dtype == torch.uint8
    assert list(frames.shape[1:]) == [height, width, 3]
    return frames


def assert_shows(frame, colours=(RED, GREEN, BLUE, GREY), within=6):
    found = np.array(colours_of(frame), int)
    assert np.abs(found - np.array(colours, int)).max() <= within, f"{found.tolist()} instead of {list(colours)}"


def ffmpeg(*arguments, **options):
    return subprocess.run(
        ["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True, **options
    )


def encode(path, frames, *options, fps=16, pix_fmt="rgb24"):
    """A clip by the ffmpeg command, of uint8 or uint16 `[T, h, w, channels]`."""
    frames = np.ascontiguousarray(frames)
    raw = ["-f", "rawvideo", "-pix_fmt", pix_fmt, "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", fps, "-i", "-"]
    ffmpeg(*raw, *options, path, input=frames.tobytes())
    return path


def numbered(count, height=HEIGHT, width=WIDTH):
    """Grey pictures whose level is 4 times their number."""
    return np.stack([np.full((height, width, 3), 4 * number, np.uint8) for number in range(count)])


def numbers(frames):
    return [round(level / 4) for level in frames.float().mean((1, 2, 3)).tolist()]


# Orientation

TRANSPOSED = {  # what has to be stored for EXIF's orientation to make `corners` of it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TRANSPOSED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_turns_a_picture_once(kind, orientation, tmp_path):
    stored = Image.fromarray(corners())
    if TRANSPOSED[orientation] is not None:
        stored = stored.transpose(TRANSPOSED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "picture", kind, exif=exif)
    assert_shows(read(tmp_path / "picture")[0])


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize(
    ("degrees", "hflip", "undo"),
    [
        (90, False, ["rot90"]),
        (180, False, ["rot90", "rot90"]),
        (270, False, ["rot90", "rot90", "rot90"]),
        (0, True, ["fliplr"]),
        (90, True, None),
        (180, True, ["flipud"]),
        (270, True, None),
    ],
)
def test_a_display_matrix_turns_and_mirrors_a_clip(suffix, degrees, hflip, undo, tmp_path):
    path = tmp_path / f"clip.{suffix}"
    picture = corners()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.set_display_rotation(degrees, hflip=hflip)
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        (matrix,) = {bytes(frame.side_data["DISPLAYMATRIX"]) for frame in container.decode(video=0)}
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    expected = as_displayed(picture, a, b, c, d)
    if undo is not None:
        assert colours_of(expected) == colours_of(
            functools.reduce(lambda array, name: getattr(np, name)(array), undo, picture)
        )
    found = read(path, height=expected.shape[0], width=expected.shape[1])
    assert_shows(found[0], colours_of(expected), within=8)


def as_displayed(picture, a, b, c, d):
    """ISO 14496-12, pixel by pixel: (x, y) goes to (a x + c y, b x + d y)."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    sign = np.sign([a, b, c, d])
    right, down = sign[0] * x + sign[2] * y, sign[1] * x + sign[3] * y
    shown = np.empty((int(np.ptp(down)) + 1, int(np.ptp(right)) + 1, 3), np.uint8)
    shown[down - down.min(), right - right.min()] = picture
    return shown


def test_turns_are_known_where_side_data_cannot_be_listed():
    """PyAV refuses to list side data if one is of a type that it does not know, EXIF's for example."""

    class Frame:
        rotation = -90

        @property
        def side_data(self):
            raise ValueError("26 is not a valid Type")

    a, b, c, d = _orientation(Frame())
    assert np.array_equal(as_displayed(corners(), a, b, c, d), np.rot90(corners(), -1))


@needs_ffmpeg
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_heic_picture_is_turned(quarters, tmp_path):
    (tmp_path / "picture.heic").write_bytes(heic(tmp_path, [np.rot90(corners(64, 64), -quarters)], quarters=quarters))
    assert_shows(read(tmp_path / "picture.heic", height=64, width=64)[0], within=10)


@needs_ffmpeg
def test_a_heic_picture_of_tiles_is_refused_by_name(tmp_path):
    (tmp_path / "picture.heic").write_bytes(heic(tmp_path, [corners(64, 64), corners(64, 64)]))
    with pytest.raises(RequestError, match="tiled HEIC or HEIF picture"):
        read(tmp_path / "picture.heic")


def heic(folder, tiles, *, quarters=0):
    """A HEIF file (ISO 23008-12) of one picture turned counter-clockwise, or of a grid of tiles side by side, all 64 x 64."""
    samples = []
    for tile in tiles:
        x265 = [
            "-pix_fmt",
            "yuv420p",
            "-c:v",
            "libx265",
            "-tag:v",
            "hvc1",
            "-x265-params",
            "log-level=error:lossless=1",
        ]
        encode(folder / "tile.mp4", tile[None], "-vf", "scale=out_color_matrix=bt601:out_range=tv", *x265)
        with av.open(str(folder / "tile.mp4")) as container:
            configuration = container.streams.video[0].codec_context.extradata
            samples.append(next(bytes(packet) for packet in container.demux(video=0)))

    def box(name, payload, *, full=None):
        version = b"" if full is None else struct.pack(">I", full)
        return struct.pack(">I", 8 + len(version) + len(payload)) + name + version + payload

    count, is_grid = len(tiles), len(tiles) > 1
    items = [(number + 1, b"hvc1") for number in range(count)] + [(count + 1, b"grid")] * is_grid
    infos = [box(b"infe", struct.pack(">HH", number, 0) + kind + b"\0", full=2 << 24) for number, kind in items]
    sizes = [box(b"ispe", struct.pack(">II", 64 * wide, 64), full=0) for wide in (1, count)]
    properties = [box(b"hvcC", configuration), *sizes, box(b"irot", bytes([quarters]))]
    used = [bytes([3, 0x81, 2, 0x84])] * count + [bytes([1, 3])] * is_grid
    associations = [struct.pack(">H", number) + use for (number, _), use in zip(items, used, strict=True)]
    uses = struct.pack(">I", len(items)) + b"".join(associations)
    grid = bytes([0, 0, 0, count - 1]) + struct.pack(">HH", 64 * count, 64)
    data = [*samples, *[grid] * is_grid]

    def meta(begin):
        places = b""
        for (number, _), part in zip(items, data, strict=True):
            places += struct.pack(">HHHII", number, 0, 1, begin, len(part))
            begin += len(part)
        parts = [
            box(b"hdlr", struct.pack(">I4s12xx", 0, b"pict"), full=0),
            box(b"pitm", struct.pack(">H", items[-1][0]), full=0),
            box(b"iloc", b"\x44\0" + struct.pack(">H", len(items)) + places, full=0),
            box(b"iinf", struct.pack(">H", len(items)) + b"".join(infos), full=0),
            box(b"iprp", box(b"ipco", b"".join(properties)) + box(b"ipma", uses, full=0)),
        ]
        if is_grid:
            refers = struct.pack(f">HH{count}H", count + 1, count, *range(1, count + 1))
            parts.append(box(b"iref", box(b"dimg", refers), full=0))
        return box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", b"".join(parts), full=0)

    return meta(len(meta(0)) + 8) + box(b"mdat", b"".join(data))


# Time


@needs_ffmpeg
@pytest.mark.parametrize("fps", [8, 16, 24, 25, 30, 60, 240, Fraction(30000, 1001)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_clip_of_another_rate_lasts_as_long(fps, suffix, tmp_path, caplog):
    count = min(62, round(2 * fps))
    path = encode(tmp_path / f"clip.{suffix}", numbered(count), "-c:v", "libx264", "-crf", 1, fps=fps)
    frames = read(path, max_frames=64)
    assert len(frames) == round(count * 16 / fps)
    shown = [min(count - 1, int((frame + 0.5) / 16 * fps)) for frame in range(len(frames))]
    assert np.abs(np.array(numbers(frames)) - shown).max() <= 1
    assert ("resampled to 16" in caplog.text) == (fps != 16)
    assert "fewer than the 64 wanted" in caplog.text


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_is_shown_by_its_durations(kind, tmp_path):
    first, *others = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), colour, np.uint8)) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    first.save(tmp_path / "moving", kind, save_all=True, append_images=others, duration=[250, 500, 250], **lossless)
    frames = read(tmp_path / "moving", max_frames=100)
    assert len(frames) == 16
    for number, frame in enumerate(frames):
        assert_shows(frame, [RED if number < 4 else GREEN if number < 12 else BLUE] * 4)


def test_the_still_picture_of_an_apng_is_no_part_of_its_animation(tmp_path):
    still, *others = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), colour, np.uint8)) for colour in (RED, GREEN, BLUE)]
    still.save(tmp_path / "moving.png", save_all=True, append_images=others, duration=250, default_image=True)
    frames = read(tmp_path / "moving.png", max_frames=100)
    assert len(frames) == 8
    assert_shows(frames[0], [GREEN] * 4)


@needs_ffmpeg
def test_a_variable_rate_is_followed(tmp_path):
    slow_then_fast = ["-vf", r"setpts='if(lt(N,4),N*0.25,1+(N-4)/32)/TB'", "-fps_mode", "vfr"]
    path = encode(tmp_path / "clip.mkv", numbered(36), *slow_then_fast, "-c:v", "ffv1", fps=32)
    frames = read(path, max_frames=100)
    assert len(frames) == 32
    assert numbers(frames[:16]) == [number // 4 for number in range(16)]
    assert np.abs(np.array(numbers(frames[16:])) - (4 + 2 * np.arange(16))).max() <= 1


@needs_ffmpeg
@pytest.mark.parametrize(("part", "expected"), [("first", range(8)), ("last", range(24, 32))])
def test_the_first_or_last_frames_of_a_longer_clip(part, expected, tmp_path, caplog):
    path = encode(tmp_path / "clip.mkv", numbered(32), "-c:v", "ffv1")
    assert numbers(read(path, max_frames=8, part=part)) == list(expected)
    assert f"is longer than the 8 frames that are taken, its {part} ones" in caplog.text


@needs_ffmpeg
def test_another_rate_can_be_asked_for(tmp_path, caplog):
    path = encode(tmp_path / "clip.mkv", numbered(24), "-c:v", "ffv1", fps=24)
    assert numbers(read(path, max_frames=24, fps=24)) == list(range(24))
    assert caplog.text == ""


# Transparency


def transparent(kind):
    """A file's bytes: the top left transparent over green that must not be seen, the bottom right half so."""
    rgba = np.dstack([corners(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[: HEIGHT // 2, : WIDTH // 2] = (*GREEN, 0)
    rgba[HEIGHT // 2 :, WIDTH // 2 :, 3] = 128
    half = tuple((128 * one + 127 * other) / 255 for one, other in zip(GREY, BACKGROUND, strict=True))
    shows = [BACKGROUND, GREEN, BLUE, half]
    image, options = Image.fromarray(rgba), {}
    if kind == "LA":
        image = image.convert("LA")
        shows[1:3] = [tuple(np.full(3, np.dot(c, (0.299, 0.587, 0.114)))) for c in (GREEN, BLUE)]
        kind = "PNG"
    elif kind in ("P", "RGB"):
        image = Image.fromarray(corners())
        shows = [BACKGROUND, GREEN, BLUE, GREY]
        options = {"transparency": RED}
        if kind == "P":
            image = image.quantize(4)
            options = {"transparency": image.getpixel((0, 0))}
        kind = "PNG"
    elif kind == "GIF":
        image = Image.fromarray(rgba[:, : WIDTH // 2]).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
        shows = [BACKGROUND, BACKGROUND, BLUE, BLUE]
    stored = io.BytesIO()
    if kind == "BMP":
        stored.write(bmp_with_alpha(rgba))
    else:
        image.save(stored, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
    return stored.getvalue(), shows


def bmp_with_alpha(rgba):
    """BITMAPV4HEADER with masks, which Pillow does not write."""
    height, width = rgba.shape[:2]
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = (
        struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, rgba.size, 0, 0, 0, 0) + masks + b"BGRs" + bytes(48)
    )
    return (
        b"BM" + struct.pack("<IHHI", 14 + 108 + rgba.size, 0, 0, 122) + header + rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    )


@pytest.mark.parametrize("kind", ["PNG", "LA", "P", "RGB", "GIF", "WEBP", "AVIF", "TIFF", "TGA", "BMP"])
def test_what_is_transparent_shows_the_background(kind, tmp_path):
    stored, shows = transparent(kind)
    path = tmp_path / ("picture.tga" if kind == "TGA" else "picture")
    path.write_bytes(stored)
    assert_shows(read(path, background="#102030")[0], shows)
    assert_shows(read(path)[0, : HEIGHT // 2, : WIDTH // 2], [(255, 255, 255)] * 4)  # white unless it is chosen


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.webm", ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", "5", "-b:v", "0"]),
        ("clip.mov", ["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le", "-profile:v", "4"]),
        ("clip.mov", ["-c:v", "png", "-pix_fmt", "rgba"]),
    ],
    ids=["vp9", "prores", "png"],
)
def test_a_transparent_clip_shows_the_background(name, options, tmp_path):
    rgba = np.dstack([corners(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[: HEIGHT // 2, : WIDTH // 2, 3] = 0
    path = encode(tmp_path / name, np.stack([rgba] * 4), *options, pix_fmt="rgba")
    assert_shows(read(path, background="#102030")[0], [BACKGROUND, GREEN, BLUE, GREY], within=8)


def test_a_transparent_webm_whose_tag_is_in_capitals_shows_the_background(tmp_path):
    """As PyAV writes it."""
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    with av.open(str(tmp_path / "clip.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=16)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuva420p"
        stream.metadata["alpha_mode"] = "1"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="yuva420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert_shows(read(tmp_path / "clip.webm", background="#102030")[0], [BACKGROUND] * 4, within=8)


# Colour


def test_ten_rounds_of_writing_and_reading_keep_colours(tmp_path):
    y, x, t = np.mgrid[0:96, 0:128, 0:6].transpose(0, 3, 1, 2)
    waves = np.stack([60 + 120 * x // 128, 70 + 100 * y // 96, 100 + 30 * np.sin((x + y + 4 * t) / 20)], axis=-1)
    for written in (waves.astype(np.uint8), np.stack([corners(96, 128)] * 6)):
        frames = torch.from_numpy(written)
        for _ in range(10):
            causalrt.write_video(tmp_path / "video.mp4", frames)
            frames = read(tmp_path / "video.mp4", height=96, width=128, max_frames=6)
        drift = (frames.float() - torch.from_numpy(written).float()).mean((0, 1, 2))
        assert drift.abs().max() < 1


@needs_ffmpeg
@pytest.mark.parametrize(
    ("size", "matrix"), [((480, 640), "bt601"), ((576, 720), "bt601"), ((720, 1280), "bt709"), ((1080, 1920), "bt709")]
)
def test_an_untagged_clip_has_the_matrix_of_its_size(size, matrix, tmp_path):
    convert = [
        "-vf",
        f"scale=out_color_matrix={matrix}:out_range=tv",
        "-pix_fmt",
        "yuv420p",
        "-c:v",
        "libx264",
        "-crf",
        "5",
    ]
    untag = ["-bsf:v", "h264_metadata=matrix_coefficients=2:colour_primaries=2:transfer_characteristics=2"]
    path = encode(tmp_path / "clip.mp4", corners(*size)[None], *convert, *untag)
    assert_shows(read(path)[0])


def linear(levels):
    levels = np.asarray(levels) / 255
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def gamma(light):
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


BT2020_FROM_709 = np.array(
    [[0.627404, 0.329283, 0.043313], [0.069097, 0.919540, 0.011362], [0.016391, 0.088013, 0.895595]]
)
P3_FROM_709 = np.array([[0.822462, 0.177538, 0], [0.033194, 0.966806, 0], [0.017083, 0.072397, 0.910520]])


def pq(light):
    power = (np.maximum(light, 0) * 203 / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light):
    shown = light * 203 / 1000
    scene = shown * np.maximum(shown @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None] ** (1 / 1.2 - 1)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )


DARK = ((120, 60, 40), (50, 110, 70), (60, 70, 130), (100, 100, 100))
WIDE = {  # transfer, matrix to its primaries, tags of ffmpeg
    "pq": (pq, BT2020_FROM_709, ("bt2020nc", "bt2020", "smpte2084")),
    "hlg": (hlg, BT2020_FROM_709, ("bt2020nc", "bt2020", "arib-std-b67")),
    "bt2020": (gamma, BT2020_FROM_709, ("bt2020nc", "bt2020", "iec61966-2-1")),
    "p3": (gamma, P3_FROM_709, ("bt709", "smpte432", "iec61966-2-1")),
}


def wide_clip(path, kind, light):
    """10-bit HEVC of linear light `[h, w, 3]` in BT.709 primaries, 1.0 being reference white."""
    transfer, to_primaries, (matrix, primaries, trc) = WIDE[kind]
    coded = np.rint(65535 * np.clip(transfer(light @ to_primaries.T), 0, 1)).astype("<u2")
    scale = f"scale=out_color_matrix={matrix.removesuffix('nc')}:out_range=tv"
    tags = f"log-level=error:lossless=1:colormatrix={matrix}:colorprim={primaries}:transfer={trc}"
    x265 = ["-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-x265-params", tags]
    return encode(path, coded[None], "-vf", scale, *x265, pix_fmt="rgb48le")


@needs_ffmpeg
@pytest.mark.parametrize("kind", WIDE)
def test_wide_and_high_dynamic_colours_are_converted(kind, tmp_path):
    path = wide_clip(tmp_path / "clip.mkv", kind, linear(corners(colours=DARK)))
    assert_shows(read(path)[0], DARK, within=8)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["pq", "hlg"])
def test_highlights_are_compressed_and_not_cut(kind, tmp_path):
    light = np.repeat(np.repeat(np.array([0.5, 1.0, 2.0, 4.0]), 24)[None, :, None], HEIGHT, 0).repeat(3, 2)
    path = wide_clip(tmp_path / "clip.mkv", kind, light)
    levels = read(path)[0, HEIGHT // 2, 12::24, 1].tolist()
    assert levels[0] == pytest.approx(188, abs=3)
    assert levels == sorted(set(levels))  # each is brighter than the one before
    assert levels[1] > 225


@needs_ffmpeg
def test_colours_that_are_not_known_are_refused_by_name(tmp_path):
    tag = ["-bsf:v", "h264_metadata=matrix_coefficients=8"]
    path = encode(tmp_path / "clip.mp4", corners()[None], "-pix_fmt", "yuv420p", "-c:v", "libx264", *tag)
    with pytest.raises(RequestError, match="YCgCo matrix"):
        read(path)


@pytest.mark.parametrize(("kind", "primaries", "transfer"), [("p3", 12, 13), ("pq", 9, 16), ("hlg", 9, 18)])
def test_colours_that_a_png_names_by_number_are_converted(kind, primaries, transfer, tmp_path):
    encoded, to_primaries, _ = WIDE[kind]
    coded = np.rint(255 * encoded(linear(corners(colours=DARK)) @ to_primaries.T)).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(coded).save(stored, "PNG")
    chunk = b"cICP" + bytes([primaries, transfer, 0, 1])
    head, rest = stored.getvalue()[:33], stored.getvalue()[33:]  # after signature and IHDR
    (tmp_path / "picture.png").write_bytes(
        head + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + rest
    )
    assert_shows(read(tmp_path / "picture.png")[0], DARK, within=8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_colour_profile_is_followed(kind, tmp_path):
    """A profile whose red and blue are exchanged, so that what ignores it is far off."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = {profile[entry : entry + 4].decode(): entry for entry in range(132, 132 + 12 * profile[131], 12)}
    profile[at["rXYZ"] : at["rXYZ"] + 4], profile[at["bXYZ"] : at["bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(corners()[..., ::-1].copy()).save(
        tmp_path / "picture", kind, icc_profile=bytes(profile), **lossless
    )
    assert_shows(read(tmp_path / "picture")[0], within=10)


@needs_ffmpeg
def test_pixels_that_are_not_square_are_stretched(tmp_path):
    """720 x 576 with pixels of 64:45 is 16:9; a circle's worth of middle is cut from what is shown, not from what is stored."""
    wide = corners(90, 80)
    path = encode(tmp_path / "clip.mp4", wide[None], "-vf", "setsar=2/1", "-pix_fmt", "yuv420p", "-c:v", "libx264")
    frames = read(path, height=90, width=160)
    assert_shows(frames[0])
    assert tuple(frames[0, 10, 4].tolist()) == pytest.approx(
        RED, abs=8
    )  # the left edge is there: 160 x 90 is all of it
    square = read(path, height=90, width=90)  # a middle of 45 stored pixels
    edge = np.abs(np.diff(square[0, 20, :, 0].int().numpy())).argmax()
    assert abs(int(edge) - 44) <= 2


@needs_ffmpeg
def test_interlaced_pictures_are_deinterlaced(tmp_path):
    """A bar that moves between the fields: as they are, its edges are combs."""
    fields = np.full((32, 96, 128, 3), 20, np.uint8)
    for number, field in enumerate(fields):
        field[:, 3 * number : 3 * number + 16] = 220
    weave = [
        "-vf",
        "interlace=scan=tff:lowpass=off",
        "-c:v",
        "libx264",
        "-crf",
        5,
        "-flags",
        "+ildct+ilme",
        "-pix_fmt",
        "yuv420p",
    ]
    path = encode(tmp_path / "clip.mp4", fields, *weave, fps=32)
    with av.open(str(path)) as container:
        assert any(frame.interlaced_frame for frame in container.decode(video=0))
        container.seek(0)
        combs = max(comb(frame.to_ndarray(format="gray")) for frame in container.decode(video=0))
    frames = read(path, height=96, width=128, max_frames=16)
    assert len(frames) == 16
    assert combs > 5
    assert max(comb(frame[..., 1].numpy()) for frame in frames) < combs / 4


def comb(plane):
    """How much rows differ from both of their neighbours."""
    rows = plane.astype(int)
    return np.abs(2 * rows[1:-1] - rows[:-2] - rows[2:]).mean()


def test_a_transparent_level_of_16_bits_shows_the_background(tmp_path):
    levels = np.full((HEIGHT, WIDTH), 150 * 257, np.uint16)
    levels[: HEIGHT // 2] = 9
    Image.fromarray(levels).save(tmp_path / "picture", "PNG", transparency=9)
    assert_shows(read(tmp_path / "picture", background="#102030")[0], [(0x10, 0x20, 0x30)] * 2 + [(150, 150, 150)] * 2)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16"])
def test_grey_cmyk_and_16_bits(mode, tmp_path):
    if mode == "I;16":
        Image.fromarray(np.full((HEIGHT, WIDTH), 150 * 257, np.uint16)).save(tmp_path / "picture", "PNG")
        shows = [(150, 150, 150)] * 4
    else:
        Image.fromarray(corners(colours=((0, 0, 0), (255, 255, 255)) * 2)).convert(mode).save(
            tmp_path / "picture", "TIFF"
        )
        shows = [(0, 0, 0), (255, 255, 255)] * 2
    assert_shows(read(tmp_path / "picture")[0], shows)


# Which stream


@needs_ffmpeg
@pytest.mark.parametrize(("suffix", "is_marked"), [("mkv", True), ("mov", False), ("mp4", True)])
def test_a_cover_is_not_taken_for_the_video(suffix, is_marked, tmp_path):
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 255, np.uint8)).save(tmp_path / "cover.jpg")
    clip = encode(tmp_path / "clip.mkv", numbered(16), "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 1)
    mark = ["-disposition:v:0", "attached_pic", "-disposition:v:1", "default"] if is_marked else []
    inputs = ["-i", tmp_path / "cover.jpg", "-i", clip, "-map", 0, "-map", 1, "-c", "copy"]
    ffmpeg(*inputs, *mark, tmp_path / f"both.{suffix}")
    assert numbers(read(tmp_path / f"both.{suffix}", max_frames=16))[8:] == list(range(8, 16))


@needs_ffmpeg
def test_a_sound_with_a_cover_is_no_video(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "cover.jpg")
    sound = ["-f", "lavfi", "-i", "sine=d=1", "-i", tmp_path / "cover.jpg", "-map", 0, "-map", 1]
    ffmpeg(*sound, "-c:v", "copy", "-disposition:v:0", "attached_pic", tmp_path / "sound.m4a")
    with pytest.raises(RequestError, match="has no video stream, only cover art"):
        read(tmp_path / "sound.m4a")


@needs_ffmpeg
def test_of_two_videos_the_default_one_is_taken(tmp_path):
    for name, colour in (("one", RED), ("two", GREEN)):
        encode(tmp_path / f"{name}.mkv", np.full((16, HEIGHT, WIDTH, 3), colour, np.uint8), "-c:v", "ffv1")
    maps = ["-i", tmp_path / "one.mkv", "-i", tmp_path / "two.mkv", "-map", 0, "-map", 1, "-c", "copy"]
    ffmpeg(*maps, "-disposition:v:0", 0, "-disposition:v:1", "default", tmp_path / "both.mkv")
    assert_shows(read(tmp_path / "both.mkv")[0], [GREEN] * 4)


# What cannot be read, and what can for all its name


@pytest.mark.parametrize(
    "name", ["a:b.png", "http:x.png", "%d.png", "file:c.png", "-", "pipe:0", "x?*[1].png", "ü #%41.png"]
)
def test_a_name_is_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(corners()).save(tmp_path / name, "PNG")
    Image.fromarray(corners()[::-1].copy()).save(tmp_path / "1.png")
    assert_shows(read(name)[0])
    causalrt.write_video(tmp_path / name, np.stack([corners()] * 2))
    assert_shows(read(name)[0], within=10)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (1, 3000)])
def test_a_picture_of_one_pixel_or_row(size, tmp_path):
    Image.new("RGB", size, RED).save(tmp_path / "picture.png")
    assert_shows(read(tmp_path / "picture.png")[0], [RED] * 4)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nsecret.ts\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile secret.ts\n"),
        ("list.mp4", "ffconcat version 1.0\nfile secret.ts\n"),
        ("list.mpd", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>'),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"),
    ],
)
def test_a_list_of_other_files_is_refused(name, text, tmp_path):
    encode(tmp_path / "secret.ts", numbered(16), "-c:v", "libx264", "-pix_fmt", "yuv420p")
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match="no playlists"):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "missing"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "picture.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    wanted = {"fifo": "a named pipe", "folder": "a folder", "device": "a device", "missing": "No such file"}[kind]
    with pytest.raises(RequestError, match=wanted):
        read(path)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "JPEG"])
def test_too_many_pixels_are_refused_before_they_are_decoded(kind, tmp_path):
    stored = io.BytesIO()
    Image.new("1", (16_000, 16_000)).save(stored, kind, **({"compression": "group4"} if kind == "TIFF" else {}))
    (tmp_path / "picture").write_bytes(stored.getvalue())
    with pytest.raises(RequestError, match="pixels"):
        read(tmp_path / "picture")


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP"])
def test_a_picture_that_is_cut_off_is_refused(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    options = {"progressive": True} if kind == "progressive" else {}
    stored = io.BytesIO()
    Image.fromarray(noise).save(stored, "JPEG" if kind == "progressive" else kind, **options)
    (tmp_path / "picture").write_bytes(stored.getvalue()[: len(stored.getvalue()) // 2])
    with pytest.raises(RequestError, match="damaged"):
        read(tmp_path / "picture")


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_good_part_of_a_clip_that_is_cut_off_is_used_and_told(suffix, tmp_path, caplog):
    noisy = np.random.default_rng(0).integers(0, 60, (64, HEIGHT, WIDTH, 3), dtype=np.uint8) + numbered(64) // 2
    front = ["-movflags", "+faststart"] if suffix == "mp4" else []
    path = encode(tmp_path / f"clip.{suffix}", noisy, "-c:v", "libx264", "-pix_fmt", "yuv420p", *front)
    whole = read(path, max_frames=64)
    caplog.clear()
    stored = path.read_bytes()
    path.write_bytes(stored[: len(stored) // 2])
    frames = read(path, max_frames=64)
    assert 16 <= len(frames) <= 40
    assert torch.equal(frames, whole[: len(frames)])
    assert "is damaged or truncated after" in caplog.text


@needs_ffmpeg
def test_a_recording_that_begins_between_key_pictures_is_read_from_the_next_one_on(tmp_path, caplog):
    path = encode(tmp_path / "clip.ts", moving(64), "-c:v", "libx264", "-g", 16, "-bf", 0, "-pix_fmt", "yuv420p")
    whole = read(path, max_frames=64)
    path.write_bytes(path.read_bytes()[188 * (path.stat().st_size // 188 // 3) :])
    frames = read(path, max_frames=64)
    assert torch.equal(frames, whole[-len(frames) :])
    assert len(frames) == 32
    assert "s of the clip cannot be decoded and are skipped" in caplog.text
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_the_good_pictures_of_an_animation_that_is_cut_off_are_used_and_told(kind, tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    first, *others = map(Image.fromarray, noise)
    stored = io.BytesIO()
    first.save(stored, kind, save_all=True, append_images=others, duration=250)
    (tmp_path / "whole").write_bytes(stored.getvalue())
    (tmp_path / "cut").write_bytes(stored.getvalue()[: len(stored.getvalue()) * 5 // 8])
    whole, cut = read(tmp_path / "whole", max_frames=32), read(tmp_path / "cut", max_frames=32)
    assert 12 <= len(cut) <= 20
    assert torch.equal(cut, whole[: len(cut)])
    assert "cut is damaged or truncated after" in caplog.text


@needs_ffmpeg
def test_a_damaged_clip_gives_no_other_pictures_without_a_word(tmp_path, caplog):
    """Bits that are flipped where the decoder notices: what it gives up to there is as it was, and the rest is told of."""
    path = encode(tmp_path / "clip.mp4", moving(64), "-c:v", "libx264", "-g", 16, "-pix_fmt", "yuv420p")
    stored, whole = path.read_bytes(), read(path, max_frames=64)
    begin = stored.index(b"mdat") + 4
    rng, told = np.random.default_rng(0), 0
    for _ in range(12):
        damaged = bytearray(stored)
        for at in rng.integers(begin + len(stored) // 2, len(stored) - 2000, 20):
            damaged[at] ^= 255
        path.write_bytes(damaged)
        caplog.clear()
        frames = read(path, max_frames=64)
        told += "is damaged or truncated after" in caplog.text
        assert 1 <= len(frames) < 64
    assert told == 12
    assert len(whole) == 64


def moving(count):
    y, x, t = np.mgrid[0:HEIGHT, 0:WIDTH, 0:count].transpose(0, 3, 1, 2)
    noise = np.random.default_rng(1).integers(0, 40, (1, HEIGHT, WIDTH, 3))
    waves = np.stack([x + 2 * t, y + t, 100 + 60 * np.sin((x + y + 9 * t) / 9)], axis=-1) % 200
    return (waves + noise).astype(np.uint8)


def test_what_is_no_picture_is_refused(tmp_path):
    for name, contents in {
        "empty.png": b"",
        "text.mp4": b"nothing " * 100,
        "noise.jpg": bytes(range(256)) * 20,
    }.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(
            RequestError, match="cannot be read as an image or a video: it is not a supported picture or clip"
        ):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "no colour"}, "background must be a colour"),
        ({"max_frames": 0}, "max_frames must be positive"),
        ({"fps": 0}, "fps must be positive"),
        ({"part": "middle"}, "part must be 'first' or 'last'"),
    ],
)
def test_impossible_arguments_are_refused(options, message, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    with pytest.raises(RequestError, match=message):
        read(tmp_path / "picture.png", **options)


def test_a_still_picture_is_one_frame_without_a_word(tmp_path, caplog):
    Image.fromarray(corners()).save(tmp_path / "picture.png")
    with caplog.at_level(logging.INFO):
        assert len(read(tmp_path / "picture.png", max_frames=81)) == 1
    assert caplog.text == ""
