"""What packing makes of a picture is, for training, the picture that came in: every format and mode, or a refusal."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from data_pipes.decode.formats import FILE_EXTENSIONS, FORMATS, IMAGE_EXTENSIONS
from data_pipes.decode.picture import decode_image
from data_pipes.errors import DecodeError
from data_pipes.pack.listing import SUFFIXES
from data_pipes.pack.reencode_picture import PictureOptions, UnreadableFile, prepare_picture
from tests.data_pipes.decode.picture_files import (
    GREY_ALPHA,
    RGB,
    RGBA,
    as_numpy,
    as_tiff,
    png,
)

HEIGHT, WIDTH = 40, 56


def smooth(channels: int, depth: int = 8) -> np.ndarray:
    """[HEIGHT, WIDTH, channels]: another slope in each channel, so that each shows what it is and how it lies."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 60.0
    slopes = [(0.9, 0.1), (0.1, 0.9), (0.4, 0.5), (-0.3, 0.2), (0.2, -0.4), (0.5, 0.0)]
    values = np.stack([0.4 + 0.5 * (a * y + b * x - 0.2) for a, b in slopes[:channels]], axis=2)
    return (values * (2**depth - 1)).round().astype(np.uint16 if depth == 16 else np.uint8)


def by_pil(kind: str, mode: str, **options: object) -> bytes:
    rgba = smooth(4)
    image = Image.fromarray(smooth(1, 16)[..., 0]) if mode in ("I;16", "I") else Image.fromarray(rgba)
    if mode in ("1", "P", "CMYK", "YCbCr", "LAB"):
        image = image.convert("RGB")
    if mode == "P+":
        image, options = image.convert("RGB").quantize(64), {"transparency": 3, **options}
    elif mode == "LAB":
        image = Image.fromarray(smooth(3), "LAB")
    elif mode == "P":
        image = image.quantize(64)
    elif image.mode != mode:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "P+", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "P+"),
    "PPM": ("1", "L", "RGB", "I"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "AVIF": ("RGB", "RGBA"),
    "TGA": ("L", "LA", "P", "RGB", "RGBA"),
    "QOI": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"),
}


def tiffs() -> Iterator[tuple[str, bytes]]:
    for depth in (8, 16):
        for channels in (1, 2, 3, 4, 5):
            pixels = smooth(channels, depth)
            for alpha in (None, "unassalpha", "assocalpha") if channels > 1 else (None,):
                for photometric in (
                    ("minisblack", "rgb") if channels > 3 else ("minisblack",) if channels < 3 else ("rgb",)
                ):
                    num_extra = channels - (3 if photometric == "rgb" else 1)
                    if alpha is not None and not num_extra:
                        continue
                    extra = ["unspecified"] * num_extra
                    extra[-1:] = [alpha or "unspecified"] if extra else []
                    layout = "contig" if channels > 1 else None
                    data = as_tiff(
                        pixels if channels > 1 else pixels[..., 0],
                        photometric=photometric,
                        planarconfig=layout,
                        extrasamples=extra or None,
                    )
                    yield f"TIFF {photometric} {channels} x {depth} {alpha}", data
    white = as_tiff(smooth(1)[..., 0], photometric="miniswhite")
    yield "TIFF white is zero", white


