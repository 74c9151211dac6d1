"""Where the time of one picture goes, and how far the cheaper ways of decoding are from the full one.

In this process and one thread: the steps of `TrainTransform.load`, the ways of libjpeg-turbo, and the whole, each over
all pictures in interleaved rounds, as CPU time. Then the differences of the 224-pixel results from a full decode and
bicubic resize, in dB (higher is closer), beside two yardsticks: bilinear instead of bicubic, and storing the result
once more as a JPEG of quality 95.

    python tools/bench_decode.py --source ../shared/data/photos_300.zip --size 500x375
    python tools/bench_decode.py --source ../shared/data/photos_300.zip --size stored --crop 112
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from bench_data import PHOTOGRAPHS, parse_size, read_jpegs, resized
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from data_pipes.decode import jpeg
from data_pipes.decode.picture import decode_image
from data_pipes.order.hashing import hash_uniform
from data_pipes.transforms.image import TrainTransform, resize

Pixels = NDArray[np.uint8]
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = PHOTOGRAPHS if PHOTOGRAPHS.exists() else None
    parser.add_argument("--source", type=Path, default=default, help="zip or folder of JPEGs; without: generated ones")
    parser.add_argument("--images", type=int, default=300, help="at most so many pictures of the source")
    parser.add_argument("--size", default="500x375", help="the pictures are resized to it; stored: left as they are")
    parser.add_argument("--crop", type=int, default=224, help="height and width of the result")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pictures = list(islice(read_jpegs(arguments.source), arguments.images))
    if arguments.size != "stored":
        pictures = [resized(data, parse_size(arguments.size)) for data in pictures]
    pictures = [data for data in pictures if jpeg.read_header(data) is not None]
    rows = hash_uniform(0, np.arange(len(pictures)), 0, TrainTransform.num_uniforms).tolist()
    for name, milliseconds in measure(steps(pictures, rows, arguments.crop), len(pictures), arguments.rounds).items():
        print(f"{name:44}{milliseconds:8.3f} ms of CPU per image")
    for name, values in differences(pictures, rows, arguments.crop).items():
        psnr, mean_abs = zip(*values, strict=True)
        print(
            f"{name:44}{statistics.median(psnr):6.1f} dB, worst {min(psnr):5.1f}, mean difference "
            f"{statistics.mean(mean_abs):5.2f} of 255, {len(values)} pictures"
        )


def steps(pictures: list[bytes], rows: list[list[float]], crop: int) -> dict[str, Step]:
    """What is timed, by name; each works through all pictures."""
    cheap, exact = TrainTransform((crop, crop)), TrainTransform((crop, crop), scaled_decode=False)
    headers = [header_of(data) for data in pictures]
    boxes = [exact.crop_box(header.height, header.width, row) for header, row in zip(headers, rows, strict=True)]
    half = [((header.height + 1) // 2, (header.width + 1) // 2) for header in headers]
    crops = [
        decode_image(data, 3)[:, top : top + height, left : left + width]
        for data, (top, left, height, width) in zip(pictures, boxes, strict=True)
    ]
    batch = torch.empty((3, crop, crop), dtype=torch.uint8)

    def decoded(**options: object) -> Step:
        return lambda: each(simplejpeg.decode_jpeg(data, "RGB", **options) for data in pictures)

    return {
        "decode alone": decoded(),
        "  chroma doubled, not interpolated": decoded(fastupsample=True),
        "  less exact inverse transform": decoded(fastdct=True),
        "  at 1/2": lambda: each(
            simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=2.0)
            for data, (height, width) in zip(pictures, half, strict=True)
        ),
        "header": lambda: each(jpeg.read_header(data) for data in pictures),
        "crop box": lambda: each(exact.crop_box(h.height, h.width, row) for h, row in zip(headers, rows, strict=True)),
        "resize": lambda: each(resize(part, (crop, crop)) for part in crops),
        "flip": lambda: each(batch.flip(-1) for _ in pictures),
        "copy into the batch": lambda: each(batch.copy_(batch.flip(0)) for _ in pictures),
        "decode_image, then the transform": lambda: each(
            batch.copy_(exact(decode_image(data, 3), row)) for data, row in zip(pictures, rows, strict=True)
        ),
        "load, exact": lambda: each(
            batch.copy_(exact.load(data, row, channels=3)) for data, row in zip(pictures, rows, strict=True)
        ),
        "load": lambda: each(
            batch.copy_(cheap.load(data, row, channels=3)) for data, row in zip(pictures, rows, strict=True)
        ),
    }


def measure(steps: dict[str, Step], num_images: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, in milliseconds of CPU per image; the first round warms up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            started = time.thread_time()
            steps[name]()
            if number:
                times[name].append((time.thread_time() - started) * 1000 / num_images)
    return {name: statistics.median(values) for name, values in times.items()}


def differences(pictures: list[bytes], rows: list[list[float]], crop: int) -> dict[str, list[tuple[float, float]]]:
    """(PSNR in dB, mean absolute difference) from the full decode's result, by what is changed."""
    transform, found = TrainTransform((crop, crop)), dict[str, list[tuple[float, float]]]()
    for data, row in zip(pictures, rows, strict=True):
        whole, header = decode_image(data, 3).permute(1, 2, 0).numpy(), header_of(data)
        top, left, height, width = transform.crop_box(header.height, header.width, row)
        changed = {"chroma doubled": simplejpeg.decode_jpeg(data, "RGB", fastupsample=True)}
        changed["less exact inverse transform"] = simplejpeg.decode_jpeg(data, "RGB", fastdct=True)
        box = slice(top, top + height), slice(left, left + width)
        right = to_size(whole[box], crop)
        pairs = {name: (to_size(pixels[box], crop), right) for name, pixels in changed.items()}
        pairs["yardstick: bilinear"] = to_size(whole[box], crop, "bilinear"), right
        pairs["yardstick: JPEG of quality 95"] = stored_again(right), right
        if transform._shrink(height, width) >= 2:
            half = jpeg.decode(data, header, 3, 2)
            rows_, columns = (slice(round(edge.start / 2), round(edge.stop / 2)) for edge in box)
            same = tuple(slice(2 * edge.start, 2 * edge.stop) for edge in (rows_, columns))
            pairs["decoded at 1/2, crops that allow it"] = (
                to_size(half[rows_, columns], crop),
                to_size(whole[same], crop),
            )
        for name, (one, other) in pairs.items():
            found.setdefault(name, []).append(difference(one, other))
    return found


def header_of(data: bytes) -> jpeg.JpegHeader:
    header = jpeg.read_header(data)
    assert header is not None
    return header


def each(items: object) -> None:
    for _ in items:  # type: ignore[attr-defined]
        pass


def to_size(pixels: Pixels, crop: int, mode: str = "bicubic") -> Pixels:
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    result: Pixels = functional.interpolate(image, (crop, crop), mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()
    return result


def stored_again(pixels: Pixels) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return np.asarray(Image.open(file))


def difference(one: Pixels, other: Pixels) -> tuple[float, float]:
    apart = one.astype(np.int32) - other.astype(np.int32)
    squared = float((apart * apart).mean())
    return 99.0 if squared == 0 else 10 * float(np.log10(255**2 / squared)), float(np.abs(apart).mean())


if __name__ == "__main__":
    main()
