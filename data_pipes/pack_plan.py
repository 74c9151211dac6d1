"""The plan of a pack: which pictures go into which split and shard, in which order.

Enters: a listing and `PackOptions`. Leaves: pictures in packing order, and `ShardPlan`s. Why it exists: all is decided
here, before the first byte is written, as a pure function of source and options; so a killed pack can be continued and
gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipes.reencode import PictureOptions, UnreadablePicture, prepare_picture
from data_pipes.shard_writer import ShardPlan
from data_pipes.sources import Picture, Source

# Pictures that are re-encoded beforehand to learn how much smaller the shards become.
_NUM_PROBES = 32
_SAMPLE_OVERHEAD_BYTES = 2048
# two headers, the block of the label and padding


@dataclass(frozen=True)
class PackOptions:
    """How a source becomes shards."""

    shard_size_bytes: int = 256 << 20
    # a shard is closed before it would become larger; with re-encoding this is an estimate
    shard_samples: int = 100_000
    # samples in a shard, at most
    val_fraction: float = 0.0
    # share of the pictures that goes to OUT/val, chosen by a hash of the key
    limit: int | None = None
    # pictures taken from each source, the first ones in packing order
    shuffle: bool = True
    # packing order is a permutation that follows from the seed and the keys, so that a shard mixes classes
    seed: int = 0
    # of the packing order; the validation split does not depend on it
    skip_unreadable: bool = False
    # leave out pictures that cannot be read, and list them in pack.json, instead of stopping
    pictures: PictureOptions = field(default_factory=PictureOptions)

    def __post_init__(self) -> None:
        if self.shard_size_bytes < 1 or self.shard_samples < 1:
            raise ValueError(
                f"a shard of {self.shard_size_bytes} bytes and {self.shard_samples} samples; expected both >= 1"
            )
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected 0 (no validation set) or a share below 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; expected a number of pictures >= 1")


def packing_order(pictures: list[Picture], options: PackOptions) -> list[Picture]:
    """Sorted by a hash of seed and key: a permutation that no library's generator can change."""
    if options.shuffle:
        pictures = sorted(pictures, key=lambda picture: (_hash(f"{options.seed}/{picture.key}"), picture.key))
    return pictures[: options.limit]


def split_pictures(pictures: list[Picture], val_fraction: float) -> dict[str, list[Picture]]:
    """ "train" and "val", by a hash of the key: a picture stays where it is when others come or go."""
    bound = int(val_fraction * 2**64)
    is_val = [_hash(f"val/{picture.key}") < bound for picture in pictures]
    splits = {
        "train": [picture for picture, chosen in zip(pictures, is_val, strict=True) if not chosen],
        "val": [picture for picture, chosen in zip(pictures, is_val, strict=True) if chosen],
    }
    for name, chosen_pictures in splits.items():
        if not chosen_pictures:
            raise ValueError(
                f"a validation share of {val_fraction} of {len(pictures)} pictures leaves none for {name}; change "
                "it or give --val SRC2"
            )
    return splits


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def shrink_factors(
    opened: dict[str, Source], ordered: dict[str, list[Picture]], options: PackOptions
) -> dict[str, float]:
    """Bytes after over bytes before re-encoding, measured on a few pictures of each split."""
    factors = dict.fromkeys(ordered, 1.0)
    if options.pictures.short_side is None:
        return factors
    for split, pictures in ordered.items():
        before = after = 0
        for picture in pictures[:: max(1, len(pictures) // _NUM_PROBES)][:_NUM_PROBES]:
            try:
                data = opened[split].read(picture.file.name)
                after += len(prepare_picture(data, options.pictures)[0])
                before += len(data)
            except (UnreadablePicture, OSError):
                continue  # reported when its shard is written
        factors[split] = after / before if before else 1.0
    return factors


def plan_shards(
    folder: Path, notes: Path, pictures: list[Picture], shrink_factor: float, options: PackOptions
) -> Iterator[ShardPlan]:
    """Cuts the pictures into shards of at most the wanted size and number of samples."""
    start = size = 0
    number = 0
    for i, picture in enumerate(pictures):
        added = int(picture.file.size_bytes * shrink_factor) + _SAMPLE_OVERHEAD_BYTES
        if i > start and (size + added > options.shard_size_bytes or i - start >= options.shard_samples):
            yield ShardPlan(folder, notes, folder.name, number, pictures[start:i])
            start, size, number = i, 0, number + 1
        size += added
    yield ShardPlan(folder, notes, folder.name, number, pictures[start:])
