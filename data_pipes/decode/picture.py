"""From the bytes of one picture to a tensor, without trusting the bytes.

Enters: an encoded picture (told by its first bytes, never by its name). Leaves: uint8 or uint16 [C, H, W], a view of
[H, W, C] memory, which is the layout that resizes fastest. Why it exists: decoding is most of the CPU time of loading
(JPEG: simplejpeg), and the place where a hostile file would strike. Packing reads pictures by the same functions, so
that it keeps what training will see. docs/data.md has a table of what is read and kept of each format.

Policies. EXIF orientation is ignored, in every format, as the usual recipes do (`Image.open(f).convert("RGB")` and
torchvision's decode_jpeg): pictures are as they are stored. Alpha is dropped, not blended, unless four channels are
asked for; then a picture without alpha is opaque (of 16-bit PNGs, a transparent colour is no alpha). Palettes become
RGB. CMYK goes through PIL. JPEG to grey takes the luma plane. 16 bits per channel stay uint16, in PNG, PNM, TIFF and
`.npy`; where PIL would cut them to 8, the picture is refused. TIFF and `.npy` may have any number of channels; what a
TIFF does not call alpha is a channel. Of animations and multi-page files the first picture counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from data_pipes.decode import jpeg, npy, pil, tiff, tiff_tags
from data_pipes.decode.formats import extension_of
from data_pipes.decode.limits import DEFAULT_MAX_PIXELS, Pixels, check_pixels
from data_pipes.decode.stored import Stored, convert_channels, settle_alpha
from data_pipes.errors import DecodeError, SampleError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_MAX_PIXELS", "DecodeError", "Pixels", "SampleError", "decode_image"]


class PictureHeader(NamedTuple):
    """What the first bytes of a picture say."""

    extension: str
    """Under which it is packed; it follows from the content and not from a file's name."""
    height: int
    """As stored, in pixels."""
    width: int
    """As stored, in pixels."""


def decode_image(data: bytes, channels: int | None, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """Decodes one picture into a tensor, see `decode_pixels`.

    Returns:
        uint8 or uint16 [C, H, W], a view of [H, W, C] memory.
    """
    import torch  # here, because packing and statistics need none of it

    return torch.from_numpy(decode_pixels(data, channels, max_pixels)).permute(2, 0, 1)


def decode_pixels(data: bytes, channels: int | None, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Decodes one picture.

    Args:
        data: the encoded picture.
        channels: of the result; None keeps 1 or 3 (or N of a TIFF or an array).
        max_pixels: height * width, checked in the header before anything is decoded.
    Returns:
        uint8 or uint16 [H, W, C].
    Raises:
        DecodeError: "pixels" (too many), "channels" (no conversion), or "decode" (truncated, corrupt, unknown).
        ImportError: the picture is a TIFF, and what reads it is not installed.
    """
    header = jpeg.read_header(data) if data.startswith(jpeg.JPEG_MAGIC) else None
    if header is not None:
        check_pixels(header.height, header.width, max_pixels)
        grey = channels == 1 or (channels is None and header.grey)
        pixels: Pixels = settle_alpha(Stored(jpeg.decode(data, header, 1 if grey else 3)), channels)
    elif (stored := decode_stored(data, max_pixels)) is not None:
        pixels = settle_alpha(stored, channels)
    else:
        if data.startswith(jpeg.JPEG_MAGIC):
            jpeg.check_cmyk(data, max_pixels)
        pixels = pil.open_picture(data, max_pixels, lambda picture: pil.pixels_of(picture, channels))
    return convert_channels(pixels, channels)


def decode_stored(data: bytes, max_pixels: int) -> Stored | None:
    """All channels and bits of a picture that PIL would cut or cannot read: arrays, TIFF, PNG and PPM of 16 bits.

    Args:
        data: the encoded picture.
        max_pixels: height * width, checked in the header.
    Returns:
        The pixels; None for what PIL or the decoder of JPEGs reads without loss.
    Raises:
        DecodeError: as `decode_image`.
        ImportError: the picture is a TIFF, and what reads it is not installed.
    """
    if data.startswith(npy.MAGIC):
        return Stored(npy.decode_npy(data, max_pixels))
    if pil.is_deep_png(data):
        return pil.decode_deep_png(data, max_pixels)
    if data[:2] in (b"P3", b"P6"):
        return pil.decode_deep_pnm(data, max_pixels)
    return tiff.decode_tiff(data, max_pixels) if data.startswith(tiff_tags.MAGICS) else None


def check_header(data: bytes, max_pixels: int) -> PictureHeader:
    """Checks all that can be told of a picture without decoding it, the checksums of a PNG included.

    Args:
        data: the encoded picture.
        max_pixels: height * width, at most.
    Raises:
        DecodeError: `decode_image` would refuse it.
        ImportError: the picture is a TIFF, and what reads it is not installed.
    """
    if data.startswith(jpeg.JPEG_MAGIC) and (header := jpeg.read_header(data)) is not None:
        check_pixels(header.height, header.width, max_pixels)
        return PictureHeader("jpg", header.height, header.width)
    if data.startswith(npy.MAGIC):
        return PictureHeader("npy", *npy.check_npy(data, max_pixels).shape[:2])
    size = None
    if data.startswith(tiff_tags.MAGICS):
        *size, is_read_here = tiff.check_tiff(data, max_pixels)
        if is_read_here:
            return PictureHeader("tif", *size)

    def check(picture: Image.Image) -> PictureHeader:
        extension = extension_of(picture.format)
        found = PictureHeader(extension, *(size or (picture.height, picture.width)))  # PIL's size of a TIFF is turned
        if picture.mode == "F":
            raise DecodeError("decode", pil.FLOAT_PICTURE)
        picture.verify()
        return found

    return pil.open_picture(data, max_pixels, check)
