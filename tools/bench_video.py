"""CPU time per clip of our video loading, against PyAV and torchcodec used directly, on the same generated videos.

Clips of 16 frames with stride 4, random resized crop to 224 (bilinear, antialias, uint8) and flip, from the bytes of an
H.264 file; every variant takes the same windows. `pyav` is the usual code: decode from the beginning to the last wanted
frame, keep the wanted ones, torchvision's transforms. `torchcodec` asks its decoder for the frames (one thread) and
uses the same transforms; it runs where FFmpeg is installed. With R repeats a video is decoded once for R clips, in
all variants. Rounds are interleaved and swap their order, ratios are medians of the rounds' ratios, and CPU time is
counted.

`loader` is our whole loader over a tar of these videos, in the main thread: order, reading, clips, batches of 4.
`webdataset` is its stock pipeline over the same tar: shuffle, to_tuple, the `pyav` code in map, batches of 4. Both take
the same windows.

--memory N loads N clips, of which one in ten fails (a file cut short), and prints the process's memory after each
1,000.

    python tools/bench_video.py
    python tools/bench_video.py --rounds 9 --json
    python tools/bench_video.py --memory 10000 --size 120 160 --gops 32 --videos 8
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import psutil
import skimage.data
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from data_pipes.batch import BatchPlan
from data_pipes.config import DataConfig
from data_pipes.errors import SampleError
from data_pipes.index.index import index_shards
from data_pipes.loader import Loader
from data_pipes.open import open_dataset
from data_pipes.order.hashing import hash_uniform
from data_pipes.transforms.clip_sampling import ClipSampling
from data_pipes.transforms.clips import ClipTransform

FRAMES, STRIDE, SIZE, LENGTH, RATE = 16, 4, 224, 300, 30
CROP_SCALE, BATCH = (0.5, 1.0), 4
PICTURES = ("astronaut", "coffee", "chelsea", "rocket")
# photographs that scikit-image carries
Load = Callable[[bytes, list[float], ClipSampling], torch.Tensor]
Stream = Callable[[Path, ClipSampling], Iterator[torch.Tensor]]
# batches [B, R, ...] of an endless loader


@dataclass(frozen=True)
class Result:
    """Medians over the rounds. Names: variant, GOP and repeats -> clips per CPU-second; pairs -> ratio of CPU times."""

    clips_per_cpu_s: dict[str, float]
    ratios: dict[str, float]
    video_bytes: dict[str, int]
    videos: int
    rounds: int
    torchcodec: str


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    height, width = arguments.size
    videos = {
        gop: [generated_video(gop, number, height, width) for number in range(arguments.videos)]
        for gop in arguments.gops
    }
    if arguments.memory:
        watch_memory([data for files in videos.values() for data in files], arguments.memory, arguments.json)
        return
    loads: dict[str, Load] = {"ours": load_ours, "pyav": load_pyav}
    reason = why_no_torchcodec(videos[arguments.gops[0]][0])
    if not reason:
        loads["torchcodec"] = load_torchcodec
    with tempfile.TemporaryDirectory(prefix="bench_video") as folder:
        shards = {gop: write_shard(Path(folder) / f"gop{gop}", files) for gop, files in videos.items()}
        result = measure(loads, videos, shards, arguments.repeats, arguments.rounds, reason or "runs")
    print(json.dumps(asdict(result)) if arguments.json else describe(result, height, width))
    too_slow = [name for name, ratio in result.ratios.items() if ratio < (arguments.require_ratio or 0)]
    if too_slow:
        print(f"below {arguments.require_ratio}: {', '.join(too_slow)}", file=sys.stderr)
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 340), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--gops", type=int, nargs="+", default=[250, 32], help="frames from keyframe to keyframe")
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 4], help="clips per decoded video")
    parser.add_argument("--videos", type=int, default=4, help=f"of {LENGTH} frames each")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--memory", type=int, metavar="N", help="load N clips and print the memory; nothing else")
    parser.add_argument("--require-ratio", type=float, help="exit 1 when any ratio of CPU times is below this, e.g. 1")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    return parser.parse_args()


def generated_video(gop: int, number: int, height: int, width: int) -> bytes:
    """Ten seconds of H.264: a photograph, panned and zoomed, with the noise of a camera."""
    picture = Image.fromarray(getattr(skimage.data, PICTURES[number % len(PICTURES)])())
    rng = np.random.default_rng(number)
    with tempfile.TemporaryDirectory(prefix="bench_video") as folder:
        path = Path(folder) / "video.mp4"
        with av.open(path, "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=RATE, options={"preset": "medium", "crf": "23"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
            for time_step in range(LENGTH):
                pixels = view(picture, time_step, height, width) + rng.integers(-6, 7, (height, width, 3))
                frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path.read_bytes()


def view(picture: Image.Image, time_step: int, height: int, width: int) -> NDArray[np.int64]:
    zoom = 0.7 + 0.2 * np.sin(time_step / 60)
    scale = zoom * min(picture.width / width, picture.height / height)
    box_width, box_height = width * scale, height * scale
    left = (picture.width - box_width) * (0.5 + 0.5 * np.sin(time_step / 47))
    top = (picture.height - box_height) * (0.5 + 0.5 * np.cos(time_step / 39))
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box), np.int64)


def load_ours(data: bytes, uniforms: list[float], sampling: ClipSampling) -> torch.Tensor:
    return ClipTransform((SIZE, SIZE), CROP_SCALE, sampling=sampling).load(data, uniforms)


def load_pyav(data: bytes, uniforms: list[float], sampling: ClipSampling) -> torch.Tensor:
    windows = windows_of(uniforms, sampling)
    wanted, last = set(windows.flatten().tolist()), int(windows.max())
    frames: dict[int, NDArray[np.uint8]] = {}
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frames[number] = frame.to_ndarray(format="rgb24")
            if number == last:
                break
    clips = [torch.from_numpy(np.stack([frames[i] for i in window])) for window in windows.tolist()]
    return torch.stack([usual_transform(clip.permute(0, 3, 1, 2)) for clip in clips])


def load_torchcodec(data: bytes, uniforms: list[float], sampling: ClipSampling) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    windows = windows_of(uniforms, sampling)
    decoder = VideoDecoder(data, num_ffmpeg_threads=1)
    frames = decoder.get_frames_at(indices=windows.flatten().tolist()).data
    return torch.stack([usual_transform(clip) for clip in frames.unflatten(0, windows.shape)])


usual_transform = v2.Compose([v2.RandomResizedCrop(SIZE, CROP_SCALE, antialias=True), v2.RandomHorizontalFlip()])
# bilinear, on uint8 [T, C, H, W]


def windows_of(uniforms: list[float], sampling: ClipSampling) -> NDArray[np.int64]:
    """The frames of ClipSampling, for a video of known length."""
    room = LENGTH - (FRAMES - 1) * STRIDE
    starts = [int(uniform * room) for uniform in uniforms[: sampling.repeats]]
    return np.add.outer(np.array(starts), np.arange(FRAMES) * STRIDE)


def why_no_torchcodec(data: bytes) -> str:
    """Empty where torchcodec runs."""
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(data)
    except (ImportError, RuntimeError, OSError) as error:
        return f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def write_shard(folder: Path, files: list[bytes]) -> Path:
    """A data set of the videos, eight times each: one tar, its index and manifest."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "shard-000000.tar")) as writer:
        for number, data in enumerate(files * 8):
            writer.write({"__key__": f"{number:03d}", "mp4": data, "cls": b"0"})
    index_shards([folder / "shard-000000.tar"], folder)
    return folder


