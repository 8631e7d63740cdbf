"""Writes frames as MP4: as a complete file, or as fragments while the video is still being generated.

    frames uint8 [T, h, w, 3] -> H.264 (yuv420p, BT.709) -> Mp4Writer: one file, published when it is complete
                                                         -> FragmentWriter: ftyp moov | moof mdat | moof mdat | ... as bytes

PyAV encodes and muxes, but fragments are made here: FFmpeg's muxer holds each one back until the next frame determines its
duration, which is known in advance here. Each fragment holds one frame and is returned by the call that passed the frame.
"""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from causalrt.atomic_files import atomic_file
from causalrt.codec_geometry import WAN21
from causalrt.errors import RequestError, VideoError
from causalrt.media.mp4_boxes import codec_from_header, fragment, sample_from_byte_stream
from causalrt.media.pyav import pyav

Frames = torch.Tensor | npt.NDArray[np.uint8]

MAX_SIDE = 16384  # pixels; limit of x264
KEYFRAME_SECONDS = 2  # the most that a player has to decode for a seek
BT709 = 1  # number in ITU-T H.273 of the primaries, the transfer and the matrix


class Mp4Writer:
    """Writes one MP4 file chunk by chunk; it appears at `path` only once `close` has completed it.

    Its index is at the front, so that it can be played while it is being downloaded. A `with` block closes the file at its end,
    or discards it on an exception.
    """

    def __init__(
        self,
        path: Path,
        *,
        height: int,
        width: int,
        fps: int | Fraction,
        private: bool = False,
        sweeps: bool = True,
    ) -> None:
        """Start writing to a temporary file beside `path`.

        Args:
            path: path of the file.
            height: height of the frames in pixels.
            width: width of the frames in pixels.
            fps: frames per second.
            private: make the file readable only by its owner, rather than as the umask allows.
            sweeps: remove files that killed writers of this path have left; see `atomic_file`.

        Raises:
            RequestError: the size or rate is unsupported, or `path` cannot be written.
            ExecutorError: PyAV is not installed.
        """
        self.path = path.absolute()
        check_picture(height=height, width=width, fps=fps)
        pyav()
        self._file = contextlib.ExitStack()
        try:
            partial = self._file.enter_context(atomic_file(self.path, private=private, sweeps=sweeps))
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error}; choose a file in an existing, writable folder") from None
        with self._or_nothing():
            self._muxer = _Muxer(
                str(partial),
                height=height,
                width=width,
                fps=fps,
                # High enough quality that colours are unchanged after ten rounds of writing and reading.
                codec_options={"preset": "veryfast", "crf": "15", "x264-params": "chroma-qp-offset=-4"},
                container_options={"movflags": "+faststart"},
            )
        self._open = True

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 `[T, height, width, 3]`.

        Raises:
            RequestError: the frames have the wrong shape or type, or the writer is closed.
            VideoError: encoding or writing failed, a full disk for example; nothing is left at `path`.
        """
        self._check_open()
        checked = self._muxer.checked(frames)
        with self._or_nothing():
            self._muxer.write(checked)

    def close(self) -> None:
        """Complete the file and publish it. Further calls have no effect.

        Raises:
            RequestError: no frame was written; no file is left.
            VideoError: writing failed; no file is left.
        """
        if not self._open:
            return
        if not self._muxer.num_frames:
            self.discard()
            raise RequestError(f"no frames were written to {self.path}; a video needs at least one")
        with self._or_nothing():
            self._muxer.finish()
            self._file.close()
        self._open = False

    def discard(self) -> None:
        """Remove the incomplete file. This has no effect after `close`, or when called again."""
        if self._open:
            self._abandon()

    def _abandon(self) -> None:
        self._open = False
        if hasattr(self, "_muxer"):
            self._muxer.abandon()
        with contextlib.suppress(VideoError), self._file:  # an error in the block makes it remove the file
            raise VideoError(f"{self.path} was abandoned")

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._abandon()
            if isinstance(error, (OSError, pyav().FFmpegError)):
                raise VideoError(f"writing {self.path} failed, and no file was left there: {error}") from error
            raise

    def _check_open(self) -> None:
        if not self._open:
            raise RequestError(f"{self.path} was closed; make another writer")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class FragmentWriter:
    """Fragmented MP4 as bytes, in order: `header`, then the fragments of each `write`, then those of `close`.

    Each fragment holds one frame, and none is held back. A header followed by any number of fragments is a playable video.

    Attributes:
        header: the initialisation segment (ftyp and moov).
        codec: codec string of RFC 6381, `avc1.PPCCLL`, read from the stream's own configuration.
        mime: MIME type that a browser's `MediaSource` expects.
    """

    def __init__(self, *, height: int, width: int, fps: int | Fraction) -> None:
        """Open the encoder and make `header`.

        Raises:
            RequestError: the size or rate is unsupported.
            ExecutorError: PyAV is not installed.
            VideoError: the encoder cannot be opened.
        """
        check_picture(height=height, width=width, fps=fps)
        sink = _Sink()
        # Times are counted in thousandths of a frame's duration, or exactly so with a rate such as 30000/1001.
        timescale = 1000 * Fraction(fps).numerator
        self._duration = 1000 * Fraction(fps).denominator
        with _typed("opening the encoder"):
            self._muxer = _Muxer(
                sink,
                height=height,
                width=width,
                fps=fps,
                codec_options={"preset": "veryfast", "crf": "23", "tune": "zerolatency"},
                container_options={
                    "movflags": "+empty_moov+default_base_moof",
                    "video_track_timescale": str(timescale),
                },
            )
        self._open = True
        self._sent = 0
        self.header = sink.taken()
        self.codec = codec_from_header(self.header)
        self.mime = f'video/mp4; codecs="{self.codec}"'

    def write(self, frames: Frames) -> list[bytes]:
        """Encode frames, uint8 `[T, height, width, 3]`, and return one fragment per frame.

        Raises:
            RequestError: the frames have the wrong shape or type, or the writer is closed.
            VideoError: encoding failed.
        """
        if not self._open:
            raise RequestError("the fragment writer was closed; make another")
        checked = self._muxer.checked(frames)
        with _typed("encoding"):
            return self._fragments(self._muxer.packets(checked))

    def close(self) -> list[bytes]:
        """Return the fragments of frames that the encoder still holds; none with its current settings, or on a second call."""
        if not self._open:
            return []
        self._open = False
        with _typed("encoding"):
            last = self._fragments(self._muxer.last_packets())
        self._muxer.abandon()
        return last

    def _fragments(self, packets: Iterator[Any]) -> list[bytes]:
        parts = []
        for packet in packets:
            time, self._sent = self._sent * self._duration, self._sent + 1
            sample = sample_from_byte_stream(bytes(packet))
            parts.append(
                fragment(sample, number=self._sent, time=time, duration=self._duration, is_key=packet.is_keyframe)
            )
        return parts


def write_video(path: str | Path, frames: Frames, *, fps: int | Fraction = WAN21.fps) -> None:
    """Write frames, uint8 `[T, height, width, 3]` in sRGB, as an MP4 file (H.264), atomically.

    Raises:
        RequestError: the frames have the wrong shape or type, the size or rate is unsupported, or `path` cannot be written.
        VideoError: encoding or writing failed; nothing is left at `path`.
        ExecutorError: PyAV is not installed.
    """
    if getattr(frames, "ndim", 0) != 4:
        raise RequestError(f"frames must be uint8 [T, height, width, 3], got {list(getattr(frames, 'shape', []))}")
    with Mp4Writer(Path(path), height=frames.shape[1], width=frames.shape[2], fps=fps) as writer:
        writer.write(frames)


class _Muxer:
    """An H.264 stream in an MP4 container that is written to a path or to an object with a `write` method."""

    def __init__(
        self,
        target: Any,
        *,
        height: int,
        width: int,
        fps: int | Fraction,
        codec_options: dict[str, str],
        container_options: dict[str, str],
    ) -> None:
        self._shape = (height, width, 3)
        self._av = av = pyav()
        self.num_frames = 0
        self._container = av.open(target, "w", format="mp4", container_options=container_options)
        self._stream = stream = self._container.add_stream("libx264", rate=Fraction(fps), options=codec_options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / Fraction(fps)
        context.gop_size = max(1, round(KEYFRAME_SECONDS * fps))
        # Tag the colours, because players guess missing tags from the picture size, each in its own way.
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = int(av.video.reformatter.ColorRange.MPEG)
        self._converter = _converter(height=height, width=width, time_base=context.time_base)
        self._container.start_encoding()

    def checked(self, frames: Frames) -> npt.NDArray[np.uint8]:
        """Return the frames as an array.

        Raises:
            RequestError: the frames have the wrong shape or type.
        """
        array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise RequestError(f"frames must be uint8, got {getattr(array, 'dtype', type(frames).__name__)}")
        if array.ndim != 4 or array.shape[1:] != self._shape:
            raise RequestError(f"frames must be [T, {', '.join(map(str, self._shape))}], got {list(array.shape)}")
        return array

    def packets(self, frames: npt.NDArray[np.uint8]) -> Iterator[Any]:
        """Encode frames and yield the packets."""
        for picture in frames:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = self.num_frames, self._stream.codec_context.time_base
            self.num_frames += 1
            self._converter.push(frame)
            yield from self._stream.encode(self._converter.pull())

    def last_packets(self) -> Iterator[Any]:
        """Flush the encoder and yield its last packets."""
        yield from self._stream.encode(None)

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Encode and mux frames."""
        for packet in self.packets(frames):
            self._container.mux(packet)

    def finish(self) -> None:
        """Flush the encoder, and complete the container."""
        for packet in self.last_packets():
            self._container.mux(packet)
        self._container.close()

    def abandon(self) -> None:
        """Release the container without completing it."""
        with contextlib.suppress(Exception):
            self._container.close()


