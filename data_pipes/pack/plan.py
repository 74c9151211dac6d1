"""The plan of a pack: which files go into which split and shard, in which order.

Enters: a listing and `PackOptions`. Leaves: entries in packing order, and `ShardPlan`s. Why it exists: all is decided
here, before the first byte is written, as a pure function of source and options; so a killed pack can be continued and
gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipes.errors import SampleError
from data_pipes.pack.listing import Entry, Media
from data_pipes.pack.reencode_picture import PictureOptions, UnreadableFile, prepare_picture
from data_pipes.pack.reencode_video import VideoOptions, prepare_video
from data_pipes.pack.shard_writer import Prepare, ShardPlan
from data_pipes.pack.sources import Source

_NUM_PROBES: dict[Media, int] = {"pictures": 32, "videos": 4}
"""Files that are re-encoded beforehand to learn how much smaller the shards become."""
_SAMPLE_OVERHEAD_BYTES = 2048
"""What a sample takes in a tar beside its file: two headers, the block of the label and padding."""


@dataclass(frozen=True)
class PackOptions:
    """How a source becomes shards."""

    shard_size_bytes: int = 256 << 20
    """A shard is closed before it would become larger; with re-encoding this is an estimate."""
    shard_samples: int = 100_000
    """Samples in a shard, at most."""
    val_fraction: float = 0.0
    """Share of the files that goes to OUT/val, chosen by a hash of the key."""
    limit: int | None = None
    """Number of files taken from each source, the first ones in packing order; None takes all."""
    shuffle: bool = True
    """Whether the packing order is a permutation that follows from the seed and the keys, so that a shard mixes
    classes; else it is the natural order of the names."""
    seed: int = 0
    """Seed of the packing order; the validation split does not depend on it."""
    skip_unreadable: bool = False
    """Leave out files that cannot be read, and list them in pack.json, instead of stopping."""
    skip_missing: bool = False
    """Leave out files that a list of labels names and the source does not have, and list them in pack.json, instead of
    stopping."""
    pictures: PictureOptions = field(default_factory=PictureOptions)
    """How pictures are checked and re-encoded."""
    videos: VideoOptions = field(default_factory=VideoOptions)
    """How videos are checked and re-encoded."""

    def __post_init__(self) -> None:
        if self.shard_size_bytes < 1 or self.shard_samples < 1:
            raise ValueError(
                f"a shard of {self.shard_size_bytes} bytes and {self.shard_samples} samples; expected both >= 1"
            )
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected 0 (no validation set) or a share below 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; expected a number of files >= 1")

    def of(self, media: Media) -> PictureOptions | VideoOptions:
        """The options that are about one kind of files."""
        return self.videos if media == "videos" else self.pictures

    def preparation(self, media: Media) -> Prepare:
        """What happens to the bytes of each file."""
        if media == "videos":
            return lambda data: prepare_video(data, self.videos)
        return lambda data: prepare_picture(data, self.pictures)

    def reencodes(self, media: Media) -> bool:
        """Whether any file may be encoded again."""
        return self.videos.reencodes if media == "videos" else self.pictures.short_side is not None


def packing_order(entries: list[Entry], options: PackOptions) -> list[Entry]:
    """The entries sorted by a hash of seed and key, which no library's random generator can change; then cut to
    `options.limit`.
    """
    if options.shuffle:
        entries = sorted(entries, key=lambda entry: (_hash(f"{options.seed}/{entry.key}"), entry.key))
    return entries[: options.limit]


def split_entries(entries: list[Entry], val_fraction: float) -> dict[str, list[Entry]]:
    """Divides the entries into "train" and "val" by a hash of the key: a file stays where it is when others come or go.

    Args:
        entries: in packing order.
        val_fraction: expected share of "val", above 0 and below 1.

    Raises:
        ValueError: one of the two would be empty.
    """
    bound = int(val_fraction * 2**64)
    is_val = [_hash(f"val/{entry.key}") < bound for entry in entries]
    splits = {
        "train": [entry for entry, chosen in zip(entries, is_val, strict=True) if not chosen],
        "val": [entry for entry, chosen in zip(entries, is_val, strict=True) if chosen],
    }
    for name, chosen_entries in splits.items():
        if not chosen_entries:
            raise ValueError(
                f"a validation share of {val_fraction} of {len(entries)} files leaves none for {name}; change it or "
                "give --val SRC2"
            )
    return splits


def _hash(text: str) -> int:
    """The first 64 bits of the text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def shrink_factors(
    opened: dict[str, Source], ordered: dict[str, list[Entry]], options: PackOptions, media: Media
) -> dict[str, float]:
    """Bytes after re-encoding over bytes before, measured on a few files of each split; 1 where nothing is re-encoded.

    Args:
        opened: the source of each split.
        ordered: the entries of each split in packing order.
        options: how files are re-encoded.
        media: which kind of files.
    """
    factors = dict.fromkeys(ordered, 1.0)
    if not options.reencodes(media):
        return factors
    prepare, num_probes = options.preparation(media), _NUM_PROBES[media]
    for split, entries in ordered.items():
        before = after = 0
        for entry in entries[:: max(1, len(entries) // num_probes)][:num_probes]:
            try:
                data = opened[split].read(entry.file.name)
                after += len(prepare(data)[0])
                before += len(data)
            except (UnreadableFile, SampleError, OSError):
                continue  # reported when its shard is written
        factors[split] = after / before if before else 1.0
    return factors


def plan_shards(
    folder: Path, notes: Path, entries: list[Entry], shrink_factor: float, options: PackOptions
) -> Iterator[ShardPlan]:
    """Cuts the entries into shards of at most the wanted size and number of samples.

    Args:
        folder: where the shards go; its name is that of the split.
        notes: where the notes on finished shards go.
        entries: in packing order.
        shrink_factor: bytes after re-encoding over bytes before.
        options: the size and number.
    """
    start = size = 0
    number = 0
    for i, entry in enumerate(entries):
        added = int(entry.file.size_bytes * shrink_factor) + _SAMPLE_OVERHEAD_BYTES
        if i > start and (size + added > options.shard_size_bytes or i - start >= options.shard_samples):
            yield ShardPlan(folder, notes, folder.name, number, entries[start:i])
            start, size, number = i, 0, number + 1
        size += added
    yield ShardPlan(folder, notes, folder.name, number, entries[start:])
