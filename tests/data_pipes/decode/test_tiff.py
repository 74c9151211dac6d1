"""TIFF against tifffile and PIL, hostile tags, and mutations that must end in time."""

from __future__ import annotations

import io
import struct
import sys
import time
import tracemalloc
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from data_pipes.decode.picture import decode_image
from data_pipes.decode.tiff import decode_tiff, describe, import_tifffile
from data_pipes.errors import DecodeError
from tests.data_pipes.decode.picture_files import GREY_ALPHA, RGB, as_tiff, noise, png, with_tag

COLOUR = noise(3, 8, 40, 56)


def by_pil(pixels: np.ndarray, mode: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, "TIFF", **options)
    return file.getvalue()


def with_pil(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def pixels_of(data: bytes, channels: int | None = None) -> np.ndarray:
    return decode_image(data, channels).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib", "lzma"])
@pytest.mark.parametrize("layout", ["strips", "short strips", "tiles", "planes", "tiled planes"])
def test_any_number_of_channels(byte_order: str, big: bool, compression: str | None, layout: str) -> None:
    options: dict[str, Any] = {"byteorder": byte_order, "bigtiff": big, "compression": compression}
    if "tile" in layout:
        options["tile"] = (16, 32)
    if layout == "short strips":
        options["rowsperstrip"] = 7
    for depth in (8, 16):
        for channels in (1, 2, 3, 5):
            values = noise(channels, depth)
            stored = values[..., 0] if channels == 1 else values
            if channels > 1:
                options["planarconfig"] = "separate" if "planes" in layout else "contig"
                stored = np.moveaxis(values, 2, 0) if "planes" in layout else values
            options["photometric"] = "rgb" if channels == 3 else "minisblack"
            for predictor in (False, True) if compression else (False,):
                data = as_tiff(stored, predictor=predictor, **options)
                found = pixels_of(data)
                assert found.dtype == values.dtype
                assert np.array_equal(found, values), (depth, channels, predictor)
                assert describe(data) == (23, 31, channels, depth)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_deflate", "tiff_adobe_deflate", "zstd"])
def test_what_libtiff_wrote(compression: str) -> None:
    for pixels in (COLOUR, COLOUR[..., 0]):
        data = by_pil(pixels, compression=compression)
        assert decode_tiff(data, 10**6) is not None
        assert np.array_equal(pixels_of(data), pixels.reshape(40, 56, -1))


def test_what_pil_reads() -> None:
    cases: list[tuple[str, dict[str, object]]] = [("P", {}), ("CMYK", {}), ("1", {"compression": "group4"})]
    for mode, options in (*cases, ("RGB", {"compression": "jpeg"})):
        data = by_pil(COLOUR, mode, **options)
        assert decode_tiff(data, 10**6) is None
        assert torch.equal(decode_image(data, 3), with_pil(data))


def test_alpha_and_other_extra_channels() -> None:
    rgba, five = noise(4, 16), noise(5, 8)
    for kind in ("unassalpha", "assocalpha"):
        data = as_tiff(rgba, photometric="rgb", extrasamples=[kind])
        assert np.array_equal(pixels_of(data), rgba[..., :3])
        assert np.array_equal(pixels_of(data, 4), rgba)
    infrared = as_tiff(rgba, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(pixels_of(infrared), rgba)
    assert np.array_equal(pixels_of(infrared, 4), rgba)
    with pytest.raises(DecodeError, match="4 channels, the model takes 3"):
        decode_image(infrared, 3)
    both = as_tiff(five, photometric="rgb", extrasamples=["unspecified", "unassalpha"])
    assert np.array_equal(pixels_of(both, 4), five[..., :4])
    assert (pixels_of(as_tiff(rgba[..., :3], photometric="rgb"), 4)[..., 3] == 65535).all()


def test_white_is_zero() -> None:
    grey = noise(1, 16)
    assert np.array_equal(pixels_of(as_tiff(grey[..., 0], photometric="miniswhite"), 1), 65535 - grey)


def test_first_page_without_its_orientation() -> None:
    first = noise(3, 16)
    assert np.array_equal(pixels_of(as_tiff(np.stack([first, first[::-1]]), photometric="rgb"), 3), first)
    for values in (first, COLOUR):
        turned = as_tiff(values, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
        assert np.array_equal(pixels_of(turned), values)
    for mode in ("P", "CMYK"):  # through PIL, which would turn it
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = by_pil(COLOUR, mode, exif=exif)
        assert with_pil(turned).shape == (3, 56, 40)
        assert torch.equal(decode_image(turned, 3), with_pil(by_pil(COLOUR, mode)))


@pytest.mark.parametrize(
    ("tag", "value", "words"),
    [
        (256, 2**31, "pixels, more than max_pixels"),
        (257, 0, "empty"),
        (257, 24, "1 offsets of 2 strips"),
        (258, 32, "3 channels with 32 bits"),
        (259, 34712, "compression JPEG2000"),
        (259, 61_234, "compression number 61234"),
        (262, 8, "photometric 8"),
        (273, 2**32 - 1, "beyond its"),
        (277, 65_535, "65535 channels"),
        (278, 0, "segments of 0 x 31"),
        (278, 1, "1 offsets of 23"),
        (317, 3, "predictor 3"),
        (339, 2, "sample format 2"),
        (339, 3, "sample format 3"),
        (32997, 4, "of 4 layers"),
    ],
)
def test_hostile_tags(tag: int, value: int, words: str) -> None:
    options: dict[str, Any] = {"compression": "zlib", "predictor": True} if tag == 317 else {}
    data = as_tiff(noise(3, 16), photometric="rgb", rowsperstrip=23, **options)
    with pytest.raises(DecodeError, match=words):
        decode_image(with_tag(data, tag, value), 3, max_pixels=10_000)


def test_bombs() -> None:
    """The declared number of values is bounded before anything is decoded, however well it would compress."""
    many = as_tiff(np.zeros((200, 8, 8), np.uint8), photometric="minisblack", planarconfig="separate")
    with pytest.raises(DecodeError, match="8 x 8 pixels of 200 channels") as caught:
        decode_image(many, None, max_pixels=1000)
    assert caught.value.cause == "pixels"
    assert decode_image(many, None, max_pixels=3200).shape == (200, 8, 8)
    tiled = as_tiff(noise(3, 16), photometric="rgb", tile=(16, 16), compression="zlib")
    with pytest.raises(DecodeError, match="in segments of 16 x 2147483647") as caught:
        decode_image(with_tag(tiled, 322, 2**31 - 1), 3)
    assert caught.value.cause == "pixels"


def test_strips_that_share_their_bytes() -> None:
    """Each of many strips claims most of the file: together more than it has, which would take quadratic time."""
    data = bytearray(as_tiff(noise(3, 16), photometric="rgb", rowsperstrip=1, compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages[0].tags
        offsets, sizes = tags[273], tags[279]
    form = "<23H" if int(sizes.dtype) == 3 else "<23I"
    struct.pack_into(form, data, sizes.valueoffset, *[len(data) // 2] * 23)
    struct.pack_into("<23I", data, offsets.valueoffset, *[8] * 23)
    with pytest.raises(DecodeError, match="beyond its"):
        decode_image(bytes(data), 3)


@pytest.mark.parametrize("compression", ["zlib", "zstd", "lzma", "lzw", "packbits"])
def test_strips_that_unpack_to_more_than_they_hold(compression: str) -> None:
    """20 million values behind a header that declares 23 rows: never more memory than these take."""
    bomb = bytearray(as_tiff(np.zeros((20_000, 1000), np.uint8), rowsperstrip=20_000, compression=compression))
    data = with_tag(with_tag(bytes(bomb), 257, 23), 278, 23)
    tracemalloc.start()
    with suppress(DecodeError):  # LZW and LZMA stop where the buffer ends, without an error
        assert not decode_image(data, 1, max_pixels=100_000).any()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000 + 2 * len(data)


def test_a_tag_that_is_given_thousands_of_times() -> None:
    """4,000 times the same list of 100,000 strips would be 3 GB of Python's numbers."""
    strips = 100_000
    tags = [(256, 4, 1, 256), (257, 4, 1, strips), (258, 3, 1, 8), (278, 4, 1, 1)]
    lists = 8 + 2 + 12 * (len(tags) + 4000) + 4
    tags += [(tag, 4, strips, lists) for tag in (273, 279) for _ in range(2000)]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8) + page + struct.pack("<I", 8) * strips
    started = time.process_time()
    with pytest.raises(DecodeError, match="beyond its"):
        decode_tiff(data, 10**9)
    assert time.process_time() - started < 2


def test_places_beyond_what_a_number_holds() -> None:
    data = as_tiff(noise(3, 16), photometric="rgb", bigtiff=True)
    for place in (2**63, 2**64 - 1):
        with pytest.raises(DecodeError, match="damaged TIFF"):
            decode_image(data[:8] + struct.pack("<Q", place) + data[16:], 3)


def test_private_tags_are_not_looked_at() -> None:
    """tifffile alone would take a file with this tag for a Zeiss LSM, and look for a second page."""
    pixels = noise(3, 16)
    data = as_tiff(pixels, photometric="rgb", extratags=[(34412, 7, 600, b"\xff" * 600, True)])
    assert np.array_equal(pixels_of(data), pixels)


def test_a_missing_package_is_no_fault_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_tiff(noise(3, 16), photometric="rgb")
    import_tifffile.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(ImportError, match=r"pip install 'tessera-pretrain\[tiff\]'"):
            decode_image(data, 3)
    assert decode_image(data, 3).shape == (3, 23, 31)


def test_truncation_anywhere() -> None:
    for options in ({}, {"compression": "zlib"}, {"compression": "lzma", "tile": (16, 16)}):
        data = as_tiff(noise(3, 16), photometric="rgb", **options)
        for length in (*range(0, 300, 3), *range(300, len(data) - 40, 101)):
            with pytest.raises(DecodeError):
                decode_image(data[:length], 3)


def test_mutations_end_in_time() -> None:
    """2,000 TIFFs and PNGs, damaged mostly in tags and headers: an error or a picture, none of which takes long."""
    random = np.random.Generator(np.random.PCG64(7))
    options: tuple[dict[str, Any], ...] = ({}, {"compression": "zlib", "predictor": True}, {"bigtiff": True})
    documents = [as_tiff(noise(3, 16), photometric="rgb", **kind) for kind in options]
    documents.append(as_tiff(noise(3, 16), photometric="rgb", tile=(16, 16), compression="lzma"))
    documents += [by_pil(COLOUR, compression=name) for name in ("tiff_lzw", "packbits", "jpeg")]
    documents += [by_pil(COLOUR, "P"), png(noise(3, 16), RGB, 16), png(noise(2, 16), GREY_ALPHA, 16)]
    num_errors, slowest_s = 0, 0.0
    for number in range(2000):
        data = bytearray(documents[number % len(documents)])
        for _ in range(random.integers(1, 4)):
            place = int(random.integers(len(data) if random.integers(2) else 300))
            if random.integers(2):
                data[place] ^= 1 << int(random.integers(8))
            else:
                data[place : place + 4] = struct.pack("<I", [0, 1, 2**32 - 1, 2**31, 65535, 8][random.integers(6)])
        started = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's, about damaged tags
                image = decode_image(bytes(data), None, max_pixels=100_000)
        except DecodeError:
            num_errors += 1
        else:
            assert image.numel() <= 4 * 100_000
        slowest_s = max(slowest_s, time.process_time() - started)
    assert 500 < num_errors < 2000
    assert slowest_s < 2


def without_segments(data: bytes, keep: set[int], zero: tuple[str, ...] = ("Offsets", "ByteCounts")) -> bytes:
    """The file in which the writer left out all strips or tiles but some: their places and sizes are 0."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for tag in file.pages[0].tags:
            if any(tag.name in (f"Strip{part}", f"Tile{part}") for part in zero):
                form = file.byteorder + {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)] * tag.count
                values = [value if number in keep else 0 for number, value in enumerate(tag.value)]
                struct.pack_into(form, changed, tag.valueoffset, *values)
    return bytes(changed)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}, {"bigtiff": True}])
@pytest.mark.parametrize("layout", [{"tile": (16, 16)}, {"rowsperstrip": 16}])
def test_segments_that_were_left_out_are_zeros(
    compression: str | None, options: dict[str, Any], layout: dict[str, Any]
) -> None:
    for depth, channels in ((8, 1), (16, 3), (8, 5)):
        pixels = noise(channels, depth, 48, 48)
        stored = pixels if channels > 1 else pixels[..., 0]
        photometric = "rgb" if channels == 3 else "minisblack"
        planes = "contig" if channels > 1 else None
        whole = as_tiff(
            stored,
            photometric=photometric,
            planarconfig=planes,
            compression=compression,
            metadata=None,
            **layout,
            **options,
        )
        for keep in (set(), {0}, {2}):
            data = without_segments(whole, keep)
            expected = np.zeros_like(pixels)
            for number in keep:
                rows = slice(16 * number, 16 * number + 16) if "rowsperstrip" in layout else slice(0, 16)
                columns = slice(None) if "rowsperstrip" in layout else slice(16 * number, 16 * number + 16)
                expected[rows, columns] = pixels[rows, columns]
            assert np.array_equal(pixels_of(data), expected)
            assert np.array_equal(tifffile.imread(io.BytesIO(data)).reshape(expected.shape), expected) or not keep
            assert describe(data) == (48, 48, channels, depth)


def test_a_place_or_a_size_alone_is_damage() -> None:
    whole = as_tiff(noise(3, 8, 48, 48), photometric="rgb", tile=(16, 16), compression="zlib", metadata=None)
    for part in ("Offsets", "ByteCounts"):
        with pytest.raises(DecodeError, match="beyond its"):
            decode_image(without_segments(whole, {0}, (part,)), 3)


@pytest.mark.parametrize(("number", "name"), [(50001, "WEBP"), (50002, "JPEGXL"), (34712, "JPEG2000"), (34887, "LERC")])
def test_pictures_inside_of_a_tiff_are_named(number: int, name: str) -> None:
    data = with_tag(as_tiff(noise(3, 8), photometric="rgb"), 259, number)
    with pytest.raises(DecodeError, match=f"compression {name}; such pictures are read as .* convert"):
        decode_image(data, 3)


def test_a_cmyk_tiff_that_is_not_read_says_cmyk() -> None:
    for channels, depth in ((4, 16), (5, 8)):
        extra = ["unspecified"] * (channels - 4) or None
        data = as_tiff(noise(channels, depth), photometric="separated", planarconfig="contig", extrasamples=extra)
        with pytest.raises(DecodeError, match=r"photometric 5 \(CMYK\).*or as CMYK of 8 bits: convert"):
            decode_image(data, 3)
