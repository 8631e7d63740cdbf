"""Decodes clips with PyAV into pictures that are upright, deinterlaced, opaque and in sRGB."""

import contextlib
import functools
import logging
import struct
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import Image

from causalrt.errors import RequestError
from causalrt.media.colour import image_from_frame
from causalrt.media.picture import MAX_PIXELS, Colour, Damage, Picture, check_size, over
from causalrt.media.pyav import pyav

FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,mxf,nut,dv,rm,wtv,h264,hevc,obu,m4v,mjpeg,yuv4mpegpipe"
)
"""FFmpeg's names of the formats that are read; no playlists or patterns, whose demuxers open other files and URLs."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
MAX_LOOKAHEAD = 10_000  # packets that are searched for a second picture of each video stream
ROTATIONS = {
    0: (1, 0, 0, 1),
    90: (0, -1, 1, 0),
    180: (-1, 0, 0, -1),
    270: (0, 1, -1, 0),
}  # by degrees counter-clockwise
OBLIQUE = (1, 1, 1, 1)
TOLERATED_S = Fraction(1, 2)  # between the declared and the actual start and end of a video
_log = logging.getLogger(__name__)


def clip_pictures(file: BinaryIO, background: Colour, *, max_hdr_side: int) -> Iterator[Picture]:
    """Decode the pictures of a clip in order.

    Raises:
        RequestError: the file is not a clip, or of an unsupported kind.
        Damage: the clip is damaged or truncated.
    """
    av = pyav()
    file.seek(0)
    is_heif = file.read(12)[4:] in [b"ftyp" + brand for brand in HEIF_BRANDS]
    number = _moving_stream(file, is_heif=is_heif)
    with _opened(file) as container:
        stream = container.streams[number]
        frames = _deinterlaced(_decoded(container, stream))
        aspect = stream.sample_aspect_ratio or Fraction(1)
        start = gap = Fraction(0)
        shown: Any = None
        time = None
        declared = _declared_seconds(container, stream)
        reformatter = av.video.reformatter.VideoReformatter()

        def picture(duration: Fraction) -> Picture:
            a, b, c, d = matrix = _orientation(shown)
            if (a or d) and (b or c):
                raise RequestError(
                    "its display rotation is not a multiple of 90 degrees; rotate its pictures upright first"
                )
            image = functools.partial(_image, shown, matrix, reformatter, background, max_hdr_side)
            return Picture(start=start, duration=duration, image=image, pixel_aspect=1 / aspect if b else aspect)

        try:
            for frame in frames:
                before, time = time, _time(frame, time, gap)
                if before is None and stream.start_time is not None:
                    lead = time - stream.start_time * stream.time_base
                    if lead > TOLERATED_S:
                        _log.warning("the first %.2f s of the clip cannot be decoded and are skipped", lead)
                    declared -= lead
                if before is not None:
                    gap = time - before
                    yield picture(gap)
                    start += gap
                shown = frame
        except (Damage, av.FFmpegError) as damage:
            if shown is not None:
                yield picture(_duration(shown, gap, stream))
            raise Damage(getattr(damage, "strerror", None) or str(damage)) from damage
        if shown is None:
            raise Damage("none of its pictures can be decoded")
        last = _duration(shown, gap, stream)
        yield picture(last)
        if declared - (start + last) > max(TOLERATED_S, 3 * last):
            raise Damage(f"it ends after {float(start + last):.2f} of {float(declared):.2f} s")


def _image(
    frame: Any, matrix: tuple[int, int, int, int], reformatter: Any, background: Colour, max_hdr_side: int
) -> Image.Image:
    a, b, c, d = matrix
    try:
        image = over(background, image_from_frame(frame, reformatter, max_hdr_side=max_hdr_side))
    except pyav().FFmpegError as error:
        raise RequestError(
            f"its pixel format ({frame.format.name}) is not supported; convert it to 8-bit H.264"
        ) from error
    if b:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if a < 0 or c < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if b < 0 or d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def _orientation(frame: Any) -> tuple[int, int, int, int]:
    """Return the display matrix (ISO 14496-12, 8.3.2) without its translation: (x, y) maps to (a x + c y, b x + d y)."""
    try:
        matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    except ValueError:  # one unknown type of side data keeps PyAV from listing any; `rotation` still works
        return ROTATIONS.get(frame.rotation % 360, OBLIQUE)
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix) if matrix else (1, 0, 0, 0, 1)
    return (a, b, c, d) if a or b or c or d else ROTATIONS[0]


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Any]:
    """Open the container of `file`, so that FFmpeg opens nothing else."""
    av = pyav()
    file.seek(0)
    # `file` was opened by a descriptor's number, so it has no name that FFmpeg could take for a URL or a pattern.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "", "max_pixels": str(MAX_PIXELS)}
    try:
        container = av.open(file, options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise RequestError(
            "it is not a supported picture or clip (JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, TGA, JPEG 2000; MP4, "
            f"MOV, MKV, WebM, AVI, MPEG and others, but no playlists), or it is damaged: {getattr(error, 'strerror', error)}"
        ) from error
    with container:
        yield container


def _moving_stream(file: BinaryIO, *, is_heif: bool) -> int:
    """Return the index of the stream that a player shows: one with several pictures, else the default, else the first."""
    with _opened(file) as container:
        streams = container.streams.video
        if is_heif and (len(streams) > 1 or any("dependent" in str(stream.disposition) for stream in streams)):
            raise RequestError("it is a tiled HEIC or HEIF picture, which is not supported; convert it to JPEG or PNG")
        shown = [
            stream
            for stream in streams
            if not stream.disposition
            & (type(stream.disposition).attached_pic | type(stream.disposition).timed_thumbnails)
        ]
        if not shown:
            raise RequestError("it has no video stream" + (", only cover art" if streams else ""))
        counted: Counter[int] = Counter()
        if len(shown) > 1:
            with contextlib.suppress(pyav().FFmpegError):
                for number, packet in enumerate(container.demux(shown)):
                    counted[packet.stream.index] += packet.size > 0
                    if number == MAX_LOOKAHEAD or all(counted[stream.index] > 1 for stream in shown):
                        break
        stream = max(
            shown,
            key=lambda stream: (counted[stream.index] > 1, bool(stream.disposition & type(stream.disposition).default)),
        )
        if stream.codec_context is None:
            raise RequestError("the installed PyAV cannot decode its video codec; convert it to H.264")
        check_size(stream.width, stream.height)
        return int(stream.index)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Decode frames, from the first one that does not depend on others up to the first damaged one.

    Raises:
        Damage: a frame is damaged.
    """
    av = pyav()
    decoder = stream.codec_context
    tags = {name.lower(): value for name, value in stream.metadata.items()}  # some writers use upper case
    if tags.get("alpha_mode") == "1" and decoder.name in ("vp8", "vp9"):
        # FFmpeg's own decoders ignore the alpha channel of WebM.
        decoder = av.CodecContext.create("libvpx" if decoder.name == "vp8" else "libvpx-vp9", "r")
    decoder.options = {"max_pixels": str(MAX_PIXELS)}
    decoder.thread_type = "AUTO"
    damage: Any = None
    has_begun = is_late = False

    def found() -> Iterator[Any]:
        nonlocal damage, is_late
        try:
            for packet in container.demux(stream):
                try:
                    frames = decoder.decode(packet if packet.size else None)
                except EOFError:  # the decoder has already been flushed
                    return
                except av.FFmpegError:
                    if has_begun:
                        raise
                    is_late = True
                    continue
                yield from frames
        except av.FFmpegError as error:
            damage = error
            with contextlib.suppress(av.FFmpegError):
                yield from decoder.decode(None)  # good pictures that it holds back for reordering

    for frame in found():
        if not has_begun and (frame.is_corrupt or (is_late and not frame.key_frame)):
            is_late = True
            continue
        if frame.is_corrupt:
            raise Damage("a picture is damaged")
        has_begun = True
        frame.time_base = frame.time_base or stream.time_base
        yield frame
    if damage:
        raise Damage(damage.strerror) from damage


