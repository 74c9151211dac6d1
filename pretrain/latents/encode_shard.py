"""Encodes one shard of pictures to one shard of latents.

Enters: the samples of a shard, in order. Leaves: a tar with `<key>.latent.safetensors` and the members that are carried
over, its index, and a note that it is done, written last: a shard is either finished or is encoded again. Why it
exists: a shard's bytes follow from the shard, the model and the options alone (which pictures share a batch included),
so that an interrupted job ends with the same bytes, whichever process encodes which shard.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.errors import SampleError, ShardError
from data_pipes.index.walk import index_shard
from data_pipes.shards.collection import Place
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import INDEX_SUFFIX, Manifest
from data_pipes.shards.members import IMAGE_EXTENSIONS, picture_of
from data_pipes.shards.reader import RawSample, ShardReader
from data_pipes.store.files import write_atomically
from data_pipes.store.storage import Storage
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.image import EvalTransform
from pretrain.latents.coder import PictureCoder, Precision
from pretrain.latents.statistics import LatentSums, zero_sums

LATENT_MEMBER = "latent.safetensors"
LATENT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WINDOW_BATCHES = 4
# of pictures of any size: among so many batches those of equal size are encoded together


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the bytes of latent shards, beside the model and the pictures."""

    size: tuple[int, int] | None = None
    """(height, width) of the centre crop in pixels; None: each picture as it is"""
    short_side: int | None = None
    """in pixels, of the resized picture before the crop; None: the crop's longer side"""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """of the stored latents"""
    precision: Precision = "fp32"
    """of the encoder's forward pass"""
    batch_size: int = 32
    """pictures per forward pass"""
    mirrored: bool = False
    """add the latent of the left-right mirrored picture to each sample, as the tensor `mirrored`"""
    carried: tuple[str, ...] = ("cls", "json", "txt", "caption")
    """extensions of the members that are copied from the pictures' shards"""
    skip_unreadable: bool = False
    """leave out samples without a readable picture, and list them; False: they stop the job"""
    tile: int | None = None
    """pictures with a longer side are encoded in tiles of so many pixels"""
    bit_depth: int = 8
    """8 or 16, of the pictures that the model was trained on"""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """height * width of a picture, at most"""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.bit_depth not in (8, 16):
            raise ValueError(f"batch size {self.batch_size}, {self.bit_depth} bits; expected at least 1, and 8 or 16")
        if self.size is None and self.short_side is not None:
            raise ValueError("a short side without a size: give both, or neither to keep each picture as it is")
        pictures = [name for name in self.carried if name in IMAGE_EXTENSIONS or name == LATENT_MEMBER]
        if pictures:
            raise ValueError(f"{pictures[0]!r} cannot be carried over: latents take the place of pictures")
        self.transform()

    def transform(self) -> EvalTransform | None:
        """From a decoded picture to what is encoded; None: nothing is changed."""
        if self.size is None:
            return None
        return EvalTransform(self.size, max(self.size) if self.short_side is None else self.short_side)


@dataclass(frozen=True)
class ShardNote:
    """A finished shard; one without samples (all its pictures unreadable) has no file."""

    num_samples: int
    skipped: tuple[dict[str, str], ...]
    """samples that were left out: {"key", "shard", "error"}"""
    index_sha256: str
    sums: LatentSums
    """of the tensors `latent`"""

    @classmethod
    def load(cls, note: Path, shard: Path) -> ShardNote | None:
        """The note of an earlier run, if its shard and index are there and intact."""
        try:
            content = json.loads(note.read_text(encoding="utf-8"))
            sums, skipped = content["sums"], tuple(content["skipped"])
            kept = LatentSums(sums["count"], tuple(sums["total"]), tuple(sums["square_total"]))
            found = cls(content["num_samples"], skipped, content["index_sha256"], kept)
            if found.num_samples:
                index = ShardIndex.load(index_path(shard), found.index_sha256)
                if index.size_bytes != shard.stat().st_size:
                    return None
        except (OSError, ShardError, ValueError, TypeError, KeyError):
            return None
        return found


@dataclass(frozen=True)
class Loaded:
    """A sample whose picture was read, or why it was not."""

    raw: RawSample
    picture: Tensor | None
    """[C, H, W], as it is encoded"""
    error: SampleError | None = None


