"""Checks a picture before it is packed and, if asked, makes it smaller.

Enters: the bytes of a picture file. Leaves: the bytes to pack and their extension. Why it exists: a broken file is
found once, when packing, and not in every epoch; and pictures with a short side of 256 load 1.5 times as fast. Files
are read by the decoder of training, so what is packed has the bits, the channels and the orientation of what came in.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from data_pipes.decode import jpeg, npy, pil, tiff, tiff_tags
from data_pipes.decode.limits import DEFAULT_MAX_PIXELS, Pixels
from data_pipes.decode.picture import PictureHeader, check_header, decode_pixels, decode_stored
from data_pipes.decode.stored import Stored
from data_pipes.errors import SampleError

_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS
"""Of a picture, which may become smaller here; PIL refuses more."""
_ORIENTATION = int(ExifTags.Base.Orientation)
_LOSSY = ("jpg", "webp", "avif")
"""Formats that become JPEG where they are opaque; the others stay without loss."""
_BICUBIC = Image.Resampling.BICUBIC
_CMYK_JPEG = ("JPEG", "MPO")
"""PIL's formats that stay CMYK."""
_PIL_MODES = {(1, False): "L", (2, True): "LA", (3, False): "RGB", (4, True): "RGBA"}
"""By (channels, whether the last one is alpha), PIL's mode of 8 bits."""


class UnreadableFile(ValueError):
    """The bytes are no picture or video, or not one that can be packed as asked."""

    def __init__(self, message: str, cause: str = "unreadable") -> None:
        """Makes the error.

        Args:
            message: what was found, what to do.
            cause: a short name to count by.
        """
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are checked and re-encoded."""

    short_side: int | None = None
    """In pixels: a picture whose short side is longer is made smaller, all others keep their bytes; None keeps all."""
    quality: int = 95
    """Quality of re-encoded JPEG, 1 to 100."""
    verify: Literal["header", "decode"] = "header"
    """What is checked of pictures that keep their bytes: "header" reads format and size (of PNG also the checksums),
    "decode" all pixels."""

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; expected a number of pixels >= 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; expected 1 to 100")
        if self.verify not in ("header", "decode"):
            raise ValueError(f"verify is {self.verify!r}; expected header or decode")


def prepare_picture(data: bytes, options: PictureOptions) -> tuple[bytes, str]:
    """Checks a picture, and makes it smaller where the options ask for it.

    It is made smaller by bicubic resizing with antialias. JPEG, opaque WebP and AVIF become JPEG of `options.quality`;
    arrays stay arrays; all others become PNG, or TIFF where that came in and PNG cannot hold the channels and bits.
    Colour profile and EXIF orientation are kept.

    Args:
        data: the bytes of the file.
        options: what is checked and changed.

    Returns:
        The bytes to pack and their extension, which follows from the content and not from the file's name.

    Raises:
        UnreadableFile: it is no picture that training can read, is damaged, or would lose more than its size.
        ImportError: it is a TIFF, and what reads it is not installed.
    """
    try:
        header = check_header(data, _MAX_PIXELS)
        if options.short_side is not None and min(header.height, header.width) > options.short_side:
            return _shrink(data, header, options.short_side, options.quality)
        if options.verify == "decode":
            decode_pixels(data, None, _MAX_PIXELS)
        return data, header.extension
    except SampleError as error:
        raise UnreadableFile(str(error), "unreadable" if error.cause == "decode" else error.cause) from error
    except (UnreadableFile, ImportError):
        raise
    except Exception as error:  # Pillow's encoders and its reading of metadata
        raise UnreadableFile(f"{type(error).__name__}: {error}") from error


class _Metadata(NamedTuple):
    """What stands in a file beside the pixels."""

    orientation: int = 1
    """EXIF's number, 1 (upright) where there is none."""
    profile: bytes | None = None
    """The colour profile."""
    info: dict[Any, Any] | None = None
    """As Pillow has it."""
    num_frames: int = 1
    """Frames or pages."""


