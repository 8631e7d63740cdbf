"""The boxes that an MP4 file consists of (ISO 14496-12), as far as a stream of them has to be understood."""

from collections.abc import Iterator

from causalrt.errors import VideoError


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(type, payload) of each box of ISO 14496-12 that lies in `data`, outermost ones only.

    Raises:
        VideoError: `data` is not a row of whole boxes.
    """
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        begin = 8
        if size == 1:
            size, begin = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if size < begin or at + size > len(data):
            raise VideoError(f"no whole box at byte {at} of {len(data)}: its size says {size}")
        yield data[at + 4 : at + 8].decode("latin-1"), data[at + begin : at + size]
        at += size


def codec_from_header(header: bytes) -> str:
    """`avc1.PPCCLL` (RFC 6381): profile, constraints and level, as the avcC box (ISO 14496-15) has them."""
    payload = header
    for name in ("moov", "trak", "mdia", "minf", "stbl", "stsd"):
        payload = dict(boxes(payload))[name]
    entry = dict(boxes(payload[8:]))["avc1"]  # after version and count
    configuration = dict(boxes(entry[78:]))["avcC"]  # after the fields of a VisualSampleEntry
    return f"avc1.{configuration[1:4].hex()}"