def text_ppm(largest: int) -> bytes:
    values = (smooth(3, 16).astype(np.int64) * largest // 65535).reshape(-1)
    return b"P3 # a comment\n%d %d\n%d\n" % (WIDTH, HEIGHT, largest) + b" ".join(b"%d" % value for value in values)


PICTURES = {
    **{f"{kind} {mode}": by_pil(kind, mode) for kind, modes in MODES.items() for mode in modes},
    **dict(tiffs()),
    **{f"npy {c} x {d}": as_numpy(smooth(c, d)) for c in (1, 2, 3, 4, 6) for d in (8, 16)},
    "npy without channels": as_numpy(smooth(1)[..., 0]),
    "PNG grey and alpha 16": png(smooth(2, 16), GREY_ALPHA, 16),
    "PNG RGB 16": png(smooth(3, 16), RGB, 16),
    "PNG RGBA 16": png(smooth(4, 16), RGBA, 16),
    "PPM 16": b"P6\n%d %d\n65535\n" % (WIDTH, HEIGHT) + smooth(3, 16).astype(">u2").tobytes(),
    "PPM 10 bits": b"P6 %d %d 1023\n" % (WIDTH, HEIGHT) + (smooth(3, 16) // 64).astype(">u2").tobytes(),
    "PPM text 16": text_ppm(65535),
    "PPM text 8": text_ppm(255),
}
NAMED_REFUSALS = {"PNG grey and alpha 16", "PNG RGB 16", "PNG RGBA 16", "PPM 16", "PPM 10 bits", "PPM text 16"}
"""What cannot be made smaller without loss, and says so."""


def attempt(read: Callable[[], torch.Tensor]) -> torch.Tensor | str:
    try:
        return read()
    except DecodeError as error:
        return error.cause


@pytest.mark.parametrize("name", PICTURES)
def test_what_was_packed_is_read_as_what_came_in(name: str) -> None:
    data = PICTURES[name]
    assert prepare_picture(data, PictureOptions())[0] == data
    assert prepare_picture(data, PictureOptions(verify="decode"))[0] == data
    if name in NAMED_REFUSALS:
        with pytest.raises(UnreadableFile, match=r"16.bit|16 bits"):
            prepare_picture(data, PictureOptions(short_side=20))
        return
    packed, extension = prepare_picture(data, PictureOptions(short_side=20))
    assert extension in IMAGE_EXTENSIONS
    for channels in (None, 1, 2, 3, 4, 5):
        before = attempt(lambda: decode_image(data, channels))  # noqa: B023
        after = attempt(lambda: decode_image(packed, channels))  # noqa: B023
        if isinstance(before, str) or isinstance(after, str):
            assert before == after
            continue
        assert (after.dtype, after.shape) == (before.dtype, (before.shape[0], 20, 28))
        if "P+" in name or "RGBA" in name or "LA" in name or "alpha" in name:
            continue  # where it is transparent, Pillow's colours are black
        means = functional.interpolate(before[None].float(), (20, 28), mode="area")[0]
        if name.endswith(" 1"):  # dithered
            means, after = functional.avg_pool2d(means, 4), functional.avg_pool2d(after.float(), 4)
        largest = 65535 if before.dtype == torch.uint16 else 255
        assert (after.float() - means).abs().mean() < 0.03 * largest, channels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_kept_and_applied_once(kind: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    for mode in ("RGB", "P") if kind == "TIFF" else ("RGB",):  # by both readers of TIFF
        data = by_pil(kind, mode, exif=exif)
        packed = prepare_picture(data, PictureOptions(short_side=20))[0]
        assert decode_image(packed, 3).shape == (3, 20, 28)  # training takes it as it is stored
        upright = [ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB") for file in (data, packed)]
        before, after = (np.asarray(image.resize((6, 6), Image.Resampling.BOX)).astype(int) for image in upright)
        assert np.abs(before - after).mean() < 8


def test_sixteen_bits_of_a_tiff_keep_the_lower_eight() -> None:
    pixels = smooth(3, 16)
    packed, extension = prepare_picture(as_tiff(pixels, photometric="rgb"), PictureOptions(short_side=20))
    after = decode_image(packed, 3).to(torch.int64)
    assert extension == "tif"
    means = pixels.reshape(20, 2, 28, 2, 3).mean((1, 3))
    assert np.abs(after.permute(1, 2, 0).numpy() - means)[1:-1, 1:-1].max() < 64  # a quarter of an 8-bit step


def test_deep_ppm_against_the_numbers_in_it() -> None:
    values = smooth(3, 16)
    for name in ("PPM 16", "PPM text 16"):
        assert np.array_equal(decode_image(PICTURES[name], 3).permute(1, 2, 0).numpy(), values)
    ten = decode_image(PICTURES["PPM 10 bits"], 3).permute(1, 2, 0).numpy()
    assert np.array_equal(ten, np.rint(values // 64 / 1023 * 65535).astype(np.uint16))


def test_a_tiff_keeps_its_profile_where_it_stays_a_tiff() -> None:
    data = as_tiff(smooth(3, 16), photometric="rgb", iccprofile=b"profile!" * 20)
    packed, _ = prepare_picture(data, PictureOptions(short_side=20))
    assert b"profile!" * 20 in packed


def sixteen_bit_sgi(channels: int) -> bytes:
    header = b"\x01\xda\x00\x02" + (3 if channels > 1 else 2).to_bytes(2, "big")
    header += b"".join(side.to_bytes(2, "big") for side in (WIDTH, HEIGHT, channels))
    return header.ljust(512, b"\0") + np.moveaxis(smooth(channels, 16), 2, 0).astype(">u2").tobytes()


def test_what_pil_would_cut_is_refused_by_name() -> None:
    deep_j2k = bytearray(by_pil("JPEG2000", "RGB"))
    sizes = deep_j2k.index(b"\xff\x4f\xff\x51") + 42
    deep_j2k[sizes : sizes + 9 : 3] = bytes([15]) * 3  # 16 bits per component
    for data, name in ((sixteen_bit_sgi(3), "SGI"), (sixteen_bit_sgi(1), "SGI"), (bytes(deep_j2k), "JPEG2000")):
        for read in (lambda: decode_image(data, None), lambda: prepare_picture(data, PictureOptions())):  # noqa: B023
            with pytest.raises(ValueError, match=f"{name} picture of 16 bits per channel"):
                read()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(64), "HEIC"),
        (b"\xff\x0a" + bytes(64), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "JPEG XL"),
    ],
)
def test_formats_that_are_not_read_are_named(data: bytes, name: str) -> None:
    with pytest.raises(DecodeError, match=f"a {name} picture .* this format is not read: convert it"):
        decode_image(data, 3)
    with pytest.raises(UnreadableFile, match=f"a {name} picture"):
        prepare_picture(data, PictureOptions())


def test_one_list_of_formats() -> None:
    assert SUFFIXES["pictures"] == {f".{extension}" for extension in FILE_EXTENSIONS}
    assert {"npy", "gif", "avif", "jfif", "jpe", "heic", "jxl", *IMAGE_EXTENSIONS} < set(FILE_EXTENSIONS)
    assert len(set(FILE_EXTENSIONS)) == len(FILE_EXTENSIONS)
    pil_names = {"jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "ppm": "PPM", "jp2": "JPEG2000"}
    for kind in FORMATS:
        if kind.is_read and kind.name != "NumPy":
            name = kind.extensions[0]
            data = by_pil(pil_names.get(name, kind.name), "RGB") if name != "gif" else by_pil("GIF", "P")
            assert prepare_picture(data, PictureOptions())[1] == {"tiff": "tif"}.get(name, name)


@pytest.mark.parametrize(("kind", "extension"), [("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_of_animations_and_pages_the_first_is_read(kind: str, extension: str) -> None:
    first, second = (Image.fromarray(pixels) for pixels in (smooth(3), smooth(3)[::-1]))
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    assert prepare_picture(file.getvalue(), PictureOptions()) == (file.getvalue(), extension)
    difference = decode_image(file.getvalue(), 3).permute(1, 2, 0).numpy().astype(int) - smooth(3)
    assert np.abs(difference).mean() < 8  # GIF has 256 colours
    with pytest.raises(UnreadableFile, match=rf"several frames \({extension}\)"):
        prepare_picture(file.getvalue(), PictureOptions(short_side=20))


def test_an_extra_that_pil_cannot_be_asked_for() -> None:
    """A format that has no ending in the table is refused by name, not packed under an ending that it does not have."""
    with pytest.raises(UnreadableFile, match="in the format PCX; expected JPEG, PNG, WebP"):
        prepare_picture(by_pil("PCX", "RGB"), PictureOptions())
