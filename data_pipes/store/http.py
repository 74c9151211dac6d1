"""HTTP(S) by fsspec's aiohttp session: ranged reads that resume where a connection broke.

Enters: pieces. Leaves: their bytes, straight from the body as it arrives. Why it exists: fsspec's own `cat_file` throws
away what had arrived when a connection breaks, reads the whole object from a server that ignores Range, and does not
look at the version.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import fsspec

from data_pipes.store.counters import Counters
from data_pipes.store.errors import AccessDeniedError, StorageError, TransientError, error_of_status
from data_pipes.store.transport import (
    ObjectInfo,
    Piece,
    StorageConfig,
    Transport,
    Versions,
    etag_of,
    normal_etag,
    range_and_total,
)

_HEADERS = {"Accept-Encoding": "identity"}
"""Of every request: ranges count the bytes as they are stored."""
_READ_BYTES = 1 << 20
"""Buffer of a connection; aiohttp's 64 KiB pauses the socket all the time."""


class HttpTransport(Transport):
    """http: and https: URLs. Options of the session come from fsspec's configuration ("http": client_kwargs)."""

    def __init__(self, config: StorageConfig, counters: Counters, versions: Versions, loop: Any) -> None:
        super().__init__(config, counters, versions)
        seconds = config.timeout_s
        # `total` would end large bodies that flow well
        timeout = aiohttp.ClientTimeout(total=None, connect=seconds, sock_connect=seconds, sock_read=seconds)
        options = {**fsspec.config.conf.get("http", {}).get("client_kwargs", {}), "timeout": timeout}
        options |= {"auto_decompress": False, "read_bufsize": _READ_BYTES}
        self._files = fsspec.filesystem(
            "http", loop=loop, skip_instance_cache=True, get_client=self._open_session, client_kwargs=options
        )

    async def _open_session(self, **options: Any) -> aiohttp.ClientSession:
        options.pop("loop", None)
        options.setdefault("connector", aiohttp.TCPConnector(limit=self.config.requests))
        return aiohttp.ClientSession(**options)

    async def info(self, url: str) -> ObjectInfo:
        session = await self._files.set_session()
        async with session.head(self._files.encode_url(url), headers=_HEADERS, allow_redirects=True) as answer:
            size = answer.headers.get("Content-Length")
            if answer.status == 200 and size is not None:
                _refuse_page(url, answer)
                return ObjectInfo(int(size), normal_etag(etag_of(answer.headers)))
            if answer.status not in (200, 403, 405, 501):  # these may be about HEAD alone
                _raise_for_status(url, answer)
        headers = {**_HEADERS, "Range": "bytes=0-0"}
        async with session.get(self._files.encode_url(url), headers=headers) as answer:
            if answer.status != 416:  # an empty object
                _raise_for_status(url, answer)
            total = _total(answer)
            if total is None:
                raise StorageError(f"{url}: the server does not say how large it is; no ranged reads without")
            return ObjectInfo(total, normal_etag(etag_of(answer.headers)))

    async def fetch(self, piece: Piece) -> None:
        session = await self._files.set_session()
        first, last = piece.first_missing, piece.offset + piece.length - 1
        headers = {**_HEADERS, "Range": f"bytes={first}-{last}"}
        async with session.get(self._files.encode_url(piece.url), headers=headers) as answer:
            if answer.status == 416:
                self._check(piece, answer)
                raise TransientError(f"answered {answer.status} {answer.reason} to bytes {first:,}-{last:,}")
            _raise_for_status(piece.url, answer)
            self._check(piece, answer)
            # leaving the block in mid-body drops the connection, so that nothing more is sent
            content_range = answer.headers.get("Content-Range", "") if answer.status == 206 else None
            await self.receive(answer.content, piece, self.bytes_to_skip(piece, content_range))

    async def write(self, url: str, data: bytes) -> None:
        session = await self._files.set_session()
        async with session.put(self._files.encode_url(url), data=data) as answer:
            if answer.status in (400, 403, 404, 405, 501):
                raise StorageError(
                    f"{url}: the server takes no files ({answer.status} {answer.reason}); write to a local "
                    "folder or to a store instead (--out, --index-dir)"
                )
            _raise_for_status(url, answer)

    async def list(self, url: str) -> list[str]:
        if "*" in url:
            return [found for found in await self._files._glob(url) if not found.endswith("/")]
        return [entry["name"] for entry in await self._files._ls(url) if entry["type"] == "file"]

    async def close(self) -> None:
        if self._files._session is not None:
            await self._files._session.close()

    def explain(self, url: str, error: Exception) -> Exception:
        if isinstance(error, aiohttp.ClientResponseError) and error.status >= 400:
            return error_of_status(url, error.status, f"{error.status} {error.message}")
        if isinstance(error, FileNotFoundError):
            return error_of_status(url, 404, "404")
        if isinstance(error, aiohttp.TooManyRedirects):
            return StorageError(
                f"{url}: the server redirects in a circle (last from {error.request_info.real_url}); check the URL, "
                "and whether it wants a login"
            )
        if isinstance(error, (aiohttp.InvalidURL, aiohttp.ClientSSLError)):
            return StorageError(f"{url}: {error or type(error).__name__}; check the URL and the certificates")
        if isinstance(error, TimeoutError):
            return TransientError(f"nothing arrived in {self.config.timeout_s:g} s", cause="timeouts")
        if isinstance(error, (aiohttp.ClientError, OSError)):
            return TransientError(f"{type(error).__name__}: {error}")
        return error

    def _check(self, piece: Piece, answer: aiohttp.ClientResponse) -> None:
        etag = etag_of(answer.headers, like=piece.expected.etag)
        self.versions.check(piece.url, piece.expected, _total(answer), etag)


def _raise_for_status(url: str, answer: aiohttp.ClientResponse) -> None:
    if answer.status >= 400:
        detail = f"{answer.status} {answer.reason}"
        raise error_of_status(url, answer.status, detail, answer.headers.get("Retry-After"))
    if answer.status not in (200, 201, 204, 206):
        raise StorageError(f"{url}: unexpected answer {answer.status} {answer.reason}")
    _refuse_page(url, answer)


def _refuse_page(url: str, answer: aiohttp.ClientResponse) -> None:
    """Raises where a server gives a page for people in an object's place."""
    wants_page = url.partition("?")[0].lower().endswith((".html", ".htm", "/"))
    if answer.content_type == "text/html" and not wants_page:
        raise AccessDeniedError(
            f"{url}: the server answers with a web page ({answer.url}) and not with the object: a login page, perhaps. "
            "Check the URL, and give credentials that the store accepts"
        )


def _total(answer: aiohttp.ClientResponse) -> int | None:
    """Bytes of the whole object; None: the answer does not say."""
    if answer.status in (206, 416):
        return range_and_total(answer.headers.get("Content-Range", ""))[1]
    return answer.content_length
