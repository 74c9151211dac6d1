"""What can be wrong with data, as exceptions.

A `ShardError` is about a whole shard, a `SampleError` about one sample, a `BadDataError` about too many of these.
"""

from __future__ import annotations


class ShardError(ValueError):
    """A shard or its index cannot be used: which one, what was found, what to do."""


class SampleError(ValueError):
    """One sample is unusable. `cause` is a short name to count by; the message says what was found."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(cause, message)
        self.cause, self.message = cause, message

    def __str__(self) -> str:
        return self.message


class DecodeError(SampleError):
    """One picture is unusable."""


class BadDataError(ValueError):
    """The data set has too many bad samples."""
