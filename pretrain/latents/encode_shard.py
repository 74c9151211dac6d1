"""Encodes one shard of pictures to one shard of latents.

Enters: the samples of a shard, in order. Leaves: a tar with `<key>.latent.safetensors` and the members that are carried
over, its index, and a note that it is done, written last: a shard is either finished or is encoded again. Why it
exists: a shard's bytes follow from the shard, the model and the options alone (which pictures share a batch included),
so that an interrupted job ends with the same bytes, whichever process encodes which shard.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from data_pipes.errors import SampleError, ShardError
from data_pipes.index.walk import index_shard
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import INDEX_SUFFIX, Manifest
from data_pipes.store.files import new_file, write_atomically
from data_pipes.store.transport import StorageConfig
from pretrain.latents.coder import PictureCoder
from pretrain.latents.options import LATENT_DTYPES, LATENT_MEMBER, EncodeOptions
from pretrain.latents.read_ahead import LoadedSample, PictureReader
from pretrain.latents.statistics import LatentSums, zero_sums


@dataclass(frozen=True)
class ShardNote:
    """What is kept of a finished shard; one without samples (all its pictures unreadable) has no file."""

    num_samples: int
    """in the shard"""
    skipped: tuple[dict[str, str], ...]
    """samples that were left out: {"key", "shard", "error"}"""
    index_sha256: str
    """of the shard's index; empty for a shard without samples"""
    sums: LatentSums
    """of the tensors `latent`"""

    @classmethod
    def load(cls, note: Path, shard: Path) -> ShardNote | None:
        """Reads the note of an earlier job.

        Args:
            note: file of the note.
            shard: file of the shard.

        Returns:
            The note, where its shard and index are there and intact; None: the shard has to be encoded again.
        """
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


class ShardEncoder:
    """Encodes shards of one data set, one after the other, while threads read and decode ahead."""

    def __init__(
        self,
        manifest: Manifest,
        coder: PictureCoder,
        options: EncodeOptions,
        *,
        workers: int = 2,
        storage: StorageConfig | None = None,
    ) -> None:
        """Starts the threads.

        Args:
            manifest: of the pictures.
            coder: with the model.
            options: what else decides the bytes of the latents.
            workers: number of threads, at least 1.
            storage: how the pictures' shards are read; None: the defaults.
        """
        self.manifest, self.coder, self.options = manifest, coder, options
        self._pictures = PictureReader(manifest, options, coder.config.in_channels, workers=workers, storage=storage)

    def close(self) -> None:
        """Ends the threads."""
        self._pictures.close()

    def encode(self, shard: int, target: Path, note: Path, on_sample: Callable[[], None]) -> ShardNote:
        """Encodes a shard under a temporary name, walks it strictly, indexes it, and gives it its name.

        Args:
            shard: its number in the manifest.
            target: file of the latents; their index goes beside it.
            note: file of the note, written last.
            on_sample: called for each sample.

        Returns:
            The note.

        Raises:
            SampleError: a picture is unusable, unless those are skipped.
            ShardError: the shard has changed since it was indexed.
            ValueError: a latent is not finite as it would be stored.
        """
        with new_file(target) as draft:
            num_samples, skipped, sums = self._write(shard, draft.file, on_sample)
            draft.file.flush()
            draft.keep = num_samples > 0
            index = index_shard(draft.path) if num_samples else None
        digest = index.save(index_path(target)) if index is not None else ""
        result = ShardNote(num_samples, tuple(skipped), digest, sums)
        write_atomically(note, json.dumps(asdict(result)).encode())
        return result

    def _write(
        self, shard: int, file: object, on_sample: Callable[[], None]
    ) -> tuple[int, list[dict[str, str]], LatentSums]:
        """Writes a shard's tar: (number of samples, samples left out, sums of the latents)."""
        from webdataset.writer import TarWriter

        num_samples, skipped = 0, []
        sums = zero_sums(self.coder.config.latent_channels)
        # Fixed owner, mode and time: encoding twice gives the same bytes.
        with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
            for window in self._pictures.windows(shard):
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

    def _encode(self, samples: list[LoadedSample]) -> dict[int, dict[str, Tensor]]:
        """Encodes samples; pictures of equal size share batches.

        Returns:
            id of the sample -> its tensors by their names, on the CPU as they are stored.
        """
        groups: dict[tuple[int, ...], list[LoadedSample]] = {}
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

    def _members(self, sample: LoadedSample, tensors: Mapping[str, Tensor], shard: int) -> dict[str, bytes]:
        """The members of a sample in the tar, by their extensions.

        Raises:
            ValueError: a latent is not finite.
        """
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

    def _skip(self, sample: LoadedSample, shard: int) -> dict[str, str]:
        """The entry of a sample that is left out.

        Raises:
            SampleError: such samples are not skipped.
        """
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
