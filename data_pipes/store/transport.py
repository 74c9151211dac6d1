"""One attempt to get bytes from a store: what every kind of store has to offer, and what its answers mean.

Enters: a `Piece` (one request's share of a range). Leaves: the piece with the bytes that arrived, a `TransientError`
that says it is worth another attempt, or the error that ends the run. Why it exists: HTTP, S3 and the other file
systems of fsspec fail in different words; retries, limits and messages are written once, in data_pipes.store.storage.
Everything here runs on the event loop of one `Storage`.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from data_pipes.bounds import bounded
from data_pipes.errors import ShardError
from data_pipes.store.counters import Counters
from data_pipes.store.errors import TransientError

if TYPE_CHECKING:
    import aiohttp

PROGRESS_BYTES = 1 << 16
"""An attempt that brought this much is progress: a server that drops every connection is slow, not broken."""
_PACE_TIMEOUTS = 10
"""A body may bring less than PROGRESS_BYTES for so many time-outs; a trickle of single bytes would never time out."""
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")
_LOG = logging.getLogger(__name__)
_MODIFIED = "modified "
"""Begins an etag that was made from Last-Modified, for servers without ETag."""


@dataclass(frozen=True)
class StorageConfig:
    """Reading from stores; every process of a run does so by itself."""

    requests: int = bounded(16, least=1)
    """Requests at once, per process."""
    request_bytes: int = bounded(4 << 20, least=1)
    """Bytes of one request; larger reads are split."""
    timeout_s: float = bounded(30.0, above=0)
    """Seconds that connecting, and every wait for bytes, may take (gs, az and hf: the whole request)."""
    retries: int = bounded(8, least=0)
    """Retries of one request without progress, before the run stops."""
    backoff_s: float = bounded(0.25, least=0)
    """Seconds before the first retry. They double with each one, with jitter, up to 30; a server's Retry-After wins."""

    def __post_init__(self) -> None:
        if self.requests < 1 or self.request_bytes < 1 or self.retries < 0:
            raise ValueError(f"{self}: expected requests >= 1, request_bytes >= 1 and retries >= 0")
        if not (self.timeout_s > 0 and self.backoff_s >= 0):
            raise ValueError(f"{self}: expected timeout_s > 0 and backoff_s >= 0")


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of one object."""

    size_bytes: int
    etag: str | None
    """Changes with the content; without quotes and weak prefix. None: the store does not say."""


class ByteRange(NamedTuple):
    """A part of an object, and which version of the object it belongs to."""

    url: str
    offset: int
    length: int
    size_bytes: int
    """Of the whole object."""
    etag: str | None
    """Of the whole object; None: unknown."""


@dataclass
class Piece:
    """One request's share of a range, and what of it has arrived. It outlives attempts: the next one resumes."""

    url: str
    offset: int
    length: int
    expected: ObjectInfo
    parts: list[bytes] = field(default_factory=list)
    num_received: int = 0

    @property
    def first_missing(self) -> int:
        """The byte of the object at which the next attempt begins."""
        return self.offset + self.num_received

    @property
    def num_missing(self) -> int:
        """Bytes that have not arrived."""
        return self.length - self.num_received

    def add(self, data: bytes) -> None:
        """Takes what arrived, without what was not asked for."""
        data = data[: self.num_missing]
        self.parts.append(data)
        self.num_received += len(data)


class Versions:
    """Holds every object to one version: the manifest's, or else the first that was seen."""

    def __init__(self) -> None:
        self._first_seen: dict[str, str] = {}

    def check(self, url: str, expected: ObjectInfo, size_bytes: int | None, etag: str | None) -> None:
        """Compares what the store says of an object with what it has to be.

        Args:
            url: of the object.
            expected: size and etag that the manifest names.
            size_bytes: size that the store says; None: it does not say.
            etag: as the store says it; None: it does not.
        Raises:
            ShardError: the object has changed.
        """
        if size_bytes is not None and size_bytes != expected.size_bytes:
            raise _changed(url, f"{size_bytes:,} bytes", f"{expected.size_bytes:,} bytes")
        etag = normal_etag(etag)
        if etag is None:
            return
        known = normal_etag(expected.etag)
        if known is not None and known.startswith(_MODIFIED) == etag.startswith(_MODIFIED):
            if known != etag:
                raise _changed(url, f"etag {etag}", f"etag {known}")
        elif self._first_seen.setdefault(url, etag) != etag:
            raise _changed(url, f"etag {etag}", f"etag {self._first_seen[url]} when this process first read it")


