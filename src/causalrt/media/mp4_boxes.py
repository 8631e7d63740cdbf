"""Reads and writes the boxes of MP4 files (ISO 14496-12) that streaming needs."""

import re
import struct
from collections.abc import Iterator

from causalrt.errors import VideoError


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (type, payload) of each outermost box in `data`.

    Raises:
        VideoError: `data` is not a sequence of complete boxes.
    """
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        begin = 8
        if size == 1:
            size, begin = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if size < begin or at + size > len(data):
            raise VideoError(f"the box at byte {at} of {len(data)} is incomplete: its size is {size}")
        yield data[at + 4 : at + 8].decode("latin-1"), data[at + begin : at + size]
        at += size


def codec_from_header(header: bytes) -> str:
    """Return `avc1.PPCCLL` (RFC 6381): the profile, constraints and level from the avcC box (ISO 14496-15)."""
    payload = header
    for name in ("moov", "trak", "mdia", "minf", "stbl", "stsd"):
        payload = dict(boxes(payload))[name]
    entry = dict(boxes(payload[8:]))["avc1"]  # after version and count
    configuration = dict(boxes(entry[78:]))["avcC"]  # after the fields of a VisualSampleEntry
    return f"avc1.{configuration[1:4].hex()}"


def fragment(sample: bytes, *, number: int, time: int, duration: int, is_key: bool) -> bytes:
    """Make a movie fragment of one frame (moof and mdat) for track 1 of an initialisation segment with `default_base_moof`.

    Args:
        sample: the encoded frame, as returned by `sample_from_byte_stream`.
        number: sequence number of the fragment, from 1.
        time: presentation time in the track's timescale.
        duration: duration in the track's timescale.
        is_key: whether the frame can be decoded without others.
    """
    flags = 0x02000000 if is_key else 0x01010000  # independent; or dependent and not a sync sample
    header = _box("tfhd", struct.pack(">II", 0x020000, 1))  # default-base-is-moof; track 1
    begin = _box("tfdt", struct.pack(">IQ", 0x01000000, time))

    def moof(data_offset: int) -> bytes:
        run = struct.pack(
            ">IIiIII", 0x000701, 1, data_offset, duration, len(sample), flags
        )  # flags: data offset, and duration, size and flags per sample
        track = _box("traf", header + begin + _box("trun", run))
        return _box("moof", _box("mfhd", struct.pack(">II", 0, number)) + track)

    return moof(len(moof(0)) + 8) + _box("mdat", sample)


def sample_from_byte_stream(data: bytes) -> bytes:
    """Replace the start codes of H.264 NAL units (annex B) by lengths, as in MP4 (ISO 14496-15)."""
    units = re.split(b"\x00*\x00\x00\x01", data)[1:]  # no unit contains a start code or ends with a zero byte
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)


def _box(name: str, payload: bytes) -> bytes:
    return struct.pack(">I", 8 + len(payload)) + name.encode("latin-1") + payload
