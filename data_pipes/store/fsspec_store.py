"""Any other file system of fsspec: local files, memory, Google's and Azure's stores, the Hugging Face hub.

Enters: pieces. Leaves: their bytes, a whole piece per attempt. Why it exists: these libraries offer no body to read
from and say nothing of the version with the bytes, so a piece is fetched anew after a failure, and the version is asked
for beside it, at most every 30 s per object. Credentials come from where each library looks for them.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from data_pipes.store.counters import Counters
from data_pipes.store.errors import StorageError, TransientError, error_of_status
from data_pipes.store.transport import ObjectInfo, Piece, StorageConfig, Transport, Versions, normal_etag
from data_pipes.store.urls import is_remote, local_path

_ETAG_KEYS = ("etag", "ETag", "blob_id", "md5Hash")
"""Under which the libraries say the version of an object."""
_RECHECK_S = 30.0
"""Seconds after which the version of an object is asked for again."""


class FsspecTransport(Transport):
    """Calls an asynchronous file system on fsspec's own loop (gcsfs and adlfs close their sessions by finalizers that
    need it until the process ends), any other in a pool of threads.
    """

    def __init__(
        self, config: StorageConfig, counters: Counters, versions: Versions, kind: str, options: dict[str, Any]
    ) -> None:
        """
        Args:
            config: of the run.
            counters: of this process.
            versions: what is known of the objects.
            kind: of the store, as fsspec names it.
            options: what the URL itself says of the store (the account of abfs://container@account...).
        """
        super().__init__(config, counters, versions)
        self._files: Any = fsspec.get_filesystem_class(kind)(skip_instance_cache=True, **options)
        self._kind = kind
        self._pool = ThreadPoolExecutor(config.requests, thread_name_prefix=f"tessera-{kind}")
        self._checked_s: dict[str, float] = {}

    async def info(self, url: str) -> ObjectInfo:
        found = await self._call("info", _path(url))
        if found.get("type") == "directory":
            raise StorageError(f"{url}: a folder; expected one object")
        if found.get("size") is None:
            raise StorageError(f"{url}: the store does not say how large it is; no ranged reads without")
        etag = next((str(found[key]) for key in _ETAG_KEYS if found.get(key)), None)
        if self._kind == "memory":
            etag = str(found.get("created"))
        return ObjectInfo(int(found["size"]), normal_etag(etag))

    async def fetch(self, piece: Piece) -> None:
        if time.monotonic() - self._checked_s.get(piece.url, -_RECHECK_S) >= _RECHECK_S:
            await self._check(piece)
        begin, end = piece.first_missing, piece.offset + piece.length
        data = await self._call("cat_file", _path(piece.url), start=begin, end=end)
        self.counters.add("bytes_fetched", len(data))
        piece.add(data)
        if piece.num_missing:
            await self._check(piece)  # a shard that was cut says so now, and not after all retries
            raise TransientError(f"the answer ended {piece.num_missing:,} bytes early")

    async def write(self, url: str, data: bytes) -> None:
        await self._call("pipe_file", _path(url), data)

    async def list(self, url: str) -> list[str]:
        if "*" in url:
            found = await self._call("glob", _path(url), detail=True)
            names = [name for name, entry in found.items() if entry["type"] == "file"]
        else:
            names = [entry["name"] for entry in await self._call("ls", _path(url), detail=True) if _is_file(entry)]
        return [_full_url(url, name) for name in names]

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def explain(self, url: str, error: Exception) -> Exception:
        status = _status(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return error_of_status(url, 404, f"{status or 'no such file'}")
        # gcsfs says 403 by words alone
        if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden"):
            return error_of_status(url, 403, f"{status or error}")
        if status >= 400:
            return error_of_status(url, status, f"{status} {error}"[:300])
        if isinstance(error, TimeoutError):
            return TransientError(f"no answer in {self.config.timeout_s:g} s", cause="timeouts")
        if isinstance(error, (IsADirectoryError, NotADirectoryError, NotImplementedError)):
            return StorageError(f"{url}: {error}")
        if isinstance(error, OSError):
            return TransientError(f"{type(error).__name__}: {error}")
        if isinstance(error, (ValueError, TypeError, AttributeError, KeyError)):
            return error
        return StorageError(f"{url}: {type(error).__name__}: {error}")

    async def _check(self, piece: Piece) -> None:
        found = await self.info(piece.url)
        self.versions.check(piece.url, piece.expected, found.size_bytes, found.etag)
        self._checked_s[piece.url] = time.monotonic()

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        async with asyncio.timeout(self.config.timeout_s):
            if isinstance(self._files, AsyncFileSystem):
                call = getattr(self._files, f"_{method}")(*arguments, **options)
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._files.loop))
            # past its time the call keeps its thread until the library gives up, its answer is dropped
            work = partial(getattr(self._files, method), *arguments, **options)
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _path(url: str) -> str:
    return url if is_remote(url) else str(local_path(url))


def _is_file(entry: dict[str, Any]) -> bool:
    return bool(entry["type"] == "file")


def _full_url(asked: str, name: str) -> str:
    """The name that a file system lists, as a URL like the one that was asked for."""
    if not is_remote(asked):
        return name
    scheme, _, rest = asked.partition("://")
    authority = rest.partition("/")[0]
    if "@" in authority and scheme.startswith("abfs"):  # the library lists CONTAINER/PATH, without the account
        return f"{scheme}://{authority}/{name.partition('/')[2]}"
    return f"{scheme}://{name.lstrip('/')}"


def _status(error: Exception) -> int:
    """The HTTP status behind an exception of gcsfs (code), adlfs (status_code) or the hub (response); 0: none."""
    response = getattr(error, "response", None)
    for source, name in ((error, "code"), (error, "status_code"), (response, "status_code"), (error, "status")):
        value = getattr(source, name, None)
        if isinstance(value, (int, str)) and str(value).isdigit():
            return int(value)
    return 0
