"""Which container the bytes of a video are, and whether they are all there.

Enters: the bytes of one video. Leaves: FFmpeg's name of the container, or SampleError. Why it exists: FFmpeg guesses
among some 300 formats, of which playlists open further files and addresses, so it is told the format here instead; and
it reads a file that was cut short as a shorter video, without a word. Sources: ISO/IEC 14496-12 (boxes), RFC 8794 and
RFC 9559 (EBML, Matroska), Microsoft's AVI RIFF reference.
"""

from __future__ import annotations

from data_pipes.errors import SampleError

MP4, MATROSKA, AVI = "mov", "matroska", "avi"
"""FFmpeg's demuxers: of mp4, m4v and mov; of mkv and webm; of avi."""

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


def is_container(data: bytes) -> bool:
    """Whether the first bytes are those of a video, damaged or not."""
    is_avi = data.startswith(b"RIFF") and data[8:12] == b"AVI "
    is_picture = data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1")
    return (data[4:8] in _FIRST_BOXES and not is_picture) or data.startswith(_EBML) or is_avi


def container_of(data: bytes) -> str:
    """The container, told by the first bytes.

    Raises:
        SampleError: "video", when it is not one of the three, or cut short.
    """
    if not data:
        raise SampleError("video", "the video is empty: 0 bytes")
    if data[4:8] in _FIRST_BOXES:
        container, expected = MP4, _mp4_size(data)
    elif data.startswith(_EBML):
        container, expected = MATROSKA, _matroska_size(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        container, expected = AVI, 8 + int.from_bytes(data[4:8], "little")
    else:
        raise SampleError(
            "video", f"not an mp4, mov, webm, mkv or avi file: {len(data):,} bytes that begin with {data[:12]!r}"
        )
    if expected > len(data):
        raise SampleError(
            "video",
            f"the {container} file is cut short: {len(data):,} bytes, its header says at least {expected:,}; copy it "
            "again from its source",
        )
    return container


def extension_of(data: bytes) -> str:
    """The extension (mp4, mov, webm, mkv or avi) of a file that `container_of` accepts."""
    container = container_of(data)
    if container == MP4:
        return "mov" if data[4:8] != b"ftyp" or data[8:12] == b"qt  " else "mp4"
    if container == AVI:
        return "avi"
    return "webm" if b"\x42\x82\x84webm" in data[:256] else "mkv"  # DocType, 4 bytes of it


def _mp4_size(data: bytes) -> int:
    """Where the last box that begins within the data ends."""
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size == 0:  # reaches to the end, whatever that is
            return len(data)
        if size < 8:
            if not any(data[position : position + 64]):
                return position  # padding
            raise SampleError("video", f"damaged mp4: a box of {size} bytes at byte {position:,}")
        position += size
    return position


def _matroska_size(data: bytes) -> int:
    """Where the segment ends; 0 where the header leaves that open, as live recordings do."""
    head_size, length = _ebml_number(data, len(_EBML))
    start = len(_EBML) + length + (head_size or 0)
    if data[start : start + 4] != _SEGMENT:
        return start + 4 if start >= len(data) else 0
    size, length = _ebml_number(data, start + 4)
    return 0 if size is None else start + 4 + length + size


def _ebml_number(data: bytes, position: int) -> tuple[int | None, int]:
    """(value, bytes read) of a number whose first byte says how long it is; the value None means unknown."""
    first = data[position] if position < len(data) else 0
    if not first:
        raise SampleError("video", f"damaged webm or mkv: no length at byte {position:,}")
    length = 9 - first.bit_length()
    value = int.from_bytes(data[position : position + length], "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), length
