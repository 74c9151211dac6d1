"""The strict walk of data_pipes.shards.tar over a stream, where no size is known and there is no way back.

Enters: a file that can only be read forward, such as an unpacking one. Leaves: each member with a function that reads
its data. Why it exists: a compressed tar tells its size only at its end; it is held to the same rules all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

from data_pipes.shards.tar import (
    BLOCK,
    LONG_LINK,
    LONG_NAME,
    MAX_EXTENDED_HEADER_BYTES,
    PAX,
    PAX_GLOBAL,
    PAX_SOLARIS,
    RECOPY,
    Extended,
    TarMember,
    TarProblem,
    apply_extended,
    checked_member,
    padded,
    parse_header,
)

_PIECE = 1 << 20
"""Bytes that are read at once, at most."""
_EXTENDED = (LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL)


def walk_tar_stream(stream: BinaryIO) -> Iterator[tuple[TarMember, Callable[[], bytes]]]:
    """Walks over a tar that can only be read forward, to its last byte: an error in the compression of that byte is
    found too.

    Yields:
        Each regular file and folder, with a function that reads its data. The function may be called until the next
        member is asked for; data that nobody reads are passed over.

    Raises:
        TarProblem: see `walk_tar`.
    """
    forward, extended = _Forward(stream), None
    while True:
        header = forward.position
        block = forward.read(BLOCK, "inside a header" if extended else "without the end marker")
        if not any(block):
            if extended:
                raise TarProblem("an extended header without its member", extended.start, RECOPY)
            forward.check_end()
            return
        info = parse_header(block, header)
        extended = extended or Extended(start=header)
        if info.type in _EXTENDED:
            if info.size > MAX_EXTENDED_HEADER_BYTES:
                raise TarProblem(f"an extended header of {info.size:,} bytes", header, RECOPY)
            payload = forward.read(padded(info.size), "inside an extended header")[: info.size]
            apply_extended(info.type, payload, extended, header + BLOCK)
            continue
        member, extended = checked_member(info, extended, header + BLOCK), None
        yield member, lambda member=member: forward.read(member.size, f"inside {member.name!r}")  # type: ignore[misc]
        forward.skip_to(member.end, f"inside {member.name!r}")


class _Forward:
    """A stream whose bytes are counted, and in which an early end is a TarProblem."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.position = stream, 0

    def read(self, length: int, where: str) -> bytes:
        """The next bytes; `where` says for the message what would be cut."""
        parts = list(self._pieces(length, where))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip_to(self, position: int, where: str) -> None:
        """Passes over the bytes before `position`; `where` as in `read`."""
        for _ in self._pieces(position - self.position, where):
            pass

    def check_end(self) -> None:
        """Checks that behind the first zero block there is another one, and nothing but zeros."""
        begin, what = self.position - BLOCK, "a zero block in mid-file"
        piece = self.read(BLOCK, "inside the end marker (two zero blocks)")
        while piece:
            if piece.count(0) != len(piece):
                raise TarProblem(
                    f"{what}: stock readers silently drop everything from byte {begin:,} on", self.position, RECOPY
                )
            piece, what = self._stream.read(_PIECE), "data behind the end marker"
            self.position += len(piece)

    def _pieces(self, length: int, where: str) -> Iterator[bytes]:
        while length > 0:
            piece = self._stream.read(min(length, _PIECE))
            if not piece:
                raise TarProblem(f"the file is truncated: it ends {where}", self.position, RECOPY)
            self.position += len(piece)
            length -= len(piece)
            yield piece