def _shrink(data: bytes, header: PictureHeader, short_side: int, quality: int) -> tuple[bytes, str]:
    metadata = _metadata(data)
    if metadata.num_frames > 1:
        raise UnreadableFile(
            f"it has several frames ({header.extension}) and would keep only the first, which is all that training "
            "reads; pack it without re-encoding"
        )
    scale = short_side / min(header.width, header.height)
    width, height = (max(short_side, round(side * scale)) for side in (header.width, header.height))
    if pil.is_deep_png(data):
        raise UnreadableFile("a 16-bit PNG in colour would lose 8 bits; pack it without re-encoding")
    stored = decode_stored(data, _MAX_PIXELS)
    mode = None if stored is None else _png_mode(stored)
    if stored is not None and (mode is None or header.extension == "npy"):
        return _shrink_array(stored, header.extension, (width, height), metadata)
    if stored is not None:
        smaller = _resize(_as_pil(stored.pixels, mode), (width, height))
    elif header.extension == "jpg" and (found := jpeg.read_header(data)) is not None:
        pixels = jpeg.decode(data, found, 1 if found.grey else 3)
        smaller = _resize(_as_pil(pixels, "L" if found.grey else "RGB"), (width, height))
        smaller.info = metadata.info or {}
    else:
        if header.extension == "jpg":
            jpeg.check_cmyk(data, _MAX_PIXELS)
        smaller = pil.open_picture(data, _MAX_PIXELS, lambda image: _resize(image, (width, height)))
    extra: dict[str, Any] = {"icc_profile": metadata.profile}
    if metadata.orientation != 1:
        extra["exif"] = Image.Exif()
        extra["exif"][_ORIENTATION] = metadata.orientation
    out = io.BytesIO()
    if header.extension in _LOSSY and smaller.mode in ("L", "RGB", "CMYK"):
        smaller.save(out, "JPEG", quality=quality, **extra)
        return out.getvalue(), "jpg"
    smaller.save(out, "PNG", **extra)
    return out.getvalue(), "png"


def _metadata(data: bytes) -> _Metadata:
    """What Pillow finds; nothing where it cannot read the file, or where the metadata are damaged, as often in pictures
    that are fine.
    """
    if data.startswith(npy.MAGIC):
        return _Metadata()
    try:
        with Image.open(io.BytesIO(data), formats=pil.pil_formats()) as image:
            num_frames = 1 if image.format in ("MPO", "TIFF") else getattr(image, "n_frames", 1)  # of MPO: thumbnails
            try:
                orientation = int(image.getexif().get(_ORIENTATION, 1))
            except Exception:
                orientation = 1
            found = _Metadata(orientation, image.info.get("icc_profile"), dict(image.info), num_frames)
    except Exception:
        found = _Metadata()
    if data.startswith(tiff_tags.MAGICS):
        orientation, has_successor = tiff_tags.page_notes(data)
        return found._replace(orientation=orientation, num_frames=1 + has_successor)
    return found


def _png_mode(stored: Stored) -> str | None:
    """PIL's mode in which a PNG holds a picture; None where there is none."""
    channels = stored.pixels.shape[2]
    if stored.pixels.dtype == np.uint16:
        return "I;16" if channels == 1 else None
    return None if stored.is_premultiplied else _PIL_MODES.get((channels, stored.has_alpha))


def _as_pil(pixels: Pixels, mode: str | None) -> Image.Image:
    """[H, W, C] as an image of PIL."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    assert image.mode == mode, f"{image.mode} instead of {mode}"
    return image


def _shrink_array(stored: Stored, extension: str, size: tuple[int, int], metadata: _Metadata) -> tuple[bytes, str]:
    """Resizes each channel for itself, and writes what only arrays and TIFF can hold.

    Args:
        stored: the picture.
        extension: of the file that it came from.
        size: width and height of the result.
        metadata: of the file.
    """
    channels = [_resize(Image.fromarray(channel), size) for channel in np.moveaxis(stored.pixels, 2, 0)]
    pixels = np.stack([np.asarray(channel) for channel in channels], axis=2)
    out = io.BytesIO()
    if extension == "npy":
        np.save(out, pixels)
    elif extension == "tif":
        num_colours = 3 if stored.is_rgb else 1
        alpha = "assocalpha" if stored.is_premultiplied else "unassalpha"
        kinds = ["unspecified"] * (pixels.shape[2] - num_colours)
        tiff.import_tifffile().imwrite(
            out,
            pixels[..., 0] if pixels.shape[2] == 1 else pixels,
            photometric="rgb" if stored.is_rgb else "minisblack",
            planarconfig=None if pixels.shape[2] == 1 else "contig",
            extrasamples=[*kinds[:-1], alpha] if stored.has_alpha else kinds or None,
            compression="zlib",
            predictor=True,
            iccprofile=metadata.profile,
            extratags=[(_ORIENTATION, 3, 1, metadata.orientation, True)],
            metadata=None,
            software=False,
        )
    else:
        raise UnreadableFile("a PPM of 16 bits would lose 8 of them; pack it without re-encoding")
    return out.getvalue(), extension


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes bicubically with antialias; palettes become colours first, since Pillow resizes palettes by taking the
    nearest pixel, and so do the colour spaces that PNG does not have.
    """
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode.startswith("I"):  # 16 bits; bicubic overshoots, so the result is clipped
        smaller = np.asarray(Image.fromarray(pil.deep_grey(image).astype(np.float32)).resize(size, _BICUBIC))
        return Image.fromarray(smaller.round().clip(0, 65535).astype(np.uint16))
    elif image.mode not in ("L", "LA", "RGB", "RGBA") and (image.mode != "CMYK" or image.format not in _CMYK_JPEG):
        image = image.convert("RGB")
    return image.resize(size, _BICUBIC)
