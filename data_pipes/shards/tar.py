"""A strict walk over the members of a tar file.

Enters: an open binary file. Leaves: one `TarMember` per header (regular files and folders), with the places of its
header and data. Why it exists: `tarfile`, and with it stock webdataset, ends silently at a damaged header, at a zero
block in mid-file and at a file that was cut between two members; a training run then misses samples without a word.
Here each of these is a `TarProblem`. Header fields are parsed by `tarfile.TarInfo.frombuf`. Formats: ustar, PAX (`x`,
`g`), GNU long names (`L`, `K`), base-256 sizes; source: POSIX.1-2017, "pax", and the GNU tar manual, "Basic Tar
Format".
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
"""Bytes of a header; data are padded to a multiple of it."""
MAX_EXTENDED_HEADER_BYTES = 1 << 20
"""An extended header holds a name and a few numbers; a larger one would only fill the memory."""
MAX_NAME_LENGTH = 4096
"""Characters of a member's name, at most."""

RECOPY = "copy or pack the shard again from its source"
_DISTRUST = "the file is damaged or was not made by a usual tar writer; pack the shard again"
_OCTAL = re.compile(rb"[0-7]+")
_PAX_RECORD = re.compile(rb"([0-9]{1,20}) ([^=\n]+)=")
LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"X", b"g", b"S"
"""Kinds of members, as their headers say them."""
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    _SPARSE: "a sparse file",
}
"""Kinds of members that are refused -> what they are, for messages."""


class TarProblem(ValueError):
    """What is wrong with a tar file."""

    def __init__(self, problem: str, offset: int, advice: str) -> None:
        """Makes the error.

        Args:
            problem: what was found.
            offset: where, as a byte of the file.
            advice: what to do.
        """
        super().__init__(f"{problem} (at byte {offset:,}); {advice}")
        self.problem, self.offset, self.advice = problem, offset, advice


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member, with its places in the file, in bytes."""

    name: str
    is_folder: bool
    header: int
    """First byte of its first header block, extended headers included."""
    data: int
    """First byte of its data."""
    size: int
    """Size of its data."""

    @property
    def end(self) -> int:
        """First byte behind its padded data."""
        return self.data + padded(self.size)


@dataclass(slots=True)
class Extended:
    """What extended headers say about the member that follows them."""

    start: int
    """First byte of the first of them."""
    name: str | None = None
    """The member's name, where they say it."""
    size: int | None = None
    """The size of the member's data, where they say it."""

    def set_name(self, name: str, offset: int) -> None:
        """Takes the member's name.

        Raises:
            TarProblem: the member has a name already, or the name is too long; `offset` is where.
        """
        if self.name is not None:
            raise TarProblem("two extended headers name the same member", offset, _DISTRUST)
        if len(name) > MAX_NAME_LENGTH:
            raise TarProblem(f"a name of {len(name):,} characters", offset, f"use at most {MAX_NAME_LENGTH:,}")
        self.name = name


def walk_tar(stream: BinaryIO, size_bytes: int, *, allow_missing_end: bool = False) -> Iterator[TarMember]:
    """Walks over a tar file.

    Args:
        stream: the file.
        size_bytes: its size.
        allow_missing_end: accept a file that ends at a member's boundary without the two zero blocks. No usual writer
            makes such a file, and it looks the same as one that was cut there.

    Yields:
        The regular files and folders in order.

    Raises:
        TarProblem: truncation anywhere, a wrong checksum, a zero block between members, bytes behind the end marker,
            an absolute name or one with `..`, a link, a device, a sparse file or an unknown kind of member.
    """
    position, extended = 0, None
    while True:
        block = _read(stream, position, min(BLOCK, size_bytes - position))
        if len(block) < BLOCK:
            if block or extended or not allow_missing_end:
                raise _truncated(size_bytes, "inside a header" if block or extended else "without the end marker")
            return
        if not any(block):
            if extended:
                raise TarProblem("an extended header without its member", extended.start, RECOPY)
            _check_end(stream, position, size_bytes, allow_missing_end)
            return
        info = parse_header(block, position)
        data = position + BLOCK
        extended = extended or Extended(start=position)
        if info.type in (LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL):
            position = data + padded(info.size)
            if info.size > MAX_EXTENDED_HEADER_BYTES:
                raise TarProblem(
                    f"an extended header of {info.size:,} bytes (at most {MAX_EXTENDED_HEADER_BYTES:,} are read)",
                    data,
                    _DISTRUST,
                )
            if position > size_bytes:
                raise _truncated(size_bytes, "inside an extended header")
            payload = _read(stream, data, position - data)
            if any(payload[info.size :]):  # tarfile reads on into the padding, GNU tar does not
                raise TarProblem("an extended header that goes on behind its end", data + info.size, _DISTRUST)
            apply_extended(info.type, payload[: info.size], extended, data)
            continue
        member = checked_member(info, extended, data)
        if member.end > size_bytes:
            raise _truncated(
                size_bytes,
                f"inside the data of {member.name!r}, which says it has {member.size:,} bytes from byte {data:,}",
            )
        yield member
        position, extended = member.end, None


