"""The formats of pictures: their names, the endings of their files, and those that are known and not read.

Enters: nothing. Leaves: one table. Why it exists: what is packed, what a sample's members are searched for and what the
decoder opens have to be the same formats, or files are left out without a word. docs/data.md says what is kept of each.
"""

from __future__ import annotations

from typing import NamedTuple

from data_pipes.errors import DecodeError


class PictureFormat(NamedTuple):
    """One format."""

    name: str
    """For people."""
    extensions: tuple[str, ...] = ()
    """Endings of its files and members, in lower case; the first one is what packing writes."""
    also: tuple[str, ...] = ()
    """Rarer endings of files that are packed; as members of foreign shards, data.image_member names them."""
    pil_names: tuple[str, ...] = ()
    """What Pillow calls it; none: it is not read by Pillow, or not at all."""
    is_read: bool = True
    """False: such a file is refused by its name."""


FORMATS = (
    PictureFormat("JPEG", ("jpg", "jpeg"), ("jpe", "jfif"), ("JPEG", "MPO")),
    PictureFormat("PNG", ("png",), ("apng",), ("PNG",)),
    PictureFormat("WebP", ("webp",), (), ("WEBP",)),
    PictureFormat("NumPy", ("npy",)),
    PictureFormat("TIFF", ("tif", "tiff"), (), ("TIFF",)),
    PictureFormat("BMP", ("bmp",), ("dib",), ("BMP", "DIB")),
    PictureFormat("GIF", ("gif",), (), ("GIF",)),
    PictureFormat("PNM", ("ppm", "pgm", "pbm", "pnm"), (), ("PPM",)),
    PictureFormat("JPEG 2000", ("jp2",), ("j2k", "j2c", "jpx", "jpf"), ("JPEG2000",)),
    PictureFormat("AVIF", ("avif",), (), ("AVIF",)),
    PictureFormat("TGA", ("tga",), (), ("TGA",)),
    PictureFormat("QOI", ("qoi",), (), ("QOI",)),
    PictureFormat("HEIC", (), ("heic", "heif", "hif"), is_read=False),
    PictureFormat("JPEG XL", (), ("jxl",), is_read=False),
)
"""All formats that have a name here."""
IMAGE_EXTENSIONS = tuple(extension for kind in FORMATS for extension in kind.extensions)
"""Endings of members that are pictures, in the order of preference where a sample has several."""
FILE_EXTENSIONS = IMAGE_EXTENSIONS + tuple(extension for kind in FORMATS for extension in kind.also)
"""Endings of files that are pictures, those that are refused by name included."""

_EXTENSION_OF = {name: kind.extensions[0] for kind in FORMATS for name in kind.pil_names}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2")
_JXL_MAGICS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")


def extension_of(pil_name: str | None) -> str:
    """The ending under which a picture is packed.

    Args:
        pil_name: Pillow's name of its format.
    Raises:
        DecodeError: it is not in the table.
    """
    if pil_name not in _EXTENSION_OF:
        known = ", ".join(kind.name for kind in FORMATS if kind.is_read)
        raise DecodeError("decode", f"a picture in the format {pil_name}; expected {known}")
    return _EXTENSION_OF[pil_name]


def refuse_unread(data: bytes) -> None:
    """Refuses the formats that are known and not read.

    Raises:
        DecodeError: the message has the format's name and says what to do.
    """
    name = None
    if data.startswith(_JXL_MAGICS):
        name = "JPEG XL"
    elif data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        name = None if b"avif" in brands or b"avis" in brands else "HEIC"
    if name is not None:
        raise DecodeError(
            "decode", f"a {name} picture ({len(data):,} bytes); this format is not read: convert it to PNG or JPEG"
        )
