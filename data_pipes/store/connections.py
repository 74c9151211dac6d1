"""The open part of a `Storage` in one process: an event loop in a thread, its transports, and the retries.

Enters: ranges and URLs, from any thread. Leaves: futures. Why it exists: hundreds of requests wait at once for the
price of one thread, and nothing of it may cross a fork, so it is one object that a process opens and closes as a whole.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, TypeVar

import fsspec

from data_pipes.errors import ShardError
from data_pipes.store.counters import Counters
from data_pipes.store.errors import StorageError, TransientError
from data_pipes.store.transport import PROGRESS_BYTES, ByteRange, ObjectInfo, Piece, StorageConfig, Transport, Versions
from data_pipes.store.urls import KINDS, check_url, scheme_of

_MAX_BACKOFF_S = 30.0
_CLOSE_TIMEOUT_S = 10.0
_PACKAGES = {"http": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
"""By kind of store, what to install for it."""
_JITTER = random.SystemRandom()  # not the seeded generator of a run, nor the same on every rank

T = TypeVar("T")


class Connections:
    """Everything that is open in one process. `close` leaves no thread and no socket.

    The coroutines `read`, `info`, `write` and `list` run on the event loop; `submit` starts them from any thread.
    """

    def __init__(self, config: StorageConfig, counters: Counters) -> None:
        self.config, self._counters, self._pid = config, counters, os.getpid()
        self._versions = Versions()
        self._transports: dict[tuple[str, ...], Transport] = {}
        self._slots = asyncio.Semaphore(config.requests)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tessera-storage", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts one of the coroutines below on the event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def read(self, wanted: ByteRange) -> bytes:
        """The bytes of a range, by as many requests as its length needs."""
        transport = self._transport(wanted.url)
        expected, step = ObjectInfo(wanted.size_bytes, wanted.etag), self.config.request_bytes
        pieces = [
            Piece(wanted.url, wanted.offset + begin, min(step, wanted.length - begin), expected)
            for begin in range(0, wanted.length, step)
        ]
        fills = [self._fill(transport, piece) for piece in pieces]
        if len(fills) == 1:
            await fills[0]
        else:
            tasks = [asyncio.ensure_future(fill) for fill in fills]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # one failure ends the read
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return b"".join(part for piece in pieces for part in piece.parts)

    async def info(self, url: str) -> ObjectInfo:
        """Size and etag of an object, as the store says now."""
        transport = self._transport(url)
        return await self._retried(transport, url, lambda: transport.info(url))

    async def write(self, url: str, data: bytes) -> None:
        """Writes a whole object; doing so twice is the same as once, so it may be retried."""
        transport = self._transport(url)
        await self._retried(transport, url, lambda: transport.write(url, data))

    async def list(self, url: str) -> list[str]:
        """The URLs that a folder or pattern names, sorted."""
        transport = self._transport(url)
        return sorted(await self._retried(transport, url, lambda: transport.list(url)))

    def close(self) -> None:
        """Ends what is under way and frees everything. Does nothing in a process that was forked from this one: the
        sockets belong to the parent.
        """
        if self._pid != os.getpid() or self._loop.is_closed() or threading.current_thread() is self._thread:
            return
        try:
            self.submit(self._close()).result(_CLOSE_TIMEOUT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for transport in self._transports.values():
            await transport.close()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()  # the threads that look up host names
        await asyncio.sleep(0)  # sockets are closed by callbacks

    async def _fill(self, transport: Transport, piece: Piece) -> None:
        await self._retried(transport, piece.url, lambda: transport.fetch(piece), piece)

    async def _retried(
        self, transport: Transport, url: str, attempt: Callable[[], Awaitable[T]], piece: Piece | None = None
    ) -> T:
        """What an attempt returns, once one succeeds.

        The slot is kept while it waits to try again: so a store that throttles gets fewer requests at once.

        Args:
            transport: explains the library's exceptions.
            url: of the object, for messages.
            attempt: starts one attempt.
            piece: what the attempts fill; with progress in it the count of failures starts anew.
        Raises:
            StorageError: there were more failures in a row than `StorageConfig.retries`.
        """
        failures = 0
        async with self._slots:
            while True:
                before = piece.num_received if piece else 0
                try:
                    return await self._counted(transport, url, attempt)
                except TransientError as error:
                    self._counters.merge({"request_errors": 1, error.cause: 1})
                    if piece and piece.num_received - before >= PROGRESS_BYTES:
                        failures = 0
                    failures += 1
                    if failures > self.config.retries:
                        raise _given_up(url, piece, failures, error) from error
                    await asyncio.sleep(self._delay_s(failures, error))
                    self._counters.add("retries")

    async def _counted(self, transport: Transport, url: str, attempt: Callable[[], Awaitable[T]]) -> T:
        start_s = time.perf_counter()
        try:
            return await attempt()
        except (TransientError, StorageError, ShardError):
            raise
        except Exception as error:
            raise transport.explain(url, error) from error
        finally:
            self._counters.merge({"requests": 1, "request_s": time.perf_counter() - start_s})

    def _delay_s(self, failures: int, error: TransientError) -> float:
        if error.retry_after_s is not None:
            return error.retry_after_s * _JITTER.uniform(1.0, 1.1)
        return min(_MAX_BACKOFF_S, self.config.backoff_s * 2.0 ** (failures - 1)) * _JITTER.uniform(0.5, 1.0)

    def _transport(self, url: str) -> Transport:
        """The transport of a URL's store; it is made here, on the loop."""
        kind = kind_of(url)
        try:
            options = fsspec.get_filesystem_class(kind)._get_kwargs_from_urls(url) if kind in ("az", "s3") else {}
            key = (kind, *(f"{name}={value}" for name, value in sorted(options.items())))
            if key not in self._transports:
                self._transports[key] = self._open(kind, options)
        except ImportError as error:
            package = _PACKAGES.get(kind, "fsspec")
            raise ValueError(
                f"{url}: {scheme_of(url)}:// needs the package {package}, which is not installed "
                f"({error.__cause__ or error}); run `pip install {package}`"
            ) from error
        return self._transports[key]

    def _open(self, kind: str, options: dict[str, Any]) -> Transport:
        # imported here: aiohttp, botocore and others are extras, and take up to a second
        if kind == "http":
            from data_pipes.store.http import HttpTransport

            return HttpTransport(self.config, self._counters, self._versions, self._loop)
        if kind == "s3":
            from data_pipes.store.s3 import S3Transport

            return S3Transport(self.config, self._counters, self._versions, self._loop, options)
        from data_pipes.store.fsspec_store import FsspecTransport

        return FsspecTransport(self.config, self._counters, self._versions, kind, options)


@lru_cache(maxsize=4096)
def kind_of(url: str) -> str:
    """The kind of store behind a URL; "file" for plain paths.

    Raises:
        ValueError: the URL is not to be opened.
    """
    check_url(url)
    return KINDS[scheme_of(url) or "file"]


def _given_up(url: str, piece: Piece | None, attempts: int, error: TransientError) -> StorageError:
    where = (
        f" at byte {piece.first_missing:,} (of bytes {piece.offset:,} to {piece.offset + piece.length:,})"
        if piece
        else ""
    )
    return StorageError(
        f"{url}: given up{where} after {attempts} attempts in a row without progress; the last: {error}; "
        "check the store and the network, then resume; data.storage.retries and timeout_s set how long to try"
    )
