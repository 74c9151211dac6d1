"""What can be wrong with data, as exceptions.

A `ShardError` is about a whole shard, a `SampleError` about one sample, a `BadDataError` about too many of these.
"""

from __future__ import annotations

from typing import Literal, get_args

Cause = Literal[
    # pictures
    "decode",  # damaged, cut short or of an unknown format
    "pixels",  # more pixels than the limit allows, of a video as well
    "channels",  # another number of channels than the model takes
    "bit_depth",  # 16 bits per channel in a data set of 8
    "aspect",  # too thin to be resized
    "no_image",  # the sample has no picture
    "checksum",  # a PNG decodes, but not to what its checksums say; only `tessera data verify` looks
    # videos
    "video",  # damaged or cut short
    "codec",  # not one of the codecs that are read
    "frames",  # frames are missing, damaged or too many
    "no_video",  # the sample has no video
    "encode",  # encoding it anew lost frames; only `tessera pack` does so
    # the other members of a sample
    "label",  # not a label of this data set
    "caption",  # no text, or too long
    "metadata",  # no JSON object that can be used
]
"""Why a sample is bad: the names that bad samples are counted by."""

CAUSES: tuple[Cause, ...] = get_args(Cause)
"""The causes in the order in which every rank lists them."""


class UserError(Exception):
    """An error whose message is for the user: commands print it and exit 2, without a traceback.

    So are ValueError (a mistake in the input), OSError (a disk, a store, a server) and ImportError (a package that is
    missing); this is the base of those that are none of these.
    """


class ShardError(ValueError):
    """A shard or its index cannot be used: which one, what was found, what to do."""


class EmptyShardError(ShardError):
    """A shard is intact and holds no sample."""


class SampleError(ValueError):
    """One sample is unusable; it is replaced and counted."""

    def __init__(self, cause: Cause, message: str) -> None:
        """
        Args:
            cause: what it is counted by.
            message: what was found, for people.
        Raises:
            ValueError: the cause is not one of `Cause`, so no metric would show it.
        """
        if cause not in CAUSES:
            raise ValueError(f"{cause!r} is no cause of a bad sample; declare it in data_pipes.errors.Cause")
        super().__init__(cause, message)
        self.cause, self.message = cause, message

    def __str__(self) -> str:
        return self.message


class DecodeError(SampleError):
    """One picture is unusable."""


class BadDataError(ValueError):
    """The data set has too many bad samples."""