def stream_ours(folder: Path, sampling: ClipSampling) -> Iterator[torch.Tensor]:
    config = DataConfig(train=str(folder), video=sampling, crop_scale=CROP_SCALE)
    dataset = open_dataset(config, image_size=(SIZE, SIZE), channels=3, global_batch=BATCH)
    for batch in Loader(dataset, BatchPlan(BATCH, BATCH), config).batches(0):
        yield batch.images


def stream_webdataset(folder: Path, sampling: ClipSampling) -> Iterator[torch.Tensor]:
    positions = iter(range(1 << 30))

    def load(sample: tuple[bytes, bytes]) -> tuple[torch.Tensor]:
        return (load_pyav(sample[0], uniforms_of(next(positions), sampling), sampling),)

    dataset = webdataset.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False).repeat()
    for (clips,) in dataset.shuffle(100).to_tuple("mp4", "cls").map(load).batched(BATCH):
        yield clips


def measure(
    loads: dict[str, Load],
    videos: dict[int, list[bytes]],
    shards: dict[int, Path],
    repeats: list[int],
    rounds: int,
    torchcodec: str,
) -> Result:
    """The first round warms up and is dropped."""
    cpu_s: dict[str, list[float]] = {}
    cases = [(gop, count) for gop in videos for count in repeats]
    streams: dict[str, Stream] = {"loader": stream_ours, "webdataset": stream_webdataset}
    running = {
        label(name, gop, count): stream(shards[gop], ClipSampling(FRAMES, STRIDE, repeats=count))
        for name, stream in streams.items()
        for gop, count in cases
    }
    names = [*loads, *streams]
    for number in range(rounds + 1):
        for gop, count in cases:
            for name in names if number % 2 else names[::-1]:
                title = label(name, gop, count)
                if name in loads:
                    sampling = ClipSampling(FRAMES, STRIDE, repeats=count)
                    taken = time_clips(loads[name], videos[gop], sampling, number)
                else:
                    taken = time_stream(running[title], -(-2 * len(videos[gop]) // BATCH), count)
                if number:
                    cpu_s.setdefault(title, []).append(taken)
    ratios = {}
    for name, ours in [*((name, "ours") for name in loads if name != "ours"), ("webdataset", "loader")]:
        for gop, count in cases:
            pairs = zip(cpu_s[label(name, gop, count)], cpu_s[label(ours, gop, count)], strict=True)
            ratios[f"{label(name, gop, count)} / {ours}"] = statistics.median(a / b for a, b in pairs)
    speeds = {name: 1 / statistics.median(values) for name, values in cpu_s.items()}
    sizes = {f"GOP {gop}": sum(map(len, files)) // len(files) for gop, files in videos.items()}
    return Result(speeds, ratios, sizes, len(next(iter(videos.values()))), rounds, torchcodec)


def time_clips(load: Load, files: list[bytes], sampling: ClipSampling, number: int) -> float:
    """CPU seconds per clip over two clips' worth of every video."""
    started, clips = time.process_time(), 0
    for position, data in enumerate(files * 2):
        clips += len(load(data, uniforms_of(number * 1000 + position, sampling), sampling))
    return (time.process_time() - started) / clips


def time_stream(stream: Iterator[torch.Tensor], batches: int, repeats: int) -> float:
    """CPU seconds per clip over some batches."""
    started = time.process_time()
    for _ in range(batches):
        assert next(stream).shape[:2] == (BATCH, repeats)
    return (time.process_time() - started) / (batches * BATCH * repeats)


def uniforms_of(position: int, sampling: ClipSampling) -> list[float]:
    num_uniforms = ClipTransform((SIZE, SIZE), sampling=sampling).num_uniforms
    uniforms: list[float] = hash_uniform(0, [position], 0, num_uniforms)[0].tolist()
    return uniforms


def watch_memory(files: list[bytes], num_clips: int, as_json: bool) -> None:
    """Prints the process's memory (resident, MiB) after each 1,000 clips."""
    process, sampling = psutil.Process(), ClipSampling(FRAMES, STRIDE)
    failed, marks = 0, {}
    for number in range(num_clips):
        data = files[number % len(files)]
        try:
            load_ours(data[: -len(data) // 3] if number % 10 == 9 else data, uniforms_of(number, sampling), sampling)
        except SampleError:
            failed += 1
        if (number + 1) % 1000 == 0:
            marks[number + 1] = round(process.memory_info().rss / 2**20, 1)
            if not as_json:
                print(f"{number + 1:9,} clips, {failed:,} of them failed: {marks[number + 1]:8.1f} MiB", flush=True)
    if as_json:
        print(json.dumps({"rss_mib": marks, "failed": failed, "open_files": process.num_fds()}))


def label(name: str, gop: int, repeats: int) -> str:
    return f"{name}, GOP {gop}, repeats {repeats}"


def describe(result: Result, height: int, width: int) -> str:
    sizes = ", ".join(f"{name}: {size:,} bytes" for name, size in result.video_bytes.items())
    lines = [
        f"{result.videos} videos of {LENGTH} frames, {width}x{height} ({sizes}); {result.rounds} rounds; torchcodec "
        f"{result.torchcodec}",
        f"{'':36}{'clips per CPU-second':>22}",
    ]
    lines += [f"{name:36}{value:22.1f}" for name, value in result.clips_per_cpu_s.items()]
    lines += ["CPU time against ours"]
    lines += [f"{name:44}{value:14.2f}" for name, value in result.ratios.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
