"""S3 by s3fs: ranged reads that resume where a connection broke.

Enters: pieces. Leaves: their bytes, straight from the body as it arrives. Why it exists: s3fs and botocore each retry
on their own, which multiplies with ours and hides Retry-After; both are turned off here. Credentials, endpoint and
region come from where botocore looks for them (environment, ~/.aws) and from fsspec's configuration ("s3": ...).
"""

from __future__ import annotations

from typing import Any

import aiohttp
import fsspec
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from data_pipes.store.counters import Counters
from data_pipes.store.errors import AccessDeniedError, StorageError, TransientError, error_of_status
from data_pipes.store.transport import (
    ObjectInfo,
    Piece,
    StorageConfig,
    Transport,
    Versions,
    normal_etag,
    range_and_total,
)

_BROKEN = (
    boto.HTTPClientError,  # time-outs and connections refused or dropped
    boto.ConnectionError,
    boto.IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    OSError,
)


class S3Transport(Transport):
    """s3: URLs."""

    def __init__(
        self, config: StorageConfig, counters: Counters, versions: Versions, loop: Any, options: dict[str, Any]
    ) -> None:
        """
        Args:
            config: of the run.
            counters: of this process.
            versions: what is known of the objects.
            loop: the event loop that everything runs on.
            options: what the URL itself says of the store (?versionId=...).
        """
        super().__init__(config, counters, versions)
        of_botocore = {
            **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
            "connect_timeout": config.timeout_s,
            "read_timeout": config.timeout_s,
            "max_pool_connections": config.requests,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        self._files = fsspec.filesystem(
            "s3", loop=loop, skip_instance_cache=True, use_listings_cache=False, config_kwargs=of_botocore, **options
        )
        self._files.retries = 1  # s3fs's own

    async def info(self, url: str) -> ObjectInfo:
        answer = await self._call("head_object", url)
        return ObjectInfo(int(answer["ContentLength"]), normal_etag(answer.get("ETag")))

    async def fetch(self, piece: Piece) -> None:
        wanted = f"bytes={piece.first_missing}-{piece.offset + piece.length - 1}"
        try:
            answer = await self._call("get_object", piece.url, Range=wanted)
        except OSError as error:
            if _answer_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:  # it became shorter
                found = await self.info(piece.url)
                self.versions.check(piece.url, piece.expected, found.size_bytes, found.etag)
            raise
        body, content_range = answer["Body"], answer.get("ContentRange")
        try:
            total = range_and_total(content_range)[1] if content_range else int(answer["ContentLength"])
            self.versions.check(piece.url, piece.expected, total, answer.get("ETag"))
            # of older releases of aiobotocore the body is the stream itself
            stream = getattr(body, "raw_stream", body).content
            await self.receive(stream, piece, self.bytes_to_skip(piece, content_range))
        finally:
            body.close()

    async def write(self, url: str, data: bytes) -> None:
        await self._call("put_object", url, Body=data)

    async def list(self, url: str) -> list[str]:
        if "*" in url:
            found = await self._files._glob(url, detail=True)
            return [f"s3://{name}" for name, entry in found.items() if entry["type"] == "file"]
        return [
            f"s3://{entry['name']}"
            for entry in await self._files._ls(url, detail=True, refresh=True)
            if entry["type"] == "file"
        ]

    async def close(self) -> None:
        if self._files._s3 is not None:
            await self._files._s3.close()

    def explain(self, url: str, error: Exception) -> Exception:
        answer = _answer_of(error)
        if answer:
            return _error_of_answer(url, answer)
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound)):
            return AccessDeniedError(
                f"{url}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws or a role, or "
                "FSSPEC_S3_ANON=true for a public bucket"
            )
        if isinstance(error, FileNotFoundError):
            return error_of_status(url, 404, "404")
        if isinstance(error, (TimeoutError, boto.ConnectTimeoutError, boto.ReadTimeoutError)):
            return TransientError(f"nothing arrived in {self.config.timeout_s:g} s", cause="timeouts")
        if isinstance(error, _BROKEN):
            return TransientError(f"{type(error).__name__}: {error}")
        if isinstance(error, boto.BotoCoreError):
            return StorageError(f"{url}: {error}; check the store's configuration")
        return error

    async def _call(self, method: str, url: str, **options: Any) -> Any:
        bucket, key, version = self._files.split_path(url)
        if version:
            options["VersionId"] = version
        return await self._files._call_s3(method, Bucket=bucket, Key=key, **options)


def _answer_of(error: Exception) -> dict[str, Any]:
    """What S3 answered; s3fs translates botocore's exceptions and keeps them as the cause."""
    answer = getattr(error.__cause__ or error, "response", None)
    return answer if isinstance(answer, dict) else {}


def _error_of_answer(url: str, answer: dict[str, Any]) -> Exception:
    """What S3's error document and its HTTP status mean."""
    meta, said = answer.get("ResponseMetadata", {}), answer.get("Error", {})
    status, code = int(meta.get("HTTPStatusCode", 0)), str(said.get("Code", ""))
    retry_after = meta.get("HTTPHeaders", {}).get("retry-after")
    detail = " ".join(part for part in (str(status or ""), code, str(said.get("Message", ""))) if part)
    if code in ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"):
        status = 503
    elif code in ("RequestTimeout", "InternalError", "OperationAborted"):
        status = 500
    elif code == "NoSuchBucket" or not status:
        status = 404 if "NoSuch" in code else 400
    return error_of_status(url, status, detail, retry_after)