def _converter(*, height: int, width: int, time_base: Fraction) -> Any:
    """Make a filter graph that converts RGB to the format that the stream declares.

    Without accurate rounding, each round of writing and reading would lose a grey level. H.264 places chroma samples at the
    left by default, but swscale in the centre: without `out_chroma_loc`, colours would shift by half a pixel.
    """
    graph = pyav().filter.Graph()
    source = graph.add(
        "buffer",
        video_size=f"{width}x{height}",
        pix_fmt="rgb24",
        time_base=str(time_base),
        colorspace="gbr",
        range="pc",
    )
    options = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    scale = graph.add("scale", f"{options}:out_color_matrix=bt709:out_range=tv:out_chroma_loc=left")
    graph.link_nodes(source, scale, graph.add("format", "pix_fmts=yuv420p"), graph.add("buffersink")).configure()
    return graph


class _Sink:
    """Collects the bytes that the muxer writes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """Return everything that was written."""
        return b"".join(self._parts)


def check_picture(*, height: int, width: int, fps: int | Fraction) -> None:
    """Refuse sizes and rates that H.264 in yuv420p does not support.

    Raises:
        RequestError: a side is odd, too small or too large, or the rate is not in (0, 1000].
    """
    for name, side in (("height", height), ("width", width)):
        if side % 2 or not 2 <= side <= MAX_SIDE:
            raise RequestError(f"{name} of a video must be even and 2 to {MAX_SIDE} pixels, got {side}")
    if not 0 < fps <= 1000:
        raise RequestError(f"fps must be greater than 0 and at most 1000, got {fps}")


@contextlib.contextmanager
def _typed(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pyav().FFmpegError) as error:
        raise VideoError(f"{what} failed: {error}") from error