def _deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """Deinterlace frames; progressive ones are unchanged."""
    av = pyav()
    graph = None
    try:
        for frame in frames:
            if graph is None and frame.interlaced_frame:
                graph = av.filter.Graph()
                source = graph.add_buffer(
                    width=frame.width,
                    height=frame.height,
                    format=frame.format,
                    time_base=frame.time_base,
                )
                graph.link_nodes(
                    source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
                )
                graph.configure()
            if graph is None:
                yield frame
            else:
                graph.push(frame)
                yield from _pulled(graph)
    finally:
        if graph is not None:
            graph.push(None)
    if graph is not None:
        yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[Any]:
    av = pyav()
    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()


def _time(frame: Any, before: Fraction | None, gap: Fraction) -> Fraction:
    """Return the time at which a frame is shown, always later than the previous one's, whatever its timestamp."""
    found = None if frame.pts is None else frame.pts * frame.time_base
    if before is None:
        return found or Fraction(0)
    return found if found is not None and found > before else before + (gap or Fraction(1, 25))


def _duration(frame: Any, gap: Fraction, stream: Any) -> Fraction:
    """Return the duration of the last frame."""
    if frame.duration and frame.time_base:
        return Fraction(frame.duration * frame.time_base)
    return gap or (1 / stream.average_rate if stream.average_rate else Fraction(1, 25))


def _declared_seconds(container: Any, stream: Any) -> Fraction:
    """Return the duration of the video stream that the file declares; 0 if it declares none."""
    if stream.duration:
        return Fraction(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and container.duration and container.format.name.startswith("matroska")
    return Fraction(container.duration, 1_000_000) if alone else Fraction(0)