class ShardEncoder:
    """Encodes shards of one data set, one after the other. `workers` threads read and decode ahead."""

    def __init__(
        self,
        manifest: Manifest,
        coder: PictureCoder,
        options: EncodeOptions,
        *,
        workers: int = 2,
        storage: StorageConfig | None = None,
    ) -> None:
        self.manifest, self.coder, self.options = manifest, coder, options
        self._transform = options.transform()
        self._reader = ShardReader(manifest, (*IMAGE_EXTENSIONS, *options.carried), Storage(storage))
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def encode(self, shard: int, target: Path, note: Path, on_sample: Callable[[], None]) -> ShardNote:
        """Encodes a shard to `target` under a temporary name, walks it strictly, indexes it and renames it.

        Raises SampleError for an unusable picture (unless they are skipped), ShardError for a changed shard, ValueError
        for a latent that is not finite as it would be stored.
        """
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                num_samples, skipped, sums = self._write(shard, file, on_sample)
                file.flush()
                os.fsync(file.fileno())
            digest = ""
            if num_samples:
                index = index_shard(temporary)
                os.replace(temporary, target)
                digest = index.save(index_path(target))
        finally:
            temporary.unlink(missing_ok=True)
        result = ShardNote(num_samples, tuple(skipped), digest, sums)
        write_atomically(note, json.dumps(asdict(result)).encode())
        return result

    def _write(
        self, shard: int, file: object, on_sample: Callable[[], None]
    ) -> tuple[int, list[dict[str, str]], LatentSums]:
        from webdataset.writer import TarWriter

        num_samples, skipped = 0, []
        sums = zero_sums(self.coder.config.latent_channels)
        # Fixed owner, mode and time: encoding twice gives the same bytes.
        with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
            for window in self._windows(shard):
                readable = [sample for sample in window if sample.picture is not None]
                latents = self._encode(readable)
                for sample in window:
                    if sample.error is not None:
                        skipped.append(self._skip(sample, shard))
                    else:
                        tensors = latents[id(sample)]
                        writer.write({"__key__": sample.raw.key, **self._members(sample, tensors, shard)})
                        sums += LatentSums.of(tensors["latent"])
                        num_samples += 1
                    on_sample()
        return num_samples, skipped, sums

    def _windows(self, shard: int) -> Iterator[list[Loaded]]:
        """The samples of a shard in order, in groups that are encoded together; the next group is read meanwhile."""
        num_samples = self.manifest.shards[shard].num_samples
        length = self.options.batch_size * (_WINDOW_BATCHES if self.options.size is None else 1)
        ahead: deque[list[Future[Loaded]]] = deque()
        try:
            for first in range(0, num_samples, length):
                numbers = range(first, min(first + length, num_samples))
                ahead.append([self._pool.submit(self._load, shard, number) for number in numbers])
                if len(ahead) > 1:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()

    def _load(self, shard: int, number: int) -> Loaded:
        raw = next(self._reader.read_many([Place(shard, number)]))
        stored = torch.uint8 if self.options.bit_depth == 8 else torch.uint16
        try:
            picture = picture_of(raw, self.coder.config.in_channels, stored, self.options.max_pixels)
            return Loaded(raw, (picture if self._transform is None else self._transform(picture)).contiguous())
        except SampleError as error:
            return Loaded(raw, None, error)

    def _encode(self, samples: list[Loaded]) -> dict[int, dict[str, Tensor]]:
        """id of the sample -> its tensors, on the CPU as they are stored. Pictures of equal size share batches."""
        groups: dict[tuple[int, ...], list[Loaded]] = {}
        for sample in samples:
            assert sample.picture is not None
            groups.setdefault(tuple(sample.picture.shape), []).append(sample)
        tensors: dict[int, dict[str, Tensor]] = {}
        for group in groups.values():
            for first in range(0, len(group), self.options.batch_size):
                batch = group[first : first + self.options.batch_size]
                pictures = torch.stack([sample.picture for sample in batch if sample.picture is not None])
                views = {"latent": pictures, **({"mirrored": pictures.flip(-1)} if self.options.mirrored else {})}
                stored = {
                    name: self.coder.encode(view).to(LATENT_DTYPES[self.options.dtype]).cpu()
                    for name, view in views.items()
                }
                for row, sample in enumerate(batch):
                    tensors[id(sample)] = {name: rows[row].contiguous() for name, rows in stored.items()}
        return tensors

    def _members(self, sample: Loaded, tensors: Mapping[str, Tensor], shard: int) -> dict[str, bytes]:
        assert sample.picture is not None
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError(
                f"{sample.raw.key} in {self.manifest.shards[shard].url}: its latent is not finite as "
                f"{self.options.dtype}; store fp32 or bf16, encode with precision fp32, or look for a broken model"
            )
        height, width = sample.picture.shape[1:]
        # One entry alone: safetensors keeps no order among several, and the bytes would differ from run to run.
        latent = safetensors.torch.save(dict(tensors), metadata={"image_size": f"{height}x{width}"})
        return {LATENT_MEMBER: latent, **{n: d for n, d in sample.raw.members.items() if n in self.options.carried}}

    def _skip(self, sample: Loaded, shard: int) -> dict[str, str]:
        url = self.manifest.shards[shard].url
        assert sample.error is not None
        if not self.options.skip_unreadable:
            raise SampleError(
                sample.error.cause,
                f"{sample.raw.key} in {url}: {sample.error}; repair or remove the sample, or leave out and list such "
                "samples with --skip-unreadable",
            ) from sample.error
        return {"key": sample.raw.key, "shard": url, "error": str(sample.error)}


def index_path(shard: Path) -> Path:
    """Where the index of a latent shard lies."""
    return shard.with_name(shard.name + INDEX_SUFFIX)