def padded(size: int) -> int:
    """The bytes that data of this size take, up to the next block."""
    return -(-size // BLOCK) * BLOCK


def _read(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    data = stream.read(length)
    if len(data) != length:
        raise TarProblem("the file became shorter while it was read", offset + len(data), RECOPY)
    return data


def _truncated(size_bytes: int, where: str) -> TarProblem:
    return TarProblem(f"the file is truncated: it ends {where}", size_bytes, RECOPY)


def parse_header(block: bytes, offset: int) -> tarfile.TarInfo:
    """Parses a header block.

    Args:
        block: its bytes.
        offset: where it begins in the file, for messages.

    Raises:
        TarProblem: it is no valid header.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarProblem(f"no valid tar header ({error})", offset, RECOPY) from error
    if info.size < 0:
        raise TarProblem(f"a member with a negative size ({info.size})", offset, _DISTRUST)
    return info


def checked_member(info: tarfile.TarInfo, extended: Extended, data: int) -> TarMember:
    """The member of a header; what a data set must not hold is refused.

    Args:
        info: the header.
        extended: what its extended headers say.
        data: where the member's data begin.

    Raises:
        TarProblem: the member is no regular file or folder, or has a name or a size that cannot be.
    """
    name = info.name if extended.name is None else extended.name
    kind = info.type
    if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE):
        found = _REFUSED.get(kind, f"of the unknown kind {kind!r}")
        raise TarProblem(
            f"the member {name!r} is {found}; only regular files and folders are allowed",
            extended.start,
            "pack the shard again with regular files only",
        )
    if name.startswith("/") or ".." in name.split("/"):
        raise TarProblem(
            f"the member name {name!r} leads out of the shard",
            extended.start,
            "names must be relative and without '..'; do not unpack this file",
        )
    if not name or "\0" in name:
        raise TarProblem(f"the member name {name!r} is empty or holds a zero byte", extended.start, _DISTRUST)
    size = info.size if extended.size is None else extended.size
    is_folder = kind == tarfile.DIRTYPE or name.endswith("/")
    if is_folder and size:
        # Readers disagree on whether such data is skipped, so they would see different members behind it.
        raise TarProblem(f"the folder {name!r} says it has {size:,} bytes of data", extended.start, _DISTRUST)
    return TarMember(name, is_folder, extended.start, data, size)


def apply_extended(kind: bytes, payload: bytes, extended: Extended, offset: int) -> None:
    """Adds what one extended header says to what earlier ones said.

    Args:
        kind: of the header.
        payload: its data.
        extended: what is known so far; changed in place.
        offset: where the data begin in the file, for messages.

    Raises:
        TarProblem: the header is malformed, contradicts another one, or announces a sparse file.
    """
    if kind == LONG_LINK:
        return  # the link itself is refused
    if kind == LONG_NAME:
        extended.set_name(payload.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"), offset)
        return
    for key, value in _pax_records(payload, offset):
        if key.startswith("GNU.sparse."):
            raise TarProblem("a sparse file", offset, "pack the shard again with regular files only")
        if key not in ("path", "size"):
            continue  # times, owners, comments, link targets: nothing of it is used
        if kind == PAX_GLOBAL:
            raise TarProblem(f"a global header that sets the {key} of all members", offset, _DISTRUST)
        if key == "path":
            extended.set_name(value.decode("utf-8", "surrogateescape"), offset)
        elif extended.size is not None or not re.fullmatch(rb"[0-9]{1,20}", value):
            raise TarProblem(f"an extended header with the size {value[:32]!r}", offset, _DISTRUST)
        else:
            extended.size = int(value)


def is_header_of(block: bytes, key: str, extension: str, size: int) -> bool:
    """Whether a header block belongs to a certain member; it takes 1 us.

    A name that is not ASCII or longer than 100 bytes may be in an extended header before this one; then the size alone
    is compared. A size of 8 GiB or more is not compared.

    Args:
        block: the bytes of the header.
        key: the key of the sample: the member is called KEY.EXTENSION.
        extension: in lower case; the name in the header may have it in upper case.
        size: of the member's data, in bytes.
    """
    digits = block[124:136].strip(b" \0")
    known = size < 1 << 33 and not digits.startswith(b"\x80")
    if known and (not _OCTAL.fullmatch(digits) or int(digits, 8) != size):
        return False
    expected = f"{key}.{extension}"
    if len(expected) > 100 or not expected.isascii():
        return True
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    if name != expected and block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].rstrip(b"\0").decode("ascii", "replace") + "/" + name
    return name == expected or (name[: len(key)] == key and name[len(key) :].lower() == "." + extension)


def _pax_records(payload: bytes, offset: int) -> Iterator[tuple[str, bytes]]:
    """The keys and values of a PAX header, which consists of records "<length> <key>=<value>\\n"."""
    position = 0
    while position < len(payload):
        record = _PAX_RECORD.match(payload, position)
        end = position + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(payload) or payload[end - 1 : end] != b"\n":
            if not any(payload[position:]):
                return  # some writers pad with zero bytes
            raise TarProblem("a malformed PAX header", offset + position, RECOPY)
        yield record[2].decode("utf-8", "surrogateescape"), payload[record.end() : end - 1]
        position = end


def _check_end(stream: BinaryIO, position: int, size_bytes: int, allow_missing_end: bool) -> None:
    """Checks that from the first zero block on the file holds nothing but zeros, and at least two blocks of them."""
    length = size_bytes - position
    for start in range(position, size_bytes, 1 << 20):
        chunk = _read(stream, start, min(1 << 20, size_bytes - start))
        rest = chunk.lstrip(b"\0")
        if rest:
            offset = start + len(chunk) - len(rest)
            what = "a zero block in mid-file" if offset - position < 2 * BLOCK else "data behind the end marker"
            raise TarProblem(
                f"{what}: stock readers silently drop everything from byte {position:,} on", offset, RECOPY
            )
    if length % BLOCK or (length < 2 * BLOCK and not allow_missing_end):
        raise _truncated(size_bytes, "inside the end marker (two zero blocks)")