class Transport(ABC):
    """One kind of store, in one process, on one event loop."""

    def __init__(self, config: StorageConfig, counters: Counters, versions: Versions) -> None:
        self.config, self.counters, self.versions = config, counters, versions
        self._hosts_without_ranges: set[str] = set()

    @abstractmethod
    async def info(self, url: str) -> ObjectInfo:
        """Size and etag of an object, as the store says now, never as a listing in memory does."""

    @abstractmethod
    async def fetch(self, piece: Piece) -> None:
        """One attempt to complete a piece; what arrived before a failure stays in it."""

    @abstractmethod
    async def write(self, url: str, data: bytes) -> None:
        """Writes a whole object."""

    @abstractmethod
    async def list(self, url: str) -> list[str]:
        """The objects directly in a folder, or those that a pattern with * names; full URLs, in any order."""

    @abstractmethod
    async def close(self) -> None:
        """Closes all connections."""

    @abstractmethod
    def explain(self, url: str, error: Exception) -> Exception:
        """What an exception of the store's library means: a TransientError, or the error to end with."""

    async def receive(self, body: aiohttp.StreamReader, piece: Piece, skip: int) -> None:
        """Fills a piece from a body, and stops as soon as it is complete.

        Args:
            body: of the answer.
            piece: gets the bytes.
            skip: bytes of the body that lie before those that are missing.
        Raises:
            TransientError: the body ended early, or hardly anything came for a long time.
        """
        window_start, window_bytes = time.monotonic(), 0
        while piece.num_missing:
            try:
                data = await body.readany()
            except Exception:
                # what had arrived when the connection broke; the public methods only raise again
                self._take(body._read_nowait(-1), piece, skip)
                raise
            if not data:
                raise TransientError(f"the answer ended {piece.num_missing + skip:,} bytes early")
            skip = self._take(data, piece, skip)
            window_bytes += len(data)
            if (elapsed_s := time.monotonic() - window_start) > _PACE_TIMEOUTS * self.config.timeout_s:
                if window_bytes < PROGRESS_BYTES:
                    raise TransientError(f"only {window_bytes:,} bytes in {elapsed_s:.0f} s", cause="timeouts")
                window_start, window_bytes = time.monotonic(), 0

    def _take(self, data: bytes, piece: Piece, skip: int) -> int:
        """Puts what arrived into the piece; returns how many bytes there still are to skip."""
        self.counters.add("bytes_fetched", len(data))
        piece.add(data[skip:] if skip else data)
        return max(0, skip - len(data))

    def bytes_to_skip(self, piece: Piece, content_range: str | None) -> int:
        """How many bytes of a body lie before the missing ones.

        Args:
            piece: what was asked for.
            content_range: the header of that name; None: the server ignores Range and sends the whole object.
        Raises:
            TransientError: the answer is another range than the one asked for.
        """
        if content_range is not None:
            if range_and_total(content_range)[0] != piece.first_missing:
                raise TransientError(f"answered {content_range!r} instead of bytes from {piece.first_missing:,} on")
            return 0
        self.counters.add("range_ignored")
        host = urlsplit(piece.url).netloc
        if host not in self._hosts_without_ranges:
            self._hosts_without_ranges.add(host)
            _LOG.warning("%s ignores Range: every read passes over the bytes before it, which is slow", host)
        return piece.first_missing


def range_and_total(content_range: str) -> tuple[int | None, int | None]:
    """(first byte, bytes of the whole object) of a Content-Range header; None: it does not say."""
    found = _CONTENT_RANGE.match(content_range)
    first, total = found.groups() if found else (None, None)
    return int(first) if first else None, int(total) if total else None


def normal_etag(etag: str | None) -> str | None:
    """An etag without quotes and weak prefix, since stores and their libraries differ in keeping them."""
    if not etag:
        return None
    return etag.strip().removeprefix("W/").strip('"') or None


def etag_of(headers: Mapping[str, str], like: str | None = None) -> str | None:
    """The etag of an HTTP answer, or one that is made of its time of modification.

    Args:
        headers: of the answer.
        like: an etag to compare it with; where that is made of the time of modification, this one is too.
    Returns:
        None where the answer has neither.
    """
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    if modified and (not etag or (like or "").startswith(_MODIFIED)):
        return _MODIFIED + modified
    return etag


def _changed(url: str, found: str, expected: str) -> ShardError:
    return ShardError(
        f"{url}: the object has changed: it has {found} now, expected {expected}; restore it, or run "
        "`tessera index` again and start anew"
    )
